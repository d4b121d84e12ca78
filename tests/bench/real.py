"""SFT, SAPO, SPIN and SGPO on real instructions, from one start: what each does, and what it logs.

    python tests/bench/real.py --data rows.jsonl --pairs pairs.jsonl --out DIR
    python tests/bench/real.py --data rows.jsonl --pairs pairs.jsonl --out DIR --only sft sapo-dpo

The tables are also in DIR/report.md, answers in DIR/answers.md. --data has good responses; --pairs
has a weak model's as well, as `rejected`. Some of the pairs are held out, the same whatever the
seed: no arm sees their prompts. Each arm is a call of train.py; one that is in DIR is not run
again, and one that was cut goes on. The start is SmolLM2-135M-Instruct.

All arms have one learning rate and as many gradient steps, but that SGPO has fewer by the targets
that its fence drops. The default rate, 1e-5 under RMSprop, is chosen to move a model of this size
within some thirty steps, and is tuned for none of them.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this folder has a sapo.py too

import judge
import torch
from smollm2 import smollm2_folder

import data
from data import Example, Pair
from model import Transformer, generate, hash_seed, pair_logprobs

ROOT = Path(__file__).resolve().parents[2]
ARMS = {
    "sft": "--method sft",
    "sapo-dpo": "--method sapo",
    "sapo-orpo": "--method sapo --loss orpo",
    "spin": "--method spin --rounds 2",
    "sgpo-gold": "--method sgpo --target-source gold --improver-epochs 1",
}
# Seconds of a step with the defaults, for the estimate alone: half of the CPU time that one thread
# took on a busy Xeon at 2.5 GHz. The last: of a model's measuring.
SECONDS = {"sft": 5, "sapo-dpo": 15, "sapo-orpo": 14, "spin": 16, "sgpo-gold": 12, "": 65}
BETA = 0.1  # of the held-out rewards, and train.py's default
SHOWN = 10  # prompts in answers.md
# Keys of metrics.jsonl that are shown, by what they begin with, in this order.
GROUPS = """`loss `nll `grad_norm `logps/ `rewards/ `pairs/identical `segment/ `seam/ `replay/
    `improve/ `skipped `seconds/ `tokens""".split()  # noqa: SIM905


# ---------------------------------------------------------------------------------------- the rows


def asked(example: Example) -> str:
    """What two rows with the same prompt have in common."""
    return "\n".join(turn["content"].strip() for turn in example.messages)


def order(example: Example) -> int:
    """A place that depends on the prompt alone."""
    return hash_seed("real", asked(example))


def fits(pair: Pair, max_length: int) -> bool:
    """Whether nothing of it would be dropped or cut by train.py."""
    longest = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
    return len(pair.prompt) < max_length * 7 // 8 and longest <= max_length


def split(args: argparse.Namespace, tokenizer: data.Tokenizer) -> tuple[list[Example], ...]:
    """Training rows and held-out pairs: whole within --max-length, and without a common prompt."""

    def whole(examples: Sequence[Example]) -> list[Example]:
        encode = data.encode_example
        kept = [e for e in examples if fits(encode(tokenizer, e), args.max_length)]
        return sorted(kept, key=order)

    pairs = {asked(e): e for e in whole(data.load_examples(args.pairs, True))}
    held_out = [*pairs.values()][: args.held_out]
    unseen = {asked(e) for e in held_out}
    rows = whole([e for e in data.load_examples(args.data) if asked(e) not in unseen])
    if len(held_out) < args.held_out or not rows:
        raise SystemExit(f"{len(pairs)} pairs and {len(rows)} rows are too few")
    return rows, held_out


def write_rows(file: Path, examples: Sequence[Example]) -> str:
    """Rows as train.py reads them; the file's text."""
    turns = [[*e.messages, {"role": "assistant", "content": e.response}] for e in examples]
    text = "".join(json.dumps({"messages": x}, ensure_ascii=False) + "\n" for x in turns)
    file.write_text(text, encoding="utf-8")
    return text


# ------------------------------------------------------------------------------ training, measuring


def once(file: Path, settings: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives, as JSON; it is kept in a file, and not made again."""
    if not file.exists():
        text = json.dumps({"settings": settings, "told": make()})
        file.write_text(text, encoding="utf-8")
    kept = json.loads(file.read_text(encoding="utf-8"))
    if kept["settings"] != settings:
        raise SystemExit(f"{file} is of other settings: take another --out, or delete it")
    return kept["told"]


def flags_of(arm: str, args: argparse.Namespace) -> list[str]:
    """train.py's flags. SGPO's phase 1 has about half of the steps: two rows for each of so many
    prompts, one of them the improver's. That one's prompt holds an answer too, so it may be
    longer. SAPO's reference is refreshed three times: an epoch would be longer than the run."""
    rate, half = dict(x.split("=") for x in args.lr_of).get(arm, str(args.lr)), args.steps // 2
    said: dict[str, Any] = {
        "model": args.model, "data": args.out / "rows.jsonl", "lr": rate, "steps": args.steps,
        "batch_size": args.batch_size, "max_length": args.max_length, "seed": args.seed,
        "log_every": 1, "save_every": args.save_every, "keep": 1,
        "optimizer": "rmsprop", "schedule": "linear",
    }  # fmt: skip
    if arm.startswith("sapo"):
        said["segment_length"] = args.segment_length
    if arm == "sapo-dpo":
        said["ref_update_every"] = max(1, args.steps // 3)
    if arm in ("spin", "sgpo-gold"):
        said["max_new_tokens"] = args.max_new_tokens
    if arm == "sgpo-gold":
        said |= {"data": args.out / "improver_rows.jsonl", "steps": args.steps - half}
        said |= {"preference_data": args.out / "rows.jsonl", "improver_lr": rate}
        said |= {"max_length": 2 * args.max_length}
    flags = [str(part) for k, v in said.items() for part in ("--" + k.replace("_", "-"), v)]
    return [*ARMS[arm].split(), *flags]


def train_arm(arm: str, args: argparse.Namespace) -> float | None:
    """DIR/ARM; wall-clock seconds, None where the arm had been cut before."""
    folder, began = args.out / arm, time.perf_counter()
    cut = folder.exists()
    command = [sys.executable, str(ROOT / "train.py"), *flags_of(arm, args)]
    done = subprocess.run([*command, "--out", str(folder), "--resume"], check=False)
    if done.returncode:
        raise SystemExit(f"{arm} ended with {done.returncode}")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return None if cut else time.perf_counter() - began


@torch.no_grad()
def measure(
    folder: Path, held_out: Sequence[Example], args: argparse.Namespace
) -> dict[str, list[Any]]:
    """A model on the held-out rows: summed log-probs of both sides, their tokens, and its own
    greedy answers as token ids."""
    model, tokenizer = Transformer.from_pretrained(folder), data.load_tokenizer(args.model)
    pairs = [data.encode_example(tokenizer, e) for e in held_out]
    told: dict[str, list[Any]] = {name: [] for name in ("chosen", "rejected", "n", "m")}
    for pair in pairs:  # one at a time: the largest needs little memory, and nothing is padded
        for name, values in zip(told, pair_logprobs(model, [pair]), strict=True):
            told[name] += values.tolist()
    told["answers"] = generate(
        model, [pair.prompt for pair in pairs[: args.answers]], args.answer_tokens,
        temperature=0.0, eos_ids=tokenizer.eos_ids,
    )  # fmt: skip
    return told


# --------------------------------------------------------------------------------------- the tables


def table(columns: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown: what the columns hold by the names of rows; - where one has nothing. Rows are in
    the order of GROUPS, those of none of them first."""
    place = lambda name: next((i for i, g in enumerate(GROUPS) if name.startswith(g)), -1)  # noqa: E731
    names = sorted(dict.fromkeys(x for column in columns.values() for x in column), key=place)
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [column.get(name, "-") for column in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean(values: Sequence[float], digits: int = 2) -> str:
    """A signed mean and its standard error over the held-out pairs."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):+.{digits}f} ± {error:.{digits}f}"


def share(marks: Sequence[bool]) -> str:
    """In %."""
    return f"{100 * sum(marks) / len(marks):.1f}"


def preferences(told: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, str]:
    """The held-out column of a model; rewards and changes are against the start, for every arm."""
    good, bad, n, m = (told[name] for name in ("chosen", "rejected", "n", "m"))
    per_token, sides = sum(good) / sum(n), zip(good, bad, n, m, strict=True)
    column = {
        "good answer: log-prob, nats": f"{statistics.fmean(good):.1f}",
        "per token": f"{per_token:.3f}",
        "perplexity": f"{math.exp(-per_token):.2f}",
        "weak answer: per token": f"{sum(bad) / sum(m):.3f}",
        "good is likelier per token, %": share([g / i > b / j for g, b, i, j in sides]),
    }
    if told is start:
        lengths = f"{statistics.fmean(n):.1f}, {statistics.fmean(m):.1f}"
        return {"tokens: good, weak answer": lengths} | column
    up = [a - b for a, b in zip(good, start["chosen"], strict=True)]
    other = [a - b for a, b in zip(bad, start["rejected"], strict=True)]
    each = list(zip(up, other, n, m, strict=True))
    no_longer = [BETA * (a - b) for a, b, i, j in each if i <= j]
    return column | {
        "reward accuracy, %": share([a > b for a, b, *_ in each]),
        "reward margin": mean([BETA * (a - b) for a, b, *_ in each], 3),
        "where good is no longer than weak": mean(no_longer, 3) if no_longer else "-",
        "change per token, good less weak": mean([a / i - b / j for a, b, i, j in each], 3),
        "good answer: change, nats": mean(up),
        "weak answer: change, nats": mean(other),
        "good answer fell, %": share([a < 0 for a in up]),
        "weak answer fell, %": share([b < 0 for b in other]),
        "both fell, %": share([a < 0 and b < 0 for a, b, *_ in each]),
    }


def answering(told: Mapping[str, Any], start: Mapping[str, Any], eos_ids: Any) -> dict[str, str]:
    """The column of a model's greedy answers, and how long its training took."""
    answers, seconds = told["answers"], told["seconds"]
    same = [a == b for a, b in zip(answers, start["answers"], strict=True)]
    return {
        "tokens of an answer": f"{statistics.fmean(map(len, answers)):.1f}",
        "ended by EOS, %": share([ids[-1] in eos_ids for ids in answers]),
        "as the start's, %": share(same),
        "seconds of training": "-" if seconds is None else f"{seconds:.0f}",
    }


def logged(file: Path) -> dict[str, dict[str, str]]:
    """What each phase in a metrics.jsonl has logged: means over the steps that have a value, but
    for seconds and tokens, of which the others have 0."""
    phases: dict[str, list[dict[str, Any]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = {key: value for key, value in json.loads(line).items() if value is not None}
        for part in ("segment", "seam"):
            if f"{part}/new_logps" in row:
                row[f"{part}/logps - new"] = row[f"{part}/logps"] - row[f"{part}/new_logps"]
        phases.setdefault(row["phase"], []).append(row)
    columns = {}
    for phase, rows in phases.items():
        losses = [row["loss"] for row in rows if "loss" in row] or [math.nan]
        column = {"steps": f"{len(rows)}", "first loss": f"{losses[0]:.4g}"}
        column["loss of the last five"] = f"{statistics.fmean(losses[-5:]):.4g}"
        for key in dict.fromkeys(key for row in rows for key in row):
            if f"`{key}".startswith(tuple(GROUPS)) and key != "seconds/eval":  # none is made
                values = [row[key] for row in rows if key in row]
                count = len(rows if key.startswith(("seconds/", "tokens/")) else values)
                column[f"`{key}`"] = f"{math.fsum(values) / count:.4g}"
        columns[phase] = column
    return columns


