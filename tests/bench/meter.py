"""Counts what the product runs: kernels, FLOPs and bytes of each of a step's phases, and what the
host waits for. See roofline.py.

A kernel is an operator whose result is not a view. FLOPs are torch.utils.flop_counter's; those of
attention 4 (backward: 10) a channel and pair of a query and a key that it sees. Bytes: each
argument and result once, of tables the rows that are looked up or stored.
"""

import contextlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
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


class Meter(TorchDispatchMode):
    """What each phase of the product took; as a mode, also what it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[str, Any] = defaultdict(Counter)  # (kind, FLOPs, bytes): how many
        self.seconds: dict[str, float] = defaultdict(float)
        self.waits, self.uploads = Counter[str](), Counter[str]()
        self.steps = self.recordings = 0  # of decoding
        self.useful = self.seen = 0.0  # FLOPs for MFU; this pass's pairs of a query and a key
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
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.began
        self.phase, self.began = name, now

    def begin(self, layout: Any, c: lm.Config) -> None:
        """A forward pass begins."""
        both = zip(layout.sizes, layout.seen_sizes, strict=True)
        self.seen = sum(n * (seen - (n - 1) / 2) for n, seen in both)
        if isinstance(layout, lm.Branches):
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
        if not new or name in FREE or space in ("profiler", "prim"):
            return result
        moved = sizes(given) + sizes(made or tree_leaves(args[0]))
        if name in LOOKS | STORES:
            moved = 2 * sizes(made if name in LOOKS else given[1:])
        elif name in ("copy_", "_foreach_copy_", "zero_", "fill_"):  # what was there is not read
            moved -= sizes(tree_leaves(args[0]))
        elif name in ("zeros_like", "ones_like"):
            moved = sizes(made)
        kind, flops = self.flops(func, name, args, kwargs, result)
        self.kernels[self.phase][kind, flops, moved] += 1
        return result

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

    def predicted(self, phase: str, rates: dict[str, float]) -> dict[str, float]:
        """Seconds by what bounds them."""
        found = dict.fromkeys(BOUNDS, 0.0)
        for (kind, flops, moved), count in self.kernels[phase].items():
            work, memory = flops / rates[kind], moved / rates["memory"]
            found[kind if work > memory else "memory"] += count * max(work, memory)
            found["launch"] += count * rates["launch"]
        return found


class Host(TorchFunctionMode):
    """Counts what the host reads from the device, and answers with zeros; and what it sends."""

    def __init__(self, meter: Meter, device: torch.device) -> None:
        self.meter, self.device = meter, device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.meter.uploads[self.meter.phase] += (
            func is torch.tensor and (kwargs or {}).get("device") == self.device
        )
        if name not in READS or args[0].device != self.device:
            return func(*args, **(kwargs or {}))
        self.meter.waits[self.meter.phase] += 1
        x = args[0]
        if name in ("cpu", "nonzero"):
            return torch.zeros_like(x, device="cpu")
        zero: Any = 0.0 if x.is_floating_point() else 0
        for count in reversed(x.shape if name == "tolist" else ()):
            zero = [zero] * count
        return {"__bool__": False, "__float__": 1.0}.get(name, zero)


@contextlib.contextmanager
def watched(meter: Meter, meta: bool) -> Iterator[None]:
    """The product with its phases told to the meter; on the meta device it acts as on a GPU."""
    prepare = lm.Packed.prepare

    class Cache(lm.Cache):
        """Prefill and decoding are phases."""

        def __init__(self, *args: Any) -> None:
            with meter.within("prefill"):
                super().__init__(*args)

        def step(self, tokens_B: Tensor) -> None:
            meter.steps += 1
            with meter.within("decode"):
                super().step(tokens_B)

    def begin(self: Any, config: lm.Config, dtype: torch.dtype) -> None:
        meter.begin(self, config)
        prepare(self, config, dtype)

    def record(step: Any) -> Any:
        before, result = Counter(meter.kernels["decode"]), step()
        once = meter.kernels["decode"] - before
        meter.recordings += 1
        return lambda: meter.kernels["decode"].update(once), result

    changes = [(lm, "Cache", Cache), (lm.Packed, "prepare", begin)]
    changes += [(train.Learner, "clock", lambda self, name: meter.within(name))]
    if meta:
        changes += [(lm, "has_kernel", lambda device, dtype, size: dtype == torch.bfloat16)]
        changes += [(lm, "record_graph", record), (lm, "LOGITS", {"meta": lm.LOGITS["cuda"]})]
        changes += [(lm, "KEPT", {"meta": lm.KEPT["cuda"]})]
        changes += [(lm.RMSNorm, "forward", lambda self, x: norm(x, self.weight.to(x.dtype)))]
        changes += [(nn.utils.clip_grad, "_device_has_foreach_support", lambda _: True)]
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(mock.patch.object(*change))
        yield
