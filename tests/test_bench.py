"""The benchmarks run, at a size that says nothing of speed: their tables, and what they check."""

import functools
import json
import math
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers import BENCH, GOLDEN, ROOT, script

from data import Example, Pair, check_answer, load_tokenizer, right_answer


def tables(text: str) -> list[list[dict[str, str]]]:
    """The Markdown tables of a text: rows by the names of their columns. A spread is median
    (minimum to maximum), in this order of size, and 1 for a row against itself."""
    found = []
    for block in text.split("\n\n"):
        lines = [x.strip("|").split("|") for x in block.splitlines() if x.startswith("|")]
        if lines:
            head, _, *rows = [[cell.strip() for cell in line] for line in lines]
            assert rows[0][1] == "1.00 (1.00 to 1.00)"
            for cell in [cell for row in rows for cell in row if " to " in cell]:
                middle, low, high = map(float, re.findall(r"-?[\d.]+", cell))
                assert 0 <= low <= middle <= high, cell
            found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def test_step_agrees_with_the_loop_and_trl_and_prints_its_table(capsys: Any) -> None:
    script("step").main(["--quick", "--reps", "1", "--device", "cpu", "--all"])
    text = capsys.readouterr().out
    assert "losses agree" in text
    losses = [line.split() for line in text.splitlines() if line.startswith("loss ")]
    sides = "loop fp32: TRL fp32: ours fp32: ours medium: ours bf16:"
    assert " ".join(word for line in losses for word in line[1:3]) == sides
    assert all(line[3] == "0.693147" and float(line[4].strip(",")) < 0.69 for line in losses)
    (table,) = tables(text)
    names = [f"{s} {p} {k}" for p in ("fp32", "medium", "bf16") for k in ("fresh", "kept")
             for s in ("loop", "TRL", "ours")]  # fmt: skip
    assert [row["row"] for row in table] == names


def test_all_sides_recompute_a_large_shape_and_agree_with_a_kept_reference(tmp_path: Path) -> None:
    step = script("step")
    shapes, peers = sys.modules["shapes"], sys.modules["peers"]
    shape = shapes.SHAPES["tiny"]
    folder, batch = shapes.write_model(shape, tmp_path, "cpu"), shapes.make_pairs(shape, 0)
    loop, trl = (kind(folder, "cpu", True, 1e-4) for kind in (peers.Loop, peers.TRL))
    ours = step.Ours(folder, "cpu", True, 1e-4, "fp32", [])
    models = (loop.policy, trl.trainer.model)
    assert all(model.is_activation_checkpointing for model in models)
    losses = [[side.step(batch, "fp32", True) for _ in range(2)] for side in (loop, trl, ours)]
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[2] == pytest.approx(losses[0], abs=1e-4)


def test_greedy_tokens_may_part_at_a_tie_and_nowhere_else() -> None:
    generate = script("generate")
    odds = generate.torch.tensor([-1.0, 3.0, 3.0])  # tokens 1 and 2 are as likely, and 0 less so

    def model(tokens: Any) -> Any:
        return types.SimpleNamespace(logits=odds.expand(1, tokens.shape[1], 3))

    bench = generate.Bench.__new__(generate.Bench)
    bench.args = types.SimpleNamespace(device="cpu")
    agree = functools.partial(bench.agree, types.SimpleNamespace(model=model), [7])
    assert agree([1, 1, 1], [1, 1]) and agree([1, 1, 1], [1, 2, 0])
    assert not agree([1, 1, 1], [1, 0, 1]) and not agree([1, 1], [1, 1, 1])


def test_step_refuses_to_time_what_computes_something_else(monkeypatch: Any) -> None:
    step = script("step")
    monkeypatch.setattr(step, "BETA", 0.2)  # ours; the peers have their own
    with pytest.raises(SystemExit, match="ours computes something else"):
        step.main(["--quick", "--reps", "1", "--device", "cpu", "--precision", "fp32"])


def test_a_row_alone_reports_its_peak_memory(capsys: Any) -> None:
    names = ["step tiny ours fp32 fresh", "generate tiny 8 ours fp32 even", "sapo tiny plain fp32"]
    for name, row in (name.split(" ", 1) for name in names):
        script(name).main(["--quick", "--reps", "1", "--device", "cpu", "--only", row])
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["peak"] >= 0


def test_generate_agrees_with_transformers_and_prints_its_table(capsys: Any) -> None:
    script("generate").main(["--quick", "--reps", "1", "--device", "cpu"])
    text = capsys.readouterr().out
    assert "greedy tokens agree" in text
    (table,) = tables(text)
    sides = [f"{s} fp32 {k}" for k in ("even", "uneven") for s in ("transformers", "ours")]
    assert [row["row"] for row in table][:4] == sides
    assert len(table) == 12


def test_sapo_prints_its_phases_and_how_they_grow(capsys: Any) -> None:
    flags = ["--quick", "--reps", "1", "--device", "cpu", "--precision", "fp32", "bf16"]
    script("sapo").main(flags)
    whole, *growth = tables(capsys.readouterr().out)
    assert [row["row"] for row in whole] == ["plain fp32", "ours fp32", "plain bf16", "ours bf16"]
    assert all(float(whole[1][name]) > 0 for name in ("generate", "policy", "optimizer"))
    names = ["segment length", "batch", "vocabulary", "number of layers", "hidden size"]
    assert [next(iter(table[0])) for table in growth] == names


