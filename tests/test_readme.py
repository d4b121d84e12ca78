"""README.md is true: its commands parse, its links and files exist, its examples of change work."""

import inspect
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import GOLDEN, ROOT
from safetensors.numpy import load_file
from torch.distributed.run import get_args_parser

import sample
import train

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
OURS = ("python ", "torchrun ", "tests/bench/")
MODULES = ("train", "sample", "sapo", "sgpo", "model", "data")


def commands() -> list[list[str]]:
    """The words of each command in the README: in its blocks, and in lines of prose that call
    python. "..." stands for flags left out; a capital alone is a number to be chosen."""
    shown = [text for language, text in BLOCKS if not language]
    spans = re.findall(r"`([^`]+)`", PROSE)
    shown += [" ".join(span.split()) for span in spans if span.startswith(OURS)]
    lines = "\n".join(shown).replace("\\\n", " ").replace("&&", "\n").splitlines()
    found = []
    for line in lines:
        if line.strip().startswith((*OURS, "lm_eval ", "pip ")):
            words = [word for word in shlex.split(line, comments=True) if word != "..."]
            found.append(["1" if word in ("N", "S") else word for word in words])
    return found


def named(*start: str) -> list[Any]:
    """The commands that begin so."""
    these = [words for words in commands() if tuple(words[: len(start)]) == start]
    return [pytest.param(words, id=" ".join(words)) for words in these]


def parse(program: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """What a program of ours makes of these flags: no error, and none that it does not read."""
    parse_args = {"train.py": train.parse_args, "sample.py": sample.parse_args}[program]
    if flags == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            parse_args(flags)
        return None
    parsed = parse_args(flags)
    assert "warning" not in capsys.readouterr().out
    return parsed


def test_the_commands_were_found() -> None:
    counts = [len(named("python", "train.py")), len(named("torchrun")), len(named("lm_eval"))]
    counts.append(len(named("python", "sample.py")))
    assert all(count >= 3 for count in counts)


@pytest.mark.parametrize("words", [*named("python", "train.py"), *named("python", "sample.py")])
def test_commands_of_train_and_sample_parse(words: list[str], capsys: Any) -> None:
    parse(words[1], words[2:], capsys)


@pytest.mark.parametrize("words", named("torchrun"))
def test_commands_of_torchrun_parse(words: list[str], capsys: Any) -> None:
    launch = get_args_parser().parse_args(words[1:])
    assert launch.training_script == "train.py"
    parse("train.py", launch.training_script_args, capsys)


SCRIPTS = [words for words in commands() if words[0] == "python" and "/" in words[1]]
SCRIPTS += [["python", *words] for words in commands() if words[0].startswith("tests/bench")]


@pytest.mark.parametrize("words", [pytest.param(words, id=" ".join(words)) for words in SCRIPTS])
def test_commands_of_scripts_name_files_and_flags_that_they_have(words: list[str]) -> None:
    code = (ROOT / words[1]).read_text()
    if "import clock" in code:  # what the timing scripts have in common
        code += (ROOT / "tests/bench/clock.py").read_text()
    if len(words) > 2:
        assert "ArgumentParser" in code
    for flag in (word for word in words[2:] if word.startswith("-")):
        assert f'add_argument("{flag}"' in code or f'"{flag}": {{' in code  # as clock takes them


@pytest.mark.parametrize("words", [*named("lm_eval"), *named("pip")])
def test_what_other_programs_are_given_exists(words: list[str]) -> None:
    for flag, value in itertools.pairwise(words):
        if flag == "-r":
            assert (ROOT / value).is_file()
        if flag == "--include_path":
            for task in words[words.index("--tasks") + 1].split(","):
                assert (ROOT / value / f"{task}.yaml").is_file()


def test_flags_in_the_prose_are_flags() -> None:
    spans = " ".join(" ".join(re.findall(r"`([^`]+)`", PROSE)).split())
    kinds = (train.Config, sample.Flags)
    ours = {name.replace("_", "-") for kind in kinds for name, *_ in sample.help_strings(kind)}
    for words in sorted(SCRIPTS, key=len, reverse=True):  # the scripts' own were looked up above
        spans = spans.replace(" ".join(words[1:]), "")
    mentioned = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", spans))
    assert len(mentioned) > 50
    assert mentioned - ours <= {"help", "model_outputs"}  # the latter is alpaca_eval's


def test_links_lead_somewhere() -> None:
    titles = re.findall(r"^#+ (.*)$", PROSE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PROSE) if "://" not in link]
    assert len(links) > 20
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (ROOT / link).exists(), link


