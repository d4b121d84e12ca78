"""The transformer: Llama, Mistral and Qwen2 checkpoints, in plain PyTorch.

    model = Transformer.from_pretrained("path/to/checkpoint")
    logits = model(tokens)                                        # (B, T) int64 -> (B, T, V)
    answers = generate(model, [[1, 2, 3]], max_new_tokens=16)     # new tokens only
    chosen, rejected, n_chosen, n_rejected = pair_logprobs(model, pairs)

The parameters carry Hugging Face's names, so weights load and save without renaming.

One stack of blocks serves three uses. What differs between them is a `Layout`: which position a
token has, which tokens it sees, and where the head is needed.

    Layout     plain rows: each token sees itself and what is before it; logits everywhere
    Packed     sequences of any lengths, one behind the other in one row
    Branches   training: of each pair the common prefix once, and two tails that branch from it
    Prompts    generation: the prompts, whose keys and values fill a static cache
    Cache      generation: one token more in each row

This file knows nothing of training, and nothing of `torch.distributed`.

Shapes: B rows, T tokens, S stored keys, V vocabulary, D hidden size, H query heads, K key-value
heads, G = H / K, E head size, N pairs, M scored tokens. A suffix spells a shape: q_BHTE.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

Count = Annotated[int, 1, 10**9]
Whole = Annotated[int, 0, 10**9]
Positive = Annotated[float, 1e-30, 1e6]
Weight = Annotated[float, 0.0, 1e6]
Share = Annotated[float, 0.0, 1.0]


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


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns the errors of reading a malformed foreign file into InputError: nothing is ignored."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OSError) as error:
        raise InputError(f"{what} is malformed ({type(error).__name__}: {error})") from None


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
    """Cosines and signed sines for positions (B or 1, T): two (B or 1, T, 1, E), computed in
    float32. The sines of the first half of the channels are negative, as `rotate` wants them."""
    freqs = frequencies(config.rope, config.head_dim, positions.device)
    angles = positions[:, :, None, None].float() * freqs
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


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
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


# ----------------------------------------------------------------------------------- the layouts


class Layout:
    """Plain rows: every token sees itself and what is before it. The base of the others."""

    def __init__(self, tokens: Tensor) -> None:
        self.positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (B or 1, T)

    def prepare(self, windows: Sequence[int | None], dtype: torch.dtype) -> None:
        """Builds what is added to the attention scores, once per forward pass: not per layer, and
        not within a block, whose recomputation or compilation would find it there already."""
        self.biases: dict[int | None, Any] = {w: self.bias(w, dtype) for w in set(windows)}

    def bias(self, window: int | None, dtype: torch.dtype) -> Any:
        """What `attend` needs for layers of this window: `causal_bias`, here."""
        count = self.positions.shape[1]
        return causal_bias(count, count, window, dtype, self.positions.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None) -> Tensor:
        """Queries (B, H, T, E), keys and values (B, K, T, E) -> (B, H, T, E)."""
        return attention(q, k, v, self.biases[window])

    def read(self, x_BTD: Tensor, head_VD: Tensor) -> Tensor:
        """The logits of every position, (B, T, V)."""
        return F.linear(x_BTD, head_VD.to(x_BTD.dtype))


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention, causal where no bias is added to the scores."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=grouped
    )


def causal_bias(
    queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """(queries, keys) for queries that are the last of the keys' tokens: 0 where one is seen, -inf
    elsewhere. None where SDPA's own causal mask says the same."""
    if queries == keys and (window is None or keys <= window):
        return None
    at = torch.arange(keys, device=device)
    behind = at[keys - queries :, None] - at
    return additive((behind >= 0) & (behind < (window or keys)), dtype)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere: SDPA would make this of a bool mask in every layer."""
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return zeros.masked_fill_(~visible, -math.inf)


class Packed(Layout):
    """Sequences one behind the other in one row of T tokens, so that nothing is padded.

    `sizes` are their tokens. A sequence sees before its own the first tokens of the sequence before
    it, as many as `prefixes` says, and its positions go on from there.
    """

    def __init__(self, sizes: list[int], prefixes: list[int], device: torch.device) -> None:
        self.sizes, self.prefixes = sizes, prefixes
        both = zip(prefixes, sizes, strict=True)
        positions = [at for prefix, size in both for at in range(prefix, prefix + size)]
        self.positions = torch.tensor([positions], device=device)

    def prepare(self, windows: Sequence[int | None], dtype: torch.dtype) -> None:
        """As Layout's, but in half precision on CUDA, where one kernel takes all sequences."""
        device = self.positions.device
        self.one_kernel = has_kernel(device, dtype)
        if self.one_kernel:
            keys = [*map(sum, zip(self.prefixes, self.sizes, strict=True))]
            self.most = (max(self.sizes), max(keys))
            self.ends = [  # of each sequence's queries and keys
                torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
                for counts in (self.sizes, keys)
            ]
        else:
            super().prepare(windows, dtype)

    def bias(self, window: int | None, dtype: torch.dtype) -> list[Tensor | None]:
        """One `causal_bias` for each sequence."""
        device, both = self.positions.device, zip(self.prefixes, self.sizes, strict=True)
        return [causal_bias(size, prefix + size, window, dtype, device) for prefix, size in both]

    def seen(self, x_BKTE: Tensor) -> list[Tensor]:
        """The keys, or the values, that each sequence sees."""
        parts = list(x_BKTE.split(self.sizes, dim=2))
        for i, prefix in enumerate(self.prefixes):
            if prefix:
                parts[i] = torch.cat((parts[i - 1][:, :, :prefix], parts[i]), dim=2)
        return parts

    @torch.compiler.disable  # the sizes change with every batch
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None) -> Tensor:
        """As Layout's, with B = 1."""
        if self.one_kernel:  # its window counts the tokens before the query; -1 is all of them
            group, left = q.shape[1] // k.shape[1], -1 if window is None else window - 1
            both = [torch.cat(self.seen(x.repeat_interleave(group, 1)), 2) for x in (k, v)]
            q_THE, k_SHE, v_SHE = (x[0].transpose(0, 1) for x in (q, *both))
            sizes: Any = (*self.ends, *self.most)
            o_THE: Any = varlen_attn(q_THE, k_SHE, v_SHE, *sizes, window_size=(left, 0))
            return o_THE.transpose(0, 1)[None]
        sequences = (q.split(self.sizes, dim=2), self.seen(k), self.seen(v), self.biases[window])
        return torch.cat([attention(*one) for one in zip(*sequences, strict=True)], dim=2)


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `varlen_attn` runs there."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


