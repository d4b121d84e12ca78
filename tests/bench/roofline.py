"""Where a step's time goes, by counting: without a GPU, or beside the time on this machine.

    python tests/bench/roofline.py                           # cards, by arithmetic
    python tests/bench/roofline.py --size small --measure    # this machine, predicted and measured
    python tests/bench/roofline.py --batch-size 8            # other flags are train.py's

What is counted (meter.py) is train.step with --method sapo, its decoding too, on fresh pairs of
random tokens: on the meta device as one GPU would run it (bf16, one varlen_attn, fused norms,
recorded decoding, checkpointing), or on fake tensors as a CPU would; the host reads zeros there.

A kernel takes the longer of FLOPs / rate and bytes / memory rate, and a launch. Waits for the
device, uploads to it and recordings are counted and not timed, nor is the host's own work: small
models are slower than this says. Memory is not looked at: a step need not fit.

MFU: 6 FLOPs a weight and token of the policy, 2 of the reference (the head's where it is applied),
attention once, over the card's peak. Neither recomputation nor generation counts.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import clock
import shapes
import torch
import varlen_cpu
from meter import BOUNDS, Host, Meter, watched
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import model as lm
import sapo

# FLOP/s and bytes/s (read and written) that are achieved, seconds a launch; FLOP/s at the peak.
# Attention (FlashAttention-2) and launch are assumed.
Rates = dict[str, float]
CARDS: dict[str, Rates] = {
    "H100": dict(zip((*BOUNDS, "peak"), (660e12, 300e12, 3.0e12, 2e-6, 989e12), strict=True)),
    "H200": dict(zip((*BOUNDS, "peak"), (790e12, 300e12, 4.3e12, 2e-6, 989e12), strict=True)),
}
PHASES = ("ema", "prefill", "decode", "generate", "reference", "policy", "optimizer", "rest")
GPU = ["--precision", "bf16", "--activation-checkpointing", "--micro-batch-size", 4]
Lengths = tuple[int, int]  # of prompts and of responses


def source_of(size: str, device: str, lengths: Lengths, flags: Sequence[object]) -> Any:
    """SAPO on a shape's random rows, the optimizer's state there; weights are drawn, not read."""
    shape = shapes.SHAPES[size]
    raw = {"model_type": "llama", "vocab_size": shape.vocabulary, "hidden_size": shape.hidden}
    raw |= {"intermediate_size": shape.inner, "num_hidden_layers": shape.layers}
    raw |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    raw |= {"tie_word_embeddings": size == "smollm2"}
    longer = dataclasses.replace(shape, pairs=128, prompt=lengths[0], response=lengths[1], shared=0)
    rows = [pair._replace(rejected=[]) for pair in shapes.make_pairs(longer, 0)]
    flags = ["--replay-capacity", 0, "--max-length", sum(lengths), *flags]
    flags = ["--method", "sapo", "--lr", shape.lr, *flags]

    def fill(parameters: dict[str, Tensor], *_: Any) -> None:
        for x in parameters.values():
            x.data.fill_(1) if x.dim() == 1 else x.data.normal_(0, 0.02)

    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        data.write_task_tokenizer(place)
        (Path(place) / "config.json").write_text(json.dumps(raw))
        stack.enter_context(mock.patch.object(lm, "find_weights"))
        stack.enter_context(mock.patch.object(lm, "load_weights", fill))
        source = shapes.source_of(sapo.SAPO, Path(place), rows, shapes.Machine(device), flags)
    for x in source.run.policy.parameters():
        x.grad = torch.zeros_like(x)
    source.run.optimizer.step()
    source.run.optimizer.zero_grad()
    return source


def count(size: str, device: str, lengths: Lengths, flags: Sequence[object]) -> Meter:
    """The step on the meta device; or as a CPU would do it, where its models are made."""
    source, meter, meta = source_of(size, device, lengths, flags), Meter(), device == "meta"
    fake: Any = contextlib.nullcontext() if meta else FakeTensorMode(allow_non_fake_inputs=True)
    with fake, watched(meter, meta), meter, Host(meter, torch.device(device)):
        shapes.step(source, 1)
    return meter


def measure(
    size: str, device: str, lengths: Lengths, flags: Sequence[object], reps: int, quick: bool
) -> list[tuple[Rates, Any]]:
    """Rounds of steps beside the machine's rates: these, and the seconds of each phase."""
    source, meters, one = source_of(size, device, lengths, flags), [], torch.zeros(1, device=device)
    calls, flops = clock.matmul_calls(device, quick)
    copy, moved = clock.copy_call(device, quick)

    def step(rep: int) -> None:
        meters.append(Meter())
        with watched(meters[-1], False):
            shapes.step(source, rep + 1)
            meters[-1].turn("rest")

    tried = {"matmul": calls[f"matmul {source.run.config.precision}"], "copy": copy, "step": step}
    tried["launch"] = lambda _: [one + 1 for _ in range(1000)]
    seconds, rounds = clock.alternate(tried, reps, device), []
    for matmul, copied, launch, meter in zip(
        seconds["matmul"], seconds["copy"], seconds["launch"], meters[1:], strict=True
    ):
        rate = flops / matmul
        rates = (rate, rate, moved / copied, launch / 1000, rate)
        rounds.append((dict(zip((*BOUNDS, "peak"), rates, strict=True)), meter.seconds))
    return rounds


