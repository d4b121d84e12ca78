"""Every method and ablation on small tasks, and the search for a setting where one wins.

    python tests/bench/methods.py --out DIR                    # the whole table
    python tests/bench/methods.py --out DIR --quick            # SFT and SAPO on few seeds
    python tests/bench/methods.py --out DIR --setting unlabelled-16 --seeds 6
    python tests/bench/methods.py --list                       # the settings and their arms

An arm is a way to train. For each, a learning rate is chosen on validation prompts, with starts
that the table does not use, and by one rule for all (`choose`). The table is of other starts and of
test prompts. Each run is a line in DIR/results.jsonl under a key that is a digest of its settings:
what is there is not run again, so that a call that was cut goes on, and settings share their runs.
"""

import argparse
import collections
import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # a process a core; and sums that do not depend on the cores
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import judge
import open_ended
import torch

import data
import sample
import sapo
import train
from data import Example
from model import Transformer, generate, hash_seed, pair_logprobs

RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)  # the same ladder for every arm
TRIED_FIRST = (4, 5)  # places in RATES: 1e-4 and 3e-4
VALIDATION = (42, 1)  # seeds: of the start, the rows and all draws
TEST = tuple(range(2, 22))  # the table takes the first of these; no rate is chosen on them
TEMPERATURES = (0.0, 0.7, 1.0)
CELLS = [f"{kind}/{t:g}" for kind in ("seen", "unseen") for t in TEMPERATURES]
COLUMNS = [*CELLS, "score", "logp/seen", "logp/unseen", "seconds", "generated"]
PRETRAINING = 85.0  # seconds on one core of a Xeon at 2.5 GHz, for the estimate alone


@dataclass(frozen=True)
class Arm:
    """A way to train; `flags` are changes to the recipe `tasks`.

    base: the arm whose model it starts from; "": the pre-trained start. how: "improver" is SGPO's
    phase 1 alone, "greedy" trains on the base's own answers. rows: what it learns from
    (`gold_rows`); prompts: `unlabelled`. seconds: of a run with its measurement, for the estimate
    alone. tasks: the built-in ones, or "open" (open_ended.py).
    """

    flags: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    how: str = ""
    rows: str = "clean 128"
    prompts: str = "seen 1024"
    seconds: float = 20.0
    tasks: str = "built-in"


