"""SPIN: iterations with a frozen opponent, whose whole responses are the rejected side."""

from pathlib import Path
from typing import Any

import pytest
from fakes import EOS, Run
from helpers import GOLDEN, alike, cut, metrics, torchrun
from safetensors.torch import load_file

import train
from data import Pair
from sapo import RECIPES, SPIN


def source(bounds: list[int], **flags: Any) -> SPIN:
    """A source whose opponent answers with its weight."""
    rows = [Pair([1, i], [10 + i, EOS], []) for i in range(4)]
    spin = SPIN(rows, Run(lambda _: [held(spin, "reference"), EOS], batch_size=4, **flags))
    spin.bounds = bounds
    return spin


def held(spin: SPIN, name: str) -> int:
    """The weight of a model."""
    return int(spin.run.models[name].weight.item())


def test_iterations_pass_equally_often_over_their_pairs() -> None:
    schedule = lambda **flags: SPIN.schedule(30, train.Config(**flags))  # noqa: E731
    assert schedule(steps=70, rounds=4) == [0, 10, 30, 50, 70]  # pools of 1, 2, 2 and 2 pairs a row
    assert schedule(steps=9, rounds=1) == [0, 9]
    assert schedule(steps=6, rounds=2) == [0, 2, 6]
    assert schedule(steps=2, rounds=4) == [0, 1, 2]  # too few steps: fewer iterations
    assert schedule(steps=4, rounds=4) == [0, 1, 2, 3, 4]
    assert schedule(epochs=2.0, rounds=4, batch_size=6)[:2] == [0, 10]  # two passes of 30 rows


def test_the_opponent_is_frozen_for_an_iteration_and_each_row_answered_once_in_it() -> None:
    spin, opponents = source([0, 2, 6, 10]), []
    for t in range(10):
        assert len(spin.before_step(t)) == 4
        opponents.append(held(spin, "reference"))
        assert spin.reference_version == (t >= 2) + (t >= 6)
        spin.run.train()
    assert opponents == [1, 1, 3, 3, 3, 3, 7, 7, 7, 7]
    assert sorted(prompt[1] for prompt in spin.run.prompts) == sorted([0, 1, 2, 3] * 3)
    assert set(spin.run.names) == {"reference"}
    assert len(set(spin.run.seeds)) == 12
    assert spin.metrics["spin/iteration"] == 2


def test_the_pool_is_this_and_the_previous_iterations_pairs() -> None:
    spin, seen = source([0, 2, 4, 6]), []
    for t in range(6):
        batch = spin.before_step(t)
        seen.append([(pair.rejected[0], pair.prompt[1]) for pair in batch])
        spin.run.train()
    both = lambda a, b: sorted((w, i) for w in (a, b) for i in range(4))  # noqa: E731
    assert sorted(seen[0]) == sorted(seen[1]) == [(1, i) for i in range(4)]
    assert sorted(seen[2] + seen[3]) == both(1, 3)  # two steps of four: the pool of eight once
    assert sorted(seen[4] + seen[5]) == both(3, 5)


@pytest.mark.parametrize("gold", [[10, EOS], [10]])  # the end of the gold response plays no part
@pytest.mark.parametrize(("most", "budget"), [(256, 18), (7, 7), (1, 1)])
def test_a_response_fits_into_the_length_that_is_left_and_cut_ones_are_counted(
    most: int, budget: int, gold: list[int]
) -> None:
    spin = source([0, 2], max_length=20, max_new_tokens=most)
    spin.rows = [row._replace(chosen=gold) for row in spin.rows]
    spin.before_step(0)
    assert spin.run.budgets == [budget] * 4
    assert spin.metrics["segment/unended"] == (budget < 2)  # an answer has an EOS behind its token
    assert spin.metrics["segment/ended"] == (budget >= 2)
    spin.before_step(1)  # all are answered
    assert "segment/unended" not in spin.metrics


def test_a_restored_source_goes_on_as_the_lost_one_would_have() -> None:
    one, other = source([0, 2, 4, 6]), source([0, 2, 4, 6])
    for t in range(3):
        one.before_step(t)
        one.run.train()
    other.load_state_dict(one.state_dict())
    for name in ("policy", "reference"):
        other.run.models[name].weight.data = one.run.models[name].weight.data.clone()
    for t in range(3, 6):
        assert one.before_step(t) == other.before_step(t)
        assert (one.picked, one.fresh) == (other.picked, other.fresh)


