"""Decoding with a guess at each row's tokens against decoding without one.

    python tests/bench/drafts.py
    python tests/bench/drafts.py --improver OUT/improver --data rows.jsonl

    SAPO   prompt and A are given, the EMA writes B': the draft is the gold's B
    SGPO   the improver's prompt is given, with the model's own answer: this is the draft

On the built-in tasks from the golden runs' start (SGPO: from --improver where given, which is phase
1 of `python train.py --recipe tasks-sgpo --model tests/golden/start --out OUT`); with --data also
on SmolLM2-135M-Instruct and the first rows of real instructions. In fp32, on a CPU.

    plain    no drafts
    rule     drafts, so many tokens at a time as has made the most a second: the product
    forced   drafts, always WIDTHS[0] tokens at a time, where any row has a guess
    lookup   transformers' prompt_lookup_num_tokens, which takes one row at a time

Tokens a step are those that a row makes after its first, which its prompt's pass gives. All ours
must be the plain run's, to the token; rows that transformers ends otherwise are counted. Of the
real model's cases the forced run goes once, first, and warms the others up.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import clock
import shapes
import torch
from fakes import Run
from peers import SAMPLING, load
from smollm2 import smollm2_folder

import data
import model as lm
import sgpo
import train
from data import Example, Pair, Tokenizer
from sapo import SAPO

ONE, GREEDY = {"temperature": 1.0}, {"temperature": 0.0}
KINDS = ("plain", "rule", "forced")
HEAD = "row,rows,x plain: rule,forced,tokens a step: rule,forced,with guesses: rule,forced,plain s"
Row = tuple[list[int], int, int, list[int]]  # a prompt, the most new tokens, a seed, a draft


def segments(pairs: list[Pair], tokenizer: Tokenizer, **flags: Any) -> list[Row]:
    """What SAPO asks the EMA for, and the gold segments."""
    run: Any = Run(lambda _: [], tokenizer, **flags)
    cuts = [(pair, pair.cut) for pair in SAPO(pairs, run).spoil(pairs)]
    drafts = [pair.chosen[cut.start : cut.stop] for pair, cut in cuts if cut]
    return [*zip(run.prompts, run.budgets, run.seeds, drafts, strict=True)]


def answers(
    model: lm.Transformer, asked: Sequence[tuple[Example, Pair]], tokenizer: Tokenizer,
    instruction: str, new: int, **how: Any,
) -> list[Row]:  # fmt: skip
    """What SGPO asks the improver for, and the answers that it is to improve."""
    prompts = [pair.prompt for _, pair in asked]
    made = lm.generate(model, prompts, new, eos_ids=tokenizer.eos_ids, **how)
    texts, c = map(tokenizer.response_text, made), SimpleNamespace(improver_instruction=instruction)
    both = zip(asked, texts, strict=True)
    frames = [sgpo.frame(example.messages, text, tokenizer, c) for (example, _), text in both]
    return [*zip(frames, [new] * len(made), range(len(made)), made, strict=True)]


class Case:
    """Rows that are decoded so many together, and what was seen of each kind of run."""

    def __init__(self, name: str, model: lm.Transformer, rows: list[Row], batch: int, **how: Any):
        self.name, self.model, self.rows, self.batch, self.how = name, model, rows, batch, how
        self.new: list[list[int]] = []
        self.runs: dict[str, list[Any]] = {kind: [] for kind in KINDS}  # steps: rows, tokens each

    def run(self, kind: str, rep: int = 0) -> None:
        """Decodes once. Raises SystemExit for tokens that another run did not make."""
        steps: list[Any] = []
        step, widths = lm.Cache.step, lm.WIDTHS[:1] if kind == "forced" else lm.WIDTHS

        def counted(cache: lm.Cache) -> None:
            steps.append(cache.fed_BW.shape)
            step(cache)

        prompts, most, seeds, drafts = (list(column) for column in zip(*self.rows, strict=True))
        how = self.how | {"seed": seeds, "batch_size": self.batch}
        how["drafts"] = None if kind == "plain" else drafts
        with (
            mock.patch.object(lm.Cache, "step", counted),
            mock.patch.object(lm, "WIDTHS", widths),
        ):
            new = lm.generate(self.model, prompts, most, **how)
        self.runs[kind].append(steps)
        self.new = self.new or new
        if new != self.new:
            raise SystemExit(f"{self.name}: drafts change tokens")

    def seen(self, kind: str) -> tuple[float, float]:
        """Tokens a row and step, and the share of steps with guesses."""
        steps = [shape for run in self.runs[kind] for shape in run]
        made = (sum(map(len, self.new)) - len(self.new)) * len(self.runs[kind])
        wide = sum(width > 1 for _, width in steps)
        return made / sum(rows for rows, _ in steps), wide / len(steps)

    def time(self, reps: int, others: dict[str, Callable[[int], Any]]) -> clock.Times:
        """Seconds by kind, the others' too; of a real model the forced run once, and first."""
        calls: dict[str, Callable[[int], Any]] = {kind: partial(self.run, kind) for kind in KINDS}
        slow = "SmolLM2" in self.name
        once = {"forced": [clock.seconds_of(calls.pop("forced"), 0, "cpu")]} if slow else {}
        return clock.alternate(calls | others, reps, "cpu", warm=slow) | once

    def line(self, seconds: clock.Times) -> list[str]:
        """A row of the table."""
        found = [self.seen(kind) for kind in KINDS[1:]]
        cells = [self.name, f"{len(self.rows)} by {self.batch}"]
        cells += [faster(seconds, kind, "plain") for kind in KINDS[1:]]
        cells += [f"{rate:.2f}" for rate, _ in found] + [f"{wide:.0%}" for _, wide in found]
        return [*cells, clock.spread(seconds["plain"])]


