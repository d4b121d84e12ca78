"""Text to tokens: tokenizers, chat templates, data files, and the built-in tasks.

    tokenizer = load_tokenizer("path/to/checkpoint")
    examples = load_examples(["train.jsonl"])                         # text
    pairs, counts = encode_examples(examples, tokenizer, 2048, 1792)  # token ids
    examples = task_examples("pretrain", 100_000, seed=42)            # the same, made up

Three kinds of tokenizer are read, and `transformers` is needed for none of them:

    tokenizer.json   byte-level BPE (Llama 3, Qwen2.5, SmolLM2)   through tiktoken
    tokenizer.model  SentencePiece (Llama 2, Mistral)             through sentencepiece
    tokenizer.model  tiktoken's own format (Llama 3)              through tiktoken

Ids equal those of transformers, with these exceptions. Runs of spaces, and leading ones, are what
SentencePiece itself makes of them, which transformers 5 does not do. A run of white space beyond
100,000 characters is encoded in parts. Nothing is merged across a byte that the vocabulary lacks
(SmolLM2's lacks a few control characters). NFC is that of Python's Unicode.

Whatever a file holds, what is wrong with it is an `InputError` of one line.
"""

import base64
import http.client
import json
import random
import re
import string
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from difflib import SequenceMatcher
from email.utils import parsedate_to_datetime
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox
import sentencepiece
import tiktoken

from model import InputError, hash_seed, read_json

Messages = Sequence[Mapping[str, str]]  # {"role": ..., "content": ...}, oldest first


class Cut(NamedTuple):
    start: int
    stop: int
    new_stop: int
    logp: float


class Pair(NamedTuple):
    """A prompt with a better and a worse response, as token ids. `rejected` may be empty."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    cut: "Cut | None" = None


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
    pairs, kept = [], []
    for example in examples:
        pair = encode_example(tokenizer, example)
        room = max_length - len(pair.prompt)
        if len(pair.prompt) >= max_prompt_length:
            counts["dropped_prompt"] += 1
            continue
        counts["cut_response"] += len(pair.chosen) > room
        counts["cut_rejected"] += len(pair.rejected) > room
        kept.append(example)
        pairs.append(Pair(pair.prompt, pair.chosen[:room], pair.rejected[:room]))
    if not pairs:
        raise InputError(
            f"none of the {len(examples)} rows is left: their prompts have {max_prompt_length} "
            "tokens or more; raise --max-prompt-length"
        )
    return kept, pairs, counts


def encode_example(tokenizer: "Tokenizer", example: Example) -> Pair:
    """The row's tokens, nothing dropped or cut. Raises InputError naming the row."""
    try:
        text = tokenizer.render(example.messages, add_generation_prompt=True)
        prompt = tokenizer.encode(text)
        if not prompt:
            raise InputError("the chat template makes an empty prompt; choose another")
        chosen = _response_ids(tokenizer, example.messages, text, prompt, example.response)
        if example.rejected is None:
            return Pair(prompt, chosen, [])
        rejected = _response_ids(tokenizer, example.messages, text, prompt, example.rejected)
        return Pair(prompt, chosen, rejected)
    except InputError as error:
        raise InputError(f"{example.where}: {error}") from None


def _response_ids(
    tokenizer: "Tokenizer", messages: Messages, text: str, prompt: list[int], answer: str
) -> list[int]:
    """What the template for the whole conversation adds to the prompt, through its last EOS."""
    whole = tokenizer.render([*messages, {"role": "assistant", "content": answer}])
    if not whole.startswith(text):
        raise InputError(
            "the chat template's prompt is no prefix of the conversation that it renders; "
            "choose another by --chat-template"
        )
    ids = tokenizer.encode(whole)
    if ids[: len(prompt)] == prompt:
        return tokenizer.end_turn(ids[len(prompt) :])
    # Merged across the boundary. When generating, the prompt's tokens are there first.
    return tokenizer.end_turn(tokenizer.encode(whole[len(text) :], continuing=True))


# -------------------------------------------------------------------------------------- data files

ROLES = ("system", "user", "assistant")
RESPONSE_KEYS = ("chosen", "real", "response", "messages")  # the first that a row has counts
REJECTED_KEYS = ("rejected", "generated")


def load_examples(
    paths: str | Path | Sequence[str | Path], rejected: bool | None = False, prompts=False
) -> list[Example]:
    """The rows of JSON or JSONL files, in order.

    Rows are `{"messages"}`, `{"prompt", "chosen", "rejected"}`, `{"prompt", "response"}` or
    `{"real", "generated"}`; each side is text or a list of messages, with or without the prompt
    before it. `rejected`: True, each row must have a rejected side; None, it may; False, it is not
    even looked at.
    Raises InputError naming file and line.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    if prompts:
        return load_asks(files)
    examples = [
        _example(row, where, rejected) for file in files for where, row in _rows(Path(file))
    ]
    if not examples:
        raise InputError(f"no rows in {', '.join(map(str, files)) or 'no file'}: give at least one")
    return examples


def load_prompts(path: str | Path) -> list[list[dict[str, str]]]:
    """Conversations to be answered, from rows `{"prompt"}` (text or messages) or `{"messages"}`.

    A last turn of the assistant is left out. Raises InputError naming file and line.
    """
    conversations = [_conversation(row, where) for where, row in _rows(Path(path))]
    if not conversations:
        raise InputError(f"no rows in {path}: give at least one")
    return conversations


def _conversation(row: Any, where: str) -> list[dict[str, str]]:
    """The turns of a row up to one of the user's."""
    key = next((k for k in ("prompt", "messages") if isinstance(row, dict) and k in row), None)
    if key is None:
        raise InputError(f"{where}: should be an object with 'prompt' or 'messages'")
    turns = _turns(row[key], key, "user", where)
    turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    if not turns or turns[-1]["role"] != "user":
        raise InputError(f"{where}: {key!r} has no user's turn at its end to answer")
    return turns


