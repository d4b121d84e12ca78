"""Align a language model with no preference data: SAPO and SGPO; SFT, DPO, ORPO, SPIN beside them.

    python train.py                                          # the embedded default, on any CPU
    torchrun --nproc_per_node 8 train.py --method sapo --recipe sapo-mistral-7b \\
        --model DIR --data FILE.jsonl --out OUT
    python train.py ... --out OUT --resume                   # goes on from the newest checkpoint

Every preference method is a source of pairs with a loss on top:

    source.before_step(t) -> pairs (prompt, chosen, rejected)  ->  loss  ->  policy t + 1

Sources and losses are in sapo.py and sgpo.py. Here are the loop and the learner, where an evening's
reading ends; then files, ranks, flags and the whole run. N is the number of pairs.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import data
import model as lm
import sample
import sapo
import sgpo
from data import Pair
from model import Count, InputError, Positive, Share, Transformer, Weight, Whole, hash_seed
from sapo import Answer, Request, Source, dpo_loss, orpo_loss  # noqa: F401, the losses are public

# Where each method's pairs come from, and the flags of its own. A new method is a line.
SOURCES: dict[str, tuple[type[Source], Any]] = {
    "sft": (sapo.SFT, None),
    "dpo": (Source, None),
    "orpo": (Source, None),
    "spin": (sapo.SPIN, sapo.Rounds),
    "sapo": (sapo.SAPO, sapo.Settings),
    "sgpo": (sgpo.SGPO, sgpo.Settings),
}

Row = dict[str, float]  # a step's metrics by name
Table = dict[str, Tensor]  # columns of (N,) float64, one value a pair: see COLUMNS
Seen = tuple[list[Pair], Table, Row]  # of a step


class Stopped(Exception):
    """SIGTERM or SIGINT came, and what is to be saved has been."""


# --------------------------------------------------------------------------------------- the loop
def fit(c: Config, learner: Learner, source: Source, files: Files) -> None:
    """The only loop: trains the policy on the source's pairs. t counts optimizer updates done."""
    t = saved = files.restore(learner, source)
    began, first, end = time.perf_counter(), t, source.bounds[-1]
    while t < end:
        try:
            seen = step(c, learner, source, t)
        except Stopped:  # while a round's answers were generated; they are kept
            if t > saved:
                files.save(t, learner, source)
            raise
        t += 1
        if t == end or (c.eval_every and t % c.eval_every == 0):
            seen[2].update(evaluate(c, learner, source, files))
        files.log(t, seen, learner, source, (time.perf_counter() - began) / (t - first))
        if learner.bad_steps == 5:
            last = [(0, "none: see --save-every"), *files.numbered()][-1][1]
            told = "loss or gradient was not finite 5 steps in a row: try a lower --lr; the last "
            raise InputError(f"{told}checkpoint is {last}")
        stops = learner.ranks.agree(learner.ranks.asked_to_stop)
        if stops or (c.save_every and t % c.save_every == 0):
            files.save(t, learner, source)
            saved = t
        if stops:
            raise Stopped(f"stopped after step {files.before + t}; --resume goes on")
    dtype = torch.bfloat16 if c.save_dtype == "bf16" else torch.float32
    with files.publish(files.final) as folder:
        files.save_model(learner.policy, folder, dtype)


def step(c: Config, learner: Learner, source: Source, t: int) -> Seen:
    """One update: pairs, gradients over micro-batches, clipping, the optimizer."""
    number, first, end = source.stretch(t)
    if t == first:  # SPIN's iterations and SGPO's rounds are runs of their own
        learner.optimizer.state.clear()
    learner.begin_step(c.beta[: number + 1][-1])
    with learner.clock("source"):
        pairs = source.before_step(t)
    lr = lr_at(c, t - first, end - first, peak=c.lr[: number + 1][-1])
    row: Row = {"lr": lr, "pairs": float(len(pairs)), "grad_norm": 0.0}
    table = learner.score(pairs, source.reference_version, learn=True)
    for pair in source.gone:
        learner.known.pop(hash_seed(*pair[:3]), None)
    if pairs:
        row |= summary(pairs, table, c)
        with learner.clock("optimizer"):
            row["grad_norm"] = learner.update(lr, row["loss"])
    row |= source.metrics | learner.spent(pairs)
    return pairs, table, row


def evaluate(c: Config, learner: Learner, source: Source, files: Files) -> Row:
    """Held-out rows scored as training pairs are; and accuracy, in runs on the built-in tasks."""
    row, began = Row(), time.perf_counter()
    if files.eval_rows:
        new = iter(source.spoil([pair for pair in files.eval_rows if not pair.rejected]))
        pairs = [pair if pair.rejected else next(new) for pair in files.eval_rows]
        table = learner.score(pairs, source.reference_version, learn=False)
        row |= {f"eval/{key}": value for key, value in summary(pairs, table, c).items()}
    if files.on_tasks:
        with learner.ranks.decoder(learner.policy) as ready:
            shares = sample.task_accuracy(ready, files.tokenizer, c.seed, 0.0, "validation")
        row |= {f"eval/accuracy/{kind}": share for kind, share in shares.items()}
    return row | {"seconds/eval": time.perf_counter() - began}


def summary(pairs: Sequence[Pair], table: Table, c: Config) -> Row:
    """Means over the pairs, from `Learner.score`'s columns. `rewards/accuracies` leaves out pairs
    whose two sides are equal, and `pairs/identical` is their share."""
    row = {"nll": -float(table["logps/chosen"].sum()) / sum(len(p.chosen) for p in pairs)}
    row["loss"] = float(table["losses"].mean()) + c.nll_weight * row["nll"]
    row["logps/chosen"] = float(table["logps/chosen"].mean())
    row["tokens/policy"] = float(sum(map(lm.tree_size, pairs)))
    if c.loss is not None and all(pair.rejected for pair in pairs):
        good, bad = table["rewards/chosen"], table["rewards/rejected"]
        unlike = torch.tensor([pair.rejected != pair.chosen for pair in pairs])
        for key in ("logps/rejected", "rewards/chosen", "rewards/rejected"):
            row[key] = float(table[key].mean())
        row["rewards/margins"] = float((good - bad).mean())
        if unlike.any():
            row["rewards/accuracies"] = float((good > bad)[unlike].double().mean())
        row["pairs/identical"] = 1 - float(unlike.double().mean())
        row |= sapo.segment_metrics(pairs, table)
    return row


def lr_at(c: Config, t: int, steps: int, peak: float) -> float:
    """The learning rate of the update from t to t + 1, of so many steps: peak / W, 2 peak / W, ...
    over W warm-up steps, then down; the linear schedule ends at peak / (steps - W)."""
    warmup = round(c.warmup * steps) if c.warmup < 1 else round(c.warmup)
    if t < warmup:
        return peak * (t + 1) / warmup
    done = (t - warmup) / max(1, steps - warmup)
    if c.schedule == "linear":
        return peak * (1 - done)
    if c.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    if c.schedule == "inverse_sqrt":  # without a warm-up slowly down, as transformers has it
        return peak * math.sqrt(warmup / (t + 1) if warmup else 10_000 / (t + 10_000))
    return peak


