"""Look at a model: sample answers from it, measure it on the built-in tasks; and at a run: its
curves, its pairs in colour, its first steps number by number.

    python sample.py --model OUT/final --prompt "Why is the sky blue?"
    python sample.py --model OUT/final --prompts questions.jsonl --out answers.jsonl
    python sample.py --model OUT/final --prompts question.jsonl --out NAME.jsonl --format mt_bench
    python sample.py --model OUT/final --prompt "Why is the sky blue?" --improve 3

`--prompts` reads JSON or JSONL rows with `prompt` (text, or messages up to a user's turn) or
`messages`; the last assistant turn of those, if there is one, is left out. The output holds a row
{"prompt", "response"} for each, in the same order; with `--improve N` the response is the last of N
improvements, and "drafts" has what came before. `--format` reads a benchmark's own questions and
writes the file that its judge reads.
"""

import argparse
import ast
import contextlib
import importlib.util
import inspect
import itertools
import json
import sys
import time
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

import data
import sgpo
from data import Pair
from model import InputError, Transformer, generate, hash_seed, open_safetensors, read_json

IMPROVER_FILE = "improver_prompt.json"  # in a model's folder: how it was asked to improve answers
MT_BENCH = {  # temperatures by category: lm-sys/FastChat, fastchat/llm_judge/common.py
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
    "reasoning": 0.0, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Parses, samples, and turns bad input into one line and exit status 2."""
    try:
        answer(parse_args(argv))
        return 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises InputError where a flag's number is not from low to high, NaN included."""
    if not low <= value <= high:
        flag = "--" + name.replace("_", "-")
        raise InputError(f"{flag} is {value}, but it must be from {low:g} to {high:g}")


class Parser(argparse.ArgumentParser):
    """argparse, but an error is the one line of every other bad input."""

    def error(self, message: str) -> Any:
        """Raises InputError."""
        raise InputError(message)

    def add_fields(self, kind: type) -> None:
        """A flag for each field of a dataclass. Those not given are left out of the namespace."""
        for name, hint, text in help_strings(kind):
            inner = next(a for a in (*typing.get_args(hint), hint) if a is not type(None))
            inner = hint if typing.get_origin(hint) in (list, Literal) else inner
            options: dict[str, Any] = {"default": argparse.SUPPRESS}
            default = getattr(kind, name)
            brief = default is not None and "\n" not in str(default)
            options["help"] = f"{text} [{default}]" if brief else text
            if inner is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif typing.get_origin(inner) is Literal:
                options["choices"] = typing.get_args(inner)
            elif typing.get_origin(inner) is list:
                kind_of = typing.get_args(inner)[0]
                options |= {"nargs": "+", "type": kind_of}
                options["metavar"] = "FILE" if kind_of is str else kind_of.__name__.upper()
            else:
                options |= {"type": inner, "metavar": inner.__name__.upper()}
            self.add_argument("--" + name.replace("_", "-"), **options)


def help_strings(kind: type) -> Iterator[tuple[str, Any, str]]:
    """Name, type and help of each field of a dataclass and of those that it inherits from: the
    help is the string under the field."""
    hints = typing.get_type_hints(kind)
    for part in kind.__mro__[:-1]:
        body: list[Any] = ast.parse(inspect.getsource(part)).body[0].body  # type: ignore[attr-defined]
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign):
                name = field.target.id  # type: ignore[union-attr]
                yield name, hints[name], text.value.value


def parse_flags(parser, kind, argv):
    import re
    from typing import Annotated

    spans = {}
    hints = typing.get_type_hints(kind, include_extras=True)
    for part in reversed(kind.__mro__[:-1]):
        source = inspect.getsource(part)
        helps = dict(re.findall(r'^    (\w+): .*\n    "((?:[^"\\]|\\\n)*)"', source, re.MULTILINE))
        own = (
            [n for n in part.__annotations__ if n in helps]
            if "__annotations__" in vars(part)
            else []
        )
        group = parser.add_argument_group(part.__doc__.split("\n")[0].rstrip(".")) if own else None
        for name in own:
            hint = hints[name]
            many, default = False, getattr(kind, name, None)
            while (origin := typing.get_origin(hint)) not in (None, Literal, Annotated):
                many |= origin is list
                hint = next(p for p in typing.get_args(hint) if p is not type(None))
            if origin is Annotated:
                hint, *spans[name] = typing.get_args(hint)
            brief = "" if default is None or "\n" in str(default) else f" [{default}]"
            how = {"help": helps[name].replace("\\\n", "") + brief}
            how |= {"nargs": "+"} if many else {}
            if hint is bool:
                how["action"] = argparse.BooleanOptionalAction
            elif origin is Literal:
                how["choices"] = typing.get_args(hint)
            else:
                how |= {"type": hint, "metavar": hint.__name__.upper()}
            group.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **how)
    given = vars(parser.parse_args(argv))
    for name in spans.keys() & given.keys():
        low, high = spans[name]
        for value in given[name] if isinstance(given[name], list) else [given[name]]:
            check_range(name, value, low, high)
    return given


