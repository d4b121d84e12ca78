"""Counts what the product runs: kernels, FLOPs and bytes of each of a step's phases, and what the
host does for them. See roofline.py.

A kernel is an operator whose result is not a view. FLOPs are torch.utils.flop_counter's; those of
attention 4 (backward: 10) a channel and pair of a query and a key that it sees. Bytes: each
argument and result once, of tables the rows that are looked up or stored.

With --compile, by a rule in place of a compiler: in a block, and in its backward pass, operators
other than products and look-ups that feed each other, with equally many of those behind them, are
one kernel, which reads once what others have made, and writes what others read.
"""

import contextlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import shapes  # noqa: F401 - it makes the product importable
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import model as lm
import train

FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}
LOOKS, STORES = {"index_select", "embedding", "index", "gather"}, {"index_put_", "scatter_add_"}
READS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "nonzero"}
BOUNDS = ("matmul", "attention", "memory", "launch")  # what a kernel may wait for
HOST = ("host", "waiting", "recording", "links")  # what a phase takes besides
Rates = dict[str, float]


@torch.library.custom_op("roofline::norm", mutates_args=())
def norm(x: Tensor, weight: Tensor) -> Tensor:
    """CUDA's RMSNorm is one kernel, on the meta device too with this."""
    raise NotImplementedError


