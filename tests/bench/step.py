"""A preference step against a plain transformers loop and TRL's DPOTrainer.

    python tests/bench/step.py                       # vocabularies of 32,000 and 128,256
    python tests/bench/step.py --device cuda --size llama8b --precision bf16

A step: the policy's forward and backward pass, the reference's forward pass, clipping, RMSprop. All
sides begin with the same random weights and take the same pairs. The sides:

    loop   LlamaForCausalLM on the chosen and the rejected rows, padded; float log-softmax over
           (B, T, V); DPO's loss; clip_grad_norm_; torch.optim.RMSprop
    TRL    DPOTrainer: its collator, its training_step, its clipping, its optimizer's step, as the
           loop of its `train` calls them, without the callbacks, the logging and the schedule. No
           recomputation. For bf16 its step runs in the autocast that accelerate would put there
    ours   train.step with --method dpo

"fresh": the pairs are new in every step. "kept": the same pairs come again under the same
reference, whose log-probs of them are known: ours keeps them by itself, the loop is given a dict,
TRL has precompute_ref_log_probs; the latter two with --all. The largest shapes have kept rows
alone, for which no second model is needed, and all sides recompute their blocks. For large shapes
the sides take turns, each built and freed.

Before timing, two steps of each side on the same pairs: the losses must be ln 2, and then agree
with the loop's within 1e-4 in fp32 (what "medium" and bf16 differ by is printed).

The share of the matmul rate counts 6 FLOPs per weight and token that the side computes (padding
and the prompt's second copy too; 2 more where the reference is fresh). The head's weights count
where it is applied. Attention's scores and recomputation do not count.
Peak memory is what a step takes above the loaded models: gradients, the optimizer's state,
activations.
"""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import clock
import shapes
import torch
from peers import BETA, CLIP, TRL, Loop

from data import Pair
from model import common_prefix
from sapo import Source


class Given(Source):
    """A source whose steps take all of its rows."""

    def before_step(self, t: int) -> list[Pair]:
        """Those rows."""
        return list(self.rows)


class Ours:
    """The product, a step at a time."""

    def __init__(
        self, folder: Path, device: str, large: bool, lr: float, precision: str, more: Any
    ) -> None:
        ranks = shapes.Machine(device, one=large)
        flags = ["--method", "dpo", "--steps", 10**6, "--lr", lr, "--beta", BETA]
        flags += ["--max-grad-norm", CLIP, "--precision", precision, "--micro-batch-size", 8]
        flags += ["--activation-checkpointing"] * large
        self.source, self.t = shapes.source_of(Given, folder, [], ranks, [*flags, *more]), 0

    def step(self, pairs: Sequence[Pair], precision: str, kept: bool) -> float:
        """One update; the loss before it."""
        self.source.rows, self.t = pairs, self.t + 1
        return shapes.step(self.source, self.t - 1)["loss"]


SIDES = ("loop", "TRL", "ours")


