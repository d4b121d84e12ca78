"""SFT, SAPO, SPIN and SGPO on real instructions, each after SFT: what it adds to SFT continued.

    python tests/bench/real.py --data rows.jsonl --pairs pairs.jsonl --out DIR
    python tests/bench/real.py ... --ifeval ifeval_prompts.jsonl    # and IFEval: ifeval.py
    python tests/bench/real.py ... --quick                          # this says little

--data has good responses; --pairs a weak model's as well, as `rejected`. Some of the pairs are for
the table and some for validation, the same whatever the seed: no run sees their prompts. For each
seed SmolLM2-135M-Instruct gets --first steps of SFT, and each arm goes on from there for --steps
more, on the same rows; SGPO has fewer by the targets that its fence drops. An arm's learning rate
is chosen by one rule (`score`), on validation pairs and on a seed of its own, unless --lr-of says
it. Rewards and changes are against the untrained model, for every arm.

The table is in DIR/report.md, answers are in DIR/answers.md. Each run is a call of train.py. The
name of a run or a measurement has a digest of its settings: what is in DIR is not made again, and
what was cut goes on. The code is not in the digest: after a change of it take another --out.
"""

import argparse
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this folder has a sapo.py too

import ifeval
import judge
import methods  # before torch: it takes one thread
import tables
import torch
from smollm2 import smollm2_folder
from tables import Values

import data
import train
from data import Example, Pair
from model import Transformer, generate, hash_seed, pair_logprobs

ROOT = Path(__file__).resolve().parents[2]
FIRST, CONTROL = "first", "sft-continued"
ARMS: dict[str, dict[str, Any]] = {  # train.py's flags, beside those of `Lab.flags`
    CONTROL: {"method": "sft"},
    "sapo": {"method": "sapo"},
    "sapo-whole": {"method": "sapo", "segment_length": "full"},
    "spin": {"method": "spin", "rounds": 2},
    "sgpo-gold": {"method": "sgpo", "target_source": "gold", "improver_epochs": 1},
}
TUNING = 0  # the seed that chooses rates; the table has 1, 2, ...
TRIED_FIRST = (1, 2)  # places in methods.RATES: 3e-6 and 1e-5
# CPU seconds on an AMD EPYC, for the estimate alone: of steps, and of measurements.
SECONDS = {CONTROL: 5, "sapo": 15, "sapo-whole": 15, "spin": 27, "sgpo-gold": 27}
OF_A_PAIR, OF_A_TOKEN = 1.0, 0.006
BETA = 0.1  # of the rewards, and train.py's default
NEAR = 0.25  # lengths that differ by less than this share of the longer are about equal
SHOWN = 10  # prompts in answers.md
Told = Mapping[str, Any]  # what `measure` gives


# ---------------------------------------------------------------------------------------- the rows


def asked(example: Example) -> str:
    """What two rows with the same prompt have in common."""
    return "\n".join(turn["content"].strip() for turn in example.messages)


def split(args: argparse.Namespace, tokenizer: data.Tokenizer) -> dict[str, list[Example]]:
    """Training "rows", "held-out" and "validation" pairs: without a common prompt, and whole
    within --max-length. The order depends on the prompts alone."""

    def whole(examples: Sequence[Example]) -> list[Example]:
        pairs = [data.encode_example(tokenizer, e) for e in examples]
        sizes = [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs]
        kept = compress(examples, (size <= args.max_length for size in sizes))
        return sorted(kept, key=lambda e: hash_seed("real", asked(e)))

    pairs = [*{asked(e): e for e in whole(data.load_examples(args.pairs, True))}.values()]
    a, b = args.held_out, args.held_out + args.validation
    found = {"held-out": pairs[:a], "validation": pairs[a:b]}
    unseen = {asked(e) for many in found.values() for e in many}
    rows = whole([e for e in data.load_examples(args.data) if asked(e) not in unseen])
    if len(pairs) < b or not rows:
        raise SystemExit(f"{len(pairs)} pairs and {len(rows)} rows are too few")
    return found | {"rows": rows}


# ------------------------------------------------------------------------------ training, measuring


