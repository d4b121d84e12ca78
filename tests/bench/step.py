"""A preference step against a plain transformers loop and TRL's DPOTrainer.

    python tests/bench/step.py                       # vocabularies of 32,000 and 128,256
    python tests/bench/step.py --device cuda --size llama8b --precision bf16

A step: the policy's forward and backward pass, the reference's forward pass, clipping, RMSprop. All
sides begin with the same random weights and take the same pairs. The sides:

    loop   LlamaForCausalLM on the chosen and the rejected rows, padded; float log-softmax over
           (B, T, V); DPO's loss; clip_grad_norm_; torch.optim.RMSprop
    TRL    DPOTrainer: its collator, its training_step, its clipping, its optimizer's step, as the
           loop of its `train` calls them, without the callbacks, the logging and the schedule. No
           recomputation. For bf16 its step runs in the autocast that accelerate would put there
    ours   train.Trainer.step with --method dpo

"fresh": the pairs are new in every step. "kept": the same pairs come again under the same reference,
whose log-probs of them are known: ours keeps them by itself, the loop is given a dict, TRL has
precompute_ref_log_probs. The large shapes have kept rows alone, for which no second model is
needed; there the sides take turns, each built and freed, and all recompute their blocks.

Before timing, two steps of each side on the same pairs: the losses must be ln 2, and then agree
with the loop's within 1e-4 in fp32 (what "medium" and bf16 differ by is printed).

The share of the matmul rate counts 6 FLOPs per weight and token that the side computes (padding
and the prompt's second copy too; 2 more where the reference is fresh). The head's weights count
where it is applied. Attention's scores and recomputation do not count.
Peak memory is what a step takes above the loaded models: gradients, the optimizer's state,
activations.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import clock
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence

import sapo
from data import Pair

BETA, LR, CLIP = 0.1, 1e-5, 1.0


def load(folder: Path, device: str) -> Any:
    """transformers' model, fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device)


def autocast(device: str, precision: str) -> Any:
    """bf16 is autocast; other precisions are settings of the matmuls."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


class Loop:
    """The plain loop that many begin with."""

    def __init__(self, folder: Path, device: str, large: bool) -> None:
        self.device, self.known = device, {}
        self.policy = load(folder, device).train()
        self.reference = self.policy if large else load(folder, device)
        if large:
            self.policy.gradient_checkpointing_enable()
        self.optimizer = torch.optim.RMSprop(self.policy.parameters(), lr=LR)

    def logps(self, model: Any, pairs: Sequence[Pair]) -> torch.Tensor:
        """(2, N): summed log-probs of the chosen and of the rejected responses."""
        rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
        ids = [torch.tensor([*prompt, *side]) for prompt, side in rows]
        scored = [torch.tensor([0] * len(a) + [1] * len(b)) for a, b in rows]
        mask = [torch.ones(len(x), dtype=torch.int64) for x in ids]
        tokens_BT, scored_BT, mask_BT = (
            pad_sequence(x, batch_first=True).to(self.device) for x in (ids, scored, mask)
        )
        logits_BTV = model(tokens_BT, attention_mask=mask_BT, use_cache=False).logits
        logps_BTV = logits_BTV[:, :-1].float().log_softmax(-1)
        logps_BT = logps_BTV.gather(2, tokens_BT[:, 1:, None])[:, :, 0]
        return (logps_BT * scored_BT[:, 1:]).sum(1).view(2, -1)

    def step(self, pairs: Sequence[Pair], precision: str, kept: bool) -> float:
        """One update; the loss before it."""
        with autocast(self.device, precision):
            reference = self.known.get(id(pairs)) if kept else None
            if reference is None:
                with torch.no_grad():
                    reference = self.known[id(pairs)] = self.logps(self.reference, pairs)
            chosen, rejected = self.logps(self.policy, pairs) - reference
            loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class TRL:
    """TRL's trainer, a step at a time."""

    def __init__(self, folder: Path, device: str, large: bool) -> None:
        import datasets
        import trl

        self.device, self.known, model = device, {}, load(folder, device)
        words = [{"prompt": "sort ba", "chosen": "ab", "rejected": "ba"}]  # it insists on some text
        with tempfile.TemporaryDirectory() as scratch:
            config = trl.DPOConfig(
                scratch, beta=BETA, use_cpu=device == "cpu", bf16=False, report_to=[],
                activation_checkpointing=large, max_grad_norm=CLIP, max_length=None,
                precompute_ref_log_probs=large, disable_tqdm=True,
            )  # fmt: skip
            self.trainer = trl.DPOTrainer(
                model=model,
                ref_model=None if large else load(folder, device),
                args=config,
                train_dataset=datasets.Dataset.from_list(words),
                processing_class=transformers.AutoTokenizer.from_pretrained(folder),
                optimizers=(torch.optim.RMSprop(model.parameters(), lr=LR), None),
            )
        self.trainer.current_gradient_accumulation_steps = 1  # as `train` sets it

    def rows(self, pairs: Sequence[Pair], kept: bool) -> list[dict[str, Any]]:
        """Pairs as TRL's data sets hold them: tokenized, and with precompute_ref_log_probs beside
        the log-probs that TRL's own function computes at the start."""
        rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs]
        if not kept:
            return rows
        if id(pairs) not in self.known:
            trainer = self.trainer
            inputs = trainer._prepare_inputs(trainer.data_collator(rows))
            logps = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, inputs)
            self.known[id(pairs)] = list(zip(*(x.tolist() for x in logps), strict=True))
        both = zip(rows, self.known[id(pairs)], strict=True)
        return [row | {"ref_chosen_logps": c, "ref_rejected_logps": r} for row, (c, r) in both]

    def step(self, pairs: Sequence[Pair], precision: str, kept: bool) -> float:
        """One update; the loss before it."""
        trainer = self.trainer
        trainer.precompute_ref_logps = kept
        trainer.compute_loss_context_manager = lambda: autocast(self.device, precision)
        inputs = trainer.data_collator(self.rows(pairs, kept))
        loss = trainer.training_step(trainer.model, inputs)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), CLIP)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return float(loss)