@dataclass(frozen=True)
class Run:
    """One training run and its measurement."""

    arm: Arm
    rate: float
    seed: int
    split: str
    base: "Run | None" = None

    @property
    def title(self) -> str:
        """What a person is told."""
        said = {k: v for k, v in self.arm.flags.items() if SELF_IMPROVER.get(k) != v}
        told = " ".join(f"{k}={v}" for k, v in said.items())
        where = self.arm.rows if self.arm.tasks == "built-in" else f"open, {self.arm.rows}"
        return f"{self.arm.how} {told} ({where}) rate {self.rate:g} seed {self.seed}"

    @property
    def start(self) -> str:
        """The name of the start among the starts."""
        return str(self.seed) if self.arm.tasks == "built-in" else f"{self.arm.tasks}-{self.seed}"

    @property
    def key(self) -> str:
        """A digest of the run's settings. The code and the recipe `tasks` are not in it: after a
        change of these take another --out."""
        said = {k: v for k, v in asdict(self).items() if k != "base"}
        left_out = {"seconds", "base"} | ({"tasks"} if self.arm.tasks == "built-in" else set())
        said["arm"] = {k: v for k, v in said["arm"].items() if k not in left_out}
        said["base"] = self.base.key if self.base else ""
        text = json.dumps(said, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------ the settings


Arms = dict[str, Arm]
SEGMENTS = {"segment_length": "8"}  # as the recipe `tasks-segments`
SELF_IMPROVER = {k: v for k, v in train.TASKS_SGPO.items() if train.TASKS.get(k) != v}
SELF_IMPROVER |= {"target_source": "tasks"}


def sft(steps: int, **more: Any) -> Arm:
    """Supervised fine-tuning on the gold responses."""
    return Arm({"method": "sft", "steps": steps}, seconds=5 + steps / 14, **more)


def table() -> Arms:
    """The whole table: every method, every ablation, and the controls."""
    arms = {"sft": sft(120), "sft, 60 steps": sft(60), "sft, 360 steps": sft(360)}
    arms["dpo"] = Arm({"method": "dpo"}, seconds=15)
    arms["orpo"] = Arm({"method": "orpo"}, seconds=13)
    arms["spin"] = Arm({"method": "spin"}, seconds=18)
    arms["sapo"] = Arm()
    changes = sapo.ABLATIONS | {"no-segment": SEGMENTS}  # the recipe has none
    arms |= {f"sapo {x.replace('no-s', 's')}": Arm(dict(y)) for x, y in changes.items()}
    arms["sapo + nll"] = Arm({"nll_weight": 1.0})
    arms["sapo orpo"] = Arm({"loss": "orpo"}, seconds=16)
    arms["sapo orpo, lambda 0"] = Arm({"loss": "orpo", "orpo_lambda": 0.0}, seconds=16)
    arms |= improver_and("", ["sgpo", "sgpo orpo", "greedy nll"], {})
    arms |= improver_and(" gold", ["sgpo"], {"target_source": "gold"})
    return arms


def improver_and(name: str, second: Sequence[str], more: Mapping[str, Any], **arm: Any) -> Arms:
    """SGPO's phase 1, and what may come behind it; `more`: flags of both.

    "kept": `--gate --keep-identical`; "greedy": with greedy answers for the model to improve.
    "greedy nll": SFT on all of the improver's own greedy answers to the same prompts, which shows
    what mere sharpening does.
    """
    flags = SELF_IMPROVER | dict(more)
    orpo = flags | {"loss": "orpo", "orpo_lambda": 1.0}
    kept = orpo | {"gate": True, "keep_identical": True}
    phases = {
        "sgpo": Arm(flags, seconds=25),
        "sgpo orpo": Arm(orpo, seconds=22),
        "sgpo orpo, kept": Arm(kept, seconds=22),
        "sgpo orpo, kept, greedy": Arm(kept | {"temperature": 0.0}, seconds=22),
        "greedy nll": Arm({"method": "sft"}, how="greedy", seconds=15),
    }
    arms = {"improver" + name: Arm(flags, how="improver", seconds=25, **arm)}
    base = "improver" + name
    return arms | {kind + name: replace(phases[kind], base=base, **arm) for kind in second}


def few(rows: str, lengths: Sequence[int] = (30, 60, 120)) -> Arms:
    """Few gold responses, or flawed ones: SAPO against SFT of several lengths."""
    arms = {f"sft, {steps} steps": sft(steps, rows=rows) for steps in lengths}
    arms["sapo"] = Arm(rows=rows)
    arms["sapo segments"] = Arm(SEGMENTS, rows=rows)
    arms["sapo + nll"] = Arm({"nll_weight": 1.0}, rows=rows)
    arms["sapo orpo"] = Arm({"loss": "orpo", "orpo_lambda": 1.0}, rows=rows)
    return arms


def many_prompts(count: int) -> Arms:
    """Few gold responses of half of the kinds, and 2,048 unlabelled prompts of all kinds."""
    rows = f"clean {count}"
    arms = {f"sft, {steps} steps": sft(steps, rows=rows) for steps in (30, 60, 120)}
    second = ["sgpo", "sgpo orpo, kept", "sgpo orpo, kept, greedy", "greedy nll"]
    return arms | improver_and("", second, {}, rows=rows, prompts="all 2048")


def other_values() -> Arms:
    """SAPO's segments, EMA and replay at other values than the recipe's: whole, 0.5 and 512."""
    tried = {
        "segment_length": ("4", "8", "16"),
        "ema_decay": (0.9, 0.99),
        "replay_capacity": (128, 4096),
    }
    arms = {f"sapo, {k} {v}": Arm({k: v}) for k, values in tried.items() for v in values}
    return {"sft": sft(120), "sapo": Arm()} | arms


def open_tasks(arms: Arms) -> Arms:
    """The same arms on open-ended tasks; SGPO's targets are those tasks' own."""
    return {name: replace(arm, tasks="open") for name, arm in arms.items()}


def in_short() -> Arms:
    """A method each, SAPO on whole responses and on segments, and SFT of three lengths."""
    names, every = ("dpo", "orpo", "spin", "improver", "sgpo", "greedy nll"), table()
    return few("clean 128", (60, 120, 360)) | {name: every[name] for name in names}


SETTINGS = {
    "table": table(),
    "quick": {"sft": sft(120), "sapo": Arm()},
    "unlabelled-128": many_prompts(128),
    "unlabelled-16": many_prompts(16),
    "few-16": few("clean 16"),
    "few-32": few("clean 32"),
    "flawed": few("clean 128 0.3", (60, 120, 360)),
    "values": other_values(),
    "open": open_tasks(in_short()),
    "open-unlabelled-16": open_tasks(many_prompts(16)),
}


# ----------------------------------------------------------------------------------------- one run


def start_of(run: Run, out: Path) -> Path:
    """The folder of the model that a run without a base starts from."""
    return out / "starts" / run.start / "start"


def untrained(arms: Mapping[str, Arm], seed: int, split: str) -> Run:
    """The measurement of the start that the arms of a setting have in common."""
    return Run(Arm(tasks=next(iter(arms.values())).tasks), 0.0, seed, split)


def config_of(run: Run) -> train.Config:
    """The run's flags, as train.py finds and checks them."""
    method = run.arm.flags.get("method", train.Config.method)
    values: dict[str, Any] = train.OWN.get(method, {}) | train.TASKS | run.arm.flags
    rate = run.rate or 1.0  # 0: the start itself, which is not trained
    values |= {"lr": [rate], "improver_lr": rate, "seed": run.seed, "log_every": 10**6}
    return train.check(train.Config(**values))


def gold_rows(run: Run) -> list[Example]:
    """So many rows of the clean set. With "clean 128 0.3" three in ten of 128 are flawed."""
    _, count, *share = run.arm.rows.split()
    flawed = float(share[0]) if share else 0.0
    rng = random.Random(hash_seed(run.seed, "flawed"))
    return [
        replace(e, response=e.rejected) if e.rejected and rng.random() < flawed else e
        for e in data.task_examples("clean", int(count), run.seed)
    ]


def unlabelled(run: Run) -> list[Example]:
    """Prompts for training: "seen 1024" are of the clean set's kinds, "all 1024" of all kinds, and
    drawn anew, not from what the start has seen. Their answers are not read."""
    kinds, count = run.arm.prompts.split()
    if kinds == "seen":
        return data.task_examples("clean", int(count), run.seed)
    return data.task_examples("pretrain", int(count), hash_seed(run.seed, "prompts"))


def self_labelled(run: Run, model: Transformer, tokenizer: data.Tokenizer) -> list[Example]:
    """The same prompts with the model's own greedy answers."""
    examples = unlabelled(run)
    asked = [tokenizer.apply_chat_template(e.messages, True) for e in examples]
    new = generate(model, asked, 40, temperature=0.0, eos_ids=tokenizer.eos_ids, batch_size=512)
    both = zip(examples, map(tokenizer.response_text, new), strict=True)
    return [replace(e, response=text, rejected=None) for e, text in both if text.strip()]


@contextlib.contextmanager
def metered() -> Iterator[tuple[collections.Counter[str], dict[str, list[float]]]]:
    """Counts the tokens of all that is trained within, and keeps what the steps log;
    `rejected/as_good` is the share of SAPO's and SPIN's new pairs of unequal sides whose rejected
    one the checker finds as good as the chosen one, or better."""
    tokens: collections.Counter[str] = collections.Counter()
    logged: dict[str, list[float]] = collections.defaultdict(list)
    step, write = train.step, train.Learner.generate

    def counted_step(c: train.Config, learner: train.Learner, source: Any, t: int) -> Any:
        pairs, table, row = step(c, learner, source, t)
        for key, value in row.items():
            if key in ("tokens/policy", "tokens/reference"):
                tokens[key] += int(value)
            elif key.startswith(("improve/", "rewards/", "pairs/", "logps/", "segment/", "loss")):
                logged[key].append(value)
        if isinstance(source, sapo.SAPO | sapo.SPIN):
            logged["rejected/as_good"] += as_good(source.fresh, learner.tokenizer)
        return pairs, table, row

    def counted_write(self: train.Learner, *args: Any, **named: Any) -> Any:
        new = write(self, *args, **named)
        tokens["generated"] += sum(len(answer) for answer, _ in new)
        return new

    with (
        mock.patch.object(train, "step", counted_step),
        mock.patch.object(train.Learner, "generate", counted_write),
    ):
        yield tokens, logged


def as_good(pairs: Iterable[data.Pair], tokenizer: data.Tokenizer) -> list[float]:
    """For each pair of unequal sides 1 where the rejected is as good as the chosen, else 0."""
    marks = []
    for pair in pairs:
        prompt = tokenizer.decode(pair.prompt[1:-1])  # without <|user|> and <|assistant|>
        both = (tokenizer.response_text(side) for side in (pair.chosen, pair.rejected))
        good, bad = (data.check_answer(prompt, text) for text in both)
        if pair.chosen != pair.rejected:
            marks.append(float(bad >= good))
    return marks


def execute(run: Run, out: Path) -> dict[str, Any]:
    """`train_and_measure`, on the arm's tasks."""
    with open_ended.stand_in(run.arm.tasks == "open"):
        return train_and_measure(run, out)


def train_and_measure(run: Run, out: Path) -> dict[str, Any]:
    """The line for results.jsonl. Seconds are of the process's CPU time."""
    torch.set_num_threads(1)
    folder, start = out / "runs" / run.key, start_of(run, out)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut
    folder.mkdir(parents=True)
    c, tokenizer, ranks = config_of(run), data.load_tokenizer(start), train.Ranks()
    c.out, base = str(folder), out / "runs" / run.base.key / "final" if run.base else start
    model = Transformer.from_pretrained(base)
    began = time.process_time()
    files = train.Files(ranks, tokenizer, folder / "metrics.jsonl", folder / "final", c.method)
    with metered() as (tokens, logged), contextlib.redirect_stdout(io.StringIO()):
        if run.arm.how == "improver":
            asks = [(e, data.encode_example(tokenizer, e)) for e in gold_rows(run)]
            train.train_improver(c, base, {"--data": asks}, files)
            (folder / "improver").rename(folder / "final")
        elif run.rate:
            greedy, alone = run.arm.how == "greedy", c.method == "sgpo"  # alone: prompts
            examples = unlabelled(run) if alone else gold_rows(run)
            if greedy:
                examples = self_labelled(run, model, tokenizer)
            pairs = [data.encode_example(tokenizer, example) for example in examples]
            tokens["generated"] += greedy * sum(len(pair.chosen) for pair in pairs)
            kind = train.SOURCES[c.method][0]
            learner = train.Learner(c, base, tokenizer, ranks, *kind.roles)
            rows = [*zip(examples, pairs, strict=True)] if alone else pairs
            train.fit(c, learner, kind(rows, learner), files)
    told: dict[str, Any] = {"seconds": 0.0}  # of the start itself
    if run.rate:
        told["seconds"] = time.process_time() - began
        model = Transformer.from_pretrained(folder / "final")
    before = Transformer.from_pretrained(start)
    told |= measure(model, before, tokenizer, run.seed, run.split)
    told["generated"] = tokens["generated"]
    told |= {"computed": tokens["tokens/policy"] + tokens["tokens/reference"]}
    means = {key: statistics.fmean(values) for key, values in logged.items() if values}
    shares = judge.by_checker([*train.json_lines(folder / "pairs.jsonl")])
    means |= {f"improve/{key}": share for key, share in shares.items()}
    return told | {"logged": means}


def measure(
    model: Transformer, before: Transformer, tokenizer: data.Tokenizer, seed: int, split: str
) -> dict[str, float]:
    """Exact match (of open-ended tasks: quality) in % at each temperature, their mean, the gold's
    log-prob per response, and `kl`."""
    told: dict[str, float] = {}
    for t in TEMPERATURES:
        shares = sample.task_accuracy(model, tokenizer, seed, t, split)
        told |= {f"{kind}/{t:g}": 100 * share for kind, share in shares.items()}
    told["score"] = statistics.fmean(told[cell] for cell in CELLS)
    examples = data.task_examples(split, 512, seed)
    pairs = [data.encode_example(tokenizer, e)._replace(rejected=[]) for e in examples]
    with torch.no_grad():
        logps = pair_logprobs(model, pairs)[0].tolist()
    seen = [data.task_kind(e.messages[-1]["content"]) in data.SEEN for e in examples]
    for name, wanted in (("seen", True), ("unseen", False)):
        found = [logp for logp, is_seen in zip(logps, seen, strict=True) if is_seen == wanted]
        told[f"logp/{name}"] = statistics.fmean(found)
    prompts = [pair.prompt for pair in pairs]
    return told | {"kl": kl(model, before, prompts, tokenizer.eos_ids, hash_seed(seed, "kl"))}


@torch.no_grad()
def kl(
    model: Transformer, before: Transformer, prompts: Sequence[list[int]], eos_ids: Sequence[int],
    seed: int,
) -> float:  # fmt: skip
    """KL(model || before) in nats a response, from a sample of the model's at temperature 1 to each
    prompt; near 0 it may come out below."""
    new = generate(model, [*prompts], 48, eos_ids=eos_ids, seed=seed, batch_size=512)
    pairs = [data.Pair(x, y, []) for x, y in zip(prompts, new, strict=True)]
    return float((pair_logprobs(model, pairs)[0] - pair_logprobs(before, pairs)[0]).mean())


def pretrain(run: Run, out: Path) -> None:
    """The run's start in OUT/starts, as the embedded default makes it."""
    torch.set_num_threads(1)
    start = start_of(run, out)
    data.write_task_tokenizer(start.parent)
    config, tokenizer = (
        train.parse_args(["--seed", str(run.seed)]),
        data.load_tokenizer(start.parent),
    )
    is_open = run.arm.tasks == "open"
    with open_ended.stand_in(is_open), contextlib.redirect_stdout(io.StringIO()):
        train.pretrain(config, start, tokenizer, train.Ranks())


# -------------------------------------------------------------------------------- many, and resume


class Results:
    """OUT/results.jsonl: a line for each finished run; and the processes that make more of them."""

    def __init__(self, out: Path, workers: int) -> None:
        self.out, self.file, self.workers = out, out / "results.jsonl", workers
        out.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, dict[str, float]] = {}
        for row in train.json_lines(self.file):  # leaves out a line that a kill has cut off
            self.known[row["key"]] = row["told"]

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those that are not there, each once, in order."""
        return list({run.key: run for run in runs if run.key not in self.known}.values())

    def add(self, run: Run, told: dict[str, Any]) -> None:
        """Writes a line."""
        self.known[run.key] = told
        line = json.dumps({"key": run.key, "told": told, "run": asdict(run)})
        broken = self.file.exists() and not self.file.read_bytes().endswith(b"\n")
        with self.file.open("a", encoding="utf-8") as file:
            file.write("\n" * broken + line + "\n")

    def need(self, runs: Iterable[Run]) -> None:
        """Does what is missing, and the starts that it needs."""
        wanted = self.missing(runs)
        starts = [*{run.start: run for run in wanted if not self.started(run)}.values()]
        if not wanted:
            return
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        with ProcessPoolExecutor(self.workers, mp_context=context) as pool:
            list(pool.map(pretrain, starts, [self.out] * len(starts)))
            tasks = {pool.submit(execute, run, self.out): run for run in wanted}
            for n, done in enumerate(as_completed(tasks), 1):
                run, told = tasks[done], done.result()
                self.add(run, told)
                print(f"{n}/{len(tasks)} score {told['score']:.1f} {run.title}", flush=True)

    def started(self, run: Run) -> bool:
        """Whether the run's start is there."""
        return start_of(run, self.out).exists()

    def scores(self, runs: Iterable[Run]) -> list[float]:
        """The runs' scores."""
        return [self.known[run.key]["score"] for run in runs]


