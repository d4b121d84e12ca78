"""The statistics, the choice of rates and the resuming of tests/bench/methods.py."""

import collections
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers import GOLDEN, script

import data
from data import Pair

methods = script("methods")
frontier = script("frontier")
open_ended = methods.open_ended


def test_a_paired_difference_and_its_standard_error_are_those_worked_by_hand():
    # differences 1, 2, 6: mean 3, deviations -2, -1, 3, variance (4 + 1 + 9) / 2 = 7
    found = methods.paired([11.0, 22.0, 36.0], [10.0, 20.0, 30.0])
    assert found == (3, pytest.approx(math.sqrt(7 / 3)))
    assert methods.spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)))
    # common to all seeds: no error, though the seeds differ
    assert methods.paired([52.0, 72.0, 92.0], [50.0, 70.0, 90.0]) == (2.0, 0.0)


@pytest.mark.parametrize("peak", range(len(methods.RATES)))
def test_the_rates_tried_lead_to_the_peak_and_to_both_its_neighbours(peak: int):
    tried: dict[int, float] = {}
    while new := methods.next_places(tried):
        assert not set(new) & tried.keys()
        tried |= {place: -abs(place - peak) for place in new}
    assert methods.choose(tried) == peak
    assert methods.choose({5: 80.0, 4: 80.0}) == 4  # of equal ones the smaller
    assert {peak - 1, peak + 1} & set(range(len(methods.RATES))) <= tried.keys()


def test_where_every_rate_does_harm_smaller_ones_are_tried():
    collapsed = {3: 5.2, 4: 5.1, 5: 5.9, 6: 5.3}
    assert methods.next_places(collapsed) == []
    for place, score in ((2, 33.0), (1, 36.5), (0, 36.1)):
        assert methods.next_places(collapsed, before=36.0) == [place]
        collapsed[place] = score
    assert methods.next_places(collapsed, before=36.0) == []
    assert methods.next_places(dict.fromkeys(range(8), 1.0), before=36.0) == []


def test_a_run_is_known_by_all_that_its_result_depends_on_and_by_nothing_else():
    arm = methods.Arm({"loss": "orpo"}, base="improver")
    base = methods.Run(methods.Arm(), 1e-4, 1, "test")
    run = methods.Run(arm, 1e-4, 1, "test", base)
    others = [
        replace(run, rate=3e-4), replace(run, seed=2), replace(run, split="validation"),
        replace(run, arm=replace(arm, flags={"loss": "dpo"})), replace(run, base=None),
        replace(run, arm=replace(arm, rows="clean 16")), replace(run, base=replace(base, rate=1)),
        replace(run, arm=replace(arm, tasks="open")),
    ]  # fmt: skip
    assert len({other.key for other in [run, *others]}) == 1 + len(others)
    assert (run.start, others[-1].start) == ("1", "open-1")
    assert replace(run, arm=replace(arm, seconds=9.0)).key == run.key
    assert methods.Run(methods.Arm(), 1e-4, 1, "test").key == "7bfb7bb552f212e3"  # as ever
    assert not [k for k, v in methods.SELF_IMPROVER.items() if methods.train.TASKS.get(k) == v]


def test_what_is_in_the_file_is_not_run_again_and_a_line_cut_off_is(tmp_path: Path):
    runs = [methods.Run(methods.Arm(), 1e-4, seed, "test") for seed in range(3)]
    results = methods.Results(tmp_path, 1)
    for run in runs[:2]:
        results.add(run, {"score": float(run.seed)})
    text = results.file.read_text()
    results.file.write_text(text[:-5])  # killed while it wrote the second line
    again = methods.Results(tmp_path, 1)
    assert again.missing([*runs, *runs]) == runs[1:]
    assert again.scores(runs[:1]) == [0.0]
    again.add(runs[1], {"score": 7.0})
    assert methods.Results(tmp_path, 1).scores(runs[:2]) == [0.0, 7.0]
    assert json.loads(text.splitlines()[0])["key"] == runs[0].key


