"""tests/bench/answers.py: a benchmark's own questions in, what its judge reads out."""

import json
import re
from pathlib import Path
from typing import Any

import pandas
import pytest
from helpers import GOLDEN, script

import data
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


def ask(folder: Path, name: str, *flags: str, rows: list[Any] | None = None) -> tuple[int, Path]:
    """answers.py's exit status on a benchmark's questions, and the file of a model, mine-1.5."""
    questions, suffix = folder / "question.jsonl", "json" if name == "alpaca_eval" else "jsonl"
    rows = ROWS[name] if rows is None else rows
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    questions.write_text("\n".join(lines) if name != "alpaca_eval" else json.dumps(rows, indent=2))
    out = folder / f"mine-1.5.{suffix}"
    told = ["--prompts", str(questions), "--out", str(out), "--format", name]
    return answers.main([*MODEL, *told, *flags]), out


def lines_by(key: str, file: Path) -> dict[Any, dict[str, Any]]:
    """`load_model_answers` of FastChat's llm_judge/common.py (key: question_id) and of
    arena-hard-auto's utils/completion.py (key: uid): a JSON object a line of the text."""
    with open(file) as lines:
        return {row[key]: row for row in map(json.loads, lines)}


def test_alpaca_eval_reads_its_format(tmp_path: Path) -> None:
    """src/alpaca_eval/utils.py reads a .json by pandas; main.py takes `generator` as the model's
    name where it is one; instructions are matched to the reference's."""
    status, out = ask(tmp_path, "alpaca_eval")
    assert status == 0
    table = pandas.read_json(out)
    assert list(table["instruction"]) == [row["instruction"] for row in ALPACA]
    assert list(table["generator"].unique()) == ["mine-1.5"]
    assert list(table["dataset"]) == ["koala", "oasst"]
    assert all(isinstance(text, str) and text == text.strip() for text in table["output"])
    assert set(table.columns) == {"instruction", "output", "generator", "dataset"}


def test_arena_hard_reads_its_format(tmp_path: Path) -> None:
    """lmarena/arena-hard-auto 2.0, gen_judgment.py: answers by uid, `model`, and
    messages[-1]["content"]["answer"]; show_result.py names the model after `model`."""
    status, out = ask(tmp_path, "arena_hard")
    assert status == 0
    answers = lines_by("uid", out)
    assert out.stem == "mine-1.5"  # how gen_judgment.py finds it
    for question in ARENA:
        answer = answers[question["uid"]]
        assert answer["model"] == "mine-1.5"
        assert answer["messages"][0] == {"role": "user", "content": question["prompt"]}
        assert answer["messages"][-1]["role"] == "assistant"
        assert isinstance(answer["messages"][-1]["content"]["answer"], str)
        assert len(answer["messages"]) == 2
        assert isinstance(answer["tstamp"], float)
    assert len({answer["ans_id"] for answer in answers.values()}) == 2


def test_mt_bench_reads_its_format(tmp_path: Path) -> None:
    """lm-sys/FastChat, llm_judge/gen_judgment.py, `check_data`: an answer for each question_id;
    common.py, `run_judge_single`: choices[0]["turns"][0] and [1]."""
    status, out = ask(tmp_path, "mt_bench")
    assert status == 0
    answers = lines_by("question_id", out)
    for question in MT_BENCH:
        answer = answers[question["question_id"]]
        assert answer["model_id"] == "mine-1.5" == out.stem
        (choice,) = answer["choices"]
        assert choice["index"] == 0
        assert len(choice["turns"]) == len(question["turns"])
        assert all(isinstance(text, str) and text == text.strip() for text in choice["turns"])
        assert isinstance(answer["tstamp"], float)
    assert len({answer["answer_id"] for answer in answers.values()}) == 3


