"""SAPO: Self-Augmented Preference Optimization (arXiv 2405.20830), and the baselines beside it.

A source makes the pairs that a loss learns from. SAPO's needs only prompts x and good responses y:

    1. ema <- a * ema + (1 - a) * policy                            `ema_update`
    2. ref <- ema, every so many steps                              `copy_weights`
    3. y = A + B + C, cut at random                                 `choose_segment`
       B' ~ ema( . | x, A), at most |B| tokens
       y- = A + B' + C, or A + B' where B' ends the response        `splice`
       (x, y, y-) -> replay buffer
    4. a batch from the buffer, those drawn less often first        `ReplayBuffer`
    5. policy: a step on that batch, with the loss                  `dpo_loss`, `orpo_loss`
           -log sigmoid(beta * (log pi(y)/ref(y) - log pi(y-)/ref(y-)))

`SAPO.before_step` is steps 1 to 4, in this order; the trainer does 5. How this differs from the
paper (P) and from the official code (C):

    1. P updates the EMA every 2 steps, C every step; ours is C's, and `--ema-every` switches it.
    2. C refreshes the reference every 108 steps, its epoch; ours once an epoch of the data at hand
       (`--ref-update-every`).
    3. C keeps a buffer of 2,000 pairs on each rank; ours is one buffer, whatever the ranks.
    4. C counts draws by object identity and loses them on resume; ours are saved with the pairs.
    5. C masks the attention at every EOS in the prompt; ours lets all of the prompt be seen.
    6. C's NLL (ORPO) counts prompt and padding too; ours counts the response.
    7. C's rule never cuts the last three tokens of a long response; `--segment-rule uniform` does.

Sources know nothing of files, flags or ranks: a step's pairs are those of the whole global batch,
each draw has a random stream of its own, keyed by (seed, purpose, step, index), and `generate`
comes from the trainer, which may spread its rows over ranks.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Pair
from model import hash_seed

# (model, prompts, most new tokens per row, seed per row) -> new tokens per row
Generate = Callable[[Any, list[list[int]], list[int], list[int]], list[list[int]]]


class Source(Protocol):
    """What the trainer asks of a method. `metrics` holds what the last `before_step` observed."""

    metrics: dict[str, float]

    def before_step(self, t: int) -> list[Pair]:
        """The pairs of the update from policy t to t + 1, of the whole global batch."""

    def eval_pairs(self, rows: Sequence[Pair]) -> list[Pair]:
        """Pairs from held-out rows, made as those for training are, and the same ones if the
        models are the same."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beyond the models' weights."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up what `state_dict` gave."""


class SAPO:
    """Chosen = the gold response; rejected = the same with a segment rewritten by the EMA.

    Args:
        rows: (prompt, gold response, anything) as token ids; only the first two are read.
        reference: None for a loss without one.
        segment_length: L, in tokens; a response shorter than L is rewritten whole.
        ref_update: "ema", "policy" or "fixed"; due at steps 0, `ref_update_every`, twice that...
        buffer: None trains on the fresh pairs themselves.
    """

    def __init__(
        self,
        rows: Sequence[Pair],
        policy: nn.Module,
        ema: nn.Module,
        reference: nn.Module | None,
        generate: Generate,
        buffer: "ReplayBuffer | None",
        *,
        batch_size: int,
        seed: int,
        max_length: int,
        eos_ids: Sequence[int],
        segment_length: int = 256,
        segment_rule: str = "official",
        ema_decay: float = 0.5,
        ema_every: int = 1,
        ref_update: str = "ema",
        ref_update_every: int = 108,
        responses_per_prompt: int = 1,
        sample_every: int = 1,
        drop_identical: bool = False,
    ) -> None:
        self.rows, self.policy, self.ema, self.reference = rows, policy, ema, reference
        self.generate, self.buffer, self.batch_size, self.seed = generate, buffer, batch_size, seed
        self.max_length, self.eos_ids = max_length, frozenset(eos_ids)
        self.segment_length, self.segment_rule = segment_length, segment_rule
        self.ema_decay, self.ema_every = ema_decay, ema_every
        self.ref_update, self.ref_update_every = ref_update, ref_update_every
        self.responses_per_prompt, self.sample_every = responses_per_prompt, sample_every
        self.drop_identical = drop_identical
        self.metrics: dict[str, float] = {}

    def before_step(self, t: int) -> list[Pair]:
        """EMA, reference, fresh pairs into the buffer, a batch out of it. The order matters."""
        self.metrics = {}
        if t > 0 and t % self.ema_every == 0:
            ema_update(self.ema, self.policy, self.ema_decay)
        due = t % self.ref_update_every == 0 and self.ref_update != "fixed"
        if self.reference is not None and due:
            copy_weights(self.reference, self.ema if self.ref_update == "ema" else self.policy)
        fresh: list[SegmentPair] = []
        if t % self.sample_every == 0:
            indices = batch_indices(t, self.batch_size, len(self.rows), self.seed)
            rows = [self.rows[i] for i in indices for _ in range(self.responses_per_prompt)]
            fresh = self.rewrite(rows, "segment", t)
            self.observe(fresh)
        if self.drop_identical:
            fresh = [pair for pair in fresh if pair.chosen != pair.rejected]
        if self.buffer is None:
            return list(fresh)
        for pair in fresh:
            self.buffer.add(pair)
        batch = self.buffer.sample(self.batch_size)
        self.metrics |= self.buffer.metrics
        return batch

    def rewrite(self, rows: Sequence[Pair], purpose: str, t: int) -> list["SegmentPair"]:
        """Cuts each gold response, lets the EMA write the segment anew, and splices it in."""
        cuts, prompts = [], []
        for i, (prompt, gold, _) in enumerate(rows):
            length = min(self.segment_length, len(gold))
            space = self.max_length - len(prompt) - length  # for A, if B' is to fit behind it
            rng = random.Random(hash_seed(self.seed, purpose, "cut", t, i))
            cuts.append(choose_segment(len(gold), length, space, rng, self.segment_rule))
            prompts.append(prompt + gold[: cuts[-1][0]])
        budgets = [stop - start for start, stop in cuts]
        seeds = [hash_seed(self.seed, purpose, "sample", t, i) for i in range(len(rows))]
        rewrites = self.generate(self.ema, prompts, budgets, seeds)
        pairs = []
        for row, (start, stop), new in zip(rows, cuts, rewrites, strict=True):
            rejected = splice(row.chosen, start, stop, new, self.eos_ids)
            bounds = (start, stop, start + len(new))
            pairs.append(SegmentPair(Pair(row.prompt, row.chosen, rejected), bounds))
        return pairs

    def observe(self, fresh: Sequence["SegmentPair"]) -> None:
        """Shares and lengths of the fresh segments; an identical pair teaches DPO nothing."""
        count = len(fresh)
        self.metrics |= {
            "segment/identical": sum(p.chosen == p.rejected for p in fresh) / count,
            "segment/length": sum(p.bounds[1] - p.bounds[0] for p in fresh) / count,
            "segment/new_length": sum(p.bounds[2] - p.bounds[0] for p in fresh) / count,
            "segment/ended": sum(len(p.rejected) == p.bounds[2] for p in fresh) / count,
        }

    def eval_pairs(self, rows: Sequence[Pair]) -> list[Pair]:
        """Rows with a rejected side keep it; the others get the EMA's rewrite, the same cuts at
        every evaluation."""
        rewritten = self.rewrite([row for row in rows if not row.rejected], "eval", 0)
        return [*(row for row in rows if row.rejected), *rewritten]

    def state_dict(self) -> dict[str, Tensor]:
        """The replay buffer, its counts and ages."""
        return {} if self.buffer is None else self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up what `state_dict` gave."""
        if self.buffer is not None:
            self.buffer.load_state_dict(state)


