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

Shapes: B rows, T tokens, S stored keys, V vocabulary, D hidden size, H query heads, K key-value
heads, G = H / K, E head size, N pairs, M scored tokens. A suffix spells a shape: q_BHTE.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
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

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines())[:1000])


def hash_seed(*parts: Any) -> int:
    """A 63-bit seed from any ints and strings: the same everywhere, unlike Python's `hash`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ------------------------------------------------------------------------------------ the config

SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES: dict[str, dict[str, Any]] = {  # what a config.json of the family may leave out
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False}
    | {"max_window_layers": 28},
}
# Keys that change the logits, and are read; then those that do not change them (no dropout here).
COMPUTED = """model_type vocab_size hidden_size intermediate_size num_hidden_layers head_dim
    num_attention_heads num_key_value_heads rms_norm_eps hidden_act tie_word_embeddings rope_theta
    rope_scaling rope_parameters layer_types""".split()  # noqa: SIM905
INERT = """architectures auto_map bos_token_id eos_token_id pad_token_id unk_token_id torch_dtype
    dtype transformers_version use_cache initializer_range max_position_embeddings model_max_length
    max_sequence_length tokenizer_class pretraining_tp attention_dropout max_window_layers
    sliding_window return_dict id2label label2id transformers.js_config is_llama_config
    unsloth_version unsloth_fixed task_specific_params chunk_size_feed_forward problem_type
    finetuning_task num_labels name_or_path keys_to_ignore_at_inference license torchscript
    do_sample temperature top_k top_p typical_p num_beams num_beam_groups num_return_sequences
    max_length length_penalty repetition_penalty""".split()  # noqa: SIM905
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPES = {"default": (), "linear": ("factor",), "llama3": LLAMA3}  # what each rope_type needs


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864), with the scalings of Llama 2 and 3.1."""

    rope_theta: float = 10000.0
    kind: str = "default"  # or "linear", "llama3"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: float = 8192.0  # tokens


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
        for key, value in raw.items():
            off = value in (None, False, "", [], {}) or key.startswith("_")
            off = off or (key == "partial_rotary_factor" and value == 1)
            if not off and key not in [*COMPUTED, *INERT, *FAMILIES[family]]:
                raise InputError(f"{where}: key {key!r} is not implemented for {family}")
        known = {"hidden_act": "silu", "rms_norm_eps": 1e-6, **FAMILIES[family], **raw}

        def read(key: str, fits: Callable[[Any], bool], wanted: str, default: Any = None) -> Any:
            value = known.get(key, default)
            if not fits(value):
                raise InputError(f"{where}: {key} is {value!r}, not {wanted}")
            return value

        def size(key: str, most: int = 2**22) -> int:  # no product of two sizes overflows
            fits = partial(_is_whole, most=most)
            return read(key, fits, f"a whole number from 1 to {most}")

        def flag(key: str) -> bool:
            return read(key, lambda value: type(value) is bool, "true or false", default=False)

        heads, hidden = size("num_attention_heads"), size("hidden_size")
        if heads > hidden:
            raise InputError(f"{where}: num_attention_heads {heads} exceeds hidden_size {hidden}")
        for key, value in (("num_key_value_heads", heads), ("head_dim", hidden // heads)):
            known[key] = value if known.get(key) is None else known[key]
        kv_heads, head_dim = size("num_key_value_heads"), size("head_dim")
        if heads % kv_heads or head_dim % 2 or heads * head_dim > 2**22:
            raise InputError(
                f"{where}: num_attention_heads {heads} must be a multiple of num_key_value_heads "
                f"{kv_heads}, head_dim {head_dim} even, and heads x head_dim at most {2**22}"
            )
        read("hidden_act", lambda value: value in ("silu", "swish"), "'silu'")
        return cls(
            vocab_size=size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_layers=size("num_hidden_layers", 1024),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=read("rms_norm_eps", lambda v: _is_positive(v) and v < 1, "between 0 and 1"),
            tied=flag("tie_word_embeddings"),
            qkv_bias=flag("attention_bias") or family == "qwen2",
            o_bias=flag("attention_bias"),
            mlp_bias=flag("mlp_bias"),
            windows=_windows(known, flag("use_sliding_window"), where),
            rope=_rope(known, where),
            raw=dict(raw),
        )


def _is_whole(value: Any, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e18


def _windows(known: Mapping[str, Any], used: bool, where: str) -> tuple[int | None, ...]:
    """The sliding window of each layer: all of Mistral's, and those of Qwen2 that it says."""
    family, layers = known["model_type"], known["num_hidden_layers"]
    window, first = known.get("sliding_window"), 0
    if family == "llama" or (family == "qwen2" and not used):
        window = None
    if window is not None and not _is_whole(window, 2**40):
        raise InputError(f"{where}: sliding_window is {window!r}, not a positive number of tokens")
    if window is not None and family == "qwen2":
        first = known["max_window_layers"]
        if type(first) is not int or first < 0:
            raise InputError(f"{where}: max_window_layers is {first!r}, not a number of layers")
    kinds = [FULL if window is None or i < first else SLIDING for i in range(layers)]
    given = known.get("layer_types") or kinds
    odd = not isinstance(given, list) or any(kind not in (FULL, SLIDING) for kind in given)
    if odd or len(given) != layers:
        raise InputError(f"{where}: layer_types is not {layers} times {FULL} or {SLIDING}")
    if given != kinds and (family != "qwen2" or window is None):
        raise InputError(f"{where}: layer_types do not agree with sliding_window {window}")
    return tuple(window if kind == SLIDING else None for kind in given)


def _rope(known: Mapping[str, Any], where: str) -> Rope:
    """`rope_theta` and `rope_scaling` (transformers 4), or `rope_parameters` (5)."""
    both = [known[key] for key in ("rope_scaling", "rope_parameters") if known.get(key)]
    given = both[0] if both else {}
    if any(not isinstance(one, dict) or one != given for one in both):
        raise InputError(f"{where}: rope_scaling and rope_parameters are not one equal object")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPES:
        raise InputError(f"{where}: rope_type {kind!r} is not one of {', '.join(ROPES)}")
    values: dict[str, Any] = {key: given.get(key) for key in ROPES[kind]}
    values["rope_theta"] = given.get("rope_theta", known.get("rope_theta", 10000.0))
    for key, value in values.items():
        if not _is_positive(value):
            raise InputError(f"{where}: {key} is {value!r}, not a positive number")
    for key, value in given.items():
        off = value in (None, False) or (key == "partial_rotary_factor" and value == 1)
        if not off and key not in ("rope_type", "type", "rope_theta", *ROPES[kind]):
            raise InputError(f"{where}: RoPE's key {key!r} is not implemented for {kind!r}")
    rope = Rope(kind=kind, **values)
    if rope.low_freq_factor >= rope.high_freq_factor:
        raise InputError(f"{where}: RoPE's low_freq_factor is not below its high_freq_factor")
    return rope


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError for a file that is missing or not that."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
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
        self.model: Any = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model["layers"] = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.model["norm"] = RMSNorm(config.hidden_size, config.norm_eps)
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
        find_weights(dict(model.named_parameters()), path)  # before memory is taken for them
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
        layout.prepare(self.config.windows, x_BTD.dtype)
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
        q_BTHE, k_BTKE, v_BTKE = (
            part(x_BTD).unflatten(-1, (-1, self.head_dim))
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BTHE, k_BTKE = rotate(q_BTHE, rotation), rotate(k_BTKE, rotation)
        q_BHTE, k_BKTE, v_BKTE = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
        o_BHTE = layout.attend(q_BHTE, k_BKTE, v_BKTE, self.layer, self.window)
        return self.o_proj(o_BHTE.transpose(1, 2).flatten(2))


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
    """Cosines and sines for positions (B or 1, T): two (B or 1, T, 1, E), computed in float32."""
    freqs = frequencies(config.rope, config.head_dim, positions.device)
    angles = positions[:, :, None, None].float() * freqs
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache(maxsize=32)
def frequencies(rope: Rope, head_dim: int, device: torch.device) -> Tensor:
    """(E/2,) float32: the angle that each pair of channels turns by at one position."""
    exponent = torch.arange(0, head_dim, 2).float() / head_dim
    freqs = 1.0 / (rope.rope_theta**exponent)
    if rope.kind == "linear":
        freqs = freqs / rope.factor
    if rope.kind == "llama3":  # long waves are slowed, short ones kept, those between blended
        low, high = rope.low_freq_factor, rope.high_freq_factor
        turns = rope.original_max_position_embeddings * freqs / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = (1 - blend) * freqs / rope.factor + blend * freqs
    return freqs.to(device)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channel i together with channel i + E/2, as Hugging Face's weights expect."""
    cos, sin = rotation
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


# ----------------------------------------------------------------------------------- the layouts


class Layout:
    """Plain rows: every token sees itself and what is before it. The base of the other two."""

    plain = True  # SDPA's own causal mask says it all, but for a window
    biases: dict[int | None, Tensor | None]

    def __init__(self, tokens: Tensor) -> None:
        self.positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (B or 1, T)

    def prepare(self, windows: Sequence[int | None], dtype: torch.dtype) -> None:
        """Builds what is added to the attention scores, once per forward pass: not per layer, and
        not within a block, whose recomputation or compilation would find it there already."""
        self.biases = {window: self.bias(window, dtype) for window in set(windows)}

    def visible(self) -> Tensor:
        """Who (queries, dim 1) sees whom (keys, dim 2) without a window: (B or 1, T, T) bool."""
        places = torch.arange(self.positions.shape[1], device=self.positions.device)
        return (places[:, None] >= places)[None]

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """(B or 1, 1, T, T): 0 where a query sees a key, -inf elsewhere; None for plain rows."""
        at = self.positions
        if self.plain and (window is None or at.shape[1] <= window):
            return None
        near = True if window is None else at[:, :, None] - at[:, None, :] < window
        return additive(self.visible() & near, dtype)[:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None) -> Tensor:
        """Queries (B, H, T, E), keys and values (B, K, T, E) -> (B, H, T, E)."""
        bias = self.biases[window]
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=grouped
        )

    def read(self, x_BTD: Tensor, head_VD: Tensor) -> Tensor:
        """The logits of every position, (B, T, V)."""
        return F.linear(x_BTD, head_VD.to(x_BTD.dtype))


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere: SDPA would make this of a bool mask in every layer."""
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return zeros.masked_fill_(~visible, -math.inf)


def pad(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """Rows of numbers, filled up on the right: (B, T) int64."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)


class Cache(Layout):
    """A static key-value cache: the prompts of B rows, padded on the right, then `step` by step.

    `size` is the most tokens that a row will have, `lengths` how many each has.
    """

    def __init__(self, model: Transformer, lengths: list[int], size: int) -> None:
        config, dtype = model.config, model.compute_dtype or model.dtype
        shape = (config.num_layers, len(lengths), config.num_kv_heads, size, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=model.device)
        self.values = torch.zeros(shape, dtype=dtype, device=model.device)
        self.lengths, self.decoding = lengths, False
        self.positions = torch.arange(max(lengths), device=model.device)[None]

    def step(self) -> "Cache":
        """Makes ready for one more token in each row, (B, 1)."""
        self.decoding = True
        self.lengths = [length + 1 for length in self.lengths]
        self.positions = torch.tensor(self.lengths, device=self.keys.device)[:, None] - 1
        self.rows = torch.arange(len(self.lengths), device=self.keys.device)
        return self

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these. A row whose place stays the same is not copied."""
        for new, old in enumerate(rows):
            if new != old:
                self.keys[:, new], self.values[:, new] = self.keys[:, old], self.values[:, old]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        self.lengths = [self.lengths[row] for row in rows]

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """As Layout's; when decoding (B, 1, 1, S), for the one query of each row."""
        if not self.decoding:
            return super().bias(window, dtype)
        places = torch.arange(max(self.lengths), device=self.positions.device)[None]
        near = True if window is None else places > self.positions - window
        return additive((places <= self.positions) & near, dtype)[:, None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None) -> Tensor:
        """As Layout's; stores k and v, and when decoding attends to all that is stored."""
        keys_BKSE, values_BKSE = self.keys[layer], self.values[layer]
        if not self.decoding:
            keys_BKSE[:, :, : k.shape[2]], values_BKSE[:, :, : v.shape[2]] = k, v
            return super().attend(q, k, v, layer, window)
        last, width = self.positions[:, 0], max(self.lengths)
        keys_BKSE[self.rows, :, last], values_BKSE[self.rows, :, last] = k[:, :, 0], v[:, :, 0]
        # One query a row: two small products by hand cost less than SDPA's set-up. The query
        # heads of a group (G) become the rows of one product with the key head they share.
        q_BKGE = q.unflatten(1, (k.shape[1], -1))[:, :, :, 0] * q.shape[-1] ** -0.5
        scores_BKGS = q_BKGE @ keys_BKSE[:, :, :width].transpose(-1, -2) + self.biases[window]
        weights_BKGS = scores_BKGS.float().softmax(-1).to(q.dtype)
        return (weights_BKGS @ values_BKSE[:, :, :width]).flatten(1, 2)[:, :, None]

    def read(self, x_BTD: Tensor, head_VD: Tensor) -> Tensor:
        """The logits of each row's last token, (B, V)."""
        last = [0 if self.decoding else length - 1 for length in self.lengths]
        return F.linear(x_BTD[range(len(last)), last], head_VD.to(x_BTD.dtype))


class Branches(Layout):
    """Rows that are trees: a pair's common prefix once, then both tails, which see the prefix and
    themselves. The second tail's positions go on from the prefix; its places do not.

    What is read out are the M log-probs of response tokens, in the order of `lengths`: for each
    pair those shared, those of the chosen tail, those of the rejected tail.
    """

    def __init__(self, pairs: Sequence[Any], device: torch.device) -> None:
        tokens: list[list[int]] = []
        positions: list[list[int]] = []
        tails: list[list[int]] = []  # 0 prefix, 1 chosen, 2 rejected, 3 padding
        places: list[list[int]] = []  # where each scored token is predicted, along its own branch
        targets: list[int] = []
        self.lengths: list[int] = []
        for prompt, chosen, rejected in pairs:
            if not prompt:
                raise ValueError("a pair needs a prompt, or its first token has no context")
            shared = common_prefix(chosen, rejected)
            n_chosen, n_rejected = len(chosen) - shared, len(rejected) - shared
            prefix = len(prompt) + shared
            last, fork, end = prefix - 1, prefix + n_chosen, prefix + n_chosen + n_rejected
            tokens.append([*prompt, *chosen, *rejected[shared:]])
            positions.append([*range(fork), *range(prefix, prefix + n_rejected)])
            tails.append([0] * prefix + [1] * n_chosen + [2] * n_rejected)
            first, second = [last, *range(prefix, fork)], [last, *range(fork, end)]
            places.append([*range(last - shared, last), *first[:n_chosen], *second[:n_rejected]])
            targets += [*chosen, *rejected[shared:]]
            self.lengths += [shared, n_chosen, n_rejected]
        self.tokens, self.positions = pad(tokens, 0, device), pad(positions, 0, device)
        self.tails, width = pad(tails, 3, device), max(map(len, tokens))
        self.plain = not any(1 in row and 2 in row for row in tails)
        flat = [i * width + place for i, row in enumerate(places) for place in row]
        self.places = torch.tensor(flat, dtype=torch.int64, device=device)  # (M,)
        self.targets = torch.tensor(targets, dtype=torch.int64, device=device)  # (M,)

    def visible(self) -> Tensor:
        """(B, T, T) bool: of what is before it, a token sees the prefix and its own tail."""
        same = (self.tails[:, None, :] == 0) | (self.tails[:, None, :] == self.tails[:, :, None])
        return super().visible() & same

    def read(self, x_BTD: Tensor, head_VD: Tensor) -> Tensor:
        """The log-probs of the response tokens, (M,) float32."""
        return token_logprobs(x_BTD.flatten(0, 1)[self.places], head_VD, self.targets)


def tree_size(pair: Any) -> int:
    """The tokens that `Branches` computes for a pair: what both sides begin with counts once."""
    prompt, chosen, rejected = pair
    return len(prompt) + len(chosen) + len(rejected) - common_prefix(chosen, rejected)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    both = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in both if a != b), min(len(left), len(right)))


# ------------------------------------------------------------------------------ log-probabilities

LOGITS = 2**24  # 64 MiB in float32: 340 rows at a vocabulary of 49,152


def pair_logprobs(
    model: Transformer, pairs: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed response log-probs of N (prompt, chosen, rejected), as of separate sequences.

    Returns:
        chosen, rejected: (N,) float32 sums over response tokens (EOS included), differentiable.
        n_chosen, n_rejected: (N,) float32 response lengths in tokens.
    An empty side (as the rejected one in SFT) gives 0 and 0.
    """
    return pair_sums(pair_token_logprobs(model, pairs))


def pair_sums(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `pair_logprobs` returns, from what `pair_token_logprobs` returns."""
    shared, chosen, rejected = torch.stack([part.sum() for part in parts]).view(-1, 3).unbind(1)
    counts = torch.tensor([float(len(part)) for part in parts], device=shared.device).view(-1, 3)
    n_chosen, n_rejected = counts[:, 0] + counts[:, 1], counts[:, 0] + counts[:, 2]
    return shared + chosen, shared + rejected, n_chosen, n_rejected


def pair_token_logprobs(model: Transformer, pairs: Sequence[Any]) -> list[Tensor]:
    """The same token by token: 3N tensors, for each pair its shared, chosen and rejected tails."""
    layout = Branches(pairs, model.device)
    return list(model(layout.tokens, layout).split(layout.lengths))


def token_logprobs(x_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> Tensor:
    """log softmax(x @ head^T)[target] in float32, (M,).

    At most `LOGITS` logits exist at a time. Where there are more, the backward pass computes each
    chunk of rows again.
    """
    chunk = max(1, LOGITS // len(head_VD))
    again = torch.is_grad_enabled() and len(x_MD) > chunk
    parts = [
        checkpoint(_logprobs, x, head_VD, target, use_reentrant=False, preserve_rng_state=False)
        if again
        else _logprobs(x, head_VD, target)
        for x, target in zip(x_MD.split(chunk), targets_M.split(chunk), strict=True)
    ]
    return torch.cat(parts)


def _logprobs(x_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> Tensor:
    logits_MV = F.linear(x_MD, head_VD.to(x_MD.dtype)).float()
    return logits_MV.gather(1, targets_M[:, None])[:, 0] - logits_MV.logsumexp(1)


# ------------------------------------------------------------------------------------- generation


def generate(
    model: Transformer,
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
    if not all(prompts) or batch_size < 1:
        raise ValueError("generate needs a token in each prompt, and batch_size >= 1")
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError("generate needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1")
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    pick = partial(sample_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    order = sorted((i for i in range(count) if budgets[i]), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        asked = [(prompts[i], budgets[i], seeds[i]) for i in rows]
        answers = _decode(model, asked, pick, frozenset(eos_ids), return_logprobs)
        for i, answer in zip(rows, answers, strict=True):
            tokens[i], logprobs[i] = answer
    return (tokens, logprobs) if return_logprobs else tokens


@torch.no_grad()
def _decode(
    model: Transformer,
    asked: list[tuple[list[int], int, int]],
    pick: Callable[..., Tensor],
    eos_ids: frozenset[int],
    scored: bool,
) -> list[tuple[list[int], list[float]]]:
    """One batch of `generate`, rows of (prompt, budget, seed): all prompts in one pass, then a
    token a row and step. Gives each row's tokens and their log-probs."""
    prompts, budgets = [row[0] for row in asked], [row[1] for row in asked]
    uniforms_BS = torch.zeros(len(asked), max(budgets), dtype=torch.float64)
    for uniforms, (_, budget, seed) in zip(uniforms_BS, asked, strict=True):
        uniforms[:budget].uniform_(generator=torch.Generator().manual_seed(seed))
    uniforms_BS = uniforms_BS.to(model.device)
    tokens: list[list[int]] = [[] for _ in asked]
    scores: list[list[float]] = [[] for _ in asked]
    lengths = [len(prompt) for prompt in prompts]
    cache = Cache(model, lengths, max(map(sum, zip(lengths, budgets, strict=True))))
    logits_BV = model(pad(prompts, 0, model.device), cache)
    rows = list(range(len(asked)))  # the prompt that each place of the batch belongs to
    for step in range(max(budgets)):
        picked_B = pick(logits_BV, uniforms_BS[:, step])
        for row, token in zip(rows, picked_B.tolist(), strict=True):
            tokens[row].append(token)
        if scored:
            logprobs = logits_BV.float().log_softmax(-1).gather(1, picked_B[:, None])
            for row, logprob in zip(rows, logprobs[:, 0].tolist(), strict=True):
                scores[row].append(logprob)
        going = [tokens[i][-1] not in eos_ids and len(tokens[i]) < budgets[i] for i in rows]
        if not all(going):
            kept = close_ranks(going)
            rows = [rows[place] for place in kept]
            picked_B, uniforms_BS = picked_B[kept], uniforms_BS[kept]
            cache.keep(kept)
        if not rows:
            break
        logits_BV = model(picked_B[:, None], cache.step())
    return list(zip(tokens, scores, strict=True))


def close_ranks(going: list[bool]) -> list[int]:
    """The places of the rows that go on, the last of them moved into the gaps: few move."""
    count = sum(going)
    movers = [place for place in range(count, len(going)) if going[place]]
    return [place if going[place] else movers.pop() for place in range(count)]


def sample_tokens(
    logits_BV: Tensor, uniforms_B: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Picks a token a row by inverting the distribution at a uniform number in [0, 1): (B,) int64.

    Temperature, then top-k (ties with the k-th stay), then top-p, as transformers orders them.
    Candidates stay in the order of their ids, so that a near-tie that rounding decides
    differently on two machines does not change which token a number falls on.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits = logits_BV.float().nan_to_num()  # an exploded model still gives some token
    logits, ids = (logits - logits.amax(-1, keepdim=True)) / temperature, None
    if 0 < top_k < logits.shape[1]:
        least = logits.topk(top_k).values[:, -1:]
        candidates = logits.topk(int((logits >= least).sum(-1).max()))
        ids, order = candidates.indices.sort()
        logits = candidates.values.gather(1, order)
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        rising, order = logits.sort(stable=True)
        cut = rising.softmax(-1).cumsum(-1) <= 1 - top_p
        cut[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), -math.inf)
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

    Raises InputError, before any is filled, as `find_weights` says.
    """
    files = find_weights(parameters, path)
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = _read(files[name], name)
            if not value.isfinite().all():
                raise InputError(f"{files[name]}: {name} holds values that are not finite")
            place(parameter, value)


def find_weights(parameters: Mapping[str, Tensor], path: str | Path) -> dict[str, Path]:
    """The file of each tensor in a folder, once all headers agree with the parameters, which may
    be on the meta device.

    Raises InputError for tensors that are missing, unexpected, misshapen or of another type. A
    tied head saved a second time is accepted where it equals the embedding, and so are the
    `rotary_emb.inv_freq` buffers of old files.
    """
    files = weight_files(Path(path))
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    extra = {n for n in files if n not in parameters and not n.endswith("rotary_emb.inv_freq")}
    for names, what in ((parameters.keys() - files, "missing"), (extra - {head}, "unexpected")):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise InputError(f"{path}: {len(names)} weights {what}, such as {some}")
    for file in sorted(set(files.values())):
        with open_safetensors(file) as opened:
            for name in parameters.keys() & opened.keys():
                saved, want = opened.get_slice(name), [*parameters[name].shape]
                got, dtype = saved.get_shape(), saved.get_dtype()
                if got != want or dtype not in ("F32", "F16", "BF16"):
                    raise InputError(
                        f"{file}: {name} is {dtype} {got}, not F32, F16 or BF16 {want}"
                    )
    if head in extra and not torch.equal(*(_read(files[n], n) for n in (head, embedding))):
        raise InputError(f"{path}: tie_word_embeddings is true, but {head} is not {embedding}")
    return files


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
            if twice := names.keys() & file.keys():
                raise InputError(f"{folder}: {min(twice)} is in {shard} and in another file")
            names |= dict.fromkeys(file.keys(), folder / shard)
    return names


def open_safetensors(path: Path) -> Any:
    """A reader of one file's tensors. Raises InputError where it is missing or garbled."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, ValueError, SafetensorError) as error:
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
    single, index = Path(path) / "model.safetensors", Path(path) / "model.safetensors.index.json"
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        sharded = f"model-{i:05}-of-{len(shards):05}.safetensors"
        file = single.name if len(shards) == 1 else sharded
        tensors = {name: fetch(name) for name in names}
        if write:
            save_file(tensors, Path(path) / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if write:  # of an earlier checkpoint in this folder, no file may be left that a loader prefers
        (index if len(shards) == 1 else single).unlink(missing_ok=True)
    if write and len(shards) > 1:
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
