"""sapo.py: the official code's rules as PAPERS states them, by hand and by count."""

import itertools
import math
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import EOS, Run, weights

import train
from data import Cut, Pair
from sapo import (
    SAPO,
    SFT,
    ReplayBuffer,
    Source,
    batch_indices,
    choose_segment,
    copy_weights,
    describe,
    dpo_loss,
    ema_update,
    orpo_loss,
    paint,
    pair_loss,
    segment_logprobs,
    segment_metrics,
    splice,
)


@pytest.mark.parametrize(
    ("length", "segment", "space", "rule", "last"),
    [
        (20, 8, 100, "official", 11),  # 20 - 1 - 8
        (20, 8, 4, "official", 4),  # --max-length leaves less
        (9, 8, 100, "official", 0),  # 9 - 1 - 8 = 0: from the beginning
        (5, 8, 100, "official", 0),  # shorter than the segment: whole
        (20, 8, 100, "uniform", 12),
        (20, 8, -3, "official", 0),
        (9, 8, 100, "uniform", 1),
    ],
)
def test_starts_are_uniform_up_to_the_latest(
    length: int, segment: int, space: int, rule: str, last: int
) -> None:
    rng, counts = random.Random(0), Counter[int]()
    for _ in range(6000):
        start, stop = choose_segment(length, segment, space, rng, rule)
        assert stop - start == min(segment, length)
        counts[start] += 1
    assert set(counts) == set(range(last + 1))
    expected = 6000 / (last + 1)
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi2 < last + 5 * math.sqrt(2 * last + 1)  # mean and five deviations of chi-squared


@pytest.mark.parametrize(("content", "segment"), [(19, 8), (9, 8), (8, 8), (30, 1)])
def test_the_official_rule_is_that_of_the_official_code_in_its_own_tokens(
    content: int, segment: int
) -> None:
    """There a response is header, content, <|im_end|>, newline and EOS, here content and EOS: its
    latest start, of length - 3 - segment, cuts up to the last token of the content, as ours."""
    header = 3
    latest = (header + content + 3) - 3 - segment
    last = SimpleNamespace(randint=lambda low, high: high)
    found = choose_segment(content + 1, segment, 100, last)
    assert found == (latest - header, content)


def test_splice_puts_the_rewrite_in_place_of_the_segment_and_an_eos_ends_it() -> None:
    response = [1, 2, 3, 4, EOS]
    assert splice(response, 1, 3, [7, 8, 6], [EOS]) == [1, 7, 8, 6, 4, EOS]
    assert splice(response, 0, 5, [7], [EOS]) == [7]
    assert splice(response, 1, 3, [7, EOS, 6], [EOS]) == [1, 7, EOS]
    assert splice(response, 1, 3, [7, 5], [EOS, 5]) == [1, 7, 5]


def pairs(count: int) -> list[Pair]:
    return [Pair([1], [2, i], [3, i]) for i in range(count)]


def test_the_buffer_forgets_the_oldest_first_and_gives_it_back() -> None:
    buffer, five = ReplayBuffer(3, seed=0), pairs(5)
    assert [buffer.add(pair) for pair in five] == [None, None, None, *five[:2]]
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
    assert [len(buffer.sample(4)) for _ in range(3)] == [4] * 3
    assert sum(item.count for item in buffer.stored) == 12
    assert buffer.metrics["replay/size"] == 4
    assert buffer.metrics["replay/age"] == 2  # all came before the first of three draws


@pytest.mark.parametrize(("seed", "count"), [(3, 7), (4, 7), (3, 0)])
def test_a_restored_buffer_draws_what_the_lost_one_would_have(seed: int, count: int) -> None:
    """Whatever the seed that it was made with, and from an empty one nothing."""
    one, other = ReplayBuffer(5, seed=3), ReplayBuffer(5, seed)
    assert one.sample(2) == []
    for i, pair in enumerate(pairs(count)):
        one.add(pair._replace(cut=Cut(0, 1, 2, -0.5) if i % 2 else None))
        one.sample(2)
    other.load_state_dict(one.state_dict())
    assert (other.stored, other.draws) == (one.stored, count + 1)
    for _ in range(4):
        assert other.sample(5) == one.sample(5)
        assert one.metrics == other.metrics


