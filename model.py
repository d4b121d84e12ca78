"""The transformer: Llama, Mistral and Qwen2 checkpoints, in plain PyTorch.

    model = Transformer.from_pretrained("path/to/checkpoint")
    logits = model(tokens)                                        # (B, T) int64 -> (B, T, V)
    answers = generate(model, [[1, 2, 3]], max_new_tokens=16)     # new tokens only
    chosen, rejected, n_chosen, n_rejected = pair_logprobs(model, pairs)

The parameters carry Hugging Face's names. This file knows nothing of training, and nothing of
`torch.distributed`; behind `generate`, where a reader may stop, are config.json and weights.

One stack of blocks serves three uses, always on one row of T tokens without padding. They differ
in the layout: which position a token has, which tokens it sees, and what is read out.

    Packed     sequences of any lengths, one behind the other; logits everywhere
    Branches   training: of each pair the common prefix once, and two tails that branch from it
    Cache      generation: first the prompts, packed, then one token more in each row

Shapes: B rows, T tokens, S stored or seen keys, V vocabulary, D hidden size, H query heads, K
key-value heads, G = H / K, E head size, N pairs, M scored tokens. A suffix spells a shape: q_THE.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import time
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------- what all files share
# Values of flags, and of a config.json: what type, from where to where.
Count = Annotated[int, 1, 10**9]
Whole = Annotated[int, 0, 10**9]
Positive = Annotated[float, 1e-30, 1e6]
Weight = Annotated[float, 0.0, 1e6]
Share = Annotated[float, 0.0, 1.0]
Size = Annotated[int, 1, 2**22]  # no product of two of them overflows
Real = Annotated[float, 1e-30, 1e18]
Flag = Annotated[bool, False, True]


class InputError(ValueError):
    """What the user gave is wrong. The message is one line: what, where, what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines())[:1000])


def hash_seed(*parts: Any) -> int:
    """A 63-bit seed from any ints and strings: the same everywhere, unlike Python's `hash`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Whatever a malformed foreign file raises becomes one InputError. Put it around parsing alone:
    what a bug raises would be the file's fault."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{what} is missing") from None
    except Exception as error:
        raise InputError(f"{what} is malformed ({type(error).__name__}: {error})") from None


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file, {} for an `optional` one that is missing. Or raises InputError."""
    if optional and not path.is_file():
        return {}
    with reading(path):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise TypeError(f"a {type(value).__name__}, not a JSON object")
        return value


# ------------------------------------------------------------------------------------- the model
class Transformer(nn.Module):
    """A decoder-only language model. `compute_dtype` is the type of activations, by default that of
    the weights: with fp32 weights and bf16 here, each matrix is rounded as it is used, and its
    gradient arrives in fp32. With `checkpointing` a backward pass computes each block again."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.checkpointing = False
        self.model: Any = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = (Block(config, i) for i in range(config.num_hidden_layers))
        self.model["layers"] = nn.ModuleList(blocks)
        self.model["norm"] = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:  # a tied head is no parameter, and in no saved file
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def outline(cls, path: str | Path) -> Transformer:
        """The model in a folder without its weights, once their headers agree with its config."""
        config = Config.from_dict(read_json(Path(path) / "config.json"), f"{path}/config.json")
        with torch.device("meta"):
            model = cls(config)
        find_weights(dict(model.named_parameters()), path)
        return model

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> Transformer:
        """Loads a Hugging Face folder: config.json with one safetensors file, or shards."""
        model = cls.outline(path).to(dtype).to_empty(device=device)
        load_weights(dict(model.named_parameters()), path)
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Writes config.json and safetensors (sharded above 5 GB) that transformers loads."""
        Path(path).mkdir(parents=True, exist_ok=True)
        write_config(path, self.config, self.dtype)
        write_weights(path, dict(self.named_parameters()))

    def init_weights(self, seed: int) -> None:
        """Random weights from a seed: fan-in scaled, the residual writers by depth too."""
        generator = torch.Generator().manual_seed(hash_seed(seed, "init"))
        depth = (2 * self.config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:  # scales of a norm, or biases
                parameter.data.fill_(float("norm" in name))
            else:
                std = 0.02 if "embed" in name else parameter.shape[1] ** -0.5
                std *= depth if "o_proj" in name or "down_proj" in name else 1
                parameter.data.copy_(torch.normal(0.0, std, parameter.shape, generator=generator))

    # Where the weights are, and their type.
    device = property(lambda self: self.model["norm"].weight.device)
    dtype = property(lambda self: self.model["norm"].weight.dtype)

    def forward(self, tokens: Tensor, layout: Packed | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, V) logits; with a layout, (T,) -> what its `read` gives."""
        used = layout or Packed([tokens.shape[-1]] * len(tokens), [0] * len(tokens), tokens.device)
        x_TD = F.embedding(tokens.flatten(), self.model["embed_tokens"].weight)
        x_TD = x_TD.to(self.compute_dtype or x_TD.dtype)
        angles = used.positions[:, None, None].float() * frequencies(self.config, x_TD.device)
        cos, sin = angles.cos().to(x_TD.dtype), angles.sin().to(x_TD.dtype)
        rotation = (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
        used.prepare(self.config, x_TD.dtype)
        for block in self.model["layers"]:
            if self.checkpointing and torch.is_grad_enabled():
                how: Any = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn
                x_TD = checkpoint(block, x_TD, rotation, used, **how)
            else:
                x_TD = block(x_TD, rotation, used)
        head = self.lm_head if "lm_head" in self._modules else self.model["embed_tokens"]
        read = used.read(self.model["norm"](x_TD), head)
        return read if layout else read.unflatten(0, tokens.shape).to(x_TD.dtype)


class Block(nn.Module):
    """Attention and a gated MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_TD: Tensor, rotation: tuple[Tensor, Tensor], layout: Packed) -> Tensor:
        """(T, D) -> (T, D)."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rotation, layout)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; who sees whom is the layout's affair. A model
    for decoding holds the `matrices` as one, `fused`: see `with_weights`."""

    matrices = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.window, self.head_dim = layer, config.windows[layer], config.head_dim
        self.heads = [config.num_attention_heads, config.num_key_value_heads]
        hidden, wide, narrow = config.hidden_size, *(n * config.head_dim for n in self.heads)
        self.fused: Any = None
        self.q_proj = Linear(hidden, wide, bias=config.qkv_bias)
        self.k_proj = Linear(hidden, narrow, bias=config.qkv_bias)
        self.v_proj = Linear(hidden, narrow, bias=config.qkv_bias)
        self.o_proj = Linear(wide, hidden, bias=config.attention_bias)

    def forward(self, x_TD: Tensor, rotation: tuple[Tensor, Tensor], layout: Packed) -> Tensor:
        """(T, D) -> (T, D)."""
        heads = partial(torch.unflatten, dim=-1, sizes=(-1, self.head_dim))
        if self.fused is None:
            q_THE, k_TKE, v_TKE = (heads(p(x_TD)) for p in (self.q_proj, self.k_proj, self.v_proj))
            q_THE, k_TKE = rotate(q_THE, rotation), rotate(k_TKE, rotation)
        else:
            turned, v_TKE = heads(self.fused(x_TD)).split((sum(self.heads), self.heads[1]), 1)
            q_THE, k_TKE = rotate(turned, rotation).split(self.heads, 1)
        return self.o_proj(layout.attend(q_THE, k_TKE, v_TKE, self).flatten(1))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    matrices = ("gate_proj", "up_proj")

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.fused: Any = None
        self.gate_proj = Linear(hidden, inner, bias=bias)
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        one = self.fused
        gate, up = one(x).chunk(2, -1) if one else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(F.silu(gate) * up)