def lineage(
    arms: Mapping[str, Arm], name: str, rates: Mapping[str, int], seed: int, split: str
) -> Run:
    """The run of an arm at the rate (a place in RATES) that each of it and its bases has."""
    base = arms[name].base
    above = lineage(arms, base, rates, seed, split) if base else None
    return Run(arms[name], RATES[rates[name]], seed, split, above)


def choose(scores: Mapping[int, float]) -> int:
    """THE rule, for all arms: the place in RATES of the best mean score on validation, the smaller
    rate where two are equal. A score is the mean of the six accuracies: greedy, temperature 0.7
    and 1, on seen and unseen kinds."""
    return max(sorted(scores), key=lambda place: scores[place])


def next_places(scores: Mapping[int, float], before: float = -math.inf) -> list[int]:
    """Which rates are to be tried: the first two; then neighbours of the best, until it has both
    its neighbours, or is at an end of the ladder. Where none leaves the model as good as it was
    `before`, all do harm, and smaller ones are tried: a collapse has no slope to follow."""
    if not scores:
        return list(TRIED_FIRST)
    best = choose(scores)
    around = {best - 1, best + 1} | ({min(scores) - 1} if scores[best] < before else set())
    return sorted((around & set(range(len(RATES)))) - scores.keys())


def tune(arms: Mapping[str, Arm], results: Results, seeds: Sequence[int]) -> dict[str, int]:
    """A rate for each arm; those that start from another arm wait for its."""
    chosen: dict[str, int] = {}
    starts = [untrained(arms, seed, "validation") for seed in seeds]
    results.need(starts)
    best = {"": statistics.fmean(results.scores(starts))}  # the score that each arm begins with
    for depth in range(2):
        level = [name for name, arm in arms.items() if bool(arm.base) == bool(depth)]
        tried: dict[str, dict[int, float]] = {name: {} for name in level}
        while wanted := {
            name: new for name in level if (new := next_places(tried[name], best[arms[name].base]))
        }:
            runs: dict[tuple[str, int], list[Run]] = {}
            for name, place in [(name, place) for name, new in wanted.items() for place in new]:
                at = chosen | {name: place}
                runs[name, place] = [lineage(arms, name, at, s, "validation") for s in seeds]
            results.need(run for many in runs.values() for run in many)
            for (name, place), many in runs.items():
                tried[name][place] = statistics.fmean(results.scores(many))
        for name in level:
            chosen[name] = choose(tried[name])
            best[name] = tried[name][chosen[name]]
            told = ", ".join(f"{RATES[p]:g}: {s:.1f}" for p, s in sorted(tried[name].items()))
            print(f"{name}: rate {RATES[chosen[name]]:g} of {told}", flush=True)
    return chosen


