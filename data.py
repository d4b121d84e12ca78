"""Text to tokens: tokenizers, chat templates, data files, and the built-in tasks.

    tokenizer = load_tokenizer("path/to/checkpoint")
    examples = load_examples(["train.jsonl"])                               # text
    kept, pairs, counts = encode_examples(examples, tokenizer, 2048, 1792)  # token ids

Three kinds of tokenizer are read, and `transformers` is needed for none of them:

    tokenizer.json   byte-level BPE (Llama 3, Qwen2.5, SmolLM2)   through tiktoken
    tokenizer.model  SentencePiece (Llama 2, Mistral)             through sentencepiece
    tokenizer.model  tiktoken's own format (Llama 3)              through tiktoken

Ids equal those of transformers, but that runs of spaces, and leading ones, are as SentencePiece has
them, white space beyond 100,000 characters is cut, and no byte outside the vocabulary is merged.
"""

import base64
import http.client
import json
import random
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime
from difflib import SequenceMatcher
from itertools import chain, groupby, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

import tiktoken
from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sentencepiece import SentencePieceProcessor

from model import InputError, hash_seed, read_json, reading

Ids = list[int]  # of tokens
Messages = Sequence[Mapping[str, str]]  # {"role": ..., "content": ...}, oldest first
Turns = list[dict[str, str]]  # the same, read and checked


class Cut(NamedTuple):
    """Where a segment B of `chosen` was written anew: chosen[start:stop] is B, and
    rejected[start:new_stop] is B', whose log-prob under the model that wrote it is `logp`."""

    start: int
    stop: int
    new_stop: int
    logp: float


class Pair(NamedTuple):
    """A prompt with a better and a worse response, as token ids. `rejected` may be empty."""

    prompt: Ids
    chosen: Ids
    rejected: Ids
    cut: Cut | None = None


@dataclass(frozen=True)
class Example:
    """One row of a data file, or one built-in task, as text."""

    messages: tuple[dict[str, str], ...]  # all turns before the response
    response: str  # gold, or chosen; "" where a row of prompts has none
    rejected: str | None  # of SGPO's targets, what the response improves
    where: str  # "file:line", for messages to people


class BadRow(InputError):
    """The fault of a row alone: others may be good."""


# ----------------------------------------------------------------------------- examples to tokens
def encode_examples(
    examples: Sequence[Example], tokenizer: "Tokenizer", max_length: int, max_prompt_length: int,
    bad: list[str] | None = None,
) -> tuple[list[Example], list[Pair], dict[str, int]]:  # fmt: skip
    """The examples that fit, their pairs, and how many rows were read, dropped and cut.
    A row whose prompt has `max_prompt_length` tokens or more is dropped (the official SAPO code's
    rule); responses are cut so that prompt and response have at most `max_length` tokens.
    Raises InputError where no row is left. BadRows, refused by the chat template, go to `bad`."""
    if not 0 < max_prompt_length <= max_length:
        raise InputError(f"max prompt length {max_prompt_length} is not from 1 to {max_length}")
    counts = {"rows": len(examples), "dropped_prompt": 0, "cut_response": 0, "cut_rejected": 0}
    kept, pairs = [], []
    for example in examples:
        try:
            prompt, chosen, rejected, _ = encode_example(tokenizer, example)
        except BadRow as error:
            if bad is None:
                raise
            bad.append(str(error))
            continue
        if len(prompt) >= max_prompt_length:
            counts["dropped_prompt"] += 1
            continue
        room = max_length - len(prompt)
        counts["cut_response"] += len(chosen) > room
        counts["cut_rejected"] += len(rejected) > room
        kept.append(example)
        pairs.append(Pair(prompt, chosen[:room], rejected[:room]))
    if not pairs:
        told = f"{counts['dropped_prompt']} prompts have {max_prompt_length} tokens or more"
        first = f"; the first bad row: {bad[0]}" if bad else ""
        raise InputError(f"no row is left: {told} (--max-prompt-length){first}")
    return kept, pairs, counts


def encode_example(tokenizer: "Tokenizer", example: Example) -> Pair:
    """The row's tokens, nothing dropped or cut; of no response none. InputErrors name the row."""
    try:
        text = tokenizer.render(example.messages, add_generation_prompt=True)
        prompt = tokenizer.encode(text)
        if not prompt:
            raise InputError("the chat template makes an empty prompt; choose another")
        pair = Pair(prompt, chosen=[], rejected=[])
        for side, answer in ((pair.chosen, example.response), (pair.rejected, example.rejected)):
            if not answer:
                continue
            whole = tokenizer.render([*example.messages, {"role": "assistant", "content": answer}])
            if not whole.startswith(text):
                raise InputError("the template's prompt is no prefix of the whole; choose another")
            ids = tokenizer.encode(whole)
            if ids[: len(prompt)] != prompt:
                # Merged across the boundary. When generating, the prompt's tokens are there first.
                ids = prompt + tokenizer.encode(whole[len(text) :], continuing=True)
            side.extend(tokenizer.end_turn(ids[len(prompt) :]))
        return pair
    except InputError as error:
        raise type(error)(f"{example.where}: {error}") from None