class Linear(nn.Linear):
    """A linear map in the type of its input, whatever that of its weights."""

    packed: Tensor | None = None  # the weight as oneDNN wants it

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class RMSNorm(nn.RMSNorm):
    """Root mean square normalisation (arXiv 1910.07467), in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


@lru_cache(maxsize=32)
def frequencies(config: Config, device: torch.device) -> Tensor:
    """(E/2,) float32: the angle that each pair of channels turns by at one position."""
    exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    freqs = 1.0 / (config.rope_theta**exponent)
    if config.rope_type == "linear":
        freqs = freqs / config.factor
    if config.rope_type == "llama3":  # long waves are slowed, short ones kept, others blended
        low, high = config.low_freq_factor, config.high_freq_factor
        turns = config.original_max_position_embeddings * freqs / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = (1 - blend) * freqs / config.factor + blend * freqs
    return freqs.to(device)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channel i together with channel i + E/2, as Hugging Face's weights expect. `rotation`
    are cosines and sines, (T, 1, E), the first half of the sines negated."""
    cos, sin = rotation
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


# ----------------------------------------------------------------------------------- the layouts
# Torch 2.13 asks to be told of grouped heads, and 2.11, which has no word for it, sees them itself;
# nor can 2.11 be told how many of the stored keys are there.
WORDS = inspect.signature(varlen_attn).parameters
GROUPED: Any = dict.fromkeys({"enable_gqa"} & {*WORDS}, True)


class Packed:
    """Sequences one behind the other in one row of T tokens, so that nothing is padded. `sizes` are
    their tokens. A sequence sees before its own the first tokens of the sequence before it, as many
    as `prefixes` says, and its positions go on from there."""

    places: Any = None  # of the tokens that are read, or all
    store: Callable[[int, Tensor, Tensor], None] | None = None  # takes a layer's keys and values

    def __init__(self, sizes: list[int], prefixes: list[int], device: torch.device) -> None:
        self.sizes, self.seen_sizes = sizes, [*map(sum, zip(sizes, prefixes, strict=True))]
        positions, seen = list[int](), list[int]()
        before = start = 0
        for size, prefix in zip(sizes, prefixes, strict=True):
            positions += range(prefix, prefix + size)
            seen += [*range(before, before + prefix), *range(start, start + size)]
            before, start = start, start + size
        self.positions = torch.tensor(positions, device=device)  # (T,)
        self.seen = torch.tensor(seen, device=device)  # (S,): what each sequence sees
        ends = [[0, *accumulate(counts)] for counts in (sizes, self.seen_sizes)]
        self.ends = torch.tensor(ends, dtype=torch.int32, device=device).unbind()
        self.bounds: Any = (*self.ends, max(sizes), max(self.seen_sizes))

    def prepare(self, config: Config, dtype: torch.dtype) -> None:
        """Builds what is added to the attention scores, once per forward pass: not per layer, and
        not within a block, whose recomputation or compilation would find it there already."""
        self.one_kernel = has_kernel(self.positions.device, dtype, config.head_dim)
        self.biases: dict[int | None, Any] = {}
        for window in () if self.one_kernel else set(config.windows):
            self.biases[window] = []
            for size, seen in zip(self.sizes, self.seen_sizes, strict=True):
                bias = None  # SDPA's own causal mask, where that says the same
                if not size == seen <= (window or seen):
                    at = torch.arange(seen, device=self.positions.device)
                    bias = causal_bias(at[seen - size :, None] - at, window, dtype)
                self.biases[window].append(bias)

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, attention: Attention) -> Any:
        """What the queries of a layer find, (T, H, E)."""
        if self.store is not None:
            self.store(attention.layer, k_TKE, v_TKE)
        k_SKE, v_SKE = k_TKE.index_select(0, self.seen), v_TKE.index_select(0, self.seen)
        if not self.one_kernel:
            return self.one_by_one(q_THE, k_SKE, v_SKE, attention.window)
        # Its window counts the tokens before the query; -1 is all of them.
        window = (-1 if attention.window is None else attention.window - 1, 0)
        return varlen_attn(q_THE, k_SKE, v_SKE, *self.bounds, window_size=window, **GROUPED)

    @torch.compiler.disable  # the sizes change with every batch
    def one_by_one(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """The same without `varlen_attn`, a sequence at a time."""
        if not q.is_cpu:  # no fused kernel there takes fp32 and grouped heads
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        wanted = ((q, self.sizes), (k, self.seen_sizes), (v, self.seen_sizes))
        parts = (x.transpose(0, 1)[None].split(counts, 2) for x, counts in wanted)  # (1, H, T, E)
        attend: Any = partial(F.scaled_dot_product_attention, enable_gqa=q.shape[1] != k.shape[1])
        both = zip(*parts, self.biases[window], strict=True)
        found = [attend(*qkv, attn_mask=bias, is_causal=bias is None) for *qkv, bias in both]
        return torch.cat(found, 2).squeeze(0).transpose(0, 1)

    def read(self, x_TD: Tensor, head: Any) -> Tensor:
        """The logits of the tokens, (T, V) float32, or of those at `places`."""
        x_TD = x_TD if self.places is None else x_TD[self.places]
        if isinstance(head, Linear) and head.packed is not None:
            return head(x_TD).float()
        return float_logits(x_TD, head.weight.to(x_TD.dtype))


def has_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `varlen_attn`, which is FlashAttention, runs there."""
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
    return fits and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def causal_bias(behind: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a key that is so many tokens `behind` it, -inf elsewhere, in the shape
    of `behind`. Of a bool SDPA would make this in every layer."""
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    return hidden.to(dtype).masked_fill_(hidden, -math.inf)


class Branches(Packed):
    """Trees: of each pair its common prefix once, then both tails, which see the prefix and
    themselves. Its first sequence is prefix and chosen tail, its second the rejected tail. What is
    read are the log-probs of M response tokens (`targets`, predicted at `places`), in the order of
    `lengths`: for each pair those shared, those of the chosen tail, those of the rejected tail."""

    def __init__(self, pairs: Sequence[Any], device: torch.device) -> None:
        tokens, places, targets, sizes, prefixes, self.lengths = (list[int]() for _ in range(6))
        for prompt, chosen, rejected, *_ in pairs:
            if not prompt:
                raise ValueError("a pair needs a prompt, or its first token has no context")
            shared, start = common_prefix(chosen, rejected), len(tokens)
            tail, prefix, fork = rejected[shared:], len(prompt) + shared, len(prompt) + len(chosen)
            tokens += [*prompt, *chosen, *tail]
            places += range(start + len(prompt) - 1, start + fork - 1)
            places += [start + prefix - 1, *range(start + fork, len(tokens) - 1)][: len(tail)]
            targets += [*chosen, *tail]
            sizes += [fork, len(tail)] if tail else [fork]
            prefixes += [0, prefix] if tail else [0]
            self.lengths += [shared, fork - prefix, len(tail)]
        super().__init__(sizes, prefixes, device)
        self.tokens = torch.tensor(tokens, device=device)  # (T,)
        self.places = torch.tensor(places, dtype=torch.int64, device=device)  # (M,)
        self.targets = torch.tensor(targets, dtype=torch.int64, device=device)  # (M,)

    def read(self, x_TD: Tensor, head: Any) -> Tensor:
        """The log-probs of the response tokens, (M,) float32."""
        keep = KEPT[x_TD.device.type] if torch.is_grad_enabled() else 0
        x_MD = x_TD.index_select(0, self.places)
        return TokenLogprobs.apply(x_MD, head.weight, self.targets, keep)


def tree_size(pair: Any) -> int:
    """The tokens that `Branches` computes for a pair: what both sides begin with counts once."""
    prompt, chosen, rejected = pair[:3]
    return len(prompt) + len(chosen) + len(rejected) - common_prefix(chosen, rejected)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    both = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in both if a != b), min(len(left), len(right)))