# --------------------------------------------------------------------------------------- the table


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def paired(values: Sequence[float], control: Sequence[float]) -> tuple[float, float]:
    """The mean of the paired differences, and its standard error, sd / sqrt(n)."""
    differences = [a - b for a, b in zip(values, control, strict=True)]
    mean, deviation = spread(differences)
    return mean, deviation / math.sqrt(len(differences))


def best_controls(
    arms: Mapping[str, Arm], chosen: Mapping[str, int], results: Results, seeds: Sequence[int]
) -> list[str]:
    """The SFT arm, of whatever length, that is best on validation; none where there is none."""
    controls = [name for name in arms if name.startswith("sft")]
    runs = {n: [lineage(arms, n, chosen, s, "validation") for s in seeds] for n in controls}
    means = {name: statistics.fmean(results.scores(many)) for name, many in runs.items()}
    return sorted(means, key=lambda name: -means[name])[:1]


def report(columns: Mapping[str, Mapping[str, list[float]]], controls: Sequence[str]) -> str:
    """The table in Markdown: mean ± standard deviation over seeds, and below each arm its paired
    differences to the controls ± standard error; * is beyond two standard errors.

    columns: by arm and column, a value for each seed, in the seeds' order.
    """
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, values in columns.items():
        cells = []
        for c in COLUMNS:
            digits = 2 if c.startswith("logp") else 0 if c == "generated" else 1
            cells.append(" ± ".join(f"{x:.{digits}f}" for x in spread(values[c])))
        lines.append(f"| **{name}** | " + " | ".join(cells) + " |")
        for control in controls:
            if name not in (control, "start"):
                both = [paired(values[c], columns[control][c]) for c in COLUMNS[:-2]]
                cells = [f"{d:+.2f} ± {e:.2f}{' *' * (abs(d) > 2 * e)}" for d, e in both]
                lines.append(f"| \N{MINUS SIGN} {control} | " + " | ".join(cells) + " | | |")
    return "\n".join(lines)


