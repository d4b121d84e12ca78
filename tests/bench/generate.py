"""Generation against transformers' `generate`.

    python tests/bench/generate.py
    python tests/bench/generate.py --device cuda --size llama8b --precision bf16

A batch of prompts of mixed lengths, sampled at temperature 0.7 with top-k 50 and top-p 0.95, as
SAPO's segments are. Nothing stops at an EOS: both sides make as many tokens.

    even     every row is given the same number of new tokens
    uneven   from an eighth of that to all of it, as segments are: transformers decodes all rows to
             the longest, so its time is the same; ours drops a row that is done

Our model holds fp32 weights that change at every step of SAPO (the EMA), so what makes them ready
is timed: `with ranks.decoder(model) as ready: generate(ready, ...)`. transformers' model is in its
type already, bf16 for bf16. transformers' prompts are padded on the left.

Before timing, greedy tokens in fp32 must be the same on both sides, or part where transformers'
model finds both as likely within rounding. The models of all precisions are held at once: for one
that fills the machine name one --precision.

A decode step's time is that of a run less that of a run of one token, per further token. Its floor
is the bytes of the weights over the machine's memory rate, measured as a copy that reads and
writes; the share is the floor over the step's time. The cache of keys and values does not count.
Peak memory is what a run takes above the loaded model.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import clock
import shapes
import torch
from peers import SAMPLING, Theirs

import model as lm
import train

KINDS = ("even", "uneven", "one")
TIE = 1e-3  # of two logits, in fp32


class Ours:
    """The product's model as a learner holds it, and its `generate`."""

    def __init__(self, folder: Path, device: str, precision: str) -> None:
        config = train.parse_args(["--data", "none", "--precision", precision])
        self.ranks = shapes.Machine(device)
        self.model = self.ranks.build(folder, config, "ema")

    def run(self, prompts: list[list[int]], budgets: list[int], greedy: bool = False) -> Any:
        """New tokens of each row."""
        how = {"temperature": 0.0} if greedy else SAMPLING
        with self.ranks.decoder(self.model) as ready:
            return lm.generate(ready, prompts, budgets, **how)


SIDES: dict[str, Any] = {"transformers": Theirs, "ours": Ours}


