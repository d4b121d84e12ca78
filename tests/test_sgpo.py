"""SGPO: the improver's rows and fence, rounds of pairs, and whole runs that stop and go on."""

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fakes import Run
from helpers import GOLDEN, alike, cut, metrics, same, torchrun, weights

import data
import sample
import train
from data import Example, Pair
from sgpo import (
    IMPROVER,
    SGPO,
    TARGET,
    Ask,
    improver_prompt,
    improver_rows,
    perplexity_fence,
)

SHORT = data.REWRITE_PROMPT.replace("{draft}", "{answer}")
tokenizer = data.load_tokenizer(GOLDEN / "start")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ------------------------------------------------------------------------------------- the prompts


def test_the_improvers_prompt_holds_request_and_answer_and_keeps_earlier_turns() -> None:
    before = [{"role": "system", "content": "Be brief."}, user("Hi"), user("Why {answer}?")]
    asked = improver_prompt(before, "Because {prompt}.")
    assert asked[:2] == before[:2]
    assert "Why {answer}?" in asked[2]["content"]
    assert "Because {prompt}." in asked[2]["content"]
    assert improver_prompt([user("sort ba")], "ab", SHORT) == [user("sort ba | ab")]
    (said,) = improver_prompt([user("{answer}")], "x", "{prompt}{answer}{c}{prompt}")
    assert said == user("{answer}x{c}{answer}")  # once each, and nothing else


def test_the_stronger_models_prompt_holds_the_gold_too() -> None:
    (asked,) = improver_prompt([user("Q1")], "A3", TARGET, "G2")
    assert all(part in asked["content"] for part in ("Q1", "G2", "A3"))
    assert all("{" + name + "}" in TARGET for name in ("prompt", "gold", "answer"))
    assert all("{" + name + "}" in IMPROVER for name in ("prompt", "answer"))


# ----------------------------------------------------------------------------------- phase 1's rows


def target(messages: Any, draft: str, improved: str) -> Example:
    return Example(tuple(messages), improved, draft, "here")


def learner(**flags: Any) -> Run:
    """A run that scores rows in phase 1."""
    return Run(lambda _: [], tokenizer, improver_instruction=SHORT, **flags)


def test_the_loss_of_a_row_is_that_of_transformers_with_the_prompt_masked() -> None:
    targets = [target([user("sort ba")], "b-a > ba", "b-a > ab"),
               target([user("add 12 13")], "?", "2+3=5-1+1=2 > 25")]  # fmt: skip
    c = train.parse_args(["--method", "sft", "--model", str(GOLDEN / "start"), "--data", "x"])
    mine = train.Learner(c, GOLDEN / "start", tokenizer, train.Ranks())
    rows, report = improver_rows(targets, [], mine)
    loss = train.summary(rows, mine.score(rows, 0, learn=True), c)["loss"]
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "start", dtype=torch.float32)
    total, count = torch.zeros(()), 0
    for row, perplexity in zip(rows, report["perplexities"], strict=True):
        labels = torch.tensor([[-100] * len(row.prompt) + row.chosen])
        out = model(torch.tensor([row.prompt + row.chosen]), labels=labels)
        total, count = total + out.loss * len(row.chosen), count + len(row.chosen)
        assert perplexity == pytest.approx(math.exp(out.loss.item()), rel=1e-4)
    (total / count).backward()
    assert loss == pytest.approx(float(total.detach()) / count, rel=1e-5)
    named = dict(model.named_parameters())
    for name, parameter in mine.policy.named_parameters():
        assert torch.allclose(parameter.grad, named[name].grad, atol=1e-5), name


CONTEXTS = {
    "improver": "<|user|>sort ba | x<|assistant|>",
    "prompt": "<|user|>sort ba<|assistant|>",
    "nothing": "<|end|>",
}