def test_the_second_question_is_asked_with_the_first_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at the temperatures of FastChat's common.py, unless one is given."""
    tokenizer = data.load_tokenizer(GOLDEN / "start")
    asked: list[tuple[str, float]] = []

    def parrot(model: Any, prompts: list[list[int]], most: int, **told: Any) -> list[list[int]]:
        first = len(asked)
        asked.extend((tokenizer.decode(prompt), told["temperature"]) for prompt in prompts)
        return [
            [*tokenizer.encode(f" answer {first + i}\n"), tokenizer.eos_ids[0]]
            for i in range(len(prompts))
        ]

    monkeypatch.setattr(sample, "generate", parrot)
    status, out = ask(tmp_path, "mt_bench")
    assert status == 0
    turns = {n: row["choices"][0]["turns"] for n, row in lines_by("question_id", out).items()}

    def rendered(*said: str) -> str:
        roles = ("user", "assistant", "user")
        messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]
        return tokenizer.render(messages, add_generation_prompt=True)

    first, second = "reverse abc", "sort cab"
    assert (rendered(first), 0.7) in asked
    assert (rendered(first, turns[81][0], second), 0.7) in asked
    assert (rendered("add 57 39", turns[111][0], "add 1 1"), 0.0) in asked
    assert (rendered("sort ba"), 0.7) in asked  # FastChat's for a category that it does not know
    assert len(asked) == 5
    assert len({turn for both in turns.values() for turn in both}) == 5
    assert turns[81][0] in rendered(first, turns[81][0], second)
    asked.clear()
    assert ask(tmp_path, "mt_bench", "--temperature", "0.3")[0] == 0
    assert {temperature for _, temperature in asked} == {0.3}


def test_two_turns_are_what_one_gets_by_asking_twice(tmp_path: Path) -> None:
    status, out = ask(tmp_path, "mt_bench", "--temperature", "0")
    assert status == 0
    turns = lines_by("question_id", out)[111]["choices"][0]["turns"]
    said = [("user", "add 57 39"), ("assistant", turns[0]), ("user", "add 1 1")]
    rows = [{"prompt": "add 57 39"}, {"prompt": [{"role": r, "content": c} for r, c in said]}]
    plain, written = tmp_path / "plain.jsonl", tmp_path / "answers.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = ["--prompts", str(plain), "--out", str(written), "--temperature", "0"]
    assert sample.main([*MODEL, *told]) == 0
    found = [json.loads(line)["response"].strip() for line in written.read_text().splitlines()]
    assert found == turns


def test_a_benchmark_gets_the_last_of_the_improvements(tmp_path: Path) -> None:
    status, out = ask(tmp_path, "alpaca_eval", "--improve", "1", "--temperature", "0")
    assert status == 0
    plain, written = tmp_path / "plain.jsonl", tmp_path / "answers.jsonl"
    plain.write_text("".join(json.dumps({"prompt": r["instruction"]}) + "\n" for r in ALPACA))
    told = ["--prompts", str(plain), "--out", str(written), "--temperature", "0", "--improve", "1"]
    assert sample.main([*MODEL, *told]) == 0
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["output"] for row in json.loads(out.read_text())] == [
        row["response"].strip() for row in rows
    ]


OLD_ARENA = {"question_id": "1f", "turns": [{"content": "add 1 2"}], "category": "arena-hard-v0.1"}


@pytest.mark.parametrize(
    ("name", "row", "named"),
    [
        ("alpaca_eval", {"prompt": "a"}, "'instruction'"),
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
def test_bad_questions_are_one_line_and_leave_nothing(
    name: str, row: Any, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [] if row is None else [ROWS[name][0], row]
    assert ask(tmp_path, name, rows=rows)[0] == 2
    shown = capsys.readouterr().err
    place = re.escape(str(tmp_path / "question.jsonl")) + r"(:\d+|, row \d+)?: "
    assert re.fullmatch(rf"error: {place}.*\n", shown), shown
    assert named in shown
    assert [path.name for path in tmp_path.iterdir()] == ["question.jsonl"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--prompt", "a", "--format", "mt_bench"], "--prompts"),
        (["--prompts", "q", "--out", "a.jsonl"], "--format"),
        (["--prompts", "q", "--format", "mt_bench"], "NAME.jsonl"),
        (["--prompts", "q", "--out", "a.json", "--format", "arena_hard"], "NAME.jsonl"),
        (["--prompts", "q", "--out", "a.jsonl", "--format", "alpaca_eval"], "NAME.json,"),
        (["--prompts", "q", "--out", ".jsonl", "--format", "mt_bench"], "NAME.jsonl"),
        (["--prompts", "q", "--out", "a.jsonl", "--format", "mtbench"], "--format"),
    ],
)
def test_flags_that_no_judge_could_read_from_are_one_line(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answers.main([*MODEL, *flags]) == 2
    shown = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\n", shown)
    assert named in shown


def test_a_missing_folder_for_the_answers_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "none" / "a.jsonl"
    assert ask(tmp_path, "mt_bench", "--out", str(out))[0] == 2
    assert re.fullmatch(f"error: .*{re.escape(str(out))}.*\n", capsys.readouterr().err)
    assert not out.parent.exists()
