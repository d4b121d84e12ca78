"""sample.py: flags read from the types of a dataclass, and answers to rows."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from helpers import GOLDEN

import data
import sample
from model import Count, InputError, Share

START = str(GOLDEN / "start")


@dataclass
class Base:
    """What all have.

    This is not in the title.
    """

    rate: list[Share] | None = None
    "one or more"
    # Numbers:
    count: Count = 3
    "a number of \
things"


@dataclass
class Flags(Base):
    """A method's."""

    kind: Literal["a", "b"] | None = None
    "one of two"
    quick: bool = True
    "or not"
    name: str = "two\nlines"
    "text"


def parse(*argv: str) -> dict[str, Any]:
    return sample.parse_flags(Flags, argv, "")


def test_flags_are_the_fields_of_a_dataclass(capsys: Any) -> None:
    assert parse() == {}
    told = parse("--rate", "0", "1", "--count", "7", "--kind", "b", "--no-quick", "--name", "n")
    assert told == {"rate": [0.0, 1.0], "count": 7, "kind": "b", "quick": False, "name": "n"}
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    order = "A method's: --kind", "text What all have: --rate", "Numbers: --count", "of things [3]"
    assert re.search(".*".join(map(re.escape, order)) + "$", shown)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--count", "0"], "--count is 0, but it must be from 1 to 1e+09"),
        (["--rate", "0.5", "2"], "--rate is 2.0, but it must be from 0 to 1"),
        (["--rate", "nan"], "--rate is nan, but it must be from 0 to 1"),
        (["--count", "1.5"], "argument --count: invalid int value: '1.5'"),
        (["--kind", "c"], "argument --kind: invalid choice: 'c'"),
        (["--kin", "a"], "unrecognized arguments: --kin a"),
        (["--rate"], "argument --rate: expected at least one argument"),
    ],
)
def test_wrong_flags_are_one_line(argv: list[str], told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)


def test_an_answer_is_shown_as_it_is_written(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes to the screen, and when: the model's own text, in the order of its tokens."""
    parts, real = list[str](), sample.generate

    def generate(*args: Any, watch: Any, **how: Any) -> Any:
        def told(*new: Any) -> None:
            watch(*new)
            parts.append(capsys.readouterr().out)

        return real(*args, watch=told, **how)

    monkeypatch.setattr(sample, "generate", generate)
    flags = sample.Flags(START, prompt="reverse abcd", max_new_tokens=12, improve=2, temperature=1)
    model, tokenizer = sample.load(flags)
    talks: list[data.Messages] = [[{"role": "user", "content": "reverse abcd"}]]
    answers = sample.sample_answers(model, tokenizer, flags, talks)
    parts.append(capsys.readouterr().out)
    rule = f"\n\n{'-' * 20}\n\n"
    assert "".join(parts) == rule.join(answers[0]) + "\n"
    texts = [part.removeprefix(rule) for part in parts[:-1]]
    assert max(map(len, texts)) == 1 and len(texts) > 12  # a byte a token

    monkeypatch.setattr(sample, "generate", real)
    flags.prompt, flags.prompts = None, "rows.jsonl"
    assert sample.sample_answers(model, tokenizer, flags, talks) == answers
    assert capsys.readouterr().out == ""
    told = ["--max-new-tokens", "12", "--improve", "2", "--temperature", "1"]
    assert sample.main(["--model", START, "--prompt", "reverse abcd", *told]) == 0
    assert capsys.readouterr().out == rule.join(answers[0]) + "\n"


def test_rows_that_have_responses_are_answered_as_prompts(tmp_path: Path) -> None:
    rows, out = GOLDEN / "rows.jsonl", tmp_path / "answers.jsonl"
    flags = ["--model", START, "--prompts", rows, "--out", out, "--max-new-tokens", "5"]
    assert sample.main([str(flag) for flag in flags]) == 0
    asked, written = ([json.loads(x) for x in f.read_text().splitlines()] for f in (rows, out))
    assert [row["prompt"] for row in written] == [row["prompt"] for row in asked]
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
