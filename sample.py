"""Look at a model: sample answers from it, measure it on the built-in tasks, draw a run's curves.

    python sample.py --model OUT/final --prompt "Why is the sky blue?"
    python sample.py --model OUT/final --prompts questions.jsonl --out answers.jsonl

`--prompts` reads JSON or JSONL rows with `prompt` (text, or messages up to a user's turn) or
`messages`; the last assistant turn of those, if there is one, is left out. The output holds a row
{"prompt", "response"} for each, in the same order.
"""

import argparse
import contextlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import data
from model import InputError, Transformer, generate


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


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of this command. Raises InputError for values that make no sense."""
    parser = Parser(
        prog="sample.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a Hugging Face folder")
    add("--prompt", metavar="TEXT", help="what the user says")
    add("--prompts", metavar="FILE", help="JSON or JSONL rows of prompts")
    add("--out", metavar="FILE", help="where the answers to --prompts go; default: the screen")
    add("--chat-template", choices=("chatml", "zephyr", "llama3"), help="for a model without one")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="[512]")
    add("--temperature", type=float, default=0.7, metavar="X", help="0 is greedy [0.7]")
    add("--top-k", type=int, default=50, metavar="N", help="0: all tokens [50]")
    add("--top-p", type=float, default=0.95, metavar="X", help="[0.95]")
    add("--seed", type=int, default=0, metavar="N", help="[0]")
    add("--batch-size", type=int, default=16, metavar="N", help="rows decoded together [16]")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="[fp32]")
    flags = parser.parse_args(argv)
    if (flags.prompt is None) == (flags.prompts is None):
        raise InputError("give --prompt TEXT or --prompts FILE, one of the two")
    if flags.prompt is not None and not flags.prompt.strip():
        raise InputError("--prompt is empty")
    if flags.out is not None and flags.prompts is None:
        raise InputError("--out goes with --prompts")
    for name, low, high in (
        ("max_new_tokens", 1, 10**6), ("temperature", 0, 1e6), ("top_k", 0, 10**9),
        ("top_p", 1e-9, 1), ("seed", 0, 2**62), ("batch_size", 1, 10**6),
    ):  # fmt: skip
        check_range(name, getattr(flags, name), low, high)
    return flags


def answer(flags: argparse.Namespace) -> None:
    """Reads the prompts, samples, prints or writes."""
    tokenizer = data.load_tokenizer(flags.model, flags.chat_template)
    conversations: list[list[dict[str, str]]] = [[{"role": "user", "content": flags.prompt}]]
    if flags.prompts is not None:
        conversations = data.load_prompts(flags.prompts)
    prompts = [tokenizer.apply_chat_template(turns, True) for turns in conversations]
    if not all(prompts):
        raise InputError(f"{flags.model}: the chat template makes an empty prompt")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if flags.precision == "bf16" else torch.float32
    with contextlib.ExitStack() as stack:
        file = sys.stdout
        if flags.out is not None:  # opened first, for sampling takes long; renamed when whole
            partial = Path(flags.out).with_name(f".{Path(flags.out).name}.partial")
            if Path(flags.out).is_dir():
                raise InputError(f"--out {flags.out} is a folder; it should be a file")
            file = stack.enter_context(partial.open("w", encoding="utf-8", errors="replace"))
        model = Transformer.from_pretrained(flags.model, dtype, device)
        check_vocabulary(tokenizer, model, flags.model)
        new = generate(
            model, prompts, flags.max_new_tokens, temperature=flags.temperature, seed=flags.seed,
            top_k=flags.top_k, top_p=flags.top_p, eos_ids=tokenizer.eos_ids,
            batch_size=flags.batch_size,
        )  # fmt: skip
        for turns, ids in zip(conversations, new, strict=True):
            text = tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.eos_ids else ids)
            prompt = turns[0]["content"] if len(turns) == 1 else turns
            line = json.dumps({"prompt": prompt, "response": text}, ensure_ascii=False)
            print(line if flags.prompts is not None else text, file=file)
    if flags.out is not None:
        partial.rename(flags.out)


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
