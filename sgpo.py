"""SGPO: Self-Generated Preference Optimization based on Self-Improver (arXiv 2507.20181).

One model answers, improves its answer, and learns from the difference. I(x, y) is a prompt that
asks for an improvement of the answer y to x. From a start pi_0:

    Phase 1, the improver, on rows (x, gold):
    1. y0 ~ pi_0( . | x)
    2. y* = an improvement of y0 that pi_0 could reach, from a stronger model    `--target-source`
    3. out with y* where PPL(y*) > Q3 + k (Q3 - Q1)                              `perplexity_fence`
    4. pi* = pi_0, fine-tuned on I(x, y0) -> y* and on x -> gold                 `improver_phase`

    Phase 2, preferences, on prompts x alone:
    5. y- ~ pi( . | x),  y+ ~ pi( . | I(x, y-)),  pi = pi* in the first round    `SGPO.begin_round`
    6. steps on -log sigmoid(beta * (log pi(y+)/pi*(y+) - log pi(y-)/pi*(y-)))   `dpo_loss`
    7. again from 5 with pi as it then is                                        `--rounds`

The paper (P) leaves much open, and there is no official code. What is said here beyond P is ours:

    1. I(x, y) is a conversation whose last turn holds the user's and the answer between tags
       (`--improver-instruction`), and so is the question to the stronger model
       (`--target-instruction`).
    2. P drops targets whose perplexity strays, and cites Tukey (1977): ours is his fence, k = 1.5,
       of perplexities under pi_0, given I(x, y0) (`--fence-k`, `--fence-given`).
    3. P does not say that pi* is also trained on gold: `--improver-mix`.
    4. P does not name the reference of later rounds: pi*, frozen, in all of them.
    5. Pairs of equal or empty sides are dropped, and so are prompts that leave no room for I(x, y).
       `--keep-identical` keeps the former, `--gate` drops improvements that are less likely than
       the answer.

Sources know nothing of files, flags or ranks: `generate`, and what needs a tokenizer or a score,
come from the trainer.
"""

import bisect
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import sapo
from data import Example, Messages, Pair, Target, Tokenizer, encode_example
from model import InputError, hash_seed
from sapo import Generate, SegmentPair, batch_indices, budgets, describe, pack, unpack

IMPROVER = """Here is a request, and an answer to it that can be improved.

<request>
{prompt}
</request>

<answer>
{answer}
</answer>

Write a better answer to the request. Give the improved answer alone."""

TARGET = """A small language model answered a request. Improve its answer a little: mend what is \
wrong, unclear or missing, in the answer's own style and at about its length, so that the model \
could have written the result itself. Use the reference to tell what is right; do not copy it.

<request>
{prompt}
</request>

<reference>
{gold}
</reference>

<answer>
{answer}
</answer>

Write the improved answer alone."""