# ------------------------------------------------------------------------------------ the learner
class Learner:
    """The models and the optimizer, and the `sapo.Run` of a source: it scores pairs, learns from
    them, and generates. `roles` are those of `Source`: copies of `start` beside the policy."""

    def __init__(
        self, c: Config, start: Path, tokenizer: data.Tokenizer, ranks: Ranks, *roles: str
    ) -> None:
        self.config, self.tokenizer, self.ranks = c, tokenizer, ranks
        self.policy = ranks.build(start, c, "policy")
        self.optimizer = make_optimizer(self.policy, c)  # before a forward makes objects stale
        self.models = {"policy": self.policy}
        for role in sorted({*roles} | ({"reference"} if sapo.compares(c) else set())):  # one order
            self.models[role] = ranks.build(start, c, role)
        self.known: dict[int, tuple[float, ...]] = {}  # the reference's log-probs, by pair
        self.version = 0  # of the reference that they are of
        self.bad_steps = self.skipped = 0  # updates left out: in a row, and in all
        self.begin_step(c.beta[0])

    def begin_step(self, beta: float) -> None:
        """Sets the step's beta, its clocks, and its tokens sampled and seen by the reference."""
        self.beta, self.began, self.seconds = beta, time.perf_counter(), dict[str, float]()
        phases = ["generate", "reference"] if sapo.compares(self.config) else ["generate"]
        self.tokens = {f"tokens/{phase}": 0.0 for phase in phases}

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Adds the time within to `seconds[name]`, less that of clocks within this one."""
        began, before = time.perf_counter(), sum(self.seconds.values())
        yield
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        inner = sum(self.seconds.values()) - before
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began - inner

    def spent(self, pairs: Sequence[Pair]) -> Row:
        """The step's clocks and counts. `tokens_per_second` counts separate sequences."""
        tokens = sum(len(x) * (1 + bool(z)) + len(y) + len(z) for x, y, z, _ in pairs)
        row = {"skipped": float(self.skipped)} | self.tokens
        row["tokens_per_second"] = tokens / (time.perf_counter() - self.began)
        return row | {f"seconds/{name}": value for name, value in self.seconds.items()}

    def shares(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[Pair], Tensor, Tensor]]:
        """This rank's micro-batches: pairs, places, weights. It has every world-th pair by length,
        and one again with weight 0 where they do not come out even: all run as many passes."""
        count, size = len(pairs), self.config.micro_batch_size
        order = sorted(range(count), key=lambda i: sum(map(len, pairs[i][:3])))
        mine = order[self.ranks.rank :: self.ranks.world]
        weights = [1.0] * len(mine) + [0.0] * (math.ceil(count / self.ranks.world) - len(mine))
        mine += order[-1:] * (len(weights) - len(mine))
        parts = zip(*(self.ranks.send(x).split(size) for x in (mine, weights)), strict=True)
        for first, part in zip(range(0, len(mine), size), parts, strict=False):
            yield [pairs[i] for i in mine[first : first + size]], *part

    def sums(self, model: Transformer, pairs: Sequence[Pair]) -> list[tuple[float, ...]]:
        """Summed log-probs of chosen and rejected under a model, on every rank; no gradient."""
        table = torch.zeros(len(pairs), 2, dtype=torch.float64, device=self.ranks.device)
        with torch.no_grad(), passes(model, self.config, self.ranks):
            for batch, places, weights in self.shares(pairs):
                both = torch.stack(lm.pair_logprobs(model, batch)[:2], dim=1)
                table[places] += both.double() * weights[:, None]
        return [*map(tuple, self.ranks.sum(table).tolist())]

    def reference_logps(self, pairs: Sequence[Pair], version: int, keep: bool) -> Tensor:
        """(N, 2) float32 on every rank: `sums` under the reference, once for a pair, and kept until
        that is another `version`. `keep`: not held-out pairs."""
        if version != self.version:
            self.version, self.known = version, {}
        keys = [hash_seed(*pair[:3]) for pair in pairs]
        missing = {k: p for k, p in zip(keys, pairs, strict=True) if k not in self.known}
        with self.clock("reference"):
            sums = self.sums(self.models["reference"], [*missing.values()])
        self.tokens["tokens/reference"] += sum(map(lm.tree_size, missing.values()))
        found = self.known | dict(zip(missing, sums, strict=True))
        if keep:
            self.known = found
        return self.ranks.send([found[key] for key in keys])

    def score(self, pairs: Sequence[Pair], version: int, learn: bool) -> Table:
        """COLUMNS on every rank; `learn`: the gradient too. `version`: of the reference."""
        c, count = self.config, len(pairs)
        stats = torch.zeros(count, len(COLUMNS), dtype=torch.float64, device=self.ranks.device)
        references = torch.zeros(count, 2, device=self.ranks.device)
        if sapo.compares(c) and pairs:
            references = self.reference_logps(pairs, version, keep=learn)
        tokens = sum(len(pair.chosen) for pair in pairs)
        with self.clock("policy"), passes(self.policy, c, self.ranks):
            for batch, places, weights in self.shares(pairs):
                reference = references[places].unbind(1)
                with torch.set_grad_enabled(learn):
                    parts = lm.pair_token_logprobs(self.policy, batch)
                    policy = lm.pair_sums(parts)
                    losses, *rewards = sapo.pair_loss(c, self.beta, policy, reference)
                    loss = (losses * weights).sum() / count
                    loss = loss - c.nll_weight * (policy[0] * weights).sum() / tokens
                if learn:  # FSDP averages gradients over ranks; the sum is wanted
                    (loss * self.ranks.world).backward()
                segments = sapo.segment_logprobs(batch, parts).unbind(1)
                columns = (losses, *policy[:2], *reference, *rewards, *segments)
                values = torch.stack([column.detach().double() for column in columns], 1)
                stats[places] += values * weights[:, None]
        table = self.ranks.sum(stats).cpu()  # once: each number read from a device waits for it
        return dict(zip(COLUMNS, table.unbind(1), strict=True))

    def update(self, lr: float, loss: float) -> float:
        """Clips and steps, unless loss or norm is not finite. The gradient's norm before that."""
        limit = self.config.max_grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), limit, foreach=True)
        value = float(self.ranks.whole(norm))
        good = math.isfinite(value) and math.isfinite(loss)
        if good:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.bad_steps = 0 if good else self.bad_steps + 1
        self.skipped += not good
        return value

    def generate(
        self, model: Any, asked: list[Request], temperature: float | None = None, keep: bool = False
    ) -> list[Answer]:
        """As `sapo.Run` says. The rows are spread over the ranks; each gets all of the answer."""
        c, ranks = self.config, self.ranks
        how: dict[str, Any] = {"eos_ids": self.tokenizer.eos_ids, "return_logprobs": True}
        how |= {"temperature": c.temperature if temperature is None else temperature}
        how |= {"top_k": c.top_k, "top_p": c.top_p, "batch_size": c.generate_batch_size}

        def write(rows: list[Request]) -> list[Answer]:
            mine: list[Any] = rows[ranks.rank :: ranks.world]
            prompts, most, seeds = ([row[k] for row in mine] for k in range(3))
            new, logps = lm.generate(ready, prompts, most, seed=seeds, **how)
            return ranks.join([*zip(new, map(math.fsum, logps), strict=True)], rows)

        with self.clock("generate"), ranks.decoder(model) as ready:
            done = kept(c, ranks, asked, write, ranks.norm(model)) if keep else write(asked)
        self.tokens["tokens/generate"] += sum(len(tokens) for tokens, _ in done)
        return done

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the policy's weights, by name, sharded as it lies."""
        tree = dict[str, Tensor]()
        for name, parameter in self.policy.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tree[f"optimizer.{name}.{key}"] = value
        for role, model in [*self.models.items()][1:]:  # all but the policy
            for name, parameter in model.named_parameters():
                tree[f"{role}.{name}"] = parameter
        tree["known.keys"] = torch.tensor([*self.known], dtype=torch.int64)
        tree["known.logps"] = torch.tensor([*self.known.values()], dtype=torch.float64).view(-1, 2)
        tree["counts"] = torch.tensor([self.bad_steps, self.skipped, self.version])
        return tree

    def load_state_dict(self, tree: Mapping[str, Tensor]) -> None:
        """Takes up what `state_dict` gave, each rank its shards."""
        for name, parameter in self.policy.named_parameters():
            prefix, state = f"optimizer.{name}.", self.optimizer.state[parameter]
            for key in [name.removeprefix(prefix) for name in tree if name.startswith(prefix)]:
                like = torch.zeros(()) if key == "step" else parameter
                state[key] = torch.zeros_like(like).detach()
        logps = map(tuple, tree["known.logps"].tolist())
        self.known = dict(zip(tree["known.keys"].tolist(), logps, strict=True))
        self.bad_steps, self.skipped, self.version = tree["counts"].tolist()
        for name, value in self.state_dict().items():
            self.ranks.place(value, tree[name])