@pytest.mark.parametrize("given", CONTEXTS)
def test_a_row_teaches_its_target_whose_perplexity_is_given_what_the_flag_says(given: Any) -> None:
    run, scored = learner(fence_given=given), list[Pair]()
    run.sums = lambda _, pairs: [scored.append(pair) or (-1.0, 0.0) for pair in pairs]
    (row,), report = improver_rows([target([user("sort ba")], "x", "ab")], [], run)
    assert tokenizer.decode(row.prompt) == CONTEXTS["improver"]
    assert (tokenizer.decode(row.chosen), row.rejected) == ("ab<|end|>", [])
    assert tokenizer.decode(scored[0].prompt) == CONTEXTS[given]
    assert scored[0].chosen == row.chosen
    assert report["perplexities"] == [math.exp(1 / 3)]  # of "ab" and its EOS


def test_targets_that_do_not_fit_are_left_out() -> None:
    targets = [target([user("sort ba")], "x", "ab" * n) for n in (1, 20)]
    rows, report = improver_rows(targets, [], learner(max_length=30))
    assert (len(rows), report["too_long"]) == (1, 1)
    with pytest.raises(data.InputError, match="--max-length 12"):
        improver_rows(targets, [], learner(max_length=12))


def test_the_fence_is_tukeys_on_interpolated_quartiles() -> None:
    # sorted 1 2 3 4 10: Q1 = 2, Q3 = 4, fence 4 + 1.5 * 2
    assert perplexity_fence([3, 10, 1, 4, 2]) == 7
    assert perplexity_fence([3, 10, 1, 4, 2], k=0.5) == 5
    # 1 2 3 4: Q1 = 1.75, Q3 = 3.25
    assert perplexity_fence([4, 3, 2, 1], k=1.0) == pytest.approx(4.75)


def test_targets_beyond_the_fence_fall_and_the_report_counts_them() -> None:
    targets, values = [target([user("say")], "x", word) for word in "abcde"], [3, 10, 1, 4, 2]
    run = learner(fence_k=1.5)
    run.sums = lambda *_: [(-2 * math.log(x), 0.0) for x in values]  # a letter and its EOS
    rows, report = improver_rows(targets, [], run)
    assert [tokenizer.decode(row.chosen)[0] for row in rows] == ["a", "c", "d", "e"]
    assert (report["dropped"], report["targets"], report["too_long"]) == (1, 5, 0)
    found = [report[key] for key in ("q1", "median", "q3", "fence", "perplexities")]
    assert found == [pytest.approx(value) for value in (2, 3, 4, 7, values)]
    assert json.loads(json.dumps(report)) == report
    run.config.fence_k = 0
    rows, report = improver_rows(targets, [], run)
    assert (len(rows), report["dropped"], report["fence"]) == (5, 0, None)


def test_the_mix_has_the_share_of_plain_rows_that_was_asked_for() -> None:
    targets = [target([user("say")], "x", "ab")] * 30
    example = Example((user("x"),), "y", None, "here")
    asks = [(example, Pair([2], [i], [])) for i in range(100, 107)]
    asks.append((example, Pair([2], [], [])))  # has no gold
    for share in (0.0, 0.25, 0.5, 0.9):
        run = learner(improver_mix=share)
        mixed = improver_rows(targets, asks, run)[0]
        plain = mixed[30:]
        assert mixed[:30] == improver_rows(targets, asks[-1:], run)[0]
        assert len(plain) / len(mixed) == pytest.approx(share, abs=0.01)
        assert all(pair.prompt == [2] and pair.chosen for pair in plain)
        counts = [sum(pair.chosen == [i] for pair in plain) for i in range(100, 107)]
        assert max(counts) - min(counts) <= 1


def edits(text: str, right: str) -> int:
    codes = data.SequenceMatcher(None, text, right, autojunk=False).get_opcodes()
    return sum(code[0] != "equal" for code in codes)


def test_mending_leaves_right_answers_and_brings_wrong_ones_nearer() -> None:
    rng = random.Random(0)
    nearer = 0
    for example in data.task_examples("clean", 200, 3):
        prompt, right = example.messages[-1]["content"], example.response
        assert data.mend_answer(prompt, right, rng) == right
        for draft in (example.rejected or "", right[::-1], ""):
            mended = data.mend_answer(prompt, draft, rng)
            errors = [edits(text, right) for text in (draft, mended)]
            nearer += errors[1] < errors[0]
    assert nearer > 0.9 * 600


