"""CPU kernels for torch's own `varlen_attn`: its operator, its autograd formula and its compilation
then run without a GPU. Import this, and patch `model.has_kernel` to `has_kernel` from here.

The arguments are those of torch 2.13; 2.11 passes the first ten of them.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import varlen


def has_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """In place of the product's: what the GPU's kernel asks, but for the GPU, and fp32 beside."""
    return head_dim % 8 == 0 and head_dim <= 256


class Sequence:
    """One of the sequences of a call: where it lies, and its attention in float32."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rows: slice, keys: slice, left: int):
        self.rows, self.keys, self.scale = rows, keys, q.shape[-1] ** -0.5
        self.group = q.shape[1] // k.shape[1]
        self.q = q[rows].float()
        self.k, self.v = (x[keys].float().repeat_interleave(self.group, 1) for x in (k, v))
        queries, count = len(self.q), len(self.k)
        ago = torch.arange(queries)[:, None] + count - queries - torch.arange(count)  # aligned last
        self.hidden = (ago < 0) | (ago > (left if left >= 0 else count))
        scores = torch.einsum("qhe,khe->hqk", self.q, self.k) * self.scale
        self.scores = scores.masked_fill(self.hidden, -math.inf)

    def heads(self, grad: Tensor) -> Tensor:
        """Sums the gradient of repeated heads: (S, H, E) -> (S, K, E)."""
        return grad.unflatten(1, (-1, self.group)).sum(2)


def sequences(
    q: Tensor, k: Tensor, v: Tensor, ends: tuple[Tensor, Tensor], left: int,
    used: Tensor | None = None,
) -> Iterator[Sequence]:  # fmt: skip
    """The sequences of one call, of their keys those in use."""
    keys = torch.stack((ends[1][:-1], ends[1][1:] if used is None else ends[1][:-1] + used), 1)
    for (a, b), (c, d) in zip(pairwise(ends[0].tolist()), keys.tolist(), strict=True):
        yield Sequence(q, k, v, slice(a, b), slice(c, d), left)


def forward(
    query: Tensor, key: Tensor, value: Tensor, q_ends: Tensor, k_ends: Tensor, q_most: int,
    k_most: int, is_causal: bool = False, scale: float | None = None,
    window_size: list[int] | None = None, enable_gqa: bool = False,
    seqused_k: Tensor | None = None, block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Refuses what the GPU's kernel refuses, and what it answers with garbage."""
    assert query.dtype == key.dtype == value.dtype and query.shape[-1] % 8 == 0
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert window_size is not None, "causal, or it is not ours"
    assert window_size[1] == 0 or (window_size == [-1, -1] and q_most == 1)
    assert seqused_k is None or (seqused_k.dtype == torch.int32 and seqused_k.max() <= k_most)
    for ends, rows, most in ((q_ends, query, q_most), (k_ends, key, k_most)):
        assert ends.dtype == torch.int32 and ends.is_contiguous()
        assert ends[-1] == len(rows) and most == ends.diff().max()
    out, logsums = torch.empty_like(query), torch.empty(query.shape[1], len(query))
    for one in sequences(query, key, value, (q_ends, k_ends), window_size[0], seqused_k):
        found = torch.einsum("hqk,khe->qhe", one.scores.softmax(-1), one.v)
        out[one.rows], logsums[:, one.rows] = found.to(out.dtype), one.scores.logsumexp(-1)
    return out, logsums, torch.zeros(2, dtype=torch.uint64)


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    q_ends: Tensor, k_ends: Tensor, q_most: int, k_most: int, is_causal: bool, rng_state: Tensor,
    scale: float | None = None, window_size: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients as FlashAttention has them (arXiv 2205.14135, algorithm 4), from `lse`."""
    assert window_size is not None
    grads = tuple(torch.zeros_like(x) for x in (query, key, value))
    for one in sequences(query, key, value, (q_ends, k_ends), window_size[0]):
        grad = grad_out[one.rows].float()
        weights = (one.scores - lse[:, one.rows, None]).exp()
        mean = (grad * out[one.rows].float()).sum(-1).T[:, :, None]
        inner = weights * (torch.einsum("qhe,khe->hqk", grad, one.v) - mean) * one.scale
        for place, part, found in (
            (grads[0], one.rows, torch.einsum("hqk,khe->qhe", inner, one.k)),
            (grads[1], one.keys, one.heads(torch.einsum("hqk,qhe->khe", inner, one.q))),
            (grads[2], one.keys, one.heads(torch.einsum("hqk,qhe->khe", weights, grad))),
        ):
            place[part] = found.to(place.dtype)
    return grads


varlen._varlen_attn.register_kernel("cpu")(forward)
varlen._varlen_attn_backward.register_kernel("cpu")(backward)
