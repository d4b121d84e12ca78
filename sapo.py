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

`SAPO.before_step` is 1 to 4, the trainer does 5. Against the paper (P) and the official code (C):

    1. P updates the EMA every 2 steps, C every step; ours is C's (`--ema-every`).
    2. C refreshes the reference every 108 steps, its epoch; ours once an epoch of the data at hand.
    3. C keeps a buffer of 2,000 pairs on each rank; ours is one buffer, whatever the ranks.
    4. C counts draws by object identity and loses them on resume; ours are saved with the pairs.
    5. C masks the attention at every EOS, of prompt and response, scores the assistant's header
       with the response, and counts prompt and padding in ORPO's NLL; ours does none of it.
    6. C never cuts a long response's last three tokens, its template's closers; ours its one, EOS.
    7. Of a response too long for the room C always cuts the last tokens out; ours draws as ever.
    8. C computes in bf16, EMA and reference too, on fp32 master weights (DeepSpeed), AdamW's state
       in 8 bits (ORPO), most likely unclipped; ours in fp32 or bf16 (`--precision`), clipped at 1.
    9. SPIN answers an iteration's prompts before it, behind "### Instruction: ..."; ours a step's,
       the same, by its template. SPIN encodes an answer again: cut at 256 tokens it gets an EOS.

Sources know nothing of files, flags or ranks: a step's pairs are those of the whole global batch,
and each draw has a random stream of its own, keyed by (seed, purpose, step, index).
"""

import math
import random
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Cut, Ids, Pair, Tokenizer
from model import Count, Share, Weight, Whole, hash_seed

Request = tuple[Ids, int, int]  # a prompt, the most new tokens, a seed
Answer = tuple[Ids, float]  # new tokens, and their log-prob under the model, unfiltered


class Run(Protocol):
    """What a source may use of the run; the trainer's learner is one."""

    config: Any
    models: dict[str, Any]  # "policy"; "ema" and "reference" where `Source.roles` asks for them
    tokenizer: Tokenizer

    def clock(self, name: str) -> Any:
        """A context manager: times what is within it."""

    def generate(
        self, model: Any, asked: list[Request], temperature: float | None = None, keep: bool = False
    ) -> list[Answer]:
        """Samples answers; `keep`: what a run has when it is stopped is there when it goes on."""

    def sums(self, model: Any, pairs: Sequence[Pair]) -> list[tuple[float, ...]]:
        """The summed log-probs of chosen and of rejected under a model, for each pair."""


class Source:
    """Where a step's pairs come from; as it stands, the rows as they are (`dpo`, `orpo`). A method
    overrides `before_step`, and what else differs. `rows` are (prompt, gold response, rejected) as
    token ids; the attributes tell of the last `before_step`."""

    roles: tuple[str, ...] = ()  # copies of the start that it needs, beside the loss's reference

    def __init__(self, rows: Sequence[Any], run: Run) -> None:
        self.rows, self.run = rows, run
        self.bounds = self.schedule(len(rows), run.config)
        self.round, self.reference_version = -1, 0  # the stretch begun; new where the reference is
        self.pool: dict[int, Pair] = {}  # the stretch's pairs by place, where they are its own
        self.metrics: dict[str, float] = {}
        self.fresh: list[Pair] = []  # the pairs that it made
        self.picked: list[int] = []  # where each pair lies: in the rows, the buffer or the pool
        self.gone: list[Pair] = []  # pairs that cannot come again
        self.made: list[dict[str, Any]] = []  # rows to be written down, as text

    @staticmethod
    def schedule(rows: int, c: Any) -> list[int]:
        """The first steps of stretches with an optimizer of their own (SPIN, SGPO), and the end."""
        return [0, steps_for(rows, c)]

    def stretch(self, t: int) -> tuple[int, int, int]:
        """The number, first step and end of the stretch that step t is in."""
        number = sum(start <= t for start in self.bounds[:-1]) - 1
        return number, self.bounds[number], self.bounds[number + 1]

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
        numbers = {"places": torch.tensor([*self.pool]), "round": torch.tensor([self.round])}
        return pack([*self.pool.values()]) | numbers

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.pool = dict(zip(state["places"].tolist(), unpack(state), strict=True))
        self.round = int(state["round"])