class Prompts(Packed):
    """The prompts of a batch, whose keys and values fill a cache."""

    def __init__(self, prompts: list[list[int]], cache: "Cache") -> None:
        device, lengths = cache.keys.device, [len(prompt) for prompt in prompts]
        super().__init__(lengths, [0] * len(lengths), device)
        self.cache = cache
        self.tokens = torch.tensor([[token for prompt in prompts for token in prompt]]).to(device)
        rows = torch.arange(len(lengths), device=device)
        self.rows = rows.repeat_interleave(torch.tensor(lengths, device=device))
        self.last = torch.tensor([end - 1 for end in accumulate(lengths)], device=device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None) -> Tensor:
        """As Packed's; stores k and v."""
        for stored, x in ((self.cache.keys, k), (self.cache.values, v)):
            stored[layer][self.rows, :, self.positions[0]] = x[0].transpose(0, 1)
        return super().attend(q, k, v, layer, window)

    def read(self, x_BTD: Tensor, head_VD: Tensor) -> Tensor:
        """The logits of each prompt's last token, (B, V)."""
        return F.linear(x_BTD[0, self.last], head_VD.to(x_BTD.dtype))


class Cache(Layout):
    """A static key-value cache of B rows, to which each `step` adds a token.

    `lengths` are the tokens that its rows have, `size` the most that one will have. A step reads
    `width` of them, a multiple of `grain`, so that its shapes change rarely.
    """

    def __init__(self, model: Transformer, lengths: list[int], size: int, grain: int = 1) -> None:
        config, dtype = model.config, model.compute_dtype or model.dtype
        shape = (config.num_layers, len(lengths), config.num_kv_heads, size, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=model.device)
        self.values = torch.zeros(shape, dtype=dtype, device=model.device)
        self.lengths, self.size, self.grain = lengths, size, grain
        self.positions = torch.tensor(lengths, device=model.device)[:, None] - 1

    def step(self) -> "Cache":
        """Makes ready for one more token in each row, (B, 1)."""
        # A row that has stopped, but was kept, may go on past the end: it stays on the last place.
        self.positions = (self.positions + 1).clamp_max(self.size - 1)
        self.lengths = [length + 1 for length in self.lengths]
        self.rows = torch.arange(len(self.lengths), device=self.keys.device)
        self.width = min(self.size, -(-max(self.lengths) // self.grain) * self.grain)
        return self

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these. A row whose place stays the same is not copied."""
        for new, old in enumerate(rows):
            if new != old:
                self.keys[:, new], self.values[:, new] = self.keys[:, old], self.values[:, old]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        self.lengths, self.positions = [self.lengths[row] for row in rows], self.positions[rows]

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(B, 1, 1, S), for the one query of each row."""
        places = torch.arange(self.width, device=self.positions.device)[None]
        near = True if window is None else places > self.positions - window
        return additive((places <= self.positions) & near, dtype)[:, None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None) -> Tensor:
        """As Layout's, with T = 1; stores k and v, and attends to all that is stored."""
        keys_BKSE, values_BKSE, last = self.keys[layer], self.values[layer], self.positions[:, 0]
        keys_BKSE[self.rows, :, last], values_BKSE[self.rows, :, last] = k[:, :, 0], v[:, :, 0]
        # One query a row: two small products by hand cost less than SDPA's set-up. The query
        # heads of a group (G) become the rows of one product with the key head they share.
        q_BKGE = q.unflatten(1, (k.shape[1], -1))[:, :, :, 0] * q.shape[-1] ** -0.5
        scores_BKGS = q_BKGE @ keys_BKSE[:, :, : self.width].transpose(-1, -2)
        scores_BKGS = scores_BKGS + self.biases[window]
        weights_BKGS = scores_BKGS.float().softmax(-1).to(q.dtype)
        return (weights_BKGS @ values_BKSE[:, :, : self.width]).flatten(1, 2)[:, :, None]

    def read(self, x_BTD: Tensor, head_VD: Tensor) -> Tensor:
        """The logits of each row's last token, (B, V)."""
        x_BD, head_VD = x_BTD[:, 0], head_VD.to(x_BTD.dtype)
        if x_BD.is_cpu and len(x_BD) > 2:  # twice as fast there as x @ head^T
            return (head_VD @ x_BD.T).T
        return F.linear(x_BD, head_VD)


class Branches(Packed):
    """Trees: of each pair its common prefix once, then both tails, which see the prefix and
    themselves. Its first sequence is prefix and chosen tail, its second the rejected tail.

    What is read out are the M log-probs of response tokens, in the order of `lengths`: for each
    pair those shared, those of the chosen tail, those of the rejected tail.
    """

    def __init__(self, pairs: Sequence[Any], device: torch.device) -> None:
        tokens: list[int] = []
        places: list[int] = []  # where each scored token is predicted
        targets: list[int] = []
        sizes: list[int] = []
        prefixes: list[int] = []
        self.lengths: list[int] = []
        for prompt, chosen, rejected in pairs:
            if not prompt:
                raise ValueError("a pair needs a prompt, or its first token has no context")
            shared, start = common_prefix(chosen, rejected), len(tokens)
            tail = rejected[shared:]
            prefix, fork = len(prompt) + shared, len(prompt) + len(chosen)
            tokens += [*prompt, *chosen, *tail]
            places += range(start + len(prompt) - 1, start + fork - 1)
            places += [start + prefix - 1, *range(start + fork, len(tokens) - 1)][: len(tail)]
            targets += [*chosen, *tail]
            sizes += [fork, len(tail)] if tail else [fork]
            prefixes += [0, prefix] if tail else [0]
            self.lengths += [shared, fork - prefix, len(tail)]
        super().__init__(sizes, prefixes, device)
        self.tokens = torch.tensor([tokens], device=device)
        self.places = torch.tensor(places, dtype=torch.int64, device=device)  # (M,)
        self.targets = torch.tensor(targets, dtype=torch.int64, device=device)  # (M,)

    def read(self, x_BTD: Tensor, head_VD: Tensor) -> Tensor:
        """The log-probs of the response tokens, (M,) float32."""
        return token_logprobs(x_BTD[0].index_select(0, self.places), head_VD, self.targets)


def tree_size(pair: Any) -> int:
    """The tokens that `Branches` computes for a pair: what both sides begin with counts once."""
    prompt, chosen, rejected = pair
    return len(prompt) + len(chosen) + len(rejected) - common_prefix(chosen, rejected)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    both = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in both if a != b), min(len(left), len(right)))


