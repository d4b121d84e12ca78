"""The transformer: Llama, Mistral and Qwen2 checkpoints, in plain PyTorch.

    model = Transformer.from_pretrained("path/to/checkpoint")
    logits = model(tokens)                                        # (B, T) int64 -> (B, T, V)
    answers = generate(model, [[1, 2, 3]], max_new_tokens=16)     # new tokens only
    chosen, rejected, n_chosen, n_rejected = pair_logprobs(model, pairs)

The parameters carry Hugging Face's names, so weights load and save without renaming.

One stack of blocks serves three uses. What differs between them is a `Layout`: which position a
token has, which tokens it sees, and where the head is needed.

    Layout     plain rows: each token sees itself and what is before it; logits everywhere
    Cache      generation: a static key-value cache, filled by the prompts and then token by token
    Branches   training: each row is a tree, one prefix and two tails that do not see each other

This file knows nothing of training, and nothing of `torch.distributed`.

Shapes: B rows, T tokens, V vocabulary, D hidden size, H query heads, K key-value heads, E head
size, N pairs, M scored tokens. A suffix on a name spells its shape: q_BHTE.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class InputError(ValueError):
    """What the user gave is wrong. The message is one line: what, where, what would be right."""


def hash_seed(*parts: Any) -> int:
    """A 63-bit seed from any ints and strings: the same everywhere, unlike Python's `hash`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ------------------------------------------------------------------------------------ the config