class SegmentPair(Pair):
    """A Pair that knows its cut: chosen[start:stop] is B, rejected[start:new_stop] is B'."""

    bounds: tuple[int, int, int]  # start, stop, new_stop

    def __new__(cls, pair: Pair, bounds: tuple[int, int, int]) -> "SegmentPair":
        self = super().__new__(cls, *pair)
        self.bounds = bounds
        return self


def choose_segment(
    response_len: int,
    segment_len: int,
    max_start: int,
    rng: random.Random,
    rule: str = "official",
) -> tuple[int, int]:
    """Where to cut a response, in tokens: [start, stop), of min(segment_len, response_len).

    "official": start is uniform in [0, min(response_len - 3 - L, max_start)], or 0 where that is
    empty. "uniform": the same without the 3, so that the response's end is cut as often as its
    middle. `max_start` is the space that `--max-length` leaves.
    """
    length = min(segment_len, response_len)
    latest = response_len - length - (3 if rule == "official" else 0)
    start = rng.randint(0, max(0, min(latest, max_start)))
    return start, start + length


def splice(
    response: list[int],
    start: int,
    stop: int,
    regenerated: list[int],
    eos_ids: Sequence[int] | frozenset[int],
) -> list[int]:
    """A + B' + C; where B' holds an EOS the response ends there, and C is dropped."""
    for i, token in enumerate(regenerated):
        if token in eos_ids:
            return response[:start] + regenerated[: i + 1]
    return response[:start] + regenerated + response[stop:]