QUESTION_KEYS: dict[str, dict[str, type]] = {  # of a row, by benchmark; the last is what is asked
    "alpaca_eval": {"instruction": str},  # AlpacaEval's alpaca_eval.json
    "arena_hard": {"uid": str, "prompt": str},  # Arena-Hard 2.0's question.jsonl
    "mt_bench": {"question_id": int, "category": str, "turns": list},  # FastChat's question.jsonl
}


class Question(NamedTuple):
    """A conversation to be answered, what the user says after each answer, and the file's row."""

    messages: list[dict[str, str]]
    later: list[str]
    row: dict[str, Any]


def load_questions(path: str | Path, benchmark: str) -> list[Question]:
    """A benchmark's questions from its own file. Raises InputError naming file and line."""
    questions = []
    for where, row in _rows(Path(path)):
        for key, kind in QUESTION_KEYS[benchmark].items():
            if not isinstance(row, dict) or not isinstance(row.get(key), kind):
                name = {str: "text", int: "a number", list: "a list of texts"}[kind]
                raise InputError(f"{where}: a question of {benchmark} has {name} as {key!r}")
        said = [row[key]] if isinstance(row[key], str) else row[key]
        if not said or not all(isinstance(text, str) and text.strip() for text in said):
            raise InputError(f"{where}: {key!r} should hold what the user says, and is empty")
        first, *later = map(whole_text, said)
        questions.append(Question([{"role": "user", "content": first}], later, row))
    if not questions:
        raise InputError(f"no rows in {path}: give at least one")
    return questions


def load_asks(paths: Sequence[str | Path]) -> list[Example]:
    """Rows of prompts with or without responses, which are "" where there is none."""
    examples = []
    for where, row in (found for path in paths for found in _rows(Path(path))):
        answered = isinstance(row, dict) and any(key in row for key in RESPONSE_KEYS[:3])
        if isinstance(row, dict) and isinstance(turns := row.get("messages"), list) and turns:
            answered |= isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant"
        if answered:
            examples.append(_example(row, where, rejected=False))
        else:
            examples.append(Example(tuple(_conversation(row, where)), "", None, where))
    if not examples:
        raise InputError(f"no rows in {', '.join(map(str, paths))}: give at least one")
    return examples


class Target(NamedTuple):
    """An answer to a conversation, and the improvement of it that the improver is to learn."""

    messages: Messages
    response: str
    improved: str


def load_targets(path: str | Path) -> list[Target]:
    """Rows of {"prompt" (text or messages), "response", "improved"}; those whose `improved` is
    null are left out. Raises InputError naming file and line."""
    targets = []
    for where, row in _rows(Path(path)):
        messages = _conversation(row, where)
        if row.get("improved", "") is None:
            continue
        texts = [row.get(key) for key in ("response", "improved")]
        if not all(isinstance(text, str) for text in texts) or not texts[1].strip():
            raise InputError(f"{where}: 'response' and 'improved' should be text")
        targets.append(Target(messages, *map(whole_text, texts)))
    if not targets:
        raise InputError(f"no targets in {path}: give at least one")
    return targets


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """("file:line", value) for each row of a JSON list or of JSON lines."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} is no readable data file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text; convert the file") from None
    if not text.strip():
        raise InputError(f"{path} is empty; it should hold JSON or JSONL rows")
    yield from _list_rows(path, text) if text.lstrip()[0] == "[" else _line_rows(path, text)


def _line_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 is no line's end
        if line.strip():
            where = f"{path}:{number}"
            row, end = _parse(line.strip(), 0, where)
            if end < len(line.strip()):
                raise InputError(f"{where}: more than one JSON value; write one row a line")
            yield where, row


def _list_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The elements of one JSON list, read one by one, so that each has its line."""
    at, line, between = 0, 1, re.compile(r"\s*\[\s*(?!\s|\])")
    while start := between.match(text, at):
        line += text.count("\n", at, start.end())
        row, end = _parse(text, start.end(), f"{path}:{line}")
        yield f"{path}:{line}", row
        line += text.count("\n", start.end(), end)
        at, between = end, re.compile(r"\s*,\s*")
    if re.sub(r"\s", "", text[at:]) not in ("]", "[]"):
        raise InputError(f"{path}:{line}: expected ',' or the ']' that ends the file")


def _parse(text: str, at: int, where: str) -> tuple[Any, int]:
    """The JSON value that starts at `at`, and where it ends."""
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {_line(error)}") from None


def _example(row: Any, where: str, rejected: bool | None) -> Example:
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row should be a JSON object, not {_short(row)}")
    key = next((k for k in RESPONSE_KEYS if k in row), None)
    if key is None:
        raise InputError(f"{where}: no {', '.join(map(repr, RESPONSE_KEYS))} in the row")
    prompt = _turns(row["prompt"], "prompt", "user", where) if row.get("prompt") else []
    messages, response = _side(row, key, prompt, where)
    other = next((k for k in REJECTED_KEYS if row.get(k) is not None), None)
    if rejected is False or (rejected is None and other is None):
        return Example(tuple(messages), response, None, where)
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
    if _holds(context, prompt):
        return context, response
    if _holds(prompt, context):  # it has a system turn that this side leaves out
        return prompt, response
    raise InputError(f"{where}: {key!r} does not answer the row's prompt")


def _holds(turns: list[dict[str, str]], part: list[dict[str, str]]) -> bool:
    """Whether `part` is within `turns`, in one piece."""
    return any(turns[i : i + len(part)] == part for i in range(len(turns) - len(part) + 1))