class SAPO(Source):
    """Chosen = the gold response; rejected = the same with a segment rewritten by the EMA."""

    roles = ("ema",)

    def __init__(self, rows: Sequence[Pair], run: Run) -> None:
        super().__init__(rows, run)
        self.buffer = ReplayBuffer(run.config.replay_capacity, run.config.seed)

    def before_step(self, t: int) -> list[Pair]:
        """EMA, reference, fresh pairs into the buffer, a batch out of it. The order matters."""
        c, models = self.run.config, self.run.models
        if t > 0 and t % c.ema_every == 0:
            with self.run.clock("ema"):
                ema_update(models["ema"], models["policy"], c.ema_decay)
        if compares(c) and c.ref_update != "fixed":
            every = c.ref_update_every or math.ceil(len(self.rows) / c.batch_size)  # one epoch
            self.reference_version = t // every
            if t % every == 0:
                copy_weights(models["reference"], models[c.ref_update])
        self.fresh = []
        if t % c.sample_every == 0:
            self.fresh = self.spoil(super().before_step(t) * c.responses_per_prompt, "segment", t)
        self.metrics = describe(self.fresh, self.run.tokenizer.eos_ids)
        if c.drop_identical:
            self.fresh = [pair for pair in self.fresh if pair.chosen != pair.rejected]
        if not c.replay_capacity:  # first rewrites, then second ones, as many as a batch has
            self.gone = self.fresh[: c.batch_size]
            self.picked = list(range(len(self.gone)))
            return list(self.gone)
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
            space = c.max_length - len(row.prompt) - min(most, len(row.chosen))  # for A, with B'
            rng = random.Random(hash_seed(c.seed, purpose, "cut", t, i))
            start, stop = choose_segment(len(row.chosen), most, space, rng, c.segment_rule)
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
        return self.buffer.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.buffer.load_state_dict(state)


class SFT(Source):
    """The rows without a rejected side."""

    def __init__(self, rows: Sequence[Pair], run: Run) -> None:
        super().__init__([Pair(row.prompt, row.chosen, []) for row in rows], run)


class SPIN(Source):
    """Chosen = the gold response; rejected = the opponent's whole response (arXiv 2401.01335).
    The opponent, also the reference, is the policy as it was when the iteration began. Its pool has
    a pair for each row, and behind them those of the iteration before."""

    roles = ("reference",)

    @staticmethod
    def schedule(rows: int, c: Any) -> list[int]:
        """Each iteration passes over its pool equally often: the first's is half as large."""
        passes = 2 * c.rounds - 1
        steps = steps_for(passes * rows, c)
        starts = [max(round(steps * (2 * k - 1) / passes), k) for k in range(c.rounds)]
        return [*(start for start in starts if start < steps), steps]  # a step each at the least

    def before_step(self, t: int) -> list[Pair]:
        """A batch of the pool, whose rows the opponent answers as they come up."""
        c, count = self.run.config, len(self.rows)
        iteration, first, _ = self.stretch(t)
        if iteration > self.round:
            answered = [self.pool[i] for i in sorted(self.pool) if i < count]
            self.round, self.pool = iteration, dict(enumerate(answered, count))
            copy_weights(self.run.models["reference"], self.run.models["policy"])
        self.reference_version = self.round
        older = [i for i in self.pool if i >= count]
        key = hash_seed(c.seed, "spin", self.round)
        self.picked = batch_indices(t - first, c.batch_size, count + len(older), key)
        asked = sorted(set(self.picked) - self.pool.keys())
        self.fresh = self.spoil([self.rows[i] for i in asked], [(key, i) for i in asked])
        self.pool |= zip(asked, self.fresh, strict=True)
        self.metrics = {"spin/iteration": float(self.round)}
        self.metrics |= describe(self.fresh, self.run.tokenizer.eos_ids)
        if self.fresh:  # whatever the gold response's end: answers that were cut at the budget
            self.metrics["segment/unended"] = 1 - self.metrics["segment/ended"]
        return [self.pool[i] for i in self.picked]

    def spoil(self, rows: Sequence[Pair], keys: Sequence[Any] = ()) -> list[Pair]:
        """The opponent's response to each row's prompt, beside the gold one."""
        c, keys = self.run.config, keys or [("eval", i) for i in range(len(rows))]
        both = zip(rows, keys, strict=True)
        asked = [request(row.prompt, c, hash_seed(c.seed, "opponent", key)) for row, key in both]
        answers = self.run.generate(self.run.models["reference"], asked)
        return [
            Pair(row.prompt, row.chosen, new, Cut(0, len(row.chosen), len(new), logp))
            for row, (new, logp) in zip(rows, answers, strict=True)
        ]