def plan(
    arms: Mapping[str, Arm], results: Results, tuning: Sequence[int], seeds: Sequence[int]
) -> str:
    """How much there is to do, if each arm tries three rates."""
    count = len(arms) * (3 * len(tuning) + len(seeds))
    cost = sum(arm.seconds for arm in arms.values()) * (3 * len(tuning) + len(seeds))
    starts = sum(not results.started(untrained(arms, s, "test")) for s in {*tuning, *seeds})
    minutes = (cost + starts * PRETRAINING) / 60 / results.workers
    return (
        f"{starts} starts and about {count} runs, {minutes:.0f} minutes on {results.workers} idle "
        f"cores, less what {results.file} has of them ({len(results.known)} runs in all)"
    )


def main() -> None:
    """Chooses rates, runs the table's seeds, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/methods"))
    parser.add_argument("--setting", nargs="+", default=["table"], choices=SETTINGS)
    parser.add_argument("--quick", action="store_true", help="SFT and SAPO, 1 + 2 seeds")
    parser.add_argument("--seeds", type=int, default=5, help="how many the table has [5]")
    parser.add_argument("--validate", action="store_true", help="choose rates, and stop there")
    parser.add_argument("--only", nargs="+", help="of the setting's arms these alone")
    parser.add_argument("--against", nargs="+", metavar="ARM", help="differences are to it [sft]")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    tuning, seeds = list(VALIDATION), list(TEST[: args.seeds])
    if args.quick:
        print("--quick: one seed to choose on and two to show; this says little")
        args.setting, tuning, seeds = ["quick"], tuning[:1], seeds[:2]
    known = {name for setting in args.setting for name in SETTINGS[setting]}
    if unknown := {*(args.only or []), *(args.against or [])} - known:
        parser.error(f"no arm of {' '.join(args.setting)}: {', '.join(sorted(unknown))}")
    results = Results(args.out, args.workers)
    for setting in args.setting:
        arms = SETTINGS[setting]
        if args.only:
            bases = {arm.base for n, arm in arms.items() if n in args.only}
            arms = {n: arm for n, arm in arms.items() if n in bases.union(args.only)}
        print(f"\n## {setting}: {', '.join(arms)}")
        if args.list:
            continue
        print(plan(arms, results, tuning, seeds), flush=True)
        chosen = tune(arms, results, tuning)
        if args.validate:
            continue
        runs = {n: [lineage(arms, n, chosen, s, "test") for s in seeds] for n in arms}
        runs = {"start": [untrained(arms, s, "test") for s in seeds]} | runs
        for depth in range(2):  # those that others start from first
            level = [many for many in runs.values() if (many[0].base is not None) == bool(depth)]
            results.need(run for many in level for run in many)
        best = best_controls(arms, chosen, results, tuning)
        controls = dict.fromkeys(n for n in args.against or ["sft", *best] if n in arms)
        columns = {
            name: {c: [results.known[run.key][c] for run in many] for c in COLUMNS}
            for name, many in runs.items()
        }
        print(f"\n{report(columns, list(controls))}\n", flush=True)


if __name__ == "__main__":
    main()
