"""sapo.py: the official code's rules as PAPERS states them, by hand and by count."""

import math
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from data import Pair
from sample import paint
from sapo import (
    SAPO,
    Drift,
    ReplayBuffer,
    SegmentPair,
    Settings,
    Static,
    batch_indices,
    choose_segment,
    copy_weights,
    dpo_loss,
    ema_update,
    orpo_loss,
    pair_loss,
    segment_logprobs,
    segment_metrics,
    splice,
)

EOS = 9


def starts(length: int, segment: int, space: int, rule: str, draws: int = 6000) -> Counter[int]:
    rng = random.Random(0)
    spans = [choose_segment(length, segment, space, rng, rule) for _ in range(draws)]
    assert all(stop - start == min(segment, length) for start, stop in spans)
    return Counter(start for start, _ in spans)


@pytest.mark.parametrize(
    ("length", "segment", "space", "rule", "last"),
    [
        (20, 8, 100, "official", 9),  # 20 - 3 - 8
        (20, 8, 4, "official", 4),  # --max-length leaves less
        (11, 8, 100, "official", 0),  # 11 - 3 - 8 = 0: from the beginning
        (5, 8, 100, "official", 0),  # shorter than the segment: whole
        (20, 8, 100, "uniform", 12),
        (20, 8, -3, "official", 0),
        (9, 8, 100, "uniform", 1),
    ],
)
def test_starts_are_uniform_up_to_the_latest(
    length: int, segment: int, space: int, rule: str, last: int
) -> None:
    counts = starts(length, segment, space, rule)
    assert set(counts) == set(range(last + 1))
    expected = 6000 / (last + 1)
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi2 < last + 5 * math.sqrt(2 * last + 1)  # mean and five deviations of chi-squared


def test_splice_puts_the_rewrite_in_place_of_the_segment() -> None:
    assert splice([1, 2, 3, 4, EOS], 1, 3, [7, 8, 6], [EOS]) == [1, 7, 8, 6, 4, EOS]
    assert splice([1, 2, 3, 4, EOS], 0, 5, [7], [EOS]) == [7]


def test_an_eos_in_the_rewrite_ends_the_response() -> None:
    assert splice([1, 2, 3, 4, EOS], 1, 3, [7, EOS, 6], [EOS]) == [1, 7, EOS]
    assert splice([1, 2, 3, 4, EOS], 1, 3, [7, 5], [EOS, 5]) == [1, 7, 5]


def pairs(count: int) -> list[Pair]:
    return [Pair([1], [2, i], [3, i]) for i in range(count)]


def test_the_buffer_forgets_the_oldest_first() -> None:
    buffer = ReplayBuffer(3, seed=0)
    for pair in pairs(5):
        buffer.add(pair)
    assert len(buffer) == 3
    assert {p.chosen[1] for p in buffer.sample(3)} <= {2, 3, 4}
    assert len(buffer.sample(100)) == 3


def test_draws_have_weight_one_over_times_sampled_plus_one() -> None:
    firsts = Counter()
    for seed in range(4000):
        buffer = ReplayBuffer(2, seed)
        buffer.add(Pair([1], [0], [0]))
        for _ in range(2):
            buffer.sample(1)  # counted twice
        buffer.add(Pair([1], [1], [1]))
        firsts[buffer.sample(1)[0].chosen[0]] += 1
    # weights 1/3 and 1: the fresh one with probability 3/4
    assert abs(firsts[1] / 4000 - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 4000)


def test_counts_rise_after_the_draw_not_within_it() -> None:
    buffer = ReplayBuffer(4, seed=1)
    for pair in pairs(4):
        buffer.add(pair)
    for _ in range(3):
        drawn = buffer.sample(4)
        assert len(drawn) == 4
    assert sum(item.count for item in buffer.stored) == 12
    assert buffer.metrics["replay/size"] == 4
    assert buffer.metrics["replay/age"] == 2  # all came before the first of three draws