# -------------------------------------------------------------------------------------- data files
ROLES = ("system", "user", "assistant")
RESPONSE_KEYS = ("chosen", "real", "response", "completion", "messages")  # a row's first counts
REJECTED_KEYS = ("rejected", "generated")


def load_examples(
    paths: str | Path | Sequence[str | Path], rejected: bool | None = False, prompts: bool = False,
    all_turns: bool = False, bad: list[str] | None = None,
) -> list[Example]:  # fmt: skip
    """The rows of JSON or JSONL files in order: `{"messages"}`, `{"prompt", "chosen", "rejected"}`,
    `{"prompt", "response"}`, `{"prompt", "completion"}` or `{"real", "generated"}`; each side is
    text or messages, with or without the prompt before it. InputErrors name file and line; BadRows
    go to `bad`, where it is a list. `rejected`: each row must have a rejected side; None: it may;
    False: that is not even looked at. `prompts`: a row may end with the user's turn, and then has
    the response "". `all_turns`: of `messages`, unless a rejected side is read, the assistant's
    earlier turns are responses too, where a user's is before them."""
    files, examples = [paths] if isinstance(paths, str | Path) else paths, list[Example]()
    for where, row in (found for file in files for found in read_rows(file)):
        try:
            new = [last := _example(where, row, rejected, prompts)]
            if all_turns and last.rejected is None and {*RESPONSE_KEYS} & {*row} == {"messages"}:
                said, who = last.messages, [turn["role"] for turn in last.messages]
                ends = [i for i, r in enumerate(who) if r == "assistant" and "user" in who[:i]]
                new[:0] = [Example(said[:i], said[i]["content"], None, where) for i in ends]
            if prompts and any(example.messages[-1]["role"] != "user" for example in new):
                raise BadRow(f"{where}: the turn before the response is not the user's")
            examples += new
        except BadRow as error:
            if bad is None:
                raise
            bad.append(str(error))
    return examples


def load_targets(path: str | Path) -> list[Example]:
    """Rows of {"prompt" (text or messages), "response", "improved"}: `improved` as the response,
    and as rejected what it improves; where it is null left out. InputErrors name file and line."""
    targets = []
    for where, row in read_rows(path):
        match row:
            case {"improved": None}:
                continue
            case {"prompt": said, "response": str(old), "improved": str(new)} if new.strip():
                turns = tuple(_asked(_turns(said, "prompt", "user", where), where))
                targets.append(Example(turns, whole_text(new), whole_text(old), where))
            case _:
                raise InputError(f"{where}: 'prompt', 'response' and 'improved' should be text")
    if not targets:
        raise InputError(f"no targets in {path}: give at least one")
    return targets


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """("file:line", value) of JSON lines, ("file, row n", value) of a JSON list; one at least."""
    where, empty = str(path := Path(path)), True
    try:
        content = path.read_bytes()
        whole = re.match(rb"(\xef\xbb\xbf)?\s*\[", content) is not None
        for number, line in enumerate([content] if whole else content.split(b"\n"), 1):
            if line.strip():
                where = str(path) if whole else f"{path}:{number}"
                value = json.loads(line.decode("utf-8-sig"))
                for n, row in enumerate(value if whole else [value], 1):
                    yield f"{path}, row {n}" if whole else where, row
                    empty = False
    except (OSError, ValueError, RecursionError) as error:
        told = getattr(error, "strerror", str(error).replace(": line 1 column", " at column"))
        raise InputError(f"{where}: no data file in JSON: {told}") from None
    if empty:
        raise InputError(f"{path}: no rows; give at least one")


def _example(where: str, row: Any, rejected: bool | None, prompts: bool) -> Example:
    if not isinstance(row, dict):
        raise BadRow(f"{where}: a row should be a JSON object, not {row!r:.60}")
    prompt = _turns(row["prompt"], "prompt", "user", where) if row.get("prompt") else []
    key = next((k for k in RESPONSE_KEYS if k in row), None)
    if prompts and key in (None, "messages"):
        turns = _turns(row[key], key, "user", where) if key else prompt
        if key is None or turns[-1]["role"] != "assistant":
            return Example(tuple(_asked(turns, where)), "", None, where)
    if key is None:
        raise BadRow(f"{where}: no {', '.join(map(repr, RESPONSE_KEYS))} in the row")
    messages, response = _side(row, key, prompt, where)
    other, answer = next((k for k in REJECTED_KEYS if row.get(k) is not None), None), None
    if rejected is not False and other is not None:
        context, answer = _side(row, other, messages, where)
        if context != messages:
            raise BadRow(f"{where}: {key!r} and {other!r} answer different prompts")
    elif rejected:
        raise BadRow(f"{where}: this method compares, and the row has no 'rejected'")
    return Example(tuple(messages), response, answer, where)