def test_an_epoch_sees_every_row_once_across_batches() -> None:
    seen = [i for t in range(10) for i in batch_indices(t, 4, 10, seed=5)]
    for epoch in range(4):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert batch_indices(0, 9, 10, seed=5) != batch_indices(0, 9, 10, seed=6)


def test_the_ema_after_k_steps_is_the_sum_by_hand() -> None:
    ema, policy = weights(1.0, -2.0), weights(0.0, 0.0)
    for step in range(1, 5):
        policy.weight.data = torch.tensor([[float(step), 0.5 * step]])
        ema_update(ema, policy, 0.75)
    # of 1, 2, 3, 4: 0.25 * (0.75^3 * 1 + 0.75^2 * 2 + 0.75 * 3 + 4), and 0.75^4 of the start
    new = 0.25 * (0.421875 + 1.125 + 2.25 + 4)
    assert ema.weight[0].tolist() == pytest.approx([0.31640625 + new, -0.6328125 + new / 2])
    copy_weights(policy, ema)
    assert torch.equal(policy.weight, ema.weight)


def source(new: list[int], capacity: int = 0, **flags: Any) -> SAPO:
    """A source whose EMA rewrites every segment as `new`."""
    rows = [Pair([1, i], [10 + i, 20 + i, 30 + i, 40 + i, 50 + i, EOS], []) for i in range(4)]
    usual = {"segment_length": "2", "segment_rule": "uniform", "ref_update_every": 3}
    return SAPO(rows, Run(lambda _: new, replay_capacity=capacity, **usual | flags))


@pytest.mark.parametrize(
    ("flags", "emas", "references"),
    [  # the policy is t + 1 at step t, the reference is refreshed at 0 and 3, after the EMA
        ({}, [1, 1.5, 2.25, 3.125, 4.0625], [1, 1, 1, 3.125, 3.125]),
        ({"ref_update": "policy"}, [1, 1.5, 2.25, 3.125, 4.0625], [1, 1, 1, 4, 4]),
        ({"ref_update": "fixed"}, [1, 1.5, 2.25, 3.125, 4.0625], [1] * 5),
        ({"ema_every": 2}, [1, 1, 2, 2, 3.5], [1, 1, 1, 2, 2]),
        ({"ref_update_every": None}, [1, 1.5, 2.25, 3.125, 4.0625], [1, 1, 2.25, 2.25, 4.0625]),
    ],
)
def test_ema_and_reference_move_at_their_steps_and_in_order(
    flags: Any, emas: list[float], references: list[float]
) -> None:
    sapo, held, versions = source([7, 7], **flags), [], []
    for t in range(5):
        sapo.before_step(t)
        held.append([sapo.run.models[name].weight.item() for name in ("ema", "reference")])
        versions.append(sapo.reference_version)
        sapo.run.train()
    assert held == [[*both] for both in zip(emas, references, strict=True)]
    new = [a != b for a, b in itertools.pairwise(references)]
    assert [a != b for a, b in itertools.pairwise(versions)] == new


def test_fresh_pairs_are_the_gold_with_the_segment_rewritten_by_the_ema() -> None:
    sapo = source([7, 8])
    batch = sapo.before_step(0)
    assert sapo.run.names == ["ema"] * 2
    for pair, prompt in zip(batch, sapo.run.prompts, strict=True):
        start, stop, new_stop, _ = pair.cut
        assert stop - start == new_stop - start == 2
        assert pair.rejected == [*pair.chosen[:start], 7, 8, *pair.chosen[stop:]]
        assert prompt == pair.prompt + pair.chosen[:start]
    assert sapo.metrics["segment/identical"] == 0
    assert sapo.metrics["tokens/per_useful_pair"] == 2


@pytest.mark.parametrize(
    ("new", "length", "ended", "unended"),
    [
        ([7, EOS], "2", 1, 0),  # B' ends the response
        ([7, 8], "2", 0, 0),  # C does
        ([7] * 9, "full", 0, 1),  # no C, and B' has used up its budget
        ([7, EOS], "full", 1, 0),
    ],
)
def test_a_rewrite_ends_the_response_where_it_holds_an_eos(
    new: list[int], length: str, ended: float, unended: float
) -> None:
    sapo = source(new, segment_length=length, segment_rule="official")
    sapo.before_step(0)
    assert sapo.metrics["segment/ended"] == ended
    assert sapo.metrics["segment/unended"] == unended
    cut_off = [Pair([1], [2, 3], [2, 7], Cut(1, 2, 2, 0.0))]  # the gold one has no EOS either
    assert describe(cut_off, [EOS])["segment/unended"] == 0


