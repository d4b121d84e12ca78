"""Text to tokens: tokenizers, chat templates, data files, and the built-in tasks.

    tokenizer = load_tokenizer("path/to/checkpoint")
    examples = load_examples(["train.jsonl"])                         # text
    pairs, counts = encode_examples(examples, tokenizer, 2048, 1792)  # token ids
    examples = task_examples("pretrain", 100_000, seed=42)            # the same, made up

Three kinds of tokenizer are read, and `transformers` is needed for none of them:

    tokenizer.json   byte-level BPE (Llama 3, Qwen2.5, SmolLM2)   through tiktoken
    tokenizer.model  SentencePiece (Llama 2, Mistral)             through sentencepiece
    tokenizer.model  tiktoken's own format (Llama 3)              through tiktoken

Ids equal those of transformers, with these exceptions: a `tokenizer.model` encodes a leading space
as SentencePiece does, which transformers 5 does not; a run of white space beyond 100,000 characters
is encoded in parts; and next to a byte that a vocabulary lacks, nothing is merged across it.

Whatever a file holds, what is wrong with it is an `InputError` of one line.
"""

import base64
import binascii
import json
import random
import re
import string
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox
import sentencepiece
import tiktoken

from model import InputError, hash_seed, read_json

Messages = Sequence[Mapping[str, str]]  # {"role": ..., "content": ...}, oldest first


class Pair(NamedTuple):
    """A prompt with a better and a worse response, as token ids. `rejected` may be empty."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Example:
    """One row of a data file, or one built-in task, as text."""

    messages: tuple[dict[str, str], ...]  # all turns before the response
    response: str  # gold, or chosen
    rejected: str | None
    where: str  # "file:line", for messages to people


# ----------------------------------------------------------------------------- examples to tokens


def encode_examples(
    examples: Sequence[Example], tokenizer: "Tokenizer", max_length: int, max_prompt_length: int
) -> tuple[list[Pair], dict[str, int]]:
    """Pairs of token ids that fit, and how many rows were read, dropped and cut.

    A row whose prompt has `max_prompt_length` tokens or more is dropped (the official SAPO code's
    rule); responses are cut so that prompt and response have at most `max_length` tokens.
    Raises InputError where no row is left, and for a row that the chat template refuses.
    """
    if not 0 < max_prompt_length <= max_length:
        raise InputError(
            f"max prompt length {max_prompt_length} is not between 1 and max length {max_length}"
        )
    counts = {"rows": len(examples), "dropped_prompt": 0, "cut_response": 0, "cut_rejected": 0}
    pairs = []
    for example in examples:
        pair = encode_example(tokenizer, example)
        room = max_length - len(pair.prompt)
        if len(pair.prompt) >= max_prompt_length:
            counts["dropped_prompt"] += 1
            continue
        counts["cut_response"] += len(pair.chosen) > room
        counts["cut_rejected"] += len(pair.rejected) > room
        pairs.append(Pair(pair.prompt, pair.chosen[:room], pair.rejected[:room]))
    if not pairs:
        raise InputError(
            f"none of the {len(examples)} rows is left: their prompts have {max_prompt_length} "
            "tokens or more; raise --max-prompt-length"
        )
    return pairs, counts


def encode_example(tokenizer: "Tokenizer", example: Example) -> Pair:
    """The row's tokens, nothing dropped or cut. Raises InputError naming the row."""
    try:
        prompt = tokenizer.render(example.messages, add_generation_prompt=True)
        answers = [a for a in (example.response, example.rejected) if a is not None]
        responses = [_response_ids(tokenizer, example.messages, prompt, a) for a in answers]
    except InputError as error:
        raise InputError(f"{example.where}: {error}") from None
    return Pair(tokenizer.encode(prompt), responses[0], responses[1] if responses[1:] else [])