def _side(row: dict[str, Any], key: str, prompt: Turns, where: str) -> tuple[Turns, str]:
    """(the turns before the response, the response). Of `prompt`, the turns known from elsewhere,
    and those in the side, one may hold the other: a system turn may be in one alone."""
    *context, last = _turns(row[key], key, "assistant", where)
    if last["role"] != "assistant":
        raise BadRow(f"{where}: {key!r} should end with an assistant's turn")
    if not context or context[0]["role"] == "assistant":
        context = prompt + context
    if not any(turn["role"] == "user" for turn in context):
        raise BadRow(f"{where}: no user's turn before the response in {key!r}; add 'prompt'")
    for whole, part in ((context, prompt), (prompt, context)):
        if any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1)):
            return whole, last["content"]
    raise BadRow(f"{where}: {key!r} does not answer the row's prompt")


def _asked(turns: Turns, where: str) -> Turns:
    """The turns without a last one of the assistant's: what is to be answered."""
    turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    if not turns or turns[-1]["role"] != "user":
        raise BadRow(f"{where}: no user's turn at the end of the prompt, to be answered")
    return turns


def _turns(value: Any, key: str, role: str, where: str) -> Turns:
    """A list of turns, from one, or from the text of one turn of `role`."""
    turns = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{where}: {key!r} should be text or a list of turns, not {value!r:.60}")
    for i, turn in enumerate(turns, 1):
        who, text = map(turn.get, ("role", "content")) if isinstance(turn, dict) else (None, None)
        if who not in ROLES or not isinstance(text, str):
            right = f"an object with 'role' ({', '.join(ROLES)}) and 'content' (text)"
            raise BadRow(f"{where}: {key!r}, turn {i} should be {right}, not {turn!r:.60}")
        if who != "system" and not text.strip():
            raise BadRow(f"{where}: {key!r}, turn {i}: the {who}'s text is empty; fill it")
    return [{"role": turn["role"], "content": whole_text(turn["content"])} for turn in turns]


def whole_text(text: str) -> str:
    """Half of a surrogate pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ----------------------------------------------------------------------- a stronger model's answers
class TargetServer:
    """Asks a model on an OpenAI-compatible server, several questions at a time; again (Retry-After,
    or 1, 2, 4, ... 64 `PAUSE`s) on 408, 429, 5xx, time-outs, lost connections and odd replies."""

    TIMEOUT, PAUSE = 120.0, 1.0  # seconds
    TRIES, LONGEST = 8, 10**7  # requests for an answer; bytes of a reply

    def __init__(self, url: str, model: str, key: str | None, workers: int = 8) -> None:
        """`url`: http://HOST/v1. `key` goes into a header and nowhere else."""
        host = r"https?://(?:[\w-]+(?:\.[\w-]+)*|\[[\da-f:.]+\])(?::(\d{1,5}))?(?:/[!-~]*)?"
        found = re.fullmatch(host, url, re.ASCII | re.IGNORECASE)
        if not found or not 0 < int(found[1] or 80) < 65536:
            told = "is no address such as http://localhost:8000/v1, without user and password"
            raise InputError(f"{url.rpartition('@')[2]!r:.60} {told}")  # nor is one shown
        if key and not (key.isascii() and key.isprintable()):
            raise InputError("the key in OPENAI_API_KEY has characters that no header can hold")
        self.url, self.model, self.key, self.workers = url, model, key, workers
        self.stopping, self.opener = threading.Event(), OpenerDirector()
        for kind in (ProxyHandler, HTTPHandler, HTTPSHandler):  # none follows a redirection, which
            self.opener.add_handler(kind())  # would take the key to wherever it leads

    def ask_all(self, questions: Sequence[Messages]) -> Iterator[tuple[int, str | None, str]]:
        """(index, answer, "") as answers come, in any order; (index, None, why) for one that is
        empty, refused or cut. Raises InputError where to ask on is no use, but not before the
        answers that were on their way have been given out."""
        pool, failure, self.stopping = ThreadPoolExecutor(self.workers), None, threading.Event()
        asked = {pool.submit(self.ask, turns): i for i, turns in enumerate(questions)}
        try:
            for done in as_completed(asked):
                if done.exception() is None and done.result()[1] != "stopped":
                    yield asked[done], *done.result()
                elif failure is None:
                    failure = done.exception()
                    self.stopping.set()
        finally:
            self.stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if failure is not None:
            raise failure

    def ask(self, messages: Messages) -> tuple[str | None, str]:
        """One answer, or None and why. Raises InputError where to ask on is no use."""
        body = json.dumps({"model": self.model, "messages": list(messages)}).encode()
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        why, wait = "", 0.0
        for attempt in range(self.TRIES):
            if self.stopping.wait(wait):
                return None, "stopped"
            wait = self.PAUSE * 2 ** min(attempt, 6) * random.uniform(0.5, 1.5)
            request = Request(f"{self.url}/chat/completions", body, headers)
            try:
                with self.opener.open(request, timeout=self.TIMEOUT) as reply:
                    status, after = reply.status, (reply.headers["Retry-After"] or "").strip()
                    said: bytes = reply.read(self.LONGEST)  # what is cut there is no JSON
                if status < 300:
                    return _completion(said)
            except (OSError, ValueError, http.client.HTTPException) as error:  # URLError: OSError
                why = str(error).replace(self.key or "\0", "***")
                continue
            why = f"HTTP {status}"
            if status in (408, 429) or status >= 500:
                wait = min(86400.0, float(after)) if after.isdecimal() else wait
                continue
            words = said.decode("utf-8", "replace").replace(self.key or "\0", "***")[:300]
            self.stopping.set()  # nothing else is asked, while others' answers are read
            raise InputError(f"{self.url}: {why}: {words}; wrong OPENAI_API_KEY or --target-model?")
        raise InputError(f"{self.url}: gave up after {self.TRIES} tries ({why}); --resume goes on")