# ------------------------------------------------------------------------------ log-probabilities

# How many logits exist at a time: 64 MiB in float32 on a CPU, where caches are small, 512 MiB on a
# GPU, whose matrix units starve on few rows; and how many exponentials wait for the backward pass.
LOGITS = {"cpu": 2**24, "cuda": 2**27}
KEPT = 2**26


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
    """log softmax(x @ head^T)[target] in float32, (M,)."""
    keep = KEPT if torch.is_grad_enabled() else 0
    return TokenLogprobs.apply(x_MD, head_VD, targets_M, keep)


class TokenLogprobs(torch.autograd.Function):
    """log softmax(x @ head^T)[target] in chunks of rows, of which each has `LOGITS` logits.

    For the backward pass the first `keep` exponentials stay; chunks beyond are computed again. The
    gradient g of a log-prob is g (onehot(target) - softmax) for its logits, and takes the place of
    the exponentials: autograd would fill some five arrays of tokens x vocabulary on the way, and
    one of (V, D) for each chunk.
    """

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, head_VD: Tensor, targets_M: Tensor, keep: int) -> Tensor:
        """(M,) float32."""
        ctx.save_for_backward(x_MD, head_VD, targets_M)
        ctx.rows = max(1, LOGITS[x_MD.device.type] // len(head_VD))
        ctx.kept, parts = [], []
        head = head_VD.to(x_MD.dtype)
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
    logits_MV = F.linear(x_MD, head_VD).float()
    logits_MV -= logits_MV.amax(1, keepdim=True)
    picked_M1 = logits_MV.gather(1, targets_M[:, None])
    exp_MV = logits_MV.exp_()
    sums_M1 = exp_MV.sum(1, keepdim=True)
    return exp_MV, sums_M1, (picked_M1 - sums_M1.log())[:, 0]


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
    on_cpu, single = model.device.type == "cpu", model.compute_dtype in (None, torch.float32)
    if on_cpu and single and model.dtype == torch.float32 and len(order) > 1 and max(budgets) >= 32:
        model = by_columns(model)  # costs what some ten steps gain
    decode = partial(_decode, model, pick=pick, eos_ids=frozenset(eos_ids), scored=return_logprobs)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        asked = [(prompts[i], budgets[i], seeds[i]) for i in rows]
        answers = decode(asked, record=None if on_cpu else record_graph)
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
    record: "Callable[..., Any] | None" = None,
) -> list[tuple[list[int], list[float]]]:
    """One batch of `generate`, rows of (prompt, budget, seed): all prompts in one pass, then a
    token a row and step. Gives each row's tokens and their log-probs.

    A row that has stopped leaves the batch. Where steps are recorded (`record`, see `Replays`), and
    a change of shape is dear, it waits until half of the rows have.
    """
    prompts, budgets = [row[0] for row in asked], [row[1] for row in asked]
    uniforms_BS = torch.zeros(len(asked), max(budgets), dtype=torch.float64)
    for uniforms, (_, budget, seed) in zip(uniforms_BS, asked, strict=True):
        uniforms[:budget].uniform_(generator=torch.Generator().manual_seed(seed))
    uniforms_BS = uniforms_BS.to(model.device)
    tokens: list[list[int]] = [[] for _ in asked]
    scores: list[list[float]] = [[] for _ in asked]
    lengths = [len(prompt) for prompt in prompts]
    size = max(map(sum, zip(lengths, budgets, strict=True)))
    cache = Cache(model, lengths, size, grain=128 if record else 1)
    decode = Replays(model, record) if record else model
    layout = Prompts(prompts, cache)
    logits_BV = model(layout.tokens, layout)
    rows = list(range(len(asked)))  # the prompt that each place of the batch belongs to
    going = [True] * len(rows)
    for step in range(max(budgets)):
        picked_B = pick(logits_BV, uniforms_BS[:, step])
        told: list[Any] = [(tokens, picked_B.tolist())]
        if scored:
            logprobs = logits_BV.float().log_softmax(-1).gather(1, picked_B[:, None])
            told.append((scores, logprobs[:, 0].tolist()))
        for lists, values in told:
            for row, goes, value in zip(rows, going, values, strict=True):
                if goes:
                    lists[row].append(value)
        going = [tokens[i][-1] not in eos_ids and len(tokens[i]) < budgets[i] for i in rows]
        if not any(going):
            break
        if sum(going) <= len(going) // 2 or not (record or all(going)):
            kept = close_ranks(going)
            rows, going = [rows[place] for place in kept], [True] * len(kept)
            picked_B, uniforms_BS = picked_B[kept], uniforms_BS[kept]
            cache.keep(kept)
        logits_BV = decode(picked_B[:, None], cache.step())
    return list(zip(tokens, scores, strict=True))


