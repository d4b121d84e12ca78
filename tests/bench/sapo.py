"""A whole step of SAPO, by phase, and how it grows.

    python tests/bench/sapo.py
    python tests/bench/sapo.py --device cuda --size llama3b --precision bf16
    python tests/bench/sapo.py --no-growth --ref-update-every 108      # other flags are train.py's

A step is train.step with --method sapo on rows of random tokens: the EMA's update, segments
that the EMA writes anew, the replay buffer, the reference's log-probs, the policy's two passes, the
optimizer. The phases are those of the step's own row, `seconds/...`; "rest" is what no phase has.

Beside it the same step made of plain parts: transformers' `generate` on an EMA held in fp32 (and
copied to bf16 for bf16), and the plain loop of step.py. The rows, the rule of the cuts, the replay
buffer, the settings of sampling and the numbers of tokens are alike; the sampled tokens are not.
Its phases are generate (with the EMA's update and copy) and the rest.

The share of the matmul rate is the policy's two passes: 6 FLOPs per weight and token computed, the
head's weights where it is applied, without attention's scores and recomputation.
Peak memory is what two steps take above the loaded models.

The tables of growth change one thing at a time, in the first precision: seconds of the phases, and
how many times the first row's time a step takes. A shape for which policy, gradient, optimizer, EMA
and reference do not fit (llama8b: 5 x 32 GB in fp32) fails here as it does in train.py.
"""

import copy
import dataclasses
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import clock
import shapes
import torch
from peers import Loop, Theirs

import sapo
from data import Pair

PHASES = ("ema", "generate", "reference", "policy", "optimizer", "source", "rest")
Setup = dict[str, Any]  # shape, batch, segment


def make_rows(shape: shapes.Shape, count: int) -> list[Pair]:
    """Prompts with a gold response."""
    shape = dataclasses.replace(shape, pairs=count)
    return [pair._replace(rejected=[]) for pair in shapes.make_pairs(shape, 0)]


class Ours:
    """The product; `rows` collects the row of each step."""

    def __init__(self, args: Any, folder: Path, setup: Setup, precision: str, more: Any) -> None:
        shape, batch = setup["shape"], setup["batch"]
        flags = ["--method", "sapo", "--steps", 10**6, "--lr", shape.lr, "--batch-size", batch]
        flags += ["--micro-batch-size", min(batch, 8), "--segment-length", setup["segment"]]
        flags += ["--segment-rule", "uniform", "--max-length", shape.prompt + shape.response]
        flags += ["--precision", precision, "--ref-update-every", 1000]
        flags += ["--activation-checkpointing"] * (shape.body > 5e8)
        rows, ranks = make_rows(shape, 8 * batch), shapes.Machine(args.device)
        self.source = shapes.source_of(sapo.SAPO, folder, rows, ranks, [*flags, *more])
        self.t, self.rows = 0, list[dict[str, float]]()

    def step(self) -> None:
        """One update."""
        began = time.perf_counter()
        row = shapes.step(self.source, self.t)
        row["seconds/rest"] = time.perf_counter() - began
        row["seconds/rest"] -= sum(v for k, v in row.items() if k[8:] in PHASES[:-1])
        self.rows.append(row)
        self.t += 1