def _completion(said: bytes) -> tuple[str | None, str]:
    """The text in a reply, or None and why. Raises InputError for what is no chat completion."""
    with reading("the reply, a chat completion,"):
        choice = json.loads(said)["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        text = whole_text(message.get("content") or "").strip()
        refused = message.get("refusal") or reason == "content_filter"
    why = "refused" if refused else "cut" if reason == "length" else "" if text else "empty"
    return None if why else text, why


# -------------------------------------------------------------------- tokenizers and chat templates
TOKENIZER_FILES = """tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json
    added_tokens.json vocab.json merges.txt chat_template.jinja generation_config.json
    """.split()  # noqa: SIM905
FALLBACKS = {  # for base models, which have none; each needs more <|tokens|> than those before it
    "zephyr": "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|{{ 'assistant' }}|>\n{% endif %}",
    "chatml": "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "<|begin_of_text|>{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
}
_NAMES = "|".join(FALLBACKS)


def load_tokenizer(
    path: str | Path, chat_template: str | None = None, date: datetime | None = None
) -> "Tokenizer":
    """The tokenizer in a checkpoint's folder, of which it needs only the tokenizer's files; with a
    template of FALLBACKS by name in place of its own, where given; `date` is today's in templates.
    Raises InputError for a folder without a tokenizer, and for one that is not implemented."""
    folder = Path(path)
    if chat_template is not None and chat_template not in FALLBACKS:
        raise InputError(f"--chat-template {chat_template!r} is not one of {', '.join(FALLBACKS)}")
    with reading(f"the tokenizer in {folder}"):
        return Tokenizer(folder, chat_template, date or datetime.now())


class Tokenizer:
    """A checkpoint's tokenizer and chat template, made by `load_tokenizer`. `eos_ids` may end an
    assistant's turn, and the tokenizer's own EOS is the first of them; `vocab_size` is the largest
    id + 1, which a padded embedding may exceed."""

    def __init__(self, folder: Path, chat_template: str | None, date: datetime) -> None:
        files = [folder / name for name in TOKENIZER_FILES]
        self.files = {file.name: file.read_bytes() for file in files if file.is_file()}
        config, self.date = read_json(folder / "tokenizer_config.json", optional=True), date
        named = read_json(folder / "special_tokens_map.json", optional=True) | config  # older first
        names = (f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
        texts = {name: named[name] for name in names if named.get(name) is not None}
        texts = {k: v["content"] if isinstance(v, dict) else str(v) for k, v in texts.items()}
        self.codec = _codec(folder, config)
        self.specials = self.codec.specials | texts  # {"eos_token": its text, ...}
        self.added = self._find_added(folder, config)
        longest_first = sorted(filter(None, map(re.escape, self.added)), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(longest_first) or '(?!)'})").split
        self.codec.table |= {i: self.codec.to_bytes(text) for text, i in self.added.items()}
        self.vocab_size = max(self.codec.table) + 1
        size = read_json(folder / "config.json", optional=True).get("vocab_size")  # the model's
        if type(size) is int and (most := self.vocab_size - 1) >= size:
            raise InputError(f"{folder}: the tokenizer has ids up to {most}, vocab_size is {size}")
        self._template: Template | None = self._find_template(folder, config, chat_template)
        self.eos_ids, self._template_ends = self._find_eos(folder)

    def encode(self, text: str, continuing: bool = False) -> list[int]:
        """Token ids, without BOS or EOS. A special token's text becomes its id, a lone surrogate
        U+FFFD's. `continuing`: more text is before it; SentencePiece adds no space in front."""
        ids, spaced = list[int](), not continuing
        for part in filter(None, self._split(text if text.isascii() else whole_text(text))):
            ids += [self.added[part]] if part in self.added else self.codec.encode(part, spaced)
            spaced = self.codec.legacy
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included. Bytes that are no UTF-8 become U+FFFD; an
        id without a token (the padding of an embedding has such) is empty, as in transformers."""
        return self.codec.decode([int(i) for i in ids if int(i) in self.codec.table])

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = False) -> Ids:
        """Token ids of the rendered conversation. Raises InputError where the template refuses."""
        return self.encode(self.render(messages, add_generation_prompt))

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The text of a conversation. A template is a foreign program: all it raises is caught."""
        if self._template is None:
            raise InputError("the checkpoint has no chat template; pass --chat-template " + _NAMES)
        given = {"messages": [dict(turn) for turn in messages]}
        try:
            return self._template.render(given, add_generation_prompt=add_generation_prompt)
        except Exception as error:
            told = f"fails on this conversation ({type(error).__name__}: {str(error)!r:.200})"
            raise BadRow(f"{self.template_name} {told}; try --chat-template {_NAMES}") from None

    def response_text(self, ids: list[int], so_far: bool = False) -> str:
        """A response as text, without an EOS at its end. `so_far`: as much as no token to come can
        change, which a part of a character may, and a run of bytes that SentencePiece spells."""
        ids = ids[:-1] if ids and ids[-1] in self.eos_ids else ids
        while so_far and ids and ids[-1] in self.codec.spelt:
            ids = ids[:-1]
        return self.decode(ids).rstrip("\ufffd") if so_far else self.decode(ids)

    def end_turn(self, ids: list[int]) -> list[int]:
        """A rendered response through its last EOS, or with one where the template sets none."""
        if not self.eos_ids:
            raise InputError("the tokenizer has no EOS; set eos_token in tokenizer_config.json")
        places = [i for i, token in enumerate(ids, 1) if token in self.eos_ids]
        return ids[: places[-1]] if self._template_ends and places else [*ids, self.eos_ids[0]]

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer's files, as they were read, into a folder; and a chosen fallback."""
        Path(path).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(path) / name).write_bytes(content)

    def _find_added(self, folder: Path, config: dict[str, Any]) -> dict[str, int]:
        """Ids by text of what is looked for before anything else is done with a text: what the
        codec's file, the configs, and the special tokens' names say is added."""
        old = read_json(folder / "added_tokens.json", optional=True)
        listed = [{"content": text, "id": i} for text, i in old.items()] + self.codec.added
        listed += [t | {"id": int(i)} for i, t in config.get("added_tokens_decoder", {}).items()]
        vocab, tokens = self.codec.vocab, {t["content"]: t for t in listed}  # the last one counts
        flags = ("lstrip", "rstrip", "single_word", "normalized")[: 4 if self.codec.nfc else 3]
        for text, flag in product(tokens, flags):
            if tokens[text].get(flag):  # no supported family has one
                raise InputError(f"{folder}: token {text!r:.60} has {flag}, not implemented")
        added = {text: vocab[text] for text in self.specials.values() if text in vocab}
        return added | {text: int(token["id"]) for text, token in tokens.items()}

    def _find_template(self, folder: Path, config: dict[str, Any], fallback: str | None) -> Any:
        """The fallback; or the file of its own, which counts more than the config."""
        name, source = "chat_template.jinja", config.get("chat_template")
        self.template_name = fallback or f"the chat template in {folder}"
        if isinstance(source, list):
            source = {t["name"]: t["template"] for t in source}.get("default")
        if fallback is not None:
            self.files[name] = FALLBACKS[fallback].encode()
            needs = {k: {*re.findall(r"<\|\w+\|>|eos_token", v)} for k, v in FALLBACKS.items()}
            lacking = {k: sorted(v - {*self.added, *self.specials}) for k, v in needs.items()}
            if lacking[fallback]:
                told = f"{fallback} needs {', '.join(lacking[fallback])}, which {folder} lacks"
                fit = [name for name in lacking if not lacking[name]] or ["no other"]
                raise InputError(f"--chat-template {told}; {fit[-1]} has tokens that are there")
        source = self.files[name].decode() if name in self.files else source
        given = {"strftime_now": self.date.strftime} | self.specials
        with reading(self.template_name):
            return None if source is None else JINJA.from_string(source, globals=given)

    def _find_eos(self, folder: Path) -> tuple[tuple[int, ...], bool]:
        """(eos_ids, whether the template itself puts one of them behind a response)."""
        eos = self.specials.get("eos_token")
        if eos is not None and eos not in self.added:
            raise InputError(f"{folder}: eos_token {eos!r:.60} is not in the vocabulary")
        ids, tail = [self.added[eos]] if eos is not None else [], list[int]()
        for file in (folder / "generation_config.json", folder / "config.json"):
            value = read_json(file, optional=True).get("eos_token_id")
            ids += value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
                raise InputError(f"{file}: eos_token_id {value!r:.60} is not in the vocabulary")
        if self._template is not None:  # what it puts behind an assistant's last turn
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "qzx"}]
            tail = self.encode(self.render(turns).rpartition("qzx")[2].lstrip(), continuing=True)
        # Of Qwen2.5's base the eos_token is another than what ends a turn.
        ids += [token for token in tail[:1] if token in self.added.values()]
        return tuple(dict.fromkeys(ids)), bool(set(ids) & set(tail))


