"""SGPO: Self-Generated Preference Optimization based on Self-Improver (arXiv 2507.20181).

One model answers, improves its answer, and learns from the difference. I(x, y) is a prompt that
asks for an improvement of the answer y to x. From a start pi_0:

    Phase 1, the improver, on rows (x, gold):
    1. y0 ~ pi_0( . | x)
    2. y* = an improvement of y0 that pi_0 could reach, from a stronger model    `--target-source`
    3. out with y* where PPL(y*) > Q3 + k (Q3 - Q1)                              `perplexity_fence`
    4. pi* = pi_0, fine-tuned on I(x, y0) -> y* and on x -> gold                 `improver_rows`

    Phase 2, preferences, on prompts x alone:
    5. y- ~ pi( . | x),  y+ ~ pi( . | I(x, y-)),  pi = pi* in the first round    `SGPO.begin_round`
    6. steps on -log sigmoid(beta * (log pi(y+)/pi*(y+) - log pi(y-)/pi*(y-)))   `dpo_loss`
    7. again from 5 with pi as it then is                                        `--rounds`

The paper (P) leaves much open, and there is no official code. What is said here beyond P is ours:

    1. I(x, y) is a conversation whose last turn holds the user's and the answer between tags
       (`--improver-instruction`; what it asks for is SynPO's idea, arXiv 2410.06961, in our own
       words), and so is the question to the stronger model (`--target-instruction`).
    2. P drops targets whose perplexity strays, and cites Tukey (1977): ours is his fence, k = 1.5,
       of perplexities under pi_0, given I(x, y0) (`--fence-k`, `--fence-given`).
    3. P does not say that pi* is also trained on gold: `--improver-mix`.
    4. P does not name the reference of later rounds: pi*, frozen, in all of them.
    5. Prompts are dropped that leave no room for I(x, y), and pairs of which a side is empty, both
       are equal (`--keep-identical`), or the chosen one was cut at its budget (`--keep-cut`) or is
       less likely, per token, than the answer (`--gate`).
"""

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np

import data
import sapo
from data import Cut, Example, Messages, Pair, TargetServer, Tokenizer, Turns
from model import InputError, Positive, Weight, hash_seed
from sapo import Answer, Run, batch_indices, describe, ended, request

REQUEST = "\n\n<request>\n{prompt}\n</request>"
ANSWER = "\n\n<answer>\n{answer}\n</answer>\n\nWrite the improved answer alone."
IMPROVER = """A request and a first answer to it are below. Rewrite the answer so that it is \
better: correct what is wrong, add what is missing, keep to what was asked, and be specific where \
it is vague."""
IMPROVER += REQUEST + ANSWER
TARGET = """A small language model answered a request. Improve its answer a little: mend what is \
wrong, unclear or missing, in the answer's own style and at about its length, so that the model \
could have written the result itself. Use the reference to tell what is right; do not copy it."""
TARGET += REQUEST + "\n\n<reference>\n{gold}\n</reference>" + ANSWER

Ask = tuple[Example, Pair]  # a prompt, and its gold response or an empty one: as text, as tokens


