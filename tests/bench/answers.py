"""A model's answers to a benchmark's own questions, in the file that the benchmark's judge reads.

    python tests/bench/answers.py --model OUT/final --format alpaca_eval \
        --prompts alpaca_eval.json --out NAME.json
    python tests/bench/answers.py --model OUT/final --format mt_bench \
        --prompts question.jsonl --out NAME.jsonl

NAME is what the benchmark calls the model. The other flags are sample.py's; with `--improve N` the
answers are the last of N improvements.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data
import sample
from model import InputError, hash_seed

MT_BENCH = {  # temperatures by category: lm-sys/FastChat, fastchat/llm_judge/common.py
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
    "reasoning": 0.0, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
QUESTION_KEYS: dict[str, dict[str, type]] = {  # of a row, by benchmark; the last is what is asked
    "alpaca_eval": {"instruction": str},  # AlpacaEval's alpaca_eval.json
    "arena_hard": {"uid": str, "prompt": str},  # Arena-Hard 2.0's question.jsonl
    "mt_bench": {"question_id": int, "category": str, "turns": list},  # FastChat's question.jsonl
}


@dataclass
class Flags(sample.Flags):
    """The benchmark. --temperature is by default 0.7, and for mt_bench FastChat's by category."""

    format: Literal["alpaca_eval", "arena_hard", "mt_bench"] | None = None
    "whose questions --prompts has, and whose judge reads --out"


class Question(NamedTuple):
    """What the user says, a text a turn, and the file's row."""

    turns: list[str]
    row: dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Parses, answers, and turns bad input into one line and exit status 2."""
    try:
        flags = sample.parse_args(argv, Flags)
        suffix = ".json" if flags.format == "alpaca_eval" else ".jsonl"
        if flags.format is None or flags.prompts is None or Path(flags.out or "").suffix != suffix:
            told = f"--prompts FILE and --out NAME{suffix}"
            raise InputError(f"--format {flags.format} goes with {told}, NAME being the model's")
        answer(flags, any(word.split("=")[0] == "--temperature" for word in argv))
        return 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def answer(flags: Flags, one_temperature: bool) -> None:
    """Reads the questions, samples and writes."""
    questions = load_questions(flags.prompts or "", flags.format or "")
    with sample.whole_file(flags.out or "") as file:
        answers = converse(flags, questions, one_temperature)
        made = [file_row(flags, *both) for both in zip(questions, answers, strict=True)]
        lines = [json.dumps(row, ensure_ascii=False) for row in made]
        one_list = flags.format == "alpaca_eval"
        print("[\n" + ",\n".join(lines) + "\n]" if one_list else "\n".join(lines), file=file)


def load_questions(path: str, benchmark: str) -> list[Question]:
    """A benchmark's questions from its own file. Raises InputError naming file and line."""
    questions = []
    for where, row in data.read_rows(path):
        for key, kind in QUESTION_KEYS[benchmark].items():
            if not isinstance(row, dict) or not isinstance(row.get(key), kind):
                name = {str: "text", int: "a number", list: "a list of texts"}[kind]
                raise InputError(f"{where}: a question of {benchmark} has {name} as {key!r}")
        said = [row[key]] if isinstance(row[key], str) else row[key]
        if not said or not all(isinstance(text, str) and text.strip() for text in said):
            raise InputError(f"{where}: {key!r} should hold what the user says, and is empty")
        questions.append(Question([data.whole_text(text) for text in said], row))
    return questions


def converse(flags: Flags, questions: Sequence[Question], one_temperature: bool) -> list[list[str]]:
    """For each question the answer to each of its turns, without the space around it, as the
    benchmarks' own programs have it. A later turn is asked with what was said before it."""
    model, tokenizer = sample.load(flags)
    talks: list[list[dict[str, str]]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        alike = defaultdict[float, list[int]](list)  # questions by temperature
        for i, question in enumerate(questions):
            if turn < len(question.turns):
                talks[i].append({"role": "user", "content": question.turns[turn]})
                warm = MT_BENCH.get(question.row.get("category", ""), 0.7)
                by_category = flags.format == "mt_bench" and not one_temperature
                alike[warm if by_category else flags.temperature].append(i)
        seed = hash_seed(flags.seed, "turn", turn) if turn else flags.seed
        for temperature, places in alike.items():
            told = replace(flags, temperature=temperature, seed=seed)
            asked = [talks[i] for i in places]
            answers = sample.sample_answers(model, tokenizer, told, asked)
            for i, (*_, last) in zip(places, answers, strict=True):
                talks[i].append({"role": "assistant", "content": last.strip()})
    return [[said["content"] for said in talk[1::2]] for talk in talks]


def file_row(flags: Flags, question: Question, answers: list[str]) -> dict[str, Any]:
    """The row of --out, with the keys that the benchmarks' own programs write:

    alpaca_eval: tatsu-lab/alpaca_eval, src/alpaca_eval/main.py, `evaluate_from_model`.
    arena_hard: lmarena/arena-hard-auto, 2.0, gen_answer.py; without "metadata", which its
        utils/add_markdown_info.py adds for the style control.
    mt_bench: lm-sys/FastChat, fastchat/llm_judge/gen_model_answer.py.
    """
    name, row = Path(flags.out or "").stem, question.row
    if flags.format == "alpaca_eval":
        kept = {key: row[key] for key in ("dataset", "datasplit") if key in row}
        return kept | {"instruction": row["instruction"], "output": answers[0], "generator": name}
    if flags.format == "arena_hard":
        said: list[dict[str, Any]] = [{"role": "user", "content": question.turns[0]}]
        said += [{"role": "assistant", "content": {"answer": answers[0]}}]
        made = {"uid": row["uid"], "ans_id": f"{hash_seed(flags.seed, name, row['uid']):016x}"}
        return made | {"model": name, "messages": said, "tstamp": time.time()}
    number, choices = row["question_id"], [{"index": 0, "turns": answers}]
    made = {"question_id": number, "answer_id": f"{hash_seed(flags.seed, name, number):016x}"}
    return made | {"model_id": name, "choices": choices, "tstamp": time.time()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