def _refuse(message: str) -> None:
    raise TemplateError(message)


JINJA = ImmutableSandboxedEnvironment(extensions=[loopcontrols])  # as transformers has it
JINJA.trim_blocks = JINJA.lstrip_blocks = True
JINJA.globals |= {"raise_exception": _refuse, "tools": None, "documents": None}
JINJA.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False} | how)


# ------------------------------------------------------------------- codecs: plain text and tokens
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same within the segments between digits: a digit ends a segment, and so a run of white space.
DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# In the order of their ids; reserved ones follow, to 256 in all.
LLAMA3_SPECIAL = """begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1
    finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag image
    """.split()  # noqa: SIM905
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [b for b in range(256) if b not in _VISIBLE]
ALPHABET = {chr(b): b for b in _VISIBLE} | {chr(256 + i): b for i, b in enumerate(_HIDDEN)}
LONGEST_SPACE = 100_000  # tiktoken's regular expressions overflow their stack at some more
_LONG_SPACES = re.compile(r"(?<!\s)\s{100001,}")


class BytePairs:
    """Byte-level BPE through tiktoken, for text between added tokens. A token's rank is its index
    in `order`. Like the other codec it has what its file says: `vocab`, ids by the token's text;
    `table`, what ids stand for; `specials` and `added`, as the JSON files beside it have them."""

    legacy = False  # whether each text is spaced, and not the first alone
    spelt = frozenset[int]()  # tokens of a byte each, a run of which is decoded together

    def __init__(
        self, vocab: dict[str, int], order: list[str], pattern: str, nfc: bool, unk: int | None
    ) -> None:
        self.vocab, self.table = vocab, {i: self.to_bytes(token) for token, i in vocab.items()}
        self.specials, self.added, self.nfc = dict[str, str](), list[dict[str, Any]](), nfc
        # Bytes that are not in the vocabulary are dropped, as in transformers, or become `unk`.
        order = order + [char for char in ALPHABET if char not in vocab]
        self.ids = [vocab.get(token, unk) for token in order]
        ranks = {self.to_bytes(token): rank for rank, token in enumerate(order)}
        # What no alternative matches is a piece too, where tiktoken alone would drop it.
        whole = f"{pattern}|(?:(?!{pattern})(?s:.))+"
        self.bpe = tiktoken.Encoding("bpe", pat_str=whole, mergeable_ranks=ranks, special_tokens={})

    def to_bytes(self, token: str) -> bytes:
        """What a token decodes to."""
        known = all(char in ALPHABET for char in token)
        return bytes(ALPHABET[char] for char in token) if known else token.encode()

    def encode(self, text: str, spaced: bool) -> list[int]:
        text, cuts = unicodedata.normalize("NFC", text) if self.nfc else text, [0]
        for run in _LONG_SPACES.finditer(text) if len(text) > LONGEST_SPACE else ():
            cuts += range(run.start() + LONGEST_SPACE, run.end(), LONGEST_SPACE)
        parts = (text[i:j] for i, j in pairwise([*cuts, len(text)]))
        ids = (self.ids[rank] for part in parts for rank in self.bpe.encode_ordinary(part))
        return [i for i in ids if i is not None]

    def decode(self, ids: list[int]) -> str:
        return b"".join(map(self.table.__getitem__, ids)).decode("utf-8", "replace")