class SGPO(sapo.Source):
    """Rejected = the policy's answer; chosen = its own improvement of that answer.
    Its rows are Asks; each round takes as many as its steps have use for, in its own order."""

    @staticmethod
    def schedule(rows: int, c: Any) -> list[int]:
        """Rounds of equal length, --steps each."""
        return [sapo.steps_for(rows, c) * i for i in range(c.rounds + 1)]

    def before_step(self, t: int) -> list[Pair]:
        """A batch of the round's pairs, all of which are generated before its first step."""
        self.metrics, self.fresh, self.picked, self.made, self.gone = {}, [], [], [], []
        number, first, end = self.stretch(t)
        if number > self.round:
            self.begin_round(number, end - first)
        self.metrics["sgpo/round"] = float(self.round)
        if self.pool:
            c = self.run.config
            key = hash_seed(c.seed, "pairs", self.round)
            self.picked = batch_indices(t - first, c.batch_size, len(self.pool), key)
        return [self.pool[i] for i in self.picked]

    def begin_round(self, number: int, steps: int) -> None:
        """Answers, improvements, and what is left of them as pairs."""
        c, tokenizer = self.run.config, self.run.tokenizer
        count = min(len(self.rows), steps * c.batch_size)
        order = batch_indices(0, count, len(self.rows), hash_seed(c.seed, "round", number))
        asks = [self.rows[i] for i in order]
        answers = self.write([row.prompt for _, row in asks], "answer", number)
        said = [tokenizer.response_text(answer) for answer, _ in answers]
        both = zip(asks, said, strict=True)
        frames = [frame(example.messages, text, tokenizer, c) for (example, _), text in both]
        fits = [i for i in range(count) if len(frames[i]) < c.max_length]
        better = self.write([frames[i] for i in fits], "better", number, c.improve_temperature)
        made = []
        for i, (new, _) in zip(fits, better, strict=True):
            (example, row), (answer, logp) = asks[i], answers[i]
            cut = Cut(0, len(new), len(answer), logp)
            made.append((example, Pair(row.prompt, new, answer, cut)))
        made, flaws = self.choose(made)
        self.fresh, self.gone = [pair for _, pair in made], [*self.pool.values()]
        self.round, self.pool = number, dict(enumerate(self.fresh))
        flaws["too_long"] = count - len(fits)
        self.metrics = describe(self.fresh, tokenizer.eos_ids) | {"improve/pairs": float(len(made))}
        self.metrics |= {f"improve/{why}": found / count for why, found in flaws.items()}
        for example, pair in made:
            chosen, rejected = map(tokenizer.response_text, pair[1:3])
            texts = {"prompt": as_prompt(example.messages), "chosen": chosen, "rejected": rejected}
            self.made.append({"round": number} | texts)

    def choose(self, made: list[Ask]) -> tuple[list[Ask], dict[str, int]]:
        """The pairs worth learning from, and how many had each flaw, kept or not."""
        c, tokenizer, flaws = self.run.config, self.run.tokenizer, dict[str, int]()

        def drop(why: str, bad: Sequence[bool], unless: bool = False) -> None:
            flaws[why] = sum(bad)
            made[:] = [one for one, goes in zip(made, bad, strict=True) if unless or not goes]

        read = tokenizer.response_text
        drop("empty", [not all(read(side).strip() for side in pair[1:3]) for _, pair in made])
        drop("cut", [not ended(pair.chosen, tokenizer.eos_ids) for _, pair in made], c.keep_cut)
        drop("identical", [pair.chosen == pair.rejected for _, pair in made], c.keep_identical)
        if c.gate:  # per token: a sum would favour the shorter side
            pairs = [pair for _, pair in made]
            both = zip(pairs, self.run.sums(self.run.models["policy"], pairs), strict=True)
            means = [(p, x / len(p.chosen), y / len(p.rejected)) for p, (x, y) in both]
            drop("unlikely", [p.chosen != p.rejected and good <= bad for p, good, bad in means])
        return made, flaws

    def write(
        self, prompts: list[list[int]], purpose: str, number: int, temperature: float | None = None
    ) -> list[Answer]:
        """The policy's continuations of prompts in a round."""
        c, policy = self.run.config, self.run.models["policy"]
        todo = [request(x, c, hash_seed(c.seed, purpose, number, i)) for i, x in enumerate(prompts)]
        return self.run.generate(policy, todo, temperature, keep=purpose != "eval")

    def spoil(self, rows: Sequence[Pair]) -> list[Pair]:
        """The policy's answer beside the gold response."""
        answers = self.write([row.prompt for row in rows], "eval", self.round)
        return [row._replace(rejected=new) for row, (new, _) in zip(rows, answers, strict=True)]