def answers_text(
    held_out: Sequence[Example], found: Mapping[str, Any], tokenizer: data.Tokenizer
) -> str:
    """DIR/answers.md: a section a prompt, with the good answer and those of every model."""
    parts: list[str] = []
    for i, example in enumerate(held_out):
        texts = {f"## {i + 1}": asked(example), "**the good answer**": example.response}
        for name, told in found.items():
            ids = told["answers"][i]
            end = "ended" if ids[-1] in tokenizer.eos_ids else "cut"
            texts[f"**{name}**, {len(ids)} tokens, {end}"] = tokenizer.response_text(ids)
        for title, text in texts.items():
            parts += [title, "\n".join("> " + line for line in text.strip().splitlines())]
    return "\n\n".join(parts) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="rows with good responses")
    parser.add_argument("--pairs", required=True, help="rows with chosen and rejected")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="[SmolLM2-135M-Instruct]")
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=30, help="gradient steps of an arm [30]")
    parser.add_argument("--lr", type=float, default=1e-5, help="of all arms and phases [1e-5]")
    parser.add_argument("--lr-of", nargs="+", default=[], metavar="ARM=LR", help="of one arm")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256, help="longer rows are left out")
    parser.add_argument("--segment-length", type=int, default=64, help="SAPO [64]")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="SPIN and SGPO [96]")
    parser.add_argument("--save-every", type=int, default=10, help="steps between checkpoints [10]")
    parser.add_argument("--held-out", type=int, default=64, help="pairs to measure on [64]")
    parser.add_argument("--answers", type=int, default=20, help="of their prompts [20]")
    parser.add_argument("--answer-tokens", type=int, default=160, help="cut there [160]")
    args = parser.parse_args(argv)
    args.model, args.answers = args.model or smollm2_folder(), min(args.answers, args.held_out)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Splits, trains what is missing, measures, prints."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = data.load_tokenizer(args.model)
    rows, held_out = split(args, tokenizer)
    improver_rows = rows[: args.steps // 2 * args.batch_size // 2]
    digest = hash_seed(write_rows(args.out / "rows.jsonl", rows))
    write_rows(args.out / "improver_rows.jsonl", improver_rows)
    seconds = sum(SECONDS[arm] * args.steps + SECONDS[""] for arm in args.only) + SECONDS[""]
    print(f"{len(rows)} training rows and {len(held_out)} held-out pairs; with the default sizes")
    print(f"about {seconds / 60:.0f} minutes on 2 idle cores", flush=True)
    measured = [args.answers, args.answer_tokens, hash_seed(*map(asked, held_out))]
    found: dict[str, Any] = {}
    for name in ("start", *args.only):
        folder, seconds, settings = args.model, None, [str(args.model)]
        if name != "start":
            folder, settings = args.out / name / "final", [*flags_of(name, args), digest]
            train = partial(train_arm, name, args)
            seconds = once(args.out / f"{name}.trained.json", settings, train)
        look = partial(measure, folder, held_out, args)
        found[name] = once(args.out / f"{name}.measured.json", settings + measured, look)
        found[name]["seconds"] = seconds
        print(f"{name} is done", flush=True)
    text = answers_text(held_out[: min(SHOWN, args.answers)], found, tokenizer)
    (args.out / "answers.md").write_text(text, encoding="utf-8")
    start, logs, eos_ids = found["start"], {}, tokenizer.eos_ids
    for arm in args.only:
        for phase, column in logged(args.out / arm / "metrics.jsonl").items():
            logs[f"{arm}: {phase}" if phase == "improver" else arm] = column
        if (args.out / arm / "pairs.jsonl").exists():
            look = partial(judge.judge, args.out / arm)
            worth = once(args.out / f"{arm}.judged.json", [*flags_of(arm, args), digest], look)
            logs[arm] |= {f"`improve/{key}`": f"{x:.4g}" for key, x in worth["0"].items()}
    parts = [
        f"{len(held_out)} held-out pairs, mean ± standard error, changes against the start:",
        table({name: preferences(told, start) for name, told in found.items()}),
        f"{args.answers} greedy answers, cut at {args.answer_tokens} tokens:",
        table({name: answering(told, start, eos_ids) for name, told in found.items()}),
        "logged, means over the steps that have a value; what the improvements are worth:",
        table(logs),
    ]
    text = "\n\n".join(parts) + "\n"
    (args.out / "report.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
