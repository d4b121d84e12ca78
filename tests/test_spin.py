"""SPIN: iterations with a frozen opponent, whose whole responses are the rejected side."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GOLDEN, alike, cut, metrics, same, torchrun
from safetensors.torch import load_file

import train
from data import Pair
from sapo import SPIN, Settings, spin_starts

EOS = 9


def weights(value: float) -> torch.nn.Linear:
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data = torch.tensor([[float(value)]])
    return layer


class Opponent:
    """Stands for generation: answers with its weight, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.seeds: list[int] = []
        self.budgets: list[int] = []

    def __call__(self, model: Any, prompts: Any, budgets: Any, seeds: Any) -> Any:
        value = int(model.weight.item())
        self.asked += [(value, prompt[1]) for prompt in prompts]
        self.seeds += seeds
        self.budgets += budgets
        return [[value, EOS] for _ in prompts], [-1.0] * len(prompts)


def source(opponent: Opponent, starts: list[int], **flags: Any) -> SPIN:
    rows = [Pair([1, i], [10 + i, EOS], []) for i in range(4)]
    settings = {"batch_size": 4, "seed": 0, "max_length": 64} | flags
    return SPIN(rows, weights(0), weights(0), opponent, Settings(**settings), starts)


def test_iterations_pass_equally_often_over_their_pairs() -> None:
    assert spin_starts(70, 4) == [0, 10, 30, 50]  # pools of 1, 2, 2 and 2 pairs a row
    assert spin_starts(9, 1) == [0]
    assert spin_starts(6, 2) == [0, 2]
    assert spin_starts(2, 4) == [0, 1]  # too few steps: fewer iterations
    assert spin_starts(4, 4) == [0, 1, 2, 3]


def test_the_opponent_is_frozen_for_an_iteration_and_each_row_answered_once_in_it() -> None:
    opponent = Opponent()
    spin = source(opponent, [0, 2, 6])
    held = []
    for t in range(10):
        batch = spin.before_step(t)
        assert len(batch) == 4
        held.append(spin.opponent.weight.item())
        spin.policy.weight.data += 1
    assert held == [0, 0, 2, 2, 2, 2, 6, 6, 6, 6]
    for value in (0, 2, 6):
        asked = [row for model, row in opponent.asked if model == value]
        assert sorted(asked) == [0, 1, 2, 3]
    assert len(set(opponent.seeds)) == 12
    assert spin.metrics["spin/iteration"] == 2


def test_the_pool_is_this_and_the_previous_iterations_pairs() -> None:
    spin = source(Opponent(), [0, 2, 4])
    seen = []
    for t in range(6):
        batch = spin.before_step(t)
        seen.append([(pair.rejected[0], pair.prompt[1]) for pair in batch])
        spin.policy.weight.data += 1
    both = lambda a, b: sorted((w, i) for w in (a, b) for i in range(4))  # noqa: E731
    assert sorted(seen[0]) == sorted(seen[1]) == [(0, i) for i in range(4)]
    assert sorted(seen[2] + seen[3]) == both(0, 2)  # two steps of four: the pool of eight once
    assert sorted(seen[4] + seen[5]) == both(2, 4)


def test_a_response_fits_into_the_length_that_is_left() -> None:
    opponent = Opponent()
    source(opponent, [0], max_length=20).before_step(0)
    assert opponent.budgets == [18] * 4
    opponent = Opponent()
    source(opponent, [0], max_length=20, max_new_tokens=7).before_step(0)
    assert opponent.budgets == [7] * 4


def test_a_restored_source_goes_on_as_the_lost_one_would_have() -> None:
    one, other = source(Opponent(), [0, 2, 4]), source(Opponent(), [0, 2, 4])
    for t in range(3):
        one.before_step(t)
        one.policy.weight.data += 1
    other.load_state_dict(one.state_dict())
    other.opponent.weight.data = one.opponent.weight.data.clone()
    other.policy.weight.data = one.policy.weight.data.clone()
    for t in range(3, 6):
        assert one.before_step(t) == other.before_step(t)
        assert one.picked == other.picked
        assert [p.bounds for p in one.fresh] == [p.bounds for p in other.fresh]


def test_evaluation_asks_the_opponent_where_there_is_no_rejected_side() -> None:
    spin = source(Opponent(), [0])
    given, bare = Pair([1, 7], [2, EOS], [3]), Pair([1, 8], [2, EOS], [])
    assert spin.eval_pairs([given, bare]) == [given, bare._replace(rejected=[0, EOS])]


def flags(out: Path, *more: object) -> list[str]:
    usual = ["--method", "spin", "--model", GOLDEN / "start", "--data", GOLDEN / "rows.jsonl"]
    usual += ["--out", out, "--steps", 7, "--batch-size", 6, "--max-length", 64, "--lr", "2e-4"]
    usual += ["--log-every", 1, "--max-new-tokens", 16, "--iterations", 2, "--save-every", 1]
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


@pytest.mark.parametrize("last", [1, 2, 5])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    last: int, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    cut(flags(out), lambda _, t: t == last)  # killed behind the checkpoint of step `last`
    assert train.main(flags(out, "--resume")) == 0
    same(out, whole)


def test_two_ranks_give_the_run_of_one(whole: Path, tmp_path: Path) -> None:
    done = torchrun(2, flags(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[:6000]
    alike(tmp_path / "run", whole)


def test_learning_rates_and_betas_by_iteration(tmp_path: Path) -> None:
    trace = tmp_path / "trace.safetensors"
    rates = ("--iteration-lr", "2e-4", "1e-4", "--iteration-beta", 0.1, 5.0, "--iterations", 3)
    assert train.main(flags(tmp_path / "run", *rates, "--steps", 5, "--trace", trace)) == 0
    values = load_file(trace)
    assert values["step/beta"].tolist() == [0.1, 5, 5, 5, 5]  # iterations begin at 0, 1 and 3
    assert values["step/lr"].tolist() == pytest.approx([2e-4, 1e-4, 5e-5, 1e-4, 5e-5])


def test_orpo_needs_no_reference_but_the_opponent_all_the_same(tmp_path: Path) -> None:
    assert train.main(flags(tmp_path / "run", "--loss", "orpo", "--steps", 3)) == 0
    rows = metrics(tmp_path / "run")
    assert all("tokens/reference" not in row and row["tokens/generate"] > 0 for row in rows[:2])


def test_the_iterations_rates_are_not_the_controls_nor_another_methods(tmp_path: Path) -> None:
    trace = tmp_path / "trace.safetensors"
    usual = [x for x in flags(tmp_path / "run") if x != "spin"]
    usual[usual.index("--method") + 1 : usual.index("--method") + 1] = ["dpo"]
    more = ["--iteration-lr", "1e-9", "--iteration-beta", "7", "--trace", str(trace)]
    assert train.main([*usual, *more]) == 0
    assert load_file(trace)["step/lr"][0] == 2e-4
    assert load_file(trace)["step/beta"][0] == 0.1


def test_more_steps_on_resume_leave_begun_iterations_where_they_were(tmp_path: Path) -> None:
    """Iterations of two and five steps, killed in the second at six; --steps 12 prolongs it."""
    out = tmp_path / "run"
    cut(flags(out, "--iterations", 3), lambda _, t: t == 6)
    assert train.main(flags(out, "--iterations", 3, "--resume", "--steps", 12)) == 0
    rows = metrics(out)
    assert [row["spin/iteration"] for row in rows] == [0] + [1] * 3 + [2] * 8
    assert rows[4]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert all(abs(row["loss"] - 0.6931472) > 1e-6 for row in rows[5:])
