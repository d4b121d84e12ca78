"""tests/bench/drafts.py: counts worked by hand, and that the script runs."""

from typing import Any

import pytest
from helpers import GOLDEN, script

from model import Transformer


def test_tokens_a_step_are_those_worked_by_hand() -> None:
    drafts = script("drafts")
    model, how = Transformer.from_pretrained(GOLDEN / "start"), {"temperature": 9.0}
    plain = drafts.Case("", model, [([65, 66], 9, 0, [])], 8, **how)
    plain.run("plain")
    (new,) = plain.new
    assert len({*new}) == 9 and plain.seen("plain") == (1, 0)
    # A row of right guesses: 8 tokens in a step. One whose fifth token is another: 4 in a step, the
    # next, which follows what is not in the draft, in a plain one, then 3.
    for draft, seen in ((new, (8, 1)), ([*new[:4], 259, *new[5:]], (8 / 3, 2 / 3))):
        case = drafts.Case("", model, [([65, 66], 9, 0, draft)], 8, **how)
        case.run("plain")
        case.run("forced")
        assert case.seen("forced") == pytest.approx(seen)


def test_drafts_prints_its_table(capsys: Any) -> None:
    script("drafts").main(["--reps", "1"])
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert len(table) == 6 and "| SAPO, tasks, greedy | 64 by 64 |" in table[3]