def faster(seconds: clock.Times, name: str, base: str) -> str:
    """How many times as fast; of what ran once, against the median."""
    if len(seconds[name]) == 1:
        return f"{median(seconds[base]) / seconds[name][0]:.2f}"
    return clock.speed(seconds, name, base)


def peers(case: Case, folder: Path) -> dict[str, Callable[[int], Any]]:
    """transformers' greedy decoding, a row at a time, without lookup and with; counts rows that are
    not ours."""
    model, ends = load(folder, "cpu"), [*case.how["eos_ids"]]

    def run(lookup: int | None, rep: int) -> None:
        other = 0
        for (prompt, most, *_), new in zip(case.rows, case.new, strict=True):
            ids = torch.tensor([prompt])
            how = {"attention_mask": torch.ones_like(ids), "eos_token_id": ends, "pad_token_id": 0}
            how |= {"max_new_tokens": most, "prompt_lookup_num_tokens": lookup}
            other += model.generate(ids, do_sample=False, **how)[0, len(prompt) :].tolist() != new
        if rep == 1:
            print(f"lookup {lookup}: {other} of {len(case.rows)} rows are not ours", flush=True)

    return {"transformers": partial(run, None), "lookup": partial(run, lm.WIDTHS[0])}


def on_tasks(improver: Path) -> Iterator[Case]:
    """The built-in tasks, sampled as their recipes do, and greedy."""
    start = shapes.ROOT / "tests" / "golden" / "start"
    tokenizer, examples = data.load_tokenizer(start), data.task_examples("clean", 64, 0)
    pairs = [data.encode_example(tokenizer, example) for example in examples]
    model, ends = lm.Transformer.from_pretrained(start), {"eos_ids": tokenizer.eos_ids}
    rows = segments(pairs, tokenizer, segment_length="8", segment_rule="uniform", max_length=128)
    yield Case("SAPO, tasks, T = 1", model, rows, 64, **ends, **ONE)
    yield Case("SAPO, tasks, greedy", model, rows, 64, **ends, **GREEDY)
    model, asked = lm.Transformer.from_pretrained(improver), [*zip(examples, pairs, strict=True)]
    instruction = str(train.TASKS_SGPO["improver_instruction"])
    rows = answers(model, asked, tokenizer, instruction, 40, **ONE)
    yield Case("SGPO, tasks, greedy", model, rows, 64, **ends, **GREEDY)
    yield Case("SGPO, tasks, T = 1", model, rows, 64, **ends, **ONE)


def on_rows(file: str, count: int) -> Iterator[Case]:
    """SmolLM2 on real rows: segments of 64 tokens, answers and improvements of up to 128."""
    folder = smollm2_folder()
    tokenizer, model = data.load_tokenizer(folder), lm.Transformer.from_pretrained(folder)
    both = [(x, data.encode_example(tokenizer, x)) for x in data.load_examples([file])]
    asked = [(x, pair) for x, pair in both if len(pair.prompt) <= 192 and len(pair.chosen) >= 64]
    asked, ends = asked[:count], {"eos_ids": tokenizer.eos_ids}
    pairs = [pair for _, pair in asked[:8]]
    rows = segments(pairs, tokenizer, segment_length="64", max_length=512)
    yield Case("SAPO, SmolLM2, T = 0.7", model, rows, 8, **ends, **SAMPLING)
    yield Case("SAPO, SmolLM2, greedy", model, rows, 8, **ends, **GREEDY)
    rows = answers(model, asked, tokenizer, sgpo.IMPROVER, 128, **SAMPLING)
    yield Case("SGPO, SmolLM2, greedy", model, rows, 8, **ends, **GREEDY)
    yield Case("SGPO, SmolLM2, T = 0.7", model, rows, 8, **ends, **SAMPLING)
    yield Case("SGPO, SmolLM2, alone, greedy", model, rows[:2], 1, **ends, **GREEDY)


def main(argv: Sequence[str]) -> None:
    """The table; for rows alone, transformers beside ours."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--improver", type=Path, default=shapes.ROOT / "tests" / "golden" / "start")
    parser.add_argument("--data", help="rows of real instructions; without it, the tasks alone")
    parser.add_argument("--rows", type=int, default=16, help="of real data, for SGPO [16]")
    parser.add_argument("--reps", type=int, default=5, help="timed repetitions [5]")
    args, lines = parser.parse_args(argv), []
    cases = [*on_tasks(args.improver), *(on_rows(args.data, args.rows) if args.data else ())]
    for case in cases:
        others = peers(case, smollm2_folder()) if case.batch == 1 else {}
        seconds = case.time(args.reps, others)
        lines.append(case.line(seconds))
        print(" | ".join(lines[-1]), flush=True)
        for name in (*KINDS, *others) if others else ():
            print(name, *(f"{faster(seconds, name, base)} x {base}," for base in others))
    clock.table("fp32, all tokens those of the plain runs", HEAD.split(","), lines)


if __name__ == "__main__":
    main(sys.argv[1:])