def test_a_restored_buffer_draws_what_the_lost_one_would_have() -> None:
    one, other = ReplayBuffer(5, seed=3), ReplayBuffer(5, seed=3)
    for i, pair in enumerate(pairs(7)):
        one.add(SegmentPair(pair, (0, 1, 2), -0.5) if i % 2 else pair)
        one.sample(2)
    other.load_state_dict(one.state_dict())
    assert [item.count for item in other.stored] == [item.count for item in one.stored]
    for _ in range(4):
        drawn = one.sample(5)
        again = other.sample(5)
        assert again == drawn
        assert [getattr(p, "bounds", 0) for p in again] == [getattr(p, "bounds", 0) for p in drawn]
        assert one.metrics == other.metrics


def test_an_empty_buffer_draws_nothing_and_survives_a_save() -> None:
    buffer = ReplayBuffer(3, seed=0)
    assert buffer.sample(4) == []
    other = ReplayBuffer(3, seed=0)
    other.load_state_dict(buffer.state_dict())
    assert other.draws == 1
    assert len(other) == 0


def test_an_epoch_sees_every_row_once_across_batches() -> None:
    seen = [i for t in range(10) for i in batch_indices(t, 4, 10, seed=5)]
    for epoch in range(4):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert batch_indices(7, 4, 10, seed=5) == batch_indices(7, 4, 10, seed=5)
    assert batch_indices(0, 9, 10, seed=5) != batch_indices(0, 9, 10, seed=6)


def weights(*values: float) -> torch.nn.Linear:
    layer = torch.nn.Linear(len(values), 1, bias=False)
    layer.weight.data = torch.tensor([values])
    return layer


def test_the_ema_after_k_steps_is_the_sum_by_hand() -> None:
    ema, policy, decay = weights(1.0, -2.0), weights(0.0, 0.0), 0.75
    expected = torch.tensor([[1.0, -2.0]])
    for step in range(1, 5):
        policy.weight.data = torch.tensor([[float(step), 0.5 * step]])
        ema_update(ema, policy, decay)
        expected = decay * expected + (1 - decay) * policy.weight.data
    assert torch.allclose(ema.weight, expected)
    # unrolled: 0.75^4 * 1 + 0.25 * (0.75^3 * 1 + 0.75^2 * 2 + 0.75 * 3 + 4)
    assert ema.weight[0, 0].item() == pytest.approx(0.31640625 + 0.25 * (0.421875 + 1.125 + 6.25))
    copy_weights(policy, ema)
    assert torch.equal(policy.weight, ema.weight)


class Recorder:
    """Stands for the models and for generation: rewrites every segment as `new`."""

    def __init__(self, new: list[int]) -> None:
        self.new, self.prompts, self.budgets, self.seeds = new, [], [], []
        self.models: list[object] = []

    def __call__(self, model, prompts, budgets, seeds):
        self.models.append(model)
        self.prompts += prompts
        self.budgets += budgets
        self.seeds += seeds
        return [self.new[:budget] for budget in budgets], [-1.0] * len(budgets)


def source(recorder: Recorder, capacity: int = 0, **flags: object) -> SAPO:
    rows = [Pair([1, i], [10 + i, 20 + i, 30 + i, 40 + i, 50 + i, EOS], []) for i in range(4)]
    settings = {"batch_size": 2, "seed": 0, "max_length": 64, "replay_capacity": capacity}
    settings |= {"segment_length": "2", "segment_rule": "uniform", "ref_update_every": 3} | flags
    models = (weights(1.0), weights(1.0), weights(1.0))
    return SAPO(rows, *models, recorder, Settings(**settings), [EOS])


def test_ema_and_reference_move_at_their_steps_and_in_order() -> None:
    sapo = source(Recorder([7, 7]))
    emas, references = [], []
    for t in range(5):
        sapo.before_step(t)
        emas.append(sapo.ema.weight.item())
        references.append(sapo.reference.weight.item())
        sapo.policy.weight.data += 1  # the update from t to t + 1
    assert emas == [1, 1.5, 2.25, 3.125, 4.0625]  # nothing at t = 0, then halfway to policy t
    assert references == [1, 1, 1, 3.125, 3.125]  # at 0 and 3, after the EMA's update


