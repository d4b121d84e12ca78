"""Where a step's time goes, by counting: without a GPU, or beside the time on this machine.

    python tests/bench/roofline.py                           # cards, by arithmetic, and the targets
    python tests/bench/roofline.py --size small --measure    # this machine, predicted and measured
    python tests/bench/roofline.py --batch-size 8            # other flags are train.py's

What is counted (meter.py) is train.step with --method sapo, its decoding too, on fresh pairs of
random tokens: on the meta device as one GPU would run it (bf16, one varlen_attn, fused norms,
recorded decoding, checkpointing), or on fake tensors as a CPU would; the host reads zeros there.

A kernel takes the longer of FLOPs / rate and bytes / memory rate, and a launch. On a GPU the host
launches them at its own rate, but for those that are recorded; where that takes longer, the rest is
"host". It waits for what it reads and sends, and records. Python's own work is not counted: small
models are slower than this says. Memory is not looked at: a step need not fit.

MFU: 6 FLOPs a weight and token of the policy, 2 of the reference (the head's where it is applied),
attention once, over the card's peak. Neither recomputation nor generation counts.

One of 8 ranks (FSDP2, no checkpointing) is counted as one GPU with 8 of 64 pairs and weights in
bf16. Then come, by arithmetic, an eighth of optimizer and EMA; for a pass the copies of gathered
weights and sent gradients, and NVLink, beside the kernels; the decoder's weights, gathered whole.
--ema-offload: each fp32 weight of the EMA goes up and back, one after the other, and up once more
for the decoder.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import clock
import shapes
import torch
import varlen_cpu
from meter import BOUNDS, HOST, Host, Meter, Rates, fusing, watched
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import model as lm
import sapo
import train

# FLOP/s and bytes/s (read and written) that are achieved; seconds a launch, and what a product
# takes more; FLOP/s and bytes/s at the peak. Matmuls as sustained (an H200 has shown 790 on one
# large product), 90% of the memory's peak, attention (FlashAttention-2) and launches are assumed;
# with "product" thin ones, as in decoding, take what cuBLAS is known for, 72% of that peak.
NAMES = (*BOUNDS, "product", "peak", "peak memory")
COSTS: Rates = {  # seconds of the host and of links, assumed; "number" was measured on a CPU
    "eager": 5.5e-6,  # a kernel launched from Python or by autograd, and the views around it
    "call": 1e-4,  # varlen_attn besides: an operator in Python
    "wait": 15e-6,  # a read: the device has run dry, and is given work again
    "upload": 15e-6,  # torch.tensor(..., device=): from pageable memory, so that it waits too
    "number": 1e-7,  # of a list that becomes a tensor
    "recorded": 50e-6,  # a kernel that is recorded: run, captured, instantiated; 50 ms for 979
    "collective": 30e-6,  # where nothing runs beside it
    "nvlink": 1 / 450e9,  # a byte
    "pcie": 1 / 50e9,  # a byte, pinned
}
H100: Rates = dict(zip(NAMES, (650e12, 300e12, 3.0e12, 2e-6, 3e-6, 989e12, 3.35e12), strict=True))
H100 |= COSTS
CARDS = {"H100": H100, "H200": H100 | {"memory": 4.3e12, "peak memory": 4.8e12}}
PHASES = "ema copy prefill decode generate reference policy optimizer rest".split()  # noqa: SIM905
LESS = "--activation-checkpointing"
GPU = ["--precision", "bf16", "--micro-batch-size", 4, LESS]
RANKS = 8
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


def count(
    size: str, device: str, lengths: Lengths, flags: Sequence[object], sharded: bool = False
) -> Meter:
    """The step on the meta device; or as a CPU would do it, where its models are made. `sharded`:
    that of a rank, which has its share of the pairs, and gets all weights in bf16."""
    meter, meta = Meter(device), device == "meta"
    flags = [*flags, *["--batch-size", 64 // RANKS] * sharded]
    counted = {"--compile", "--ema-offload"}  # by rule and by arithmetic
    source = source_of(size, device, lengths, [flag for flag in flags if flag not in counted])
    models = source.run.models
    parameters = [*source.run.policy.parameters()]
    meter.weights, meter.tensors = sum(x.numel() for x in parameters), len(parameters)
    with contextlib.ExitStack() as stack:
        if not meta:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if "--compile" in flags:
            stack.enter_context(fusing(meter, [models["policy"], models["reference"]]))
        for model in models.values() if sharded else ():
            model.to(torch.bfloat16)
        for x in parameters if sharded else ():  # FSDP2 takes it from each pass
            x.register_post_accumulate_grad_hook(lambda x: setattr(x, "grad", None))
        host = Host(meter, torch.device(device))
        for part in (watched(meter, meta, sharded), meter, host):
            stack.enter_context(part)
        shapes.step(source, 1)
    if "--ema-offload" in flags:
        meter.costs["ema", "pcie"] += 8 * meter.weights
        meter.costs["copy", "pcie"] += 4 * meter.weights
    return meter


def rank_of(size: str, lengths: Lengths, flags: Sequence[object], one: Meter) -> Meter:
    """A rank's step, of which `one` is a single GPU's."""
    meter = count(size, "meta", lengths, [flag for flag in flags if flag != LESS], sharded=True)
    weights, far = meter.weights, 1 - 1 / RANKS
    for phase, passes in meter.passes.items():
        learns = phase == "policy"  # it gathers twice, and sends its gradient in fp32
        meter.costs[phase, "nvlink"] += round(passes * far * weights * (8 if learns else 2))
        meter.kernels[phase]["matmul", 0.0, weights * (14 if learns else 4) / 100] += 100 * passes
    for phase in ("ema", "optimizer"):
        share = {(kind, x / RANKS, y / RANKS): n for (kind, x, y), n in one.kernels[phase].items()}
        meter.kernels[phase] = Counter(share)
    meter.costs["copy", "nvlink"] += round(far * weights * 2)
    meter.costs["copy", "collective"] += meter.tensors
    return meter


def measure(
    size: str, device: str, lengths: Lengths, flags: Sequence[object], reps: int, quick: bool
) -> list[tuple[Rates, Any]]:
    """Steps, each with the machine's rates and the seconds of its phases. On a CPU, which others
    use too, the rates are taken in turn with the steps; on a GPU before, while there is room."""
    cuda, seconds, one = device == "cuda", clock.Times(), torch.zeros(1, device=device)

    def machine() -> dict[str, Any]:
        precision = train.parse_args(["--data", "none", *map(str, flags)]).precision
        calls, flops = clock.matmul_calls(device, quick)
        copy, moved = clock.copy_call(device, quick)
        work.update(matmul=flops, copy=moved, launch=1000.0)
        launch = lambda _: [one + 1 for _ in range(1000)]  # noqa: E731
        return {"matmul": calls[f"matmul {precision}"], "copy": copy, "launch": launch}

    def step(rep: int) -> None:
        meters.append(Meter())
        with watched(meters[-1], False):
            shapes.step(source, rep + 1)
            meters[-1].turn("rest")

    work, meters = dict[str, float](), list[Meter]()
    if cuda:
        seconds |= clock.alternate(machine(), reps, device)
    source = source_of(size, device, lengths, flags)
    seconds |= clock.alternate((machine() if not cuda else {}) | {"step": step}, reps, device)
    rounds = []
    for i, meter in enumerate(meters[1:]):
        rate, copied, launches = (work[name] / seconds[name][i] for name in work)
        rates = H100 if cuda else dict.fromkeys(NAMES, 0.0) | {"peak": rate}
        rates = rates | {"matmul": rate, "memory": copied, "attention": rate}
        if cuda:
            rates["attention"] *= H100["attention"] / H100["matmul"]
        rounds.append((rates | {"eager" if cuda else "launch": 1 / launches}, meter.seconds))
    return rounds


def compiled(backend: str) -> tuple[list[int], int]:
    """Graphs that there are after each of four steps of a tiny model with --compile; breaks."""
    real = nn.Module.compile

    def compile(self: nn.Module, **how: Any) -> None:
        real(self, **(how if backend == "inductor" else {"backend": backend, "dynamic": True}))

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


def spent(meter: Meter, rates: Rates, *phases: str) -> Rates:
    """Seconds of phases, by what bounds them."""
    parts = [meter.predicted(phase, rates) for phase in phases]
    return {bound: sum(part[bound] for part in parts) for bound in (*BOUNDS, *HOST)}


def report(title: str, meter: Meter, rates: Rates, rounds: Sequence[Any] = ()) -> None:
    """The table of a step; `rounds` are measured ones, each predicted from its own rates."""
    lines = []
    bounds = [bound for bound, x in spent(meter, rates, *PHASES).items() if x]
    for phase in (*PHASES, "all"):
        names = PHASES if phase == "all" else (phase,)
        kernels = [(key, n) for name in names for key, n in meter.kernels[name].items()]
        parts = spent(meter, rates, *names)
        line = [phase, str(sum(n for _, n in kernels))]
        line += [f"{sum(key[i] * n for key, n in kernels) / 1e9:,.1f}" for i in (1, 2)]
        line += [str(sum(meter.costs[name, x] for name in names)) for x in ("wait", "upload")]
        line += [f"{1000 * parts[bound]:,.1f}" for bound in bounds]
        line += [f"{1000 * sum(parts.values()):,.1f}"]
        if rounds:
            said = [sum(spent(meter, r, *names).values()) for r, _ in rounds]
            took = [sum(seconds[name] for name in names) for _, seconds in rounds]
            line += [clock.spread([1000 * x for x in took], 1)]
            more = [t / max(s, 1e-9) for t, s in zip(took, said, strict=True)]
            line += [clock.spread(more) if min(said) > 1e-3 else "-"]
        lines.append(line)
    head = ["phase", "kernels", "GFLOP", "GB", "waits", "uploads", *bounds, "ms predicted"]
    clock.table(title, [*head, *["ms measured", "over predicted"][: 2 * bool(rounds)]], lines)
    text = "\nMFU {:.1%} of both passes, {:.1%} of the step; {:,.1f} useful TFLOP; "
    text += "{} steps of decoding, {} recordings"
    shares = (mfu(meter, rates, "reference", "policy"), mfu(meter, rates, *PHASES))
    print(text.format(*shares, meter.useful / 1e12, meter.steps, meter.recordings))


def mfu(meter: Meter, rates: Rates, *phases: str) -> float:
    """Useful FLOPs, in so much time, over the peak."""
    return meter.useful / rates["peak"] / sum(spent(meter, rates, *phases).values())


def bandwidth(meter: Meter, rates: Rates, unread: int) -> float:
    """Decoding's share of the memory's peak: bf16 weights, but for those `unread`, and all of the
    cache, once a step, in its time, which is that of the recordings not."""
    parts = spent(meter, rates, "decode", "generate")
    seconds = (sum(parts.values()) - parts["recording"]) / meter.steps
    return (2 * (meter.weights - unread) + meter.cache) / rates["peak memory"] / seconds


def targets(size: str, lengths: Lengths, flags: Sequence[object], made: int, breaks: int) -> None:
    """A step with --compile and 64 pairs: Llama-3-8B's as it was, as it should be, and as it is.
    `made`: graphs that were compiled after the second step."""
    one = count(size, "meta", lengths, [*flags, "--compile", "--ema-offload"])
    rank = rank_of(size, lengths, [*flags, "--compile"], one)
    both = ((rank, CARDS["H100"]), (one, CARDS["H200"]))
    names = (f"a rank of {RANKS} H100", "an H200 with --ema-offload")
    for name, x in zip(names, both, strict=True):
        report(f"{size}, {name}, --compile", *x)
    kernels = sum(one.kernels[name].total() for name in ("decode", "generate"))
    passes = [mfu(*x, "reference", "policy") for x in both]
    whole = [sum(spent(*x, *PHASES).values()) for x in both]
    shares = [bandwidth(*x, shapes.SHAPES[size].head) for x in both]
    waits = sum(one.costs[name, "wait"] for name in ("decode", "generate"))
    found = (
        ("MFU of policy and reference", "42%, 44%", "52%, 49%", "{:.0%}, {:.0%}", passes),
        ("seconds of the step", "4.7, 30", "3.5, 16", "{:.1f}, {:.1f}", whole),
        ("decoding's share of the bandwidth", "50%, 41%", "70%, 70%", "{:.0%}, {:.0%}", shares),
        ("kernels a decode step", "979", "450", "{:.0f}", [kernels / one.steps]),
        ("host waits a token", "2 to 4", "1/8", "{:.2f}", [waits / one.steps]),
        ("recordings a batch", "4 to 6", "row counts", "{:g}", [one.recordings / one.batches]),
        ("--compile: breaks; graphs made after step 2", "3 a block; up to 8", "0; 0", "{}; {}",
         [breaks, made]),
    )  # fmt: skip
    lines = [[name, was, aim, form.format(*x)] for name, was, aim, form, x in found]
    title = f"{size}, 64 pairs: {names[0]}, {names[1]}"
    clock.table(title, ["predicted", "before", "to reach", "now"], lines)


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
    parser.add_argument("--quick", action="store_true", help="small matmuls, no inductor")
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
    there = shutil.which(os.environ.get("CXX", "g++")) and not args.quick
    backend = "inductor" if there else "eager"
    graphs, breaks = compiled(backend)
    print(f"\n--compile, {backend}: {graphs} graphs after each of four steps, {breaks} breaks")
    if "llama8b" in args.size and not args.measure:
        targets("llama8b", lengths, flags, graphs[-1] - graphs[1], breaks)


if __name__ == "__main__":
    main(sys.argv[1:])
