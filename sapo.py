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

    1. P updates the EMA every 2 steps, C every step; ours is C's (`--ema-every`).
    2. C refreshes the reference every 108 steps, its epoch; ours once an epoch of the data at hand.
    3. C keeps a buffer of 2,000 pairs on each rank; ours is one buffer, whatever the ranks.
    4. C counts draws by object identity and loses them on resume; ours are saved with the pairs.
    5. C masks the attention at every EOS, of the prompt and of the response; ours does not.
    6. C's NLL (ORPO) counts prompt and padding too; ours counts the response.
    7. C never cuts the last three tokens of a long response, its template's closers; ours has one
       such, EOS. C's response begins with the assistant's header, which it scores; ours does not.
    8. Of a response too long for the room C always cuts the last tokens out; ours draws as ever.
    9. C computes in bf16, EMA and reference too, on fp32 master weights (DeepSpeed), with AdamW's
       state in 8 bits for ORPO; ours is fp32, or computes in bf16 (`--precision`, the recipes).
   10. C most likely does not clip gradients; ours clips them to a norm of 1.

SPIN (arXiv 2401.01335), with whole responses of an opponent that is frozen for an iteration:

   11. The authors' files say a rate of 5e-7, beta 0.1 and 3 epochs; their scripts, which override
       them, 5e-7, 5e-7, 1e-7, 1e-7, betas of 0.1, 0.1, 0.1, 5.0, and 6 epochs, as our recipe.
   12. They answer all prompts before an iteration, behind "### Instruction: ..."; ours those of a
       step before it, the same pairs, behind the chat template that it trains with.
   13. They make text of an answer and encode it again, so that one cut at 256 tokens gets an EOS;
       ours keeps the tokens as they were sampled, and counts those that are cut.

