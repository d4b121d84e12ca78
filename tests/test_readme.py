"""README.md and the reports of tests/bench are true: their commands parse, their links and files
exist, the README's examples of change work, and it can be read in an evening."""

import ast
import dataclasses
import inspect
import itertools
import re
import shlex
import sys
from operator import attrgetter
from typing import Any

import pytest
from helpers import BENCH, ROOT
from torch.distributed.run import get_args_parser

import sample
import train

README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *BENCH.glob("*.md"))}
EVENING = README.split("## Read it in an evening")[1].split("\n## ")[0]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [block for text in PAGES.values() for block in FENCED.findall(text)]
BARE = {path: FENCED.sub("", text) for path, text in PAGES.items()}
PROSE = "\n".join(BARE.values())
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", PROSE)]
OURS = ("python ", "torchrun ", "tests/bench/")
MODULES = ("train", "sample", "sapo", "sgpo", "model", "data")


def commands() -> list[list[str]]:
    """The words of each command on these pages: in their blocks, and in prose that calls python.
    "..." stands for flags left out; a capital alone is a number to be chosen."""
    shown = [text for language, text in BLOCKS if not language]
    shown += [span for span in SPANS if span.startswith(OURS)]
    lines = "\n".join(shown).replace("\\\n", " ").replace("&&", "\n").splitlines()
    found = []
    for line in lines:
        line = re.sub("^tests/", "python tests/", line.strip())
        if line.startswith((*OURS, "lm_eval ", "pip ")):
            words = [word for word in shlex.split(line, comments=True) if word != "..."]
            found.append(["1" if word in ("N", "S") else word for word in words])
    return found


def named(*starts: str) -> list[Any]:
    """The commands that begin so, and of each kind there are three at least."""
    these = [[words for words in commands() if " ".join(words).startswith(s)] for s in starts]
    assert all(len(found) >= 3 for found in these)
    return [pytest.param(words, id=" ".join(words)) for words in itertools.chain(*these)]


@pytest.mark.parametrize("words", named("python train.py", "python sample.py", "torchrun"))
def test_commands_of_train_and_sample_parse(words: list[str], capsys: Any) -> None:
    """With no error, and no flag that is not read."""
    program, flags = words[1], words[2:]
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        program, flags = launch.training_script, launch.training_script_args
    parse_args = {"train.py": train.parse_args, "sample.py": sample.parse_args}[program]
    if flags == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            parse_args(flags)
    else:
        parse_args(flags)
        assert "warning" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("words", named("python tests/"))
def test_commands_of_scripts_name_files_and_flags_that_they_have(words: list[str]) -> None:
    code = (ROOT / words[1]).read_text()
    if "import clock" in code:  # what the timing scripts have in common
        code += (ROOT / "tests/bench/clock.py").read_text()
    ours = {field.name for field in dataclasses.fields(sample.Flags)} if "sample." in code else ()
    if len(words) > 2:
        assert "ArgumentParser" in code or ours
    for flag in (word for word in words[2:] if word.startswith("-")):
        known = f'add_argument("{flag}"' in code or f'"{flag}": {{' in code  # as clock takes them
        name = flag[2:].replace("-", "_")
        assert known or name in ours or re.search(rf"^    {name}: ", code, re.MULTILINE)


@pytest.mark.parametrize("words", named("lm_eval", "pip"))
def test_what_other_programs_are_given_exists(words: list[str]) -> None:
    for flag, value in itertools.pairwise(words):
        if flag == "-r":
            assert (ROOT / value).is_file()
        if flag == "--include_path":
            for task in words[words.index("--tasks") + 1].split(","):
                assert (ROOT / value / f"{task}.yaml").is_file()


def test_flags_in_the_prose_are_flags() -> None:
    kinds = (train.Config, sample.Flags)
    fields = (field for kind in kinds for field in dataclasses.fields(kind))
    ours = {field.name.replace("_", "-") for field in fields}
    alone = " ".join(span for span in SPANS if not span.startswith(OURS))  # the others are parsed
    mentioned = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", alone))
    assert len(mentioned) > 50
    assert mentioned - ours <= {"device", "format", "model_outputs", "shutdown-timeout"}  # others'


def test_links_lead_somewhere() -> None:
    anchors = {}
    for page, text in BARE.items():
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors[page] = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
    links = [(page, link) for page in BARE for link in re.findall(r"\]\(([^)]+)\)", BARE[page])]
    links = [(page, link) for page, link in links if "://" not in link]
    assert len(links) > 50
    for page, link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors[target], link


def test_the_reports_are_found_from_the_readme_and_say_when_they_were_made() -> None:
    for page in PAGES.keys() - {ROOT / "README.md"}:
        assert f"](tests/bench/{page.name})" in README
        assert re.search(r"^Dated 20\d\d-\d\d-\d\d, ", PAGES[page], re.MULTILINE)


def test_the_readme_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 400
    assert max(len(line) for line in lines if not line.startswith("|")) <= 100
    assert max(map(len, lines)) <= 210


def span(file: str, first: str, last: str) -> int:
    """Lines of a file, from its top or from `first`, to the end of `last`."""
    body = ast.parse((ROOT / file).read_text()).body
    found = {node.name: node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    top = [found[first], *found[first].decorator_list] if first else body[:1]
    return found[last].end_lineno - min(node.lineno for node in top) + 1


def test_the_reading_path_has_the_lines_that_the_readme_says() -> None:
    """Where it has not, the message is what the README ought to say."""
    row = r"^(\| \[`(\w+\.py)`\]\(\2\)(?: from `(\w+)`)? to `(\w+)` \|) (\d+) \|"
    path = re.findall(row, EVENING, re.MULTILINE)
    assert {file for _, file, *_ in path} == {"sapo.py", "sgpo.py", "train.py", "model.py"}
    counts = [span(file, first, last) for _, file, first, last, _ in path]
    right = [f"{start} {count} |" for (start, *_), count in zip(path, counts, strict=True)]
    right.append(f"| in all | {sum(counts)} |")
    assert all(line in EVENING for line in right), "\n" + "\n".join(right)
    assert sum(counts) <= 1900


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
    listed = set(re.findall(r"\[`([\w./]+)`\]\(", EVENING))
    assert all((ROOT / name).exists() for name in listed)
    there = {path for path in ROOT.iterdir() if path.is_file() and path.name[0] != "."}
    kinds = (".py", ".txt", ".md", "")
    assert {path.name for path in there if path.suffix in kinds} - listed == {"README.md"}
    assert {f"{name}.py" for name in MODULES} < listed


def test_the_readmes_diff_and_table_are_the_lessons() -> None:
    (shown,) = (text for language, text in BLOCKS if language == "diff")
    files = {path.stem: path.read_text() for path in (ROOT / "tests" / "lessons").glob("*.diff")}
    assert files["sppo"].endswith(f"\n\n{shown}")
    table = README.split("## Change it")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| \[`(\w+)`\]", table, re.MULTILINE)) == files.keys()