class Bench:
    """The rows of one shape's table: (side, precision, fresh or kept)."""

    def __init__(self, args: Any, size: str, folder: Path, flags: list[str]) -> None:
        self.args, self.shape, self.flags = args, shapes.SHAPES[size], flags
        self.folder = shapes.write_model(self.shape, folder, args.device)
        self.batches = [shapes.make_pairs(self.shape, i) for i in range(args.reps + 1)]
        states = ["kept"] if self.shape.large else ["fresh", "kept"]
        rows = [(s, p, k) for p in args.precision for k in states for s in SIDES]
        every = args.all or self.shape.large
        self.rows = [r for r in rows if every or r[0] == "ours" or r[2] == "fresh"]
        self.losses: dict[tuple[str, str], list[float]] = {}
        self.built: dict[tuple[str, ...], Any] = {}

    def build(self, side: str, precision: str, state: str) -> Any:
        """The side of a row. The rows of a side share it where they can."""
        key = (side, precision) if side == "ours" else (side,)
        if key not in self.built:
            common = (self.folder, self.args.device, self.shape.large, self.shape.lr)
            if side == "ours":
                made: Any = Ours(*common, precision, self.flags)
            else:
                made = (TRL if side == "TRL" else Loop)(*common)
            self.built[key] = made
            if self.args.only is None:
                both = [self.call(made, precision, state) for state in (state, "kept")]
                self.losses[side, precision] = [call(0) for call in both]
        return self.built[key]

    def call(self, side: Any, precision: str, state: str) -> Callable[[int], float]:
        """A step as `alternate` calls it, with new pairs for each repetition or always the same."""

        def run(rep: int) -> float:
            with clock.matmuls(precision):
                pairs = self.batches[rep if state == "fresh" else 0]
                return side.step(pairs, precision, state == "kept")

        return run

    def flops(self, side: str, state: str) -> float:
        """Of a step, by the convention that this file begins with."""
        pairs, count = self.batches[0], 0
        if side == "ours":
            same = [common_prefix(p.chosen, p.rejected) for p in pairs]
            scored = sum(len(p.chosen + p.rejected) - n for p, n in zip(pairs, same, strict=True))
            count = scored + sum(len(p.prompt) for p in pairs)
        else:
            width = max(len(p.prompt) + max(map(len, p[1:3])) for p in pairs)
            count = scored = 2 * len(pairs) * width
        work = self.shape.body * count + self.shape.head * scored
        return (8.0 if state == "fresh" else 6.0) * work

    def measure(self) -> clock.Times:
        """Seconds of all rows and of the machine's matmul."""
        device, reps = self.args.device, self.args.reps
        rates, self.rate_flops = clock.matmul_calls(device, self.args.quick)
        turns = [[r for r in self.rows if r[0] == s] for s in SIDES]
        seconds: clock.Times = {}
        for turn in turns if self.shape.turns else [self.rows]:
            calls = {" ".join(r): self.call(self.build(*r), *r[1:]) for r in turn}
            seconds |= clock.alternate(calls | rates, reps, device, warm=device == "cpu")
            calls.clear()
            self.built.clear()
            if device == "cuda":
                torch.cuda.empty_cache()
        return seconds

    def check(self) -> None:
        """The losses of two steps on the same pairs. Raises where fp32 does not agree."""
        base = next(v for k, v in self.losses.items() if k[0] == "loop")
        assert 0.01 < base[1] < 0.693, "an update that says something"
        for (side, precision), loss in self.losses.items():
            off = max(abs(loss[0] - math.log(2)), abs(loss[1] - base[1]))
            print(f"loss {side} {precision}: {loss[0]:.6f} {loss[1]:.6f}, off {off:.1e}")
            if precision == "fp32" and off > 1e-4:
                raise SystemExit(f"{side} computes something else: {loss}, and the loop {base}")
        print("losses agree", flush=True)

    def report(self, memory: Callable[[str], str]) -> None:
        """The table."""
        seconds, lines = self.measure(), []
        self.check()
        first = " ".join(self.rows[0])
        for row in self.rows:
            (side, precision, state), name = row, " ".join(row)
            rate = [self.rate_flops / x for x in seconds[f"matmul {precision}"]]
            reached = [self.flops(side, state) / x for x in seconds[name]]
            share = [a / b for a, b in zip(reached, rate, strict=True)]
            same = f"{precision} {state}"
            bases = (first, f"loop {same}", first.replace("loop", "TRL"), f"TRL {same}")
            lines.append([name, *(clock.speed(seconds, name, base) for base in bases)])
            told = memory(name) if precision == "fp32" or self.args.all else "-"
            lines[-1] += [clock.spread(seconds[name]), clock.spread(share), told]
        head = f"row,x {first},x loop alike,x {first.replace('loop', 'TRL')},x TRL alike,seconds"
        title = f"{self.shape}; {len(self.batches[0])} pairs; {self.args.device}"
        clock.table(title, f"{head},of matmul rate,peak GB".split(","), lines)
        rates = {p: self.rate_flops / min(seconds[f"matmul {p}"]) / 1e9 for p in clock.PRECISIONS}
        print("matmul GFLOP/s at best: " + ", ".join(f"{p} {x:.0f}" for p, x in rates.items()))


def main(argv: Sequence[str]) -> None:
    """A table for each shape; or, for a row alone, its peak memory."""
    more: clock.Flags = {"--all": {"action": "store_true", "help": "kept rows of the peers too"}}
    args, flags = clock.arguments(argv, __doc__ or "", ["small", "wide"], more)
    with clock.place(args) as folder:
        for size in args.size:
            bench = Bench(args, size, folder, flags)
            if args.only is None:
                bench.report(lambda name, size=size: clock.peak(f"{size} {name}", folder, args))
            elif args.only.startswith(f"{size} "):
                row = args.only.split()[1:]
                call = bench.call(bench.build(*row), *row[1:])
                clock.report_peak(lambda call=call: [call(0), call(0)], args.device)


if __name__ == "__main__":
    main(sys.argv[1:])
