"""CommonGen with SmolLM2-135M-Instruct: do pairs teach a model to use all of the words?

    python tests/bench/commongen.py --train FILE --dev FILE --out DIR           # the whole table
    python tests/bench/commongen.py --train FILE --dev FILE --out DIR --quick   # a first look
    python tests/bench/commongen.py --train FILE --dev FILE --out DIR --arms sapo spin --seeds 5

The task is one sentence that uses 3 to 5 given words in any inflected form; a program checks it.
Rows of the files: {"words": [[word, "N" or "V"], ...], "references": [sentence, ...]}. All arms go
on from one start (SFT, early-stopped) for as many steps, each at its own rate. Rates, the start's
length and the temperature are chosen on validation sets out of --train, by one rule (`score`) and
on a seed that the table does not use; the table is of --dev. Each measurement is a line in
DIR/results.jsonl, under a key that is a digest of its settings: it is not made again, so that a
call that was cut goes on. The table's models stay in DIR/models: the same call with another --dev
measures them on that.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import random
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import methods  # before torch: it takes one thread, and puts the product first on the path
import sacrebleu
import torch
from lemminflect import getAllInflections, getAllInflectionsOOV, getAllLemmas
from real import once
from smollm2 import smollm2_folder

import data
import sapo
import train
from data import Pair
from model import Transformer, generate, hash_seed, pair_logprobs

TUNING = 0  # the seed that chooses; the table has 1, 2, ...
FIRST_OF_START, FIRST_OF_ARMS = (3, 4), (2, 3)  # tried first: places in methods.RATES
EPOCHS = (1, 1, 2, 4)  # of the start's parts, each of which goes on from the one before
TEMPERATURES = (0.3, 0.7)  # validation chooses
AT_ONE = 300  # sets that are also answered at temperature 1
BATCH, TOKENS = 16, 48  # pairs a step, and tokens of an answer at most
ASKED = "Write one short sentence that uses all of these words: "
WORD = re.compile(r"[^\W\d_]+")
# Of one core, a step of 16 pairs with what it generates; for the estimate alone.
SECONDS = {"sft": 6, "dpo": 9, "sapo": 12, "spin": 14, "sgpo": 14}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # samples of the model as it is
SAPO = PLAIN | {"method": "sapo", "segment_length": "6", "segment_rule": "uniform"}
SAPO |= {"replay_capacity": 512, "drop_identical": True}
WHOLE = SAPO | {"segment_length": "full"}
SPIN = {"method": "spin", "rounds": 2, "max_new_tokens": TOKENS}
SGPO = PLAIN | {"method": "sgpo", "improve_temperature": 0.0, "improver_epochs": 1.0}
SGPO |= {"max_new_tokens": TOKENS, "max_length": 256}
# An arm: its rows (`training_rows`), and train.py's flags. "times": so many times the steps; those
# of SFT are for equal time. "checked": SAPO without the pairs whose rejected side has all words.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft continued": ("gold", {"method": "sft"}),
    "sft, twice as long": ("gold", {"method": "sft", "times": 2}),
    "sft, 4 times as long": ("gold", {"method": "sft", "times": 4}),
    "sft, all references": ("all", {"method": "sft"}),
    "sapo": ("gold", SAPO),
    "sapo whole": ("gold", WHOLE),
    "sapo checked": ("gold", SAPO | {"checked": True}),
    "sapo whole checked": ("gold", WHOLE | {"checked": True}),
    "sapo no-ema": ("gold", SAPO | {"ema_decay": 0.0}),
    "sapo no-replay": ("gold", SAPO | {"replay_capacity": 0}),
    "sapo + nll": ("gold", SAPO | {"nll_weight": 1.0}),
    "sapo whole + nll": ("gold", WHOLE | {"nll_weight": 1.0}),
    "sapo orpo": ("gold", SAPO | {"loss": "orpo", "orpo_lambda": 1.0}),
    "sapo orpo, lambda 0": ("gold", SAPO | {"loss": "orpo", "orpo_lambda": 0.0}),
    "spin": ("gold", SPIN),
    "sgpo gold": ("gold", SGPO | {"target_source": "gold"}),
    "sgpo checked": ("gold", SGPO | {"target_source": "checked"}),
    "dpo untrained": ("untrained", {"method": "dpo"}),
    "dpo own": ("own", {"method": "dpo"}),
    "dpo oracle": ("oracle", {"method": "dpo"}),
    "placebo": ("placebo", {"method": "dpo"}),
    "greedy nll": ("greedy", {"method": "sft"}),
}
CONTROL, QUICK = "sft continued", ["sft continued", "sapo", "spin", "placebo"]
SGPO_ROWS = ("gold", "checked")  # its improver learns from a few of them, `few-gold.jsonl`
Set = dict[str, Any]  # a row of the data
Told = dict[str, Any]  # a line of results.jsonl: lists hold a value for each set, % where a share


# -------------------------------------------------------------------------------------- the checker


@functools.cache
def forms(word: str) -> frozenset[str]:
    """The inflected forms of a word and of its lemmas, as a noun and as a verb; also by rule, as
    the given words are not always lemmas ("christma", "texte")."""
    lemmas = {word} | {lemma for many in getAllLemmas(word).values() for lemma in many}
    tables = [getAllInflections(lemma) for lemma in lemmas]
    tables += [getAllInflectionsOOV(word, kind) for kind in ("NOUN", "VERB")]
    return frozenset({word} | {x.lower() for t in tables for many in t.values() for x in many})


def check(words: Sequence[str], text: str) -> list[bool]:
    """Which of the words a text uses."""
    said = set(WORD.findall(text.lower()))
    return [not said.isdisjoint(forms(word)) for word in words]


def mere_list(words: Sequence[str], text: str) -> bool:
    """Whether a text has two or more of the words, and beside them articles, and, or, alone."""
    known = frozenset({"and", "or", "a", "an", "the"}).union(*map(forms, words))
    return sum(check(words, text)) > 1 and known.issuperset(WORD.findall(text.lower()))


def check_prompt(prompt: str, text: str) -> bool:
    """What `data.check_answer` is for the built-in tasks. `prompt` is in its template."""
    said = re.search(re.escape(ASKED) + r"([^.]*)\.", prompt)
    return all(check(said[1].split(", "), text)) if said else False


# ----------------------------------------------------------------------------------------- the data


def names(row: Set) -> list[str]:
    """The words of a set."""
    return [word for word, _ in row["words"]]


def asked(row: Set) -> str:
    """What the user says."""
    return ASKED + ", ".join(names(row)) + "."


@functools.cache
def read(file: str) -> list[Set]:
    """The sets of a file, each once, in an order that depends on the words alone."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    return sorted({asked(x): x for x in rows}.values(), key=lambda x: hash_seed("set", asked(x)))