# ---------------------------------------------------------------------------------- phase 2's pairs


ODD = {"xy": "", "GH": "G", "IJ": "IJ!!!"}


def source(words: list[str], **flags: Any) -> SGPO:
    """Answers are the prompt's word, improvements the answer in capitals, but for ODD ones; rounds
    of three steps."""

    def say(prompt: list[int]) -> list[int]:
        text = asked(prompt)
        new = text.split(" | ")[1].upper() if " | " in text else text.split()[1]
        return [*tokenizer.encode(ODD.get(new, new)), 256]

    def ask(word: str) -> Ask:
        turns = (user(f"say {word}"),)
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        return Example(turns, word, None, "here"), Pair(prompt, [7], [])

    asked = lambda prompt: tokenizer.decode(prompt)[len("<|user|>") : -len("<|assistant|>")]  # noqa: E731
    usual = {"steps": 3, "rounds": 3, "improver_instruction": SHORT}
    sgpo = SGPO([ask(word) for word in words], Run(say, tokenizer, **usual | flags))
    sgpo.asked = lambda: [asked(prompt) for prompt in sgpo.run.prompts]
    return sgpo


def test_chosen_is_the_improvement_of_the_rejected_answer_behind_the_prompt_alone() -> None:
    sgpo = source(["ab", "cd"])
    for pair in sgpo.before_step(0):
        text = tokenizer.decode(pair.rejected)
        assert tokenizer.decode(pair.prompt) == f"<|user|>say {text[:2]}<|assistant|>"
        assert tokenizer.decode(pair.chosen) == text[:2].upper() + "<|end|>"
    assert sorted(sgpo.asked()[:2]) == ["say ab", "say cd"]
    assert sorted(sgpo.asked()[2:]) == ["say ab | ab", "say cd | cd"]
    assert set(sgpo.run.names) == {"policy"}
    assert sorted(row["chosen"] for row in sgpo.made) == ["AB", "CD"]


def test_each_round_generates_once_and_for_as_many_prompts_as_its_steps_need() -> None:
    sgpo = source([f"{a}{b}" for a in "abc" for b in "defgh"])
    old = list[Pair]()
    for t in range(6):
        assert len(sgpo.before_step(t)) == 2
        assert bool(sgpo.fresh) == bool(sgpo.made) == (t in (0, 3))
        assert sgpo.metrics["sgpo/round"] == t // 3
        assert sgpo.gone == (old if t == 3 else [])  # the round before, which cannot come again
        old = [*sgpo.pool.values()]
    assert len(sgpo.asked()) == 4 * 6  # three steps of two
    assert len(set(sgpo.run.seeds)) == 4 * 6
    assert set(sgpo.asked()[:6]) != set(sgpo.asked()[12:18])  # an order of its own


def dropped(sgpo: SGPO) -> dict[str, float]:
    """What became of the round's prompts."""
    found = {key.split("/")[1]: x for key, x in sgpo.metrics.items() if "improve/" in key}
    return {key: value for key, value in found.items() if value}


@pytest.mark.parametrize(
    ("words", "flags", "chosen", "counts"),
    [
        ("ab 12", {}, "AB", {"identical": 1 / 2}),
        ("ab 1", {"keep_identical": True, "gate": True}, "1", {"identical": 0.5, "unlikely": 0.5}),
        ("ab xy", {}, "AB", {"empty": 1 / 2}),
        ("ab " + "q" * 20, {"max_length": 40}, "AB", {"too_long": 1 / 2}),
        ("ab abcd cdef cd", {"max_new_tokens": 4}, "AB CD", {"cut": 1 / 2}),
        ("ab abcd cdef", {"max_new_tokens": 4, "keep_cut": True}, "AB ABCD CDEF", {"cut": 2 / 3}),
    ],
)
def test_flawed_pairs_are_counted_and_dropped_unless_they_are_to_be_kept(
    words: str, flags: Any, chosen: str, counts: dict[str, float]
) -> None:
    sgpo = source(words.split(), **flags)
    sgpo.before_step(0)
    pairs = sorted(tokenizer.response_text(pair.chosen) for pair in sgpo.pool.values())
    assert pairs == chosen.split()
    assert dropped(sgpo) == counts | {"pairs": len(pairs)}


