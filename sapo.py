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
    3. C keeps a buffer of 2,000 pairs on each rank; ours is one buffer, whatever the ranks
       (`--replay-capacity`).
    4. C counts draws by object identity and loses them on resume; ours are saved with the pairs.
    5. C masks the attention at every EOS in the prompt; ours lets all of the prompt be seen.
    6. C's NLL (ORPO) counts prompt and padding too; ours counts the response.
    7. C's rule never cuts the last three tokens of a long response; `--segment-rule uniform` does.
    8. C's AdamW (ORPO) keeps its state in 8 bits; ours in 32.
    9. C trains in bf16; our weights, gradients, optimizer and EMA are in fp32, and `--precision
       bf16`, which the recipes say, is about the computation.

SPIN (arXiv 2401.01335), with whole responses of an opponent that is frozen for an iteration:

   10. P has learning rates of 5e-7 and then 1e-7, and beta 5.0 in the last iteration; C's files say
       5e-7 and 0.1 in each. `--iteration-lr`, `--iteration-beta`; ours is C's.
   11. C answers all prompts before an iteration; ours those of a step before it: the same pairs.
   12. C makes text of an answer and encodes it again, so that one cut at 256 tokens gets an EOS;
       ours keeps the tokens as they were sampled.

Sources know nothing of files, flags or ranks: a step's pairs are those of the whole global batch,
each draw has a random stream of its own, keyed by (seed, purpose, step, index), and `generate`
comes from the trainer, which may spread its rows over ranks.
"""

import bisect
import contextlib
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Pair
from model import hash_seed

# (model, prompts, most new tokens per row, seed per row[, temperature]) -> new tokens per row, and
# the sums of their log-probs under the model as it is, before temperature and filters
Generate = Callable[..., tuple[list[list[int]], list[float]]]
Phase = Callable[[str], contextlib.AbstractContextManager[Any]]  # times what is within it


class Source(Protocol):
    """What the trainer asks of a method. The attributes are of the last `before_step`."""

    metrics: dict[str, float]
    fresh: list["SegmentPair"]  # the pairs that it made
    picked: list[int]  # where each pair of the batch lies: in the rows, the buffer or the pool
    reference_version: int  # another one whenever the reference has changed

    def before_step(self, t: int) -> list[Pair]:
        """The pairs of the update from policy t to t + 1, of the whole global batch."""

    def eval_pairs(self, rows: Sequence[Pair]) -> list[Pair]:
        """Pairs from held-out rows, made as those for training are, and the same ones if the
        models are the same."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beyond the models' weights."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up what `state_dict` gave."""


@dataclass
class Settings:
    """What the sources of this file can be told. The string under a field says what it is.

    [code] is the official SAPO code, [spin] that of SPIN, [ours] our own choice.
    """

    seed: int = 42  # [code]
    "everything drawn at random follows from it"
    batch_size: int = 64  # [code]
    "pairs per optimizer step, over all ranks"
    max_length: int = 2048  # [code]
    "tokens of prompt and response; longer responses are cut"
    segment_length: str = "256"  # [code]
    "tokens of a regenerated segment, or full; a shorter response is regenerated whole"
    segment_rule: Literal["official", "uniform"] = "official"  # [code]
    "where a segment may start; uniform: also up to the end of the response"
    ema_decay: float = 0.5  # [code]
    "ema <- decay * ema + (1 - decay) * policy"
    ema_every: int = 1  # [code]; the paper's text says 2
    "steps between updates of the EMA"
    replay_capacity: int = 2000  # [code], there on each rank
    "pairs in the replay buffer, over all ranks; 0: train on the fresh pairs"
    ref_update: Literal["ema", "policy", "fixed"] = "ema"  # [code]
    "what the reference is refreshed from"
    ref_update_every: int | None = None  # [code]: 108, its epoch
    "steps between refreshes of the reference, from step 0 on; default: one epoch"
    responses_per_prompt: int = 1  # [code]
    "rewrites of each row and step; sgpo: drafts of each training prompt, for phase 1"
    sample_every: int = 1  # [code]
    "steps between generations; between them pairs come from the buffer alone"
    drop_identical: bool = False  # [code]
    "keep pairs whose two sides are equal out of the buffer"
    iterations: int = 4  # [spin]
    "spin: how often the opponent becomes the policy as it then is"
    max_new_tokens: int = 256  # [spin]
    "spin, sgpo: tokens of a sampled response, at most"


class SAPO:
    """Chosen = the gold response; rejected = the same with a segment rewritten by the EMA.

    Args:
        rows: (prompt, gold response, anything) as token ids; only the first two are read.
        reference: None for a loss without one.
        settings: with `ref_update_every` in steps.
    """

    def __init__(
        self,
        rows: Sequence[Pair],
        policy: nn.Module,
        ema: nn.Module,
        reference: nn.Module | None,
        generate: Generate,
        settings: Settings,
        eos_ids: Sequence[int],
        phase: Phase = contextlib.nullcontext,
    ) -> None:
        self.rows, self.policy, self.ema, self.reference = rows, policy, ema, reference
        self.generate, self.settings, self.phase = generate, settings, phase
        self.eos_ids, capacity = frozenset(eos_ids), settings.replay_capacity
        self.buffer = ReplayBuffer(capacity, settings.seed) if capacity else None
        self.metrics: dict[str, float] = {}
        self.fresh: list[SegmentPair] = []
        self.picked: list[int] = []
        self.reference_version = 0

    def before_step(self, t: int) -> list[Pair]:
        """EMA, reference, fresh pairs into the buffer, a batch out of it. The order matters."""
        c = self.settings
        if t > 0 and t % c.ema_every == 0:
            with self.phase("ema"):
                ema_update(self.ema, self.policy, c.ema_decay)
        every = c.ref_update_every or 1
        due = c.ref_update != "fixed" and t % every == 0
        self.reference_version = 0 if c.ref_update == "fixed" else t // every
        if self.reference is not None and due:
            copy_weights(self.reference, self.ema if c.ref_update == "ema" else self.policy)
        self.fresh = []
        if t % c.sample_every == 0:
            indices = batch_indices(t, c.batch_size, len(self.rows), c.seed)
            rows = [self.rows[i] for i in indices for _ in range(c.responses_per_prompt)]
            self.fresh = self.rewrite(rows, "segment", t)
        self.metrics = describe(self.fresh)
        if self.fresh:
            ended = sum(len(pair.rejected) == pair.bounds[2] for pair in self.fresh)
            self.metrics["segment/ended"] = ended / len(self.fresh)
        if c.drop_identical:
            self.fresh = [pair for pair in self.fresh if pair.chosen != pair.rejected]
        if self.buffer is None:
            self.picked = list(range(len(self.fresh)))
            return list(self.fresh)
        for pair in self.fresh:
            self.buffer.add(pair)
        batch = self.buffer.sample(c.batch_size)
        self.picked = self.buffer.picked
        self.metrics |= self.buffer.metrics
        return batch

    def rewrite(self, rows: Sequence[Pair], purpose: str, t: int) -> list["SegmentPair"]:
        """Cuts each gold response, lets the EMA write the segment anew, and splices it in."""
        c, cuts, prompts = self.settings, [], []
        most = c.max_length if c.segment_length == "full" else int(c.segment_length)
        for i, (prompt, gold, _) in enumerate(rows):
            length = min(most, len(gold))
            space = c.max_length - len(prompt) - length  # for A, if B' is to fit behind it
            rng = random.Random(hash_seed(c.seed, purpose, "cut", t, i))
            cuts.append(choose_segment(len(gold), length, space, rng, c.segment_rule))
            prompts.append(prompt + gold[: cuts[-1][0]])
        budgets = [stop - start for start, stop in cuts]
        seeds = [hash_seed(c.seed, purpose, "sample", t, i) for i in range(len(rows))]
        rewrites, logps = self.generate(self.ema, prompts, budgets, seeds)
        pairs = []
        for row, (start, stop), new, logp in zip(rows, cuts, rewrites, logps, strict=True):
            rejected = splice(row.chosen, start, stop, new, self.eos_ids)
            bounds = (start, stop, start + len(new))
            pairs.append(SegmentPair(Pair(row.prompt, row.chosen, rejected), bounds, logp))
        return pairs

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


class SPIN:
    """Chosen = the gold response; rejected = the opponent's whole response (arXiv 2401.01335).

    The opponent is the policy as it was when the iteration began, and also the reference. From the
    second iteration on, the previous one's pairs are trained on too.

    Args:
        rows: (prompt, gold response, anything) as token ids; only the first two are read.
        bounds: the step at which each iteration begins, as `spin_starts` gives them, and then the
            last one's end.
    """

    def __init__(
        self,
        rows: Sequence[Pair],
        policy: nn.Module,
        opponent: nn.Module,
        generate: Generate,
        settings: Settings,
        bounds: Sequence[int],
    ) -> None:
        self.rows, self.policy, self.opponent, self.generate = rows, policy, opponent, generate
        self.settings, self.bounds = settings, bounds
        self.iteration = 0
        self.previous: dict[int, SegmentPair] = {}  # by row, of the iteration before
        self.current: dict[int, SegmentPair] = {}
        self.metrics: dict[str, float] = {}
        self.fresh: list[SegmentPair] = []
        self.picked: list[int] = []
        self.reference_version = 0

    def before_step(self, t: int) -> list[Pair]:
        """A batch of the iteration's pool: a pair for each row, then the previous iteration's.
        Rows that the opponent has not answered yet in this iteration are answered now."""
        iteration = bisect.bisect_right(self.bounds, t) - 1
        if iteration > self.iteration:
            self.iteration = iteration
            self.previous, self.current = dict(sorted(self.current.items())), {}
            copy_weights(self.opponent, self.policy)
        self.reference_version = self.iteration
        count, older = len(self.rows), list(self.previous.values())
        key = hash_seed(self.settings.seed, "spin", self.iteration)
        at, size = t - self.bounds[iteration], self.settings.batch_size
        self.picked = batch_indices(at, size, count + len(older), key)
        missing = {i for i in self.picked if i < count} - self.current.keys()
        asked = sorted(missing)
        self.fresh = self.respond([self.rows[i] for i in asked], [(key, i) for i in asked])
        self.current |= zip(asked, self.fresh, strict=True)
        self.metrics = describe(self.fresh) | {"spin/iteration": float(self.iteration)}
        return [self.current[i] if i < count else older[i - count] for i in self.picked]

    def respond(self, rows: Sequence[Pair], keys: Sequence[Any]) -> list["SegmentPair"]:
        """The opponent's response to each row's prompt, beside the gold one."""
        c, prompts = self.settings, [row.prompt for row in rows]
        seeds = [hash_seed(c.seed, "opponent", key) for key in keys]
        answers, logps = self.generate(self.opponent, prompts, budgets(prompts, c), seeds)
        return [
            SegmentPair(row._replace(rejected=new), (0, len(row.chosen), len(new)), logp)
            for row, new, logp in zip(rows, answers, logps, strict=True)
        ]

    def eval_pairs(self, rows: Sequence[Pair]) -> list[Pair]:
        """Rows with a rejected side keep it; the others get the opponent's response."""
        bare = [row for row in rows if not row.rejected]
        answered = self.respond(bare, [("eval", i) for i in range(len(bare))])
        return [*(row for row in rows if row.rejected), *answered]

    def state_dict(self) -> dict[str, Tensor]:
        """The pairs of both iterations; the opponent's weights are the reference's."""
        pairs = [*self.previous.values(), *self.current.values()]
        return pack(pairs) | {
            "rows": torch.tensor([*self.previous, *self.current], dtype=torch.int64),
            "previous": torch.tensor([len(self.previous)]),
            "iteration": torch.tensor([self.iteration]),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up what `state_dict` gave."""
        known: list[Any] = list(zip(state["rows"].tolist(), unpack(state), strict=True))
        split, self.iteration = int(state["previous"]), int(state["iteration"])
        self.previous, self.current = dict(known[:split]), dict(known[split:])


def budgets(prompts: Sequence[Sequence[int]], settings: Settings) -> list[int]:
    """The most tokens that a response to each prompt may have."""
    return [min(settings.max_new_tokens, settings.max_length - len(p)) for p in prompts]


def spin_starts(steps: int, iterations: int) -> list[int]:
    """When each iteration of SPIN begins, so that each passes over its pairs equally often: the
    first has one for each row, the others two."""
    starts = [0]
    for k in range(1, iterations):  # each has a step at least, as long as there are steps
        start = round(steps * (2 * k - 1) / (2 * iterations - 1))
        starts.append(max(start, starts[-1] + 1))
    return [start for start in starts if start < steps]


class SegmentPair(Pair):
    """A Pair that knows its cut: chosen[start:stop] is B, rejected[start:new_stop] is B'.

    `bounds` is (start, stop, new_stop), `logp` the log-prob of B' under the model that wrote it.
    """

    bounds: tuple[int, int, int]
    logp: float

    def __new__(cls, pair: Pair, bounds: tuple[int, int, int], logp: float) -> "SegmentPair":
        self = super().__new__(cls, *pair)
        self.bounds, self.logp = bounds, logp
        return self

    def _replace(self, **changes: Any) -> Pair:  # type: ignore[override]
        """A plain pair: a cut is true of these tokens alone."""
        return Pair(*self)._replace(**changes)


def pack(pairs: Iterable[Pair]) -> dict[str, Tensor]:
    """Pairs as tensors, which safetensors can hold: `tokens` of all sides, `lengths` (N, 3), and
    `bounds` (N, 3) and `logp` (N,), which are -1 and NaN for pairs without a cut."""
    pairs = list(pairs)
    tokens = [token for pair in pairs for side in pair for token in side]
    bounds = [getattr(pair, "bounds", (-1, -1, -1)) for pair in pairs]
    logps = [getattr(pair, "logp", math.nan) for pair in pairs]
    return {
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "lengths": torch.tensor([[*map(len, p)] for p in pairs], dtype=torch.int64).view(-1, 3),
        "bounds": torch.tensor(bounds, dtype=torch.int64).view(-1, 3),
        "logp": torch.tensor(logps, dtype=torch.float64),
    }


def unpack(state: dict[str, Tensor]) -> list[Pair]:
    """The pairs that `pack` made tensors of."""
    sides = iter(state["tokens"].split(state["lengths"].flatten().tolist()))
    pairs: list[Pair] = []
    for bounds, logp in zip(state["bounds"].tolist(), state["logp"].tolist(), strict=True):
        pair = Pair(*(side.tolist() for side in itertools.islice(sides, 3)))
        pairs.append(pair if bounds[0] < 0 else SegmentPair(pair, tuple(bounds), logp))
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
        """The pairs, how often each was drawn and when it came, and the draws so far."""
        return pack(item.pair for item in self.stored) | {
            "counts": torch.tensor([item.count for item in self.stored], dtype=torch.int64),
            "born": torch.tensor([item.born for item in self.stored], dtype=torch.int64),
            "draws": torch.tensor([self.draws], dtype=torch.int64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up what `state_dict` gave; the next draw is the one that would have come next."""
        columns = (unpack(state), state["counts"].tolist(), state["born"].tolist())
        self.stored.clear()
        self.stored.extend(itertools.starmap(Stored, zip(*columns, strict=True)))
        self.draws = int(state["draws"])


class Static:
    """The data set's own rows, as they are: `sft` (no rejected side), `dpo` and `orpo`."""

    def __init__(self, rows: Sequence[Pair], settings: Settings) -> None:
        self.rows, self.settings = rows, settings
        self.metrics: dict[str, float] = {}
        self.fresh: list[SegmentPair] = []
        self.picked: list[int] = []
        self.reference_version = 0

    def before_step(self, t: int) -> list[Pair]:
        """The batch's rows."""
        c = self.settings
        self.picked = batch_indices(t, c.batch_size, len(self.rows), c.seed)
        return [self.rows[i] for i in self.picked]

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
    length_normalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss by its name: (N,) losses, chosen rewards, rejected rewards.

    `policy` and `reference` are what `pair_logprobs` gives; "orpo", and None, which is no loss on
    pairs, read no reference. `length_normalize` takes log-probs per token in place of sums in the
    loss; the rewards stay those of whole responses.
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
    if length_normalize:
        n, m = n_chosen.clamp(min=1), n_rejected.clamp(min=1)
        chosen, rejected, base, other = chosen / n, rejected / m, base / n, other / m
        losses = dpo_loss(chosen, rejected, base, other, beta, label_smoothing)[0]
    gap = (chosen - rejected) - (base - other)
    if kind == "ipo":  # arXiv 2310.12036, eq. 17: the gap aims at 1 / (2 beta)
        losses = (gap - 1 / (2 * beta)) ** 2
    if kind == "hinge":  # SLiC, arXiv 2305.10425, against a reference
        losses = torch.relu(1 - beta * gap)
    return losses, rewards[0], rewards[1]


# ------------------------------------------------------------------------------- what is observed


def describe(fresh: Sequence[SegmentPair]) -> dict[str, float]:
    """Shares and mean lengths of freshly written segments; identical ones teach DPO nothing."""
    count = len(fresh)
    if not count:
        return {}
    return {
        "segment/identical": sum(p.chosen == p.rejected for p in fresh) / count,
        "segment/length": sum(p.bounds[1] - p.bounds[0] for p in fresh) / count,
        "segment/new_length": sum(p.bounds[2] - p.bounds[0] for p in fresh) / count,
    }


def segment_logprobs(pairs: Sequence[Pair], parts: Sequence[Tensor]) -> Tensor:
    """(N, 4) float64: the log-probs of B, of B', of C after B and of C after B'.

    `parts` are the 3N tensors of `pair_token_logprobs`. Zeros for a pair without a cut.
    """
    total = F.pad(torch.cat(list(parts)).detach().double().cumsum(0), (1, 0))  # of the first m
    points, at = [], 0  # six a pair, each as two places in `total` that add up to it
    for i, pair in enumerate(pairs):
        places = [(0, 0)] * 6
        if isinstance(pair, SegmentPair):
            (start, stop, new_stop), length = pair.bounds, len(pair.chosen)
            places = [(at + place, 0) for place in (start, stop, length)]
            shared = len(parts[3 * i])  # what is behind it in the rejected lies behind the chosen
            for place in (start, new_stop, len(pair.rejected)):
                behind = max(place - shared, 0)
                places.append((at + place - behind, at + length + behind))
        points.append(places)
        at += sum(map(len, parts[3 * i : 3 * i + 3]))
    reached = total[torch.tensor(points, device=total.device)].sum(-1)  # (N, 6)
    old, rest, new, new_rest = reached.diff()[:, [0, 1, 3, 4]].unbind(1)
    return torch.stack((old, new, rest, new_rest), dim=1)


def segment_metrics(pairs: Sequence[Pair], logps: Tensor) -> dict[str, float]:
    """What rewriting did, in nats per token, from `segment_logprobs` under the policy.

    Pairs whose sides are equal count in `segment/kl` alone, those without C not in `seam/`.
    """
    totals: dict[str, tuple[float, int]] = {}

    def add(name: str, logp: float, tokens: int) -> None:
        before = totals.get(name, (0.0, 0))
        totals[name] = (before[0] + logp, before[1] + tokens)

    for pair, (old, new, rest, new_rest) in zip(pairs, logps.tolist(), strict=True):
        if not isinstance(pair, SegmentPair):
            continue
        start, stop, new_stop = pair.bounds
        add("segment/kl", pair.logp - new, new_stop - start)
        if pair.chosen != pair.rejected:
            add("segment/logps", old, stop - start)
            add("segment/new_logps", new, new_stop - start)
            if stop < len(pair.chosen) and new_stop < len(pair.rejected):
                add("seam/logps", rest, len(pair.chosen) - stop)
                add("seam/new_logps", new_rest, len(pair.rejected) - new_stop)
    return {name: logp / tokens for name, (logp, tokens) in totals.items() if tokens}


class Drift:
    """How far the chosen responses' log-probs have moved since each row was first trained on."""

    def __init__(self) -> None:
        self.first: dict[int, float] = {}  # by a digest of prompt and chosen

    def observe(self, pairs: Sequence[Pair], logps: Sequence[float]) -> dict[str, float]:
        """Takes the summed log-probs of a batch's chosen; the mean drift of rows met before."""
        keys = [hash_seed(pair.prompt, pair.chosen) for pair in pairs]
        both = list(zip(keys, logps, strict=True))
        moved = [logp - self.first[key] for key, logp in both if key in self.first]
        for key, logp in both:
            if math.isfinite(logp):
                self.first.setdefault(key, logp)
        return {"logps/chosen_drift": sum(moved) / len(moved)} if moved else {}

    def state_dict(self) -> dict[str, Tensor]:
        """The first log-prob of each row met so far."""
        return {
            "keys": torch.tensor([*self.first], dtype=torch.int64),
            "logps": torch.tensor([*self.first.values()], dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up what `state_dict` gave."""
        self.first = dict(zip(state["keys"].tolist(), state["logps"].tolist(), strict=True))


# -------------------------------------------------------------------------- the papers' settings
# [code]: the official code of SAPO, or of SPIN; [handbook]: the recipes of the alignment handbook,
# from which both papers take their starts and baselines; [ours]: our choice, for want of a source.

OFFICIAL: dict[str, Any] = {  # [code], beyond the flags' defaults, which are its values too
    "method": "sapo", "loss": "dpo", "precision": "bf16",
    "ref_update_every": 108,  # [code]: an epoch of its data
    "replay_capacity": 16000,  # [code]: 2,000 on each of 8 ranks
}  # fmt: skip
OFFICIAL_ORPO: dict[str, Any] = OFFICIAL | {
    "loss": "orpo", "lr": 5e-6, "schedule": "inverse_sqrt", "warmup": 100.0,  # [code]
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
SFT: dict[str, Any] = {
    "method": "sft", "loss": None, "precision": "bf16", "optimizer": "adamw",
    "lr": 2e-5, "schedule": "cosine",
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "sapo-llama3-8b": OFFICIAL,
    "sapo-mistral-7b": OFFICIAL,
    "sapo-orpo-llama3-8b": OFFICIAL_ORPO,
    "sapo-orpo-mistral-7b": OFFICIAL_ORPO,
    # The starts of SAPO-DPO and SPIN: Llama 3 on deita-10k, Mistral on UltraChat, which is
    # zephyr-7b-sft-full. The batch of the first is [ours], the rest of it [code].
    "sft-llama3-8b": SFT | {"epochs": 3.0},
    "sft-mistral-7b": SFT | {"epochs": 1.0, "batch_size": 128},  # [handbook]
    "spin-mistral-7b": {  # [code], and four iterations, as the paper has them
        "method": "spin", "loss": "dpo", "precision": "bf16", "epochs": 3.0, "max_length": 1024,
        "max_prompt_length": 512, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "iterations": 4,
    },
    "dpo-mistral-7b": {  # [handbook]: zephyr-7b-beta
        "method": "dpo", "loss": "dpo", "precision": "bf16", "epochs": 1.0, "batch_size": 128,
        "beta": 0.01, "schedule": "cosine", "optimizer": "adamw", "max_length": 1024,
        "max_prompt_length": 512,
    },
    "orpo-mistral-7b": {  # [handbook]: mistral-capybara; 8-bit AdamW there, the batch [ours]
        "method": "orpo", "loss": "orpo", "precision": "bf16", "epochs": 3.0, "lr": 5e-6,
        "schedule": "inverse_sqrt", "warmup": 100.0, "optimizer": "adamw",
    },
}  # fmt: skip
RECIPES |= {
    f"{base}-{name}": RECIPES[base] | change
    for base in ("sapo-llama3-8b", "sapo-orpo-llama3-8b")
    for name, change in ABLATIONS.items()
    if not (RECIPES[base]["loss"] == "orpo" and "ref_update" in change)  # it has no reference
}
