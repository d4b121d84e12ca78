"""The paths that only a GPU takes, against their slow twins: the first thing to run on a new one.

    python tests/bench/first_gpu.py [kernel packed decoding sharded golden run]

A line for each number, `ok` or `BAD`, and exit status 1 where one is BAD; some minutes. Without a
GPU everything runs on the tests' CPU kernels and on gloo, which checks this script and little else.
It needs what the product needs: torch 2.11 or later, no transformers.
"""

import contextlib
import inspect
import io
import itertools
import json
import math
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tape  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import varlen_cpu  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

import model as lm  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from data import Pair  # noqa: E402
from sapo import ema_update  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
GOLDEN = ROOT / "tests" / "golden"
CHANGES = ({}, {"model_type": "mistral", "sliding_window": 17})
bad: list[str] = []


def told(name: str, value: float, most: float) -> None:
    """Prints whether a number is small enough; NaN is not."""
    good = value <= most
    print(f"{'ok  ' if good else 'BAD '} {name}: {value:.3g} (at most {most:g})", flush=True)
    if not good:
        bad.append(name)


def away(x: Tensor, y: Tensor) -> float:
    """How far x is from y, in lengths of y."""
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm())


@contextlib.contextmanager
def kernel_is(on: bool) -> Iterator[None]:
    """Takes the path of one kernel for all sequences, or the one by one."""
    real = lm.has_kernel
    lm.has_kernel = (real if CUDA else varlen_cpu.has_kernel) if on else lambda *_: False
    try:
        yield
    finally:
        lm.has_kernel = real


def drawer(seed: int) -> Callable[..., list[int]]:
    """Draws rows of tokens."""
    generator = torch.Generator().manual_seed(seed)
    return lambda count, most=300: torch.randint(5, most, (count,), generator=generator).tolist()


def small(dtype: torch.dtype, **changes: Any) -> lm.Transformer:
    """A model of random weights with grouped heads."""
    raw = {"model_type": "llama", "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512}
    raw |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = lm.Transformer(lm.Config.from_dict(raw | changes))
    model.init_weights(1)
    return model.to(DEVICE, dtype)


def make_pairs(count: int, most: int = 300) -> list[Pair]:
    """Pairs of many lengths that part early, late or not at all."""
    draw = drawer(2)
    pairs = []
    for i in range(count):
        chosen = draw(20 + 9 * i, most)
        pairs.append(Pair(draw(5 + 7 * i, most), chosen, chosen[: 11 * i] + draw(30, most)))
    return [*pairs, Pair(draw(9, most), pairs[0].chosen, pairs[0].chosen)]


# ------------------------------------------------------------------------------------ the checks


def ends(counts: Sequence[int]) -> Tensor:
    """Where sequences begin and end, as the kernel wants it."""
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=DEVICE)