def test_the_report_stars_what_is_beyond_two_standard_errors():
    level = {column: [50.0, 60.0, 70.0] for column in methods.COLUMNS}
    better = level | {"score": [51.0, 61.1, 71.0], "seen/0": [40.0, 60.0, 90.0]}
    lines = methods.report({"sft": level, "sapo": better}, ["sft"]).splitlines()
    cells = dict(zip(methods.COLUMNS, lines[-1].strip("| ").split(" | ")[1:], strict=False))
    assert cells["score"] == "+1.03 ± 0.03 *"
    assert cells["seen/0"] == "+3.33 ± 8.82"
    assert sum(line.startswith("| \N{MINUS SIGN} sft") for line in lines) == 1


def test_no_arm_is_measured_on_starts_that_chose_its_rate_and_all_make_sense():
    assert not set(methods.VALIDATION) & set(methods.TEST)
    for setting, arms in methods.SETTINGS.items():
        assert any(name.startswith("sft") for name in arms), setting
        for arm in arms.values():
            assert arm.base in arms or not arm.base
            assert arm.base == "" or arms[arm.base].base == ""
            assert methods.config_of(methods.Run(arm, 1e-4, 7, "test")).seed == 7
    start = methods.config_of(methods.Run(methods.Arm(), 0.0, 7, "test"))
    assert start.seed == 7  # whose rate is none


def test_flawed_gold_is_flawed_as_often_as_said_and_its_prompts_are_the_clean_ones():
    run = methods.Run(methods.Arm(rows="clean 1000 0.3"), 1e-4, 1, "test")
    clean = methods.gold_rows(replace(run, arm=methods.Arm(rows="clean 1000")))
    flawed = methods.gold_rows(run)
    assert [e.messages for e in flawed] == [e.messages for e in clean]
    differing = [a.response != b.response for a, b in zip(flawed, clean, strict=True)]
    assert 0.25 < sum(differing) / 1000 < 0.35
    assert len({e.messages[-1]["content"].split()[0] for e in methods.unlabelled(run)}) == 4
    everything = replace(run, arm=methods.Arm(prompts="all 64"))
    assert len({e.messages[-1]["content"].split()[0] for e in methods.unlabelled(everything)}) == 8


@pytest.mark.parametrize(
    ("prompt", "answer", "quality"),
    [
        ("rise bd", "b-d-e-h-k-l", 1.0), ("rise bd", "b-d-e", 0.25), ("rise bd", "b-d", 0.0),
        ("rise bd", "b-d-e-d", 0.0), ("rise bd", "e-h", 0.0), ("rise bd", "b-d-eh", 0.0),
        ("rise bd", "b-d-e-f-g-h-i", 0.0), ("rise bd", "b-d-e-q", 0.0), ("rise bd", "", 0.0),
        ("rise bd | b-d", "b-d-k-l", 0.5), ("fall kj", "k-j-a", 0.25), ("fall kj", "k-j-k", 0.0),
        ("free gk", "g-k-a-b", 0.5), ("free gk", "g-k-a-g", 0.0), ("again bd", "b-d-b-d", 0.5),
        ("again bd", "b-d-b-b", 0.0), ("again bd", "b-d-b-e", 0.0), ("near bc", "b-c-e-d-b", 0.75),
        ("near bc", "b-c-f", 0.0), ("swing bd", "b-d-a-l-a", 0.75), ("swing bd", "b-d-e", 0.0),
        ("swing bda", "b-d-a-c", 0.25), ("leap af", "a-f-k-f", 0.5), ("leap af", "a-f-j", 0.0),
        ("even ac", "a-c-k-a-e", 0.75), ("even ac", "a-c-d", 0.0), ("even ac", "a-c-c", 0.0),
    ],
)  # fmt: skip
def test_the_quality_of_an_open_ended_answer(prompt: str, answer: str, quality: float):
    assert open_ended.check_answer(prompt, answer) == quality