FAMILIES: dict[str, dict[str, Any]] = {  # what a config.json of the family may leave out
    "llama": {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False}
    | {"max_window_layers": 28},
}
COMPUTED = {  # keys that change the logits, and that Config reads
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act"),
    *("tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "layer_types"),
}
INERT = {  # keys that do not change them (dropout: this project trains without)
    *("architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
    *("torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range"),
    *("max_position_embeddings", "model_max_length", "tokenizer_class", "pretraining_tp"),
    *("attention_dropout", "max_window_layers", "sliding_window", "return_dict", "id2label"),
    *("label2id", "transformers.js_config", "is_llama_config", "unsloth_version", "unsloth_fixed"),
    *("task_specific_params", "chunk_size_feed_forward", "problem_type", "finetuning_task"),
    *("num_labels", "name_or_path", "keys_to_ignore_at_inference", "license", "top_p", "top_k"),
    *("temperature", "max_length", "repetition_penalty", "torchscript"),
}


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary position embedding (arXiv 2104.09864), with the scalings of Llama 2 and 3.1."""

    theta: float = 10000.0
    kind: str = "default"  # or "linear", "llama3"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @lru_cache(maxsize=32)  # noqa: B019  (a Rope lives as long as its model)
    def frequencies(self, head_dim: int, device: torch.device) -> Tensor:
        """(E/2,) float32: the angle that each pair of channels turns by at one position."""
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        freqs = 1.0 / (self.theta**exponent)
        if self.kind == "linear":
            freqs = freqs / self.factor
        if self.kind == "llama3":  # long waves are slowed, short ones kept, those between blended
            turns = self.original_max_position_embeddings * freqs / (2 * math.pi)
            blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            blend = blend.clamp(0, 1)
            freqs = (1 - blend) * freqs / self.factor + blend * freqs
        return freqs.to(device)


@dataclass(frozen=True, eq=False)
class Config:
    """What a Hugging Face `config.json` says of the computation; `raw` is the file itself."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]  # per layer: a token sees this many tokens, itself included
    rope: Rope
    raw: dict[str, Any] = field(repr=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config") -> "Config":
        """Reads transformers 4's keys and 5's. Raises InputError naming what is not implemented."""
        family = raw.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise InputError(f"{where}: model_type {family!r} is not one of {', '.join(FAMILIES)}")
        known = FAMILIES[family] | raw
        for key, value in raw.items():
            unread = key not in COMPUTED and key not in INERT and key not in FAMILIES[family]
            if unread and not key.startswith("_") and value not in (None, False, "", [], {}):
                raise InputError(f"{where}: key {key!r} is not implemented for {family}")
        if known.get("hidden_act", "silu") not in ("silu", "swish"):
            raise InputError(f"{where}: hidden_act {known['hidden_act']!r} is not 'silu'")

        def size(key: str, default: int | None = None) -> int:
            value = default if known.get(key) is None else known[key]
            if type(value) is not int or not 0 < value < 2**31:
                raise InputError(f"{where}: {key} is {value!r}, not a positive whole number")
            return value

        heads, hidden = size("num_attention_heads"), size("hidden_size")
        kv_heads, layers = size("num_key_value_heads", heads), size("num_hidden_layers")
        head_dim = size("head_dim", hidden // heads)
        if heads % kv_heads or head_dim % 2:
            raise InputError(
                f"{where}: num_attention_heads {heads} must be a multiple of num_key_value_heads "
                f"{kv_heads}, and head_dim {head_dim} even"
            )
        eps = known.get("rms_norm_eps", 1e-6)
        if type(eps) not in (int, float) or not 0 < eps < 1:
            raise InputError(f"{where}: rms_norm_eps is {eps!r}, not a small positive number")
        flags = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
        for key in flags:
            if type(known.get(key, False)) is not bool:
                raise InputError(f"{where}: {key} is {known[key]!r}, not true or false")
        return cls(
            vocab_size=size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=float(eps),
            tied=known.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2" or known.get("attention_bias", False),
            o_bias=known.get("attention_bias", False),
            mlp_bias=known.get("mlp_bias", False),
            windows=_windows(known, layers, where),
            rope=_rope(known, where),
            raw=dict(raw),
        )


def _windows(known: Mapping[str, Any], layers: int, where: str) -> tuple[int | None, ...]:
    """The sliding window of each layer: Mistral's of all, Qwen2's of those that it says."""
    window = known.get("sliding_window")
    if known["model_type"] == "llama" or not known.get("use_sliding_window", True):
        window = None
    if window is not None and (type(window) is not int or window < 1):
        raise InputError(f"{where}: sliding_window is {window!r}, not a positive number of tokens")
    first = known["max_window_layers"] if known["model_type"] == "qwen2" else 0
    kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if window is not None and known.get("layer_types") is not None:
        kinds = known["layer_types"]
    elif known.get("layer_types") is not None and "sliding_attention" in known["layer_types"]:
        raise InputError(f"{where}: layer_types has sliding_attention, but no window is in force")
    if len(kinds) != layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise InputError(f"{where}: layer_types must be {layers} times sliding or full_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(known: Mapping[str, Any], where: str) -> Rope:
    """`rope_theta` and `rope_scaling` (transformers 4), or `rope_parameters` (5)."""
    given = known.get("rope_parameters") or known.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise InputError(f"{where}: the RoPE parameters are {given!r}, not an object")
    kind = given.get("rope_type", given.get("type", "default"))
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor")
        + ("original_max_position_embeddings",),
    }
    if not isinstance(kind, str) or kind not in needed:
        raise InputError(f"{where}: rope_type {kind!r} is not one of {', '.join(needed)}")
    values = {key: given.get(key) for key in needed[kind]}
    values["theta"] = given.get("rope_theta", known.get("rope_theta", 10000.0))
    for key, value in values.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise InputError(f"{where}: RoPE's {key} is {value!r}, not a positive number")
    read = {"rope_type", "type", "rope_theta", *needed[kind]}
    for key, value in given.items():
        inert = value in (None, False) or (key == "partial_rotary_factor" and value == 1)
        if key not in read and not inert:
            raise InputError(f"{where}: RoPE's {key!r} is not implemented for {kind!r}")
    return Rope(kind=kind, **values)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError for a file that is missing or not that."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}".split("\n")[0]) from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


# ------------------------------------------------------------------------------------- the model


class Transformer(nn.Module):
    """A decoder-only language model whose parameter names are Hugging Face's.

    `compute_dtype` is the type of the activations, by default that of the weights: with fp32
    weights and bf16 here, each matrix is rounded as it is used and its gradient arrives in fp32.
    `checkpointing` recomputes each block in the backward pass in place of keeping its activations.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.checkpointing = False
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config, i) for i in range(config.num_layers)),
                "norm": RMSNorm(config.hidden_size, config.norm_eps),
            }
        )
        if not config.tied:  # a tied head has no parameter of its own, as in the saved files
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> "Transformer":
        """Loads a Hugging Face folder: config.json with one safetensors file, or shards."""
        config = Config.from_dict(read_json(Path(path) / "config.json"), f"{path}/config.json")
        with torch.device("meta"):
            model = cls(config).to(dtype)
        model.to_empty(device=device)
        load_weights(dict(model.named_parameters()), path)
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Writes config.json and safetensors (sharded above 5 GB) that transformers loads."""
        parameters = dict(self.named_parameters())
        Path(path).mkdir(parents=True, exist_ok=True)
        write_config(path, self.config, self.dtype)
        sizes = {name: p.numel() * p.element_size() for name, p in parameters.items()}
        write_weights(path, sizes, lambda name: parameters[name].detach().cpu())

    def init_weights(self, seed: int) -> None:
        """Random weights from a seed: fan-in scaled, the residual writers by depth too."""
        generator = torch.Generator().manual_seed(hash_seed(seed, "init"))
        depth = (2 * self.config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                std = 0.02 if "embed" in name else parameter.shape[1] ** -0.5
                std *= depth if "o_proj" in name or "down_proj" in name else 1
                values = torch.empty(parameter.shape).normal_(0, std, generator=generator)
                parameter.data.copy_(values)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model["norm"].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.model["norm"].weight.dtype

    def forward(self, tokens: Tensor, layout: "Layout | None" = None) -> Tensor:
        """(B, T) int64 -> (B, T, V) logits; with a layout, what its `read` makes of the states."""
        layout = Layout(tokens) if layout is None else layout
        x_BTD = F.embedding(tokens, self.model["embed_tokens"].weight)
        x_BTD = x_BTD.to(self.compute_dtype or x_BTD.dtype)
        rotation = rotations(self.config, layout.positions, x_BTD.dtype)
        for block in self.model["layers"]:
            if self.checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, rotation, layout, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotation, layout)
        head = self.model["embed_tokens"] if self.config.tied else self.lm_head
        return layout.read(self.model["norm"](x_BTD), head.weight)


class Block(nn.Module):
    """Attention and a gated MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], layout: "Layout") -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotation, layout)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; who sees whom is the layout's affair."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.window, self.head_dim = layer, config.windows[layer], config.head_dim
        hidden, wide = config.hidden_size, config.num_heads * config.head_dim
        narrow = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(hidden, wide, bias=config.qkv_bias)
        self.k_proj = Linear(hidden, narrow, bias=config.qkv_bias)
        self.v_proj = Linear(hidden, narrow, bias=config.qkv_bias)
        self.o_proj = Linear(wide, hidden, bias=config.o_bias)

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], layout: "Layout") -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q_BHTE = self._heads(self.q_proj(x_BTD))
        k_BKTE = self._heads(self.k_proj(x_BTD))
        v_BKTE = self._heads(self.v_proj(x_BTD))
        q_BHTE, k_BKTE = rotate(q_BHTE, rotation), rotate(k_BKTE, rotation)
        o_BHTE = layout.attend(q_BHTE, k_BKTE, v_BKTE, self.layer, self.window)
        return self.o_proj(o_BHTE.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, inner, bias=bias)
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Linear(nn.Linear):
    """A linear map in the type of its input, whatever that of its weights."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotations(config: Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions (B or 1, T): two (B or 1, 1, T, E), computed in float32."""
    freqs = config.rope.frequencies(config.head_dim, positions.device)
    angles = positions[:, None, :, None].float() * freqs
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channel i together with channel i + E/2, as Hugging Face's weights expect."""
    cos, sin = rotation
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


# ----------------------------------------------------------------------------------- the layouts


class Layout:
    """Plain rows: every token sees itself and what is before it. The base of the other two."""

    def __init__(self, tokens: Tensor) -> None:
        self.positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (B or 1, T)
        self.biases: dict[int | None, Tensor | None] = {}

    def visible(self) -> Tensor | None:
        """(B or 1, T, T) bool, who sees whom; None for plain causal rows."""
        return None

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the attention scores, built once per forward pass, not per layer."""
        if window not in self.biases:
            visible, at = self.visible(), self.positions
            if window is not None and at.shape[1] > window:
                visible = at[:, :, None] >= at[:, None, :] if visible is None else visible
                visible = visible & (at[:, :, None] - at[:, None, :] < window)
            self.biases[window] = None if visible is None else additive(visible, dtype)[:, None]
        return self.biases[window]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None) -> Tensor:
        """Queries (B, H, T, E), keys and values (B, K, T, E) -> (B, H, T, E)."""
        bias = self.bias(window, q.dtype)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=q.shape[1] != k.shape[1]
        )

    def read(self, x_BTD: Tensor, head_VD: Tensor) -> Tensor:
        """The logits of every position, (B, T, V)."""
        return F.linear(x_BTD, head_VD.to(x_BTD.dtype))


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere: SDPA would make this of a bool mask in every layer."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, -math.inf
    )


class Cache(Layout):
    """A static key-value cache: the prompts of B rows, padded on the right, then `step` by step.

    `size` is the most tokens that a row will have; `width` is how many keys any row may see.
    """

    def __init__(self, model: Transformer, lengths: list[int], size: int) -> None:
        config, dtype = model.config, model.compute_dtype or model.dtype
        shape = (config.num_layers, len(lengths), config.num_kv_heads, size, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=model.device)
        self.values = torch.zeros(shape, dtype=dtype, device=model.device)
        self.size, self.width, self.decoding = size, max(lengths), False
        self.last = torch.tensor(lengths, device=model.device) - 1  # (B,): each row's last token
        self.positions = torch.arange(self.width, device=model.device)[None]
        self.biases = {}

    def step(self) -> "Cache":
        """Makes ready for one more token in each row, (B, 1)."""
        self.decoding, self.biases = True, {}
        # A row that has stopped is carried until `keep` drops it: it stays at the last place.
        self.last = (self.last + 1).clamp_max(self.size - 1)
        self.width = min(self.width + 1, self.size)
        self.positions = self.last[:, None]
        self.places = torch.arange(self.width, device=self.last.device)[None]
        self.rows = torch.arange(len(self.last), device=self.last.device)
        return self

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.last = self.last[rows]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None) -> Tensor:
        """As Layout's; stores k and v, and when decoding attends to all that is stored."""
        if not self.decoding:
            self.keys[layer, :, :, : k.shape[2]] = k
            self.values[layer, :, :, : v.shape[2]] = v
            return super().attend(q, k, v, layer, window)
        self.keys[layer, self.rows, :, self.last] = k[:, :, 0]
        self.values[layer, self.rows, :, self.last] = v[:, :, 0]
        if window not in self.biases:
            visible = self.places <= self.positions
            if window is not None:
                visible = visible & (self.places > self.positions - window)
            self.biases[window] = additive(visible, q.dtype)[:, None, None]  # (B, 1, 1, width)
        # One query a row: two small products by hand cost less than SDPA's set-up. The query
        # heads of a group (G) become the rows of one product with the key head they share.
        k_BKSE, v_BKSE = (
            self.keys[layer, :, :, : self.width],
            self.values[layer, :, :, : self.width],
        )
        q_BKGE = q.unflatten(1, (k_BKSE.shape[1], -1))[:, :, :, 0] * q.shape[-1] ** -0.5
        scores_BKGS = q_BKGE @ k_BKSE.transpose(-1, -2) + self.biases[window]
        return (scores_BKGS.float().softmax(-1).to(q.dtype) @ v_BKSE).flatten(1, 2)[:, :, None]

    def read(self, x_BTD: Tensor, head_VD: Tensor) -> Tensor:
        """The logits of each row's last token, (B, V)."""
        last = torch.zeros_like(self.last) if self.decoding else self.last
        x_BD = x_BTD[torch.arange(len(last), device=last.device), last]
        return F.linear(x_BD, head_VD.to(x_BD.dtype))


class Branches(Layout):
    """Rows that are trees: a pair's common prefix once, then both tails, which see the prefix and
    themselves. The second tail's positions go on from the prefix; its places do not.

    What is read out are the M log-probs of response tokens, in the order of `lengths`: for each
    pair those shared, those of the chosen tail, those of the rejected tail.
    """

    def __init__(self, pairs: Sequence[Any], device: torch.device) -> None:
        rows = [branch(pair) for pair in pairs]
        width = max(len(row.tokens) for row in rows)
        self.tokens = torch.zeros((len(rows), width), dtype=torch.int64)
        self.positions = torch.arange(width).repeat(len(rows), 1)
        self.tails = torch.full((len(rows), width), 3)  # 0 prefix, 1 chosen, 2 rejected, 3 padding
        for i, row in enumerate(rows):
            end, fork = len(row.tokens), len(row.tokens) - row.rejected
            self.tokens[i, :end] = torch.tensor(row.tokens)
            self.positions[i, fork:] -= row.chosen
            self.tails[i, : row.prefix], self.tails[i, row.prefix : fork] = 0, 1
            self.tails[i, fork:end] = 2
        self.forked = any(row.chosen and row.rejected for row in rows)
        self.lengths = [n for row in rows for n in (row.shared, row.chosen, row.rejected)]
        places = [i * width + place for i, row in enumerate(rows) for place in row.places]
        targets = [target for row in rows for target in row.targets]
        self.places = torch.tensor(places, dtype=torch.int64, device=device)  # (M,)
        self.targets = torch.tensor(targets, dtype=torch.int64, device=device)  # (M,)
        self.tokens, self.positions, self.tails = (
            x.to(device) for x in (self.tokens, self.positions, self.tails)
        )
        self.biases = {}

    def visible(self) -> Tensor | None:
        """(B, T, T) bool; None where no row has two tails, for then it is plain causal."""
        if not self.forked:
            return None
        tail, place = self.tails, torch.arange(self.tails.shape[1], device=self.tails.device)
        same = (tail[:, None, :] == 0) | (tail[:, None, :] == tail[:, :, None])
        return same & (place[None, :] <= place[:, None])

    def read(self, x_BTD: Tensor, head_VD: Tensor) -> Tensor:
        """The log-probs of the response tokens, (M,) float32."""
        return token_logprobs(x_BTD.flatten(0, 1)[self.places], head_VD, self.targets)


@dataclass
class Row:
    """One pair as a tree: `tokens` = prefix, chosen tail, rejected tail; the rest are lengths."""

    tokens: list[int]
    prefix: int
    shared: int  # response tokens within the prefix
    chosen: int
    rejected: int

    @property
    def places(self) -> list[int]:
        """Where each scored token is predicted: one place before it, along its own branch."""
        last, fork = self.prefix - 1, self.prefix + self.chosen
        chosen = [last, *range(self.prefix, fork)][: self.chosen]
        rejected = [last, *range(fork, fork + self.rejected)][: self.rejected]
        return [*range(last - self.shared, last), *chosen, *rejected]

    @property
    def targets(self) -> list[int]:
        """The scored tokens, in the order of `places`."""
        return self.tokens[self.prefix - self.shared :]


def branch(pair: Any) -> Row:
    """Finds a pair's common prefix. `pair` is (prompt, chosen, rejected), lists of token ids."""
    prompt, chosen, rejected = pair
    if not prompt:
        raise ValueError("a pair needs a prompt: its response's first token has no context")
    both = zip(chosen, rejected, strict=False)
    alike = min(len(chosen), len(rejected))
    shared = next((i for i, (a, b) in enumerate(both) if a != b), alike)
    tokens = [*prompt, *chosen, *rejected[shared:]]
    prefix = len(prompt) + shared
    return Row(tokens, prefix, shared, len(chosen) - shared, len(rejected) - shared)


# ------------------------------------------------------------------------------ log-probabilities


def pair_logprobs(model: nn.Module, pairs: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed response log-probs of N (prompt, chosen, rejected), as of separate sequences.

    Returns:
        chosen, rejected: (N,) float32 sums over response tokens (EOS included), differentiable.
        n_chosen, n_rejected: (N,) float32 response lengths in tokens.
    An empty rejected side (SFT) gives 0 and 0.
    """
    parts = pair_token_logprobs(model, pairs)
    shared, chosen, rejected = (torch.stack([p.sum() for p in parts[i::3]]) for i in range(3))
    has = torch.tensor([bool(pair[2]) for pair in pairs], device=shared.device)
    counts = (torch.tensor([float(len(p[i])) for p in pairs], device=has.device) for i in (1, 2))
    return shared + chosen, torch.where(has, shared, 0) + rejected, *counts


def pair_token_logprobs(model: nn.Module, pairs: Sequence[Any]) -> list[Tensor]:
    """The same token by token: 3N tensors, for each pair its shared, chosen and rejected tails."""
    layout = Branches(pairs, model.device)  # type: ignore[arg-type]
    return list(model(layout.tokens, layout).split(layout.lengths))


def token_logprobs(x_MD: Tensor, head_VD: Tensor, targets_M: Tensor, chunk: int = 512) -> Tensor:
    """log softmax(x @ head^T)[target] in float32, (M,).

    At most `chunk` rows of logits exist at a time; the backward pass computes them again.
    """
    parts = []
    for x, target in zip(x_MD.split(chunk), targets_M.split(chunk), strict=True):
        if torch.is_grad_enabled():
            args = (x, head_VD, target)
            parts.append(
                checkpoint(_logprobs, *args, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            parts.append(_logprobs(x, head_VD, target))
    return torch.cat(parts)


def _logprobs(x_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> Tensor:
    logits_MV = F.linear(x_MD, head_VD.to(x_MD.dtype)).float()
    return logits_MV.gather(1, targets_M[:, None])[:, 0] - logits_MV.logsumexp(1)


# ------------------------------------------------------------------------------------- generation


def generate(
    model: nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int | Sequence[int],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_ids: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    return_logprobs: bool = False,
    batch_size: int = 64,
) -> Any:
    """Samples a continuation of each prompt: lists of new token ids, EOS included.

    Args:
        prompts: token ids, of any lengths, none empty.
        max_new_tokens: one number, or one per row.
        temperature: divides the logits; 0 is greedy. top_k (0: off) and then top_p filter them.
        seed: an int, hashed with the row's index, or one seed per row. A row's draws depend on its
            own seed alone, and are made on the CPU.
        return_logprobs: also returns the log-probs of the tokens under the model as it is, before
            temperature and filters: (tokens, logprobs).
        batch_size: rows decoded together; they are sorted, so that like lengths meet.
    """
    count = len(prompts)
    budgets = [max_new_tokens] * count if isinstance(max_new_tokens, int) else [*max_new_tokens]
    seeds = [hash_seed(seed, i) for i in range(count)] if isinstance(seed, int) else [*seed]
    if not len(budgets) == len(seeds) == count or min(budgets, default=0) < 0:
        raise ValueError("generate needs one budget >= 0 and one seed for each prompt")
    if any(not prompt for prompt in prompts):
        raise ValueError("generate needs a token in each prompt")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError("generate needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1")
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    sampling = (temperature, top_k, top_p, frozenset(eos_ids), return_logprobs)
    order = sorted((i for i in range(count) if budgets[i]), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = ([column[i] for i in rows] for column in (prompts, budgets, seeds))
        for i, new, scores in zip(rows, *_decode(model, *batch, *sampling), strict=True):
            tokens[i], logprobs[i] = new, scores
    return (tokens, logprobs) if return_logprobs else tokens


@torch.no_grad()
def _decode(
    model: Any,
    prompts: list[list[int]],
    budgets: list[int],
    seeds: list[int],
    temperature: float,
    top_k: int,
    top_p: float,
    eos_ids: frozenset[int],
    scored: bool,
) -> tuple[list[list[int]], list[list[float]]]:
    """One batch of `generate`: the prompts in one pass, then a token a row and step."""
    uniforms = torch.zeros(len(prompts), max(budgets), dtype=torch.float64)
    for row, (budget, seed) in enumerate(zip(budgets, seeds, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        uniforms[row, :budget] = torch.rand(budget, generator=generator, dtype=torch.float64)
    uniforms = uniforms.to(model.device)

    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    padded = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    cache = Cache(model, lengths, max(map(sum, zip(lengths, budgets, strict=True))))
    logits = model(padded.to(model.device), cache)

    tokens: list[list[int]] = [[] for _ in prompts]
    scores: list[list[float]] = [[] for _ in prompts]
    rows, open_rows = list(range(len(prompts))), set(range(len(prompts)))
    for step in range(max(budgets)):
        picked = sample_tokens(logits, uniforms[:, step], temperature, top_k, top_p)
        logps = (
            logits.float().log_softmax(-1).gather(1, picked[:, None])[:, 0] if scored else picked
        )
        for row, token, logp in zip(rows, picked.tolist(), logps.tolist(), strict=True):
            if row in open_rows:
                tokens[row].append(token)
                scores[row].append(logp)
                if token in eos_ids or len(tokens[row]) == budgets[row]:
                    open_rows.remove(row)
        if not open_rows:
            break
        if len(open_rows) <= 0.75 * len(rows):  # dropping copies the cache, so not at every stop
            keep = [i for i, row in enumerate(rows) if row in open_rows]
            rows = [rows[i] for i in keep]
            kept = torch.tensor(keep, device=picked.device)
            picked, uniforms = picked[kept], uniforms[kept]
            cache.keep(kept)
        logits = model(picked[:, None], cache.step())
    return tokens, scores


def sample_tokens(
    logits_BV: Tensor, uniforms_B: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Picks a token a row by inverting the distribution at a uniform number in [0, 1): (B,) int64.

    Temperature, then top-k (ties with the k-th stay), then top-p, as transformers orders them.
    Candidates are lined up by token id, so that a near-tie that rounding decides differently on
    two machines does not change which token a number falls on.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits, size = logits_BV.float() / temperature, logits_BV.shape[1]
    ids = None
    if 0 < top_k < size:
        least = logits.topk(top_k).values[:, -1:]
        most = int((logits >= least).sum(-1).max())
        logits, ids = logits.topk(most)
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        if ids is None:
            logits, ids = logits.sort(descending=True, stable=True)
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs.cumsum(-1) - probs >= top_p, -math.inf)
    if ids is not None:
        ids, order = ids.sort()
        logits = logits.gather(1, order)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    level = uniforms_B[:, None] * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, level, right=True).clamp_max(logits.shape[1] - 1)
    return (picked if ids is None else ids.gather(1, picked))[:, 0]


# ------------------------------------------------------------------------- reading and writing


def load_weights(
    parameters: Mapping[str, Tensor],
    path: str | Path,
    place: Callable[[Tensor, Tensor], Any] = Tensor.copy_,
) -> None:
    """Fills parameters by name from a folder's safetensors, through `place(parameter, value)`.

    Raises InputError for tensors that are missing, unexpected, misshapen or not floating-point.
    A tied head saved a second time is accepted where it equals the embedding, and so are the
    `rotary_emb.inv_freq` buffers of old files.
    """
    files = weight_files(Path(path))
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    extra = {n for n in files if n not in parameters and not n.endswith("rotary_emb.inv_freq")}
    for names, what in ((parameters.keys() - files, "missing"), (extra - {head}, "unexpected")):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise InputError(f"{path}: {len(names)} weights {what}, such as {some}")
    if head in extra and not torch.equal(*(_read(files[n], n) for n in (head, embedding))):
        raise InputError(f"{path}: tie_word_embeddings is true, but {head} is not {embedding}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = _read(files[name], name)
            if value.shape != parameter.shape or not value.is_floating_point():
                got, want = ([*x.shape] for x in (value, parameter))
                raise InputError(f"{path}: {name} is {value.dtype} {got}, not floating {want}")
            place(parameter, value)


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor in a folder: model.safetensors, or the shards that its index names.

    The headers of all files are read, which finds truncated and garbled ones.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names: dict[str, Path] = {}
    if single.is_file():
        shards = {single.name}
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(shard, str) and shard == Path(shard).name for shard in weight_map.values()
        ):
            raise InputError(f"{index}: weight_map must map tensor names to files beside it")
        shards = set(weight_map.values())
    else:
        raise InputError(f"{folder} has no model.safetensors and no model.safetensors.index.json")
    for shard in sorted(shards):
        with open_safetensors(folder / shard) as file:
            names |= dict.fromkeys(file.keys(), folder / shard)
    return names


def open_safetensors(path: Path) -> Any:
    """A reader of one file's tensors. Raises InputError where it is missing or garbled."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from None


def _read(path: Path, name: str) -> Tensor:
    with open_safetensors(path) as file:
        return file.get_tensor(name)


def write_config(path: str | Path, config: Config, dtype: torch.dtype) -> None:
    """Writes config.json as it was read, but for the type of the weights."""
    raw = {key: value for key, value in config.raw.items() if key != "dtype"}
    raw["torch_dtype"] = str(dtype).removeprefix("torch.")  # transformers 5 reads this name too
    (Path(path) / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def write_weights(
    path: str | Path,
    sizes: Mapping[str, int],
    fetch: Callable[[str], Tensor],
    write: bool = True,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes tensors as model.safetensors, or as shards with an index where they exceed one.

    `sizes` says each tensor's bytes, so that no more than a shard is fetched at a time. All ranks
    of a sharded model call this, since `fetch` may be collective; `write` is true on one of them.
    """
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        tensors = {name: fetch(name) for name in names}
        if write:
            save_file(tensors, Path(path) / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if write and len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (Path(path) / "model.safetensors.index.json").write_text(text, encoding="utf-8")