def by_hand(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of one sequence in float64, whose queries are the last of its keys' tokens."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    at = torch.arange(len(k), device=DEVICE)
    ago = at[len(k) - len(q) :, None] - at
    hidden = (ago < 0) | ((ago > window) & (window >= 0))
    scores = torch.einsum("qhe,khe->hqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def kernel() -> None:
    """varlen_attn itself: alignment, windows, grouped heads, gradients, against float64."""
    generator = torch.Generator().manual_seed(0)
    sizes, seen = [70, 1, 33, 200], [70, 30, 33, 333]

    def made(count: int, heads: int, size: int) -> Tensor:
        values = torch.randn(count, heads, size, generator=generator)
        return values.to(DEVICE, torch.bfloat16).requires_grad_()

    for size, heads, shared, window in (
        (128, 8, 2, -1),
        (64, 4, 4, 6),
        (16, 4, 2, -1),
        (128, 8, 2, 99),
    ):
        q = made(sum(sizes), heads, size)
        k, v = (made(sum(seen), shared, size) for _ in range(2))
        how = {"window_size": (window, 0), **lm.GROUPED}
        out: Any = lm.varlen_attn(q, k, v, ends(sizes), ends(seen), max(sizes), max(seen), **how)
        weights = torch.randn(out.shape, generator=generator).to(DEVICE)
        got = [out, *torch.autograd.grad((out.float() * weights).sum(), (q, k, v))]
        parts = zip(
            *(x.double().split(n) for x, n in ((q, sizes), (k, seen), (v, seen))), strict=True
        )
        exact = torch.cat([by_hand(*part, window) for part in parts])
        want = [exact, *torch.autograd.grad((exact * weights).sum(), (q, k, v))]
        told(f"varlen_attn, heads of {size}, window {window}", max(map(away, got, want)), 2e-2)


def packed() -> None:
    """One kernel for all sequences: as near to fp32 as bf16 a sequence at a time is, and the same
    with checkpointing."""
    pairs, half = make_pairs(6), torch.bfloat16
    for changes in CHANGES:
        model = small(torch.float32, **changes)
        found = []
        for on, dtype, again in ((0, None, 0), (0, half, 0), (1, half, 0), (1, half, 1)):
            model.compute_dtype, model.checkpointing = dtype, bool(again)
            model.zero_grad()
            with kernel_is(bool(on)):
                chosen, rejected, *_ = lm.pair_logprobs(model, pairs)
                (chosen - rejected).sum().backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            found.append((torch.cat((chosen, rejected)).detach(), gradient))
        for what, exact, slow, fast, again in zip(("log-probs", "gradients"), *found, strict=True):
            name = f"packed {model.config.raw['model_type']}, {what}"
            told(
                f"{name}: error over a sequence at a time's",
                away(fast, exact) / away(slow, exact),
                2,
            )
            told(f"{name}: checkpointing", away(again, fast), 1e-2)


def decoding() -> None:
    """Graphs against the same steps run eagerly; the tokens' log-probs against one pass."""

    def eager(step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    draw = drawer(3)
    budgets = [20, 1, 130, 12, 140, 2, 60, 150] * 4 if CUDA else [12, 1, 130, 2]
    asked = [(draw(3 + 11 * i), budget, i, []) for i, budget in enumerate(budgets)]
    top_k = 50 if CUDA else 0  # on a CPU a tie with the 50th is looked at, which no tape can
    pick = partial(lm.sample_tokens, temperature=0.9, top_k=top_k, top_p=0.95)
    for changes in CHANGES:
        model = small(torch.bfloat16, **changes).requires_grad_(False)
        decode = partial(lm._decode, model, asked, pick, {7})
        with kernel_is(True), torch.no_grad():
            graph, plain = decode(lm.record_graph if CUDA else tape.record), decode(eager)
            new = [[token for token, _ in row] for row in graph]
            pairs = [(row[0], tokens, []) for row, tokens in zip(asked, new, strict=True)]
            scored = lm.pair_token_logprobs(model, pairs)[1::3]
        name = f"decoding {model.config.raw['model_type']}"
        differ = sum([t for t, _ in a] != b for a, b in zip(plain, new, strict=True))
        told(f"{name}: rows whose replayed tokens differ", differ, 0)
        both = zip(scored, graph, strict=True)
        off = (x.cpu() - torch.tensor([logp for _, logp in row]) for x, row in both)
        most = max(float(x.abs().max()) for x in off)
        told(f"{name}: log-probs against one pass, nats", most, 0.15)


class Many(int):
    """A world of one process that takes the path of many."""

    def __gt__(self, other: object) -> bool:
        return True


def sharded() -> None:
    """FSDP2, DTensor, checkpointing and (on a GPU) NCCL and compilation, in one process: three
    updates of a policy, beside its EMA and its reference."""
    store, start = dist.TCPStore("127.0.0.1", 0, 1, is_master=True), GOLDEN / "start"
    dist.init_process_group("nccl" if CUDA else "gloo", store=store, rank=0, world_size=1)
    try:
        ranks = train.Ranks()
        ranks.mesh, ranks.world = dist.init_device_mesh(DEVICE.type, (1,)), Many(1)
        flags = ["--data", "x", "--precision", "bf16", "--activation-checkpointing"]
        config = train.parse_args([*flags, *(["--compile"] if CUDA else [])])
        roles = [ranks.build(start, config, role) for role in ("policy", "ema", "reference")]
        policy, ema, reference = roles
        whole = lm.Transformer.from_pretrained(start, device=str(DEVICE))
        whole.compute_dtype = torch.bfloat16
        optimizer = torch.optim.RMSprop(policy.parameters(), lr=1e-4, foreach=True)
        for step in range(3):
            pairs = make_pairs(3 + step, policy.config.vocab_size)
            chosen, rejected, *_ = lm.pair_logprobs(policy, pairs)
            with torch.no_grad():
                kept, alone = (lm.pair_logprobs(m, pairs)[0] for m in (reference, whole))
            if step == 0:
                told("sharded: policy against reference", away(chosen, kept), 1e-2)
                told("sharded: policy against a whole model", away(chosen, alone), 1e-2)
            (rejected - chosen).sum().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
            ema_update(ema, policy, 0.5)
            with ranks.decoder(ema) as ready:
                new = lm.generate(ready, [pair.prompt for pair in pairs], 20, seed=step)
            ranks.agree(False)
            told(f"sharded: rows unanswered, step {step + 1}", sum(not row for row in new), 0)
        begin, average, end = (ranks.whole(m.model["norm"].weight) for m in (whole, ema, policy))
        told(
            "sharded: the EMA's way left to the policy", away(average, end) / away(begin, end), 0.9
        )
        told("sharded: ranks that ask to stop", float(ranks.agree(False)), 0)
        breaks = torch._dynamo.utils.counters["graph_break"] if CUDA else {}
        told("sharded: breaks of compiled graphs", sum(breaks.values()), 0)
    finally:
        dist.destroy_process_group()


def quiet(main: Callable[[Sequence[str]], int], *argv: object) -> str:
    """What a program of the product prints; told if it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main([*map(str, argv)])
    told(f"{main.__module__}.py {' '.join(map(str, argv[-2:]))}: exit status", status, 0)
    return said.getvalue()


def golden() -> None:
    """A golden run that draws nothing, in fp32, against its trace from a CPU."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trace = Path(folder) / "trace.safetensors"
        runpy.run_path(str(GOLDEN / "make.py"))["record"]("dpo", trace)
        again = load_file(trace)
    want = load_file(GOLDEN / "dpo.safetensors")
    for key in ("step/loss", "step/grad_norm", "pair/policy_chosen"):
        if key in want:
            told(f"golden run, {key}", away(again[key], want[key]), 1e-3)


def run() -> None:
    """SAPO in bf16 from the golden start, a checkpoint taken up, an answer of what it made."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        flags = ["--model", GOLDEN / "start", "--data", GOLDEN / "rows.jsonl", "--out", out]
        flags += ["--batch-size", 4, "--max-length", 64, "--segment-length", 8, "--save-every", 2]
        flags += ["--precision", "bf16", "--activation-checkpointing", "--log-every", 1]
        quiet(train.main, *flags, "--steps", 4)
        shutil.rmtree(out / "final")
        quiet(train.main, *flags, "--resume", "--steps", 6)
        losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]
        told("run: steps that are not there", abs(len(losses) - 6), 0)
        told("run: first loss against ln 2", abs(losses[0] - math.log(2)), 1e-3)
        told("run: highest loss", max(losses), 1)
        said = quiet(
            sample.main, "--model", out / "final", "--prompt", "sort ba", "--precision", "bf16"
        )
        told("run: answers that are missing", float(not said.strip()), 0)


CHECKS = {f.__name__: f for f in (kernel, packed, decoding, sharded, golden, run)}


def main(names: Sequence[str]) -> int:
    """Runs the checks of these names, or all."""
    bad.clear()
    where = torch.cuda.get_device_name() if CUDA else "no GPU: the tests' CPU kernels, and gloo"
    takes = ", ".join(inspect.signature(lm.varlen_attn).parameters)
    print(f"torch {torch.__version__}, {where}; varlen_attn takes {takes}")
    for name in names or CHECKS:
        began = time.perf_counter()
        try:
            CHECKS[name]()
        except Exception as error:  # the other checks are run all the same
            told(
                f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", math.nan, 0
            )
        print(f"     {name}: {time.perf_counter() - began:.0f} s", flush=True)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