class Bench:
    """One shape and batch: rows of (side, precision), each of the KINDS."""

    def __init__(self, args: Any, size: str, batch: int, folder: Path) -> None:
        self.args, self.shape, self.batch = args, shapes.SHAPES[size], batch
        self.folder = shapes.write_model(self.shape, folder, args.device)
        low, high, self.new = (4, 12, 8) if args.quick else (32, 256, args.new_tokens)
        generator = torch.Generator().manual_seed(0)
        lengths = [low + (high - low) * i // max(1, batch - 1) for i in range(batch)]
        limits = (260, self.shape.vocabulary)
        self.prompts = [
            torch.randint(*limits, (n,), generator=generator).tolist() for n in lengths[::-1]
        ]
        uneven = [max(1, self.new * (1 + i % 8) // 8) for i in range(batch)]
        self.budgets = {"even": [self.new] * batch, "uneven": uneven, "one": [1] * batch}

    def call(self, side: Any, precision: str, kind: str) -> Callable[[int], Any]:
        """A run, as `alternate` calls it."""

        def run(_: int) -> Any:
            with clock.matmuls(precision):
                return side.run(self.prompts, self.budgets[kind])

        return run

    def check(self) -> None:
        """Raises where greedy tokens in fp32 are not those of transformers."""
        theirs, ours = (side(self.folder, self.args.device, "fp32") for side in SIDES.values())
        expected = theirs.run(self.prompts, self.budgets["even"], greedy=True)
        for kind in KINDS[:2]:
            found = ours.run(self.prompts, self.budgets[kind], greedy=True)
            both = enumerate(zip(expected, found, strict=True))
            rows = [i for i, (a, b) in both if not self.agree(theirs, self.prompts[i], a, b)]
            if rows:
                raise SystemExit(f"greedy tokens differ in rows {rows}")
        print("greedy tokens agree", flush=True)

    def agree(self, theirs: Theirs, prompt: list[int], expected: list[int], new: list[int]) -> bool:
        """Whether the tokens are the first of those expected, as far as no tie parts them."""
        at = lm.common_prefix(expected, new)
        if at == min(len(expected), len(new)):
            return len(new) <= len(expected)
        tokens = torch.tensor([prompt + expected[:at]], device=self.args.device)
        with torch.no_grad():
            logits = theirs.model(tokens).logits[0, -1]
        return bool(logits[expected[at]] - logits[new[at]] < TIE)

    def report(self, memory: Callable[[str], str]) -> None:
        """The table."""
        self.check()
        device, reps = self.args.device, self.args.reps
        copy, moved = clock.copy_call(device, self.args.quick)
        calls: dict[str, Callable[[int], Any]] = {"copy": copy}
        for precision in self.args.precision:
            for name, kind in SIDES.items():
                side = kind(self.folder, device, precision)
                for k in KINDS if name == "ours" else ("even", "one"):
                    calls[f"{name} {precision} {k}"] = self.call(side, precision, k)
        seconds, lines = clock.alternate(calls, reps, device), []
        for precision in self.args.precision:  # uneven rows cost transformers what even ones do
            even = f"transformers {precision} even"
            seconds[f"transformers {precision} uneven"] = seconds[even]
        first = f"transformers {self.args.precision[0]} even"
        rows = [(s, p, k) for p in self.args.precision for k in KINDS[:2] for s in SIDES]
        for side, precision, kind in rows:
            name = f"{side} {precision} {kind}"
            tokens = sum(self.budgets[kind])
            rate = clock.spread([tokens / x for x in seconds[name]], 0)
            line = [name, clock.speed(seconds, name, first)]
            line += [clock.speed(seconds, name, f"transformers {precision} {kind}"), rate]
            line += self.decode(seconds, side, precision, moved) if kind == "even" else ["-", "-"]
            lines.append([*line, memory(name)])
        head = f"row,x {first},x transformers alike,tokens/s,ms a decode step,of copy rate,peak GB"
        title = f"{self.shape}; batch {self.batch}, prompts of {len(self.prompts[-1])} to "
        title += f"{len(self.prompts[0])} tokens, {self.new} new tokens; {device}"
        clock.table(title, head.split(","), lines)
        best = moved / min(seconds["copy"]) / 1e9
        print(f"copy at best: {best:.1f} GB/s, read and write")

    def decode(self, seconds: clock.Times, side: str, precision: str, moved: float) -> list[str]:
        """Milliseconds of a decode step, and its floor's share of it."""
        both = [seconds[f"{side} {precision} {kind}"] for kind in ("even", "one")]
        steps = [(a - b) / (self.new - 1) for a, b in zip(*both, strict=True)]
        size = (self.shape.body + self.shape.head) * (2 if precision == "bf16" else 4)
        rates = [moved / x for x in seconds["copy"]]
        share = [size / rate / x for rate, x in zip(rates, steps, strict=True)]
        return [clock.spread([1000 * x for x in steps], 1), clock.spread(share)]


def main(argv: Sequence[str]) -> None:
    """A table for each shape and batch; or, for a row alone, its peak memory."""
    more: clock.Flags = {
        "--batch": {"type": int, "nargs": "+", "help": "rows [8; on CUDA 16 and 64]"},
        "--new-tokens": {"type": int, "default": 64, "help": "of the longest row [64]"},
    }
    args, _ = clock.arguments(argv, __doc__ or "", ["small", "smollm2"], more)
    with clock.place(args) as folder:
        for size in args.size:
            for batch in args.batch or ([8] if args.device == "cpu" else [16, 64]):
                bench, where = Bench(args, size, batch, folder), f"{size} {batch} "
                if args.only is None:
                    bench.report(lambda row, at=where: clock.peak(at + row, folder, args))
                elif args.only.startswith(where):
                    side, precision, kind = args.only.split()[2:]
                    made = SIDES[side](bench.folder, args.device, precision)
                    call = bench.call(made, precision, kind)
                    clock.report_peak(lambda call=call: call(0), args.device)


if __name__ == "__main__":
    main(sys.argv[1:])