class Plain:
    """The same made of plain parts."""

    def __init__(self, args: Any, folder: Path, setup: Setup, precision: str, more: Any) -> None:
        self.setup, self.precision, self.t = setup, precision, 0
        self.loop = Loop(folder, args.device, False, setup["shape"].lr)
        self.generator = Theirs(folder, args.device, precision)
        self.ema = self.generator.model  # fp32, or a copy beside the one in bf16
        if precision == "bf16":
            self.ema = copy.deepcopy(self.loop.reference)
        self.source_rows = make_rows(setup["shape"], 8 * setup["batch"])
        self.buffer, self.rng = sapo.ReplayBuffer(2000, 0), random.Random(0)
        self.rows: list[dict[str, float]] = []

    def step(self) -> None:
        """One update."""
        began, segment, batch = time.perf_counter(), self.setup["segment"], self.setup["batch"]
        with torch.no_grad():
            both = (list(x.parameters()) for x in (self.ema, self.loop.policy))
            torch._foreach_lerp_(*both, 0.5)
            if self.ema is not self.generator.model:
                self.generator.model.load_state_dict(self.ema.state_dict())
        first = self.t * batch % len(self.source_rows)
        rows, cuts = self.source_rows[first : first + batch], []
        for row in rows:
            length = len(row.chosen)
            cut = sapo.choose_segment(length, segment, length, self.rng, "uniform")
            cuts.append(cut)
        prompts = [row.prompt + row.chosen[:a] for row, (a, _) in zip(rows, cuts, strict=True)]
        made = self.generator.run(prompts, [b - a for a, b in cuts])
        for row, (start, stop), new in zip(rows, cuts, made, strict=True):
            rejected = sapo.splice(row.chosen, start, stop, new[: stop - start], ())
            self.buffer.add(row._replace(rejected=rejected))
        halfway = time.perf_counter()
        self.loop.step(self.buffer.sample(batch), self.precision, kept=False)
        now = time.perf_counter()
        self.rows.append({"seconds/generate": halfway - began, "seconds/rest": now - halfway})
        self.t += 1


SIDES = {"plain": Plain, "ours": Ours}