def _turns(value: Any, key: str, role: str, where: str) -> list[dict[str, str]]:
    """A list of turns, from one, or from the text of one turn of `role`."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {key!r} should be text or a list of turns, not {_short(value)}")
    return [_turn(turn, f"{where}: {key!r}, turn {i}") for i, turn in enumerate(value, 1)]


def _turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
        raise InputError(f"{where}: should be an object with 'role' and 'content'")
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise InputError(f"{where}: role {_short(role)} is not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise InputError(f"{where}: 'content' should be text, not {_short(content)}")
    if role != "system" and not content.strip():
        raise InputError(f"{where}: the {role}'s text is empty; fill it, or leave out the row")
    return {"role": role, "content": whole_text(content)}


def whole_text(text: str) -> str:
    """Half of a surrogate pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _short(value: Any, size: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= size else text[: size - 3] + "..."


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
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OSError) as error:
        detail = f"{type(error).__name__}: {_line(error)}"
        raise InputError(f"{what} is malformed ({detail}); copy it from the checkpoint") from None


# ----------------------------------------------------------------------- a stronger model's answers


class Again(Exception):
    """A request failed in a way that may pass; `after`: the seconds that the server asked for."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


class Unmoved(urllib.request.HTTPRedirectHandler):
    """Follows no redirection, which would take the key to wherever it leads."""

    def redirect_request(self, *args: Any) -> None:
        """No."""


@dataclass
class TargetServer:
    """Asks a model on an OpenAI-compatible server, several questions at a time.

    Waits and asks again on 408, 429, 5xx, time-outs, dropped connections and replies that are no
    chat completion: as long as Retry-After says, or 1, 2, 4, ... `pause`s, `tries` times in all.
    The key goes into a header and nowhere else.
    """

    url: str  # http://HOST/v1
    model: str
    key: str | None
    workers: int = 8
    timeout: float = 120.0  # seconds
    max_tokens: int = 0  # of an answer; 0: the server's default
    tries: int = 8
    pause: float = 1.0  # seconds

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            right = False
        if not right or not self.url.isascii() or re.search(r"[\s\0-\x1f]", self.url):
            raise InputError(f"{_short(self.url)} is no address such as http://localhost:8000/v1")
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise InputError("the key in OPENAI_API_KEY has characters that no header can hold")
        self.stopping = threading.Event()
        self.opener = urllib.request.build_opener(Unmoved)

    def ask_all(self, questions: Sequence[Messages]) -> Iterator[tuple[int, str | None, str]]:
        """(index, answer, "") as answers come, in any order; (index, None, why) for one that is
        empty, refused or cut. Raises InputError where to ask on is no use, but not before the
        answers that were on their way have been given out."""
        pool, failure = ThreadPoolExecutor(self.workers), None
        try:
            asked = {pool.submit(self.ask, turns): i for i, turns in enumerate(questions)}
            for done in as_completed(asked):
                error = None if done.cancelled() else done.exception()
                if error is not None:
                    failure = failure or error
                    self.stopping.set()
                    for waiting in asked:
                        waiting.cancel()
                elif not done.cancelled() and done.result()[1] != "stopped":
                    yield (asked[done], *done.result())
        finally:
            self.stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if failure is not None:
            raise failure

    def ask(self, messages: Messages) -> tuple[str | None, str]:
        """One answer, or None and why."""
        asked: dict[str, Any] = {"model": self.model, "messages": list(messages)}
        asked |= {"max_tokens": self.max_tokens} if self.max_tokens else {}
        body, why = json.dumps(asked).encode(), ""
        for attempt in range(self.tries):
            try:
                return self.read(self.post(body))
            except Again as error:
                why, wait = str(error), error.after
            wait = (
                self.pause * min(64, 2**attempt) * (0.5 + random.random()) if wait is None else wait
            )
            if attempt + 1 < self.tries and self.stopping.wait(wait):
                return None, "stopped"
        raise InputError(
            f"{self.url}: gave up after {self.tries} tries ({why}); --resume asks for the rest"
        )

    def post(self, body: bytes) -> Any:
        """The reply as JSON. Raises Again, or InputError."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        try:
            with self.opener.open(request, timeout=self.timeout) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            if error.code in (408, 429) or error.code >= 500:
                raise Again(
                    f"HTTP {error.code}", retry_after(error.headers.get("Retry-After") or "")
                ) from None
            known = {
                401: "the key in OPENAI_API_KEY is not accepted",
                403: "the key in OPENAI_API_KEY may not do this",
                404: f"no such address, or no model {self.model!r}: see --target-model",
            }
            raise InputError(
                f"{self.url}: HTTP {error.code}: {known.get(error.code) or self.reason(error)}"
            ) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            raise Again(_line(error)) from None
        except (ValueError, RecursionError):
            raise Again("the reply is not JSON") from None

    def reason(self, error: urllib.error.HTTPError) -> str:
        """The server's own words, without the key should it repeat it."""
        with suppress(OSError, http.client.HTTPException):
            text = error.read(2000).decode("utf-8", "replace")
            for form in (self.key, json.dumps(self.key)[1:-1]) if self.key else ():
                text = text.replace(form, "***")
            return _short(text, 300)
        return str(error.reason)

    def read(self, reply: Any) -> tuple[str | None, str]:
        """The text in a chat completion."""
        try:
            choice = reply["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            text = whole_text(message.get("content") or "")
            if message.get("refusal") or reason == "content_filter":
                return None, "refused"
            if reason == "length":
                return None, "cut"
            text = whole_text(text)
            return (text.strip(), "") if text.strip() else (None, "empty")
        except (LookupError, TypeError, AttributeError):
            raise Again("the reply is no chat completion") from None


def retry_after(value: str) -> float | None:
    """The seconds, a day at most, that a Retry-After header of seconds or a date asks to wait."""
    if value.strip().isdecimal():
        return min(86400.0, float(value))
    with suppress(ValueError, OverflowError):
        return min(86400.0, max(0.0, parsedate_to_datetime(value).timestamp() - time.time()))
    return None


# -------------------------------------------------------------------------------------- tokenizers

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    "generation_config.json",
)
SPECIAL_NAMES = tuple(f"{n}_token" for n in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
SPACES = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B)))
SPACES += "\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space; Python's strip() takes more