# The last four: the policy's log-probs of B, of B', of C after B and of C after B'.
COLUMNS = """losses logps/chosen logps/rejected ref_logps/chosen ref_logps/rejected rewards/chosen
    rewards/rejected logps/segment logps/new_segment logps/rest logps/new_rest""".split()  # noqa: SIM905


@contextlib.contextmanager
def passes(model: Transformer, c: Config, ranks: Ranks) -> Iterator[None]:
    """Around passes, backward too: the blocks' matrices are rounded to the computation's type once
    for all of them, at 2 bytes a weight (over several ranks FSDP does it); --deterministic is on,
    without which sampling sums in order, and with which CUDA's cumsum may want V x V numbers."""
    torch.use_deterministic_algorithms(c.deterministic)
    parts = model.model["layers"].modules() if ranks.world == 1 and model.compute_dtype else ()
    held: list[Any] = [(x._parameters, x.weight) for x in parts if isinstance(x, nn.Linear)]
    try:
        for own, weight in held:
            own["weight"] = weight.to(model.compute_dtype)
        yield
    finally:
        for own, weight in held:
            own["weight"] = weight
        torch.use_deterministic_algorithms(False)


def make_optimizer(policy: Transformer, c: Config) -> torch.optim.Optimizer:
    """RMSprop or AdamW, a multi-tensor pass for each block: its temporaries are then small."""
    groups = [{"params": [*block.parameters()]} for block in policy.model["layers"].children()]
    inner = {parameter for group in groups for parameter in group["params"]}
    groups.append({"params": [p for p in policy.parameters() if p not in inner]})
    settings: dict[str, Any] = {"lr": c.lr[0], "weight_decay": c.weight_decay, "foreach": True}
    if c.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, **settings)
    return torch.optim.AdamW(groups, betas=(0.9, c.adam_beta2), **settings)


# ------------------------------------------------------------------------------ what lies on disk
@dataclass
class Files:
    """What one run of `fit` reads and leaves. All ranks call its methods, to gather the weights."""

    ranks: Ranks
    tokenizer: data.Tokenizer
    metrics: Path  # a JSON object per logged step
    final: Path  # the trained model
    phase: str  # its name in the rows
    checkpoints: Path | None = None
    before: int = 0  # steps of the phases before this one
    eval_rows: Sequence[Pair] = ()
    on_tasks: bool = False  # accuracy on the built-in tasks is a held-out metric
    trace: Trace | None = None
    beside: Mapping[str, str] = field(default_factory=dict)  # more files beside a model, by name

    def log(self, t: int, seen: Seen, learner: Learner, source: Source, pace: float) -> None:
        """A step's trace and a pair in colour, where asked for; its row, where due, for a person
        and for metrics.jsonl; what the source has made, for pairs.jsonl. `pace`: seconds a step."""
        c, row, steps = learner.config, seen[2], source.bounds[-1]
        if self.trace is not None and self.before + t <= c.trace_steps:
            self.trace.add(self.before + t, seen, learner, source)
        cut = [pair for pair in seen[0] if pair.cut is not None]
        if c.show_every and (t - 1) % c.show_every == 0 and cut and self.ranks.first:
            print(sapo.paint(cut[0], self.tokenizer.decode))
        due = t == steps or t % c.log_every == 0 or {"seconds/eval", "improve/pairs"} & row.keys()
        if not (due and self.ranks.first):
            return
        told = {k: v if math.isfinite(v) else None for k, v in row.items()}
        append(self.metrics, [{"step": self.before + t, "phase": self.phase} | told])
        if source.made:
            append(self.metrics.with_name("pairs.jsonl"), source.made)
        names = {"loss": "loss", "rewards/accuracies": "acc", "rewards/margins": "margin"}
        names |= {"segment/identical": "same", "tokens/per_useful_pair": "tokens/pair"}
        names |= {"grad_norm": "norm", "lr": "lr"}
        shown = " ".join(f"{names[k]} {row[k]:.4g}" for k in names if k in row)
        left = round(pace * (steps - t))
        clock = f"{1 / pace:.2f} steps/s {left // 60}:{left % 60:02} left"
        print(f"{self.phase} {t}/{steps} {shown} {clock}", flush=True)

    def numbered(self) -> list[tuple[int, Path]]:
        """The checkpoints on disk, from the fewest steps to the most."""
        folders = [] if self.checkpoints is None else self.checkpoints.glob("step-*")
        return sorted((int(f.name[5:]), f) for f in folders if f.name[5:].isdecimal())

    def save(self, t: int, learner: Learner, source: Source) -> None:
        """checkpoints/step-N: the policy as a folder that transformers loads, and one tree of
        tensors for all else, after N updates and before anything of the next step."""
        if self.checkpoints is None:
            return
        with self.publish(self.checkpoints / f"step-{self.before + t}") as folder:
            self.save_model(learner.policy, folder / "policy", torch.float32)
            if self.ranks.first:
                (folder / "state").mkdir()
            tree = learner.state_dict() | source.state_dict()  # no name is in both
            lm.write_weights(folder / "state", tree, self.ranks.fetch, self.ranks.first)
        if learner.config.keep and self.ranks.first:
            for _, folder in self.numbered()[: -learner.config.keep]:
                shutil.rmtree(folder)

    def restore(self, learner: Learner, source: Source) -> int:
        """Takes up this phase's newest whole checkpoint, if any. The steps that it has done."""
        done, parameters = 0, dict(learner.policy.named_parameters())
        for number, folder in reversed([one for one in self.numbered() if one[0] > self.before]):
            try:  # reads headers alone
                lm.find_weights(parameters, folder / "policy")
                tree = lm.Tensors(folder / "state")
            except InputError as error:
                say(f"warning: {folder} is not whole, and left out: {error}")
                continue
            done = number - self.before
            if done > (end := source.bounds[-1]):
                raise InputError(f"--steps: {end} in all, but {folder} is beyond that already")
            lm.load_weights(parameters, folder / "policy", self.ranks.place)
            with lm.reading(str(folder)):
                learner.load_state_dict(tree)
                source.load_state_dict(tree)
            break
        if self.ranks.first:
            ends = {self.metrics: ("step", self.before + done)}  # what is beyond is done again
            ends[self.metrics.with_name("pairs.jsonl")] = ("round", source.round)
            for path, (key, most) in ends.items():
                if path.exists():
                    rows = (row for row in json_lines(path) if row.get(key, most + 1) <= most)
                    write_rows(path, rows)
            if learner.config.resume:
                told = f"resuming after step {self.before + done}"
                print(told if done else "no checkpoint yet: starting afresh")
        return done

    def save_model(self, model: Transformer, folder: Path, dtype: torch.dtype) -> None:
        """A Hugging Face folder of a model, with its tokenizer."""
        if self.ranks.first:
            self.tokenizer.save(folder)
            lm.write_config(folder, model.config, dtype)
            file = folder / "generation_config.json"  # others should stop where we do
            raw = lm.read_json(file, optional=True) | {"eos_token_id": [*self.tokenizer.eos_ids]}
            for name, text in {file.name: json.dumps(raw, indent=2), **self.beside}.items():
                (folder / name).write_text(text + "\n", encoding="utf-8")
        fetch = functools.partial(self.ranks.fetch, dtype=dtype)
        lm.write_weights(folder, dict(model.named_parameters()), fetch, self.ranks.first)

    @contextlib.contextmanager
    def publish(self, folder: Path) -> Iterator[Path]:
        """A folder to write to, which appears whole or not at all, also where the disk is full."""
        partial = folder.with_name(f".{folder.name}")
        try:
            if self.ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
            yield partial
            if self.ranks.first:
                for path in (*partial.rglob("*"), partial):
                    flush(path)
                shutil.rmtree(folder, ignore_errors=True)  # one that was not whole
                partial.rename(folder)
                flush(folder.parent)
        finally:
            if self.ranks.first:  # where it did not become whole
                shutil.rmtree(partial, ignore_errors=True)
        self.ranks.agree(False)  # all wait until it is there