def test_names_are_where_the_readme_links_them_to() -> None:
    linked = re.findall(r"\[`(\w+(?:\.\w+)?)`\]\((\w+)\.py\)", PROSE)
    linked = [(name, module) for name, module in linked if name != f"{module}.py"]
    assert len(linked) > 20
    for name, module in linked:
        assert attrgetter(name)(sys.modules[module]).__module__ == module, name


def test_the_lines_beside_the_equations_stand_in_the_code_that_is_linked() -> None:
    quoted = re.findall(r"`([^`]+)` in \[`([\w.]+)(?<!\.py)`\]\((\w+)\.py\)", PROSE)
    assert len(quoted) > 15
    for line, name, module in quoted:
        code = inspect.getsource(attrgetter(name)(sys.modules[module]))
        assert line in " ".join(code.split()), name


def test_the_list_of_files_is_whole() -> None:
    table = PROSE.split("## The files, in reading order")[1].split("\n## ")[0]
    listed = set(re.findall(r"\[`([\w./]+)`\]\(", table))
    assert all((ROOT / name).exists() for name in listed)
    kinds = (".py", ".txt", ".md", "")
    there = {path.name for path in ROOT.iterdir() if path.is_file() and path.name[0] != "."}
    there = {name for name in there if Path(name).suffix in kinds}
    assert there - listed == {"README.md"}
    assert {f"{name}.py" for name in MODULES} < listed


def change(which: str, folder: Path, *flags: str) -> tuple[dict[str, np.ndarray], list[float]]:
    """Applies the README's diff that adds `which` to a copy of the sources, trains two steps with
    it on the golden start: the trace, and the losses in metrics.jsonl."""
    (diff,) = (text for language, text in BLOCKS if language == "diff" and which in text)
    assert len(diff.splitlines()) < 30
    for name in MODULES:
        shutil.copy(ROOT / f"{name}.py", folder)
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    told = {"cwd": folder, "env": alone, "text": True, "capture_output": True, "check": False}
    done = subprocess.run(["git", "apply", "-"], input=diff, **told)
    assert done.returncode == 0, done.stderr
    usual = f"--model {GOLDEN}/start --data {GOLDEN}/rows.jsonl --steps 2 --batch-size 6"
    usual += " --max-length 64 --lr 2e-4 --warmup 0 --log-every 1 --out run --trace trace.st"
    done = subprocess.run([sys.executable, "train.py", *usual.split(), *flags], **told)
    assert done.returncode == 0, done.stderr
    rows = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return load_file(folder / "trace.st"), [json.loads(row)["loss"] for row in rows]


def log_ratios(trace: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of policy to reference: of the chosen and of the rejected sides, (N,) each."""
    sides = ("chosen", "rejected")
    a, b = (trace[f"pair/logps/{side}"] - trace[f"pair/ref_logps/{side}"] for side in sides)
    return a, b


def test_the_readmes_loss_is_sppos(tmp_path: Path) -> None:
    """At the start both log-ratios are 0, and with beta = 0.1 the loss 2 (1 / 0.2)^2 = 50."""
    flags = ("--method", "dpo", "--loss", "sppo", "--beta", "0.1")
    trace, losses = change("sppo", tmp_path, *flags)
    assert losses[0] == pytest.approx(50, abs=1e-3)
    a, b = log_ratios(trace)
    expected = (a - 5) ** 2 + (b + 5) ** 2
    assert len(expected) == 12
    assert expected.std() > 0.1
    np.testing.assert_allclose(trace["pair/losses"], expected, rtol=1e-4)
    assert losses[1] == pytest.approx(expected[6:].mean(), rel=1e-4)


def test_the_readmes_source_takes_other_rows_responses(tmp_path: Path) -> None:
    """DPO's loss is ln 2 at the start, and then -log sigmoid(0.1 (a - b))."""
    flags = ("--method", "random", "--beta", "0.1", "--eval-data", f"{GOLDEN}/rows.jsonl")
    trace, losses = change("class Random", tmp_path, *flags)
    ends = np.cumsum(trace["pair/lengths"])
    sides = [side.tolist() for side in np.split(trace["pair/tokens"], ends[:-1])]
    chosen, rejected = sides[1::3], sides[2::3]
    for step in (0, 6):
        batch = chosen[step : step + 6]
        assert rejected[step : step + 6] == [batch[-1], *batch[:-1]]
    assert all(good != bad for good, bad in zip(chosen, rejected, strict=True))
    a, b = log_ratios(trace)
    expected = np.log1p(np.exp(-0.1 * (a - b)))
    np.testing.assert_allclose(trace["pair/losses"], expected, rtol=1e-4)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[1] == pytest.approx(expected[6:].mean(), rel=1e-4)
    assert losses[1] < losses[0]