class Given(sapo.Static):
    """A source of the pairs that it is given."""

    pairs: Sequence[Pair] = ()

    def before_step(self, t: int) -> list[Pair]:
        """Those pairs."""
        self.picked = list(range(len(self.pairs)))
        return list(self.pairs)


class Ours:
    """The product's trainer, a step at a time."""

    def __init__(self, folder: Path, device: str, large: bool, precision: str, more: Any) -> None:
        ranks = clock.Machine(device, one=large)
        flags = ["--method", "dpo", "--steps", 10**6, "--lr", LR, "--beta", BETA]
        flags += ["--max-grad-norm", CLIP, "--precision", precision, "--micro-batch-size", 8]
        flags += ["--activation-checkpointing"] * large
        self.trainer, self.t = clock.trainer(folder, [Pair([1], [2], [3])], ranks, flags + more), 0
        self.trainer.source = self.source = Given(self.trainer.job.rows, self.trainer.config)

    def step(self, pairs: Sequence[Pair], precision: str, kept: bool) -> float:
        """One update; the loss before it."""
        self.source.pairs, self.t = pairs, self.t + 1
        return self.trainer.step(self.t - 1)["loss"]


class Bench:
    """The rows of one shape's table: (side, precision, fresh or kept)."""

    def __init__(self, args: Any, size: str, folder: Path, flags: list[str]) -> None:
        self.args, self.shape, self.flags = args, clock.SHAPES[size], flags
        self.folder = clock.write_model(self.shape, folder, args.device)
        self.batches = [clock.make_pairs(self.shape, i) for i in range(args.reps + 1)]
        states = ["kept"] if self.shape.large else ["fresh", "kept"]
        self.rows = [(s, p, k) for k in states for p in args.precision for s in SIDES]
        self.losses: dict[tuple[str, str], list[float]] = {}
        self.built: dict[tuple[str, ...], Any] = {}

    def build(self, side: str, precision: str, state: str) -> Any:
        """The side of a row. The rows of a side share it where they can."""
        key = (side, precision) if side == "ours" else (side,)
        if key not in self.built:
            common = (self.folder, self.args.device, self.shape.large)
            if side == "ours":
                made: Any = Ours(*common, precision, self.flags)
            else:
                made = (TRL if side == "TRL" else Loop)(*common)
            self.built[key] = made
            if self.args.only is None:
                both = [self.call(made, precision, state) for state in (state, "kept")]
                self.losses[side, precision] = [call(0) for call in both]
        return self.built[key]

    def call(self, side: Any, precision: str, state: str) -> Callable[[int], float]:
        """A step as `alternate` calls it, with new pairs for each repetition or always the same."""

        def run(rep: int) -> float:
            with clock.matmuls(precision):
                pairs = self.batches[rep if state == "fresh" else 0]
                return side.step(pairs, precision, state == "kept")

        return run

    def flops(self, side: str, state: str) -> float:
        """Of a step, by the convention that this file begins with."""
        pairs, count = self.batches[0], 0
        if side == "ours":
            same = [sapo_prefix(p) for p in pairs]
            scored = sum(len(p.chosen + p.rejected) - n for p, n in zip(pairs, same, strict=True))
            count = scored + sum(len(p.prompt) for p in pairs)
        else:
            width = max(len(p.prompt) + max(map(len, p[1:])) for p in pairs)
            count = scored = 2 * len(pairs) * width
        work = self.shape.body * count + self.shape.head * scored
        return (8.0 if state == "fresh" else 6.0) * work

    def measure(self) -> clock.Times:
        """Seconds of all rows and of the machine's matmul."""
        device, reps = self.args.device, self.args.reps
        rates, self.rate_flops = clock.matmul_calls(device, self.args.quick)
        turns = [[r for r in self.rows if r[0] == s] for s in SIDES]
        seconds: clock.Times = {}
        for turn in turns if self.shape.large else [self.rows]:
            calls = {" ".join(r): self.call(self.build(*r), *r[1:]) for r in turn}
            seconds |= clock.alternate(calls | rates, reps, device)
            calls.clear()
            self.built.clear()
            if device == "cuda":
                torch.cuda.empty_cache()
        return seconds

    def check(self) -> None:
        """The losses of two steps on the same pairs. Raises where fp32 does not agree."""
        base = next(v for k, v in self.losses.items() if k[0] == "loop")
        for (side, precision), loss in self.losses.items():
            off = max(abs(loss[0] - math.log(2)), abs(loss[1] - base[1]))
            print(f"loss {side} {precision}: {loss[0]:.6f} {loss[1]:.6f}, off {off:.1e}")
            if precision == "fp32" and off > 1e-4:
                raise SystemExit(f"{side} computes something else: {loss}, and the loop {base}")
        print("losses agree", flush=True)

    def report(self, memory: Callable[[str], str]) -> None:
        """The table."""
        seconds, lines = self.measure(), []
        self.check()
        first = " ".join(self.rows[0])
        for row in self.rows:
            (side, precision, state), name = row, " ".join(row)
            rate = [self.rate_flops / x for x in seconds[f"matmul {precision}"]]
            reached = [self.flops(side, state) / x for x in seconds[name]]
            share = [a / b for a, b in zip(reached, rate, strict=True)]
            alike = f"{precision} {state}"
            bases = (first, f"loop {alike}", first.replace("loop", "TRL"), f"TRL {alike}")
            lines.append([name, *(clock.speed(seconds, name, base) for base in bases)])
            lines[-1] += [clock.spread(seconds[name], 3), clock.spread(share), memory(name)]
        head = f"row,x {first},x loop alike,x {first.replace('loop', 'TRL')},x TRL alike,seconds"
        title = f"{self.shape}; {len(self.batches[0])} pairs; {self.args.device}"
        clock.table(title, f"{head},of matmul rate,peak GB".split(","), lines)
        rates = {p: self.rate_flops / min(seconds[f"matmul {p}"]) / 1e9 for p in clock.PRECISIONS}
        print("matmul GFLOP/s at best: " + ", ".join(f"{p} {x:.0f}" for p, x in rates.items()))


SIDES = ("loop", "TRL", "ours")


def sapo_prefix(pair: Pair) -> int:
    """How many tokens the two responses begin with alike."""
    both = zip(pair.chosen, pair.rejected, strict=False)
    return next((i for i, (a, b) in enumerate(both) if a != b), len(pair.chosen))


def main() -> None:
    """A table for each shape; or, for a row alone, its peak memory."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args, flags = clock.arguments(__doc__ or "", ["small", "wide"])
    with clock.place(args) as folder:
        for size in args.size:
            bench = Bench(args, size, folder, flags)
            if args.only:
                row = args.only.split()
                if row.pop(0) == size:
                    call = bench.call(bench.build(*row), *row[1:])
                    clock.report_peak(lambda call=call: [call(0), call(0)], args.device)
                continue
            skip = args.no_memory
            told = lambda name, size=size: "-" if skip else clock.peak(f"{size} {name}", folder)  # noqa: E731
            bench.report(told)


if __name__ == "__main__":
    main()