def test_the_precision_medium_errs_no_more_than_bf16_rounds_and_is_set_back() -> None:
    medium = script("medium")
    error, speed = medium.medium("cpu", 64)
    assert 0 <= error < 2**-8 and speed > 0
    assert medium.torch.get_float32_matmul_precision() == "highest"


def test_the_judge_says_what_is_worked_by_hand(tmp_path: Path, monkeypatch: Any) -> None:
    judge, right, wrong = script("judge"), "a-b > ba", "a-b > ab"
    pairs = [(right, wrong), (right, wrong), (wrong, right), (wrong, "a-b")]  # chosen, rejected
    made = lambda *row: dict(zip(("prompt", "chosen", "rejected"), row, strict=True))  # noqa: E731
    rows = [made("reverse ab", *pair) | {"round": 0} for pair in pairs]
    args = asdict(judge.train.Config()) | {"inputs": {}}
    (tmp_path / "args.json").write_text(json.dumps(args))
    lines = [json.dumps(row) + "\n" for row in [*rows, rows[0] | {"round": 1}]]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    assert judge.judge(tmp_path) == {
        0: {"right_before": 0.25, "right_after": 0.5, "mended": 0.5, "spoilt": 0.25},
        1: {"right_before": 0.0, "right_after": 1.0, "mended": 1.0, "spoilt": 0.0},
    }

    # a model to which a response is less likely by a nat for each token before it: behind an answer
    # shorter by 4 bytes the gold, 8 bytes and EOS, gains 4 / 9 a token; behind one longer by 2 it
    # loses 2 / 9. The third prompt has no gold, and the fourth pair does not fit.
    def logps(model: None, pairs: Sequence[Pair]) -> list[Any]:
        return [judge.torch.tensor([-float(len(pair.prompt)) for pair in pairs])]

    monkeypatch.setattr(judge, "pair_logprobs", logps)
    rows = [made("reverse ab", "1234", "12345678"), made("reverse ab", "123456", "1234")]
    rows += [made("reverse abc", "1", "12"), made("reverse ab", "1", "1" * 99)]
    known = {"reverse ab": right, "reverse abc": ""}
    golds = [Example(({"role": "user", "content": x},), y, None, x) for x, y in known.items()]
    c = judge.train.Config(max_length=50, improver_instruction="{prompt} | {answer}")
    tokenizer = load_tokenizer(GOLDEN / "start")
    tell = lambda golds: judge.by_gold(rows, golds, None, tokenizer, c)  # noqa: E731
    assert tell(golds) == {"gold_better": 0.5, "gold_gain": pytest.approx((4 - 2) / 9 / 2)}
    assert tell(golds[1:]) == {}


def words(picture: Path) -> list[ElementTree.Element]:
    """The texts of an SVG file."""
    return list(ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text"))


def test_the_pictures_are_there_small_and_bare() -> None:
    """GitHub shows an SVG without its scripts, and fetches nothing for it."""
    folder = BENCH / "pictures"
    drawn = set(script("pictures").PICTURES)
    assert drawn == {path.name for path in folder.iterdir()}
    shown = re.findall(r"!\[[^]]*\]\(tests/bench/([^)]+)\)", (ROOT / "README.md").read_text())
    assert all((BENCH / name).parent == folder and (BENCH / name).is_file() for name in shown)
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        assert len(text.encode()) < 60_000
        assert "<script" not in text and not re.search(r'(?:href|src)="(?!#)', text)
        assert all(element.text is not None for element in words(path))


def test_the_picture_of_a_pair_is_of_a_good_one() -> None:
    """A + B + C is the right answer to x; A + B' + C has the same A and C, and is wrong."""
    rows: dict[str, dict[str, str]] = {"chosen": {}, "rejected": {}}
    for group in ElementTree.parse(BENCH / "pictures" / "pair.svg").iter():
        if group.get("id") in rows:
            for element in group.iter("{http://www.w3.org/2000/svg}text"):
                part, row = element.get("class", ""), rows[group.attrib["id"]]
                row[part] = row.get(part, "") + (element.text or "")
    good, bad = rows["chosen"], rows["rejected"]
    assert all(good[part] == bad[part] != "" for part in ("x", "A", "C"))
    assert good["B"] != bad["B'"]
    chosen, rejected = good["A"] + good["B"] + good["C"], bad["A"] + bad["B'"] + bad["C"]
    assert chosen == right_answer(good["x"]) + "end"
    assert rejected.endswith("end")
    assert not check_answer(good["x"], rejected.removesuffix("end"))


def test_the_picture_of_the_losses_is_what_the_script_draws(tmp_path: Path) -> None:
    pictures = script("pictures")
    files = tmp_path / "losses.svg", BENCH / "pictures" / "losses.svg"
    pictures.write("losses.svg", None, tmp_path)
    first = files[0].read_bytes()
    pictures.write("losses.svg", None, tmp_path)
    assert files[0].read_bytes() == first  # no date, no chance
    drawn, kept = ([element.text for element in words(file)] for file in files)
    assert drawn == kept  # titles, names, numbers at the axes