def compiled() -> tuple[list[int], int]:
    """Graphs that there are after each of four steps of a tiny model with --compile; breaks."""
    real = nn.Module.compile

    def compile(self: nn.Module, **_: Any) -> None:
        real(self, backend="eager", dynamic=True)

    torch._dynamo.reset()
    counters.clear()
    with (
        mock.patch.object(nn.Module, "compile", compile),
        mock.patch.object(lm, "has_kernel", varlen_cpu.has_kernel),
    ):
        source = source_of("tiny", "cpu", (8, 16), ["--compile", "--segment-length", 4])
        steps = (shapes.step(source, t) for t in range(1, 5))
        graphs = [counters["stats"]["unique_graphs"] for _ in steps]
    return graphs, sum(counters["graph_break"].values())


def report(title: str, meter: Meter, rates: Rates, rounds: Sequence[Any] = ()) -> None:
    """The table of a step; `rounds` are measured ones, each predicted from its own rates."""
    lines, sums = [], []
    for phase in (*PHASES, "all"):
        names = PHASES if phase == "all" else (phase,)
        kernels = [(key, n) for name in names for key, n in meter.kernels[name].items()]
        parts = [meter.predicted(name, rates) for name in names]
        spent = [sum(part[bound] for part in parts) for bound in BOUNDS]
        sums.append(sum(spent))
        line = [phase, str(sum(n for _, n in kernels))]
        line += [f"{sum(key[i] * n for key, n in kernels) / 1e9:,.1f}" for i in (1, 2)]
        line += [str(sum(c[name] for name in names)) for c in (meter.waits, meter.uploads)]
        line += [f"{1000 * x:,.1f}" for x in (*spent, sums[-1])]
        if rounds:
            said = [sum(sum(meter.predicted(n, r).values()) for n in names) for r, _ in rounds]
            took = [sum(seconds[name] for name in names) for _, seconds in rounds]
            line += [clock.spread([1000 * x for x in took], 1)]
            line += [clock.spread([t / max(s, 1e-9) for t, s in zip(took, said, strict=True)])]
        lines.append(line)
    head = ["phase", "kernels", "GFLOP", "GB", "waits", "uploads", *BOUNDS, "ms predicted"]
    clock.table(title, [*head, *["ms measured", "over predicted"][: 2 * bool(rounds)]], lines)
    passes = sums[PHASES.index("reference")] + sums[PHASES.index("policy")]
    shares = [meter.useful / rates["peak"] / x for x in (passes, sums[-1])]
    text = "\nMFU {:.1%} of both passes, {:.1%} of the step; {:,.1f} useful TFLOP; "
    text += "{} steps of decoding, {} recordings"
    print(text.format(*shares, meter.useful / 1e12, meter.steps, meter.recordings))


def main(argv: Sequence[str]) -> None:
    """A table for each size and card, or of this machine."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    sizes = ["llama1b", "llama8b", "smollm2"]
    parser.add_argument("--size", nargs="+", choices=shapes.SHAPES, default=sizes)
    parser.add_argument("--prompt", type=int, default=512, help="tokens [512]")
    parser.add_argument("--response", type=int, default=512, help="tokens [512]")
    parser.add_argument("--measure", action="store_true", help="on this machine")
    parser.add_argument("--reps", type=int, default=5, help="measured steps [5]")
    parser.add_argument("--quick", action="store_true", help="small matmuls and copies")
    args, rest = parser.parse_known_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    meta = not args.measure or device == "cuda"
    flags, lengths = [*GPU * meta, *rest], (args.prompt, args.response)
    for size in args.size:
        meter, title = count(size, "meta" if meta else device, lengths, flags), shapes.SHAPES[size]
        for card, rates in {} if args.measure else CARDS.items():
            report(f"{size} ({title}), {card}", meter, rates)
        if args.measure:
            rounds = measure(size, device, lengths, flags, args.reps, args.quick)
            middle = {key: statistics.median(r[key] for r, _ in rounds) for key in rounds[0][0]}
            report(f"{size} ({title}), {device}, here", meter, middle, rounds)
            print(", ".join(f"{key} {rate:.3g}" for key, rate in middle.items()))
    graphs, breaks = compiled()
    print(f"\n--compile: {graphs} graphs after each of four steps, {breaks} breaks")


if __name__ == "__main__":
    main(sys.argv[1:])