def test_cuts_and_seeds_are_new_each_step_and_the_same_each_run() -> None:
    one, other = source([7, 8]), source([7, 8])
    for sapo in (one, other):
        for t in range(6):
            sapo.before_step(t)
    assert one.run.prompts == other.run.prompts
    assert one.run.seeds == other.run.seeds
    assert len(set(one.run.seeds)) == 12
    assert len({len(prompt) for prompt in one.run.prompts}) > 2


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [({}, [2, 4, 6, 8]), ({"responses_per_prompt": 3, "sample_every": 2}, [6, 6, 12, 12])],
)
def test_the_batch_comes_from_the_buffer(flags: Any, sizes: list[int]) -> None:
    sapo, found = source([7, 8], 100, **flags), []
    for t in range(4):
        assert len(sapo.before_step(t)) == 2
        found.append(len(sapo.buffer))
    assert found == sizes
    assert sapo.metrics["replay/size"] == sizes[-1]
    assert len(set(sapo.run.seeds)) == sizes[-1]


def test_pairs_that_cannot_come_again_are_named() -> None:
    """Those that the buffer pushed out, and without one all of the step's."""
    for every in (1, 2):
        sapo, before = source([7, 8], 5, sample_every=every), list[Pair]()
        for t in range(6):
            sapo.before_step(t)
            after = [item.pair for item in sapo.buffer.stored]
            assert [*sapo.gone, *after] == [*before, *sapo.fresh]
            before = after
        assert len(before) == 5
    sapo = source([7, 8])
    for t in range(2):
        assert sapo.before_step(t) == sapo.gone == sapo.fresh != []
    sapo = source([7, 8], responses_per_prompt=3)
    assert sapo.before_step(0) == sapo.gone == sapo.fresh[:2]
    assert [pair.prompt for pair in sapo.fresh] == 3 * [pair.prompt for pair in sapo.gone]


def test_identical_pairs_are_counted_and_dropped_on_request() -> None:
    for drop in (False, True):
        sapo = source([], 100, drop_identical=drop)
        gold = {row.prompt[1]: row.prompt + row.chosen for row in sapo.rows}
        sapo.run.say = lambda prompt, gold=gold: gold[prompt[1]][len(prompt) :]
        batch = sapo.before_step(0)
        assert sapo.metrics["segment/identical"] == 1
        assert all(pair.chosen == pair.rejected for pair in batch)
        assert len(batch) == len(sapo.buffer) == (0 if drop else 2)
        assert "tokens/per_useful_pair" not in sapo.metrics


def test_held_out_rows_are_rewritten_as_training_rows_and_each_time_alike() -> None:
    sapo, held_out = source([7, 8]), [Pair([1], [2, 3, 4, 5, EOS], [])]
    (pair,) = sapo.spoil(held_out)
    assert pair.rejected != pair.chosen == held_out[0].chosen
    assert sapo.spoil(held_out) == [pair]
    assert sapo.spoil([]) == []


def test_rows_come_as_they_are_and_without_a_rejected_side_for_sft() -> None:
    rows, run = pairs(6), Run(lambda _: [], batch_size=6)
    assert sorted(Source(rows, run).before_step(0)) == rows
    assert Source(rows, run).spoil(rows[:2]) == rows[:2]
    found = sorted(SFT(rows, run).before_step(0))
    assert found == [row._replace(rejected=[]) for row in rows]


def test_paint_shows_the_four_parts() -> None:
    pair = Pair([65], [66, 67, 68, 69], [66, 70, 68, 69], Cut(1, 2, 2, 0.0))
    shown = paint(pair, lambda ids: "".join(map(chr, ids)))
    for part in ("A", "B\033[32mC\033[34mDE", "B\033[31mF\033[34mDE"):
        assert part in shown


# ------------------------------------------------------------------------------ what is observed


