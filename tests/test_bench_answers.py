"""tests/bench/answers.py: a benchmark's own questions in, what its judge reads out."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas
import pytest
from helpers import GOLDEN, script

import sample

answers = script("answers")

ALPACA: list[dict[str, Any]] = [  # as in tatsu-lab/alpaca_eval's alpaca_eval.json
    {"dataset": "koala", "instruction": "reverse abc", "output": "cba", "generator": "davinci"},
    {"dataset": "oasst", "instruction": "sort cab\nplease", "output": "abc", "generator": "old"},
]
ARENA = [  # as in lmarena/arena-hard-auto's data/arena-hard-v2.0/question.jsonl
    {"uid": "0001b527ced3428d", "category": "hard_prompt", "subcategory": "c", "prompt": "add 1 2"},
    {"uid": "00a38edd42744fa0", "category": "creative_writing", "prompt": "reverse ü\u2028ß"},
]
MT_BENCH = [  # as in lm-sys/FastChat's fastchat/llm_judge/data/mt_bench/question.jsonl
    {"question_id": 81, "category": "writing", "turns": ["reverse abc", "sort cab"]},
    {"question_id": 111, "category": "math", "turns": ["add 57 39", "add 1 1"], "reference": ["9"]},
    {"question_id": 131, "category": "other", "turns": ["sort ba"]},
]
ROWS = {"alpaca_eval": ALPACA, "arena_hard": ARENA, "mt_bench": MT_BENCH}
MODEL = ["--model", str(GOLDEN / "start"), "--max-new-tokens", "12"]
GREEDY = ("--temperature", "0")


def ask(folder: Path, name: str, *flags: str, rows: list[Any] | None = None) -> tuple[int, Path]:
    """answers.py's exit status on a benchmark's questions, and the file of a model, mine-1.5."""
    questions, whole = folder / "question.jsonl", name == "alpaca_eval"
    rows = ROWS[name] if rows is None else rows
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    questions.write_text(json.dumps(rows, indent=2) if whole else "\n".join(lines))
    out = folder / f"mine-1.5.{'json' if whole else 'jsonl'}"
    told = ["--prompts", str(questions), "--out", str(out), "--format", name]
    return answers.main([*MODEL, *told, *flags]), out


def by(key: str, file: Path, number: str) -> dict[Any, dict[str, Any]]:
    """`load_model_answers` of FastChat's llm_judge/common.py and arena-hard-auto's
    utils/completion.py; without the rows' times, and a `number` that differs from row to row."""
    rows = {row[key]: row for row in map(json.loads, file.open())}
    assert len({row.pop(number) for row in rows.values()}) == len(rows)
    assert all(isinstance(row.pop("tstamp"), float) for row in rows.values())
    return rows


def plain(folder: Path, prompts: list[Any], *flags: str) -> list[str]:
    """What sample.py answers, without the space around it."""
    rows, out = folder / "plain.jsonl", folder / "answers.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    told = ["--prompts", str(rows), "--out", str(out), *flags, *GREEDY]
    assert sample.main([*MODEL, *told]) == 0
    return [json.loads(line)["response"].strip() for line in out.open()]


@pytest.mark.parametrize("improve", [(), ("--improve", "1")])
def test_alpaca_eval_reads_its_format(improve: tuple[str, ...], tmp_path: Path) -> None:
    """src/alpaca_eval/utils.py reads a .json by pandas; main.py takes `generator` as the model's
    name where it is one; instructions are matched to the reference's."""
    status, out = ask(tmp_path, "alpaca_eval", *GREEDY, *improve)
    asked = [row["instruction"] for row in ALPACA]
    table = {"instruction": asked, "output": plain(tmp_path, asked, *improve)}  # the last one
    table |= {"generator": ["mine-1.5"] * 2, "dataset": ["koala", "oasst"]}
    assert (status, pandas.read_json(out).to_dict("list")) == (0, table)


def test_arena_hard_reads_its_format(tmp_path: Path) -> None:
    """lmarena/arena-hard-auto 2.0, gen_judgment.py: answers by uid, `model`, and
    messages[-1]["content"]["answer"]; show_result.py names the model after `model`."""
    status, out = ask(tmp_path, "arena_hard", *GREEDY)
    assert (status, out.stem) == (0, "mine-1.5")  # how gen_judgment.py finds it
    found, texts = by("uid", out, "ans_id"), plain(tmp_path, [row["prompt"] for row in ARENA])
    for question, text in zip(ARENA, texts, strict=True):
        said: list[Any] = [{"role": "user", "content": question["prompt"]}]
        said += [{"role": "assistant", "content": {"answer": text}}]
        row = {"uid": question["uid"], "model": "mine-1.5", "messages": said}
        assert found[question["uid"]] == row


