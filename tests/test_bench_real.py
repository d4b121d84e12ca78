"""tests/bench/real.py on the tiny model: its split, numbers by hand, its tables, its resuming."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import GOLDEN, metrics, script

import data
import train

real = script("real")

ROWS = str(GOLDEN / "rows.jsonl")


def flags(out: Path, *more: str) -> list[str]:
    common = "--steps 4 --batch-size 2 --max-length 256 --segment-length 4 --max-new-tokens 24"
    common += " --held-out 6 --answers 5 --answer-tokens 12 --lr 1e-3 --lr-of sgpo-gold=1e-6"
    files = ["--data", ROWS, "--pairs", ROWS, "--out", str(out), "--model", str(GOLDEN / "start")]
    return [*common.split(), *files, *more]


@pytest.fixture
def calls(monkeypatch: Any) -> list[list[str]]:
    """The command lines of train.py, which are run in this process."""
    seen: list[list[str]] = []

    def run(command: list[str], check: bool) -> Any:
        seen.append(command[2:])
        return subprocess.CompletedProcess(command, train.main(command[2:]))

    monkeypatch.setattr(real.subprocess, "run", run)
    return seen


def rows_of(text: str) -> list[dict[str, list[str]]]:
    """The tables of a text: the cells of a row by its name; the head's name is empty."""
    found: list[dict[str, list[str]]] = []
    for block in text.split("\n\n"):
        lines = [x.strip("| ").split(" | ") for x in block.splitlines() if x.startswith("| ")]
        if lines:
            found.append({line[0]: line[1:] for line in lines[1:]} | {"": lines[0]})
    return found


def test_held_out_numbers_are_those_worked_by_hand() -> None:
    start = {"chosen": [-8.0, -6.0], "rejected": [-3.0, -9.0], "n": [4.0, 4.0], "m": [3.0, 3.0]}
    told = start | {"chosen": [-6.0, -8.0], "rejected": [-4.0, -10.0]}
    # -14 of 8 tokens; chosen +2, -2; rejected -1, -1: beta times 3 and -1 is 0.3 and -0.1,
    # whose mean is 0.1 with deviations of 0.2, and 0.2 * sqrt(2) / sqrt(2) = 0.2
    column = real.preferences(told, start)
    assert column["good answer: log-prob, nats"] == "-7.0"
    assert column["per token"] == "-1.750" and column["perplexity"] == "5.75"  # e^1.75
    assert column["weak answer: per token"] == "-2.333"  # -14 / 6
    assert column["good is likelier per token, %"] == "50.0"  # -1.5 < -1.33; -2 > -3.33
    assert column["reward accuracy, %"] == "50.0" and column["reward margin"] == "+0.100 ± 0.200"
    assert real.preferences(start, start)["tokens: good, weak answer"] == "4.0, 3.0"
    assert column["where good is no longer than weak"] == "-"
    # 2 / 4 - -1 / 3 and -2 / 4 - -1 / 3 are 5/6 and -1/6
    assert column["change per token, good less weak"] == "+0.333 ± 0.500"
    assert column["good answer: change, nats"] == "+0.00 ± 2.00"
    assert column["weak answer: change, nats"] == "-1.00 ± 0.00"
    assert column["good answer fell, %"] == "50.0" and column["weak answer fell, %"] == "100.0"
    assert column["both fell, %"] == "50.0"
    assert "reward margin" not in real.preferences(start, start)