@dataclass
class Flags:
    """Every flag of this command, with its default. The string under a field is its help."""

    model: str | None = None
    "a Hugging Face folder"
    prompt: str | None = None
    "what the user says"
    prompts: str | None = None
    "a JSON or JSONL file of prompts"
    out: str | None = None
    "a file for the answers to --prompts; default: the screen. A benchmark calls the model by the \
file's name"
    format: Literal["jsonl", "alpaca_eval", "arena_hard", "mt_bench"] = "jsonl"
    "of --prompts and --out: rows as above, or a benchmark's own questions and answers"
    chat_template: Literal["chatml", "zephyr", "llama3"] | None = None
    "a chat template by name, for a model that has none of its own"
    max_new_tokens: int = 512
    "tokens of an answer, at most"
    temperature: float | None = None
    "0 is greedy; default: 0.7, and for mt_bench FastChat's of each category"
    top_k: int = 50
    "sample among so many tokens; 0: all"
    top_p: float = 0.95
    "sample among the likeliest tokens of this total probability"
    seed: int = 0
    "everything drawn at random follows from it"
    batch_size: int = 16
    "rows decoded together"
    precision: Literal["fp32", "bf16"] = "fp32"
    "of weights and computation"
    improve: int = 0
    "how often the model then improves its own answer (--method sgpo); all are shown"
    improver_instruction: str | None = None
    "what asks for an improvement, with {prompt} and {answer}; default: what the model was \
trained with"