@pytest.mark.parametrize(("mode", "expected"), [("policy", 4.0), ("fixed", 1.0), ("ema", 3.125)])
def test_the_reference_is_refreshed_from_what_the_flag_says(mode: str, expected: float) -> None:
    sapo = source(Recorder([7, 7]), ref_update=mode)
    for t in range(4):
        sapo.before_step(t)
        sapo.policy.weight.data += 1
    assert sapo.reference.weight.item() == expected


def test_every_second_step_updates_the_ema_if_so_asked() -> None:
    sapo = source(Recorder([7, 7]), ema_every=2)
    emas = []
    for t in range(5):
        sapo.before_step(t)
        emas.append(sapo.ema.weight.item())
        sapo.policy.weight.data += 1
    assert emas == [1, 1, 2, 2, 3.5]


def test_fresh_pairs_are_the_gold_with_the_segment_rewritten_by_the_ema() -> None:
    recorder = Recorder([7, 8])
    sapo = source(recorder)
    batch = sapo.before_step(0)
    assert recorder.models == [sapo.ema]
    assert len(batch) == 2
    for pair, prompt in zip(batch, recorder.prompts, strict=True):
        start, stop, new_stop = pair.bounds
        assert stop - start == new_stop - start == 2
        assert pair.rejected == [*pair.chosen[:start], 7, 8, *pair.chosen[stop:]]
        assert prompt == pair.prompt + pair.chosen[:start]
    assert sapo.metrics["segment/identical"] == 0
    assert sapo.metrics["segment/ended"] == sum(len(p.rejected) == p.bounds[2] for p in batch) / 2


def test_cuts_and_seeds_are_new_each_step_and_the_same_each_run() -> None:
    one, other = Recorder([7, 8]), Recorder([7, 8])
    for recorder in (one, other):
        sapo = source(recorder)
        for t in range(6):
            sapo.before_step(t)
    assert one.prompts == other.prompts
    assert one.seeds == other.seeds
    assert len(set(one.seeds)) == 12
    assert len({len(prompt) for prompt in one.prompts}) > 2


def test_the_batch_comes_from_the_buffer() -> None:
    sapo = source(Recorder([7, 8]), 100)
    sizes = []
    for t in range(5):
        assert len(sapo.before_step(t)) == 2
        sizes.append(len(sapo.buffer))
    assert sizes == [2, 4, 6, 8, 10]
    assert sapo.metrics["replay/size"] == 10


def test_more_responses_a_prompt_and_fewer_generations() -> None:
    recorder = Recorder([7, 8])
    sapo = source(recorder, 100, responses_per_prompt=3, sample_every=2)
    sizes = []
    for t in range(4):
        sapo.before_step(t)
        sizes.append(len(sapo.buffer))
    assert sizes == [6, 6, 12, 12]
    assert len(set(recorder.seeds)) == 12


def test_identical_pairs_are_counted_and_dropped_on_request() -> None:
    class Copying(Recorder):
        def __call__(self, model, prompts, budgets, seeds):
            gold = {row.prompt[1]: row.chosen for row in sapo.rows}
            return [
                gold[prompt[1]][len(prompt) - 2 :][:budget]
                for prompt, budget in zip(prompts, budgets, strict=True)
            ], [0.0] * len(prompts)

    sapo = source(Copying([]), 100)
    assert all(pair.chosen == pair.rejected for pair in sapo.before_step(0))
    assert sapo.metrics["segment/identical"] == 1
    sapo = source(Copying([]), 100, drop_identical=True)
    assert sapo.before_step(0) == []


def test_evaluation_keeps_given_rejected_sides_and_rewrites_the_rest() -> None:
    sapo = source(Recorder([7, 8]))
    held_out = [Pair([1], [2, 3, EOS], [4, EOS]), Pair([1], [2, 3, 4, 5, EOS], [])]
    first = sapo.eval_pairs(held_out)
    assert first[0] == held_out[0]
    assert first[1].rejected != first[1].chosen
    assert sapo.eval_pairs(held_out) == first


def test_static_rows_come_as_they_are() -> None:
    rows = pairs(6)
    static = Static(rows, Settings(batch_size=6, seed=0))
    assert sorted(static.before_step(0)) == rows
    assert static.eval_pairs(rows[:2]) == rows[:2]