@dataclass
class Settings(sapo.Settings):
    """What SGPO can be told, beside sapo's. The string under a field says what it is."""

    target_source: str | None = None  # [ours]
    "sgpo: http://HOST/v1, a JSONL file of prompt, response and improved, gold, or tasks, which \
mends answers to the built-in tasks; default: tasks where there is no --data, else gold"
    target_model: str | None = None
    "sgpo: the model to ask at a URL; a key is read from the environment's OPENAI_API_KEY"
    target_workers: int = 8  # [ours]
    "sgpo: questions to the URL at a time"
    target_timeout: float = 120.0  # [ours]
    "sgpo: seconds to wait for an answer of the URL"
    target_max_tokens: int = 0  # [ours]
    "sgpo: max_tokens of a question to the URL; 0: as the server has it. Cut answers are dropped"
    target_instruction: str = TARGET  # [ours]
    "sgpo: the question to the URL, with {prompt}, {gold} and {answer}"
    improver_instruction: str = IMPROVER  # [ours]
    "sgpo: what asks the model for an improvement, with {prompt} and {answer}"
    improver: str | None = None
    "sgpo: an improver-trained model's folder to start from, in place of phase 1"
    improver_epochs: float = 3.0  # [ours]
    "sgpo: passes over the rows of phase 1"
    improver_lr: float = 2e-5  # [ours]; that of SAPO's SFT start
    "sgpo: peak learning rate of phase 1"
    improver_mix: float = 0.5  # [ours]
    "sgpo: share of plain rows, prompt and gold, among those of phase 1"
    fence_k: float = 1.5  # Tukey's; that it is the paper's is a guess
    "sgpo: targets of a perplexity above Q3 + k (Q3 - Q1) are dropped; 0: none"
    fence_given: Literal["improver", "prompt", "nothing"] = "improver"  # [ours]
    "sgpo: what a target's perplexity is conditioned on"
    preference_data: list[str] | None = None
    "sgpo: files of prompts for phase 2, with or without responses; default: those of --data"
    improve_temperature: float | None = None  # [ours]
    "sgpo: of the improvements; default: --temperature"
    keep_identical: bool = False  # [ours]
    "sgpo: keep pairs whose improvement is the answer itself; only an NLL term learns from them"
    gate: bool = False  # [ours]
    "sgpo: keep an improvement only where the improver finds it likelier, behind the prompt alone, \
than the answer"
    rounds: int = 1  # [ours]
    "sgpo: how often pairs are generated and trained on, --steps each"


class Ask(NamedTuple):
    """A prompt and the gold response, which may be empty, as text and as token ids."""

    messages: Messages
    response: str
    prompt: list[int]
    gold: list[int]


Score = Callable[[Sequence[Pair]], list[float]]  # summed log-probs of `chosen`
Check = Callable[[str, str], bool]  # (the user's last turn, an answer) -> whether it is right
JUDGED = 256  # pairs of a round, at most, whose gold log-probs are compared


class TargetSource(Protocol):
    """Where phase 1's targets come from, and where they are kept."""

    def known(self, drafts: Sequence[Ask]) -> Collection[int]:
        """Which drafts have a target already, from before a run was stopped."""

    def obtain(self, drafts: Sequence[Ask], answers: dict[int, str]) -> list[Target]:
        """A target for each draft, in order, but for those that came to nothing; `answers` has
        the model's answer for each that is not known."""


def improver_phase(
    asks: Sequence[Ask],
    policy: nn.Module,
    generate: Generate,
    score: Score,
    settings: Settings,
    tokenizer: Tokenizer,
    source: TargetSource,
    measured: Sequence[float] = (),
) -> tuple[list[Pair], dict[str, Any]]:
    """Phase 1 up to its training: the rows to learn, prompt and `chosen`, and `fence_report`'s.

    `measured`: the targets' perplexities, where a stopped run has left them.
    """
    c = settings
    drafts = [ask for ask in asks for _ in range(c.responses_per_prompt)]
    missing = sorted(set(range(len(drafts))) - set(source.known(drafts)))
    prompts = [drafts[i].prompt for i in missing]
    seeds = [hash_seed(c.seed, "draft", i) for i in missing]
    new, _ = generate(policy, prompts, budgets(prompts, c), seeds)
    answers = dict(zip(missing, map(tokenizer.response_text, new), strict=True))
    targets = source.obtain(drafts, answers)
    rows, conditioned = improver_rows(targets, tokenizer, c)
    if len(measured) != len(rows):
        both = zip(score(conditioned), conditioned, strict=True)
        measured = [math.exp(-logp / len(pair.chosen)) for logp, pair in both]
    report = fence_report(measured, c.fence_k) | {"too_long": len(targets) - len(rows)}
    fence = math.inf if report["fence"] is None else report["fence"]
    kept = [row for row, value in zip(rows, measured, strict=True) if value <= fence]
    return mix_rows(kept, asks, c.improver_mix, c.seed), report