def kept(c: Config, ranks: Ranks, rows: list[Request], write: Any, stamp: float) -> list[Answer]:
    """The rows' answers: those in a file, of the same row and model (`stamp`), and others, which
    `write` gives, some at a time, so that a run that is Stopped here keeps them."""
    path, size = Path(c.out) / ".generated.jsonl", 8 * c.generate_batch_size * ranks.world
    asked = {hash_seed(stamp, *row): row for row in rows}  # no two are equal: seeds differ
    known = {row["key"]: (row["tokens"], row["logp"]) for row in json_lines(path)}
    left = [key for key in asked if key not in known]
    for first in range(0, len(left), size):
        some = left[first : first + size]
        known |= zip(some, write([asked[key] for key in some]), strict=True)
        if ranks.first:
            append(path, ({"key": k, "tokens": known[k][0], "logp": known[k][1]} for k in some))
        if ranks.agree(ranks.asked_to_stop):
            raise Stopped("stopped while answers were generated; --resume goes on")
    return [known[key] for key in asked]


class Trace:
    """The first steps of a run in one safetensors file (`--trace`), to check another program by:
    step/... (S,): step, loss, nll, grad_norm (before clipping), lr, beta, norm/policy (after
        the step), norm/ema and norm/reference (in it)
    pair/... (N,): step, COLUMNS, place (where it was drawn from: the replay buffer with the
        fresh pairs in it, 0 the oldest; SPIN's pool; SGPO's round; the rows), `sapo.pack`
    fresh/...: step and `sapo.pack` of the pairs made at a step, in the order they were stored
    In the metadata, as JSON under "args": the flags, save names of files."""

    def __init__(self, c: Config) -> None:
        self.path, self.parts = Path(c.trace or ""), list[dict[str, Tensor]]()
        self.partial = self.path.parent / f".{self.path.name}.partial"
        places = "model data eval_data out resume trace improver preference_data target_source"
        self.args = {k: v for k, v in dataclasses.asdict(c).items() if k not in places.split()}
        if self.path.exists():
            raise InputError(f"--trace {c.trace} is there already: name a file that is not")
        self.partial.touch()  # or fail before anything starts
        self.partial.unlink(missing_ok=True)

    def add(self, step: int, seen: Seen, learner: Learner, source: Source) -> None:
        """Records a step and writes the file anew: it is small, and the run may be killed."""
        pairs, table, row = seen
        row = row | {f"norm/{role}": learner.ranks.norm(m) for role, m in learner.models.items()}
        row["beta"] = learner.beta
        if not learner.ranks.first:
            return
        names = "loss nll grad_norm lr beta norm/policy norm/ema norm/reference".split()  # noqa: SIM905
        values = {name: [row.get(name, math.nan)] for name in names}
        part = {f"step/{k}": torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
        part["step/step"] = torch.tensor([step])
        part |= {f"pair/{key}": values for key, values in table.items()}
        part["pair/place"] = torch.tensor(source.picked, dtype=torch.int64)
        for name, made in (("pair", pairs), ("fresh", source.fresh)):
            part |= {f"{name}/{key}": values for key, values in sapo.pack(made).items()}
            part[f"{name}/step"] = torch.full((len(made),), step)
        self.parts.append(part)
        whole = {key: torch.cat([part[key] for part in self.parts]) for key in self.parts[0]}
        save_file(whole, self.partial, {"args": json.dumps(self.args)})
        self.partial.rename(self.path)


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; what was not written whole is left out."""
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError):  # a kill cut it off, perhaps within a character
            if isinstance(row := json.loads(line), dict):
                yield row


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file of JSON lines that is the old one or the new one at any time."""
    partial = path.with_name(f".{path.name}")
    partial.unlink(missing_ok=True)
    append(partial, rows)
    flush(partial)
    partial.rename(path)


def flush(path: Path) -> None:
    """Has a file's content, or a folder's entries, written to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# -------------------------------------------------------------------------------------- the ranks
def say(message: str) -> None:
    """A line on stderr, of the first rank alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, file=sys.stderr)