def test_mt_bench_reads_its_format_and_second_questions_follow_answers(tmp_path: Path) -> None:
    """lm-sys/FastChat, llm_judge/gen_judgment.py, `check_data`: an answer for each question_id;
    common.py, `run_judge_single`: choices[0]["turns"][0] and [1]."""
    status, out = ask(tmp_path, "mt_bench", *GREEDY)
    assert status == 0
    found = by("question_id", out, "answer_id")
    for number, turns in ((question["question_id"], question["turns"]) for question in MT_BENCH):
        said: list[dict[str, str]] = []
        for text in turns:
            said.append({"role": "user", "content": text})
            said.append({"role": "assistant", "content": plain(tmp_path, [said])[0]})
        choice = {"index": 0, "turns": [turn["content"] for turn in said[1::2]]}
        row = {"question_id": number, "model_id": "mine-1.5", "choices": [choice]}
        assert found[number] == row


def test_temperatures_are_fastchats_or_the_one_given(tmp_path: Path, monkeypatch: Any) -> None:
    asked = Counter[float]()

    def silent(model: Any, prompts: list[list[int]], most: int, **told: Any) -> list[list[int]]:
        asked[told["temperature"]] += len(prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr(sample, "generate", silent)
    assert ask(tmp_path, "mt_bench")[0] == 0
    assert asked == {0.7: 3, 0.0: 2}  # 0.7 for a category that FastChat does not know, too
    asked.clear()
    assert ask(tmp_path, "mt_bench", "--temperature", "0.3")[0] == 0
    assert asked == {0.3: 5}


OLD_ARENA = {"question_id": "1f", "turns": [{"content": "add 1 2"}], "category": "arena-hard-v0.1"}


@pytest.mark.parametrize(
    ("name", "row", "named"),
    [
        ("alpaca_eval", {"instruction": " "}, "'instruction'"),
        ("alpaca_eval", ["a"], "'instruction'"),
        ("arena_hard", OLD_ARENA, "'uid'"),
        ("arena_hard", {"uid": "1f", "prompt": ["a"]}, "'prompt'"),
        ("mt_bench", {"question_id": "a", "category": "math", "turns": ["a"]}, "'question_id'"),
        ("mt_bench", {"question_id": 1, "turns": ["a"]}, "'category'"),
        ("mt_bench", {"question_id": 1, "category": "math", "turns": []}, "'turns'"),
        ("mt_bench", {"question_id": 1, "category": "math", "turns": ["a", 2]}, "'turns'"),
        ("mt_bench", {"question_id": 1, "category": "math", "turns": ["a", ""]}, "'turns'"),
        ("mt_bench", None, "no rows"),
    ],
)
def test_bad_questions(name: str, row: Any, named: str, tmp_path: Path, capsys: Any) -> None:
    rows = [] if row is None else [ROWS[name][0], row]
    assert ask(tmp_path, name, rows=rows)[0] == 2
    shown = capsys.readouterr().err
    place = re.escape(str(tmp_path / "question.jsonl")) + r"(:\d+|, row \d+)?: "
    assert re.fullmatch(rf"error: {place}.*\n", shown) and named in shown
    assert [path.name for path in tmp_path.iterdir()] == ["question.jsonl"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--prompt a --format mt_bench", "--prompts"),
        ("--prompts question.jsonl --out a.jsonl", "--format"),
        ("--prompts question.jsonl --format mt_bench", "NAME.jsonl"),
        ("--prompts question.jsonl --out a.json --format arena_hard", "NAME.jsonl"),
        ("--prompts question.jsonl --out a.jsonl --format alpaca_eval", "NAME.json,"),
        ("--prompts question.jsonl --out .jsonl --format mt_bench", "NAME.jsonl"),
        ("--prompts question.jsonl --out a.jsonl --format mtbench", "--format"),
        ("--prompts question.jsonl --out none/a.jsonl --format mt_bench", "none/a.jsonl"),
    ],
)
def test_flags_that_no_judge_could_read_from(
    flags: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("question.jsonl").write_text(json.dumps(MT_BENCH[0]))
    assert answers.main([*MODEL, *flags.split()]) == 2
    shown = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\n", shown) and named in shown
    assert [path.name for path in tmp_path.iterdir()] == ["question.jsonl"]