class Cache(Packed):
    """B rows that are decoded together, with a static cache of keys and values. What a step reads
    and writes lies on the device, and stays where it is until rows leave: it can be recorded. The
    prompts are taken in packed. A `step` takes in the token that each row made last, and W - 1
    guesses at those that follow it (`fed_BW`); it picks a token after each, and those up to the
    first that is not the guess are what W plain steps would have made."""

    def __init__(self, model: Transformer, asked: Sequence[Any], pick: Any, widest: int) -> None:
        prompts, budgets, seeds, *_ = zip(*asked, strict=True)
        c, dtype, device = model.config, model.compute_dtype or model.dtype, model.device
        self.model, self.pick, self.most = model, pick, max(budgets)
        self.size = max(map(sum, zip(map(len, prompts), budgets, strict=True))) + widest - 1
        self.width = self.size  # of the stored tokens a step looks at so many, or at those in use
        self.one_kernel = "seqused_k" in WORDS and has_kernel(device, dtype, c.head_dim)
        # The kernel wants the heads of a token together, products by hand the tokens of a head.
        shape = [self.size, c.num_key_value_heads][:: 1 if self.one_kernel else -1]
        shape = [2, c.num_hidden_layers, len(prompts), *shape, c.head_dim]
        stored = torch.zeros(shape, device=device, dtype=dtype)
        self.keys, self.values = stored if self.one_kernel else stored.transpose(3, 4)  # LBSKE
        shape = [2, len(prompts), self.most + 1]  # what is made beyond a row's end goes to the last
        self.made_2BS = torch.zeros(shape, dtype=torch.float64, device=device)  # tokens, log-probs
        uniforms_BS = torch.zeros(shape[1:], dtype=torch.float64)
        for uniforms, budget, seed in zip(uniforms_BS, budgets, seeds, strict=True):
            uniforms[:budget].uniform_(generator=torch.Generator().manual_seed(seed))
        self.uniforms_BS = uniforms_BS.to(device)
        self.starts_B = torch.tensor([*map(len, prompts)], device=device)
        self.counts_B, self.fed_BW = torch.zeros_like(self.starts_B), self.starts_B[:, None].clone()
        found, count = [], max(1, PREFILL // max(map(len, prompts)))
        for first in range(0, len(prompts), count):
            group = prompts[first : first + count]
            layout = Packed([*map(len, group)], [0] * len(group), device)
            rows = [row for row, prompt in enumerate(group, first) for _ in prompt]
            layout.store = partial(self.put, (torch.tensor(rows, device=device), layout.positions))
            layout.places = layout.ends[0][1:] - 1
            tokens = [token for prompt in group for token in prompt]
            found.append(model(torch.tensor(tokens, device=device), layout))
        self.choose(torch.cat(found), self.counts_B[:, None].clone())

    def put(self, places: tuple[Tensor, Tensor], layer: int, k: Tensor, v: Tensor) -> None:
        """Stores keys and values at their rows and positions."""
        self.keys[layer][places], self.values[layer][places] = k, v

    def step(self) -> None:
        """Makes 1 to W tokens a row."""
        fed_W = torch.arange(self.fed_BW.shape[1], device=self.fed_BW.device)
        at_BW = self.counts_B[:, None] + fed_W
        # A row that has stopped, but was kept, may go on past the end: it stays on the last place.
        self.places_BW = (self.starts_B[:, None] + at_BW - 1).clamp_max(self.size - 1)
        self.positions = self.places_BW.flatten()
        self.choose(self.model(self.fed_BW.flatten(), self), at_BW.clamp_max(self.most))

    def choose(self, logits_TV: Tensor, at_BW: Tensor) -> None:
        """Picks a token after each that was fed, and counts those that right guesses precede."""
        picked_T = self.pick(logits_TV, self.uniforms_BS.gather(1, at_BW).flatten())
        logps_TV, picked_BW = logits_TV.log_softmax(-1), picked_T.view_as(at_BW)
        logps_BW = logps_TV.gather(1, picked_T[:, None]).view_as(at_BW)
        made_2BW = torch.stack((picked_BW.double(), logps_BW.double()))
        self.made_2BS.scatter_(2, at_BW.expand_as(made_2BW), made_2BW)
        right_B1 = (picked_BW[:, :-1] == self.fed_BW[:, 1:]).cumprod(1).sum(1, keepdim=True)
        self.counts_B.add_(right_B1[:, 0] + 1).clamp_max_(self.most)
        self.fed_BW[:, :1] = picked_BW.gather(1, right_B1)

    def made(self, low: int, high: int) -> Iterator[list[tuple[int, float]]]:
        """Each row's tokens and log-probs at the places from low to high: one transfer."""
        both = (self.counts_B[:, None], *self.made_2BS[:, :, low:high])
        for count, *values in torch.cat(both, 1).tolist():
            half, end = len(values) // 2, int(count) - low
            yield [*zip(map(int, values[:half]), values[half:], strict=True)][:end]

    def feed(self, guesses: list[list[int]]) -> None:
        """Puts W - 1 guesses behind the token that each row made last."""
        if guesses[0] or self.fed_BW.shape[1] > 1:
            given = torch.tensor(guesses, dtype=torch.int64, device=self.fed_BW.device)
            new = torch.cat((self.fed_BW[:, :1], given), 1)
            self.fed_BW = self.fed_BW.copy_(new) if new.shape == self.fed_BW.shape else new

    def keep(self, going: list[bool]) -> list[int]:
        """Drops the rows that stop. The last of the others fill the gaps, so that few are copied:
        gives the row that is now in each place."""
        count = sum(going)
        movers = [row for row in range(count, len(going)) if going[row]]
        rows = [row if going[row] else movers.pop() for row in range(count)]
        for new, old in enumerate(rows):
            if new != old:
                self.keys[:, new], self.values[:, new] = self.keys[:, old], self.values[:, old]
        self.keys, self.values = self.keys[:, :count], self.values[:, :count]
        for name in ("starts_B", "counts_B", "fed_BW", "uniforms_BS"):
            setattr(self, name, getattr(self, name)[rows])
        self.made_2BS = self.made_2BS[:, rows]
        return rows

    def prepare(self, config: Config, dtype: torch.dtype) -> None:
        """As Packed's; by hand (B, 1, W, 1, S), for the queries of each row."""
        count, fed = self.places_BW.shape
        rows = torch.arange(count + 1, device=self.positions.device)
        self.rows_B1 = rows[:-1, None]
        if self.one_kernel:
            self.bounds = ((rows * fed).int(), (rows * self.size).int(), fed, self.size)
            self.used_B = self.places_BW[:, -1].int() + 1
            return
        places_S = torch.arange(self.width, device=self.positions.device)
        behind_B1W1S = self.places_BW[:, None, :, None, None] - places_S
        self.biases = {w: causal_bias(behind_B1W1S, w, dtype) for w in set(config.windows)}

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, attention: Attention) -> Any:
        """Stores k and v, and attends to all that is stored."""
        shape, window, layer = self.places_BW.shape, attention.window, attention.layer
        new = (x.unflatten(0, shape) for x in (k_TKE, v_TKE))
        self.put((self.rows_B1, self.places_BW), layer, *new)
        kv_BSKE = (self.keys[layer], self.values[layer])
        if self.one_kernel:  # without bounds it takes the one query of a group's heads together
            left = (-1, -1 if shape[1] == 1 else 0) if window is None else (window - 1, 0)
            how: Any = {"window_size": left, "seqused_k": self.used_B, **GROUPED}
            kv: Any = (x.flatten(0, 1) for x in kv_BSKE)
            return varlen_attn(q_THE, *kv, *self.bounds, **how)
        # Few queries a row: two small products by hand cost less than SDPA's set-up. The query
        # heads of a group (G) become rows of one product with the key head that they share.
        q_BWKGE = q_THE.unflatten(1, (k_TKE.shape[1], -1)).unflatten(0, shape)
        q_BKRE = q_BWKGE.transpose(1, 2).flatten(2, 3) * q_THE.shape[-1] ** -0.5  # R = W G
        k_BKSE, v_BKSE = (x[:, : self.width].transpose(1, 2) for x in kv_BSKE)
        scores = (q_BKRE @ k_BKSE.transpose(-1, -2)).unflatten(2, (shape[1], -1))
        weights = (scores + self.biases[window]).float().softmax(-1).to(q_THE.dtype)
        found_BKWGE = (weights.flatten(2, 3) @ v_BKSE).unflatten(2, (shape[1], -1))
        return found_BKWGE.transpose(1, 2).flatten(2, 3).flatten(0, 1)