@dataclass
class Stored:
    """A pair in the buffer: how often it was drawn, and at which draw it came."""

    pair: Pair
    count: int
    born: int


class ReplayBuffer:
    """First in, first out; `sample` favours pairs seen less, weight 1 / (times sampled + 1).

    `metrics` describes the last draw: size, mean age in draws (0 is fresh), mean earlier draws.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.stored: deque[Stored] = deque(maxlen=capacity)
        self.seed, self.draws = seed, 0
        self.picked: list[int] = []  # the places of the last draw, 0 the oldest
        self.metrics: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.stored)

    def add(self, pair: Pair) -> None:
        """Stores a pair, and drops the oldest where the buffer is full."""
        self.stored.append(Stored(pair, 0, self.draws))

    def sample(self, n: int) -> list[Pair]:
        """min(n, len) draws with replacement; the counts are raised after them."""
        rng = random.Random(hash_seed(self.seed, "replay", self.draws))
        weights = [1 / (item.count + 1) for item in self.stored]
        n = min(n, len(self.stored))
        self.picked = rng.choices(range(len(weights)), weights, k=n) if n else []
        drawn = [self.stored[i] for i in self.picked]
        self.metrics = {"replay/size": len(self.stored)}
        if drawn:
            self.metrics["replay/age"] = sum(self.draws - item.born for item in drawn) / n
            self.metrics["replay/times_sampled"] = sum(item.count for item in drawn) / n
        for item in drawn:
            item.count += 1
        self.draws += 1
        return [item.pair for item in drawn]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as integer tensors, which safetensors can hold."""
        sides = [side for item in self.stored for side in item.pair]
        bounds = [getattr(item.pair, "bounds", (-1, -1, -1)) for item in self.stored]
        return {
            "tokens": torch.tensor([token for side in sides for token in side], dtype=torch.int32),
            "lengths": torch.tensor([len(side) for side in sides], dtype=torch.int64),
            "bounds": torch.tensor(bounds, dtype=torch.int64).reshape(-1, 3),
            "counts": torch.tensor([item.count for item in self.stored], dtype=torch.int64),
            "born": torch.tensor([item.born for item in self.stored], dtype=torch.int64),
            "draws": torch.tensor([self.draws], dtype=torch.int64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up what `state_dict` gave; the next draw is the one that would have come next."""
        sides = [part.tolist() for part in state["tokens"].split(state["lengths"].tolist())]
        self.stored.clear()
        columns = (state[key].tolist() for key in ("bounds", "counts", "born"))
        for i, (bounds, count, born) in enumerate(zip(*columns, strict=True)):
            pair = Pair(*sides[3 * i : 3 * i + 3])
            known = bounds[0] >= 0
            self.stored.append(
                Stored(SegmentPair(pair, tuple(bounds)) if known else pair, count, born)
            )
        self.draws = int(state["draws"])


class Static:
    """The data set's own rows, as they are: `sft` (no rejected side), `dpo` and `orpo`."""

    def __init__(self, rows: Sequence[Pair], *, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.metrics: dict[str, float] = {}

    def before_step(self, t: int) -> list[Pair]:
        """The batch's rows."""
        indices = batch_indices(t, self.batch_size, len(self.rows), self.seed)
        return [self.rows[i] for i in indices]

    def eval_pairs(self, rows: Sequence[Pair]) -> list[Pair]:
        """The rows themselves."""
        return list(rows)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: the order of the rows follows from the seed."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing."""


def batch_indices(t: int, batch_size: int, rows: int, seed: int) -> list[int]:
    """The rows of step t. Batches run on across epochs, each epoch a permutation of its own."""
    places = range(t * batch_size, (t + 1) * batch_size)
    return [_permutation(rows, seed, place // rows)[place % rows] for place in places]


@lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> list[int]:
    return random.Random(hash_seed(seed, "order", epoch)).sample(range(rows), rows)


@torch.no_grad()
def ema_update(ema: nn.Module, policy: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * policy, matched by name, in the EMA's own type (fp32)."""
    ours, theirs = _paired(ema, policy)
    torch._foreach_lerp_(ours, theirs, 1 - decay)


@torch.no_grad()
def copy_weights(into: nn.Module, source: nn.Module) -> None:
    """into <- source, matched by name."""
    for ours, theirs in zip(*_paired(into, source), strict=True):  # DTensor has no _foreach_copy_
        ours.copy_(theirs)


def _paired(one: nn.Module, other: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    others = dict(other.named_parameters())
    names, ours = zip(*one.named_parameters(), strict=True)
    return list(ours), [others[name] for name in names]


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct preference optimization (arXiv 2305.18290, eq. 7), with cDPO's smoothing.

    Args: four (N,) tensors of summed log-probs.
    Returns: losses, rewards of the chosen, rewards of the rejected: (N,) each; the rewards
        (eq. 5 without the partition function, which cancels) carry no gradient.
    """
    logits = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
    right, wrong = F.logsigmoid(beta * logits), F.logsigmoid(-beta * logits)
    losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    rewards = (beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected))
    return losses, rewards[0].detach(), rewards[1].detach()


def orpo_loss(chosen_mean_logp: Tensor, rejected_mean_logp: Tensor, lam: float = 0.05) -> Tensor:
    """ORPO's odds-ratio term (arXiv 2403.07691, eq. 7) on two (N,) mean log-probs per token. (N,).

    The odds p / (1 - p) of a probability within 1e-6 of 1 are those at that distance.
    """
    chosen, rejected = (x.clamp(max=-1e-6) for x in (chosen_mean_logp, rejected_mean_logp))
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -lam * F.logsigmoid(log_odds)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, exact at both ends."""
    return torch.log(-torch.expm1(x))


def pair_loss(
    kind: str | None,
    policy: Sequence[Tensor],
    reference: Sequence[Tensor],
    beta: float,
    label_smoothing: float,
    orpo_lambda: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss by its name: (N,) losses, chosen rewards, rejected rewards.

    `policy` and `reference` are what `pair_logprobs` gives; "orpo", and None, which is no loss on
    pairs, read no reference.
    """
    chosen, rejected, n_chosen, n_rejected = policy
    if kind is None:
        return torch.zeros_like(chosen), chosen.detach(), rejected.detach()
    if kind == "orpo":
        means = (chosen / n_chosen, rejected / n_rejected)
        rewards = [orpo_lambda * mean.detach() for mean in means]
        return orpo_loss(*means, orpo_lambda), rewards[0], rewards[1]
    base, other = reference[:2]
    losses, *rewards = dpo_loss(chosen, rejected, base, other, beta, label_smoothing)
    gap = (chosen - rejected) - (base - other)
    if kind == "ipo":  # arXiv 2310.12036, eq. 17: the gap aims at 1 / (2 beta)
        losses = (gap - 1 / (2 * beta)) ** 2
    if kind == "hinge":  # SLiC, arXiv 2305.10425, against a reference
        losses = torch.relu(1 - beta * gap)
    return losses, rewards[0], rewards[1]


def paint(pair: SegmentPair, decode: Callable[[list[int]], str]) -> str:
    """A pair in terminal colours: A plain, B green, B' red, C blue."""
    start, stop, new_stop = pair.bounds
    green, red, blue, plain = "\033[32m", "\033[31m", "\033[34m", "\033[0m"
    prompt, before = decode(pair.prompt), decode(pair.chosen[:start])
    old, new = decode(pair.chosen[start:stop]), decode(pair.rejected[start:new_stop])
    after = decode(pair.chosen[stop:])
    left = decode(pair.rejected[new_stop:])
    return (
        f"prompt    {prompt}\n"
        f"chosen    {before}{green}{old}{blue}{after}{plain}\n"
        f"rejected  {before}{red}{new}{blue}{left}{plain}   (A, {green}B{plain}, "
        f"{red}B'{plain}, {blue}C{plain})"
    )