def test_the_gate_asks_for_improvements_likelier_per_token() -> None:
    """ab's is likelier; cd's is not, nor ef's, which is as likely; gh's is in sum alone, as it is
    shorter, and ij's per token alone, as it is longer."""
    sgpo = source(["ab", "cd", "ef", "gh", "ij"], gate=True, batch_size=5)
    liked = {"AB": -3.0, "ab": -6.0, "CD": -9.0, "cd": -6.0, "EF": -6.0, "ef": -6.0}
    liked |= {"G": -5.0, "gh": -6.0, "IJ!!!": -6.5, "ij": -6.0}
    text = tokenizer.response_text
    sgpo.run.sums = lambda _, pairs: [(liked[text(x[1])], liked[text(x[2])]) for x in pairs]
    assert {text(pair.chosen) for pair in sgpo.before_step(0)} == {"AB", "IJ!!!"}
    assert dropped(sgpo) == {"pairs": 2, "unlikely": 0.6}


def test_no_pair_left_is_a_step_without_pairs() -> None:
    sgpo = source(["12", "34"], gate=True)
    assert [sgpo.before_step(t) for t in range(2)] == [[], []]
    assert len(sgpo.asked()) == 4


def test_a_restored_source_goes_on_without_generating_again() -> None:
    one, other = (source(["ab", "cd", "ef"]) for _ in range(2))
    one.before_step(0)
    other.load_state_dict(one.state_dict())
    for t in (1, 2):
        assert one.before_step(t) == other.before_step(t)
    assert other.asked() == []
    assert one.before_step(3) == other.before_step(3)


# --------------------------------------------------------------------------------------- whole runs