def test_open_ended_rows_are_of_the_quality_said_and_their_splits_share_no_prompt():
    prompts: dict[str, set[str]] = {}
    for split in ("clean", "validation", "test", "pretrain"):
        examples = open_ended.task_examples(split, 800, 1)
        assert examples == open_ended.task_examples(split, 800, 1)
        asked = [e.messages[0]["content"] for e in examples]
        prompts[split] = set(asked)
        rows = list(zip(asked, examples, strict=True))
        marks = [open_ended.check_answer(x, e.response) for x, e in rows]
        if split == "pretrain":
            assert 350 < sum(mark > 0 for mark in marks) < 450
            assert set(marks) == {0.0, 0.25, 0.5, 0.75, 1.0}
            continue
        assert set(marks) == {0.75, 1.0}
        for x, e in rows:
            assert open_ended.check_answer(x, e.rejected) < 0.75
        kinds = {open_ended.task_kind(x) for x in asked}
        assert kinds == set(open_ended.SEEN + (() if split == "clean" else open_ended.UNSEEN))
    assert not prompts["test"] & (prompts["validation"] | prompts["pretrain"] | prompts["clean"])
    assert not prompts["validation"] & (prompts["pretrain"] | prompts["clean"])
    kinds = collections.Counter(map(open_ended.task_kind, prompts["test"]))
    assert min(kinds.values()) > 25  # of 100 each
    with pytest.raises(data.InputError, match="no open-ended task"):
        open_ended.task_kind("reverse abcd")


def test_mending_an_open_ended_draft_makes_it_better_a_letter_at_a_time():
    rng = Random(1)
    for example in open_ended.task_examples("pretrain", 800, 2):
        prompt, draft = example.messages[0]["content"], example.response
        before = open_ended.check_answer(prompt, draft)
        mended = open_ended.mend_answer(prompt, draft, rng)
        after = open_ended.check_answer(prompt, mended)
        assert mended == draft if before == 1 else after > before
        if 0 < before < 1 and mended.startswith(draft):
            assert after == before + 0.25
    assert open_ended.mend_answer("again bd", "b-d-b-e-b", Random(1)) == "b-d-b-d"


def test_the_open_ended_tasks_stand_in_for_the_built_in_ones_and_leave():
    held = data.check_answer, data.SEEN
    with pytest.raises(KeyError), open_ended.stand_in():
        assert data.check_answer("rise bd", "b-d-e") == 0.25
        assert data.task_examples("clean", 1, 1)[0].where == "open:clean:0"
        raise KeyError
    assert (data.check_answer, data.SEEN) == held
    with open_ended.stand_in(False):
        assert held[1] == data.SEEN


def test_a_rejected_side_is_as_good_where_the_checker_says_so_and_equal_sides_do_not_count():
    tokenizer = data.load_tokenizer(GOLDEN / "start")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "rise bd"}], True)
    encode = lambda text: [*tokenizer.encode(text), *tokenizer.eos_ids]  # noqa: E731
    texts = [("b-d-e", "b-d-f"), ("b-d-e-f", "b-d-e"), ("b-d-e", "b-d-e-f"), ("b-d-e", "b-d-e")]
    pairs = [Pair(asked, encode(chosen), encode(rejected)) for chosen, rejected in texts]
    with open_ended.stand_in():
        assert methods.as_good(pairs, tokenizer) == [1.0, 0.0, 1.0]