Sources know nothing of files, flags or ranks: a step's pairs are those of the whole global batch,
and each draw has a random stream of its own, keyed by (seed, purpose, step, index).
"""

import bisect
import contextlib
import itertools
import math
import random
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Cut, Pair, Tokenizer
from model import Count, Share, Weight, Whole, hash_seed

Request = tuple[list[int], int, int]  # a prompt, the most new tokens, a seed
# The new tokens, and the sum of their log-probs under the model as it is, unfiltered.
Answer = tuple[list[int], float]


class Run(Protocol):
    """What a source may use of the run; the trainer's learner is one."""

    config: Any
    models: dict[str, Any]  # "policy"; "ema" and "reference" where `Source.roles` asks for them
    tokenizer: Tokenizer

    def clock(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Times what is within it."""

    def generate(
        self, model: Any, asked: list[Request], temperature: float | None = None, keep: bool = False
    ) -> list[Answer]:
        """Samples an answer to each request. `keep`: for so many that the run may be stopped on the
        way; what it has by then is kept for when it goes on."""

    def logps(self, rows: Sequence[Pair]) -> list[float]:
        """The summed log-probs of `chosen` under the policy."""


class Source:
    """Where a step's pairs come from; as it stands, the rows as they are (`dpo`, `orpo`).

    A method overrides `before_step`, and what else differs. `rows` are (prompt, gold response,
    rejected) as token ids; the attributes tell of the last `before_step`.
    """

    roles: tuple[str, ...] = ()  # copies of the start that it needs, beside the loss's reference

    def __init__(self, rows: Sequence[Any], run: Run) -> None:
        self.rows, self.run = rows, run
        self.bounds = self.schedule(len(rows), run.config)
        self.round = 0  # the stretch between two bounds that has begun
        self.metrics: dict[str, float] = {}
        self.fresh: list[Pair] = []  # the pairs that it made
        self.picked: list[int] = []  # where each pair lies: in the rows, the buffer or the pool
        self.gone: list[Pair] = []  # pairs that cannot come again
        self.made: list[dict[str, Any]] = []  # rows to be written down, as text
        self.reference_version = 0  # another one whenever the reference has changed

    @staticmethod
    def schedule(rows: int, c: Any) -> list[int]:
        """The steps at which each stretch with a learning rate's schedule and an optimizer state of
        its own begins (SPIN's iterations, SGPO's rounds), and the last one's end."""
        return [0, steps_for(rows, c)]

    def stretch(self, t: int) -> tuple[int, int, int]:
        """The number, first step and end of the stretch that step t is in."""
        number = bisect.bisect_right(self.bounds, t, hi=len(self.bounds) - 1) - 1
        return number, self.bounds[number], self.bounds[number + 1]

    def bend(self, old: list[int], done: int) -> None:
        """Takes up the bounds of a stopped run. Where --steps has changed, what is left is
        stretched over what is left now: stretches that have begun stay where they are."""
        ratio = (self.bounds[-1] - done) / max(1, old[-1] - done)
        bent = [at if at < done else done + round((at - done) * ratio) for at in old[:-1]]
        self.bounds = [*bent, self.bounds[-1]]

    def before_step(self, t: int) -> list[Pair]:
        """The pairs of the update from policy t to t + 1, of the whole global batch."""
        c = self.run.config
        self.picked = batch_indices(t, c.batch_size, len(self.rows), c.seed)
        return [self.rows[i] for i in self.picked]

    def spoil(self, rows: Sequence[Pair]) -> list[Pair]:
        """Held-out rows with a rejected side made as in training: the same, if the models are."""
        return list(rows)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beyond the models' weights and the bounds."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what `state_dict` gave."""


class SFT(Source):
    """The rows without a rejected side."""

    def __init__(self, rows: Sequence[Pair], run: Run) -> None:
        super().__init__([Pair(row.prompt, row.chosen, []) for row in rows], run)


class SAPO(Source):
    """Chosen = the gold response; rejected = the same with a segment rewritten by the EMA."""

    roles = ("ema",)

    def __init__(self, rows: Sequence[Pair], run: Run) -> None:
        super().__init__(rows, run)
        c = run.config
        self.buffer = ReplayBuffer(c.replay_capacity, c.seed) if c.replay_capacity else None
        self.ref_every = c.ref_update_every or math.ceil(len(rows) / c.batch_size)  # one epoch

    def before_step(self, t: int) -> list[Pair]:
        """EMA, reference, fresh pairs into the buffer, a batch out of it. The order matters."""
        c, models = self.run.config, self.run.models
        if t > 0 and t % c.ema_every == 0:
            with self.run.clock("ema"):
                ema_update(models["ema"], models["policy"], c.ema_decay)
        if compares(c) and c.ref_update != "fixed":
            self.reference_version = t // self.ref_every
            if t % self.ref_every == 0:
                copy_weights(models["reference"], models[c.ref_update])
        self.fresh = []
        if t % c.sample_every == 0:
            indices = batch_indices(t, c.batch_size, len(self.rows), c.seed)
            rows = [self.rows[i] for i in indices for _ in range(c.responses_per_prompt)]
            self.fresh = self.spoil(rows, "segment", t)
        self.metrics = describe(self.fresh, self.run.tokenizer.eos_ids)
        if c.drop_identical:
            self.fresh = [pair for pair in self.fresh if pair.chosen != pair.rejected]
        if self.buffer is None:
            self.picked, self.gone = list(range(len(self.fresh))), self.fresh
            return list(self.fresh)
        self.gone = [old for pair in self.fresh if (old := self.buffer.add(pair)) is not None]
        batch = self.buffer.sample(c.batch_size)
        self.picked = self.buffer.picked
        self.metrics |= self.buffer.metrics
        return batch

    def spoil(self, rows: Sequence[Pair], purpose: str = "eval", t: int = 0) -> list[Pair]:
        """Cuts each gold response, lets the EMA write the segment anew, and splices it in."""
        c, cuts, asked = self.run.config, [], []
        most = c.max_length if c.segment_length == "full" else int(c.segment_length)
        for i, row in enumerate(rows):
            length = min(most, len(row.chosen))
            space = c.max_length - len(row.prompt) - length  # for A, if B' is to fit behind it
            rng = random.Random(hash_seed(c.seed, purpose, "cut", t, i))
            start, stop = choose_segment(len(row.chosen), length, space, rng, c.segment_rule)
            cuts.append((start, stop))
            seed = hash_seed(c.seed, purpose, "sample", t, i)
            asked.append((row.prompt + row.chosen[:start], stop - start, seed))
        pairs, rewrites = [], self.run.generate(self.run.models["ema"], asked)
        for row, (start, stop), (new, logp) in zip(rows, cuts, rewrites, strict=True):
            rejected = splice(row.chosen, start, stop, new, self.run.tokenizer.eos_ids)
            cut = Cut(start, stop, start + len(new), logp)
            pairs.append(Pair(row.prompt, row.chosen, rejected, cut))
        return pairs

    def state_dict(self) -> dict[str, Tensor]:
        """The replay buffer, its counts and ages."""
        return {} if self.buffer is None else self.buffer.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what `state_dict` gave."""
        if self.buffer is not None:
            self.buffer.load_state_dict(state)


class SPIN(Source):
    """Chosen = the gold response; rejected = the opponent's whole response (arXiv 2401.01335).

    The opponent is the policy as it was when the iteration began, and also the reference. From the
    second iteration on, the previous one's pairs are trained on too.
    """

    roles = ("reference",)

    def __init__(self, rows: Sequence[Pair], run: Run) -> None:
        super().__init__(rows, run)
        self.previous: dict[int, Pair] = {}  # by row, of the iteration before
        self.current: dict[int, Pair] = {}

    @staticmethod
    def schedule(rows: int, c: Any) -> list[int]:
        """Each iteration passes over its pairs equally often: the first has one for each row, the
        others two."""
        passes = 2 * c.rounds - 1
        steps = steps_for(passes * rows, c)
        starts = [0]
        for k in range(1, c.rounds):  # each has a step at least, as long as there are steps
            starts.append(max(round(steps * (2 * k - 1) / passes), starts[-1] + 1))
        return [*(start for start in starts if start < steps), steps]

    def before_step(self, t: int) -> list[Pair]:
        """A batch of the iteration's pool: a pair for each row, then the previous iteration's.
        Rows that the opponent has not answered yet in this iteration are answered now."""
        iteration, first, _ = self.stretch(t)
        if iteration > self.round:
            self.round = iteration
            self.previous, self.current = dict(sorted(self.current.items())), {}
            copy_weights(self.run.models["reference"], self.run.models["policy"])
        self.reference_version = self.round
        count, older = len(self.rows), list(self.previous.values())
        key = hash_seed(self.run.config.seed, "spin", self.round)
        size = self.run.config.batch_size
        self.picked = batch_indices(t - first, size, count + len(older), key)
        asked = sorted({i for i in self.picked if i < count} - self.current.keys())
        self.fresh = self.spoil([self.rows[i] for i in asked], [(key, i) for i in asked])
        self.current |= zip(asked, self.fresh, strict=True)
        self.metrics = describe(self.fresh, self.run.tokenizer.eos_ids)
        if self.fresh:  # whatever the gold response's end: answers that were cut at the budget
            self.metrics["segment/unended"] = 1 - self.metrics["segment/ended"]
        self.metrics["spin/iteration"] = float(self.round)
        return [self.current[i] if i < count else older[i - count] for i in self.picked]

    def spoil(self, rows: Sequence[Pair], keys: Sequence[Any] | None = None) -> list[Pair]:
        """The opponent's response to each row's prompt, beside the gold one."""
        c = self.run.config
        keys = [("eval", i) for i in range(len(rows))] if keys is None else keys
        both = zip(rows, keys, strict=True)
        asked = [request(row.prompt, c, hash_seed(c.seed, "opponent", key)) for row, key in both]
        answers = self.run.generate(self.run.models["reference"], asked)
        return [
            Pair(row.prompt, row.chosen, new, Cut(0, len(row.chosen), len(new), logp))
            for row, (new, logp) in zip(rows, answers, strict=True)
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """The pairs of both iterations; the opponent's weights are the reference's."""
        pairs = [*self.previous.values(), *self.current.values()]
        return pack(pairs) | {
            "rows": torch.tensor([*self.previous, *self.current], dtype=torch.int64),
            "previous": torch.tensor([len(self.previous)]),
            "round": torch.tensor([self.round]),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what `state_dict` gave."""
        known = list(zip(state["rows"].tolist(), unpack(state), strict=True))
        split, self.round = int(state["previous"]), int(state["round"])
        self.previous, self.current = dict(known[:split]), dict(known[split:])


def steps_for(rows: int, c: Any) -> int:
    """--steps, or as many as --epochs of so many rows take."""
    return c.steps or max(1, math.ceil(c.epochs * rows / c.batch_size - 1e-9))


def request(prompt: list[int], c: Any, seed: int) -> Request:
    """Asks for a response to a prompt, of as many tokens as it may have."""
    return prompt, min(c.max_new_tokens, c.max_length - len(prompt)), seed


def pack(pairs: Iterable[Pair]) -> dict[str, Tensor]:
    """Pairs as tensors, which safetensors can hold: `tokens` of all sides, `lengths` (N, 3), and
    `bounds` (N, 3) and `logp` (N,) of the cuts, which are -1 and NaN for pairs without one."""
    pairs = list(pairs)
    cuts = [pair.cut or Cut(-1, -1, -1, math.nan) for pair in pairs]
    tokens = [token for pair in pairs for side in pair[:3] for token in side]
    lengths = [[len(side) for side in pair[:3]] for pair in pairs]
    return {
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "lengths": torch.tensor(lengths, dtype=torch.int64).view(-1, 3),
        "bounds": torch.tensor([cut[:3] for cut in cuts], dtype=torch.int64).view(-1, 3),
        "logp": torch.tensor([cut.logp for cut in cuts], dtype=torch.float64),
    }


def unpack(state: Mapping[str, Tensor]) -> list[Pair]:
    """The pairs that `pack` made tensors of."""
    sides = iter(state["tokens"].split(state["lengths"].flatten().tolist()))
    pairs: list[Pair] = []
    for bounds, logp in zip(state["bounds"].tolist(), state["logp"].tolist(), strict=True):
        cut = Cut(*bounds, logp) if bounds[0] >= 0 else None
        pairs.append(Pair(*(side.tolist() for side in itertools.islice(sides, 3)), cut))
    return pairs


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

    def add(self, pair: Pair) -> Pair | None:
        """Stores a pair; where the buffer is full the oldest is dropped, and returned."""
        oldest = self.stored[0].pair if len(self.stored) == self.stored.maxlen else None
        self.stored.append(Stored(pair, 0, self.draws))
        return oldest

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
        """The pairs, how often each was drawn and when it came; the draws so far, and the seed."""
        return pack(item.pair for item in self.stored) | {
            "counts": torch.tensor([item.count for item in self.stored], dtype=torch.int64),
            "born": torch.tensor([item.born for item in self.stored], dtype=torch.int64),
            "draws": torch.tensor([self.draws, self.seed], dtype=torch.int64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what `state_dict` gave; the next draw is the one that would have come next."""
        columns = (unpack(state), state["counts"].tolist(), state["born"].tolist())
        self.stored.clear()
        self.stored.extend(itertools.starmap(Stored, zip(*columns, strict=True)))
        self.draws, self.seed = state["draws"].tolist()


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
    if ours[0].device == theirs[0].device:
        torch._foreach_lerp_(ours, theirs, 1 - decay)
    else:  # the EMA is in host memory, where there is no room for all of the policy too
        for a, b in zip(ours, theirs, strict=True):
            a.lerp_(b.to(a.device), 1 - decay)


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
    not_chosen, not_rejected = (torch.log(-torch.expm1(x)) for x in (chosen, rejected))
    log_odds = (chosen - rejected) - (not_chosen - not_rejected)
    return -lam * F.logsigmoid(log_odds)


def compares(c: Any) -> bool:
    """Whether the loss reads a reference."""
    return c.loss not in (None, "orpo")


def pair_loss(
    c: Any, beta: float, policy: Sequence[Tensor], reference: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss that `c.loss` names: (N,) losses, chosen rewards, rejected rewards.

    `policy` is what `pair_logprobs` gives, `reference` two (N,) tensors that "orpo", and None,
    which is no loss on pairs, do not read. `c.length_normalize` takes log-probs per token in place
    of sums in the loss; the rewards stay those of whole responses.
    """
    chosen, rejected, n_chosen, n_rejected = policy
    if c.loss is None:
        return torch.zeros_like(chosen), chosen.detach(), rejected.detach()
    if c.loss == "orpo":
        means = (chosen / n_chosen, rejected / n_rejected)
        good, bad = (c.orpo_lambda * mean.detach() for mean in means)
        return orpo_loss(*means, c.orpo_lambda), good, bad
    base, other = reference
    losses, *rewards = dpo_loss(chosen, rejected, base, other, beta, c.label_smoothing)
    if c.length_normalize:
        n, m = n_chosen.clamp(min=1), n_rejected.clamp(min=1)
        chosen, rejected, base, other = chosen / n, rejected / m, base / n, other / m
        losses = dpo_loss(chosen, rejected, base, other, beta, c.label_smoothing)[0]
    gap = (chosen - rejected) - (base - other)
    if c.loss == "ipo":  # arXiv 2310.12036, eq. 17: the gap aims at 1 / (2 beta)
        losses = (gap - 1 / (2 * beta)) ** 2
    if c.loss == "hinge":  # SLiC, arXiv 2305.10425, against a reference
        losses = torch.relu(1 - beta * gap)
    return losses, rewards[0], rewards[1]


# ------------------------------------------------------------------------------- what is observed


def describe(fresh: Sequence[Pair], eos_ids: Collection[int]) -> dict[str, float]:
    """Of freshly written segments B': mean lengths, and the shares that equal B (which teach DPO
    nothing), that end the response, and that leave it without an EOS which the chosen one has."""
    both = [(pair, pair.cut) for pair in fresh if pair.cut is not None]
    if not both:
        return {}
    columns = {
        "identical": [pair.chosen == pair.rejected for pair, _ in both],
        "length": [cut.stop - cut.start for _, cut in both],
        "new_length": [cut.new_stop - cut.start for _, cut in both],
        "ended": [ended(pair.rejected[: cut.new_stop], eos_ids) for pair, cut in both],
        "unended": [
            ended(pair.chosen, eos_ids) and not ended(pair.rejected, eos_ids) for pair, _ in both
        ],
    }
    return {f"segment/{name}": sum(values) / len(both) for name, values in columns.items()}


def ended(tokens: Sequence[int], eos_ids: Collection[int]) -> bool:
    """Whether the last token is an EOS."""
    return len(tokens) > 0 and tokens[-1] in eos_ids


def segment_logprobs(pairs: Sequence[Pair], parts: Sequence[Tensor]) -> Tensor:
    """(N, 4) float64: the log-probs of B, of B', of C after B and of C after B'.

    `parts` are the 3N tensors of `pair_token_logprobs`. Zeros for a pair without a cut.
    """
    rows = [torch.zeros(4, dtype=torch.float64, device=parts[0].device)] * len(pairs)
    for i, pair in enumerate(pairs):
        if pair.cut is not None:
            start, stop, new_stop, _ = pair.cut
            shared, *tails = (part.detach().double() for part in parts[3 * i : 3 * i + 3])
            good, bad = (torch.cat((shared, tail)) for tail in tails)
            spans = (good[start:stop], bad[start:new_stop], good[stop:], bad[new_stop:])
            rows[i] = torch.stack([span.sum() for span in spans])
    return torch.stack(rows)


def segment_metrics(pairs: Sequence[Pair], table: Mapping[str, Tensor]) -> dict[str, float]:
    """What rewriting did, in nats per token under the policy, from the columns of a step.

    segment/logps, /new_logps: of B and of B'; seam/logps, /new_logps: of C after B and after B';
    segment/kl: of B' under the model that wrote it, less that under the policy. Pairs whose sides
    are equal count in `segment/kl` alone, those without C not in `seam/`.
    """
    totals: dict[str, tuple[float, int]] = {}

    def add(name: str, logp: float, tokens: int) -> None:
        before = totals.get(name, (0.0, 0))
        totals[name] = (before[0] + logp, before[1] + tokens)

    names = ("segment", "new_segment", "rest", "new_rest")
    columns = [table[f"logps/{name}"].tolist() for name in names]
    for pair, old, new, rest, new_rest in zip(pairs, *columns, strict=True):
        if pair.cut is None:
            continue
        start, stop, new_stop, logp = pair.cut
        add("segment/kl", logp - new, new_stop - start)
        if pair.chosen != pair.rejected:
            add("segment/logps", old, stop - start)
            add("segment/new_logps", new, new_stop - start)
            if stop < len(pair.chosen) and new_stop < len(pair.rejected):
                add("seam/logps", rest, len(pair.chosen) - stop)
                add("seam/new_logps", new_rest, len(pair.rejected) - new_stop)
    return {name: logp / tokens for name, (logp, tokens) in totals.items() if tokens}


# ------------------------------------------------------------------------------------- the flags


@dataclass
class Sampling:
    """Sampling, of the methods that generate.

    [code] is the official SAPO code, [spin] that of SPIN, [ours] our own choice.
    """

    temperature: Weight = 0.7  # [code]; [spin]: 1.0
    "of sampled tokens; 0 is greedy; --method spin alone makes it 1.0"
    top_k: Whole = 50  # [code]; [spin]: all
    "sample among so many tokens; 0: all; --method spin alone makes it 0"
    top_p: Annotated[float, 1e-9, 1.0] = 0.95  # [code]; [spin]: 1.0
    "sample among the likeliest tokens of this total probability; --method spin alone makes it 1.0"
    generate_batch_size: Count = 64  # [ours]
    "rows decoded together on a rank"
    show_every: Whole = 0
    "steps between sampled pairs shown in colour: A, B, B' and C; 0: never"


@dataclass
class Copies:
    """SAPO and SGPO."""

    responses_per_prompt: Annotated[int, 1, 10**4] = 1  # [code]
    "rewrites of each row and step; sgpo: drafts of each training prompt, for phase 1"


@dataclass
class Settings(Copies, Sampling):
    """SAPO."""

    segment_length: str = "256"  # [code]
    "tokens of a regenerated segment, or full; a shorter response is regenerated whole"
    segment_rule: Literal["official", "uniform"] = "official"  # [code]
    "where a segment may start; uniform: also up to the end of the response"
    ema_decay: Share = 0.5  # [code]
    "ema <- decay * ema + (1 - decay) * policy"
    ema_every: Count = 1  # [code]; the paper's text says 2
    "steps between updates of the EMA"
    ema_offload: bool = False
    "keep the EMA in host memory, one process: it is read once a step, to generate"
    replay_capacity: Whole = 2000  # [code], there on each rank
    "pairs in the replay buffer, over all ranks; 0: train on the fresh pairs"
    ref_update: Literal["ema", "policy", "fixed"] = "ema"  # [code]
    "what the reference is refreshed from"
    ref_update_every: Count | None = None  # [code]: 108, its epoch
    "steps between refreshes of the reference, from step 0 on; default: one epoch"
    sample_every: Count = 1  # [code]
    "steps between generations; between them pairs come from the buffer alone"
    drop_identical: bool = False  # [code]
    "keep pairs whose two sides are equal out of the buffer"


@dataclass
class Rounds(Sampling):
    """SPIN and SGPO."""

    rounds: Annotated[int, 1, 10**4] = 1  # [ours]; [spin]: 4
    "spin: iterations, at the beginning of which the opponent becomes the policy, 4 by default; \
sgpo: how often pairs are generated and trained on, --steps each"
    max_new_tokens: Annotated[int, 1, 10**7] = 256  # [spin]
    "tokens of a sampled response, at most"


# -------------------------------------------------------------------------- the papers' settings
# [code]: the official code of SAPO, or of SPIN; [handbook]: the recipes of the alignment handbook,
# from which both papers take their starts and baselines; [ours]: our choice, for want of a source.

OFFICIAL: dict[str, Any] = {  # [code], beyond the flags' defaults, which are its values too
    "method": "sapo", "loss": "dpo", "precision": "bf16",
    "ref_update_every": 108,  # [code]: an epoch of its data
    "replay_capacity": 16000,  # [code]: 2,000 on each of 8 ranks
}  # fmt: skip
OFFICIAL_ORPO: dict[str, Any] = OFFICIAL | {
    "loss": "orpo", "lr": [5e-6], "schedule": "inverse_sqrt", "warmup": 100.0,  # [code]
    "optimizer": "adamw",  # [code]: with its state in 8 bits
}  # fmt: skip
ABLATIONS: dict[str, dict[str, Any]] = {  # the paper's tables, and what its reviewers asked for
    "on-policy": {"ema_decay": 0.0, "replay_capacity": 0},  # neither EMA nor replay
    "no-ema": {"ema_decay": 0.0},
    "no-replay": {"replay_capacity": 0},
    "no-segment": {"segment_length": "full"},
    "fixed-reference": {"ref_update": "fixed"},
    "policy-reference": {"ref_update": "policy"},
}
STARTS: dict[str, Any] = {
    "method": "sft", "loss": None, "precision": "bf16", "optimizer": "adamw",
    "lr": [2e-5], "schedule": "cosine",
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "sapo-llama3-8b": OFFICIAL,
    "sapo-mistral-7b": OFFICIAL,
    "sapo-orpo-llama3-8b": OFFICIAL_ORPO,
    "sapo-orpo-mistral-7b": OFFICIAL_ORPO,
    # The starts of SAPO-DPO and SPIN: Llama 3 on deita-10k, Mistral on UltraChat, which is
    # zephyr-7b-sft-full. Both were trained on packed rows, every token of every turn; here, as in
    # all of this project, on the last response of each row.
    "sft-llama3-8b": STARTS | {"epochs": 3.0, "batch_size": 128},  # [code]
    "sft-mistral-7b": STARTS | {"epochs": 1.0, "batch_size": 128},  # [handbook]
    "spin-mistral-7b": {  # [spin]: the scripts, which override the files' 5e-7, 0.1 and 3 epochs
        "method": "spin", "loss": "dpo", "precision": "bf16", "epochs": 6.0, "max_length": 1024,
        "max_prompt_length": 512, "rounds": 4, "lr": [5e-7, 5e-7, 1e-7, 1e-7],
        "beta": [0.1, 0.1, 0.1, 5.0], "temperature": 1.0, "top_k": 0, "top_p": 1.0,
    },
    "dpo-mistral-7b": {  # [handbook]: zephyr-7b-beta
        "method": "dpo", "loss": "dpo", "precision": "bf16", "epochs": 1.0, "batch_size": 128,
        "beta": [0.01], "schedule": "cosine", "optimizer": "adamw", "max_length": 1024,
        "max_prompt_length": 512,
    },
    "orpo-mistral-7b": {  # [handbook]: mistral-capybara; 8-bit AdamW there, the batch [ours]
        "method": "orpo", "loss": "orpo", "precision": "bf16", "epochs": 3.0, "lr": [5e-6],
        "schedule": "inverse_sqrt", "warmup": 100.0, "optimizer": "adamw",
    },
}  # fmt: skip
RECIPES |= {
    f"{base}-{name}": RECIPES[base] | change
    for base in ("sapo-llama3-8b", "sapo-orpo-llama3-8b")
    for name, change in ABLATIONS.items()
    if not (RECIPES[base]["loss"] == "orpo" and "ref_update" in change)  # it has no reference
}