def test_evaluation_asks_the_opponent() -> None:
    bare = Pair([1, 8], [2, EOS], [])
    (pair,) = source([0, 1]).spoil([bare])
    assert pair[:3] == (*bare[:2], [1, EOS])


def test_the_recipe_is_the_authors_scripts() -> None:
    found = RECIPES["spin-mistral-7b"]
    assert found["lr"] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert found["beta"] == [0.1, 0.1, 0.1, 5.0]
    assert (found["epochs"], found["rounds"]) == (6, 4)
    assert {RECIPES[f"sft-{name}"]["batch_size"] for name in ("llama3-8b", "mistral-7b")} == {128}


def flags(out: Path, *more: object) -> list[str]:
    usual = ["--method", "spin", "--model", GOLDEN / "start", "--data", GOLDEN / "rows.jsonl"]
    usual += ["--out", out, "--steps", 7, "--batch-size", 6, "--max-length", 64, "--lr", "2e-4"]
    usual += ["--log-every", 1, "--max-new-tokens", 16, "--rounds", 2, "--save-every", 1]
    return [str(flag) for flag in (*usual, *more)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run: iterations of two and five steps."""
    out = tmp_path_factory.mktemp("spin") / "whole"
    assert train.main(flags(out)) == 0
    return out


def test_each_iteration_begins_with_the_loss_ln_2_and_a_schedule_of_its_own(whole: Path) -> None:
    rows = metrics(whole)
    assert [row["spin/iteration"] for row in rows] == [0, 0, 1, 1, 1, 1, 1]
    for start in (0, 2):
        assert rows[start]["loss"] == pytest.approx(0.6931472, abs=1e-6)
        assert rows[start]["rewards/margins"] == 0
    assert min(abs(row["loss"] - 0.6931472) for row in (*rows[1:2], *rows[3:])) > 1e-4
    lrs = [row["lr"] / 2e-4 for row in rows]  # a warm-up of 0.1 rounds to no step in either
    assert lrs == pytest.approx([1, 0.5, 1, 0.8, 0.6, 0.4, 0.2])


def test_at_the_first_step_the_policy_is_the_writer_of_its_pairs(whole: Path) -> None:
    rows = metrics(whole)
    assert rows[0]["segment/kl"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["segment/kl"] > 1e-3
    assert rows[0]["segment/new_logps"] < rows[0]["segment/logps"]


def test_two_ranks_give_the_run_of_one(whole: Path, tmp_path: Path) -> None:
    done = torchrun(2, flags(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[:6000]
    alike(tmp_path / "run", whole)


def test_learning_rates_and_betas_are_those_of_the_round_the_last_for_all_that_remain(
    tmp_path: Path,
) -> None:
    trace = tmp_path / "trace.safetensors"
    more = ["--lr", "2e-4", "1e-4", "--beta", 0.1, 5.0, "--rounds", 3, "--steps", 5]
    assert train.main(flags(tmp_path / "run", *more, "--trace", trace)) == 0
    values = load_file(trace)
    assert values["step/beta"].tolist() == [0.1, 5, 5, 5, 5]  # rounds begin at 0, 1 and 3
    assert values["step/lr"].tolist() == pytest.approx([2e-4, 1e-4, 5e-5, 1e-4, 5e-5])


def test_orpo_needs_no_reference_but_the_opponent_all_the_same(tmp_path: Path) -> None:
    assert train.main(flags(tmp_path / "run", "--loss", "orpo", "--steps", 3)) == 0
    rows = metrics(tmp_path / "run")
    assert all("tokens/reference" not in row and row["tokens/generate"] > 0 for row in rows[:2])


def test_more_steps_on_resume_leave_begun_iterations_where_they_were(tmp_path: Path) -> None:
    """Iterations of two and five steps, killed in the second at six; --steps 12 prolongs it."""
    out = tmp_path / "run"
    cut(flags(out, "--rounds", 3), lambda _, t: t == 6)
    assert train.main(flags(out, "--rounds", 3, "--resume", "--steps", 12)) == 0
    rows = metrics(out)
    assert [row["spin/iteration"] for row in rows] == [0] + [1] * 3 + [2] * 8
    assert rows[4]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert all(abs(row["loss"] - 0.6931472) > 1e-6 for row in rows[5:])