class Ranks:
    """The processes of the run; nothing else knows how many there are."""

    def __init__(self) -> None:
        self.asked_to_stop = False  # by SIGTERM or SIGINT
        self.rank = int(os.environ.get("RANK", 0))
        self.first = self.rank == 0  # this process writes and prints
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:  # a lost rank is missed after half an hour, but where one works alone
            minutes, device = timedelta(minutes=30), self.device if cuda else None
            dist.init_process_group("nccl" if cuda else "gloo", timeout=minutes, device_id=device)
            self.patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
            self.mesh = dist.init_device_mesh(self.device.type, (self.world,))

    def build(self, folder: Path, c: Config, role: str) -> Transformer:
        """Loads the policy, the EMA or the reference, each rank its shard, in fp32, but the
        reference's matrices as they would be rounded for each product. The order is checkpointing,
        compilation, sharding, and only then memory and weights."""
        model = Transformer.outline(folder)
        model.compute_dtype = torch.bfloat16 if c.precision == "bf16" else None
        model.checkpointing = c.activation_checkpointing
        for parameter in model.parameters():
            if role == "reference" and parameter.dim() == 2 and model.compute_dtype:
                parameter.data = parameter.data.to(model.compute_dtype)
        blocks = [*model.model["layers"].children()]
        for block in blocks if c.compile else ():
            # Shapes differ from batch to batch. What is fused rounds as what is not, or bf16 with
            # gradients differs from bf16 without, and the first loss is not ln 2.
            block.compile(dynamic=True, options={"emulate_precision_casts": True})
        if self.world > 1:
            policy = MixedPrecisionPolicy(model.compute_dtype, torch.float32)
            # By default the root stays whole until a backward pass. After a forward pass without
            # one (the EMA, the reference, an evaluation) the next update of it would be lost.
            for part in (*blocks, model):
                fully_shard(part, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)
        device = torch.device("cpu") if role == "ema" and c.ema_offload else self.device
        model.to_empty(device=device).requires_grad_(role == "policy")
        for parameter in model.parameters() if device != self.device else ():
            parameter.data = torch.empty_like(parameter, pin_memory=True)  # or copies would wait
        lm.load_weights(dict(model.named_parameters()), folder, self.place)
        return model

    def place(self, parameter: Tensor, value: Tensor) -> None:
        """parameter <- this rank's share of a whole value."""
        if isinstance(parameter, DTensor):
            chunks, parameter = value.chunk(self.world), parameter.to_local()
            value = chunks[self.rank] if self.rank < len(chunks) else value[:0]
        parameter.copy_(value)

    def send(self, values: Sequence[Any]) -> Tensor:
        """Numbers as a tensor on the device, without a wait for what runs there."""
        return torch.tensor(values).to(self.device, non_blocking=True)

    def whole(self, value: Tensor) -> Tensor:
        """The whole of a sharded tensor, on every rank (collective)."""
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach()

    def fetch(self, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The whole of a tensor (collective), in host memory on the rank that writes it."""
        value = self.whole(value.detach().to(dtype or value.dtype))
        return value.cpu() if self.first else value

    def norm(self, model: nn.Module) -> float:
        """The root of the sum of all squared weights, summed in float64 (collective)."""
        return math.sqrt(sum(self.whole(p.double().square().sum()) for p in model.parameters()))

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def agree(self, flag: bool) -> bool:
        """Whether any rank says so; the same answer on all."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def only_first(self, work: Callable[[], Any]) -> None:
        """The first rank does what may take days; the others wait, and hear of a failure."""
        failure: Exception | None = None
        try:
            if self.first:
                work()
        except (InputError, OSError, Stopped) as error:
            failure = error
        failed = torch.tensor(float(failure is not None))
        if self.world > 1:
            dist.all_reduce(failed, group=self.patient)
        if failed:
            raise failure or Stopped("rank 0 could not go on")

    @contextlib.contextmanager
    def decoder(self, model: Transformer) -> Iterator[Transformer]:
        """The model for decoding, where nothing is compiled: in its compute type, and with all
        weights at hand, as ranks stop at different times and must not wait for each other."""
        dtype = model.compute_dtype or model.dtype
        if self.world > 1 or dtype != model.dtype or self.device != model.device:
            named = model.named_parameters()
            held = {n: self.whole(p.to(self.device, non_blocking=True).to(dtype)) for n, p in named}
            model = lm.with_weights(model.config, held)
        with torch.compiler.set_stance("force_eager"):
            yield model

    def join(self, answers: list[Answer], asked: Sequence[Request]) -> list[Answer]:
        """All answers on every rank, which has every world-th: as a table of numbers, no pickle."""
        if self.world == 1:
            return answers
        most = max((budget for _, budget, _ in asked), default=0)
        table = torch.zeros(len(asked), 2 + most, dtype=torch.float64)
        for row, (tokens, logp) in zip(table[self.rank :: self.world], answers, strict=True):
            row[: 2 + len(tokens)] = torch.tensor([len(tokens), logp, *tokens], dtype=row.dtype)
        rows = self.sum(table.to(self.device)).tolist()
        return [([*map(int, row[2 : 2 + int(row[0])])], row[1]) for row in rows]


# -------------------------------------------------------------------------------------- the flags
@dataclass
class Config(sapo.Settings, sgpo.Settings):
    """The run. Of all flags the string below is the help; comments begin groups or name sources:
    [code] is the official SAPO code, [spin] that of SPIN, [ours] our own choice."""

    method: Literal["sft", "dpo", "orpo", "spin", "sapo", "sgpo"] = "sapo"
    "where the pairs come from"
    recipe: str | None = None
    "settings by name, listed below; flags given explicitly win over it"
    out: str = "out"  # [ours]
    "the folder of the run"
    resume: bool = False
    "go on from the newest whole checkpoint in --out"
    seed: Annotated[int, 0, 2**62] = 42  # [code]
    "everything drawn at random follows from it"
    steps: Count | None = None
    "optimizer steps; sgpo: of phase 2, in each round; default: as --epochs says"
    epochs: Positive = 4.0  # [code]; sft, orpo: 3
    "passes over the rows; spin: an iteration's pairs; sgpo: a round's prompts; sft, orpo: 3"
    save_every: Whole = 0
    "steps between checkpoints; 0: none, but for the one that SIGTERM or SIGINT makes"
    keep: Whole = 0
    "how many checkpoints are kept, the newest; 0: all"
    save_dtype: Literal["fp32", "bf16"] = "fp32"  # [ours]: an update of 5e-7 is lost in bf16
    "type of the weights in OUT/final"
    log_every: Count = 10  # [ours]
    "steps between rows of metrics.jsonl"
    eval_every: Whole = 0
    "steps between evaluations; 0: at the end only"
    trace: str | None = None
    "a .safetensors file to record the first steps in: pairs, draws, log-probs, losses, norms"
    trace_steps: Annotated[int, 1, 10**6] = 10  # [ours]
    "how many steps --trace records"
    # Model and data:
    model: str | None = None
    "a Hugging Face folder to start from; default: a tiny model, pre-trained there and then"
    data: list[str] | None = None
    "JSON or JSONL files of training rows; default: the built-in tasks"
    eval_data: list[str] | None = None
    "JSON or JSONL files of held-out rows"
    all_turns: bool = False
    "each assistant's turn in `messages` is a row, not the last alone; sgpo: each is a prompt too"
    skip_bad_rows: bool = False
    "leave out, and count, rows that are malformed or refused by the chat template"
    chat_template: Literal["chatml", "zephyr", "llama3"] | None = None
    "a chat template by name, for a base model without one; Llama 3's: llama3 (official: chatml)"
    date: str | None = None
    "the date, such as 2026-01-31, for chat templates that print one; default: when the run began"
    max_length: Annotated[int, 2, 10**7] = 2048  # [code]
    "tokens of prompt and response; longer responses are cut"
    max_prompt_length: Annotated[int, 2, 10**7] | None = None  # [code]: 1792, of 2048
    "rows whose prompt has this many tokens or more are dropped; default: 7/8 of --max-length"
    sft_first: Whole = 0  # [ours]; the official runs begin from models that were trained so
    "steps of --method sft on the same rows before the method, into OUT/sft"
    sft_lr: Positive = 2e-5  # [code], as --method sft has it
    "peak learning rate of --sft-first"
    # Loss and optimization:
    loss: Literal["dpo", "ipo", "hinge", "orpo"] | None = None  # [code] has dpo and orpo
    "the loss on the pairs; default: dpo, and orpo for --method orpo"
    batch_size: Count = 64  # [code]
    "pairs per optimizer step, over all ranks"
    micro_batch_size: Count = 4  # [ours]
    "pairs per forward pass and rank; it bounds memory and changes nothing else"
    lr: list[Positive] = field(default_factory=lambda: [5e-7])  # [code]; sft 2e-5, orpo 5e-6
    "peak learning rate; spin, sgpo: or one a round; default: 5e-7, --method sft 2e-5, orpo 5e-6"
    beta: list[Positive] = field(default_factory=lambda: [0.1])  # [code]
    "how strongly the reference holds the policy; or one a round, the last for all that remain"
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"  # [code]
    "the optimizer; --method sft or orpo alone makes it adamw"
    adam_beta2: Annotated[float, 0.0, 1 - 1e-9] = 0.999  # torch's default
    "AdamW's second beta"
    weight_decay: Share = 0.0  # [ours]
    "decoupled for AdamW, added to the gradient for RMSprop, as torch has it"
    schedule: Literal["linear", "cosine", "inverse_sqrt", "constant"] = "linear"  # [code]
    "of the rate after the warm-up, above 0 at each step; sft: cosine, orpo: inverse_sqrt"
    warmup: Annotated[float, 0.0, 1e9] = 0.1  # [code]; orpo: 100
    "below 1 a share of the steps, otherwise a number of steps; --method orpo alone makes it 100"
    max_grad_norm: Weight = 1.0  # [ours]; 0 is off
    "the gradient is scaled down to this norm; 0: never"
    label_smoothing: Annotated[float, 0.0, 0.5] = 0.0  # [code]
    "share of pairs assumed to be labelled the wrong way round (cDPO)"
    length_normalize: bool = False  # [code]
    "log-probs per token in place of their sums in the dpo, ipo and hinge losses"
    nll_weight: Weight = 0.0  # [code]
    "weight of an added NLL term on the chosen side, per response token"
    orpo_lambda: Weight = 0.05  # [code]
    "weight of ORPO's odds-ratio term"
    # Precision and memory:
    precision: Literal["fp32", "medium", "bf16"] = "fp32"  # [ours]; [code] has bf16
    "of the computation; weights and optimizer are fp32; medium: fp32, but faster matmuls of bf16"
    activation_checkpointing: bool = False
    "recompute each block in the backward pass, to save memory"
    compile: bool = False
    "compile each block with torch.compile; the first steps then take a minute or more"
    deterministic: bool = False  # [ours]
    "sum gradients in one order on a GPU too, so that a run repeats to the bit; attention is slower"


TASKS = {  # the built-in tasks; all [ours], from the prototypes' measurements
    "steps": 120, "batch_size": 32, "micro_batch_size": 32, "lr": [1e-4], "max_length": 128,
    "optimizer": "rmsprop", "schedule": "linear", "warmup": 0.1, "max_new_tokens": 40,
    "segment_length": "full", "segment_rule": "uniform", "temperature": 1.0, "top_k": 0,
    "top_p": 1.0, "replay_capacity": 512, "responses_per_prompt": 2, "drop_identical": True,
    "ref_update_every": 30, "generate_batch_size": 256, "sft_lr": 1e-4,
}  # fmt: skip
TASKS_SGPO = TASKS | {
    "method": "sgpo", "lr": [3e-6], "improver_lr": 1e-4, "improver_epochs": 4.0,
    "responses_per_prompt": 8, "improve_temperature": 0.0,
    "improver_instruction": data.REWRITE_PROMPT.replace("{draft}", "{answer}"),
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {"tasks": TASKS, "tasks-sgpo": TASKS_SGPO}
RECIPES |= sapo.RECIPES | sgpo.RECIPES | {"tasks-segments": TASKS | {"segment_length": "8"}}
RECIPES |= {
    f"{base}-{name}": RECIPES[base] | change
    for base in ("tasks", "sapo-llama3-8b", "sapo-orpo-llama3-8b")
    for name, change in sapo.ABLATIONS.items()
    if not ("orpo" in base and "ref_update" in change)  # it has no reference
    and not change.items() <= RECIPES[base].items()  # the tasks have no segments
}
OWN: dict[str, dict[str, Any]] = {  # a method's own defaults
    "spin": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "rounds": 4},  # [spin]
    "sft": {"lr": [2e-5], "optimizer": "adamw", "schedule": "cosine", "epochs": 3.0},  # [code]
    "orpo": {"lr": [5e-6], "optimizer": "adamw", "schedule": "inverse_sqrt", "warmup": 100.0,
             "epochs": 3.0},  # the recipe's
}  # fmt: skip
MAY_CHANGE = {"resume", "out", "steps", "epochs", "log_every", "save_every", "show_every"}
MAY_CHANGE |= {"trace", "trace_steps", "keep"}


def parse_args(argv: Sequence[str]) -> Config:
    """Flags -> Config: defaults, then the recipe's values, then what was given explicitly."""
    told = ["recipes (`tasks`, or `tasks-sgpo`, is in force where no --data is given):"]
    told += (f"  {k}\n    {' '.join(f'{n}={x}' for n, x in v.items())}" for k, v in RECIPES.items())
    given = sample.parse_flags(Config, argv, __doc__ or "", "\n".join(told))
    if "steps" in given and "epochs" in given:
        raise InputError("--steps and --epochs both say how long to train: give one of them")
    usual = "tasks-sgpo" if given.get("method") == "sgpo" else "tasks"
    own = given.get("data") or (given.get("improver") and given.get("preference_data"))
    recipe = given.get("recipe") or (None if own else usual)
    if recipe is not None and recipe not in RECIPES:
        raise InputError(f"--recipe {recipe!r} is none of {', '.join(RECIPES)}")
    named = RECIPES[recipe] if recipe else {}
    method = given.get("method", named.get("method", Config.method))
    values = OWN.get(method, {}) | named | given | {"recipe": recipe}
    if "epochs" in given:
        values["steps"] = None
    if "loss" not in given and values.get("method") != named.get("method"):
        values["loss"] = None  # the recipe's is for the recipe's method
    if method == "sgpo" and given.get("improver") and "improver_instruction" not in given:
        values["improver_instruction"] = sample.read_instruction(given["improver"])
    c = check(Config(**values))
    if c.loss == "orpo" and "beta" in given:
        raise InputError("--beta is not read by ORPO; the weight of its term is --orpo-lambda")
    for name in unread(c, given):
        say(f"warning: --{name.replace('_', '-')} is not read by such a run")
    return c


def unread(c: Config, given: Mapping[str, Any]) -> list[str]:
    """The flags that were given, and that neither the method nor its loss or optimizer reads."""
    own = getattr(SOURCES[c.method][1], "__dataclass_fields__", {}).keys()
    idle = {
        "beta": c.loss is None,
        "orpo_lambda": c.loss != "orpo",
        "label_smoothing": c.loss != "dpo",
        "length_normalize ref_update ref_update_every": not sapo.compares(c),
        "nll_weight": c.loss in (None, "orpo"),
        "responses_per_prompt": c.method == "spin",
        "adam_beta2": c.optimizer != "adamw",
        "top_k top_p": not c.temperature and not c.improve_temperature,
        "trace_steps": c.trace is None,
        "all_turns": SOURCES[c.method][0] is Source,  # it compares two sides of a row
        "all_turns skip_bad_rows": not (c.data or c.eval_data or c.preference_data),
        "sft_first": c.method == "sgpo",
        "sft_lr": c.method == "sgpo" or not c.sft_first,
        "target_model target_workers target_instruction": target_server(c) is None,
        "target_source fence_k fence_given improver_epochs improver_lr improver_mix": c.improver,
        "model": c.improver and c.method == "sgpo",
    }
    names = {name for some, applies in idle.items() if applies for name in some.split()}
    return [x for x in given if x in names or x not in own | Config.__annotations__.keys()]


def check(c: Config) -> Config:
    """Fills in what others decide. Raises InputError for values that make no sense together."""
    c.max_prompt_length = c.max_prompt_length or max(2, c.max_length * 7 // 8)
    if c.method != "sft" and c.loss is None:
        c.loss = "orpo" if c.method == "orpo" else "dpo"
    if not sapo.compares(c):  # SFT is its NLL, and ORPO has it
        c.nll_weight = 1.0
    if c.method == "sgpo":
        c.model = c.improver or c.model
        c.target_source = c.target_source or ("tasks" if c.data is None else "gold")
    sapo_buffer = c.replay_capacity if c.method == "sapo" else c.batch_size
    rounds = c.rounds if issubclass(SOURCES[c.method][1] or object, sapo.Rounds) else 1
    segment = int(c.segment_length) if c.segment_length.isdecimal() else 0
    asked = {"improver": c.improver_instruction, "target": c.target_instruction}
    parts = [(name, part) for name in asked for part in ("{prompt}", "{answer}")]
    lacking = [f"--{name}-instruction holds no {p}" for name, p in parts if p not in asked[name]]
    wrong = (
        (c.segment_length != "full" and not 0 < segment < 10**9,
         f"--segment-length is {c.segment_length!r}, not a number of tokens or 'full'"),
        (c.max_prompt_length > c.max_length,
         f"--max-prompt-length {c.max_prompt_length}: no room in --max-length {c.max_length}"),
        (c.method == "sft" and c.loss, f"--loss {c.loss} needs pairs, and --method sft has none"),
        (c.method == "orpo" and c.loss != "orpo",
         f"--method orpo with --loss {c.loss}: that is --method dpo"),
        (not sapo_buffer and c.sample_every > 1,
         "--sample-every above 1 needs a --replay-capacity above 0"),
        (0 < sapo_buffer < c.batch_size,
         f"--replay-capacity {c.replay_capacity} is below --batch-size {c.batch_size}: too few"),
        (c.chat_template and not c.model, "--chat-template is for --model, which is not given"),
        (c.trace and c.resume, "--trace records a run from its first step: not with --resume"),
        (target_server(c) and not c.target_model, "--target-source URL needs --target-model too"),
        (c.method == "sgpo" and c.target_source == "tasks" and c.data is not None,
         "--target-source tasks mends the built-in tasks, and --data is given"),
        (c.method == "sgpo" and c.keep_identical and not c.nll_weight,
         "--keep-identical is for --loss orpo or --nll-weight: no other loss learns"),
        (c.ema_offload and int(os.environ.get("WORLD_SIZE", 1)) > 1,
         "--ema-offload is for one process; over several the EMA is sharded"),
        (c.method == "sgpo" and lacking, "; ".join(lacking)),
        (max(len(c.lr), len(c.beta)) > rounds, "--lr and --beta have more values than rounds"),
    )  # fmt: skip
    for applies, message in wrong:
        if applies:
            raise InputError(message)
    return c


def target_server(c: Config) -> data.TargetServer | None:
    """The server of --target-source, where that is a URL. InputError for a wrong one or its key."""
    url, key = c.target_source or "", os.environ.get("OPENAI_API_KEY", "").strip()
    if c.method != "sgpo" or not url.lower().startswith(("http://", "https://")):
        return None
    return data.TargetServer(url.rstrip("/"), c.target_model or "", key or None, c.target_workers)


# ---------------------------------------------------------------------------------- the whole run
def main(argv: Sequence[str]) -> int:
    """Parses, runs, and turns bad input into one line and exit status 2."""
    ranks = None

    def stop(number: int, _: Any) -> None:
        """Asks the loop to save and stop. A second SIGINT interrupts: torchrun sends each twice."""
        if ranks is None:
            raise SystemExit(143)
        if ranks.asked_to_stop and number == signal.SIGINT and not dist.is_torchelastic_launched():
            raise KeyboardInterrupt
        ranks.asked_to_stop = True

    before = [(number, signal.signal(number, stop)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        c = parse_args(argv)
        if c.deterministic:  # cuBLAS reads it as it starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        ranks = Ranks()
        run(c, ranks)
        return 0
    except (InputError, OSError, SafetensorError) as error:  # the last where a disk is full
        if int(os.environ.get("RANK", 0)) > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(9)  # rank 0 most likely says the same, and torchrun then ends this one
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        say(str(stopped))
        return 143
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def run(c: Config, ranks: Ranks) -> None:
    """Reads the data, makes or takes the start, trains, and says what came of it."""
    out, on_tasks = Path(c.out), c.data is None and not (c.improver and c.preference_data)
    torch.set_float32_matmul_precision("medium" if c.precision == "medium" else "highest")
    args = out / "args.json"
    saved = lm.read_json(args) if c.resume and args.is_file() and not args.is_symlink() else {}
    if c.resume and (out / "final").exists():
        if (c.steps or 0, c.epochs) <= (saved.get("steps") or 0, saved.get("epochs", c.epochs)):
            print(f"{out} holds a finished run: nothing to resume; more --steps go on with it")
            return
        if not [*out.glob("checkpoints/step-*")]:
            raise InputError(f"{out} is finished, with no checkpoint to go on from: --save-every")
    now = torch.tensor(time.time() * ranks.first, dtype=torch.float64, device=ranks.device)
    c.date = c.date or saved.get("date", datetime.fromtimestamp(int(ranks.sum(now))).isoformat())
    with lm.reading(f"--date {c.date}"):
        date = datetime.fromisoformat(c.date or "")
    with tempfile.TemporaryDirectory() as folder:
        data.write_task_tokenizer(folder)
        tokenizer = data.load_tokenizer(c.model or folder, c.chat_template, date)
    source, start = SOURCES[c.method][0], Path(c.model) if c.model else out / "start"
    if c.model:
        Transformer.outline(start)  # what is wrong there is told before anything is made
    read, counts = read_rows(c, tokenizer)
    rows = read.get("prompts") or [row for _, row in read["--data"]]
    steps = source.schedule(len(rows), c)[-1]
    told = f"method {c.method}, loss {c.loss or 'nll'}, model {c.model or 'built-in'}, "
    told += f"{len(rows)} rows, {steps} steps, rate {' '.join(map(str, c.lr))}, {c.optimizer}, "
    if ranks.first:
        print(told + c.precision, *counts, sep="\n", flush=True)
    trace = claim(c, ranks, saved, read)
    if not c.model and not start.exists():
        pretrain(c, start, tokenizer, ranks)
    files = Files(ranks, tokenizer, out / "metrics.jsonl", out / "final", c.method)
    files.eval_rows = [row for _, row in read["--eval-data"]]
    files.checkpoints, files.trace, files.on_tasks = out / "checkpoints", trace, on_tasks
    first = before(c, start, read, files)
    if on_tasks and c.method != "sft" and not (out / "control").exists():
        control(c, start, read.get("--data") or read["prompts"], files, files.before + steps)
    learner = Learner(c, first, tokenizer, ranks, *source.roles)
    fit(c, learner, source(rows, learner), files)
    if ranks.first:
        (out / ".generated.jsonl").unlink(missing_ok=True)
        write_rows(args, [dataclasses.asdict(c) | {"inputs": lm.read_json(args)["inputs"]}])
        if on_tasks:
            models = {"start": start, "sft control": out / "control", "sft first": out / "sft"}
            models |= {"improver": out / "improver", c.method: files.final}
            models = {name: folder for name, folder in models.items() if folder.exists()}
            sample.print_accuracies(models, tokenizer, c.seed)
        sample.plot_curves(out)
        print(f"the trained model is in {files.final}")


def before(c: Config, start: Path, read: Mapping[str, list[Any]], files: Files) -> Path:
    """Trains what the method begins with: SGPO's improver, or --sft-first. The model's folder."""
    if c.method == "sgpo":
        files.beside = {sample.IMPROVER_FILE: json.dumps({"instruction": c.improver_instruction})}
        if c.improver is None:
            files.before = train_improver(c, start, read, files)
            start = files.final.with_name("improver")
    elif c.sft_first:
        first = dataclasses.replace(files, final=files.final.with_name("sft"), phase="sft")
        if not first.final.exists():
            rows, how = [row for _, row in read["--data"]], {"steps": c.sft_first, "lr": [c.sft_lr]}
            sft(c, start, rows, first, **OWN["sft"] | how)
        files.before, start = c.sft_first, first.final
    return start


def read_rows(c: Config, tokenizer: data.Tokenizer) -> tuple[dict[str, list[Any]], list[str]]:
    """What a run reads, by its flag: rows as text and tokens, and what else a resumed one must find
    as it was; and lines on what was dropped. InputErrors come before targets are paid for."""
    texts = sorted(tokenizer.files.items())  # config.json may name an EOS too
    read: dict[str, list[Any]] = {"tokenizer or chat template": [texts, tokenizer.eos_ids]}
    paired, told = SOURCES[c.method][0] is Source, list[str]()  # it takes the rows' rejected sides

    def rows(paths: list[str] | None, n: int = 128, **how: Any) -> list[sgpo.Ask]:
        bad, task = list[str]() if c.skip_bad_rows else None, ("clean", n, c.seed)
        limits, how = (c.max_length, c.max_prompt_length or 0), how | {"all_turns": c.all_turns}
        try:
            text = data.load_examples(paths, bad=bad, **how) if paths else data.task_examples(*task)
            examples, pairs, counts = data.encode_examples(text, tokenizer, *limits, bad)
        except data.BadRow as error:
            raise InputError(f"{error}; --skip-bad-rows leaves such rows out") from None
        told.append(", ".join(f"{n} {key.replace('_', ' ')}" for key, n in counts.items() if n))
        told.extend([f"{len(bad)} bad rows, the first: {bad[0]}"] if bad else [])
        return [*zip(examples, pairs, strict=True)]

    def asks(paths: list[str] | None, n: int) -> list[sgpo.Ask]:
        found = rows(paths, n, prompts=True)
        kept = sgpo.leave_room(found, tokenizer, c)
        told.append(f"{len(kept)} prompts, {len(found) - len(kept)} too long to be improved on")
        return kept

    read["--eval-data"] = rows(c.eval_data, rejected=paired or None) if c.eval_data else []
    if c.method != "sgpo":
        read["--data"] = rows(c.data, rejected=paired)
    elif c.improver is None:
        read["--data"] = asks(c.data, 128)
        if c.target_source == "gold" and not any(row.chosen for _, row in read["--data"]):
            raise InputError("--target-source gold, and no row of --data has a response")
        if c.target_source not in ("gold", "tasks") and target_server(c) is None:
            read["--target-source"] = data.load_targets(c.target_source or "")
    if c.method == "sgpo":
        read["prompts"] = asks(c.preference_data or c.data, 1024)
    if c.model:  # a file's beginning says of each tensor the name, type, shape and place
        files = sorted(Path(c.model).glob("*.safetensors"))
        heads = [(file.name, file.stat().st_size, file.open("rb").read(2**20)) for file in files]
        read["weights in --model"] = [(Path(c.model) / "config.json").read_bytes(), *heads]
    return read, told


def claim(c: Config, ranks: Ranks, saved: dict[str, Any], read: dict[str, Any]) -> Trace | None:
    """Takes --out for this run, or checks on resume that it was started alike; makes its trace."""
    out, now = Path(c.out), dataclasses.asdict(c)
    found = {name: functools.reduce(hash_seed, rows, 0) for name, rows in read.items()}
    made = "start control sft metrics.jsonl final checkpoints improver improver_targets.jsonl"
    for path in out.iterdir() if out.is_dir() else ():
        if path.is_symlink():
            raise InputError(f"--out {out} holds a symbolic link, {path.name}: take another folder")
    taken = [name for name in [*made.split(), "pairs.jsonl"] if (out / name).exists()]
    if taken and not c.resume:
        raise InputError(f"--out {out} holds {taken[0]} of another run: --resume or another folder")
    if taken and not saved:
        raise InputError(f"--resume: {out} has no args.json to tell which run it is; take another")
    other = [k for k in now if saved and k not in MAY_CHANGE and now[k] != saved.get(k)]
    if other:
        told = ", ".join(f"--{k.replace('_', '-')} was {saved.get(k)}" for k in other)
        raise InputError(f"--resume with other flags than {out} was started with: {told}")
    for name in [name for name in found if saved.get("inputs", found).get(name) != found[name]]:
        raise InputError(f"--resume with another {name} than {out} was started with")
    for name in [name for name in ("steps", "epochs") if saved and saved[name] != now[name]]:
        say(f"warning: --{name} was {saved[name]} and is {now[name]}: the schedule bends")
    trace = Trace(c) if c.trace is not None else None
    if ranks.first and not saved:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".generated.jsonl").unlink(missing_ok=True)  # of a run that left nothing else
        write_rows(out / "args.json", [now | {"inputs": found}])
    return trace


START: dict[str, Any] = {  # how the built-in start is trained: an SFT run like any other
    "steps": 1800, "batch_size": 32, "micro_batch_size": 32,
    "lr": [2e-3], "optimizer": "adamw", "adam_beta2": 0.98, "warmup": 80.0, "schedule": "linear",
    "weight_decay": 0.0, "max_grad_norm": 1.0, "log_every": 50, "eval_every": 0,
    "save_dtype": "fp32", "max_length": 128, "max_prompt_length": 128, "precision": "fp32",
}  # fmt: skip
START_MODEL = {  # RoPE base 100: 10,000 gave 22% for 65%. With 3 layers seeds differed more: LAB.md
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 168, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 100.0,
    "tie_word_embeddings": True, "max_position_embeddings": 2048, "hidden_act": "silu",
}  # fmt: skip


def sft(c: Config, start: Path, rows: Sequence[Pair], files: Files, **how: Any) -> None:
    """Fine-tunes on rows' good responses before or beside a method, with these settings changed."""
    alone = dataclasses.replace(c, method="sft", loss=None, nll_weight=1.0, **how)
    learner = Learner(alone, start, files.tokenizer, files.ranks)
    fit(alone, learner, sapo.SFT(rows, learner), files)


def pretrain(c: Config, start: Path, tokenizer: data.Tokenizer, ranks: Ranks) -> None:
    """Makes the built-in start: SFT on answers of mixed quality, a fifth of them rewritings."""
    if ranks.first:
        print("pre-training the built-in start", flush=True)
    sizes = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_ids[0]}
    fresh = Transformer(lm.Config.from_dict(START_MODEL | sizes))
    fresh.init_weights(c.seed)
    examples = data.task_examples("pretrain", START["steps"] * START["batch_size"], c.seed, 0.2)
    rows = [data.encode_example(tokenizer, example) for example in examples]
    files = Files(ranks, tokenizer, start.with_suffix(".jsonl"), start, "sft")
    with tempfile.TemporaryDirectory() as blank:  # each rank's own
        fresh.save_pretrained(blank)
        sft(c, Path(blank), rows, files, **START)


def control(c: Config, start: Path, asks: list[sgpo.Ask], files: Files, steps: int) -> None:
    """OUT/control: SFT on the clean set, for as many steps as the method takes in all phases."""
    metrics, final = files.metrics.with_name("control.jsonl"), files.final.with_name("control")
    beside = dataclasses.replace(files, metrics=metrics, final=final, phase="sft", before=0)
    beside.checkpoints, beside.trace, beside.beside = None, None, {}
    rate = [c.improver_lr] if c.method == "sgpo" else c.lr
    sft(c, start, [row for _, row in asks[:128]], beside, steps=steps, lr=rate)


def train_improver(c: Config, start: Path, read: Mapping[str, list[Any]], files: Files) -> int:
    """SGPO's first phase, OUT/improver: the start, taught to improve its own answers. Its steps."""
    folder, note = files.final.with_name("improver"), files.final.with_name("improver_filter.json")
    if folder.exists():
        return int(lm.read_json(note)["steps"])
    alone = dataclasses.replace(c, method="sft", loss=None, nll_weight=1.0, steps=None)
    alone.lr, alone.epochs = [c.improver_lr], c.improver_epochs
    learner = Learner(alone, start, files.tokenizer, files.ranks)
    targets = read.get("--target-source") or obtain_targets(c, read["--data"], learner)
    rows, report = sgpo.improver_rows(targets, read["--data"], learner)
    source = sapo.SFT(rows, learner)
    if files.ranks.first:
        told = [f"{report[key]} {key}" for key in ("targets", "too_long", "dropped", "fence")]
        print(", ".join(told), flush=True)
        write_rows(note, [{"steps": source.bounds[-1]} | report])
    phase = dataclasses.replace(files, final=folder, phase="improver", on_tasks=False, eval_rows=())
    fit(alone, learner, source, phase)
    return source.bounds[-1]


def obtain_targets(c: Config, asks: list[sgpo.Ask], learner: Learner) -> list[data.Example]:
    """What phase 1 learns from. OUT/improver_targets.jsonl has a row for each draft, written as
    soon as it is known, and what is in the file is not asked for again."""
    path = Path(c.out) / "improver_targets.jsonl"
    drafts = [ask for ask in asks for _ in range(c.responses_per_prompt)]
    prompts = [sgpo.as_prompt(example.messages) for example, _ in drafts]
    known: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(json_lines(path), 1):
        i, texts = row.get("index"), (row.get("response"), row.get("improved") or "")
        if type(i) is not int or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}: row {number} is no target of a run; remove it")
        if 0 <= i < len(drafts) and row.get("prompt") == prompts[i]:
            known[i] = row
    missing = [i for i in range(len(drafts)) if i not in known]
    asked = [sapo.request(drafts[i][1].prompt, c, hash_seed(c.seed, "draft", i)) for i in missing]
    new = learner.generate(learner.policy, asked, keep=True)
    read = learner.tokenizer.response_text
    answers = {i: read(tokens) for i, (tokens, _) in zip(missing, new, strict=True)}

    def gather() -> None:
        server = target_server(c)
        write_rows(path, (known[i] for i in sorted(known)))
        for done, (i, better, why) in enumerate(sgpo.improvements(c, drafts, answers, server), 1):
            known[i] = {"index": i, "prompt": prompts[i], "response": answers[i]}
            known[i] |= {"improved": better} | ({"dropped": why} if why else {})
            append(path, [known[i]])
            if learner.ranks.asked_to_stop:
                raise Stopped("stopped while targets were asked for; --resume goes on")
            if server is not None and done % 100 == 0:
                print(f"targets {done}/{len(answers)}", flush=True)
        write_rows(path, (known[i] for i in sorted(known)))
        dropped = collections.Counter(row.get("dropped") for row in known.values())
        print(", ".join(f"{n} {why or 'targets'}" for why, n in dropped.items()), flush=True)

    learner.ranks.only_first(gather)
    return data.load_targets(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