class SGPO:
    """Rejected = the policy's answer; chosen = its own improvement of that answer.

    Args:
        asks: the prompts; each round takes as many as its steps have use for, in its own order.
        bounds: the step at which each round begins, and then the last one's end.
        score: tells how an improvement compares with an answer where there is no `check`; under the
            reference, or under the policy where there is none.
    """

    def __init__(
        self,
        asks: Sequence[Ask],
        policy: nn.Module,
        generate: Generate,
        settings: Settings,
        tokenizer: Tokenizer,
        bounds: Sequence[int],
        score: Score,
        check: Check | None = None,
    ) -> None:
        self.asks, self.policy, self.generate, self.settings = asks, policy, generate, settings
        self.tokenizer, self.bounds, self.score, self.check = tokenizer, bounds, score, check
        self.round = -1
        self.pairs: list[Pair] = []  # of the round
        self.metrics: dict[str, float] = {}
        self.fresh: list[SegmentPair] = []
        self.asked: list[Ask] = []  # what the fresh pairs answer
        self.picked: list[int] = []
        self.reference_version = 0  # it stays frozen

    def before_step(self, t: int) -> list[Pair]:
        """A batch of the round's pairs, all of which are generated before its first step."""
        self.metrics, self.fresh, self.picked = {}, [], []
        now = bisect.bisect_right(self.bounds, t) - 1
        if now > self.round:
            self.round = now
            self.begin_round(self.bounds[now + 1] - self.bounds[now])
        self.metrics["sgpo/round"] = float(self.round)
        if not self.pairs:
            return []
        key = hash_seed(self.settings.seed, "pairs", self.round)
        at, size = t - self.bounds[now], self.settings.batch_size
        self.picked = batch_indices(at, size, len(self.pairs), key)
        return [self.pairs[i] for i in self.picked]

    def begin_round(self, steps: int) -> None:
        """Answers, improvements, and what is left of them as pairs."""
        c = self.settings
        key = hash_seed(c.seed, "round", self.round)
        count = min(len(self.asks), steps * c.batch_size)
        asks = [self.asks[i] for i in batch_indices(0, count, len(self.asks), key)]
        answers, logps = self.write([ask.prompt for ask in asks], "answer")
        frames = [self.frame(ask, new) for ask, new in zip(asks, answers, strict=True)]
        fits = [len(frame) < c.max_length for frame in frames]
        wanted = [frame for frame, fit in zip(frames, fits, strict=True) if fit]
        asked = iter(self.write(wanted, "better", c.improve_temperature)[0])
        made = [
            (
                ask,
                SegmentPair(Pair(ask.prompt, better, answer), (0, len(better), len(answer)), logp),
            )
            for ask, answer, logp, fit in zip(asks, answers, logps, fits, strict=True)
            if fit
            for better in [next(asked)]
        ]
        read = self.tokenizer.response_text
        full = [one for one in made if all(read(side).strip() for side in one[1][1:])]
        kept = [one for one in full if c.keep_identical or one[1].chosen != one[1].rejected]
        same = len(full) - sum(pair.chosen != pair.rejected for _, pair in full)
        before = len(kept)
        if c.gate:
            unlike = [(ask.prompt, pair[1:]) for ask, pair in kept if pair.chosen != pair.rejected]
            sides = [Pair(prompt, side, []) for prompt, both in unlike for side in both]
            sums = iter(self.score(sides))  # of chosen, of rejected, of the next one's chosen ...
            kept = [
                (ask, pair)
                for ask, pair in kept
                if pair.chosen == pair.rejected or next(sums) > next(sums)
            ]
        self.asked, self.fresh = [ask for ask, _ in kept], [pair for _, pair in kept]
        self.pairs = list(self.fresh)
        self.metrics = describe(self.fresh) | {
            "improve/pairs": float(len(kept)),
            "improve/too_long": 1 - len(made) / count,
            "improve/empty": (len(made) - len(full)) / count,
            "improve/identical": same / count,
            "improve/unlikely": (before - len(kept)) / count,
        }
        if kept:
            self.metrics |= self.judge()

    def frame(self, ask: Ask, answer: list[int]) -> list[int]:
        """The prompt that asks for a better answer, as token ids."""
        return frame(
            ask.messages, self.tokenizer.response_text(answer), self.tokenizer, self.settings
        )

    def judge(self) -> dict[str, float]:
        """How much better the round's improvements are than its answers: by the checker, or by what
        each does, as the answer in I(x, y), for the log-prob of the gold response behind it."""
        both = list(zip(self.asked, self.fresh, strict=True))
        if self.check is not None:
            marks = [
                [
                    self.check(ask.messages[-1]["content"], self.tokenizer.response_text(side))
                    for side in (bad, good)
                ]
                for ask, (_, good, bad) in both
            ]
            shares = {
                "right_before": [before for before, _ in marks],
                "right_after": [after for _, after in marks],
                "mended": [after and not before for before, after in marks],
                "spoilt": [before and not after for before, after in marks],
            }
            return {f"improve/{name}": sum(found) / len(both) for name, found in shares.items()}
        rows = [
            [Pair(self.frame(ask, side), ask.gold, []) for side in (good, bad)]
            for ask, (_, good, bad) in both[:JUDGED]
            if ask.gold
        ]
        room = self.settings.max_length
        rows = [row for row in rows if all(len(p.prompt) + len(p.chosen) <= room for p in row)]
        if not rows:
            return {}
        sums = self.score([pair for row in rows for pair in row])
        gains = [
            (after - before) / len(row[0].chosen)
            for row, after, before in zip(rows, sums[::2], sums[1::2], strict=True)
        ]
        return {
            "improve/gold_gain": sum(gains) / len(gains),
            "improve/gold_better": sum(gain > 0 for gain in gains) / len(gains),
        }

    def write(
        self, prompts: list[list[int]], purpose: str, temperature: float | None = None
    ) -> tuple[list[list[int]], list[float]]:
        """The policy's continuations of prompts."""
        c = self.settings
        seeds = [hash_seed(c.seed, purpose, self.round, i) for i in range(len(prompts))]
        return self.generate(self.policy, prompts, budgets(prompts, c), seeds, temperature)

    def eval_pairs(self, rows: Sequence[Pair]) -> list[Pair]:
        """Rows with a rejected side keep it; the others get the policy's answer."""
        bare = [row for row in rows if not row.rejected]
        answers = self.write([row.prompt for row in bare], "eval")[0]
        answered = [row._replace(rejected=new) for row, new in zip(bare, answers, strict=True)]
        return [*(row for row in rows if row.rejected), *answered]

    def state_dict(self) -> dict[str, Tensor]:
        """The round and its pairs."""
        return pack(self.pairs) | {"round": torch.tensor([self.round])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up what `state_dict` gave."""
        self.pairs, self.round = unpack(state), int(state["round"])


def improver_prompt(
    messages: Messages, answer: str, instruction: str = IMPROVER
) -> list[dict[str, str]]:
    """The chat messages that ask the model to improve its own answer.

    Args:
        messages: the conversation that was answered; its last turn is the user's.
        answer: the model's.
        instruction: the new last turn; {prompt} in it becomes the old one's text, {answer} the
            answer. Earlier turns stay as they are.
    """
    last = fill(instruction, prompt=messages[-1]["content"], answer=answer)
    return [*map(dict, messages[:-1]), {"role": "user", "content": last}]


def frame(messages: Messages, answer: str, tokenizer: Tokenizer, settings: Settings) -> list[int]:
    """`improver_prompt` as token ids."""
    asked = improver_prompt(messages, answer, settings.improver_instruction)
    return tokenizer.apply_chat_template(asked, add_generation_prompt=True)


def leave_room(asks: Sequence[Ask], tokenizer: Tokenizer, settings: Settings) -> list[Ask]:
    """The prompts whose improver's prompt, with an empty answer, fits. Raises InputError: none."""
    room = settings.max_length - 1
    kept = [ask for ask in asks if len(frame(ask.messages, "", tokenizer, settings)) < room]
    if not kept:
        raise InputError(
            f"none of the {len(asks)} prompts fits into --max-length {settings.max_length} with "
            "--improver-instruction around it"
        )
    return kept


def target_prompt(
    messages: Messages, gold: str, answer: str, instruction: str = TARGET
) -> list[dict[str, str]]:
    """The same for the stronger model, which is also told the gold response."""
    last = fill(instruction, prompt=messages[-1]["content"], gold=gold, answer=answer)
    return [*map(dict, messages[:-1]), {"role": "user", "content": last}]


def fill(template: str, **values: str) -> str:
    """The template with each {name} replaced; braces in what is filled in stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def improver_rows(
    targets: Sequence[Target], tokenizer: Tokenizer, settings: Settings
) -> tuple[list[Pair], list[Pair]]:
    """I(x, y0) -> y* as token ids, for each target that fits into `max_length`; and the same
    targets behind what their perplexity is conditioned on."""
    rows, conditioned = [], []
    for i, target in enumerate(targets):
        asked = improver_prompt(target.messages, target.response, settings.improver_instruction)
        example = Example(tuple(asked), target.improved, None, f"target {i + 1}")
        row = encode_example(tokenizer, example)
        if len(row.prompt) + len(row.chosen) <= settings.max_length:
            context = {
                "improver": row.prompt,
                "prompt": tokenizer.apply_chat_template(target.messages, True),
                "nothing": [tokenizer.eos_ids[0]],
            }[settings.fence_given]
            rows.append(row)
            conditioned.append(Pair(context, row.chosen, []))
    if not rows:
        raise InputError(f"no target fits into --max-length {settings.max_length} with its prompt")
    return rows, conditioned


def mix_rows(rows: Sequence[Pair], asks: Sequence[Ask], share: float, seed: int) -> list[Pair]:
    """The rows, and so many of x -> gold that these are that share of all."""
    plain = [Pair(ask.prompt, ask.gold, []) for ask in asks if ask.gold]
    count = round(len(rows) * share / (1 - share)) if plain else 0
    order = batch_indices(0, count, len(plain), hash_seed(seed, "mix")) if count else []
    return [*rows, *(plain[i] for i in order)]


def perplexity_fence(perplexities: Sequence[float], k: float = 1.5) -> float:
    """Tukey's upper fence, Q3 + k (Q3 - Q1), with quartiles interpolated as numpy does."""
    low, high = np.percentile(np.asarray(perplexities, dtype=np.float64), [25, 75])
    return float(high + k * (high - low))


def fence_report(perplexities: Sequence[float], k: float) -> dict[str, Any]:
    """What the fence did: quartiles, fence (None: k is 0), how many fell, and a histogram of the
    perplexities' common logarithms, all as JSON."""
    values = np.asarray(perplexities, dtype=np.float64)
    fence = perplexity_fence(perplexities, k) if k else math.inf
    counts, edges = np.histogram(np.log10(values), bins=20)
    low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
    return {
        "k": k, "q1": low, "median": middle, "q3": high,
        "fence": fence if k else None, "targets": len(values),
        "dropped": int((values > fence).sum()),
        "histogram": {"log10_edges": edges.tolist(), "counts": counts.tolist()},
        "perplexities": values.tolist(),
    }  # fmt: skip


# ----------------------------------------------------------------------------- the paper's setting

RECIPES: dict[str, dict[str, Any]] = {
    "sgpo-qwen2.5-7b": {  # model and kind of data are the paper's, every number [ours]
        "method": "sgpo", "loss": "dpo", "precision": "bf16", "optimizer": "adamw",
        "schedule": "cosine", "epochs": 1.0, "max_new_tokens": 1024,
    },
}  # fmt: skip
RECIPES["sgpo-llama3-8b"] = RECIPES["sgpo-qwen2.5-7b"]