def test_the_height_of_a_hull_and_its_mean_are_those_worked_by_hand():
    # From (0, 0) to (2, 10) and on to (6, 14), over (3, 8), (4, 11); level behind; (7, 12) is lower
    points = [(0.0, 0.0), (7.0, 12.0), (4.0, 11.0), (2.0, 10.0), (3.0, 8.0), (6.0, 14.0)]
    heights = {0.0: 0.0, 1.0: 5.0, 2.0: 10.0, 4.0: 12.0, 6.0: 14.0, 6.5: 14.0, 9.0: 14.0}
    assert {x: frontier.gain_at(points, x) for x in heights} == heights
    # areas 2 * 10 / 2 = 10, 2 * (10 + 12) / 2 = 22; 4 * (10 + 14) / 2 = 48 and 2 * 14 = 28
    assert frontier.mean_gain(points, 4.0) == pytest.approx((10 + 22) / 4)
    assert frontier.mean_gain(points, 8.0) == pytest.approx((10 + 48 + 28) / 8)
    # what forgets less than nothing: from (-1, 4) to (1, 8), so 6 at 0, and the mean 7 up to 1
    points = [(0.0, 0.0), (-1.0, 4.0), (1.0, 8.0)]
    assert (frontier.gain_at(points, 0.0), frontier.mean_gain(points, 1.0)) == (6.0, 7.0)
    assert frontier.mean_gain(points, 0.0) == 6.0


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = [1.0, 2.0, 6.0, 4.0]
    without = [statistics.fmean(values[:i] + values[i + 1 :]) for i in range(4)]
    assert frontier.jackknife(without) == pytest.approx(statistics.stdev(values) / 2)
    assert math.isnan(frontier.jackknife([3.0]))


def told(**curves: list[tuple[list[float], list[float]]]) -> dict[str, Any]:
    """What frontier.py writes: of each curve (gains, KLs) of its points."""
    rows = {
        name: [
            {"gain": gain, "kl": kl, "lost": [4 * x for x in kl], "seconds": 9.0, "generated": 70}
            for gain, kl in points
        ]
        for name, points in curves.items()
    }
    starts = [*range(len(next(iter(curves.values()))[0][0]))]
    made = {"setting": "s", "starts": starts, "curves": rows, "control": "SFT"}
    return made | {"budgets": {kind: frontier.budget_of(made, kind) for kind in ("lost", "kl")}}


def test_curves_are_compared_up_to_what_sft_forgets_where_it_gains_most():
    level = [([9.0, 11.0, 13.0], [1.0, 1.0, 1.0]), ([21.0, 19.0, 17.0], [2.0, 3.0, 1.0])]
    found = told(SFT=level, SAPO=[([18.0, 19.0, 20.0], [1.0, 1.0, 1.0])])
    assert found["budgets"] == {"lost": 8.0, "kl": 2.0}
    assert frontier.curve(found["curves"]["SFT"], "kl") == [(0, 0), (1, 11), (2, 19)]
    assert frontier.curve(found["curves"]["SFT"], "kl", left_out=1) == [(0, 0), (1, 11), (1.5, 19)]
    assert frontier.compared(found, "SFT", "kl", frontier.mean_gain) == (10.25, 0, 0)
    # SAPO: from (0, 0) to (1, 19), level from there: 19 at 2 as SFT's, and (9.5 + 19) / 2 up to it
    value, less, error = frontier.compared(found, "SAPO", "lost", frontier.mean_gain)
    assert (value, less) == (14.25, 4.0) and error > 0
    assert frontier.compared(found, "SAPO", "kl", frontier.gain_at)[:2] == (19, 0)
    rows = [line.strip("| ").split(" | ") for line in frontier.report(found).splitlines()]
    assert rows[-1][:5] == ["**SAPO**", "1", "+19.0", "14.2", f"+4.0 ± {error:.1f} *"]
    assert rows[-2][:4] == ["**SFT**", "2", "+19.0", "10.2"]
    nothing = told(SFT=[([5.0], [-1.0])], SAPO=[([4.0], [1.0])])
    assert nothing["budgets"] == {"lost": 0.0, "kl": 0.0}
    assert "nan" in frontier.report(nothing)  # of one start