class Added(NamedTuple):
    """A token that is found in the text before anything else is done with it."""

    id: int
    text: str
    lstrip: bool = False  # it swallows the white space to its left
    rstrip: bool = False
    single_word: bool = False  # it is not found within a word
    normalized: bool = False  # it is looked for in the normalized text


def load_tokenizer(path: str | Path, chat_template: str | None = None, date=None) -> "Tokenizer":
    """The tokenizer in a checkpoint's folder, of which it needs only the tokenizer's files.

    `chat_template` names a fallback, a key of FALLBACKS, to use in place of the checkpoint's own.
    Raises InputError for a folder without a tokenizer, and for one that is not implemented.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; it should be a checkpoint's")
    if chat_template is not None and chat_template not in FALLBACKS:
        raise InputError(f"--chat-template {chat_template!r} is not one of {', '.join(FALLBACKS)}")
    config = _optional_json(folder / "tokenizer_config.json")
    with _reading(f"the tokenizer in {folder}"):
        return Tokenizer(folder, _codec(folder, config), config, chat_template)


class Tokenizer:
    def digest(self):
        return str(hash_seed(*sorted(self.files.items())))

    """A checkpoint's tokenizer and chat template, made by `load_tokenizer`.

    eos_ids: what may end an assistant's turn; the tokenizer's own EOS is first.
    vocab_size: the largest id + 1, which a padded embedding may exceed.
    """

    def __init__(
        self, folder: Path, codec: "Codec", config: dict[str, Any], chat_template: str | None
    ) -> None:
        files = [folder / name for name in TOKENIZER_FILES]
        self.files = {file.name: file.read_bytes() for file in files if file.is_file()}
        self.codec = codec
        self.specials = codec.specials | _special_tokens(folder, config)
        self.added = _added_tokens(folder, config, codec, self.specials)
        self.table = codec.table | {t.id: codec.to_bytes(t.text) for t in self.added.values()}
        self.vocab_size = max(self.table) + 1
        plain = {text: t for text, t in self.added.items() if not t.normalized}
        other = {codec.normalize(text): t for text, t in self.added.items() if t.normalized}
        self._plain, self._other = Search(plain), Search(other)
        source, self.template_name = _template_source(folder, config, chat_template)
        self._template = self._compile(source)
        if source is not None and chat_template is not None:
            self.files["chat_template.jinja"] = source.encode()
        self.eos_ids, self._template_ends = self._find_eos(folder)

    def encode(self, text: str, continuing: bool = False) -> list[int]:
        """Token ids, without BOS or EOS. The text of a special token becomes its id.

        `continuing`: more text is before it, so that SentencePiece adds no space in front.
        Lone surrogates, which no UTF-8 has, become U+FFFD.
        """
        if not text.isascii():
            text = whole_text(text)
        ids: list[int] = []
        spaced = not continuing
        for part in self._split(text):
            ids += [part] if isinstance(part, int) else self.codec.encode(part, spaced)
            spaced = self.codec.legacy
        return ids

    def _split(self, text: str) -> Iterator[str | int]:
        """Ids of added tokens, and the normalized text between them."""
        for part in self._plain.split(text):
            if isinstance(part, int):
                yield part
            else:
                yield from self._other.split(self.codec.normalize(part))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included. Bytes that are no UTF-8 become U+FFFD.

        As in transformers, an id without a token (the padding of an embedding has such) is empty.
        """
        if any(i < 0 for i in ids):
            raise InputError(f"token id {min(ids)} is negative")
        return self.codec.decode([int(i) for i in ids if int(i) in self.table], self.table)

    def apply_chat_template(
        self, messages: Messages, add_generation_prompt: bool = False
    ) -> list[int]:
        """Token ids of the rendered conversation. Raises InputError where the template refuses."""
        return self.encode(self.render(messages, add_generation_prompt))

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The text of a conversation. A template is a foreign program: all it raises is caught."""
        if self._template is None:
            raise InputError("the checkpoint has no chat template; pass --chat-template " + _NAMES)
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.specials,
            )
        except Exception as error:
            detail = f"{type(error).__name__}: {_line(error)}"
            raise InputError(
                f"{self.template_name} fails on this conversation ({detail}); "
                f"mend one of them, or pass --chat-template {_NAMES}"
            ) from None

    def response_text(self, ids: list[int]) -> str:
        """A response as text, without the EOS at its end, if it has one."""
        return self.decode(ids[:-1] if ids and ids[-1] in self.eos_ids else ids)

    def end_turn(self, ids: list[int]) -> list[int]:
        """A rendered response through its last EOS, or with one where the template sets none."""
        if not self.eos_ids:
            raise InputError("the tokenizer has no EOS; set eos_token in tokenizer_config.json")
        places = [i for i, token in enumerate(ids) if token in self.eos_ids]
        if self._template_ends and places:
            return ids[: places[-1] + 1]
        return [*ids, self.eos_ids[0]]

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer's files, as they were read, into a folder; and a chosen fallback."""
        Path(path).mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (Path(path) / name).write_bytes(data)

    def _compile(self, source: str | None) -> jinja2.Template | None:
        if source is None:
            return None
        for text in FALLBACK_TOKENS.get(self.template_name, ()):
            if text not in self.added and text not in self.specials:
                raise InputError(f"--chat-template {self.template_name} needs the token {text}")
        try:
            return JINJA.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InputError(f"{self.template_name} is no jinja template: {_line(error)}") from None

    def _find_eos(self, folder: Path) -> tuple[tuple[int, ...], bool]:
        """(eos_ids, whether the template itself puts one of them behind a response)."""
        eos = self.specials.get("eos_token")
        if eos is not None and eos not in self.added:
            raise InputError(f"{folder}: eos_token {_short(eos)} is not in the vocabulary")
        ids = [self.added[eos].id] if eos is not None else []
        for file in (folder / "generation_config.json", folder / "config.json"):
            value = _optional_json(file).get("eos_token_id")
            ids += value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
                raise InputError(f"{file}: eos_token_id {_short(value)} is not in the vocabulary")
        tail = self.encode(self._turn_tail(), continuing=True)
        if tail and tail[0] in {token.id for token in self.added.values()}:
            ids.append(tail[0])  # Qwen2.5's base: its eos_token is another than what ends a turn
        return tuple(dict.fromkeys(ids)), bool(set(ids) & set(tail))

    def _turn_tail(self) -> str:
        """What the template puts behind an assistant's last turn."""
        if self._template is None:
            return ""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "qzx"}]
        return self.render(turns).rpartition("qzx")[2].lstrip()