def once(file: Path, settings: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives, as JSON; it is kept in a file, and not made again."""
    if not file.exists():
        text = json.dumps({"settings": settings, "told": make()})
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    kept = json.loads(file.read_text(encoding="utf-8"))
    if kept["settings"] != settings:
        raise SystemExit(f"{file} is of other settings: take another --out, or delete it")
    return kept["told"]


@torch.no_grad()
def measure(
    folder: Path, pairs: Sequence[Pair], tokenizer: data.Tokenizer, answers: int, tokens: int
) -> dict[str, list[Any]]:
    """A model on pairs: summed log-probs of both sides, their tokens, and its own greedy answers
    to the first prompts, as token ids."""
    model = Transformer.from_pretrained(folder)
    told: dict[str, list[Any]] = {name: [] for name in ("chosen", "rejected", "n", "m")}
    for pair in pairs:  # one at a time: the largest needs little memory, and nothing is padded
        for name, values in zip(told, pair_logprobs(model, [pair]), strict=True):
            told[name] += values.tolist()
    asks, eos_ids = [pair.prompt for pair in pairs[:answers]], tokenizer.eos_ids
    told["answers"] = generate(model, asks, tokens, temperature=0.0, eos_ids=eos_ids)
    return told


def children_seconds() -> float:
    """CPU seconds of the processes that this one has started and seen end."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


@dataclass(frozen=True)
class Run:
    """A training run: FIRST, which goes on from the untrained model, or an arm."""

    arm: str
    rate: float
    seed: int
    base: "Run | None" = None


class Lab:
    """The runs and measurements in --out. Where a run is asked for, None is the untrained model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = data.load_tokenizer(args.model)
        self.examples = split(args, self.tokenizer)
        encode = partial(data.encode_example, self.tokenizer)
        self.pairs = {name: [*map(encode, many)] for name, many in self.examples.items()}
        said = [(e.messages, e.response) for e in self.examples["rows"]]
        self.rows = [{"messages": [*x, {"role": "assistant", "content": y}]} for x, y in said]
        train.write_rows(self.out / "rows.jsonl", self.rows)

    def first(self, seed: int) -> Run:
        """A seed's common start."""
        return Run(FIRST, self.args.first_lr, seed)

    def flags(self, run: Run) -> dict[str, Any]:
        """train.py's, but for the paths. SGPO's phase 1 has about half of the steps: two rows for
        each of so many prompts, one of them the improver's. SAPO's reference is refreshed three
        times: an epoch would be longer than the run. Own answers and the improver's prompts are
        longer than the rows: --max-length leaves room for them."""
        args, steps = self.args, self.args.first if run.arm == FIRST else self.args.steps
        said = {
            "lr": run.rate, "steps": steps, "batch_size": args.batch_size,
            "max_length": 4 * args.max_length, "precision": args.precision,
            "optimizer": "rmsprop", "schedule": "linear",
            "seed": 2 * run.seed + (run.arm != FIRST),  # other rows than the start's come first
        } | ({"method": "sft"} if run.arm == FIRST else ARMS[run.arm])  # fmt: skip
        if said["method"] == "sapo":
            said = {"segment_length": args.segment_length} | said
            said["ref_update_every"] = max(1, steps // 3)
        if said["method"] in ("spin", "sgpo"):
            said["max_new_tokens"] = args.answer_tokens
        if said["method"] == "sgpo":
            said |= {"steps": steps - steps // 2, "improver_lr": run.rate}
        return said

    def name(self, run: Run | None) -> str:
        """A title and a digest of all that the run depends on."""
        if run is None:
            return f"untrained-{hash_seed(str(self.args.model)):016x}"[:-8]
        digest = hash_seed(self.flags(run), self.name(run.base), self.rows)
        return f"{run.arm}-seed{run.seed}-{run.rate:g}-{digest:016x}"[:-8]

    def folder(self, run: Run) -> Path:
        """The run's, with train.py's files."""
        return Path(self.out, "models", self.name(run))

    def model(self, run: Run | None) -> Path:
        """A folder to load."""
        return self.folder(run) / "final" if run else Path(self.args.model)

    def train(self, run: Run) -> float | None:
        """CPU seconds; None where the run had been cut before. Its base is trained before it."""
        if run.base:
            self.train(run.base)
        return once(self.folder(run) / "trained.json", "", partial(self._train, run))  # type: ignore[no-any-return]

    def _train(self, run: Run) -> float | None:
        folder, rows = self.folder(run), self.out / "rows.jsonl"
        said = {"model": self.model(run.base), "data": rows, "out": folder} | self.flags(run)
        said |= {"log_every": 1, "save_every": self.args.save_every, "keep": 1}
        if said["method"] == "sgpo":
            count = self.args.steps // 2 * self.args.batch_size // 2
            said |= {"data": self.out / f"rows-seed{run.seed}.jsonl", "preference_data": rows}
            train.write_rows(said["data"], random.Random(run.seed).sample(self.rows, count))
        flags = [str(part) for k, v in said.items() for part in ("--" + k.replace("_", "-"), v)]
        cut, before = folder.exists(), children_seconds()
        folder.parent.mkdir(exist_ok=True)
        command = [sys.executable, str(ROOT / "train.py"), *flags, "--resume"]
        with Path(f"{folder}.log").open("a", encoding="utf-8") as log:
            done = subprocess.run(command, check=False, stdout=log)
        if done.returncode:
            raise SystemExit(f"{run.arm} ended with {done.returncode}: see {folder}.log")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return None if cut else children_seconds() - before

    def look(self, run: Run | None, where: str) -> dict[str, Any]:
        """`measure` on "held-out" or "validation" pairs, the latter without answers. A tuning
        run's folder, half a gigabyte, is deleted then."""
        answers = self.args.answers if where == "held-out" else 0
        how = (answers, self.args.answer_tokens if answers else 0)
        settings = [*how, hash_seed(*map(asked, self.examples[where]))]
        file = self.out / "looks" / f"{self.name(run)}-{where}-{hash_seed(*settings):x}.json"

        def make() -> dict[str, Any]:
            if run:
                self.train(run)
            told = measure(self.model(run), self.pairs[where], self.tokenizer, *how)
            print(f"{self.name(run)} is measured, {where}", flush=True)
            return told

        found: dict[str, Any] = once(file, settings, make)
        if run and run.base and run.seed == TUNING:
            shutil.rmtree(self.folder(run), ignore_errors=True)
        return found

    def ifeval(self, run: Run | None) -> Values:
        """`ifeval.values` of a model that is there; none without --ifeval."""
        if not self.args.ifeval:
            return {}
        rows = ifeval.read(self.args.ifeval, self.args.ifeval_limit)
        file = self.out / "ifeval" / f"{self.name(run)}.jsonl"
        file.parent.mkdir(exist_ok=True)
        return ifeval.values(ifeval.answers(self.model(run), rows, file, self.args.answer_tokens))


# ------------------------------------------------------------------------------------ the selection


def changes(told: Told, untrained: Told) -> list[list[float]]:
    """In nats, what training has added to the good and to the weak answers' log-probs."""
    both = [zip(told[side], untrained[side], strict=True) for side in ("chosen", "rejected")]
    return [[a - b for a, b in side] for side in both]


def score(told: Told, untrained: Told) -> float:
    """THE rule, for all arms: of validation pairs the share, in %, whose good answer has gained
    more log-prob a token than the weak one, since the untrained model: what all methods are to
    teach, and what SFT has no advantage in, as the mere log-prob would be. 100 less where the model
    is broken: the good answers have lost more than 0.1 nats a token."""
    up, other = changes(told, untrained)
    sides = zip(up, other, told["n"], told["m"], strict=True)
    right = statistics.fmean(a / i > b / j for a, b, i, j in sides)
    return 100 * right - 100 * (sum(up) / sum(told["n"]) < -0.1)


def tune(lab: Lab, arms: Sequence[str]) -> dict[str, float]:
    """A rate for each arm: the ladder and its climbing are methods.py's, --rates at the most."""
    rates = {arm: float(rate) for arm, rate in (x.split("=") for x in lab.args.lr_of)}
    for arm in (arm for arm in arms if arm not in rates):
        start, untrained = lab.first(TUNING), lab.look(None, "validation")
        before, tried = score(lab.look(start, "validation"), untrained), dict[int, float]()
        while new := (methods.next_places(tried, before) if tried else TRIED_FIRST)[
            : lab.args.rates - len(tried)
        ]:
            for place in new:
                told = lab.look(Run(arm, methods.RATES[place], TUNING, start), "validation")
                tried[place] = score(told, untrained)
        rates[arm] = methods.RATES[methods.choose(tried)]
        said = ", ".join(f"{methods.RATES[p]:g}: {x:.1f}" for p, x in sorted(tried.items()))
        print(f"{arm}: rate {rates[arm]:g} of {said}; the start {before:.1f}", flush=True)
    return rates


# ---------------------------------------------------------------------------------------- the table


def percent(marks: Iterable[bool]) -> list[float]:
    """A value each, whose mean is their share."""
    return [100.0 * mark for mark in marks]


def preferences(told: Told, untrained: Told) -> Values:
    """A model on the held-out pairs."""
    good, bad, n, m = (told[name] for name in ("chosen", "rejected", "n", "m"))
    a_token = [[x / i for x, i in zip(*side, strict=True)] for side in ((good, n), (bad, m))]
    column = dict(zip(("good answer: log-prob a token", "weak answer"), a_token, strict=True))
    column["good is likelier a token, %"] = percent(map(float.__gt__, *a_token))
    if told is untrained:
        return column
    up, other = changes(told, untrained)
    each = list(zip(up, other, n, m, strict=True))
    gain, gaps = [a / i - b / j for a, b, i, j in each], [i - j for *_, i, j in each]
    margins = [BETA * (a - b) for a, b, *_ in each]
    near = [abs(i - j) < NEAR * max(i, j) for *_, i, j in each]
    return column | {
        "gain a token, good less weak": gain,
        "gained more a token, % (the rule)": percent(x > 0 for x in gain),
        "reward margin": margins,
        "reward margin at equal length": tables.at_equal_length(margins, gaps),
        f"reward margin of {sum(near)} about equally long": [*compress(margins, near)],
        "reward accuracy, %": percent(x > 0 for x in margins),
        "good answer's change, nats": up,
        "weak answer's change, nats": other,
        "good answer fell, %": percent(x < 0 for x in up),
        "weak answer fell, %": percent(x < 0 for x in other),
        "both fell, %": percent(max(a, b) < 0 for a, b, *_ in each),
    }


def answering(told: Told, untrained: Told, eos_ids: Any) -> Values:
    """A model's greedy answers."""
    both = zip(told["answers"], untrained["answers"], strict=True)
    return {
        "tokens of an answer": [float(len(ids)) for ids in told["answers"]],
        "ended by EOS, %": percent(ids[-1] in eos_ids for ids in told["answers"]),
        "as the untrained model's, %": percent(a == b for a, b in both),
    }


def answers_text(goods: Sequence[Example], found: Mapping[str, Told], lab: Lab) -> str:
    """DIR/answers.md: a section a prompt, with the good answer and those of every model."""
    parts: list[str] = []
    for i, good in enumerate(goods):
        texts = {f"## {i + 1}": asked(good), "**the good answer**": good.response}
        for name, told in found.items():
            ids = told["answers"][i]
            end = "ended" if ids[-1] in lab.tokenizer.eos_ids else "cut"
            texts[f"**{name}**, {len(ids)} tokens, {end}"] = lab.tokenizer.response_text(ids)
        for title, text in texts.items():
            parts += [title, "\n".join("> " + line for line in text.strip().splitlines())]
    return "\n\n".join(parts) + "\n"


def logs(lab: Lab, runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, str]]:
    """What the first seed's runs logged, and what SGPO's improvements are worth; CPU seconds."""
    columns: dict[str, dict[str, str]] = {}
    for name, (run, *_) in runs.items():
        folder, seconds = lab.folder(run), lab.train(run)
        for phase, column in tables.logged(folder / "metrics.jsonl").items():
            columns[f"{name}: {phase}" if phase == "improver" else name] = column
        columns[name]["CPU seconds"] = "-" if seconds is None else f"{seconds:.0f}"
        if (folder / "pairs.jsonl").exists():
            worth = once(folder / "judged.json", "", partial(judge.judge, folder))
            columns[name] |= {f"`improve/{key}`": f"{x:.4g}" for key, x in worth["0"].items()}
    return columns


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])

    parser.add_argument("--data", required=True, help="rows with good responses")
    parser.add_argument("--pairs", required=True, help="rows with chosen and rejected")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="[SmolLM2-135M-Instruct]")
    parser.add_argument(
        "--only", nargs="+", choices=ARMS, default=[*ARMS], help=f"arms, and {CONTROL} [all]"
    )
    parser.add_argument(
        "--first-lr", type=float, default=1e-5, help="rate of the first steps of SFT [1e-5]"
    )
    parser.add_argument(
        "--lr-of", nargs="+", default=[], metavar="ARM=LR", help="rates that are not chosen"
    )
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="bf16", help="of training [bf16]"
    )
    parser.add_argument("--ifeval", type=Path, metavar="FILE", help="IFEval's prompts [none]")
    parser.add_argument("--ifeval-limit", type=int, default=541, help="of its prompts [541]")
    numbers = {
        "seeds": (3, "of the table"), "first": (32, "steps of SFT before all arms"),
        "steps": (32, "gradient steps of an arm"), "rates": (4, "tried for an arm, at most"),
        "batch-size": (4, "rows a step"), "max-length": (256, "tokens: longer rows are left out"),
        "segment-length": (64, "of the arm sapo"), "answer-tokens": (256, "of answers, at most"),
        "save-every": (16, "steps between checkpoints"), "held-out": (96, "pairs for the table"),
        "validation": (64, "pairs that choose"), "answers": (32, "to held-out prompts"),
    }  # fmt: skip
    for name, (default, told) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{told} [{default}]")
    parser.add_argument("--quick", action="store_true", help="few of all")
    if "--quick" in (sys.argv[1:] if argv is None else argv):
        small = {"first": 8, "steps": 8, "seeds": 1, "rates": 2, "held_out": 32, "validation": 16}
        parser.set_defaults(**small, answers=8, ifeval_limit=32)
    args = parser.parse_args(argv)
    args.model, args.answers = args.model or smollm2_folder(), min(args.answers, args.held_out)
    args.only = list(dict.fromkeys([CONTROL, *args.only]))
    return args