@dataclass(frozen=True)
class Sizes:
    """What all runs have in common. rows: of training; sets: measured of --dev, at most."""

    train: str
    dev: str
    rows: int
    steps: int
    validation: int
    sets: int
    precision: str
    model: str

    def held_out(self, split: str) -> list[Set]:
        """The sets of "dev", or of "validation", which no seed trains on."""
        return (
            read(self.dev)[: self.sets] if split == "dev" else read(self.train)[: self.validation]
        )

    def gold(self, seed: int) -> list[Set]:
        """A seed's training sets: with two references at least, for the placebo's sake."""
        rest = read(self.train)[self.validation :]
        able = [row for row in rest if len(set(row["references"])) > 1]
        return random.Random(hash_seed(seed, "gold")).sample(able, min(self.rows, len(able)))


@dataclass(frozen=True)
class Run:
    """A training run. rows: the name of its file; flags: train.py's, or none: the model as it is;
    base: what it goes on from, None: the untrained model."""

    name: str
    rows: str
    flags: dict[str, Any]
    rate: float
    seed: int
    sizes: Sizes
    base: "Run | None" = None

    @property
    def key(self) -> str:
        """A digest of all that the result depends on, but for the code: after a change of it take
        another --out."""
        said = asdict(replace(self, base=None)) | {"base": self.base.key if self.base else ""}
        said["sizes"] |= {"train": Path(self.sizes.train).name, "dev": "", "sets": 0}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]

    def folder(self, out: Path) -> Path:
        """Where its model is, in `final`."""
        title = re.sub(r"\W+", "-", self.name)
        return out / "models" / f"{title}-seed{self.seed}-{self.rate:g}-{self.key[:6]}"

    def model(self, out: Path) -> Path:
        """Its model's folder."""
        return self.folder(out) / "final" if self.flags else Path(self.sizes.model)

    def compared(self, out: Path) -> Path:
        """The model that its KL is from: the start; for the start the untrained one."""
        alone = self.base is None or self.name == "start"
        return Path(self.sizes.model) if alone else self.base.model(out)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Look:
    """A measurement of a run's model, on "validation" or "dev"."""

    run: Run
    split: str
    temperatures: tuple[float, ...] = (0.0, *TEMPERATURES)

    @property
    def key(self) -> str:
        """What it is known by in results.jsonl."""
        said, sizes = [self.run.key, self.split], self.run.sizes
        said += [Path(sizes.dev).name, str(sizes.sets)] if self.split == "dev" else []
        return "-".join([*said, *map(str, self.temperatures)])