def steps_for(rows: int, c: Any) -> int:
    """--steps, or as many as --epochs of so many rows take."""
    return c.steps or max(1, math.ceil(c.epochs * rows / c.batch_size - 1e-9))


def request(prompt: list[int], c: Any, seed: int) -> Request:
    """Asks for a response to a prompt, of as many tokens as it may have."""
    return prompt, min(c.max_new_tokens, c.max_length - len(prompt)), seed


def choose_segment(
    response_len: int, segment_len: int, max_start: int, rng: random.Random, rule: str = "official"
) -> tuple[int, int]:
    """Where to cut a response, in tokens: [start, stop) of L = min(segment_len, response_len).
    "official": start is uniform in [0, min(response_len - 1 - L, max_start)], or 0 where that is
    empty; "uniform": the same without the 1. `max_start` is the space that --max-length leaves."""
    length = min(segment_len, response_len)
    latest = response_len - length - (1 if rule == "official" else 0)
    start = rng.randint(0, max(0, min(latest, max_start)))
    return start, start + length


def splice(response: Ids, start: int, stop: int, regenerated: Ids, eos_ids: Collection[int]) -> Ids:
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
    `metrics` describes the last draw: size, mean age in draws (0 is fresh), mean earlier draws."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.stored: deque[Stored] = deque(maxlen=capacity)
        self.seed, self.draws = seed, 0
        self.picked, self.metrics = list[int](), dict[str, float]()  # places, 0 the oldest

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
        """The pairs; (N, 2) how often each was drawn and when it came; the draws, and the seed."""
        history = torch.tensor([(item.count, item.born) for item in self.stored]).view(-1, 2)
        draws = torch.tensor([self.draws, self.seed])
        return pack([item.pair for item in self.stored]) | {"history": history, "draws": draws}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what `state_dict` gave; the next draw is the one that would have come next."""
        both = zip(unpack(state), state["history"].tolist(), strict=True)
        self.stored = deque((Stored(pair, *history) for pair, history in both), self.stored.maxlen)
        self.draws, self.seed = state["draws"].tolist()


def pack(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Pairs as tensors, which safetensors can hold: `tokens` of all sides, `lengths` (N, 3), and
    `bounds` (N, 3) and `logp` (N,) of the cuts, which are -1 and NaN for pairs without one."""
    cuts = [pair.cut or Cut(-1, -1, -1, math.nan) for pair in pairs]
    sides = [side for pair in pairs for side in pair[:3]]
    return {
        "tokens": torch.tensor([x for side in sides for x in side], dtype=torch.int32),
        "lengths": torch.tensor([len(side) for side in sides], dtype=torch.int64).view(-1, 3),
        "bounds": torch.tensor([cut[:3] for cut in cuts], dtype=torch.int64).view(-1, 3),
        "logp": torch.tensor([cut.logp for cut in cuts], dtype=torch.float64),
    }


