"""The checker, the rule of selection and the paired errors of tests/bench/commongen.py."""

import math
import types
from typing import Any

import pytest
from helpers import GOLDEN, script

import data

commongen = script("commongen")


@pytest.mark.parametrize(
    ("words", "text", "used"),
    [
        ("field look stand", "She stands in a Field, looking up.", [1, 1, 1]),
        ("leaf fly", "Leaves flew.", [1, 1]), ("leaf fly", "The leafy butterfly.", [0, 0]),
        ("christma pajama texte", "Texting in pajamas at Christmas", [1, 1, 1]),
        ("giraffes zoo", "a giraffe", [1, 0]), ("café", "two cafés.", [1]), ("cat dog", "", [0, 0]),
    ],
)  # fmt: skip
def test_a_word_is_used_in_any_inflected_form(words: str, text: str, used: list[int]) -> None:
    assert commongen.check(words.split(), text) == used
    prompt = f"user\n{commongen.ASKED}{', '.join(words.split())}.<|im_end|>\nassistant\n"
    assert commongen.check_prompt(prompt, text) == all(used)


def test_a_mere_list_has_the_words_and_nothing_else() -> None:
    texts = ["Dog, running, and the park.", "A dog runs in the park.", "A dog.", ""]
    marks = [commongen.mere_list(["dog", "run", "park"], text) for text in texts]
    assert marks == [True, False, False, False]


def test_rejected_sides_are_what_their_name_says() -> None:
    row = {"words": [["cat", "N"], ["sit", "V"]], "references": ["A cat sat.", "Cats sit."]}
    own = ["The cat sits.", "It sits.", "A cat.", "Cats are sitting."]
    rows = commongen.training_rows(row, "base", "greedy", own)
    assert rows["placebo"] == [{"chosen": "A cat sat.", "rejected": "Cats sit."}]
    assert rows["oracle"] == [{"chosen": "A cat sat.", "rejected": "It sits."}]
    assert rows["checked"] == [{"response": own[0], "improved": own[3]}]
    assert not commongen.training_rows(row, "", "", own[:1])["oracle"]


def test_checked_pairs_are_those_whose_rejected_side_lacks_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = data.load_tokenizer(GOLDEN / "start")
    prompt = commongen.prompt_of(tokenizer, {"words": [["cat", "N"], ["sit", "V"]]})
    sides = [[*tokenizer.encode(x), tokenizer.eos_ids[0]] for x in ("Cats sat.", "Cats run.")]
    pairs = [data.Pair(prompt, sides[0], side) for side in sides]
    monkeypatch.setattr(commongen.sapo.SAPO, "spoil", lambda *_: pairs)
    source = object.__new__(commongen.Checked)
    source.run = types.SimpleNamespace(tokenizer=tokenizer)
    assert source.spoil([]) == pairs[1:]


def test_the_estimate_counts_each_step_that_is_to_be_made() -> None:
    flags = "--train a --dev b --rows 160 --steps 10 --rates 2 --seeds 1 --parts 2 --arms spin"
    args = commongen.parse(flags.split())
    steps = 3 * (2 * 10 * 6 + 10 * (6 + 14))  # 2 epochs of 10 steps, SFT continued, SPIN
    assert commongen.estimate(args) == pytest.approx(steps / 3600)


def told(greedy: float, warm: float, **more: float) -> dict[str, Any]:
    values = {"complete": greedy, "chrf": 40.0, "length": 100.0, "list": 0.0} | more
    at = {f"{name}/0": value for name, value in values.items()}
    return {k: [x] * 2 for k, x in (at | {"complete/0.3": warm, "complete/0.7": 10}).items()}


def test_a_rate_is_chosen_by_complete_answers_among_those_that_keep_to_the_guards() -> None:
    start = told(60, 50)
    assert commongen.best_temperature(start) == 0.3 and commongen.score(start) == 55
    assert commongen.score(told(70, 60, chrf=39.0), start) == 65
    for bad in ({"chrf": 38.9}, {"length": 121.0}, {"length": 79.0}, {"list": 3.0}):
        assert commongen.score(told(90, 90, **bad), start) == -10


def test_paired_errors_over_sets_and_over_seeds_are_those_worked_by_hand() -> None:
    # by set, over seeds: 2, 4, 3; by seed: 2, 4
    ours, theirs = [[11.0, 23.0, 32.0], [13.0, 25.0, 34.0]], [[10.0, 20.0, 30.0]] * 2
    mean, over_sets, over_seeds = commongen.differences(ours, theirs)
    assert (mean, over_seeds) == (3, 1) and over_sets == pytest.approx(math.sqrt(1 / 3))
    assert [commongen.counts(3, 1.4, x) for x in (math.nan, 1.4, 1.6)] == [True, True, False]