def prompt_of(tokenizer: data.Tokenizer, row: Set) -> list[int]:
    """Token ids."""
    return tokenizer.apply_chat_template([{"role": "user", "content": asked(row)}], True)


def load(folder: Path, sizes: Sizes) -> Transformer:
    """A model to measure."""
    dtype = torch.bfloat16 if sizes.precision == "bf16" else torch.float32
    return Transformer.from_pretrained(folder, dtype, DEVICE)


def answers(
    model: Transformer, tokenizer: data.Tokenizer, rows: Sequence[Set], t: float, seed: int
) -> list[list[int]]:
    """Token ids of an answer to each set, at temperature t."""
    prompts = [prompt_of(tokenizer, row) for row in rows]
    how: dict[str, Any] = {"temperature": t, "eos_ids": tokenizer.eos_ids, "seed": seed}
    found: list[list[int]] = generate(model, prompts, TOKENS, batch_size=128, **how)
    return found


def training_rows(row: Set, base: str, greedy: str, own: Sequence[str]) -> dict[str, list[Any]]:
    """For each kind of rows those of a set, without their prompt, from its references, an answer of
    the untrained model, and the start's: a greedy one and samples.

    placebo: another human's sentence is rejected; own: a sample; oracle: a sample that lacks a
    word, if one does; checked, SGPO's targets: a draft, and a sample with all words or the gold.
    """
    gold, *others = dict.fromkeys(row["references"])
    whole = [text for text in own[1:] if all(check(names(row), text))]
    flawed = [text for text in own if not all(check(names(row), text))]
    return {
        "gold": [{"response": gold}],
        "all": [{"response": text} for text in (gold, *others)],
        "placebo": [{"chosen": gold, "rejected": others[0]}],
        "greedy": [{"response": greedy}],
        "untrained": [{"chosen": gold, "rejected": base}],
        "own": [{"chosen": gold, "rejected": own[0]}],
        "oracle": [{"chosen": gold, "rejected": text} for text in flawed[:1]],
        "checked": [{"response": own[0], "improved": [*whole, gold][0]}],
    }