def estimate(args: argparse.Namespace) -> float:
    """CPU hours, where nothing is there yet and an arm that is tuned needs three rates."""
    tuned = {*args.only} - {x.split("=")[0] for x in args.lr_of}
    trained = [*args.only] * args.seeds + [*tuned] * min(3, args.rates)
    steps = sum(SECONDS[arm] for arm in trained) * args.steps
    steps += (args.seeds + bool(tuned)) * args.first * SECONDS[CONTROL]
    answers = args.answers + (args.ifeval_limit if args.ifeval else 0)
    look = args.held_out * OF_A_PAIR + answers * args.answer_tokens * OF_A_TOKEN
    return float(steps + (1 + args.seeds * (1 + len(args.only))) * look) / 3600


def main(argv: Sequence[str] | None = None) -> None:
    """Chooses the rates, trains and measures the table's seeds, prints."""
    args = parse(argv)
    lab = Lab(args)
    print(", ".join(f"{len(many)} {name}" for name, many in lab.examples.items()), end="; ")
    print(f"about {estimate(args):.1f} hours of one core with the default sizes", flush=True)
    rates, starts = tune(lab, args.only), [lab.first(TUNING + 1 + i) for i in range(args.seeds)]
    runs = {FIRST: starts}
    runs |= {arm: [Run(arm, rates[arm], run.seed, run) for run in starts] for arm in args.only}
    untrained, eos_ids = lab.look(None, "held-out"), lab.tokenizer.eos_ids
    columns, told = dict[str, list[Values]](), dict[str, Told]()
    everything: dict[str, Sequence[Run | None]] = {"untrained": [None] * args.seeds, **runs}
    for name, many in everything.items():
        looks = [lab.look(run, "held-out") if run else untrained for run in many]
        told[name] = looks[0]
        both = [preferences(x, untrained) | answering(x, untrained, eos_ids) for x in looks]
        columns[name] = [x | lab.ifeval(run) for x, run in zip(both, many, strict=True)]
    shown = lab.examples["held-out"][: min(SHOWN, args.answers)]
    (lab.out / "answers.md").write_text(answers_text(shown, told, lab), encoding="utf-8")
    text = "\n\n".join([
        f"{args.seeds} seeds, {args.held_out} held-out pairs, {args.answers} greedy answers of at "
        f"most {args.answer_tokens} tokens; {args.first} steps of SFT first, then {args.steps}.",
        "Rates: " + ", ".join(f"{arm} {rates[arm]:g}" for arm in args.only),
        "Means \N{PLUS-MINUS SIGN} standard error over pairs; changes against the untrained model:",
        tables.compared(columns),
        f"Differences to {CONTROL}, paired, \N{PLUS-MINUS SIGN} standard errors over pairs, over "
        "seeds; * is beyond two of both:",
        tables.compared({name: columns[name] for name in args.only}, CONTROL),
        "Differences to the untrained model:",
        tables.compared(columns, "untrained"),
        "Logged by the first seed's runs, means over the steps that have a value:",
        tables.markdown(logs(lab, runs)),
    ]) + "\n"  # fmt: skip
    (lab.out / "report.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
