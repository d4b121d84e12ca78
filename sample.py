"""Look at a model, its answers and its accuracy, and at the curves of a run.

    python sample.py --model OUT/final --prompt "Why is the sky blue?" --improve 3
    python sample.py --model OUT/final --prompts questions.jsonl --out answers.jsonl

`--prompts` reads rows as train.py does; --out gets a row {"prompt", "response"} for each, in order;
with `--improve N` the response is the last of N improvements, and "drafts" has those before it.
"""

import argparse
import contextlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TextIO, get_args, get_origin, get_type_hints

import torch

import data
import sgpo
from model import Count, InputError, Transformer, Weight, Whole, generate, hash_seed, read_json

IMPROVER_FILE = "improver_prompt.json"  # in a model's folder: how it was asked to improve answers


def main(argv: Sequence[str]) -> int:
    """Parses, samples, prints or writes, and turns bad input into one line and exit status 2."""
    try:
        flags = parse_args(argv)
        talks: list[data.Messages] = [[{"role": "user", "content": flags.prompt or ""}]]
        if flags.prompts is not None:
            talks = [row.messages for row in data.load_examples(flags.prompts, prompts=True)]
        with whole_file(flags.out) if flags.out else contextlib.nullcontext(sys.stdout) as file:
            answers = sample_answers(*load(flags), flags, talks)
            for turns, (*drafts, last) in zip(talks, answers, strict=True) if flags.prompts else ():
                told = {"drafts": drafts} if drafts else {}
                row = {"prompt": sgpo.as_prompt(turns), "response": last} | told
                print(json.dumps(row, ensure_ascii=False), file=file)
        return 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class Parser(argparse.ArgumentParser):
    """argparse, but an error is the one line of every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse_flags(kind: type, argv: Sequence[str], doc: str, after: str = "") -> dict[str, Any]:
    """What was given of a dataclass's fields, each of which is a flag: the type says what is read,
    and a number's bounds; the string below is its help; its class's docstring begins its group.
    --help begins with the first line of `doc`, and ends with what comes `after`."""
    parser = Parser(description=doc.split("\n")[0], epilog=after, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    field = re.compile(r'^    (?:# (.+):|(\w+): .*\n    "((?:[^"\\]|\\\n)*)")$', re.MULTILINE)
    hints, spans = get_type_hints(kind, include_extras=True), dict[str, list[Any]]()
    for part in kind.__mro__[:-1]:
        group = parser.add_argument_group((part.__doc__ or "").split(".")[0])
        for title, name, told in field.findall(inspect.getsource(part)):
            if title:
                group = parser.add_argument_group(title)
                continue
            hint, default, how = hints[name], getattr(kind, name, None), dict[str, Any]()
            while (origin := get_origin(hint)) not in (None, Literal):  # of X | None it takes X
                hint, *rest = get_args(hint)
                how |= {"nargs": "+"} if origin is list else {}
                spans |= {name: rest} if origin is Annotated else {}
            brief = "" if default is None or "\n" in str(default) else f" [{default}]"
            how["help"] = told.replace("\\\n", "") + brief
            if hint is bool:
                how["action"] = argparse.BooleanOptionalAction
            elif origin is Literal:
                how["choices"] = get_args(hint)
            else:
                how |= {"type": hint, "metavar": hint.__name__.upper()}
            group.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **how)
    given = vars(parser.parse_args(argv))
    for name, (low, high) in spans.items():
        found = given.get(name, [])
        for value in found if isinstance(found, list) else [found]:
            if not low <= value <= high:  # NaN too
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} is {value}, but it must be from {low:g} to {high:g}")
    return given


@dataclass
class Flags:
    """Whose answers, to what, and how."""

    model: str | None = None
    "a Hugging Face folder"
    prompt: str | None = None
    "what the user says"
    prompts: str | None = None
    "a JSON or JSONL file of prompts"
    out: str | None = None
    "a file for the answers to --prompts; default: the screen"
    chat_template: Literal["chatml", "zephyr", "llama3"] | None = None
    "a chat template by name, for a model that has none of its own"
    max_new_tokens: Count = 512
    "tokens of an answer, at most"
    temperature: Weight = 0.7
    "0 is greedy"
    top_k: Whole = 50
    "sample among so many tokens; 0: all"
    top_p: Annotated[float, 1e-9, 1.0] = 0.95
    "sample among the likeliest tokens of this total probability"
    seed: Whole = 0
    "everything drawn at random follows from it"
    batch_size: Count = 16
    "rows decoded together"
    precision: Literal["fp32", "bf16"] = "fp32"
    "of weights and computation"
    improve: Whole = 0
    "how often the model then improves its own answer (--method sgpo); all are shown"
    improver_instruction: str | None = None
    "what asks for an improvement, with {prompt} and {answer}; default: as in training"


def parse_args(argv: Sequence[str], kind: type[Flags] = Flags) -> Any:
    """The flags of this command. Raises InputError for values that make no sense."""
    flags = kind(**parse_flags(kind, argv, __doc__ or ""))
    said, told = (flags.prompt, flags.prompts), flags.improver_instruction
    for message, wrong in {
        "--model DIR is missing: whose answers?": flags.model is None,
        "give --prompt TEXT or --prompts FILE, one of the two": said.count(None) != 1,
        "--prompt is empty": flags.prompt is not None and not flags.prompt.strip(),
        "--out goes with --prompts": flags.out is not None and flags.prompts is None,
        "--out is a folder; it should be a file": Path(flags.out or "file").is_dir(),
        "--improver-instruction goes with --improve": told is not None and not flags.improve,
        "--improver-instruction holds no {answer}": "{answer}" not in (told or "{answer}"),
    }.items():
        if wrong:
            raise InputError(message)
    return flags


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[TextIO]:
    """A file: opened at once, for sampling takes long, and renamed when whole."""
    partial = Path(f"{path}.partial")
    try:
        with partial.open("w", encoding="utf-8", errors="replace") as file:
            yield file
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)  # where it did not become whole


def load(flags: Flags) -> tuple[Transformer, data.Tokenizer]:
    """The model, and the tokenizer that goes with it."""
    folder, device = flags.model or "", "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = data.load_tokenizer(folder, flags.chat_template)
    dtype = torch.bfloat16 if flags.precision == "bf16" else torch.float32
    return Transformer.from_pretrained(folder, dtype, device), tokenizer


def sample_answers(
    model: Transformer, tokenizer: data.Tokenizer, flags: Flags, talks: Sequence[data.Messages]
) -> list[list[str]]:
    """Of each conversation an answer, then `flags.improve` times an improvement of the last. Those
    to `flags.prompt` are printed as they are written."""
    shown = 0  # characters

    def watch(_: int, ids: list[int], end: str | None = None) -> None:
        nonlocal shown
        text = tokenizer.response_text(ids, so_far=end is None)
        print(text[shown:], end=end or "", flush=True)
        shown = len(text) if end is None else 0

    instruction = flags.improver_instruction or read_instruction(flags.model or "")
    asked, answers = list(talks), list[list[str]]()
    for i in range(1 + flags.improve):
        prompts = [tokenizer.apply_chat_template(turns, True) for turns in asked]
        if not all(prompts):
            raise InputError(f"{flags.model}: the chat template makes an empty prompt")
        new = generate(
            model, prompts, flags.max_new_tokens, temperature=flags.temperature,
            top_k=flags.top_k, top_p=flags.top_p, eos_ids=tokenizer.eos_ids,
            seed=hash_seed(flags.seed, i) if i else flags.seed, batch_size=flags.batch_size,
            watch=watch if flags.prompt else None,
        )  # fmt: skip
        if flags.prompt:
            watch(0, new[0], "\n" if i == flags.improve else f"\n\n{'-' * 20}\n\n")
        answers.append([tokenizer.response_text(ids) for ids in new])
        both = zip(talks, answers[-1], strict=True)
        asked = [sgpo.improver_prompt(turns, text, instruction) for turns, text in both]
    return [list(texts) for texts in zip(*answers, strict=True)]


def read_instruction(folder: str | Path) -> str:
    """How a model was asked for improvements when it was trained; else as SGPO does by default."""
    file = Path(folder) / IMPROVER_FILE
    instruction = read_json(file).get("instruction") if file.exists() else sgpo.IMPROVER
    if not isinstance(instruction, str) or "{answer}" not in instruction:
        raise InputError(f"{file}: 'instruction' should be text that holds {{answer}}")
    return instruction


def task_accuracy(
    model: Transformer, tokenizer: data.Tokenizer, seed: int, temperature: float, split: str
) -> dict[str, float]:
    """Exact match on held-out prompts of the built-in tasks: shares for seen and unseen kinds."""
    examples = data.task_examples(split, 512, seed)
    prompts = [tokenizer.apply_chat_template(list(e.messages), True) for e in examples]
    how: dict[str, Any] = {"temperature": temperature, "eos_ids": tokenizer.eos_ids, "seed": seed}
    answers = generate(model, prompts, 48, batch_size=512, **how)
    right: dict[str, list[bool]] = {"seen": [], "unseen": []}
    for example, tokens in zip(examples, answers, strict=True):
        prompt, ended = example.messages[-1]["content"], tokens[-1] in tokenizer.eos_ids
        good = ended and data.check_answer(prompt, tokenizer.decode(tokens[:-1]))
        right["seen" if data.task_kind(prompt) in data.SEEN else "unseen"].append(good)
    return {kind: sum(marks) / len(marks) for kind, marks in right.items()}


def print_accuracies(models: dict[str, Path], tokenizer: data.Tokenizer, seed: int) -> None:
    """The table at the end of a run on the built-in tasks."""
    print("\nheld-out accuracy in %: greedy / temperature 0.7 / temperature 1")
    print(f"{'':12}{'seen kinds':>22}{'unseen kinds':>22}")
    for name, folder in models.items():
        model = Transformer.from_pretrained(folder)
        scores = [task_accuracy(model, tokenizer, seed, t, "test") for t in (0.0, 0.7, 1.0)]
        cells = (" / ".join(f"{100 * s[kind]:.1f}" for s in scores) for kind in ("seen", "unseen"))
        print(f"{name:12}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


def plot_curves(out: Path) -> None:
    """OUT/curves.png from OUT/metrics.jsonl, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    panels = (
        "eval/loss loss", "rewards/chosen rewards/margins rewards/rejected",
        "eval/rewards/accuracies rewards/accuracies", "logps/chosen logps/rejected",
        "eval/accuracy/seen eval/accuracy/unseen", "segment/identical replay/times_sampled",
    )  # fmt: skip
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    for axis, panel in zip(figure.subplots(2, 3).flat, panels, strict=True):
        axis.set(xlabel="step")
        for key in panel.split():
            if points := [(row["step"], row[key]) for row in rows if key in row]:
                axis.plot(*zip(*points, strict=True), ".-", label=key)
                axis.legend(fontsize=8)
    figure.savefig(out / "curves.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