@torch.library.custom_op("roofline::norm_backward", mutates_args=())
def norm_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Its gradients."""
    raise NotImplementedError


norm.register_fake(lambda x, weight: torch.empty_like(x))
norm_backward.register_fake(lambda grad, x, weight: (torch.empty_like(x), torch.empty_like(weight)))
norm.register_autograd(
    lambda ctx, grad: norm_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def sizes(tensors: Sequence[Tensor]) -> int:
    """Their bytes; what is only repeated counts once."""
    dims = [[n for n, s in zip(x.shape, x.stride(), strict=True) if s] for x in tensors]
    return sum(x.element_size() * math.prod(dim) for x, dim in zip(tensors, dims, strict=True))


class Fusion:
    """The kernels that a compiler makes of operators, by the rule above."""

    def __init__(self) -> None:
        self.on, self.floor = False, 0
        self.depths: dict[int, int] = {}  # of storages: products behind them
        self.kernels: dict[int, int] = {}  # of storages: the fused kernel that makes each
        self.held: set[int] = set()  # storages that are not written yet
        self.read: set[tuple[int, int]] = set()  # kernels, and storages that each has read
        self.alive: list[Any] = []  # so that no two storages have one name

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """Within it operators are fused; afterwards as before."""
        outer, self.floor = self.on, max([self.floor, *self.depths.values()]) + 1
        self.on = True
        yield
        self.on, self.floor = outer, max([self.floor, *self.depths.values()]) + 1

    def takes(self, given: Sequence[Tensor], made: Sequence[Tensor], one: bool) -> tuple[int, int]:
        """Kernels and bytes of an operator, element-wise or (`one`) a kernel of its own, of whose
        bytes those are meant that others have not written yet."""
        at = [x.untyped_storage() for x in (*given, *made)]
        self.alive += at
        keys, moved = [storage._cdata for storage in at], 0
        depth = max([self.floor, *(self.depths.get(key, 0) for key in keys[: len(given)])])
        inside = {k for k in keys[: len(given)] if k in self.kernels and self.depths[k] == depth}
        parts = {self.kernels[key] for key in inside if not one}
        kernel = min(parts, default=len(self.alive))
        if len(parts) > 1:  # what was two is one
            self.kernels = {k: kernel if x in parts else x for k, x in self.kernels.items()}
        for key, x, storage in zip(keys, given, at, strict=False):
            if one or key not in inside:
                moved += storage.nbytes() * (key in self.held)
                self.held.discard(key)
                moved += sizes([x]) * (not one and (kernel, key) not in self.read)
                self.read.add((kernel, key))
        for key in keys[len(given) :]:
            self.depths[key] = depth + one
            self.kernels.pop(key, None)
            if not one:
                self.kernels[key] = kernel
                self.held.add(key)
        return 1 - len(parts), moved


class Meter(TorchDispatchMode):
    """What each phase of the product took; as a mode, also what it ran."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device, self.told_zeros = device, False
        self.kernels: dict[str, Any] = defaultdict(Counter)  # (kind, FLOPs, bytes): how many
        self.costs = Counter[tuple[str, str]]()  # of a phase: what the host did, by roofline.COSTS
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = self.recordings = self.batches = 0  # of decoding
        self.passes = Counter[str]()  # over pairs
        self.weights = self.tensors = 0
        self.cache = 0  # bytes of keys and values
        self.useful = self.seen = 0.0  # FLOPs for MFU; this pass's pairs of a query and a key
        self.fusion = Fusion()
        self.phase, self.began = "rest", time.perf_counter()

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """A phase, which is not part of the one around it."""
        outer = self.phase
        self.turn(name)
        yield
        self.turn(outer)

    def turn(self, name: str) -> None:
        """Here another phase begins."""
        if torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.began
        self.phase, self.began, self.fusion.on = name, now, False

    def begin(self, layout: Any, c: lm.Config) -> None:
        """A forward pass begins."""
        both = zip(layout.sizes, layout.seen_sizes, strict=True)
        self.seen = sum(n * (seen - (n - 1) / 2) for n, seen in both)
        self.fusion = Fusion()
        if isinstance(layout, lm.Branches):
            self.passes[self.phase] += 1
            wide, narrow = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
            block = c.hidden_size * (2 * wide + 2 * narrow + 3 * c.intermediate_size)
            linear = 2.0 * c.num_hidden_layers * block * sum(layout.sizes)
            linear += 2.0 * c.vocab_size * c.hidden_size * len(layout.places)
            attention, learns = 4.0 * self.seen * wide * c.num_hidden_layers, self.phase == "policy"
            self.useful += 3 * linear + 3.5 * attention if learns else linear + attention

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        space, name = func._schema.name.split("::")
        given = [x for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        there, changes = {x.untyped_storage()._cdata for x in given}, func._schema.is_mutable
        new = changes or any(x.untyped_storage()._cdata not in there for x in made)
        there_too = any(x.device.type == self.device for x in (*given, *made))
        if not (new and there_too) or name in FREE or space in ("profiler", "prim"):
            return result
        kind, flops = self.flops(func, name, args, kwargs, result)
        moved, kernels = self.bytes(name, given, made, args), 1
        if self.fusion.on:
            one = flops > 0 or changes or name in LOOKS or "index" in name
            kernels, fused = self.fusion.takes(given, made, one)
            moved = moved * one + fused
        self.kernels[self.phase][kind, flops, moved] += 1
        if kernels < 1:  # it is part of one that is counted, or makes one of several
            self.kernels[self.phase]["matmul", 0.0, 0] += kernels - 1
        self.costs[self.phase, "eager"] += kernels
        self.costs[self.phase, "call"] += kind == "attention"
        return result

    def bytes(self, name: str, given: Any, made: Any, args: Any) -> int:
        """What an operator moves by itself."""
        if name in LOOKS | STORES:
            return 2 * sizes(made if name in LOOKS else given[1:])
        if name in ("zeros_like", "ones_like"):
            return sizes(made)
        moved = sizes(given) + sizes(made or tree_leaves(args[0]))
        if name in ("copy_", "_foreach_copy_", "zero_", "fill_"):  # what was there is not read
            moved -= sizes(tree_leaves(args[0]))
        return moved

    def flops(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> tuple[str, float]:
        """Of an operator, and the rate at which it may do them."""
        if "varlen" in name or "scaled_dot_product" in name:
            back = "backward" in name
            q, k = args[back : back + 2]
            pairs, heads = self.seen, q.shape[-2]
            if "varlen" not in name:  # the CPU's: a sequence, all of it where a mask is given
                causal = (args[7] if back else [*args, 0.0, False][4]) is True
                pairs, heads = q.shape[2] * k.shape[2] * (0.5 if causal else 1), q.shape[1]
            return "attention", (10 if back else 4) * pairs * heads * q.shape[-1]
        formula = flop_registry.get(func.overloadpacket)
        return "matmul", float(formula(*args, **kwargs, out_val=result)) if formula else 0.0

    def predicted(self, phase: str, rates: Rates) -> Rates:
        """Seconds by what bounds them. The host launches, and NVLink copies, while kernels run: of
        both the part counts that takes longer. What has no rate takes no time."""
        found = dict.fromkeys((*BOUNDS, *HOST), 0.0)
        for (kind, flops, moved), count in self.kernels[phase].items():
            work, memory = flops / rates[kind], moved / rates["memory"]
            found[kind if work > memory else "memory"] += count * max(work, memory)
            found["launch"] += count * (rates["launch"] + rates["product"] * (flops > 0))
        device, part = sum(found.values()), defaultdict[str, float](float)
        for (name, cost), count in self.costs.items():
            part[cost] += rates.get(cost, 0.0) * count * (name == phase)
        found["host"] = max(0.0, part["eager"] + part["call"] - device)
        found["waiting"] = part["wait"] + part["upload"] + part["number"]
        found["recording"] = part["recorded"]
        found["links"] = part["pcie"] + part["collective"] + max(0.0, part["nvlink"] - device)
        return found


class Host(TorchFunctionMode):
    """Counts what the host reads from the device, and answers with zeros; and what it sends."""

    def __init__(self, meter: Meter, device: torch.device) -> None:
        self.meter, self.device, meter.told_zeros = meter, device, True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, phase = getattr(func, "__name__", ""), self.meter.phase
        if name not in READS or args[0].device != self.device:
            result = func(*args, **(kwargs or {}))
            listed = func is torch.tensor and (kwargs or {}).get("device") == self.device
            moved = name == "to" and args[0].device != self.device == result.device
            self.meter.costs[phase, "upload"] += listed or moved
            self.meter.costs[phase, "number"] += result.numel() if listed else 0
            return result
        self.meter.costs[phase, "wait"] += 1
        x = args[0]
        if name in ("cpu", "nonzero"):
            return torch.zeros_like(x, device="cpu")
        zero: Any = 0.0 if x.is_floating_point() else 0
        for count in reversed(x.shape if name == "tolist" else ()):
            zero = [zero] * count
        return {"__bool__": False, "__float__": 1.0}.get(name, zero)


# ------------------------------------------------------------- where it takes hold of the product


def decoding(meter: Meter) -> list[tuple[Any, str, Any]]:
    """Prefill and decoding are phases. Where the host is told zeros, a row has made what it may,
    and what is recorded is counted again each time that it is replayed."""
    record_graph = lm.record_graph

    class Cache(lm.Cache):
        """Counts batches, steps and bytes."""

        def __init__(self, *args: Any) -> None:
            with meter.within("prefill"):
                super().__init__(*args)
            meter.batches += 1
            meter.cache = max(meter.cache, sizes([self.keys, self.values]))

        def step(self) -> None:
            meter.steps += 1
            meter.seen = self.fed_BW.numel() * self.keys.shape[2]
            with meter.within("decode"):
                super().step()

        def made(self, low: int, high: int) -> Any:
            found = [*super().made(low, high)]
            return [[(0, 0.0)] * (high - low) for _ in found] if meter.told_zeros else found

    def record(step: Callable[[], Any]) -> Callable[[], None]:
        before = Counter(meter.kernels["decode"])
        with meter.within("decode"):
            graph = None if meter.told_zeros else record_graph(step)
            if graph is None:
                step()
        once = meter.kernels["decode"] - before
        meter.recordings += 1
        meter.costs["decode", "recorded"] += once.total()
        meter.costs["decode", "eager"] -= once.total()
        meter.costs["decode", "call"] -= sum(n for key, n in once.items() if key[0] == "attention")

        def replay() -> None:
            meter.steps += 1
            meter.kernels["decode"].update(once)
            with meter.within("decode"):
                if graph is not None:
                    graph()

        return replay

    return [(lm, "Cache", Cache), (lm, "record_graph", record)]


@contextlib.contextmanager
def watched(meter: Meter, meta: bool, sharded: bool = False) -> Iterator[None]:
    """The product with its phases told to the meter; on the meta device it acts as on a GPU, and
    `sharded` as where the decoder's weights are gathered."""
    prepare, decoder = lm.Packed.prepare, train.Ranks.decoder

    def begin(self: Any, config: lm.Config, dtype: torch.dtype) -> None:
        meter.begin(self, config)
        prepare(self, config, dtype)

    @contextlib.contextmanager
    def ready(self: train.Ranks, model: lm.Transformer) -> Iterator[lm.Transformer]:
        with contextlib.ExitStack() as stack:
            with meter.within("copy"):
                if sharded:
                    weights = {name: x.detach() for name, x in model.named_parameters()}
                    whole = lm.with_weights(model.config, weights)
                else:
                    whole = stack.enter_context(decoder(self, model))
            yield whole

    changes = [*decoding(meter), (lm.Packed, "prepare", begin), (train.Ranks, "decoder", ready)]
    changes += [(train.Learner, "clock", lambda self, name: meter.within(name))]
    if meter.told_zeros:
        changes += [(lm, "PACKS", {})]  # the same products otherwise
    if meta:
        changes += [(lm, "has_kernel", lambda device, dtype, size: dtype == torch.bfloat16)]
        changes += [(lm, "LOGITS", {"meta": lm.LOGITS["cuda"]})]
        changes += [(lm, "KEPT", {"meta": lm.KEPT["cuda"]})]
        changes += [(lm.RMSNorm, "forward", lambda self, x: norm(x, self.weight.to(x.dtype)))]
        changes += [(nn.utils.clip_grad, "_device_has_foreach_support", lambda _: True)]
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(mock.patch.object(*change))
        yield


@contextlib.contextmanager
def fusing(meter: Meter, models: Sequence[lm.Transformer]) -> Iterator[None]:
    """The blocks of models as their compiler would fuse them. A backward pass begins with the
    head, which is not compiled."""
    backward = lm.TokenLogprobs.backward

    def head(*args: Any) -> Any:
        grads = backward(*args)
        meter.fusion.on = True
        return grads

    def fused(forward: Any) -> Any:
        def block(*args: Any) -> Any:
            with meter.fusion.block():
                return forward(*args)

        return block

    for model in models:
        for block in model.model["layers"].children():
            block.forward = fused(block.forward)
    with mock.patch.object(lm.TokenLogprobs, "backward", staticmethod(head)):
        yield