class Bench:
    """The tables of one shape."""

    def __init__(self, args: Any, size: str, folder: Path, more: list[str]) -> None:
        self.args, self.folder, self.more = args, folder, more
        shape = shapes.SHAPES[size]
        self.setup = {"shape": shape, "batch": 4, "segment": 64}
        if args.quick:
            self.setup |= {"batch": 2, "segment": 4}
        elif args.device == "cuda":
            shape = dataclasses.replace(shape, prompt=512, response=512)
            self.setup = {"shape": shape, "batch": 16, "segment": 256}

    def build(self, name: str, setup: Setup) -> Any:
        """The side of a row, with models of its own."""
        side, precision = name.split()
        folder = shapes.write_model(setup["shape"], self.folder, self.args.device)
        return SIDES[side](self.args, folder, setup, precision, self.more)

    def call(self, side: Any, name: str) -> Callable[[int], None]:
        """A step, as `alternate` calls it."""

        def run(_: int) -> None:
            with clock.matmuls(name.split()[1]):
                side.step()

        return run

    def phases(self, rows: Sequence[dict[str, float]]) -> list[str]:
        """The median seconds of each phase, over the timed steps."""
        found = ([row.get(f"seconds/{name}", 0.0) for row in rows[1:]] for name in PHASES)
        return [f"{statistics.median(x):.3f}" for x in found]

    def share(self, rows: Sequence[dict[str, float]], flops: list[float]) -> str:
        """The policy's part of the machine's matmul rate."""
        shape, shares = self.setup["shape"], []
        for row, rate in zip(rows[1:], flops, strict=True):
            tokens = row["tokens/policy"]
            scored = tokens - row["pairs"] * shape.prompt
            work = 6 * (shape.body * tokens + shape.head * scored)
            shares.append(work / row["seconds/policy"] / rate)
        return clock.spread(shares)

    def whole(self, memory: Callable[[str], str]) -> None:
        """A step in each precision, beside that of plain parts."""
        args = self.args
        rates, flops = clock.matmul_calls(args.device, args.quick)
        names = [f"{side} {p}" for p in args.precision for side in SIDES]
        seconds, rows, lines = {}, {}, []  # type: ignore[var-annotated]
        for turn in [[n] for n in names] if self.setup["shape"].turns else [names]:
            sides = {name: self.build(name, self.setup) for name in turn}
            calls = {name: self.call(side, name) for name, side in sides.items()}
            seconds |= clock.alternate(calls | rates, args.reps, args.device)
            rows |= {name: side.rows for name, side in sides.items()}
        first = names[0]
        for name in names:
            kind, precision = name.split()
            line = [name, clock.speed(seconds, name, first)]
            line += [clock.speed(seconds, name, f"plain {precision}")]
            line += [clock.spread(seconds[name]), *self.phases(rows[name])]
            rate = [flops / x for x in seconds[f"matmul {precision}"]]
            line += [self.share(rows[name], rate) if kind == "ours" else "-", memory(name)]
            lines.append(line)
        head = ["row", f"x {first}", "x plain alike", "seconds", *PHASES]
        setup = ", ".join(f"{k} {v}" for k, v in self.setup.items() if k != "shape")
        title = f"A step of SAPO: {self.setup['shape']}; {setup}; {args.device}"
        clock.table(title, [*head, "policy of matmul rate", "peak GB"], lines)
        row = rows[f"ours {args.precision[0]}"][-1]
        told = {k: v for k, v in row.items() if k.startswith("tokens/")} | {"loss": row["loss"]}
        print("ours, the last step: " + ", ".join(f"{k} {v:.4g}" for k, v in told.items()))

    def growth(self, name: str, setups: dict[str, Setup]) -> None:
        """A table over one thing that changes."""
        ours = f"ours {self.args.precision[0]}"
        sides = {key: self.build(ours, setup) for key, setup in setups.items()}
        calls = {key: self.call(side, ours) for key, side in sides.items()}
        seconds, lines = clock.alternate(calls, self.args.reps, self.args.device), []
        first = next(iter(sides))
        for key, side in sides.items():
            pairs = zip(seconds[key], seconds[first], strict=True)
            line = [key, clock.spread([a / b for a, b in pairs]), clock.spread(seconds[key])]
            lines.append([*line, *self.phases(side.rows)])
        clock.table(f"By {name}", [name, f"x {first}", "seconds", *PHASES], lines)

    def tables_of_growth(self) -> None:
        """Segment length, batch, vocabulary, size of the model; each from a quarter to the whole,
        or from the whole to four times."""
        base, shape, more = self.setup, self.setup["shape"], dataclasses.replace
        steps = [self.setup["segment"] // 4 * k for k in (1, 2, 4)]
        self.growth("segment length", {str(n): base | {"segment": n} for n in steps})
        sizes = [base["batch"] * k // 2 for k in (1, 2, 4)]
        self.growth("batch", {str(n): base | {"batch": n} for n in sizes})
        sizes = [max(300, shape.vocabulary * k // 4) for k in (1, 2, 4)]
        setups = {f"{n:,}": base | {"shape": more(shape, vocabulary=n)} for n in sizes}
        self.growth("vocabulary", setups)
        layers = [max(1, shape.layers * k // 4) for k in (1, 2, 4)]
        setups = {str(n): base | {"shape": more(shape, layers=n)} for n in layers}
        self.growth("number of layers", setups)
        wide = {k: getattr(shape, k) for k in ("hidden", "heads", "kv_heads", "inner")}
        shapes = [
            more(shape, **{key: max(1, v * k // 2) for key, v in wide.items()}) for k in (1, 2)
        ]
        setups = {str(s.hidden): base | {"shape": s} for s in shapes}
        self.growth("hidden size", setups)


def main(argv: Sequence[str]) -> None:
    """The tables of each shape; or, for a row alone, its peak memory."""
    more = {"--no-growth": {"action": "store_true", "help": "only the table by phase"}}
    sizes = ["llama1b" if torch.cuda.is_available() else "small"]
    args, rest = clock.arguments(argv, __doc__ or "", sizes, more)
    with clock.place(args) as folder:
        for size in args.size:
            bench = Bench(args, size, folder, rest)
            if args.only is None:
                bench.whole(lambda name, size=size: clock.peak(f"{size} {name}", folder, args))
                if not args.no_growth:
                    bench.tables_of_growth()
            elif args.only.startswith(f"{size} "):
                row = args.only.removeprefix(f"{size} ")
                call = bench.call(bench.build(row, bench.setup), row)
                clock.report_peak(lambda call=call: [call(0), call(0)], args.device)


if __name__ == "__main__":
    main(sys.argv[1:])