def write_rows(start: Run, out: Path) -> None:
    """OUT/rows/KEY/*.jsonl: what the arms that go on from a start learn from."""
    folder, sizes = out / "rows" / start.key, start.sizes
    if (folder / "whole").exists():
        return
    torch.set_num_threads(1)
    trained(start, out)
    sets, tokenizer = sizes.gold(start.seed), data.load_tokenizer(sizes.model)
    untrained, own = load(Path(sizes.model), sizes), load(start.model(out), sizes)
    columns = []
    for i, (model, t) in enumerate([(untrained, 1.0), (own, 0.0), *[(own, 1.0)] * 4]):
        new = answers(model, tokenizer, sets, t, hash_seed(start.seed, "own", i))
        columns.append([tokenizer.response_text(ids).strip() or "." for ids in new])
    made: dict[str, list[dict[str, str]]] = collections.defaultdict(list)
    for row, base, greedy, *samples in zip(sets, *columns, strict=True):
        for name, many in training_rows(row, base, greedy, samples).items():
            made[name] += [{"prompt": asked(row)} | one for one in many]
    folder.mkdir(parents=True, exist_ok=True)
    few = {f"few-{name}": made[name][: sizes.steps // 2 * BATCH // 2] for name in SGPO_ROWS}
    for name, rows in (made | few).items():
        train.write_rows(folder / f"{name}.jsonl", rows)
    (folder / "whole").touch()


# --------------------------------------------------------------------------- training and measuring


class Checked(sapo.SAPO):
    """SAPO that keeps only the pairs whose rejected side lacks a word: a checker's worth."""

    def spoil(self, *args: Any) -> list[Pair]:
        """Of the new pairs those."""
        tokenizer, kept = self.run.tokenizer, []
        for pair in super().spoil(*args):
            prompt, text = tokenizer.decode(pair.prompt), tokenizer.response_text(pair.rejected)
            kept += [] if check_prompt(prompt, text) else [pair]
        return kept


def flags_of(run: Run, out: Path) -> list[str]:
    """train.py's. SGPO has half of the steps for its improver: two rows for each of so many drafts,
    of which it needs no more; and one rate for both phases."""
    sizes, flags = run.sizes, {k: v for k, v in run.flags.items() if k != "checked"}
    is_arm = run.base is not None and run.name != "start"
    rows = out / "rows" / (run.base.key if run.base and is_arm else f"of-{run.key}")
    if not is_arm:
        rows.mkdir(parents=True, exist_ok=True)
        told = [{"prompt": asked(x), "response": x["references"][0]} for x in sizes.gold(run.seed)]
        train.write_rows(rows / "gold.jsonl", told)
    file, steps = rows / f"{run.rows}.jsonl", sizes.steps * flags.pop("times", 1)
    if flags["method"] == "sgpo":
        steps -= steps // 2
        flags |= {"data": rows / "few-gold.jsonl", "preference_data": file, "improver_lr": run.rate}
        if flags["target_source"] == "checked":
            flags["target_source"] = rows / "few-checked.jsonl"
    said = {
        "model": run.base.model(out) if run.base else sizes.model, "out": run.folder(out),
        "data": file, "steps": steps, "batch_size": BATCH, "micro_batch_size": BATCH,
        "lr": run.rate, "optimizer": "adamw", "schedule": "linear", "max_length": 128,
        "precision": sizes.precision, "log_every": 1,
    } | flags  # fmt: skip
    said["seed"] = 1000 * run.seed + said.pop("part", 0)  # another order in each part of the start
    parts = [("--" + k.replace("_", "-"), str(v)) for k, v in said.items()]
    return [part for flag, value in parts for part in (flag, value) if part != "True"]


def train_run(run: Run, out: Path) -> Told:
    """Trains in this process. CPU seconds (on a GPU those of the clock), tokens generated, and
    means over the steps of what was logged."""
    clock, folder = time.perf_counter if DEVICE == "cuda" else time.process_time, run.folder(out)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut
    folder.parent.mkdir(parents=True, exist_ok=True)
    began, kind = clock(), Checked if "checked" in run.flags else sapo.SAPO
    with (
        Path(f"{folder}.log").open("w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        mock.patch.object(data, "check_answer", check_prompt),  # for `rejected/as_good`
        mock.patch.dict(train.SOURCES, {"sapo": (kind, sapo.Settings)}),
        methods.metered() as (tokens, logged),
    ):
        failed = train.main(flags_of(run, out))
    if failed:
        raise SystemExit(f"{run.name}: train.py ended with {failed}")
    for row in train.json_lines(folder / "metrics.jsonl"):
        for key in row.keys() & {"seam/logps", "seam/new_logps"}:  # where there is a C
            logged[key].append(row[key])
    means = {key: statistics.fmean(values) for key, values in logged.items() if values}
    return {"seconds": clock() - began, "generated": tokens["generated"], "logged": means}


def trained(run: Run, out: Path) -> Told:
    """Trains the run, and before it its base, where they are not there; what `train_run` told."""
    if not run.flags:
        return {"seconds": 0.0, "generated": 0, "logged": {}}
    file = run.folder(out) / "trained.json"
    if run.base and not file.exists():
        trained(run.base, out)
    told: Told = once(file, run.key, functools.partial(train_run, run, out))
    return told


def describe(rows: Sequence[Set], texts: Sequence[str]) -> dict[str, list[float]]:
    """Of answers to sets: values by name. `bleu` and `distinct` (the share of different bigrams)
    are of all answers together; `length` is in words, in % of the references'."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    most, bigrams = max(len(row["references"]) for row in rows), list[tuple[str, str]]()
    columns: list[list[str | None]] = [[] for _ in range(most)]
    for row, text in zip(rows, texts, strict=True):
        references, marks = row["references"], check(names(row), text)
        said, lengths = text.lower().split(), [len(x.split()) for x in references]
        found["complete"].append(100.0 * all(marks))
        found["used"].append(100.0 * statistics.fmean(marks))
        found["length"].append(100 * len(said) / statistics.fmean(lengths))
        found["list"].append(100.0 * mere_list(names(row), text))
        lower = [x.lower() for x in references]
        found["chrf"].append(sacrebleu.sentence_chrf(text.lower(), lower).score)
        bigrams += itertools.pairwise(said)
        for column, x in zip(columns, lower + [None] * (most - len(lower)), strict=True):
            column.append(x)
    told = dict(found)
    told["bleu"] = [sacrebleu.corpus_bleu(list(texts), columns, lowercase=True).score]
    told["distinct"] = [100 * len(set(bigrams)) / max(1, len(bigrams))]
    return told


@torch.no_grad()
def logps(model: Transformer, prompts: Sequence[Any], texts: Sequence[Any]) -> list[float]:
    """The summed log-probs of answers, all of them token ids."""
    pairs = [Pair(x, y, []) for x, y in zip(prompts, texts, strict=True)]
    parts = [pair_logprobs(model, pairs[i : i + 16])[0].tolist() for i in range(0, len(pairs), 16)]
    return [value for part in parts for value in part]


def measure(look: Look, out: Path) -> Told:
    """The line for results.jsonl. On dev temperatures are 0, T and 1; `kl` is of the last."""
    torch.set_num_threads(1)
    run, sizes, told = look.run, look.run.sizes, trained(look.run, out)
    tokenizer, rows = data.load_tokenizer(sizes.model), sizes.held_out(look.split)
    model = load(run.model(out), sizes)
    for t in look.temperatures:
        some = rows[:AT_ONE] if t == 1 else rows
        new = answers(model, tokenizer, some, t, hash_seed(run.seed, "look"))
        texts = [tokenizer.response_text(ids).strip() for ids in new]
        found = describe(some, texts)
        found["ended"] = [100.0 * (ids[-1] in tokenizer.eos_ids) for ids in new]
        at = "T" if look.split == "dev" and 0 < t < 1 else f"{t:g}"
        told |= {f"{name}/{at}": values for name, values in found.items()}
        told |= {f"texts/{at}": texts[:10]}
    if look.split == "dev":
        prompts = [prompt_of(tokenizer, row) for row in rows]
        gold = [[*tokenizer.encode(x["references"][0]), tokenizer.eos_ids[0]] for x in rows]
        both = zip(logps(model, prompts, gold), gold, strict=True)
        told["logp"] = [x / len(ids) for x, ids in both]  # per token
        before, asks = load(run.compared(out), sizes), prompts[: len(new)]
        both = zip(logps(model, asks, new), logps(before, asks, new), strict=True)
        told["kl"] = [a - b for a, b in both]  # per answer
    return told


class Lab(methods.Results):
    """OUT/results.jsonl, and the processes that make more of its lines."""

    def pool(self) -> ProcessPoolExecutor:
        """Started afresh: torch's threads do not survive a fork."""
        return ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"))

    def need(self, looks: Iterable[Look]) -> list[Told]:
        """The lines, after those that are missing were made."""
        asks = list(looks)
        if wanted := self.missing(asks):
            with self.pool() as pool:
                tasks = {pool.submit(measure, look, self.out): look for look in wanted}
                for n, done in enumerate(as_completed(tasks), 1):
                    look, told = tasks[done], done.result()
                    self.add(look, told)
                    share, run = statistics.fmean(told["complete/0"]), look.run
                    where = f"{run.name}, rate {run.rate:g}, seed {run.seed}, {look.split}"
                    print(f"{n}/{len(tasks)} all words {share:.1f}% {where}", flush=True)
        return [self.known[look.key] for look in asks]

    def write_rows(self, starts: Iterable[Run]) -> None:
        """What the arms of these starts learn from."""
        with self.pool() as pool:
            list(pool.map(functools.partial(write_rows, out=self.out), starts))


# ------------------------------------------------------------------------------------ the selection


def best_temperature(told: Told) -> float:
    """The one with the most complete answers, the lower of equal ones."""
    return max(TEMPERATURES, key=lambda t: statistics.fmean(told[f"complete/{t:g}"]))


def score(told: Told, before: Told | None = None) -> float:
    """THE rule, for all arms: the share of answers with all words on validation, the mean of greedy
    and the best temperature. 100 less where a guard says no, of greedy answers: more than 2% of
    mere lists, words beyond 20% of the references', chrF more than a point below `before`."""
    mean = {name: statistics.fmean(told[f"{name}/0"]) for name in ("chrf", "length", "list")}
    bad = abs(mean["length"] - 100) > 20 or mean["list"] > 2
    bad |= before is not None and mean["chrf"] < statistics.fmean(before["chrf/0"]) - 1
    at = (0.0, best_temperature(told))
    return statistics.fmean(statistics.fmean(told[f"complete/{t:g}"]) for t in at) - 100 * bad


def start_run(sizes: Sizes, seed: int, place: int, parts: int) -> Run | None:
    """So many parts of EPOCHS at a constant rate; 0: None."""
    if not parts:
        return None
    steps = math.ceil(EPOCHS[parts - 1] * sizes.rows / BATCH)
    flags = {"method": "sft", "schedule": "constant", "steps": steps, "part": parts}
    base = start_run(sizes, seed, place, parts - 1)
    return Run("start", "gold", flags, methods.RATES[place], seed, sizes, base)


def climb(first: Sequence[int], before: float, look: Any, most: int) -> dict[int, float]:
    """The scores of rates, by their places: the first, then those that methods.next_places wants,
    `most` at the most. `look` gives the scores of several."""
    tried: dict[int, float] = {}
    while new := (methods.next_places(tried, before) if tried else first)[: most - len(tried)]:
        tried |= look(new)
    return tried


def choose_start(lab: Lab, sizes: Sizes, most: int, longest: int) -> tuple[int, int]:
    """The rate's place and the parts of the start: for each rate as long as a part makes it better
    on validation, and then the best rate."""
    parts: dict[int, int] = {}

    def look(places: Sequence[int]) -> dict[int, float]:
        going, best = list(places), dict.fromkeys(places, -math.inf)
        for n in range(1, longest + 1):
            runs = [start_run(sizes, TUNING, place, n) for place in going]
            found = lab.need(Look(run, "validation") for run in runs if run)
            better = [p for p, told in zip(going, found, strict=True) if score(told) > best[p]]
            best |= {p: score(told) for p, told in zip(going, found, strict=True) if p in better}
            parts.update(dict.fromkeys(better, n))
            going = better
        return best

    place = methods.choose(tried := climb(FIRST_OF_START, -math.inf, look, most))
    told = {f"{methods.RATES[p]:g}, {sum(EPOCHS[: parts[p]])} epochs": x for p, x in tried.items()}
    print("start:", ", ".join(f"{key}: {x:.1f}" for key, x in told.items()), flush=True)
    return place, parts[place]


def arm_run(name: str, place: int, start: Run) -> Run:
    """An arm at a rate."""
    rows, flags = ARMS[name]
    return Run(name, rows, flags, methods.RATES[place], start.seed, start.sizes, start)


def tune(lab: Lab, arms: Sequence[str], start: Run, most: int) -> dict[str, int]:
    """The place of a rate for each arm."""
    before, chosen = lab.need([Look(start, "validation")])[0], dict[str, int]()
    first = [arm_run(name, place, start) for place in FIRST_OF_ARMS[:most] for name in arms]
    lab.need(Look(run, "validation") for run in first)  # all at once
    for name in arms:

        def look(places: Sequence[int], name: str = name) -> dict[int, float]:
            found = lab.need(Look(arm_run(name, p, start), "validation") for p in places)
            return {p: score(told, before) for p, told in zip(places, found, strict=True)}

        tried = climb(FIRST_OF_ARMS, score(before, before), look, most)
        chosen[name] = methods.choose(tried)
        told = ", ".join(f"{methods.RATES[p]:g}: {x:.1f}" for p, x in sorted(tried.items()))
        print(f"{name}: rate {methods.RATES[chosen[name]]:g} of {told}", flush=True)
    return chosen


def runs_from(start: Run, chosen: Mapping[str, int]) -> dict[str, Run]:
    """The table's rows for a seed."""
    untrained = Run("untrained", "", {}, 0.0, start.seed, start.sizes)
    arms = {name: arm_run(name, place, start) for name, place in chosen.items()}
    return {"untrained": untrained, "start": start} | arms


# ---------------------------------------------------------------------------------------- the table

COLUMNS = {  # what is shown, and its digits
    "complete/0": 1, "complete/T": 1, "complete/1": 1, "used/0": 1, "chrf/0": 1, "bleu/0": 1,
    "chrf/T": 1, "length/0": 0, "ended/0": 1, "ended/1": 1, "list/0": 1, "distinct/0": 1,
    "logp": 3, "kl": 2,
}  # fmt: skip


def differences(ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[float, float, float]:
    """Of (seeds, sets) values the mean paired difference, and its standard errors: over the sets,
    each its mean over seeds, and over the seeds, each its mean over sets. NaN: of one alone."""
    by_set = [[statistics.fmean(x) for x in zip(*many, strict=True)] for many in (ours, theirs)]
    by_seed = [[statistics.fmean(x) for x in many] for many in (ours, theirs)]
    mean, over_sets = methods.paired(*by_set)
    return mean, over_sets, methods.paired(*by_seed)[1]


def counts(mean: float, *errors: float) -> bool:
    """Whether a difference is beyond two standard errors, of each kind that is known."""
    known = [error for error in errors if not math.isnan(error)]
    return bool(known) and abs(mean) > 2 * max(known)


def report(columns: Mapping[str, Sequence[Told]], rows: Sequence[Set]) -> str:
    """The table in Markdown, by arm and seed; then greedy answers by number of words, and what the
    runs logged."""
    head = ["", *COLUMNS, "seconds"]
    table = [head, ["---"] * len(head)]
    for name, told in columns.items():
        means = {c: statistics.fmean(x for one in told for x in one[c]) for c in COLUMNS}
        seconds = f"{statistics.fmean(one['seconds'] for one in told):.0f}"
        table.append([f"**{name}**", *(f"{means[c]:.{n}f}" for c, n in COLUMNS.items()), seconds])
        if name != CONTROL:
            table.append([f"\N{MINUS SIGN} {CONTROL}", *against(told, columns[CONTROL]), ""])
    sizes = sorted({len(names(row)) for row in rows})
    table += [[], ["all words, greedy", *(f"{n} words" for n in sizes)], ["---"] * (len(sizes) + 1)]
    for name, told in columns.items():
        which = [[len(names(row)) == n for row in rows] for n in sizes]
        kept = [[x for t in told for x in itertools.compress(t["complete/0"], w)] for w in which]
        table.append([name, *(f"{statistics.fmean(x):.1f}" for x in kept)])
    logs = [told[0]["logged"] for told in columns.values()]
    table += [[], ["logged, first seed", *columns], ["---"] * (len(logs) + 1)]
    for key in sorted({key for log in logs for key in log}):
        table.append([key, *(f"{log[key]:.4g}" if key in log else "-" for log in logs)])
    return "\n".join("| " + " | ".join(line) + " |" if line else "" for line in table)


def against(told: Sequence[Told], control: Sequence[Told]) -> list[str]:
    """The cells of paired differences: errors over sets, and over seeds; * where they count."""
    cells = []
    for c, n in COLUMNS.items():
        d, *errors = differences([t[c] for t in told], [t[c] for t in control])
        known = " \N{PLUS-MINUS SIGN} ".join(f"{e:.{n}f}" for e in errors if not math.isnan(e))
        cells.append(f"{d:+.{n}f}" + f" ({known})" * bool(known) + " *" * counts(d, *errors))
    return cells


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--out", type=Path, default=Path("out/commongen"))
    parser.add_argument("--model", help="[SmolLM2-135M-Instruct]")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3, help="of the table [3]")
    parser.add_argument("--rows", type=int, default=2000, help="training sets [2000]")
    parser.add_argument("--steps", type=int, default=125, help="of an arm [125]")
    parser.add_argument("--validation", type=int, default=300, help="sets of --train [300]")
    parser.add_argument("--sets", type=int, default=10**6, help="of --dev, at most [all]")
    parser.add_argument("--rates", type=int, default=8, help="tried for an arm, at most [8]")
    parser.add_argument("--parts", type=int, default=4, help="1, 2, 4, 8 epochs of the start [4]")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--workers", type=int, default=2, help="processes; 1 for a GPU [2]")
    parser.add_argument("--quick", action="store_true", help="few of all, about 20 minutes")
    small = {"rows": 256, "steps": 16, "validation": 64, "sets": 128, "rates": 2, "parts": 2}
    if "--quick" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**small, arms=QUICK)
    args = parser.parse_args(argv)
    args.arms = list(dict.fromkeys([CONTROL, *args.arms]))
    return args


def estimate(args: argparse.Namespace) -> float:
    """Hours of one core on a CPU, if three rates are tried; measuring, a tenth or so, not in it."""
    seeds, tried = 0 if args.quick else args.seeds, min(args.rates, 3)
    epochs = sum(EPOCHS[: args.parts]) * (tried + seeds)
    flags = [ARMS[name][1] for name in args.arms]
    arms = sum(x.get("times", 1) * SECONDS[x["method"]] for x in flags) * args.steps
    return (epochs * args.rows / BATCH * SECONDS["sft"] + arms * (tried + seeds)) / 3600


def main(argv: Sequence[str] | None = None) -> None:
    """Chooses the start, rates and temperatures, runs the table's seeds, prints."""
    args = parse(argv)
    if DEVICE == "cpu":
        print(f"about {estimate(args):.1f} hours of one core, less what {args.out} has", flush=True)
    seeds = [TUNING] if args.quick else range(TUNING + 1, TUNING + 1 + args.seeds)
    if args.quick:
        print("--quick: the table's one seed is the one that chose; this says little")
    model = args.model or str(smollm2_folder())
    kinds = ("train", "dev", "rows", "steps", "validation", "sets", "precision")
    sizes = Sizes(**{name: getattr(args, name) for name in kinds}, model=model)
    lab = Lab(args.out, args.workers)
    place, parts = choose_start(lab, sizes, args.rates, args.parts)
    starts = {seed: start_run(sizes, seed, place, parts) for seed in (TUNING, *seeds)}
    lab.write_rows(starts.values())
    chosen = tune(lab, args.arms, starts[TUNING], args.rates)
    runs = {seed: runs_from(start, chosen) for seed, start in starts.items()}
    tuned = {name: Look(run, "validation") for name, run in runs[TUNING].items()}
    told = lab.need(tuned.values())
    found = dict(zip(tuned, map(best_temperature, told), strict=True))
    looks = {
        n: [Look(runs[seed][n], "dev", (0.0, t, 1.0)) for seed in seeds] for n, t in found.items()
    }
    lab.need(itertools.chain(*looks.values()))
    kept = {run.folder(lab.out) for many in runs.values() for run in many.values()}
    for folder in {*(lab.out / "models").glob(f"*-seed{TUNING}-*")} - kept:
        if folder.is_dir():  # half a gigabyte each; what was measured is known
            shutil.rmtree(folder)
    columns = {name: lab.need(many) for name, many in looks.items()}
    text = f"T: {', '.join(f'{name} {t:g}' for name, t in found.items())}\n\n"
    text += report(columns, sizes.held_out("dev")) + "\n"
    (lab.out / "report.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