def _response_ids(tokenizer: "Tokenizer", messages: Messages, prompt: str, answer: str) -> list[int]:
    """What the template for the whole conversation adds to the prompt, through its last EOS."""
    whole = tokenizer.render([*messages, {"role": "assistant", "content": answer}])
    if not whole.startswith(prompt):
        raise InputError(
            "the chat template's prompt is no prefix of the conversation that it renders; "
            "choose another by --chat-template"
        )
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(whole)
    if ids[: len(prompt_ids)] == prompt_ids:
        ids = ids[len(prompt_ids) :]
    else:  # merged across the boundary; when generating, the prompt's tokens are there first
        ids = tokenizer.encode(whole[len(prompt) :], continuing=True)
    return tokenizer.end_turn(ids)


# -------------------------------------------------------------------------------------- data files

ROLES = ("system", "user", "assistant")
RESPONSE_KEYS = ("chosen", "real", "response", "messages")  # the first that a row has counts
REJECTED_KEYS = ("rejected", "generated")


def load_examples(
    paths: str | Path | Sequence[str | Path], rejected: bool = False
) -> list[Example]:
    """The rows of JSON or JSONL files, in order.

    Rows are `{"messages"}`, `{"prompt", "chosen", "rejected"}`, `{"prompt", "response"}` or
    `{"real", "generated"}`; each side is text or a list of messages, with or without the prompt
    before it. `rejected`: every row must have a rejected side, which is else not even looked at.
    Raises InputError naming file and line.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    examples = [
        _example(row, where, rejected) for file in files for where, row in _rows(Path(file))
    ]
    if not examples:
        raise InputError(f"no rows in {', '.join(map(str, files)) or 'no file'}: give at least one")
    return examples


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """("file:line", value) for each row of a JSON list or of JSON lines."""
    if not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'missing'}, not a data file")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text; convert the file") from None
    if not text.strip():
        raise InputError(f"{path} is empty; it should hold JSON or JSONL rows")
    yield from _list_rows(path, text) if text.lstrip()[0] == "[" else _line_rows(path, text)


def _line_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # U+2028 may stand in a string: no lines()
        if line.strip():
            where = f"{path}:{number}"
            yield where, _parse(line.strip(), 0, where)[0]


def _list_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The elements of one JSON list, read one by one, so that each has its line."""
    at, line, between = 0, 1, "["
    while True:
        start = re.compile(rf"\s*{re.escape(between)}\s*").match(text, at)
        if start is None:
            break
        line += text.count("\n", at, start.end())
        where = f"{path}:{line}"
        row, end = _parse(text, start.end(), where)
        yield where, row
        line += text.count("\n", start.end(), end)
        at, between = end, ","
    if text[at:].strip() != "]":
        raise InputError(f"{path}:{line}: expected ',' or the ']' that ends the file")