class Search:
    """Finds added tokens in text: leftmost, then longest, as transformers does."""

    def __init__(self, tokens: dict[str, Added]) -> None:
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        self.tokens = tokens
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def split(self, text: str) -> Iterator[str | int]:
        """The text, in order, with the ids of the tokens in it. No string is empty."""
        start = 0
        for match in self.pattern.finditer(text):
            token, (left, right) = self.tokens[match[0]], match.span()
            if token.single_word and re.search(
                r"\w", text[left - 1 : left] + text[right : right + 1]
            ):
                continue
            gap = text[start:left]
            gap = gap.rstrip(SPACES) if token.lstrip else gap
            if gap:
                yield gap
            yield token.id
            start = right
            while token.rstrip and text[start : start + 1] in SPACES and start < len(text):
                start += 1
        if start < len(text):
            yield text[start:]


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """{"eos_token": its text, ...}. The config's word counts more than the older map's."""
    named = _optional_json(folder / "special_tokens_map.json") | config
    values = {name: named[name] for name in SPECIAL_NAMES if named.get(name) is not None}
    return {name: v["content"] if isinstance(v, dict) else str(v) for name, v in values.items()}


def _added_tokens(
    folder: Path, config: dict[str, Any], codec: "Codec", specials: dict[str, str]
) -> dict[str, Added]:
    """By text: what tokenizer.json, the configs, and the special tokens' names say is added."""
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    old = _optional_json(folder / "added_tokens.json")
    listed = [{"content": text, "id": i} for text, i in old.items()] + codec.added
    listed += [v | {"id": int(i)} for i, v in config.get("added_tokens_decoder", {}).items()]
    added = {
        text: Added(codec.vocab[text], text) for text in specials.values() if text in codec.vocab
    }
    for token in listed:
        values = {flag: bool(token.get(flag, False)) for flag in flags}
        added[token["content"]] = Added(int(token["id"]), token["content"], **values)
    return added


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