def close_ranks(going: list[bool]) -> list[int]:
    """The places of the rows that go on, the last of them moved into the gaps: few move."""
    count = sum(going)
    movers = [place for place in range(count, len(going)) if going[place]]
    return [place if going[place] else movers.pop() for place in range(count)]


class Replays:
    """Decoding steps, recorded when their shape changes (rows, stored tokens read) and replayed
    with new numbers in the recorded tensors: on a GPU one launch in place of hundreds.

    `record(step)` gives a function that does what step() does, and the tensor it fills.
    """

    def __init__(self, model: Transformer, record: Callable[..., Any]) -> None:
        self.model, self.record, self.shape = model, record, (0, 0)

    def __call__(self, tokens_B1: Tensor, cache: Cache) -> Tensor:
        """What the model gives for one more token in each row, (B, V)."""
        now = cache.positions
        if self.shape != (len(now), cache.width):
            self.shape = (len(now), cache.width)
            self.tokens, self.positions = tokens_B1.clone(), now.clone()
            cache.positions = self.positions
            self.replay, self.logits_BV = self.record(lambda: self.model(self.tokens, cache))
            cache.positions = now
        self.tokens.copy_(tokens_B1)
        self.positions.copy_(now)
        self.replay()
        return self.logits_BV


def record_graph(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Records a step as a CUDA graph, once it has run and the libraries have set themselves up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


def by_columns(model: Transformer) -> Transformer:
    """The same model, the blocks' matrices copied and stored by columns: that halves the time of
    their products with few rows on a CPU in float32."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    for name, weight in weights.items():
        if ".layers." in name and weight.dim() == 2:
            weights[name] = weight.t().contiguous().t()
    return with_weights(model.config, weights)


def with_weights(config: Config, weights: Mapping[str, Tensor]) -> Transformer:
    """A model that holds these tensors themselves as its weights."""
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


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
    logits, ids = logits_BV.float(), None
    if 0 < top_k < logits.shape[1]:
        best = logits.topk(top_k + 1)
        least = best.values[:, top_k - 1 : top_k]
        if (best.values[:, top_k:] == least).any():
            best = logits.topk(int((logits >= least).sum(-1).max()))
        ids, order = best.indices.sort()
        logits = best.values.gather(1, order)
        logits = logits.masked_fill(logits < least, -math.inf)
    logits = logits.nan_to_num(neginf=-math.inf)  # an exploded model still gives some token
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
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