def flags(out: Path, *more: object) -> list[str]:
    usual = ["--method", "sgpo", "--model", GOLDEN / "start", "--data", GOLDEN / "rows.jsonl"]
    usual += ["--out", out, "--steps", 3, "--rounds", 2, "--batch-size", 6, "--max-length", 64]
    usual += ["--log-every", 1, "--max-new-tokens", 20, "--improver-epochs", 1, "--save-every", 2]
    usual += ["--improver-instruction", SHORT, "--lr", "3e-5", "--improver-lr", "1e-4"]
    usual += ["--temperature", 1, "--top-k", 0, "--top-p", 1]
    return [str(flag) for flag in (*usual, *more)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with gold targets: eight steps or so, then two rounds of three."""
    out = tmp_path_factory.mktemp("sgpo") / "whole"
    assert train.main(flags(out)) == 0
    return out


def test_steps_rise_through_both_phases_and_both_are_there(whole: Path) -> None:
    rows = metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    first = [row for row in rows if row["phase"] == "improver"]
    second = rows[len(first) :]
    assert [row["sgpo/round"] for row in second] == [0, 0, 0, 1, 1, 1]
    assert second[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert ["improve/pairs" in row for row in second] == [True, False, False] * 2
    for name in ("improver", "final"):
        assert transformers.AutoModelForCausalLM.from_pretrained(whole / name)
        said = json.loads((whole / name / sample.IMPROVER_FILE).read_text())
        assert said == {"instruction": SHORT}
    report = json.loads((whole / "improver_filter.json").read_text())
    assert report["steps"] == len(first)
    assert report["targets"] == 24
    assert report["dropped"] == sum(x > report["fence"] for x in report["perplexities"])
    learnt = (24 - report["dropped"]) * 2  # half of them plain
    assert report["steps"] == math.ceil(learnt / 6)


def test_targets_and_pairs_are_readable_files(whole: Path) -> None:
    targets, rows = read(whole / "improver_targets.jsonl"), read(GOLDEN / "rows.jsonl")
    for i, (target, row) in enumerate(zip(targets, rows, strict=True)):
        told = (target["index"], target["prompt"], target["improved"])
        assert told == (i, row["prompt"], row["chosen"])
        assert isinstance(target["response"], str)
    pairs = read(whole / "pairs.jsonl")
    assert {pair["round"] for pair in pairs} == {0, 1}
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    assert data.load_examples(whole / "pairs.jsonl", True)  # --method dpo --data takes them


@pytest.mark.parametrize("last", [("SFT", 1), ("SFT", 3), ("SGPO", 0), ("SGPO", 1), ("SGPO", 4)])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    last: tuple[str, int], whole: Path, tmp_path: Path
) -> None:
    """Killed in phase 1, between the phases, in a round, and at the beginning of the second."""
    out = tmp_path / "run"
    cut(flags(out), lambda source, t: (type(source).__name__, t) == last)
    assert train.main(flags(out, "--resume")) == 0
    same(out, whole)
    a, b = weights(out, "improver"), weights(whole, "improver")
    assert all(torch.equal(a[key], b[key]) for key in b)
    for name in ("pairs.jsonl", "improver_targets.jsonl", "improver_filter.json"):
        assert (out / name).read_text() == (whole / name).read_text()


def test_two_ranks_give_the_run_of_one(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = torchrun(2, flags(out))
    assert done.returncode == 0, done.stderr[:6000]
    alike(out, whole, ())
    for name in ("pairs.jsonl", "improver_targets.jsonl"):
        assert (out / name).read_text() == (whole / name).read_text()
    for name in ("improver", "final"):  # where a gradient is all but nothing, RMSprop's first steps
        a, b = weights(out, name), weights(whole, name)  # make 10 lr of whatever sign it has
        far = sum(int(((a[key] - b[key]).abs() > 2e-4).sum()) for key in b)
        assert far < 0.001 * sum(value.numel() for value in b.values())


def test_a_given_improver_skips_the_first_phase(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train.main(flags(out, "--improver", whole / "improver")) == 0
    first, second = metrics(out), metrics(whole)
    steps = len(second) - 6
    assert [row["step"] for row in first] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(first, second[steps:], strict=True):
        assert mine | {"step": 0} == theirs | {"step": 0}
    assert not (out / "improver").exists()


def test_a_round_without_pairs_changes_nothing_and_is_told(whole: Path, tmp_path: Path) -> None:
    """Improvements of one token are all cut at their budget."""
    more = ("--improver", whole / "improver", "--max-new-tokens", 1, "--log-every", 9)
    assert train.main(flags(tmp_path / "run", *more)) == 0
    told = {row["step"]: row for row in metrics(tmp_path / "run")}
    assert [told[step]["improve/cut"] for step in (1, 4)] == [1, 1]
    assert all(row["pairs"] == row["grad_norm"] == 0 for row in told.values())
    a, b = weights(tmp_path / "run"), weights(whole, "improver")
    assert all(torch.equal(a[key], b[key]) for key in b)


def test_targets_from_a_file_and_prompts_without_responses(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    rows = [{"prompt": "sort dcba"}, {"messages": [user("reverse abc")]},
            {"prompt": "add 12 34", "response": "2+4=6-1+3=4 > 46"}]  # fmt: skip
    prompts = write(tmp_path / "prompts.jsonl", rows)
    source = ("--target-source", whole / "improver_targets.jsonl", "--preference-data", prompts)
    assert train.main(flags(out, *source, "--loss", "orpo")) == 0
    one, other = weights(out, "improver"), weights(whole, "improver")
    assert all(torch.equal(one[key], other[key]) for key in other)
    asked = {row["prompt"] for row in read(out / "pairs.jsonl")}
    assert asked <= {"sort dcba", "reverse abc", "add 12 34"}


def test_improvements_are_shown_and_written(whole: Path, tmp_path: Path, capsys: Any) -> None:
    model = ["--model", str(whole / "final"), "--max-new-tokens", "20", "--improve", "2"]
    assert sample.main([*model, "--prompt", "sort cab"]) == 0
    assert capsys.readouterr().out.count("-" * 20) == 2
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text('{"prompt": "sort cab"}\n{"prompt": "reverse ab"}\n')
    assert sample.main([*model, "--prompts", str(questions), "--out", str(answers)]) == 0
    for line in map(json.loads, answers.read_text().splitlines()):
        assert len(line["drafts"]) == 2
        assert isinstance(line["response"], str)


BAD_FLAGS = """--target-source http://localhost:1/v1: --target-model; --target-source tasks;
--target-source nowhere.jsonl: nowhere.jsonl; --preference-data nowhere.jsonl: nowhere.jsonl;
--fence-k -1; --fence-given luck; --rounds 0; --improver nowhere: nowhere; --improver-mix 1;
--improver-instruction improve{prompt}: {answer}; --improver-instruction {prompt}{answer}LONG"""


@pytest.mark.parametrize("case", re.split(r";\s", BAD_FLAGS))  # after a colon what is named
def test_bad_flags_give_one_line_and_leave_nothing(case: str, tmp_path: Path, capsys: Any) -> None:
    wrong, _, named = case.replace("LONG", "x" * 60).partition(": ")
    assert train.main(flags(tmp_path / "run", *wrong.split())) == 2
    (shown,) = re.findall("^error: .*$", capsys.readouterr().err, re.MULTILINE)
    assert (named or wrong.split()[0]) in shown
    assert not (tmp_path / "run").exists()


def test_a_bad_file_of_targets_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "targets.jsonl"
    good = {"prompt": "a", "response": "b", "improved": "c"}
    found = data.load_targets(write(file, [good, good | {"improved": None}]))
    assert found == [Example((user("a"),), "c", "b", f"{file}:1")]
    for bad in ({"prompt": "a"}, good | {"improved": " "}, good | {"response": 3}, [], {"x": 1}):
        with pytest.raises(data.InputError, match=r"targets.jsonl:2"):
            data.load_targets(write(file, [good, bad]))
    with pytest.raises(data.InputError, match="no targets"):
        data.load_targets(write(file, [good | {"improved": None}]))


def test_what_a_killed_run_paid_for_is_kept(whole: Path, tmp_path: Path) -> None:
    """The file of targets, with its last line cut off, is gone on from."""
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(whole / "args.json", out)
    lines = (whole / "improver_targets.jsonl").read_text().splitlines(keepends=True)
    marked = json.loads(lines[2]) | {"improved": "c-b-a > abc"}
    kept = [*lines[:2], json.dumps(marked) + "\n", lines[5], lines[7][:20]]
    (out / "improver_targets.jsonl").write_text("".join(kept))
    assert train.main(flags(out)) == 2  # it is somebody's
    assert train.main(flags(out, "--resume")) == 0
    again = (out / "improver_targets.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(again[2]) == marked
    assert again[:2] + again[3:] == lines[:2] + lines[3:]


def test_the_built_in_tasks_mend_by_the_draft_and_are_checked(tmp_path: Path, capsys: Any) -> None:
    """The mender draws at random, but not by how many drafts are left when a run goes on."""
    out, whole, file = tmp_path / "cut", tmp_path / "whole", "improver_targets.jsonl"
    usual = ["--method", "sgpo", "--model", GOLDEN / "start", "--steps", 1, "--batch-size", 32]
    usual += ["--improver-epochs", 0.1, "--responses-per-prompt", 1]
    run = lambda out, *more: train.main([str(x) for x in (*usual, "--out", out, *more)])  # noqa: E731
    assert run(whole) == 0
    assert any(row["improved"] != row["response"] for row in read(whole / file))
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in ("start", "sft control", "improver", "sgpo"))
    out.mkdir()
    shutil.copy(whole / "args.json", out)
    lines = (whole / file).read_bytes().splitlines(keepends=True)
    (out / file).write_bytes(b"".join(lines[:50]) + lines[50][:9])
    assert run(out, "--resume") == 0
    assert (out / file).read_bytes() == b"".join(lines)


def test_text_with_line_separators_and_cut_characters_survives_a_resume(tmp_path: Path) -> None:
    odd = {"prompt": "sort b\u2028a{} \u00e9 \ud83d", "response": "a\u2029b \u20ac"}
    rows = [odd | {"prompt": odd["prompt"].format(i)} for i in range(8)]
    file, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "run"
    more = ("--data", file, "--rounds", 2, "--improver-epochs", 0.1, "--save-every", 1)
    assert train.main(flags(tmp_path / "whole", *more)) == 0
    cut(flags(out, *more), lambda _, t: t == 5)
    for name in ("pairs.jsonl", "improver_targets.jsonl"):
        with (out / name).open("ab") as opened:  # as if killed within a character
            opened.write('{"round": 1, "prompt": "\u20ac'.encode()[:-1])
    assert train.main(flags(out, *more, "--resume")) == 0
    assert (out / "pairs.jsonl").read_bytes() == (tmp_path / "whole" / "pairs.jsonl").read_bytes()
    assert metrics(out) == metrics(tmp_path / "whole")


def test_an_improver_takes_prompts_alone_and_its_own_instruction(
    whole: Path, tmp_path: Path, capsys: Any
) -> None:
    """No rows with responses are needed, and nothing of the built-in tasks is done."""
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"sort cb{x}"} for x in "adefgh"])
    usual = ["--method", "sgpo", "--improver", whole / "improver", "--max-length", 64]
    usual += ["--max-new-tokens", 16, "--steps", 1, "--batch-size", 4, "--log-every", 1]
    for key in ("--preference-data", "--data"):
        out = tmp_path / key.strip("-")
        assert train.main([str(x) for x in (*usual, "--out", out, key, prompts)]) == 0
        args = json.loads((out / "args.json").read_text())
        assert (args["improver_instruction"], args["recipe"], args["lr"]) == (SHORT, None, [5e-7])
        assert not (out / "control").exists()
        assert "held-out accuracy" not in capsys.readouterr().out
        assert "improve/pairs" in metrics(out)[0]


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_rows_that_could_not_be_used_later_are_named_at_once(
    role: str, tmp_path: Path, capsys: Any
) -> None:
    turns = [user("a"), {"role": role, "content": "b"}, {"role": "assistant", "content": "c"}]
    rows = [{"prompt": "sort ba", "response": "ab"}, {"messages": turns}]
    file = write(tmp_path / "rows.jsonl", rows)
    assert train.main(flags(tmp_path / "run", "--data", file)) == 2
    shown = capsys.readouterr().err
    assert "rows.jsonl:2" in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_flags_that_an_improver_or_a_file_leaves_idle_are_warned_of(whole: Path, capsys) -> None:
    train.parse_args(flags(Path("x"), "--improver", whole / "improver", "--fence-k", 2))
    shown = capsys.readouterr().err
    assert "--fence-k" in shown
    assert "--model" in shown
    train.parse_args(["--method", "sgpo", "--target-source", "gold", "--target-workers", "2"])
    assert "--target-workers" in capsys.readouterr().err


def test_more_steps_on_resume_stretch_the_rounds_that_have_not_begun(tmp_path: Path) -> None:
    """Two rounds of three, killed in the second; with --steps 5 that round takes four more."""
    out = tmp_path / "run"
    cut(flags(out, "--save-every", 1), lambda source, t: isinstance(source, SGPO) and t == 5)
    more = ("--save-every", 1, "--resume", "--steps", 5)
    cut(flags(out, *more), lambda _, t: t == 7)  # and what was stretched stays so
    assert train.main(flags(out, *more)) == 0
    rounds = [row["sgpo/round"] for row in metrics(out) if row["phase"] == "sgpo"]
    assert rounds == [0] * 3 + [1] * 7