# ------------------------------------------------------------------- codecs: plain text and tokens

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same within the segments between digits: a digit ends a segment, and so a run of white space.
DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = (  # in the order of their ids; reserved ones follow, to 256 in all
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"),
    *("<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
    *("<|python_tag|>", "<|image|>"),
)
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [b for b in range(256) if b not in _VISIBLE]
ALPHABET = {chr(b): b for b in _VISIBLE} | {chr(256 + i): b for i, b in enumerate(_HIDDEN)}
LONGEST_SPACE = 100_000  # tiktoken's regular expressions overflow their stack at some more
_LONG_SPACES = re.compile(r"\s{1000,}")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


class Codec:
    """Turns text without added tokens into ids, and back.

    vocab: ids by the token's text in the file; table: what ids stand for; specials and added: what
    the file itself says of special tokens, as in tokenizer_config.json and tokenizer.json.
    """

    legacy = False  # whether each text between added tokens is spaced, and not the first alone

    def __init__(self, vocab: dict[str, int], table: dict[int, bytes]) -> None:
        self.vocab, self.table = vocab, table
        self.specials: dict[str, str] = {}
        self.added: list[dict[str, Any]] = []

    def normalize(self, text: str) -> str:
        """The text as the vocabulary expects it."""
        return text

    def to_bytes(self, token: str) -> bytes:
        """What an added token decodes to."""
        return token.encode()

    def encode(self, text: str, spaced: bool) -> list[int]:
        """Token ids. `spaced`: SentencePiece puts a space in front of the text."""
        raise NotImplementedError

    def decode(self, ids: list[int], table: dict[int, bytes]) -> str:
        """The text of ids, which `table` has."""
        raise NotImplementedError


class BytePairs(Codec):
    """Byte-level BPE through tiktoken. Its rank is a token's index in `order`."""

    def __init__(
        self, vocab: dict[str, int], order: list[str], pattern: str, nfc: bool, unk: int | None
    ) -> None:
        super().__init__(vocab, {i: self.to_bytes(token) for token, i in vocab.items()})
        self.nfc = nfc
        # Bytes that are not in the vocabulary are dropped, as in transformers, or become `unk`.
        order = order + [char for char in ALPHABET if char not in vocab]
        self.ids = [vocab.get(token, unk) for token in order]
        ranks = {self.to_bytes(token): rank for rank, token in enumerate(order)}
        # What no alternative matches is a piece too, where tiktoken alone would drop it.
        whole = f"{pattern}|(?:(?!{pattern})(?s:.))+"
        self.bpe = tiktoken.Encoding("bpe", pat_str=whole, mergeable_ranks=ranks, special_tokens={})

    def normalize(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def to_bytes(self, token: str) -> bytes:
        known = all(char in ALPHABET for char in token)
        return bytes(ALPHABET[char] for char in token) if known else token.encode()

    def encode(self, text: str, spaced: bool) -> list[int]:
        ranks = [rank for part in _short_spaces(text) for rank in self.bpe.encode_ordinary(part)]
        return [i for i in map(self.ids.__getitem__, ranks) if i is not None]

    def decode(self, ids: list[int], table: dict[int, bytes]) -> str:
        return b"".join(map(table.__getitem__, ids)).decode("utf-8", "replace")


def _short_spaces(text: str) -> Iterator[str]:
    """The text in parts, none of which has more than LONGEST_SPACE of white space in a row."""
    start = 0
    if len(text) > LONGEST_SPACE:
        for run in _LONG_SPACES.finditer(text):
            for end in range(run.start() + LONGEST_SPACE, run.end(), LONGEST_SPACE):
                yield text[start:end]
                start = end
    yield text[start:]


class SentencePieces(Codec):
    """A SentencePiece model, with its control tokens found in the text as transformers does.

    Of tokenizer_config.json it reads two keys: with `legacy`, a space is put in front of each text
    between added tokens, and not only of the first; without `add_prefix_space`, of none.
    """

    def __init__(self, model: bytes, config: dict[str, Any]) -> None:
        self.legacy = bool(config.get("legacy", False))  # as transformers 5 has it
        self.prefix = config.get("add_prefix_space") is not False
        # Concatenated protocol buffers are merged: this is normalizer_spec.add_dummy_prefix = false
        bare = model + b"\x1a\x02\x18\x00"
        self.bare = sentencepiece.SentencePieceProcessor(model_proto=bare)
        self.spaced = sentencepiece.SentencePieceProcessor(
            model_proto=model if self.prefix else bare
        )
        sp, ids = self.spaced, range(len(self.spaced))
        pieces = [sp.id_to_piece(i) for i in ids]
        self.bytes = {i: bytes([int(pieces[i][3:5], 16)]) for i in ids if sp.is_byte(i)}
        table = {i: piece.replace("\u2581", " ").encode() for i, piece in enumerate(pieces)}
        super().__init__({piece: i for i, piece in enumerate(pieces)}, table | self.bytes)
        named = {"bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "unk_token": sp.unk_id()}
        self.specials = {name: pieces[i] for name, i in named.items() if i >= 0}
        found = [i for i in ids if sp.is_control(i) or sp.is_unknown(i)]
        self.added = [{"content": pieces[i], "id": i} for i in found]

    def encode(self, text: str, spaced: bool) -> list[int]:
        return list((self.spaced if spaced else self.bare).encode(text))

    def decode(self, ids: list[int], table: dict[int, bytes]) -> str:
        text = ""
        for _, run in groupby(ids, self.bytes.__contains__):
            data = b"".join(map(table.__getitem__, run))
            try:
                text += data.decode()
            except UnicodeDecodeError:  # transformers: one U+FFFD for each byte of the run
                text += "\ufffd" * len(data)
        return text.removeprefix(" ") if self.prefix else text


def _codec(folder: Path, config: dict[str, Any]) -> Codec:
    """What the folder's files hold: a tokenizer.model is told by its content, not its name."""
    model = folder / "tokenizer.model"
    data = model.read_bytes() if model.is_file() else b""
    if data and not _TIKTOKEN_LINE.match(data):
        with _reading(str(model)):
            return SentencePieces(data, config)
    if config.get("add_prefix_space"):
        raise _unknown(folder / "tokenizer_config.json", "add_prefix_space", True)
    if (folder / "tokenizer.json").is_file():
        return _byte_level(folder / "tokenizer.json")
    if data:
        return _llama3(model, data)
    raise InputError(f"{folder} has no tokenizer; it should hold tokenizer.json or tokenizer.model")


def _llama3(path: Path, data: bytes) -> BytePairs:
    """tiktoken's format: lines of a token in base64 and its rank, which is its id."""
    chars = {byte: char for char, byte in ALPHABET.items()}
    with _reading(str(path)):
        lines = [line.split() for line in data.splitlines() if line]
        tokens = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        vocab = {"".join(chars[b] for b in token): rank for token, rank in tokens.items()}
        codec = BytePairs(vocab, sorted(vocab, key=vocab.__getitem__), LLAMA3, False, None)
    rest = (f"<|reserved_special_token_{i}|>" for i in range(2, 256 - len(LLAMA3_SPECIAL) + 2))
    names = enumerate([*LLAMA3_SPECIAL, *rest], max(tokens.values()) + 1)
    codec.added = [{"content": name, "id": i} for i, name in names]
    codec.specials = {"bos_token": LLAMA3_SPECIAL[0], "eos_token": LLAMA3_SPECIAL[1]}
    return codec


def _byte_level(path: Path) -> BytePairs:
    """Reads a tokenizer.json that is byte-level BPE; what it leaves out of it changes no id."""
    spec = read_json(path)
    with _reading(str(path)):
        model, pattern = spec["model"], _pattern(spec.get("pre_tokenizer"), path)
        normalizer = spec.get("normalizer")
        if normalizer not in (None, {"type": "NFC"}):
            raise _unknown(path, "normalizer", normalizer)
        if model.get("type", "BPE") != "BPE":
            raise _unknown(path, "model type", model["type"])
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
            if model.get(key):
                raise _unknown(path, key, model[key])
        vocab: dict[str, int] = model["vocab"]
        unk = vocab[model["unk_token"]] if model.get("unk_token") else None
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        order = _token_order(vocab, merges, bool(model.get("ignore_merges")), path)
        codec = BytePairs(vocab, order, pattern, normalizer is not None, unk)
        codec.added = spec.get("added_tokens") or []
    return codec


def _unknown(path: Path, key: str, value: Any) -> InputError:
    return InputError(
        f"{path}: {key} {_short(value, 200)} is not implemented; this reads byte-level BPE as in "
        "Llama 3, Qwen2.5, SmolLM2 (for SentencePiece, add the checkpoint's tokenizer.model)"
    )


def _pattern(pre: Any, path: Path) -> str:
    """The regular expression of the pieces within which a pre-tokenizer lets bytes merge."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre or {"type": None}]
    *before, last = steps
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        regex = last.get("use_regex", True)
        if not before and regex:
            return GPT2
        if before == [{"type": "Digits", "individual_digits": True}] and regex:
            return DIGITS
        if len(before) == 1 and before[0]["type"] == "Split" and not regex:
            isolated = before[0]["behavior"] == "Isolated" and not before[0]["invert"]
            if isolated and "Regex" in before[0]["pattern"]:
                return str(before[0]["pattern"]["Regex"])
    raise _unknown(path, "pre_tokenizer", pre)


def _token_order(
    vocab: dict[str, int], merges: Sequence[Sequence[str]], whole: bool, path: Path
) -> list[str]:
    """The tokens that merging can reach, by the rank of the merge that makes them.

    tiktoken merges any two neighbours whose bytes are a token; `tokenizer.json` only the pairs that
    it lists. The two agree if each token's own bytes merge into it by listed pairs: had another
    pair met, with a better rank, it would have met there too. A token that fails this is never made
    by listed pairs, so tiktoken must not know it; unless (`whole`, ignore_merges in the file) it
    stands for a piece that equals it, which tiktoken does by itself.
    """
    ranks = {(a, b): rank for rank, (a, b) in enumerate(merges)}
    made = {a + b for a, b in ranks}
    if not made <= vocab.keys():
        raise InputError(f"{path}: a merge makes {_short(min(made - vocab.keys()))}, not a token")
    reached: list[tuple[int, str]] = []
    rest: list[tuple[int, str]] = []
    for token in vocab:
        if len(token) > 1 and (token in made or whole) and all(c in ALPHABET for c in token):
            parts, rank = _merge(list(token), ranks)
            if len(parts) == 2 and whole:
                raise InputError(f"{path}: no merge makes the token {_short(token)}; list it")
            (reached if len(parts) == 1 else rest).append((rank, token))
    singles = [char for char in ALPHABET if char in vocab]
    return singles + [token for _, token in sorted(reached)] + [t for _, t in rest if whole]


def _merge(parts: list[str], ranks: dict[tuple[str, str], int]) -> tuple[list[str], int]:
    """Byte-pair encoding, plainly: (what is left of the parts, the rank of the last merge)."""
    last, none = -1, len(ranks)
    while len(parts) > 1:
        found = [ranks.get(pair, none) for pair in pairwise(parts)]
        best = min(found)
        if best == none:
            break
        i, last = found.index(best), best
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts, last


# ---------------------------------------------------------------------------------- chat templates

FALLBACKS = {  # for base models, which have none: named by --chat-template
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}"
        "<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "llama3": (
        "<|begin_of_text|>{% for message in messages %}"
        "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{{ message['content'] | trim }}<|eot_id|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
}
FALLBACK_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "zephyr": ("eos_token",),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
_NAMES = "|".join(FALLBACKS)


def _template_source(
    folder: Path, config: dict[str, Any], fallback: str | None
) -> tuple[str | None, str]:
    """(a template's text, what to call it). The file of its own counts more than the config."""
    if fallback is not None:
        return FALLBACKS[fallback], fallback
    file = folder / "chat_template.jinja"
    if file.is_file():
        with _reading(str(file)):
            return file.read_text(encoding="utf-8"), str(file)
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{folder}/tokenizer_config.json: chat_template is not text")
    return template, f"the chat template in {folder}"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for other trainers; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """jinja2's sandbox with what transformers gives to templates."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    env.filters["tojson"] = to_json
    return env


JINJA = _environment()


# ---------------------------------------------------------------------------------- built-in tasks

SEEN = ("reverse", "add", "sort", "second")  # kinds that the clean set has
UNSEEN = ("double", "rotate", "count", "swap")  # kinds that only pre-training has
REWRITE_PROMPT = "{prompt} | {draft}"  # asks for another answer than the draft
LETTERS = "abcdefghij"  # of the words, which have 3 to 5: enough for 100,000 prompts of a kind
_RESULTS: dict[str, Callable[[str], str]] = {  # what a word becomes; the working spells it out
    "reverse": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
    "second": lambda word: word[1::2],
    "double": lambda word: "".join(2 * letter for letter in word),
    "rotate": lambda word: word[1:] + word[:1],
    "swap": lambda word: word[-1] + word[1:-1] + word[0],
}
_SHARES = {"test": (0, 1), "validation": (1, 2), "pretrain": (2, 10), "clean": (2, 10)}  # tenths


def task_examples(split: str, n: int, seed: int, rewrite_share: float = 0.0) -> list[Example]:
    """`n` examples of the built-in tasks, kinds in turn: the first k of n are those of k.

    split: "pretrain" has all kinds and answers of mixed quality, half of them right, and for
    `rewrite_share` of its rows REWRITE_PROMPT with a draft, the response being another draft;
    "clean" has seen kinds and right answers; "validation" and "test" have all kinds and right
    answers. All but "pretrain" have a flawed `rejected`. A prompt's hash puts it in one of test,
    validation and training, so that these share none.
    """
    if split not in _SHARES:
        raise InputError(f"split {split!r} is not one of {', '.join(_SHARES)}")
    rng = random.Random(hash_seed("tasks", split, seed))
    kinds = (
        SEEN if split == "clean" else [k for both in zip(SEEN, UNSEEN, strict=True) for k in both]
    )
    return [_task(split, i, kinds[i % len(kinds)], rewrite_share, rng) for i in range(n)]


def _task(split: str, index: int, kind: str, rewrite_share: float, rng: random.Random) -> Example:
    prompt = _prompt(kind, rng)
    while not in_split(split, prompt):
        prompt = _prompt(kind, rng)
    answer, rejected = right_answer(prompt), None
    if split != "pretrain":
        rejected = flawed_answer(answer, rng)
    else:
        draft, answer = (a if rng.random() < 0.5 else flawed_answer(a, rng) for a in (answer,) * 2)
        if rng.random() < rewrite_share:
            prompt = REWRITE_PROMPT.format(prompt=prompt, draft=draft)
    return Example(
        ({"role": "user", "content": prompt},), answer, rejected, f"task:{split}:{index}"
    )


def in_split(split: str, prompt: str) -> bool:
    """Whether a task's prompt is one of that split's, which its hash alone decides."""
    low, high = _SHARES[split]
    return low <= hash_seed("split", prompt) % 10 < high


def _prompt(kind: str, rng: random.Random) -> str:
    if kind == "add":
        return f"add {rng.randint(10, 99)} {rng.randint(10, 99)}"
    word = "".join(rng.choices(LETTERS, k=rng.randint(3, 5)))
    if kind != "count":
        return f"{kind} {word}"
    letter = rng.choice(LETTERS)  # which is about half of the word
    return f"count {letter} {''.join(letter if rng.random() < 0.5 else other for other in word)}"


def right_answer(prompt: str) -> str:
    """The one right answer, as working and result: "reverse abcd" -> "a-b-c-d > dcba".

    Works for a rewriting prompt too. Raises InputError for what is no built-in task.
    """
    kind, *words = prompt.split(" | ")[0].split(" ")
    if kind in _RESULTS and len(words) == 1 and len(words[0]) > 1:
        return f"{'-'.join(words[0])} > {_RESULTS[kind](words[0])}"
    if kind == "count" and len(words) == 2:
        counts = [str(words[1][: i + 1].count(words[0])) for i in range(len(words[1]))]
        return f"{'-'.join(counts)} > {counts[-1]}"
    if kind == "add" and len(words) == 2 and all(re.fullmatch("[1-9][0-9]", w) for w in words):
        a, b = map(int, words)
        ones, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
        tens = a // 10 + b // 10 + carry
        return f"{a % 10}+{b % 10}={ones}-{a // 10}+{b // 10}={tens} > {a + b}"
    raise InputError(
        f"{_short(prompt)} is not a built-in task such as 'reverse abcd' or 'add 46 27'"
    )


def flawed_answer(answer: str, rng: random.Random) -> str:
    """A right answer, spoilt in one of four ways: one cannot tell from the prompt which."""
    working, result = answer.split(" > ")
    flaw, steps = rng.randrange(4), working.split("-")
    if flaw == 0:  # without the working
        return result
    if flaw == 1:  # a wrong last character
        same_sort = string.digits if result[-1].isdigit() else LETTERS
        return answer[:-1] + rng.choice(same_sort.replace(result[-1], ""))
    if flaw == 2:  # a step is missing
        del steps[rng.randrange(len(steps))]
        return f"{'-'.join(steps)} > {result}"
    return f"{working}{rng.choice((' = ', ' : ', ' '))}{result}"  # a wrong separator


def mend_answer(prompt: str, draft: str, rng: random.Random) -> str:
    """What a stronger model might make of a draft: some of its errors mended, at least one. They
    are the edits that lead from the draft to the right answer."""
    right = right_answer(prompt)
    edits = SequenceMatcher(None, draft, right, autojunk=False).get_opcodes()
    wrong = [i for i, edit in enumerate(edits) if edit[0] != "equal"]
    mended = {i for i in wrong if rng.random() < 0.5} | set(rng.sample(wrong, min(1, len(wrong))))
    return "".join(
        right[c:d] if i in mended else draft[a:b] for i, (_, a, b, c, d) in enumerate(edits)
    )


def check_answer(prompt: str, answer: str) -> bool:
    """Whether the answer is right to the letter, its working included. Text alone is needed."""
    return answer == right_answer(prompt)


def task_kind(prompt: str) -> str:
    """The kind of a built-in task: one of SEEN or of UNSEEN."""
    right_answer(prompt)
    return prompt.split(" ")[0]


def write_task_tokenizer(path: str | Path) -> None:
    """Writes the built-in tasks' tokenizer: 256 bytes, whose ids are their values, and 4 markers.

    transformers loads it with the same ids. Prompts are `<|user|>PROMPT<|assistant|>`, and
    responses `ANSWER<|end|>`.
    """
    markers = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": 256 + i, "content": text, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, text in enumerate(markers)
        ],
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "pre_tokenizer": step,
        "decoder": step,
        "model": {"type": "BPE", "vocab": dict(ALPHABET), "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for message in messages %}<|{{ message['role'] }}|>"
        "{{ message['content'] }}{% if message['role'] == 'assistant' %}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    }
    Path(path).mkdir(parents=True, exist_ok=True)
    for name, value in (("tokenizer.json", spec), ("tokenizer_config.json", config)):
        (Path(path) / name).write_text(json.dumps(value, indent=1), encoding="utf-8")