# ------------------------------------------------------------------------------ log-probabilities
# How many logits exist at a time (64 MiB in float32 on a CPU, whose caches are small, 512 MiB on a
# GPU, whose matrix units starve on few rows), and how many exponentials wait for a backward pass.
LOGITS = {"cpu": 2**24, "cuda": 2**27}
KEPT = {"cpu": 2**26, "cuda": 2**29}


def pair_logprobs(model: Transformer, pairs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Summed response log-probs of N (prompt, chosen, rejected), as of separate sequences: (N,)
    float32 of the chosen and of the rejected sides, EOS included, differentiable; then (N,) float32
    lengths of both in tokens. An empty side (as the rejected one in SFT) gives 0 and 0."""
    return pair_sums(pair_token_logprobs(model, pairs))


def pair_sums(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What `pair_logprobs` returns, from what `pair_token_logprobs` returns."""
    sums = torch.stack([part.sum() for part in parts]).view(-1, 3)
    # Made where they are wanted: an upload would wait for all of the forward pass.
    counts = torch.stack([sums.new_full((), len(part)) for part in parts]).view(-1, 3)
    return tuple(x[0] + tail for x in (sums.unbind(1), counts.unbind(1)) for tail in x[1:])


def pair_token_logprobs(model: Transformer, pairs: Sequence[Any]) -> list[Tensor]:
    """The same token by token: 3N tensors, for each pair its shared, chosen and rejected tails."""
    layout = Branches(pairs, model.device)
    return list(model(layout.tokens, layout).split(layout.lengths))


class TokenLogprobs(torch.autograd.Function):
    """log softmax(x @ head^T)[target] in chunks of rows, of which each has `LOGITS` logits. The
    first `keep` exponentials stay for the backward pass, chunks beyond are computed again. The
    gradient g of a log-prob is g (onehot(target) - softmax) for its logits, written over them:
    autograd would fill five arrays of tokens x vocabulary, and one of (V, D) for each chunk."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, head_VD: Tensor, targets_M: Tensor, keep: int) -> Tensor:
        """(M,) float32."""
        ctx.save_for_backward(x_MD, head_VD, targets_M)
        ctx.rows = max(1, LOGITS[x_MD.device.type] // len(head_VD))
        ctx.kept, parts, head = [], [], head_VD.to(x_MD.dtype)
        for x, targets in zip(x_MD.split(ctx.rows), targets_M.split(ctx.rows), strict=True):
            *chunk, logps_M = exponentials(x, head, targets)
            parts.append(logps_M)
            keep -= chunk[0].numel()
            if keep >= 0:
                ctx.kept.append(chunk)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the head; the latter is summed in float32."""
        x_MD, head_VD, targets_M = ctx.saved_tensors
        kept, ctx.kept = iter(ctx.kept), []  # overwritten below: a second pass computes them again
        head, head_grad = head_VD.to(x_MD.dtype), torch.zeros_like(head_VD, dtype=torch.float32)
        x_grads = []
        parts = (part.split(ctx.rows) for part in (x_MD, targets_M, grad_M))
        for x, targets, grad in zip(*parts, strict=True):
            exp_MV, sums_M1 = next(kept, None) or exponentials(x, head, targets)[:2]
            exp_MV *= -grad[:, None] / sums_M1
            grad_MV = exp_MV.scatter_add_(1, targets[:, None], grad[:, None]).to(x.dtype)
            x_grads.append(grad_MV @ head)
            if x.dtype == torch.float32:
                head_grad.addmm_(grad_MV.T, x)
            else:
                head_grad += grad_MV.T @ x
        return torch.cat(x_grads), head_grad.to(head_VD.dtype), None, None


def exponentials(x_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> tuple[Tensor, ...]:
    """exp(logits - their maximum) (M, V), its sums (M, 1), and the targets' log-probs (M,)."""
    logits_MV = float_logits(x_MD, head_VD)
    logits_MV -= logits_MV.amax(1, keepdim=True)
    picked_M1 = logits_MV.gather(1, targets_M[:, None])
    sums_M1 = logits_MV.exp_().sum(1, keepdim=True)
    return logits_MV, sums_M1, (picked_M1 - sums_M1.log())[:, 0]


def float_logits(x_MD: Tensor, head_VD: Tensor) -> Tensor:
    """The logits (M, V) in float32. A GPU's product in bf16 gives them as they were summed."""
    if x_MD.element_size() == 2 and not (x_MD.is_cpu or torch.is_grad_enabled()):  # no gradient
        return torch.mm(x_MD, head_VD.T, out_dtype=torch.float32)
    return F.linear(x_MD, head_VD).float()


# ------------------------------------------------------------------------------------- generation
PREFILL = 2**14  # the most prompt tokens of one pass, where a prompt is not longer
WIDTHS = (8, 1)  # tokens a row and step, where there are drafts; without them the last
AHEAD = 8  # tokens that a recorded row makes before anyone looks at them
SIDE, LAST = lru_cache(torch.cuda.Stream), list[Any]()  # recordings': stream, newest (for its pool)
PACKS = {torch.float32: torch.backends.mkldnn.is_available()}  # what oneDNN is fast with
PACKS[torch.bfloat16] = PACKS[torch.float32] and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def generate(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int | Sequence[int], *,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, eos_ids: Sequence[int] = (),
    seed: int | Sequence[int] = 0, return_logprobs: bool = False, batch_size: int = 64,
    drafts: Sequence[list[int]] | None = None, watch: Callable[[int, list[int]], Any] | None = None,
) -> Any:  # fmt: skip
    """Samples a continuation of each prompt, none empty: lists of new token ids, EOS included.

    `max_new_tokens` and `seed` are for all rows (a seed is hashed with the row's index), or one per
    row. A row's draws depend on its own seed alone, and are made on the CPU. `temperature` divides
    the logits, 0 being greedy; then top_k (0: off) and then top_p filter them. `return_logprobs`:
    gives (tokens, log-probs of these under the model as it is, before temperature and filters).
    `batch_size` rows are decoded together; they are sorted, so that like lengths meet. `drafts`: a
    guess a row, of the model's ids, or []; it changes no token, but right ones come together.
    `watch` is called with a row's number and its tokens so far, as they come."""
    count = len(prompts)
    budgets = [max_new_tokens] * count if isinstance(max_new_tokens, int) else [*max_new_tokens]
    seeds = [hash_seed(seed, i) for i in range(count)] if isinstance(seed, int) else [*seed]
    drafts = [[]] * count if drafts is None else drafts
    fits = {*map(len, (budgets, seeds, drafts))} == {count} and min([0, *budgets]) == 0
    fits &= all(prompts)
    if not (fits and temperature >= 0 and top_k >= 0 and 0 < top_p <= 1 and batch_size >= 1):
        need = "a token, a budget >= 0 and a seed for each prompt, temperature >= 0, top_k >= 0"
        raise ValueError(f"generate needs {need}, 0 < top_p <= 1 and batch_size >= 1")
    answers: dict[int, list[tuple[int, float]]] = {i: [] for i in range(count)}
    pick = partial(sample_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    order = sorted((i for i in range(count) if budgets[i]), key=lambda i: len(prompts[i]))
    on_cpu = model.device.type == "cpu"
    if on_cpu and order and max(budgets) >= 32 and model.config.hidden_size >= 256:  # pays then
        dtype = model.compute_dtype or model.dtype
        weights = {name: weight.detach().to(dtype) for name, weight in model.named_parameters()}
        model = with_weights(model.config, weights, max(8, min(len(order), batch_size)))
    options = (pick, {*eos_ids}, None if on_cpu else record_graph)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        asked = [(prompts[i], budgets[i], seeds[i], i, drafts[i]) for i in rows]
        answers |= zip(rows, _decode(model, asked, *options, watch), strict=True)
    both = [[[made[k] for made in answers[i]] for i in range(count)] for k in (0, 1)]
    return tuple(both) if return_logprobs else both[0]


@torch.no_grad()
def _decode(
    model: Transformer, asked: Any, pick: Any, eos_ids: set[int], record: Any, watch: Any = None
) -> list[list[tuple[int, float]]]:
    """One batch of `generate`: each row's tokens, with log-probs. A row that has stopped leaves the
    batch; where steps are recorded, and a change of shape is dear, not before half of all.
    `record(step)` runs a step, and gives a function that does it again."""
    drafts = Drafts([draft for *_, draft in asked])
    cache = Cache(model, asked, pick, max(drafts.rates))
    answers: list[list[tuple[int, float]]] = [[] for _ in asked]
    rows, width, steps = [*range(len(asked))], 1, 1
    fed, again = None, cache.step  # what the recorded step reads, and what replays it

    def left(row: int) -> int:  # the most tokens that a row may still make
        ended = answers[row] and answers[row][-1][0] in eos_ids
        return 0 if ended else asked[row][1] - len(answers[row])

    while True:
        counts = [len(answers[row]) for row in rows if left(row)]
        low, high = min(counts), max(counts) + steps * width
        for row, made in zip(rows, cache.made(low, high), strict=True):
            for one in made[max(0, len(answers[row]) - low) :]:
                if left(row):
                    answers[row].append(one)
            if watch is not None:
                watch(asked[row][3], [token for token, _ in answers[row]])
        going = [left(row) > 0 for row in rows]
        if not any(going):
            return answers
        if sum(going) <= len(going) // 2 or not (record or all(going)):
            rows = [rows[place] for place in cache.keep(going)]
        guesses = drafts.guess(rows, answers)
        cache.feed(guesses)
        width = 1 + len(guesses[0])
        steps = min(AHEAD, max(map(left, rows))) if record and width == 1 else 1
        if not record:
            longest = max(len(asked[row][0]) + len(answers[row]) for row in rows)
            cache.width = longest + width - 1
        for _ in range(steps):
            if fed is cache.fed_BW or not record:
                again()
            else:
                fed, again = cache.fed_BW, record(cache.step)


class Drafts:
    """Guesses at what rows make next, from a draft of each. How many at a time, if any, is what has
    made the most tokens a second; what was not taken for long is tried again."""

    def __init__(self, drafts: list[list[int]]) -> None:
        self.drafts, self.offsets = drafts, [0] * len(drafts)  # of a row's place in its draft
        self.rates = dict.fromkeys(WIDTHS if any(drafts) else WIDTHS[-1:], math.inf)
        self.width, self.made, self.began = 0, 0, 0.0  # of the last step; tokens, time after it

    def guess(self, rows: list[int], answers: list[list[tuple[int, float]]]) -> list[list[int]]:
        """For each row W - 1 tokens, of which as many as its draft has are a guess."""
        now, made, old = time.perf_counter(), sum(map(len, answers)), self.rates.get(self.width)
        if old is not None:
            rate = (made - self.made) / (now - self.began)
            self.rates = {width: 1.02 * known for width, known in self.rates.items()}
            self.rates[self.width] = rate if math.isinf(old) else (old + rate) / 2
        width, found = max(self.rates, key=lambda width: self.rates[width]), []
        for row in rows if width > 1 else ():
            last, count = [token for token, _ in answers[row][-8:]], len(answers[row])
            place = go_on(self.drafts[row], last, self.offsets[row] + count)
            self.offsets[row] = place - count
            found.append(self.drafts[row][place : place + width - 1])
        if not any(found):
            width, found = 1, [[]] * len(rows)
        self.width, self.made, self.began = width, made, now
        return [part + [0] * (width - 1 - len(part)) for part in found]


def go_on(draft: list[int], made: list[int], before: int) -> int:
    """Where a draft goes on after the tokens made last: behind the place where the most of them
    stand, of several the nearest to the place `before`; at its end, where the last does not."""
    ends = [end for end, token in enumerate(draft, 1) if token == made[-1]]
    alike = {end: common_prefix(draft[max(0, end - 8) : end][::-1], made[::-1]) for end in ends}
    return max(ends, key=lambda end: (alike[end], -abs(end - before)), default=len(draft))


def record_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Runs a step, which lets the libraries set themselves up, and records it as a CUDA graph."""
    side, graph = SIDE(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        graph.capture_begin(*[last.pool() for last in LAST])
        step()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    LAST[:] = [graph]
    return graph.replay


def with_weights(config: Config, weights: dict[str, Tensor], rows: int = 0) -> Transformer:
    """A model for decoding, of tensors that are taken out of `weights`: q, k and v become one
    product, gate and up another. `rows`: on a CPU oneDNN lays all matrices out for products with
    so few rows, which then take half the time."""
    with torch.device("meta"):
        model = Transformer(config)
        for name, part in model.named_modules():
            matrices, fused = getattr(part, "matrices", ()), f"{name}.fused"
            for kind in ("weight", "bias"):
                found: Any = [weights.pop(f"{name}.{m}.{kind}", None) for m in matrices]
                if found and found[0] is not None:  # nor is this model made for decoding already
                    weights[f"{fused}.{kind}"] = torch.cat(found)
            if matrices:
                wide, narrow = weights[f"{fused}.weight"].shape
                part.fused = Linear(narrow, wide, bias=f"{fused}.bias" in weights)
            for matrix in matrices:
                delattr(part, matrix)
        head = model.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict(weights, assign=True)
    weights.clear()
    for part in model.modules() if rows and PACKS.get(head.weight.dtype) else ():
        if isinstance(part, Linear):
            part.packed = torch.ops.mkldnn._reorder_linear_weight(part.weight, rows)
            del part.weight
    return model.requires_grad_(False)


def sample_tokens(
    logits_BV: Tensor, uniforms_B: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Picks a token a row by inverting the distribution at a uniform number in [0, 1): (B,) int64.

    Temperature, then top-k (ties with the k-th stay), then top-p, as transformers orders them. The
    ids of candidates keep their order, so that a near-tie that rounding decides differently on two
    machines does not change which token a number falls on."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits, ids = logits_BV.float(), None
    if 0 < top_k < logits.shape[1]:
        spare = 1 if logits.is_cpu else 64  # to see ties, of which a GPU's may be so many
        best = logits.topk(min(top_k + spare, logits.shape[1]))
        least = best.values[:, top_k - 1 : top_k]
        if logits.is_cpu and (best.values[:, top_k:] == least).any():
            best = logits.topk(int((logits >= least).sum(-1).max()))
        ids, order = best.indices.sort()
        logits = best.values.masked_fill(best.values < least, -math.inf).gather(1, order)
    logits = logits.nan_to_num(neginf=-math.inf)  # an exploded model still gives some token
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_p < 1:
        rising, order = logits.sort(stable=True)
        cut = rising.softmax(-1).cumsum(-1) <= 1 - top_p
        cut[:, -1].zero_()  # the likeliest stays
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), -math.inf)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    level = uniforms_B[:, None] * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, level, right=True).clamp_max(logits.shape[1] - 1)
    return (picked if ids is None else ids.gather(1, picked))[:, 0]


# ------------------------------------------------------------------------------------ the config
SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES: dict[str, dict[str, Any]] = {  # what a config.json of the family may leave out
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False}
    | {"max_window_layers": 28},
}
# Keys that change the logits, and are read; from `architectures` on those that do not change them.
KEYS = """model_type vocab_size hidden_size intermediate_size num_hidden_layers head_dim
    num_attention_heads num_key_value_heads rms_norm_eps tie_word_embeddings rope_theta
    rope_scaling rope_parameters layer_types architectures auto_map bos_token_id eos_token_id
    pad_token_id unk_token_id torch_dtype dtype transformers_version use_cache initializer_range
    max_position_embeddings model_max_length max_sequence_length tokenizer_class pretraining_tp
    attention_dropout max_window_layers sliding_window return_dict id2label label2id problem_type
    transformers.js_config is_llama_config unsloth_version unsloth_fixed task_specific_params
    chunk_size_feed_forward finetuning_task num_labels name_or_path keys_to_ignore_at_inference
    license torchscript do_sample temperature top_k top_p typical_p num_beams num_beam_groups
    num_return_sequences max_length length_penalty repetition_penalty""".split()  # noqa: SIM905
IDLE: dict[str, list[Any]] = {"hidden_act": ["silu", "swish"], "partial_rotary_factor": [None, 1]}
LINEAR = ["rope_theta", "factor"]
LLAMA3 = [*LINEAR, "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
ROPES = {"default": ["rope_theta"], "linear": LINEAR, "llama3": LLAMA3}  # what each rope_type needs


@dataclass(frozen=True, eq=False, kw_only=True)
class Config:
    """What a Hugging Face `config.json`, which is `raw`, says of the computation, by its keys."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, 1, 1024]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    rms_norm_eps: Annotated[float, 1e-30, 1.0] = 1e-6
    tie_word_embeddings: Flag = False
    attention_bias: Flag = False  # of all four projections
    qkv_bias: Flag
    mlp_bias: Flag = False
    use_sliding_window: Flag = False
    windows: tuple[int | None, ...]  # per layer: a token sees this many tokens, itself included
    rope_type: str  # arXiv 2104.09864; "linear" is Llama 2's scaling of it, "llama3" that of 3.1
    rope_theta: Real
    factor: Real = 1.0
    low_freq_factor: Real = 1.0
    high_freq_factor: Real = 4.0
    original_max_position_embeddings: Real = 8192.0  # tokens
    raw: dict[str, Any] = field(repr=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config") -> Config:
        """Reads transformers 4's keys and 5's. Raises InputError naming what is not implemented."""
        family: Any = raw.get("model_type")
        if family not in [*FAMILIES]:
            raise InputError(f"{where}: model_type {family!r} is not one of {', '.join(FAMILIES)}")
        # RoPE is `rope_theta` and `rope_scaling` (transformers 4), or `rope_parameters` (5).
        both = [raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key)] or [{}]
        if type(both[0]) is not dict or both[0] != both[-1]:
            raise InputError(f"{where}: rope_scaling and rope_parameters are not one equal object")
        kind = both[0].get("rope_type", both[0].get("type", "default"))
        if kind not in [*ROPES]:
            raise InputError(f"{where}: rope_type {kind!r} is not one of {', '.join(ROPES)}")
        rope = {"rope_theta": raw.get("rope_theta", 10000.0), **both[0], "rope_type": kind}
        turning, keys = ROPES[kind], [*KEYS, *FAMILIES[family]]
        for given, read in ((raw, keys), (rope, ["rope_type", "type", *turning])):
            for key, value in given.items():
                off = value in IDLE.get(key, [None, False, "", [], {}])
                if key not in read and not key.startswith("_") and not off:
                    raise InputError(f"{where}: {key} {value!r} is not implemented for {family}")
        known: dict[str, Any] = {**vars(cls), **FAMILIES[family], **raw, **dict.fromkeys(turning)}
        known |= {**rope, "raw": dict(raw)}
        heads: Any = known.get("num_attention_heads")
        with reading(f"{where}: hidden_size or num_attention_heads"):
            size = known["hidden_size"] // max(1, heads)
        for key, value in {"num_key_value_heads": heads, "head_dim": size}.items():
            known[key] = value if known.get(key) is None else known[key]
        known["qkv_bias"] = known["attention_bias"] or family == "qwen2"
        hints = get_type_hints(cls, include_extras=True)
        limits = {k: get_args(hint) for k, hint in hints.items() if get_origin(hint) is Annotated}
        for key, (kind, low, high) in limits.items():
            value = known.get(key)
            fits = type(value) in ((int, float) if kind is float else (kind,))
            if not fits or not low <= value <= high:
                right = f"not {kind.__name__} from {low} to {high}"
                raise InputError(f"{where}: {key} is {value!r}, {right}")
        kv_heads, size = known["num_key_value_heads"], known["head_dim"]
        if heads % kv_heads or size % 2 or heads * size > 2**22:
            told = f"{heads}, num_key_value_heads {kv_heads} and head_dim {size} do not fit"
            raise InputError(f"{where}: num_attention_heads {told}")
        if known["low_freq_factor"] >= known["high_freq_factor"]:
            raise InputError(f"{where}: low_freq_factor is not below high_freq_factor")
        known["windows"] = _windows(known, where)
        return cls(**{key: known[key] for key in hints})


def _windows(known: Mapping[str, Any], where: str) -> tuple[int | None, ...]:
    """The sliding window of each layer: all of Mistral's, and those of Qwen2 that it says."""
    layers, some = known["num_hidden_layers"], known["model_type"] == "qwen2"
    used = known["use_sliding_window"] if some else known["model_type"] == "mistral"
    window = known["sliding_window"] if used else None
    with reading(f"{where}: sliding_window, max_window_layers or layer_types"):
        first = known["max_window_layers"] if some and window is not None else 0
        if window is not None and not (type(window) is int and 0 < window < 2**31 and first >= 0):
            raise ValueError(f"a window of {window!r} tokens from layer {first} on")
        kinds = [FULL if window is None or i < first else SLIDING for i in range(layers)]
        given = known.get("layer_types") or kinds
        free = some and window is not None  # layers may differ from what max_window_layers says
        if not {*given} <= {FULL, SLIDING} or len(given) != layers or not (free or given == kinds):
            raise ValueError(f"{given!r} are not the {layers} layers of a window of {window}")
    return tuple(window if kind == SLIDING else None for kind in given)


# ------------------------------------------------------------------------- reading and writing
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_weights(
    parameters: Mapping[str, Tensor], path: str | Path, place: Callable[..., Any] = Tensor.copy_
) -> None:
    """Fills parameters by name from a folder's safetensors, through `place(parameter, value)`.
    Raises InputError, before any is filled, as `find_weights` says."""
    tensors = find_weights(parameters, path)
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = tensors[name]
            if not value.isfinite().all():
                raise InputError(f"{path}: {name} holds values that are not finite")
            place(parameter, value)


def find_weights(parameters: Mapping[str, Tensor], path: str | Path) -> Tensors:
    """The tensors of a folder, once all headers agree with the parameters, be they on the meta
    device. Raises InputError for tensors missing, unexpected, misshapen or of another type; a tied
    head that equals the embedding is none, and neither are the `inv_freq` of old files."""
    tensors = Tensors(path)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    missing, extra = parameters.keys() - tensors.keys(), tensors.keys() - parameters.keys() - {head}
    extra = {name for name in extra if not name.endswith("rotary_emb.inv_freq")}
    for names, what in ((missing, "missing"), (extra, "unexpected")):
        if names:
            raise InputError(f"{path}: {len(names)} weights {what}, such as {min(names)}")
    for name, parameter in parameters.items():
        (file, dtype, shape), want = tensors.data[name], [*parameter.shape]
        if shape != want or dtype not in ("F32", "F16", "BF16"):
            raise InputError(f"{file}: {name} is {dtype} {shape}, not F32, F16 or BF16 {want}")
    if head in tensors.keys() - parameters and not torch.equal(tensors[head], tensors[embedding]):
        raise InputError(f"{path}: tie_word_embeddings is true, but {head} is not {embedding}")
    return tensors


class Tensors(UserDict[str, Any]):
    """A folder's tensors by name, of model.safetensors or of the shards that its index names. All
    headers are read at once, which finds truncated and garbled files; a tensor, when asked for."""

    def __init__(self, folder: str | Path) -> None:
        single, index = Path(folder) / SINGLE, Path(folder) / INDEX
        if not single.is_file() and not index.is_file():
            raise InputError(f"{folder} has no {SINGLE} and no {INDEX}")
        with reading(index):
            shards = {SINGLE} if single.is_file() else {*read_json(index)["weight_map"].values()}
            if any(shard != Path(shard).name for shard in shards):
                raise ValueError("weight_map must map tensor names to files beside it")
        self.data = {}  # where each is, its type and its shape
        for path in [Path(folder) / shard for shard in sorted(shards)]:
            with reading(path), safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in self.data:
                        raise InputError(f"{folder}: {name} is in {path.name} and in another file")
                    part = file.get_slice(name)
                    self.data[name] = path, part.get_dtype(), part.get_shape()

    def __getitem__(self, name: str) -> Tensor:
        path = self.data[name][0]
        with reading(path), safe_open(path, framework="pt") as file:
            return file.get_tensor(name)


def write_config(path: str | Path, config: Config, dtype: torch.dtype) -> None:
    """Writes config.json as it was read, but for the type of the weights."""
    raw = {key: value for key, value in config.raw.items() if key != "dtype"}
    raw["torch_dtype"] = str(dtype).removeprefix("torch.")  # transformers 5 reads this name too
    (Path(path) / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def write_weights(
    path: str | Path, tensors: Mapping[str, Tensor],
    fetch: Callable[[Tensor], Tensor] = lambda tensor: tensor.detach().cpu(),
    write: bool = True, shard_bytes: int = 5 * 10**9,
) -> None:  # fmt: skip
    """Writes tensors as model.safetensors, or where they exceed one as shards, with an index.
    `fetch` gives a tensor as it is to be written, for no more than a shard at a time. It may be
    collective: all ranks call this, and `write` is true on one of them."""
    ends = accumulate(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    parts: dict[int, list[str]] = {}  # a tensor is in the shard that its end falls into
    for name, end in zip(tensors, ends, strict=True):
        parts.setdefault(max(0, end - 1) // shard_bytes, []).append(name)
    total, weight_map = 0, dict[str, str]()
    for i, names in enumerate(parts.values(), 1):
        file = SINGLE if len(parts) == 1 else f"model-{i:05}-of-{len(parts):05}.safetensors"
        whole = {name: fetch(tensors[name]) for name in names}
        if write:
            save_file(whole, Path(path) / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in whole.values())
        weight_map |= dict.fromkeys(names, file)
    if write:  # of an earlier checkpoint in this folder, no file may be left that a loader prefers
        (Path(path) / (INDEX if len(parts) == 1 else SINGLE)).unlink(missing_ok=True)
    if write and len(parts) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (Path(path) / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