# --------------------------------------------------------------------------- phase 1: the improver
def improver_rows(
    targets: Sequence[Example], asks: Sequence[Ask], run: Run
) -> tuple[list[Pair], dict[str, Any]]:
    """The rows that make pi_0 an improver, and what the fence did, as JSON: quartiles, fence (None:
    --fence-k is 0), how many fell. The rows are I(x, y0) -> y*, for each target that fits into
    `max_length` and whose perplexity is not above the fence, and x -> gold, so many that these are
    --improver-mix of all. Raises InputError where no target fits."""
    c, tokenizer, rows, given = run.config, run.tokenizer, list[Pair](), list[Pair]()
    for target in targets:
        asked = improver_prompt(target.messages, target.rejected or "", c.improver_instruction)
        row = data.encode_example(tokenizer, replace(target, messages=tuple(asked), rejected=None))
        if len(row.prompt) + len(row.chosen) <= c.max_length:
            before = {"improver": row.prompt, "nothing": [tokenizer.eos_ids[0]]}
            before["prompt"] = tokenizer.apply_chat_template(target.messages, True)
            rows.append(row)
            given.append(Pair(before[c.fence_given], row.chosen, []))
    if not rows:
        raise InputError(f"--max-length {c.max_length}: none of {len(targets)} targets fits")
    both = zip(run.sums(run.models["policy"], given), given, strict=True)
    values = [math.exp(-logp / len(pair.chosen)) for (logp, _), pair in both]
    fence = perplexity_fence(values, c.fence_k) if c.fence_k else math.inf
    kept = [row for row, value in zip(rows, values, strict=True) if value <= fence]
    q1, median, q3 = np.percentile(values, [25, 50, 75]).tolist()
    report = {
        "k": c.fence_k, "q1": q1, "median": median, "q3": q3,
        "fence": fence if c.fence_k else None, "targets": len(values),
        "dropped": len(rows) - len(kept), "too_long": len(targets) - len(rows),
        "perplexities": values,
    }  # fmt: skip
    plain = [Pair(row.prompt, row.chosen, []) for _, row in asks if row.chosen]
    count = round(len(kept) * c.improver_mix / (1 - c.improver_mix)) if plain else 0
    order = batch_indices(0, count, len(plain), hash_seed(c.seed, "mix"))
    return [*kept, *(plain[i] for i in order)], report


def perplexity_fence(perplexities: Sequence[float], k: float = 1.5) -> float:
    """Tukey's upper fence, Q3 + k (Q3 - Q1), with quartiles interpolated as numpy does."""
    low, high = np.percentile(np.asarray(perplexities, dtype=np.float64), [25, 75])
    return float(high + k * (high - low))


def improvements(
    c: Any, drafts: Sequence[Ask], answers: Mapping[int, str], server: TargetServer | None
) -> Iterator[tuple[int, str | None, str]]:
    """(which draft, its improvement, ""), as they come, or (which, None, why there is none)."""
    asked = [(i, drafts[i][0], answer) for i, answer in answers.items()]
    if server is not None:
        instruction = c.target_instruction
        questions = [improver_prompt(x.messages, y, instruction, x.response) for _, x, y in asked]
        for place, improved, why in server.ask_all(questions):
            yield asked[place][0], improved, why
        return
    for i, draft, answer in asked:
        better = draft.response
        if c.target_source == "tasks":
            rng = random.Random(hash_seed(c.seed, "mend", i))
            better = data.mend_answer(draft.messages[-1]["content"], answer, rng)
        yield i, better or None, "" if better else "no gold"


def improver_prompt(
    messages: Messages, answer: str, instruction: str = IMPROVER, gold: str = ""
) -> Turns:
    """The chat messages that ask the model to improve its own answer to `messages`, whose last, the
    user's, gives way to `instruction`, in which its text stands for {prompt} and the answer for
    {answer}. With TARGET they ask the stronger model, which is also told the gold response."""
    texts = {"prompt": messages[-1]["content"], "gold": gold, "answer": answer}
    # All at once: braces in what is filled in stay as they are.
    last = re.sub(r"\{(\w+)\}", lambda found: texts.get(found[1], found[0]), instruction)
    return [*map(dict, messages[:-1]), {"role": "user", "content": last}]