def _parse(text: str, at: int, where: str) -> tuple[Any, int]:
    """The JSON value that starts at `at`, and where it ends."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({_line(error)})") from None
    if at == 0 and end < len(text):
        raise InputError(f"{where}: more than one JSON value; write one row a line")
    return value, end


def _example(row: Any, where: str, rejected: bool) -> Example:
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row should be a JSON object, not {_kind(row)}")
    key = next((k for k in RESPONSE_KEYS if k in row), None)
    if key is None:
        raise InputError(f"{where}: no {', '.join(map(repr, RESPONSE_KEYS))} in the row")
    prompt = _turns(row["prompt"], "prompt", "user", where) if row.get("prompt") else []
    messages, response = _side(row, key, prompt, where)
    if not rejected:
        return Example(tuple(messages), response, None, where)
    other = next((k for k in REJECTED_KEYS if k in row), None)
    if other is None:
        raise InputError(f"{where}: this method compares, and the row has no 'rejected'")
    context, answer = _side(row, other, messages, where)
    if context != messages:
        raise InputError(f"{where}: {key!r} and {other!r} answer different prompts")
    return Example(tuple(messages), response, answer, where)


def _side(
    row: dict[str, Any], key: str, prompt: list[dict[str, str]], where: str
) -> tuple[list[dict[str, str]], str]:
    """(the turns before the response, the response). `prompt`: the turns known from elsewhere."""
    turns = _turns(row[key], key, "assistant", where)
    if turns[-1]["role"] != "assistant":
        raise InputError(f"{where}: {key!r} should end with an assistant's turn")
    context, response = turns[:-1], turns[-1]["content"]
    if turns[0]["role"] == "assistant":
        context = prompt + context
    if not any(turn["role"] == "user" for turn in context):
        raise InputError(f"{where}: no user's turn before the response in {key!r}; add 'prompt'")
    n = len(prompt)
    if prompt and context[:n] != prompt and context[-n:] != prompt:
        if prompt[-len(context) :] != context:
            raise InputError(f"{where}: {key!r} does not answer the row's prompt")
        context = prompt  # which has a system turn that this side leaves out
    return context, response


def _turns(value: Any, key: str, role: str, where: str) -> list[dict[str, str]]:
    """A list of turns, from one, or from the text of one turn of `role`."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {key!r} should be text or a list of turns, not {_kind(value)}")
    return [_turn(turn, f"{where}: {key!r}, turn {i}") for i, turn in enumerate(value, 1)]


def _turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
        raise InputError(f"{where}: should be an object with 'role' and 'content'")
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise InputError(f"{where}: role {_short(role)} is not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise InputError(f"{where}: 'content' should be text, not {_kind(content)}")
    if role != "system" and not content.strip():
        raise InputError(f"{where}: the {role}'s text is empty; fill it, or leave out the row")
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    """How a person would call a JSON value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    empty = "an empty " if value in ([], {}) else ""
    name = names.get(type(value), "null" if value is None else f"a number ({_short(value)})")
    return empty + name.split(" ")[-1] if empty else name


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _line(error: BaseException) -> str:
    """An error's message in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turns the errors of reading a malformed foreign file into InputError: nothing is ignored."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        detail = f"{type(error).__name__}: {_line(error)}"
        raise InputError(f"{what} is malformed ({detail}); copy it from the checkpoint") from None


# -------------------------------------------------------------------------------------- tokenizers

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    "generation_config.json",
)
SPECIAL_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # each with _token behind it


class Added(NamedTuple):
    """A token that is found in the text before anything else is done with it."""

    id: int
    text: str
    lstrip: bool = False  # it swallows the white space to its left
    rstrip: bool = False
    single_word: bool = False  # it is not found within a word
    normalized: bool = False  # it is looked for in the normalized text


class Tokenizer:
    """A checkpoint's tokenizer and chat template. Made by `load_tokenizer`.

    eos_ids: what may end an assistant's turn, the tokenizer's own EOS first.
    vocab_size: the largest id + 1.
    """

    def __init__(self, folder: Path, codec: "Codec", chat_template: str | None) -> None:
        self.files = {f: (folder / f).read_bytes() for f in TOKENIZER_FILES if _exists(folder / f)}
        config = read_json(folder / "tokenizer_config.json") if self._has(folder) else {}
        self.codec = codec
        self.specials = codec.specials | _special_tokens(folder, config)
        self.added = _added_tokens(codec, config, folder, self.specials)
        plain = {text: token for text, token in self.added.items() if not token.normalized}
        other = {codec.normalize(t): token for t, token in self.added.items() if token.normalized}
        self.searches = [(_any_of(tokens), tokens) for tokens in (plain, other) if tokens]
        self.vocab_size = max([*codec.ids, *(token.id for token in self.added.values())]) + 1
        self.template = _template(folder, config, chat_template, self)
        self.eos_ids, self.template_ends = _eos_ids(folder, self)
        if chat_template is not None:
            self.files["chat_template.jinja"] = FALLBACKS[chat_template][0].encode()

    @staticmethod
    def _has(folder: Path) -> bool:
        return _exists(folder / "tokenizer_config.json")