class SentencePieces:
    """A SentencePiece model, with its control tokens found in the text as transformers does. Of
    tokenizer_config.json it reads two keys: with `legacy`, a space is put in front of each text
    between added tokens, and not only of the first; without `add_prefix_space`, of none."""

    nfc, to_bytes = False, staticmethod(str.encode)

    def __init__(self, model: bytes, config: dict[str, Any]) -> None:
        self.legacy = bool(config.get("legacy", False))  # as transformers 5 has it
        self.prefix = config.get("add_prefix_space") is not False
        # Concatenated protocol buffers are merged: this is normalizer_spec.add_dummy_prefix = false
        self.bare = SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
        self.spaced = sp = SentencePieceProcessor(model_proto=model) if self.prefix else self.bare
        ids, pieces = range(len(sp)), [sp.id_to_piece(i) for i in range(len(sp))]
        self.vocab = dict(zip(pieces, ids, strict=True))
        self.spelt = {i: bytes([int(pieces[i][3:5], 16)]) for i in ids if sp.is_byte(i)}
        self.table = {i: pieces[i].replace("\u2581", " ").encode() for i in ids} | self.spelt
        named = {"bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "unk_token": sp.unk_id()}
        self.specials = {name: pieces[i] for name, i in named.items() if i >= 0}
        found = [i for i in ids if sp.is_control(i) or sp.is_unknown(i)]
        self.added: list[dict[str, Any]] = [{"content": pieces[i], "id": i} for i in found]

    def encode(self, text: str, spaced: bool) -> list[int]:
        """Token ids. `spaced`: a space is put in front of the text."""
        return list((self.spaced if spaced else self.bare).encode(text))

    def decode(self, ids: list[int]) -> str:
        text = ""
        for _, run in groupby(ids, self.spelt.__contains__):
            data = b"".join(map(self.table.__getitem__, run))
            try:
                text += data.decode()
            except UnicodeDecodeError:  # transformers: one U+FFFD for each byte of the run
                text += "\ufffd" * len(data)
        return text.removeprefix(" ") if self.prefix else text


def _codec(folder: Path, config: dict[str, Any]) -> BytePairs | SentencePieces:
    """What the folder's files hold: a tokenizer.model is told by its content, not its name; of a
    tokenizer.json, byte-level BPE, what is not read changes no id."""
    file, path = folder / "tokenizer.model", folder / "tokenizer.json"
    content = file.read_bytes() if file.is_file() else b""
    with reading(str(file)):
        if content and not re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content):
            return SentencePieces(content, config)
        if config.get("add_prefix_space"):
            raise _unknown(folder / "tokenizer_config.json", "add_prefix_space", True)
        if content and not path.is_file():
            return _llama3(content)
    if not path.is_file():
        raise InputError(f"{folder} is no folder with a tokenizer.json or tokenizer.model")
    with reading(str(path)):
        spec = read_json(path)
        model, pattern = spec["model"], _pattern(spec.get("pre_tokenizer"), path)
        odd = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout")
        told = {key: model.get(key) for key in odd} | {"normalizer": spec.get("normalizer")}
        told["model type"] = model.get("type", "BPE")
        for key, value in told.items():
            if value and value not in ({"type": "NFC"}, "BPE"):
                raise _unknown(path, key, value)
        vocab: dict[str, int] = model["vocab"]
        unk = vocab[model["unk_token"]] if model.get("unk_token") else None
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        order = _token_order(vocab, merges, bool(model.get("ignore_merges")), path)
        codec = BytePairs(vocab, order, pattern, told["normalizer"] is not None, unk)
        codec.added = spec.get("added_tokens") or []
        return codec