def frame(messages: Messages, answer: str, tokenizer: Tokenizer, c: Any) -> list[int]:
    """`improver_prompt` as token ids."""
    asked = improver_prompt(messages, answer, c.improver_instruction)
    return tokenizer.apply_chat_template(asked, add_generation_prompt=True)


def leave_room(asks: Sequence[Ask], tokenizer: Tokenizer, c: Any) -> list[Ask]:
    """The prompts, each with the user's turn at its end, whose improver's prompt, with an empty
    answer, fits. Raises InputError where there is none."""
    kept = [ask for ask in asks if len(frame(ask[0].messages, "", tokenizer, c)) + 1 < c.max_length]
    if not kept:
        raise InputError(f"--max-length {c.max_length}: no prompt with --improver-instruction fits")
    return kept


def as_prompt(messages: Messages) -> Any:
    """A conversation as a row's "prompt": the text where it is one turn of the user's."""
    alone = len(messages) == 1 and messages[0]["role"] == "user"
    return messages[0]["content"] if alone else list(messages)


# ------------------------------------------------------------------------------------- the flags
@dataclass
class Settings(sapo.Rounds):
    """SGPO."""

    target_source: str | None = None  # [ours]
    "http://HOST/v1, a JSONL file of prompt, response and improved, gold, or tasks, which mends \
answers to the built-in tasks; default: tasks where there is no --data, else gold"
    target_model: str | None = None
    "the model to ask at a URL; a key is read from the environment's OPENAI_API_KEY"
    target_workers: Annotated[int, 1, 1000] = 8  # [ours]
    "questions to the URL at a time"
    target_instruction: str = TARGET  # [ours]
    "the question to the URL, with {prompt}, {gold} and {answer}"
    improver_instruction: str = IMPROVER  # [ours]
    "what asks the model for an improvement, with {prompt} and {answer}"
    improver: str | None = None
    "an improver-trained model's folder to start from, in place of phase 1"
    improver_epochs: Positive = 3.0  # [ours]
    "passes over the rows of phase 1"
    improver_lr: Positive = 2e-5  # [ours]; that of SAPO's SFT start
    "peak learning rate of phase 1"
    improver_mix: Annotated[float, 0.0, 0.99] = 0.5  # [ours]
    "share of plain rows, prompt and gold, among those of phase 1"
    fence_k: Weight = 1.5  # Tukey's; that it is the paper's is a guess
    "targets of a perplexity above Q3 + k (Q3 - Q1) are dropped; 0: none"
    fence_given: Literal["improver", "prompt", "nothing"] = "improver"  # [ours]
    "what a target's perplexity is conditioned on"
    preference_data: list[str] | None = None
    "files of prompts for phase 2, with or without responses; default: those of --data"
    improve_temperature: Weight | None = None  # [ours]
    "of the improvements; default: --temperature"
    keep_identical: bool = False  # [ours]
    "keep pairs whose improvement is the answer itself; only an NLL term learns from them"
    keep_cut: bool = False  # [ours]
    "keep pairs whose improvement used up --max-new-tokens, and so has no end"
    gate: bool = False  # [ours]
    "keep only improvements likelier, per token and behind the prompt alone, than the answer"


# ----------------------------------------------------------------------------- the paper's setting
PAPER: dict[str, Any] = {  # models and kind of data are the paper's, every number [ours]
    "method": "sgpo", "loss": "dpo", "precision": "bf16", "optimizer": "adamw",
    "schedule": "cosine", "epochs": 1.0, "max_new_tokens": 1024,
}  # fmt: skip
RECIPES = dict.fromkeys(("sgpo-qwen2.5-7b", "sgpo-llama3-8b"), PAPER)