def test_the_curves_of_the_frontier_make_sense_and_share_what_they_begin_with():
    for setting, curves in frontier.SETTINGS.items():
        assert next(iter(curves)) == frontier.CONTROL, setting
        for method in curves.values():
            runs = method.runs(2)
            assert [methods.config_of(run).lr for run in runs] == [[run.rate] for run in runs]
            assert len({run.key for run in runs}) == len(runs)
            based = [run for run in runs if run.base]
            assert all(run.base == runs[0] for run in based)
            assert {run.start for run in runs} == {frontier.starts_of(curves, [2])[0].start}
        shared = [run.key for run in curves["SFT, then SAPO"].runs(2)]
        assert shared[0] in [run.key for run in curves["SFT"].runs(2)]


def test_the_numbers_of_a_curve_are_less_the_start_and_with_the_cost_of_what_came_before(
    tmp_path: Path,
):
    first, arm = methods.sft(60), methods.Arm()
    curves = {
        "SFT": frontier.Method((first,), (1e-4,)),
        "X": frontier.Method((arm,), (1e-5,), first),
    }
    results = methods.Results(tmp_path, 1)
    values = {"seconds": 0.0, "generated": 0, "kl": 0.0, "seen/1": 30.0, "unseen/0": 80.0}
    for seed in (2, 3):
        results.add(frontier.starts_of(curves, [seed])[0], values | {"score": 1.0})
        base, run = curves["X"].runs(seed)
        change = {"seconds": 2.0, "kl": 0.5, "seen/1": 40.0 + seed, "unseen/0": 78.0}
        results.add(base, values | change)
        results.add(run, values | change | {"kl": 1.0, "unseen/0": 81.0, "generated": 9})
    assert "and 0 runs" in frontier.plan(curves, results, [2, 3])
    assert "and 2 runs" in frontier.plan(curves, results, [2, 3, 4])
    found = frontier.gather("s", curves, results, [2, 3])["curves"]
    assert found["SFT"] == found["X"][:1]
    assert found["X"][1] == {
        "rate": 1e-5, "steps": 120, "gain": [12.0, 13.0], "lost": [-1.0, -1.0], "kl": [1.0, 1.0],
        "seconds": 4.0, "generated": 9.0,
    }  # fmt: skip


def test_the_kl_from_itself_is_none_and_from_another_is_the_mean_over_samples():
    model, tokenizer = (load(GOLDEN / "start") for load in (
        methods.Transformer.from_pretrained, data.load_tokenizer
    ))  # fmt: skip
    examples = data.task_examples("test", 8, 1)
    prompts = [data.encode_example(tokenizer, example).prompt for example in examples]
    assert methods.kl(model, model, prompts, tokenizer.eos_ids, 1) == 0.0
    other = methods.Transformer(model.config)
    other.init_weights(1)
    new = methods.generate(other, prompts, 48, eos_ids=tokenizer.eos_ids, seed=1)

    def logp(one: Any, prompt: list[int], answer: list[int]) -> float:
        logits = one(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()

    both = list(zip(prompts, new, strict=True))
    hand = statistics.fmean(logp(other, x, y) - logp(model, x, y) for x, y in both)
    found = methods.kl(other, model, prompts, tokenizer.eos_ids, 1)
    assert found == pytest.approx(hand, rel=1e-4) and found > 1


def test_the_picture_of_the_frontier_names_its_curves_and_is_the_same_each_time(tmp_path: Path):
    points = [([9.0, 11.0], [1.0, 1.2]), ([21.0, 19.0], [2.0, 3.0])]
    found, drawn = told(SFT=points, SPIN=points[:1]), []
    for _ in range(2):
        script("pictures").write("frontier.svg", found, tmp_path)
        drawn.append((tmp_path / "frontier.svg").read_text())
    assert drawn[0] == drawn[1]
    assert all(f">{name}<" in drawn[0] for name in ("SFT", "SPIN"))
    assert "2 starts" in drawn[0]