def test_paint_shows_the_four_parts() -> None:
    pair = SegmentPair(Pair([65], [66, 67, 68, 69], [66, 70, 68, 69]), (1, 2, 2), 0.0)
    shown = paint(pair, lambda ids: "".join(map(chr, ids)))
    for part in ("A", "B\033[32mC\033[34mDE", "B\033[31mF\033[34mDE"):
        assert part in shown


# ------------------------------------------------------------------------------ what is observed


def cut(chosen: list[int], start: int, stop: int, new: list[int], logp: float = 0.0) -> SegmentPair:
    """A pair as SAPO makes it."""
    rejected = splice(chosen, start, stop, new, [EOS])
    return SegmentPair(Pair([1], chosen, rejected), (start, stop, start + len(new)), logp)


CUTS = [
    cut([2, 3, 4, 5, EOS], 1, 3, [7, 8]),
    cut([2, 3, 4, 5, EOS], 1, 3, [3, 8]),  # B' begins as B does
    cut([2, 3, 4, 5, EOS], 1, 3, [3, 4]),  # as it was
    cut([2, 3, 4, 5, EOS], 0, 2, [2, EOS]),  # ends the response: no C
    cut([2, 3, 4, 5, EOS], 2, 5, [4, 5, EOS]),  # as it was, to the end
    cut([2, 3, 4, 5, EOS], 0, 5, [6]),  # whole
    cut([2, 3, 4, 4, 4, EOS], 2, 4, [4, 3]),
    cut([2, 3, 2, 3, 4, EOS], 0, 2, [2, 3]),
]


def test_log_probs_of_the_parts_are_those_of_the_two_sequences_cut_by_hand() -> None:
    """Each token's log-prob is made up from its place and its side: what `Branches` shares and
    what it does not must come out where it belongs."""
    value = lambda side, place, token: -(100.0 * side + 10 * place + token)  # noqa: E731
    parts: list[torch.Tensor] = []
    sums = []
    for pair in CUTS:
        shared = 0
        while pair.chosen[shared : shared + 1] == pair.rejected[shared : shared + 1] != []:
            shared += 1
        rows = {
            side: [value(side * (i >= shared), i, token) for i, token in enumerate(tokens)]
            for side, tokens in ((1, pair.chosen), (2, pair.rejected))
        }
        parts += [torch.tensor(x) for x in (rows[1][:shared], rows[1][shared:], rows[2][shared:])]
        start, stop, new = pair.bounds
        sides = (rows[1][start:stop], rows[2][start:new], rows[1][stop:], rows[2][new:])
        sums.append([sum(side) for side in sides])
    plain = Pair([1], [2, 3], [4])
    parts += [torch.zeros(0), torch.ones(2), torch.ones(1)]
    found = segment_logprobs([*CUTS, plain], parts)
    assert found.tolist() == [*sums, [0, 0, 0, 0]]


def test_segment_metrics_by_hand() -> None:
    pairs = [CUTS[0], CUTS[2], CUTS[3]]
    pairs[0].logp, pairs[1].logp, pairs[2].logp = -3.0, -1.0, -2.0
    logps = torch.tensor([[-2.0, -5, -3, -6], [-1, -1.5, 0, 0], [-4, -8, -9, 0]])
    found = segment_metrics(pairs, logps)
    assert found == pytest.approx(
        {
            "segment/kl": ((-3 + 5) + (-1 + 1.5) + (-2 + 8)) / 6,
            "segment/logps": (-2 - 4) / 4,  # the second is as it was
            "segment/new_logps": (-5 - 8) / 4,
            "seam/logps": -3 / 2,  # the third has nothing behind B'
            "seam/new_logps": -6 / 2,
        }
    )
    assert segment_metrics([Pair([1], [2], [3])], torch.zeros(1, 4)) == {}


def test_drift_is_counted_from_the_first_time_a_row_was_seen() -> None:
    rows, drift = pairs(3), Drift()
    assert drift.observe(rows[:2], [-5.0, -7.0]) == {}
    assert drift.observe(rows[1:], [-6.0, -4.0]) == {"logps/chosen_drift": 1.0}
    again = Drift()
    again.load_state_dict(drift.state_dict())
    found = again.observe([*rows, rows[0]], [-5.5, -6.5, math.nan, -4.5])
    assert math.isnan(found["logps/chosen_drift"])
    found = again.observe([*rows, rows[0]], [-5.5, -6.5, -5.0, -4.5])
    assert found["logps/chosen_drift"] == (-0.5 + 0.5 - 1 + 0.5) / 4