def test_log_means_are_over_the_steps_that_have_a_value_but_for_seconds(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [
        {"phase": "sapo", "loss": 3.0, "seconds/generate": 6.0, "tokens_per_second": 5.0},
        {"phase": "sapo", "loss": 1.0, "seam/logps": -1.0, "seam/new_logps": -1.5, "lr": 9.0},
        {"phase": "sapo", "loss": None, "seam/logps": -1.0, "seam/new_logps": -1.25},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    column = real.logged(file)["sapo"]
    assert column["steps"] == "3" and column["first loss"] == "3" and column["`loss`"] == "2"
    assert column["`seconds/generate`"] == "2" and column["`tokens_per_second`"] == "5"
    assert column["`seam/logps - new`"] == "0.375" and "`lr`" not in column


def test_no_training_row_has_a_held_out_prompt_and_nothing_would_be_cut(tmp_path: Path) -> None:
    lines = Path(ROWS).read_text().splitlines()
    twice, long = tmp_path / "twice.jsonl", json.loads(lines[0]) | {"prompt": "add " + "1 " * 300}
    spaced = json.dumps((said := json.loads(lines[1])) | {"prompt": said["prompt"] + " \n"})
    twice.write_text("\n".join([*lines, spaced, json.dumps(long)]))
    args = real.parse(flags(tmp_path, "--data", str(twice), "--pairs", str(twice)))
    tokenizer = data.load_tokenizer(GOLDEN / "start")
    rows, held_out = real.split(args, tokenizer)
    seen, unseen = ({real.asked(e) for e in examples} for examples in (rows, held_out))
    assert len(held_out) == len(unseen) == 6 and not seen & unseen
    assert seen | unseen == {json.loads(line)["prompt"] for line in lines}
    twice.write_text("\n".join(reversed(twice.read_text().splitlines())))
    assert {real.asked(e) for e in real.split(args, tokenizer)[1]} == unseen


def test_all_arms_train_and_are_measured_once(tmp_path: Path, calls: Any, capsys: Any) -> None:
    real.main(flags(tmp_path))
    printed = capsys.readouterr().out
    held_out, answers, logs = rows_of(printed)
    assert held_out[""] == answers[""] == ["start", *real.ARMS]
    assert len(calls) == len(real.ARMS) and "warning" not in printed
    assert held_out["reward margin"][0] == "-" and "-" not in held_out["reward margin"][1:]
    assert answers["as the start's, %"][0] == "100.0"
    assert all(cell.isdecimal() for cell in answers["seconds of training"][1:])  # rounded
    trained = [*tmp_path.rglob("*.trained.json")]
    assert len(trained) == len(real.ARMS)
    assert all(json.loads(file.read_text())["told"] > 0 for file in trained)
    steps = dict(zip(logs[""], logs["steps"], strict=True))
    improver = int(json.loads((tmp_path / "sgpo-gold/improver_filter.json").read_text())["steps"])
    assert {steps[arm] for arm in real.ARMS if arm != "sgpo-gold"} == {"4"}
    assert steps["sgpo-gold"] == "2" and steps["sgpo-gold: improver"] == str(improver)
    assert len(metrics(tmp_path / "sgpo-gold")) == 2 + improver <= 4
    assert {"`replay/age`", "`segment/kl`", "`seam/logps - new`"} <= logs.keys()
    for name in ("`segment/ended`", "`segment/unended`", "`improve/cut`", "`improve/gold_better`"):
        shares = dict(zip(logs[""], logs[name], strict=True))
        arms = ["sapo-dpo", "sapo-orpo", "spin"] * ("segment" in name) + ["sgpo-gold"]
        assert [arm for arm, cell in shares.items() if cell != "-"] == arms
        assert all(0 <= float(shares[arm]) <= 1 for arm in arms)
    assert (tmp_path / "report.md").read_text() in printed
    text = (tmp_path / "answers.md").read_text()
    assert text.count("## ") == 5 and text.count("**spin**") == 5

    real.main(flags(tmp_path))
    assert len(calls) == len(real.ARMS)
    assert rows_of(capsys.readouterr().out) == [held_out, answers, logs]
    with pytest.raises(SystemExit, match=r"sft\.trained\.json is of other settings"):
        real.main(flags(tmp_path, "--lr", "1e-4"))
    with pytest.raises(SystemExit, match="is of other settings"):
        real.main(flags(tmp_path, "--held-out", "7"))


def test_a_cut_arm_goes_on_and_tells_no_time(tmp_path: Path, calls: Any, capsys: Any) -> None:
    (tmp_path / "sft").mkdir()  # as a kill before the first checkpoint leaves it
    real.main(flags(tmp_path, "--only", "sft", "--lr-of", "sft=1e-4"))
    printed = capsys.readouterr().out
    assert "no checkpoint yet" in printed and "--resume" in calls[0]
    assert rows_of(printed)[1]["seconds of training"] == ["-", "-"]
    assert max(row["lr"] for row in metrics(tmp_path / "sft")) == 1e-4
