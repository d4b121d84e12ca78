"""tests/bench/real.py on the tiny model: its split, numbers by hand, its tables, its resuming."""

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import GOLDEN, metrics, script

import data
import train

real = script("real")
tables = real.tables

ROWS = str(GOLDEN / "rows.jsonl")


def flags(out: Path, *more: str) -> list[str]:
    common = "--steps 4 --first 2 --batch-size 2 --max-length 256 --answer-tokens 12 --seeds 2"
    common += " --held-out 6 --validation 4 --answers 5 --rates 2 --precision fp32"
    common += " --segment-length 4"
    files = ["--data", ROWS, "--pairs", ROWS, "--out", str(out), "--model", str(GOLDEN / "start")]
    return [*common.split(), *files, *more]


@pytest.fixture
def calls(monkeypatch: Any) -> list[list[str]]:
    """The command lines of train.py, which are run in this process."""
    seen: list[list[str]] = []

    def run(command: list[str], check: bool, stdout: Any) -> Any:
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
    # chosen +2, -2; rejected -1, -1: the margins are beta times 3 and -1
    column = real.preferences(told, start)
    assert column["good answer: log-prob a token"] == [-1.5, -2.0]
    assert column["weak answer"] == pytest.approx([-4 / 3, -10 / 3])
    assert column["good is likelier a token, %"] == [0, 100]
    assert column["reward margin"] == pytest.approx([0.3, -0.1])
    assert column["reward accuracy, %"] == [100, 0]
    # 2 / 4 - -1 / 3 and -2 / 4 - -1 / 3
    assert column["gain a token, good less weak"] == pytest.approx([5 / 6, -1 / 6])
    assert column["gained more a token, % (the rule)"] == [100, 0]
    assert column["reward margin of 0 about equally long"] == []  # 4 is a quarter more than 3
    assert column["good answer fell, %"] == [0, 100] and column["both fell, %"] == [0, 100]
    assert "reward margin" not in real.preferences(start, start)
    assert real.score(told, start) == 50  # +2 and -2 of 8 tokens: not broken
    assert real.score(told | {"chosen": [-6.0, -9.0]}, start) == -50  # -1 of 8 tokens: broken


def test_the_margin_at_equal_length_is_the_intercept() -> None:
    gaps = [-2.0, 0.0, 1.0, 5.0]
    line = tables.at_equal_length([0.5 + 2 * x for x in gaps], gaps)
    assert line == pytest.approx([0.5] * 4)  # no error where nothing is left over
    other = [1.0, -2.0, 4.0, 0.5]
    ours, theirs = (tables.at_equal_length(y, gaps) for y in (other, gaps))
    whole = tables.at_equal_length([a - b for a, b in zip(other, gaps, strict=True)], gaps)
    assert whole == pytest.approx([a - b for a, b in zip(ours, theirs, strict=True)])
    # by hand: mean gap 1, squares 26, slope (-3 * 1 - 1 * -2 + 4 * 0.5) / 26 = 1 / 26
    assert statistics.fmean(ours) == pytest.approx(0.875 - 1 / 26)
    assert tables.at_equal_length([1.0, 3.0], [2.0, 2.0]) == [1.0, 3.0]


def test_differences_are_paired_by_prompt_and_by_seed() -> None:
    ours, theirs = [[1.0, 3.0], [2.0, 4.0]], [[0.0, 2.0], [0.0, 2.0]]
    # by prompt 1.5, 1.5; by seed 1, 2: deviation 0.707, error 0.5
    assert tables.less(ours, theirs, 2) == "+1.50 \N{PLUS-MINUS SIGN} 0.00, 0.50 *"
    assert tables.less(ours[:1], theirs[:1], 1) == "+1.0 \N{PLUS-MINUS SIGN} 0.0 *"
    assert tables.less([[1.0], [3.0]], [[0.0], [0.0]], 1) == "+2.0 \N{PLUS-MINUS SIGN} 1.0"
    assert tables.means(ours, 1) == "2.5 \N{PLUS-MINUS SIGN} 1.0"
    table = tables.compared({"a": [{"x": [1.0, 1.0], "y": []}], "b": [{"z": [2.0, 4.0]}]})
    assert rows_of(table)[0] == {
        "": ["a", "b"], "x": ["1.000 \N{PLUS-MINUS SIGN} 0.000", "-"],
        "z": ["-", "3.000 \N{PLUS-MINUS SIGN} 1.000"],
    }  # fmt: skip