# ------------------------------------------------------------------------------------- the losses


def logps(seed: int, count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [-20 * torch.rand(count, generator=generator) - 0.01 for _ in range(4)]


def test_the_first_loss_is_ln_2_and_rewards_are_zero() -> None:
    chosen, rejected = logps(0)[:2]
    losses, good, bad = dpo_loss(chosen, rejected, chosen, rejected)
    assert torch.allclose(losses, torch.full((6,), math.log(2)))
    assert torch.equal(good, torch.zeros(6))
    assert torch.equal(bad, torch.zeros(6))


def test_dpo_by_hand() -> None:
    # gap (-10 + 12) - (-11 + 11.5) = 1.5; beta 0.2: -log sigmoid(0.3) = 0.554355
    args = (torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.5))
    losses, good, bad = dpo_loss(*args, beta=0.2)
    assert losses.item() == pytest.approx(0.5543552)
    assert good.item() == pytest.approx(0.2)
    assert bad.item() == pytest.approx(-0.1)


def test_rewards_carry_no_gradient() -> None:
    args = [x.requires_grad_() for x in logps(1)]
    losses, good, bad = dpo_loss(*args)
    assert losses.requires_grad
    assert not good.requires_grad
    assert not bad.requires_grad


def test_smoothing_is_the_loss_of_both_orders_mixed() -> None:
    chosen, rejected, ref_chosen, ref_rejected = logps(2)
    right = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)[0]
    wrong = dpo_loss(rejected, chosen, ref_rejected, ref_chosen)[0]
    mixed = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, label_smoothing=0.2)[0]
    assert torch.allclose(mixed, 0.8 * right + 0.2 * wrong)


def test_orpo_is_the_log_odds_ratio() -> None:
    chosen, rejected = torch.tensor([-0.5]), torch.tensor([-1.5])
    p, q = math.exp(-0.5), math.exp(-1.5)
    ratio = (p / (1 - p)) / (q / (1 - q))
    expected = -0.05 * math.log(ratio / (1 + ratio))
    assert orpo_loss(chosen, rejected).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("logp", [0.0, -1e-8, -1e-6, -1e-3, -50.0, -1e4])
def test_orpo_and_its_gradient_stay_finite(logp: float) -> None:
    for chosen, rejected in ((logp, -1.0), (-1.0, logp), (logp, logp)):
        args = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
        loss = orpo_loss(*args)
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert all(torch.isfinite(arg.grad).all() for arg in args)


def test_ipo_and_hinge_by_hand() -> None:
    policy = [torch.tensor([x]) for x in (-10.0, -12.0, 4.0, 5.0)]
    reference = [torch.tensor([x]) for x in (-11.0, -11.5, 4.0, 5.0)]
    ipo = pair_loss("ipo", policy, reference, 0.2, 0.0, 0.05)[0]
    assert ipo.item() == pytest.approx((1.5 - 2.5) ** 2)
    hinge = pair_loss("hinge", policy, reference, 0.2, 0.0, 0.05)[0]
    assert hinge.item() == pytest.approx(1 - 0.3)
    per_token = pair_loss("ipo", policy, reference, 0.2, 0.0, 0.05, length_normalize=True)
    gap = (-10 / 4 + 12 / 5) - (-11 / 4 + 11.5 / 5)
    assert per_token[0].item() == pytest.approx((gap - 2.5) ** 2)
    assert [reward.item() for reward in per_token[1:]] == pytest.approx([0.2, -0.1])
    orpo = pair_loss("orpo", policy, (), 0.2, 0.0, 0.05)[0]
    assert torch.equal(orpo, orpo_loss(policy[0] / 4, policy[1] / 5))
    assert F.relu(torch.tensor(-1.0)) == pair_loss(None, policy, (), 0.2, 0.0, 0.05)[0]