def unpack(state: Mapping[str, Tensor]) -> list[Pair]:
    """The pairs that `pack` made tensors of."""
    sides = [x.tolist() for x in state["tokens"].split(state["lengths"].flatten().tolist())]
    columns = zip(state["bounds"].tolist(), state["logp"].tolist(), strict=True)
    cuts = [Cut._make([*bounds, logp]) if bounds[0] >= 0 else None for bounds, logp in columns]
    return [Pair._make([*sides[3 * i : 3 * i + 3], cut]) for i, cut in enumerate(cuts)]


def batch_indices(t: int, batch_size: int, rows: int, seed: int) -> list[int]:
    """The rows of step t. Batches run on across epochs, each epoch a permutation of its own."""
    places = range(t * batch_size, (t + 1) * batch_size)
    return [_permutation(rows, seed, place // rows)[place % rows] for place in places]


@lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> list[int]:
    return random.Random(hash_seed(seed, "order", epoch)).sample(range(rows), rows)


@torch.no_grad()
def ema_update(ema: nn.Module, policy: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * policy, matched by name, in the EMA's own type (fp32). One
    in (pinned) host memory goes through the policy's device, a parameter at a time."""
    named = dict(policy.named_parameters())
    ours, theirs = zip(*((a, named[name]) for name, a in ema.named_parameters()), strict=True)
    if ours[0].device == theirs[0].device:
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        return
    for a, b in zip(ours, theirs, strict=True):
        there = a.to(b.device, non_blocking=True)
        torch._foreach_lerp_([there], [b], 1 - decay)
        a.copy_(there, non_blocking=a is not ours[-1])  # the last one waits for all


@torch.no_grad()
def copy_weights(into: nn.Module, source: nn.Module) -> None:
    """into <- source, matched by name."""
    theirs = dict(source.named_parameters())
    for name, ours in into.named_parameters():  # DTensor has no _foreach_copy_
        ours.copy_(theirs[name])


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
    beta: float = 0.1, label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """DPO (arXiv 2305.18290, eq. 7), with cDPO's smoothing, of (N,) summed log-probs: (N,) losses,
    chosen and rejected rewards (eq. 5; the partition function cancels), which carry no gradient."""
    logits = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
    right, wrong = F.logsigmoid(beta * logits), F.logsigmoid(-beta * logits)
    losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    rewards = (beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected))
    return losses, rewards[0].detach(), rewards[1].detach()


def orpo_loss(chosen_mean_logp: Tensor, rejected_mean_logp: Tensor, lam: float = 0.05) -> Tensor:
    """ORPO's odds-ratio term (arXiv 2403.07691, eq. 7) on two (N,) mean log-probs per token. (N,).
    The odds p / (1 - p) of a probability within 1e-6 of 1 are those at that distance."""
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
    `policy` is what `pair_logprobs` gives, `reference` two (N,) tensors that "orpo", and None, no
    loss on pairs, do not read. `c.length_normalize` is for the loss; rewards stay whole sums."""
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


def describe(fresh: Sequence[Pair], eos_ids: Collection[int]) -> dict[str, float]:
    """Of freshly written segments B': mean lengths, and the shares that equal B (which teach DPO
    nothing), that end the response, and that leave it without an EOS which the chosen one has;
    tokens/per_useful_pair: written in all, for each pair whose sides differ."""
    both = [(pair, pair.cut) for pair in fresh if pair.cut]
    columns: dict[str, list[int]] = {
        "identical": [pair.chosen == pair.rejected for pair, _ in both],
        "length": [cut.stop - cut.start for _, cut in both],
        "new_length": [cut.new_stop - cut.start for _, cut in both],
        "ended": [ended(pair.rejected[: cut.new_stop], eos_ids) for pair, cut in both],
        "unended": [ended(x.chosen, eos_ids) and not ended(x.rejected, eos_ids) for x, _ in both],
    }
    told = {f"segment/{name}": sum(x) / len(x) for name, x in columns.items() if x}
    if useful := columns["identical"].count(False):
        told["tokens/per_useful_pair"] = sum(columns["new_length"]) / useful
    return told


def ended(tokens: Sequence[int], eos_ids: Collection[int]) -> bool:
    return len(tokens) > 0 and tokens[-1] in eos_ids


def segment_logprobs(pairs: Sequence[Pair], parts: Sequence[Tensor]) -> Tensor:
    """(N, 4) float64: the log-probs of B, of B', of C after B and of C after B'; zeros where there
    is no cut. `parts` are the 3N tensors of `pair_token_logprobs`."""
    sums = torch.zeros(len(pairs), 4, dtype=torch.float64, device=parts[0].device)
    for i, pair in enumerate(pairs):
        if pair.cut:
            start, stop, new_stop, _ = pair.cut
            shared, *tails = (part.detach().double() for part in parts[3 * i : 3 * i + 3])
            good, bad = (torch.cat((shared, tail)) for tail in tails)
            spans = (good[start:stop], bad[start:new_stop], good[stop:], bad[new_stop:])
            sums[i] = torch.stack([span.sum() for span in spans])
    return sums


def segment_metrics(pairs: Sequence[Pair], table: Mapping[str, Tensor]) -> dict[str, float]:
    """What rewriting did, in nats per token under the policy, from the columns of a step.
    segment/logps, /new_logps: of B and of B'; seam/logps, /new_logps: of C after B and after B';
    segment/kl: of B' under the model that wrote it, less that under the policy. Pairs whose sides
    are equal count in segment/kl alone, those without C not in seam/."""
    names = ("segment", "new_segment", "rest", "new_rest")
    old, new, rest, new_rest = (table[f"logps/{name}"] for name in names)
    cuts = torch.tensor([pair.cut or (0, 0, 0, 0) for pair in pairs], dtype=torch.float64)
    start, stop, new_stop, logp = cuts.view(-1, 4).unbind(1)
    differs = torch.tensor([bool(pair.cut) and pair.chosen != pair.rejected for pair in pairs])
    behind = torch.tensor([len(pair.rejected) for pair in pairs]) - new_stop  # tokens of C
    terms = {  # sums of log-probs, and the tokens that they are of
        "segment/kl": (logp - new, new_stop - start),
        "segment/logps": (old, (stop - start) * differs),
        "segment/new_logps": (new, (new_stop - start) * differs),
        "seam/logps": (rest, behind * differs),
        "seam/new_logps": (new_rest, behind * differs),
    }
    return {k: float((x * (n > 0)).sum() / n.sum()) for k, (x, n) in terms.items() if n.any()}


def paint(pair: Pair, decode: Callable[[list[int]], str]) -> str:
    """A pair with a cut in terminal colours: A plain, B green, B' red, C blue."""
    start, stop, new_stop, _ = pair.cut or (0, 0, 0, 0)
    green, red, blue, plain = "\033[32m", "\033[31m", "\033[34m", "\033[0m"
    before, old, after = pair.chosen[:start], pair.chosen[start:stop], pair.chosen[stop:]
    new, left = pair.rejected[start:new_stop], pair.rejected[new_stop:]
    chosen = f"{decode(before)}{green}{decode(old)}{blue}{decode(after)}{plain}"
    rejected = f"{decode(before)}{red}{decode(new)}{blue}{decode(left)}{plain}"
    told = f"(A, {green}B{plain}, {red}B'{plain}, {blue}C{plain})"
    return f"prompt    {decode(pair.prompt)}\nchosen    {chosen}\nrejected  {rejected}   {told}"


# ------------------------------------------------------------------------------------- the flags
# [code]: the official code, [spin]: SPIN's, [handbook]: the alignment handbook, [ours]: our choice
@dataclass
class Sampling:
    """Sampling, of the methods that generate."""

    temperature: Weight = 0.7  # [code]; [spin]: 1.0
    "of sampled tokens; 0 is greedy; --method spin alone makes it 1.0"
    top_k: Whole = 50  # [code]; [spin]: all
    "sample among so many tokens; 0: all; --method spin alone makes it 0"
    top_p: Annotated[float, 1e-9, 1.0] = 0.95  # [code]; [spin]: 1.0
    "sample among the likeliest tokens of this total probability; --method spin alone makes it 1.0"
    generate_batch_size: Count = 64  # [ours]
    "rows decoded together on a rank"
    responses_per_prompt: Annotated[int, 1, 10**4] = 1  # [code]
    "sapo: rewrites of each row and step; sgpo: drafts of each training prompt, for phase 1"
    show_every: Whole = 0
    "steps between sampled pairs shown in colour: A, B, B' and C; 0: never"


@dataclass
class Settings(Sampling):
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
    "spin: iterations, 4 by default; sgpo: how often pairs are made and trained on, --steps each"
    max_new_tokens: Annotated[int, 1, 10**7] = 256  # [spin]
    "tokens of a sampled response, at most"


# -------------------------------------------------------------------------- the papers' settings
OFFICIAL: dict[str, Any] = {  # [code], where it is not the flags' defaults: an epoch of its data,
    "method": "sapo", "loss": "dpo", "precision": "bf16",  # and 2,000 pairs on each of 8 ranks
    "ref_update_every": 108, "replay_capacity": 16000,
}  # fmt: skip
ORPO: dict[str, Any] = {  # [code], [handbook]: with AdamW's state in 8 bits
    "loss": "orpo", "precision": "bf16", "optimizer": "adamw", "lr": [5e-6],
    "schedule": "inverse_sqrt", "warmup": 100.0,
}  # fmt: skip
COSINE = {"precision": "bf16", "optimizer": "adamw", "schedule": "cosine", "batch_size": 128}
# The starts of SAPO-DPO (Llama 3 on deita-10k) and SPIN (zephyr-7b-sft-full: Mistral on UltraChat)
# were trained on packed rows, every token of every turn; ours are on the assistant's turns, each a
# row. That Llama 3 had ChatML, two tokens added: here --chat-template llama3, whose tokens it has.
START: dict[str, Any] = COSINE | {"method": "sft", "loss": None, "lr": [2e-5], "all_turns": True}
ABLATIONS: dict[str, dict[str, Any]] = {  # the paper's tables, and what its reviewers asked for
    "on-policy": {"ema_decay": 0.0, "replay_capacity": 0},  # neither EMA nor replay
    "no-ema": {"ema_decay": 0.0},
    "no-replay": {"replay_capacity": 0},
    "no-segment": {"segment_length": "full"},
    "fixed-reference": {"ref_update": "fixed"},
    "policy-reference": {"ref_update": "policy"},
}
RECIPES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("sapo-llama3-8b", "sapo-mistral-7b"), OFFICIAL),
    **dict.fromkeys(("sapo-orpo-llama3-8b", "sapo-orpo-mistral-7b"), OFFICIAL | ORPO),
    "sft-llama3-8b": START | {"epochs": 3.0},  # [code]
    "sft-mistral-7b": START | {"epochs": 1.0},  # [handbook]
    "spin-mistral-7b": {  # [spin]: the scripts, which override the files' 5e-7, 0.1 and 3 epochs
        "method": "spin", "loss": "dpo", "precision": "bf16", "epochs": 6.0, "max_length": 1024,
        "max_prompt_length": 512, "rounds": 4, "lr": [5e-7, 5e-7, 1e-7, 1e-7],
        "beta": [0.1, 0.1, 0.1, 5.0], "temperature": 1.0, "top_k": 0, "top_p": 1.0,
    },
    "dpo-mistral-7b": COSINE | {  # [handbook]: zephyr-7b-beta
        "method": "dpo", "loss": "dpo", "epochs": 1.0, "beta": [0.01], "max_length": 1024,
        "max_prompt_length": 512,
    },
    "orpo-mistral-7b": ORPO | {"method": "orpo", "epochs": 3.0},  # mistral-capybara; batch [ours]
}  # fmt: skip
