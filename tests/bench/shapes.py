"""The models of random weights that the benchmarks run on, their pairs, and the product on them.

Import this first: it makes the product's modules importable, and tests/bench/sapo.py is not one.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402
from smollm2 import smollm2_folder  # noqa: E402

import data  # noqa: E402
import model as lm  # noqa: E402
import train  # noqa: E402
from data import Pair  # noqa: E402
from sapo import Source  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """A Llama, and the lengths of its pairs in tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    pairs: int = 2
    prompt: int = 256
    response: int = 256
    shared: int = 128  # by the last pair; the first shares 0, those between lie between
    lr: float = 1e-7  # at which one update moves the loss, and does not end it

    @property
    def body(self) -> int:
        """Weights of the blocks' matrices."""
        head_dim = self.hidden // self.heads
        attention = 2 * self.hidden * (self.hidden + self.kv_heads * head_dim)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head(self) -> int:
        """Weights of the head, which is not tied to the embedding."""
        return self.hidden * self.vocabulary

    @property
    def large(self) -> bool:
        """Whether two of these are too much for 141 GB, beside gradient and optimizer."""
        return self.body > 2e9

    @property
    def turns(self) -> bool:
        """Whether the sides are built, timed and freed one after another."""
        return self.body > 5e8

    def __str__(self) -> str:
        count = (self.body + 2 * self.head) / 1e6
        text = f"hidden {self.hidden}, {self.layers} layers, {self.heads}/{self.kv_heads} heads, "
        return text + f"vocabulary {self.vocabulary:,}, {count:,.0f} million weights"


SHAPES = {
    "tiny": Shape(32, 2, 4, 2, 64, 300, 2, 8, 8, 4, 1e-5),
    "small": Shape(384, 8, 6, 2, 1024, 32_000, 4),
    "wide": Shape(256, 4, 4, 2, 688, 128_256),
    "smollm2": Shape(576, 30, 9, 3, 1536, 49_152),  # the real model, of tests/smollm2.py
    "llama1b": Shape(2048, 16, 32, 8, 8192, 128_256, 8, lr=1e-8),
    "llama3b": Shape(3072, 28, 24, 8, 8192, 128_256, 8, lr=1e-8),
    "llama8b": Shape(4096, 32, 32, 8, 14336, 128_256, 8, lr=1e-8),
}


def write_model(shape: Shape, folder: Path, device: str) -> Path:
    """A model of random weights with the built-in tokenizer, in bf16 where it is large; once."""
    if shape == SHAPES["smollm2"]:
        return smollm2_folder()
    made = folder / f"{shape.hidden}-{shape.layers}-{shape.vocabulary}"
    if (made / "config.json").exists():
        return made
    raw = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "rms_norm_eps": 1e-5,
        "intermediate_size": shape.inner, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "max_position_embeddings": 8192,
        "eos_token_id": 256, "bos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    with torch.device("meta"):
        model = lm.Transformer(lm.Config.from_dict(raw))
    model = model.to(torch.bfloat16 if shape.large else torch.float32).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.fill_(1)
        else:
            std = 0.02 if "embed" in name else parameter.shape[1] ** -0.5
            parameter.data.normal_(0, std, generator=generator)
    model.save_pretrained(made)
    data.write_task_tokenizer(made)
    return made


def make_pairs(shape: Shape, seed: int) -> list[Pair]:
    """Random tokens, EOS never among them; the lengths are the same for every seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(260, shape.vocabulary, (count,), generator=generator).tolist()

    pairs = []
    for i in range(shape.pairs):
        alike = draw(shape.shared * i // max(1, shape.pairs - 1))
        sides = [alike + draw(shape.response - len(alike)) for _ in range(2)]
        pairs.append(Pair(draw(shape.prompt), *sides))
    return pairs


class Machine(train.Ranks):
    """The product's ranks on the device that was asked for.

    `one`: the reference is the policy itself, which is right as long as its log-probs are taken
    before the first update and kept: for models of which two do not fit.
    """

    def __init__(self, device: str, one: bool = False) -> None:
        super().__init__()
        # Device "cuda" is not "cuda:0", and a model that is there already would be copied.
        self.device, self.one = torch.device(device, 0 if device == "cuda" else None), one

    def build(self, folder: Path, config: train.Config, role: str) -> lm.Transformer:
        """As the product does, but for `one`."""
        if role == "policy" or not self.one:
            self.last = super().build(folder, config, role)
        return self.last


def source_of(
    kind: type[Source], folder: Path, rows: list[Pair], ranks: Machine, flags: Sequence[object]
) -> Any:
    """A source of the product's on rows of tokens, handed a learner as train.py makes it."""
    argv = ["--model", folder, "--data", "none", "--schedule", "constant", "--warmup", 0, *flags]
    config = train.parse_args([*map(str, argv)])
    tokenizer = data.load_tokenizer(folder)
    return kind(rows, train.Learner(config, folder, tokenizer, ranks, *kind.roles))


def step(source: Source, t: int) -> dict[str, float]:
    """The product's step from t to t + 1; its row."""
    learner: Any = source.run
    return train.step(learner.config, learner, source, t)[2]