def _llama3(content: bytes) -> BytePairs:
    """tiktoken's format: lines of a token in base64 and its rank, which is its id."""
    chars = {byte: char for char, byte in ALPHABET.items()}
    lines = [line.split() for line in content.splitlines() if line]
    tokens = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    vocab = {"".join(chars[b] for b in token): rank for token, rank in tokens.items()}
    codec = BytePairs(vocab, sorted(vocab, key=vocab.__getitem__), LLAMA3, False, None)
    rest = (f"reserved_special_token_{i}" for i in range(2, 256 - len(LLAMA3_SPECIAL) + 2))
    names = enumerate([*LLAMA3_SPECIAL, *rest], max(tokens.values()) + 1)
    codec.added = [{"content": f"<|{name}|>", "id": i} for i, name in names]
    codec.specials = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return codec


def _unknown(path: Path, key: str, value: Any) -> InputError:
    read = "byte-level BPE as in Llama 3, Qwen2.5, SmolLM2 is, and SentencePiece's tokenizer.model"
    return InputError(f"{path}: {key} {value!r:.200} is not implemented; {read}")


def _pattern(pre: Any, path: Path) -> str:
    """The regular expression of the pieces within which a pre-tokenizer lets bytes merge."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre or {"type": None}]
    *before, last = steps
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        match [last.get("use_regex", True), *before]:
            case [True]:
                return GPT2
            case [True, {"type": "Digits", "individual_digits": True}]:
                return DIGITS
            case [False, {"behavior": "Isolated", "invert": False, "pattern": {"Regex": regex}}]:
                return str(regex)
    raise _unknown(path, "pre_tokenizer", pre)


def _token_order(
    vocab: dict[str, int], merges: Sequence[Sequence[str]], whole: bool, path: Path
) -> list[str]:
    """The tokens that merging can reach, by the rank of the merge that makes them: tiktoken merges
    any two neighbours whose bytes are a token; `tokenizer.json` only listed pairs. The two agree if
    each token's own bytes merge into it by listed pairs: had another pair met, with a better rank,
    it would have met there too. tiktoken must not know a token that fails this; unless it stands
    for a piece that equals it (`whole`, in the file ignore_merges)."""
    ranks: dict[tuple[str, ...], int] = {(a, b): rank for rank, (a, b) in enumerate(merges)}
    made = {"".join(pair) for pair in ranks}
    if not made <= vocab.keys():
        raise InputError(f"{path}: a merge makes {min(made - vocab.keys())!r:.60}, not a token")
    order = {char: -1 for char in ALPHABET if char in vocab}
    for token in vocab if whole else made:
        if len(token) > 1 and ALPHABET.keys() >= set(token):
            halves = _halves(token, ranks)
            if whole and len(halves) == 2 and halves not in ranks:
                raise InputError(f"{path}: no merge makes the token {token!r:.60}; list it")
            if whole or halves in ranks:
                order[token] = ranks.get(halves, len(ranks))
    return sorted(order, key=order.__getitem__)


def _halves(token: str, ranks: dict[tuple[str, ...], int]) -> tuple[str, ...]:
    """What byte-pair encoding, plainly, makes of a token before the merge that may complete it."""
    parts, none = list(token), len(ranks)
    while len(parts) > 2:
        found = [ranks.get(pair, none) for pair in pairwise(parts)]
        i = found.index(min(found))
        if found[i] == none:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


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
TENTHS = {"test": {0}, "validation": {1}, "pretrain": {*range(2, 10)}, "clean": {*range(2, 10)}}


def task_examples(split: str, n: int, seed: int, rewrite_share: float = 0.0) -> list[Example]:
    """`n` examples of the built-in tasks, kinds in turn: the first k of n are those of k. Of splits
    "pretrain" has all kinds and answers of which half are right, and for `rewrite_share` of its
    rows REWRITE_PROMPT with a draft, the response being another draft; "clean" has seen kinds,
    "validation" and "test" have all, with right answers and a flawed `rejected`. A prompt's hash
    puts it in one of test, validation and training, so that these share none."""
    if split not in TENTHS:
        raise InputError(f"split {split!r} is not one of {', '.join(TENTHS)}")
    rng = random.Random(hash_seed("tasks", split, seed))
    kinds = SEEN if split == "clean" else [*chain(*zip(SEEN, UNSEEN, strict=True))]
    examples = []
    for i in range(n):
        prompt = _prompt(kinds[i % len(kinds)], rng)
        while hash_seed("split", prompt) % 10 not in TENTHS[split]:
            prompt = _prompt(kinds[i % len(kinds)], rng)
        gold, rejected = right_answer(prompt), None
        if split == "pretrain":
            draft, answer = (a if rng.random() < 0.5 else flawed_answer(a, rng) for a in [gold] * 2)
            if rng.random() < rewrite_share:
                prompt = REWRITE_PROMPT.format(prompt=prompt, draft=draft)
        else:
            answer, rejected = gold, flawed_answer(gold, rng)
        turn = {"role": "user", "content": prompt}
        examples.append(Example((turn,), answer, rejected, f"task:{split}:{i}"))
    return examples


def _prompt(kind: str, rng: random.Random) -> str:
    if kind == "add":
        return f"add {rng.randint(10, 99)} {rng.randint(10, 99)}"
    word = "".join(rng.choices(LETTERS, k=rng.randint(3, 5)))
    if kind != "count":
        return f"{kind} {word}"
    letter = rng.choice(LETTERS)  # which is about half of the word
    return f"count {letter} {''.join(letter if rng.random() < 0.5 else other for other in word)}"


def right_answer(prompt: str) -> str:
    """The one right answer, as working and result: "reverse abcd" -> "a-b-c-d > dcba"; that of a
    rewriting prompt too. Raises InputError for what is no built-in task."""
    match prompt.split(" | ")[0].split(" "):
        case [kind, word] if kind in _RESULTS and len(word) > 1:
            return f"{'-'.join(word)} > {_RESULTS[kind](word)}"
        case ["count", letter, word]:
            counts = [str(word[: i + 1].count(letter)) for i in range(len(word))]
            return f"{'-'.join(counts)} > {counts[-1]}"
        case ["add", *terms] if re.fullmatch("[1-9][0-9] [1-9][0-9]", " ".join(terms)):
            a, b = map(int, terms)
            ones = a % 10 + b % 10
            tens = a // 10 + b // 10 + ones // 10
            return f"{a % 10}+{b % 10}={ones}-{a // 10}+{b // 10}={tens} > {a + b}"
    raise InputError(f"{prompt!r:.60} is no built-in task such as 'reverse abcd' or 'add 46 27'")


def flawed_answer(answer: str, rng: random.Random) -> str:
    """A right answer, spoilt in one of four ways: one cannot tell from the prompt which."""
    working, result = answer.split(" > ")
    flaw, steps = rng.randrange(4), working.split("-")
    if flaw == 0:  # without the working
        return result
    if flaw == 1:  # a wrong last character
        same_sort = "0123456789" if result[-1].isdigit() else LETTERS
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
    parts = (right[c:d] if i in mended else draft[a:b] for i, (_, a, b, c, d) in enumerate(edits))
    return "".join(parts)


def check_answer(prompt: str, answer: str) -> bool:
    """Whether the answer is right to the letter, its working included. Text alone is needed."""
    return answer == right_answer(prompt)


def task_kind(prompt: str) -> str:
    """The kind of a built-in task: one of SEEN or of UNSEEN."""
    right_answer(prompt)
    return prompt.split(" ")[0]


def write_task_tokenizer(path: str | Path) -> None:
    """Writes the built-in tasks' tokenizer: 256 bytes, whose ids are their values, and 4 markers.
    Prompts are `<|user|>PROMPT<|assistant|>`, and responses `ANSWER<|end|>`."""
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    markers = enumerate(("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"), 256)
    added = [{"id": i, "content": t, "special": True} | flags for i, t in markers]
    bytes_alone = {"type": "BPE", "vocab": ALPHABET, "merges": []}
    spec = {"added_tokens": added, "pre_tokenizer": step, "decoder": step, "model": bytes_alone}
    template = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    template += "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"eos_token": "<|end|>", "pad_token": "<|end|>", "chat_template": template}
    Path(path).mkdir(parents=True, exist_ok=True)
    for name, value in (("tokenizer.json", spec), ("tokenizer_config.json", config)):
        (Path(path) / name).write_text(json.dumps(value, indent=1), encoding="utf-8")