def test_log_means_are_over_the_steps_that_have_a_value_but_for_seconds(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [
        {"phase": "sapo", "loss": 3.0, "seconds/generate": 6.0, "tokens_per_second": 5.0},
        {"phase": "sapo", "loss": 1.0, "seam/logps": -1.0, "seam/new_logps": -1.5, "lr": 9.0},
        {"phase": "sapo", "loss": None, "seam/logps": -1.0, "seam/new_logps": -1.25},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    column = tables.logged(file)["sapo"]
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
    found = {k: {real.asked(e) for e in x} for k, x in real.split(args, tokenizer).items()}
    assert [len(found[name]) for name in ("held-out", "validation")] == [6, 4]
    assert sum(map(len, found.values())) == len(set.union(*found.values()))
    assert set.union(*found.values()) == {json.loads(line)["prompt"] for line in lines}
    twice.write_text("\n".join(reversed(twice.read_text().splitlines())))
    again = real.split(args, tokenizer)
    assert found == {k: {real.asked(e) for e in x} for k, x in again.items()}


def test_all_arms_train_from_one_start_and_are_measured_once(
    tmp_path: Path, calls: Any, capsys: Any
) -> None:
    rates = [f"{arm}=1e-3" for arm in real.ARMS if arm not in (real.CONTROL, "spin")]
    prompts = tmp_path / "ifeval.jsonl"
    row = {"prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    prompts.write_text("".join(json.dumps(row | {"key": i}) + "\n" for i in range(3)))
    said = flags(tmp_path, "--ifeval", str(prompts), "--lr-of", *rates)
    real.main(said)
    printed = capsys.readouterr().out
    means, less, changed, logs = rows_of(printed)
    assert means[""] == ["untrained", "first", *real.ARMS] and less[""] == [*real.ARMS][1:]
    assert changed[""] == means[""][1:] and "reward margin" not in changed
    assert means["reward margin"][0] == "-" and "-" not in means["reward margin"][1:]
    assert {"IFEval, prompts, %", "tokens of an answer"} <= less.keys() & changed.keys()
    assert all(", " in cell for cell in less["reward margin"])  # an error over seeds too
    # a start for each seed, both tuned arms at two rates, and the table
    assert len(calls) == 3 + 2 * 2 + 2 * len(real.ARMS)
    arms = [call for call in calls if "first" in call[call.index("--model") + 1]]
    assert len(arms) == len(calls) - 3
    assert {call[call.index("--steps") + 1] for call in arms} == {"4", "2"}  # 2: SGPO's phase 2
    assert not [*tmp_path.glob("models/spin-seed0-*/final")]  # a tuning run's
    steps = dict(zip(logs[""], logs["steps"], strict=True))
    assert {steps[arm] for arm in real.ARMS if arm != "sgpo-gold"} == {"4"}
    assert steps["first"] == steps["sgpo-gold"] == "2" and "sgpo-gold: improver" in steps
    assert {"`replay/age`", "`segment/kl`", "`seam/logps - new`", "CPU seconds"} <= logs.keys()
    of_pairs = {"`segment/unended`": ["sapo", "sapo-whole", "spin"], "`improve/cut`": ["sgpo-gold"]}
    for name, arms in of_pairs.items():
        shares = dict(zip(logs[""], logs[name], strict=True))
        assert {arm for arm, cell in shares.items() if cell != "-"} >= {*arms}
        assert all(0 <= float(shares[arm]) <= 1 for arm in arms)
    assert (tmp_path / "report.md").read_text() in printed
    text = (tmp_path / "answers.md").read_text()
    assert text.count("## ") == 5 and text.count("**spin**") == 5

    count = len(calls)
    real.main(said)
    assert len(calls) == count
    assert rows_of(capsys.readouterr().out) == [means, less, changed, logs]
    real.main([*said, "--only", "spin", "--held-out", "5", "--validation", "5"])  # other rows
    assert len(calls) > count and {call[1] for call in calls[count:]}


def test_a_cut_run_goes_on_and_tells_no_time(tmp_path: Path, calls: Any, capsys: Any) -> None:
    lab = real.Lab(real.parse(flags(tmp_path)))
    run = real.Run(real.CONTROL, 1e-4, 1, lab.first(1))
    lab.folder(run).mkdir(parents=True)  # as a kill before the first checkpoint leaves it
    assert lab.train(run) is None and lab.train(run.base) is not None and len(calls) == 2
    assert "no checkpoint yet" in capsys.readouterr().out and "--resume" in calls[1]
    assert max(row["lr"] for row in metrics(lab.folder(run))) == 1e-4