def parse_args(argv: Sequence[str]) -> Flags:
    """The flags of this command. Raises InputError for values that make no sense."""
    parser = Parser("sample.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_fields(Flags)
    flags = Flags(**vars(parser.parse_args(argv)))
    if flags.model is None:
        raise InputError("--model DIR is missing: whose answers?")
    if (flags.prompt is None) == (flags.prompts is None):
        raise InputError("give --prompt TEXT or --prompts FILE, one of the two")
    if flags.prompt is not None and not flags.prompt.strip():
        raise InputError("--prompt is empty")
    if flags.improver_instruction is not None:
        if not flags.improve:
            raise InputError("--improver-instruction goes with --improve")
        if "{answer}" not in flags.improver_instruction:
            raise InputError("--improver-instruction holds no {answer}")
    if flags.out is not None and flags.prompts is None:
        raise InputError("--out goes with --prompts")
    if flags.format != "jsonl":
        suffix = ".json" if flags.format == "alpaca_eval" else ".jsonl"
        if flags.prompts is None or Path(flags.out or "").suffix != suffix:
            told = f"--prompts FILE and --out NAME{suffix}"
            raise InputError(f"--format {flags.format} goes with {told}, NAME being the model's")
    for name, low, high in (
        ("max_new_tokens", 1, 10**6), ("temperature", 0, 1e6), ("top_k", 0, 10**9),
        ("top_p", 1e-9, 1), ("seed", 0, 2**62), ("batch_size", 1, 10**6), ("improve", 0, 1000),
    ):  # fmt: skip
        if getattr(flags, name) is not None:
            check_range(name, getattr(flags, name), low, high)
    return flags


def answer(flags: Flags) -> None:
    """Reads the prompts, samples, prints or writes."""
    folder = flags.model or ""
    tokenizer = data.load_tokenizer(folder, flags.chat_template)
    questions = [data.Question([{"role": "user", "content": flags.prompt or ""}], [], {})]
    if flags.prompts is not None and flags.format == "jsonl":
        questions = [data.Question(turns, [], {}) for turns in data.load_prompts(flags.prompts)]
    elif flags.prompts is not None:
        questions = data.load_questions(flags.prompts, flags.format)
    if not all(tokenizer.apply_chat_template(one.messages, True) for one in questions):
        raise InputError(f"{folder}: the chat template makes an empty prompt")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if flags.precision == "bf16" else torch.float32
    with contextlib.ExitStack() as stack:
        file = sys.stdout
        if flags.out is not None:  # opened first, for sampling takes long; renamed when whole
            partial = Path(flags.out).with_name(f".{Path(flags.out).name}.partial")
            if Path(flags.out).is_dir():
                raise InputError(f"--out {flags.out} is a folder; it should be a file")
            if not partial.parent.is_dir():
                raise InputError(f"--out {flags.out}: there is no folder {partial.parent}")
            stack.callback(partial.unlink, missing_ok=True)  # where it did not become whole
            file = stack.enter_context(partial.open("w", encoding="utf-8", errors="replace"))
        model = Transformer.from_pretrained(folder, dtype, device)
        check_vocabulary(tokenizer, model, folder)
        answers = converse(model, tokenizer, flags, questions)
        if flags.prompts is None:
            print(f"\n\n{'-' * 20}\n\n".join(answers[0][0]))
        else:
            made = [file_row(flags, *both) for both in zip(questions, answers, strict=True)]
            lines = [json.dumps(row, ensure_ascii=False) for row in made]
            whole = flags.format == "alpaca_eval"  # one JSON list
            print("[\n" + ",\n".join(lines) + "\n]" if whole else "\n".join(lines), file=file)
        if flags.out is not None:
            file.flush()
            partial.rename(flags.out)


def file_row(flags: Flags, question: data.Question, answers: list[list[str]]) -> dict[str, Any]:
    """The row of --out for a question and its answers: for each turn the drafts, the last of them
    the answer. The keys are those that the benchmarks' own programs write:

    alpaca_eval: tatsu-lab/alpaca_eval, src/alpaca_eval/main.py, `evaluate_from_model`.
    arena_hard: lmarena/arena-hard-auto, 2.0, gen_answer.py; without "metadata", which its
        utils/add_markdown_info.py adds for the style control.
    mt_bench: lm-sys/FastChat, fastchat/llm_judge/gen_model_answer.py.
    """
    name, row, last = Path(flags.out or "").stem, question.row, [texts[-1] for texts in answers]
    if flags.format == "alpaca_eval":
        kept = {key: row[key] for key in ("dataset", "datasplit") if key in row}
        return kept | {"instruction": row["instruction"], "output": last[0], "generator": name}
    if flags.format == "arena_hard":
        said = [*question.messages, {"role": "assistant", "content": {"answer": last[0]}}]
        made = {"uid": row["uid"], "ans_id": f"{hash_seed(flags.seed, name, row['uid']):016x}"}
        return made | {"model": name, "messages": said, "tstamp": time.time()}
    if flags.format == "mt_bench":
        number, choices = row["question_id"], [{"index": 0, "turns": last}]
        made = {"question_id": number, "answer_id": f"{hash_seed(flags.seed, name, number):016x}"}
        return made | {"model_id": name, "choices": choices, "tstamp": time.time()}
    turns = question.messages
    made = {"prompt": turns[0]["content"] if len(turns) == 1 else turns, "response": last[0]}
    return made | ({"drafts": answers[0][:-1]} if flags.improve else {})


def converse(
    model: Transformer,
    tokenizer: data.Tokenizer,
    flags: Flags,
    questions: Sequence[data.Question],
) -> list[list[list[str]]]:
    """For each question and each of its turns: the answer's drafts and, last, the answer.

    A later turn is asked with the answers before it in the conversation. Benchmarks get answers
    without the space around them, as their own programs have it.
    """
    talks = [list(question.messages) for question in questions]
    answers: list[list[list[str]]] = [[] for _ in questions]
    for turn in range(1 + max(len(question.later) for question in questions)):
        alike = defaultdict[float, list[int]](list)  # questions by temperature
        for i, question in enumerate(questions):
            if turn <= len(question.later):
                alike[temperature_for(question, flags)].append(i)
        seed = hash_seed(flags.seed, "turn", turn) if turn else flags.seed
        for temperature, places in alike.items():
            asked = [talks[i] for i in places]
            drafts = sample_answers(model, tokenizer, flags, asked, temperature, seed)
            for i, texts in zip(places, zip(*drafts, strict=True), strict=True):
                answers[i].append([t if flags.format == "jsonl" else t.strip() for t in texts])
                talks[i].append({"role": "assistant", "content": answers[i][-1][-1]})
                said = questions[i].later[turn : turn + 1]
                talks[i] += [{"role": "user", "content": text} for text in said]
    return answers


def temperature_for(question: data.Question, flags: Flags) -> float:
    """The one given; else 0.7, and for MT-bench that of the question's category."""
    if flags.temperature is not None:
        return flags.temperature
    return MT_BENCH.get(question.row["category"], 0.7) if flags.format == "mt_bench" else 0.7


def sample_answers(
    model: Transformer,
    tokenizer: data.Tokenizer,
    flags: Flags,
    conversations: Sequence[data.Messages],
    temperature: float,
    seed: int,
) -> list[list[str]]:
    """An answer to each conversation, then `flags.improve` times an improvement of the last."""
    file = Path(flags.model or "") / IMPROVER_FILE
    instruction = flags.improver_instruction or sgpo.IMPROVER
    if flags.improver_instruction is None and flags.improve and file.exists():
        instruction = read_instruction(file)
    asked, answers = list(conversations), list[list[str]]()
    for i in range(1 + flags.improve):
        new = generate(
            model, [tokenizer.apply_chat_template(turns, True) for turns in asked],
            flags.max_new_tokens, temperature=temperature, top_k=flags.top_k,
            top_p=flags.top_p, eos_ids=tokenizer.eos_ids, batch_size=flags.batch_size,
            seed=hash_seed(seed, i) if i else seed,
        )  # fmt: skip
        answers.append([tokenizer.response_text(ids) for ids in new])
        both = zip(conversations, answers[-1], strict=True)
        asked = [sgpo.improver_prompt(turns, text, instruction) for turns, text in both]
    return answers


def read_instruction(file: Path) -> str:
    """How a model was asked for improvements when it was trained."""
    instruction = read_json(file).get("instruction")
    if not isinstance(instruction, str) or "{answer}" not in instruction:
        raise InputError(f"{file}: 'instruction' should be text that holds {{answer}}")
    return instruction


def check_vocabulary(tokenizer: data.Tokenizer, model: Transformer, where: str | Path) -> None:
    """Raises InputError where the tokenizer has ids that the model does not know."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{where}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, "
            f"and vocab_size in config.json is {model.config.vocab_size}"
        )


def task_accuracy(
    model: Transformer, tokenizer: data.Tokenizer, seed: int, temperature: float, split: str
) -> dict[str, float]:
    """Exact match on held-out prompts of the built-in tasks: shares for seen and unseen kinds."""
    examples = data.task_examples(split, 512, seed)
    prompts = [tokenizer.apply_chat_template(list(e.messages), True) for e in examples]
    answers = generate(
        model, prompts, 48, temperature=temperature, eos_ids=tokenizer.eos_ids, seed=seed,
        batch_size=512,
    )  # fmt: skip
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


PANELS = {
    "loss": ("loss", "eval/loss"),
    "rewards": ("rewards/chosen", "rewards/rejected", "rewards/margins"),
    "reward accuracy": ("rewards/accuracies", "eval/rewards/accuracies"),
    "log-probs": ("logps/chosen", "logps/rejected"),
    "held-out accuracy": ("eval/accuracy/seen", "eval/accuracy/unseen"),
    "segments and replay": ("segment/identical", "replay/times_sampled"),
}


def paint(pair: Pair, decode: Callable[[list[int]], str]) -> str:
    """A pair in terminal colours: A plain, B green, B' red, C blue."""
    start, stop, new_stop, _ = pair.cut
    green, red, blue, plain = "\033[32m", "\033[31m", "\033[34m", "\033[0m"
    prompt, before = decode(pair.prompt), decode(pair.chosen[:start])
    old, new = decode(pair.chosen[start:stop]), decode(pair.rejected[start:new_stop])
    after = decode(pair.chosen[stop:])
    left = decode(pair.rejected[new_stop:])
    return (
        f"prompt    {prompt}\n"
        f"chosen    {before}{green}{old}{blue}{after}{plain}\n"
        f"rejected  {before}{red}{new}{blue}{left}{plain}   (A, {green}B{plain}, "
        f"{red}B'{plain}, {blue}C{plain})"
    )


def plot_curves(out: Path) -> None:
    """OUT/curves.png from OUT/metrics.jsonl, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    for axis, (title, keys) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                marker = "." if len(points) < 9 else ""
                axis.plot(*zip(*points, strict=True), label=key, marker=marker)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(out / "curves.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