def cut(chosen: list[int], start: int, stop: int, new: list[int]) -> Pair:
    """A pair as SAPO makes it."""
    rejected = splice(chosen, start, stop, new, [EOS])
    return Pair([1], chosen, rejected, Cut(start, stop, start + len(new), 0.0))


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
        start, stop, new, _ = pair.cut
        sides = (rows[1][start:stop], rows[2][start:new], rows[1][stop:], rows[2][new:])
        sums.append([sum(side) for side in sides])
    plain = Pair([1], [2, 3], [4])
    parts += [torch.zeros(0), torch.ones(2), torch.ones(1)]
    found = segment_logprobs([*CUTS, plain], parts)
    assert found.tolist() == [*sums, [0, 0, 0, 0]]


def test_segment_metrics_by_hand() -> None:
    both = zip((CUTS[0], CUTS[2], CUTS[3]), (-3.0, -1.0, -2.0), strict=True)
    pairs = [pair._replace(cut=pair.cut._replace(logp=logp)) for pair, logp in both]
    logps = torch.tensor([[-2.0, -5, -3, -6], [-1, -1.5, 0, 0], [-4, -8, -9, 0]])
    columns = ("logps/segment", "logps/new_segment", "logps/rest", "logps/new_rest")
    found = segment_metrics(pairs, dict(zip(columns, logps.unbind(1), strict=True)))
    assert found == pytest.approx(
        {
            "segment/kl": ((-3 + 5) + (-1 + 1.5) + (-2 + 8)) / 6,
            "segment/logps": (-2 - 4) / 4,  # the second is as it was
            "segment/new_logps": (-5 - 8) / 4,
            "seam/logps": -3 / 2,  # the third has nothing behind B'
            "seam/new_logps": -6 / 2,
        }
    )
    plain = [Pair([1], [2], [3])]
    assert segment_metrics(plain, dict.fromkeys(columns, torch.zeros(1))) == {}
    assert describe(plain, [EOS]) == {}


# ------------------------------------------------------------------------------------- the losses


def test_the_first_loss_is_ln_2_and_rewards_are_zero_and_carry_no_gradient() -> None:
    chosen, rejected = (torch.linspace(-20, end, 6, requires_grad=True) for end in (-1, -0.01))
    losses, good, bad = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach())
    assert torch.allclose(losses, torch.full((6,), math.log(2)))
    assert torch.equal(torch.stack([good, bad]), torch.zeros(2, 6))
    assert [x.requires_grad for x in (losses, good, bad)] == [True, False, False]


def test_dpo_by_hand() -> None:
    # gap (-10 + 12) - (-11 + 11.5) = 1.5; beta 0.2: -log sigmoid(0.3) = 0.554355
    args = [torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.5)]
    found = [x.item() for x in dpo_loss(*args, beta=0.2)]
    assert found == pytest.approx([0.5543552, 0.2, -0.1])
    # smoothed: 0.8 of it and 0.2 of -log sigmoid(-0.3), which is larger by 0.3
    smooth = dpo_loss(*args, beta=0.2, label_smoothing=0.2)[0].item()
    assert smooth == pytest.approx(0.5543552 + 0.2 * 0.3)


@pytest.mark.parametrize("logp", [0.0, -1e-8, -1e-6, -1e-3, -50.0, -1e4])
def test_orpo_and_its_gradient_stay_finite(logp: float) -> None:
    for chosen, rejected in ((logp, -1.0), (-1.0, logp), (logp, logp)):
        args = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
        loss = orpo_loss(*args)
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert all(torch.isfinite(arg.grad).all() for arg in args)


def test_ipo_and_orpo_by_hand() -> None:
    policy = [torch.tensor([x]) for x in (-10.0, -12.0, 4.0, 5.0)]
    reference = [torch.tensor([x]) for x in (-11.0, -11.5)]

    def found(loss: str | None, **flags: Any) -> list[float]:
        c = train.Config(loss=loss, **flags)
        return [x.item() for x in pair_loss(c, 0.2, policy, reference)]

    assert found("ipo")[0] == pytest.approx((1.5 - 2.5) ** 2)
    assert found("orpo", orpo_lambda=0.4)[0] == orpo_loss(policy[0] / 4, policy[1] / 5, 0.4).item()
    assert found(None)[0] == 0
