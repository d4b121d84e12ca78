"""What the product is measured against: a plain loop, TRL's trainer, transformers' `generate`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from shapes import Pair
from torch.nn.utils.rnn import pad_sequence

BETA, CLIP = 0.1, 1.0
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}


def load(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval()


def autocast(device: str, precision: str) -> Any:
    """bf16 is autocast; other precisions are settings of the matmuls."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


class Loop:
    """The plain loop that many begin with."""

    def __init__(self, folder: Path, device: str, large: bool, lr: float) -> None:
        self.device, self.known = device, {}
        self.policy = load(folder, device).train()
        self.reference = self.policy if large else load(folder, device)
        if large:
            self.policy.activation_checkpointing_enable()
        self.optimizer = torch.optim.RMSprop(self.policy.parameters(), lr=lr)

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

    def __init__(self, folder: Path, device: str, large: bool, lr: float) -> None:
        import datasets
        import trl

        datasets.disable_progress_bars()
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
                optimizers=(torch.optim.RMSprop(model.parameters(), lr=lr), None),
            )
        self.trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
        if large:  # so does this
            self.trainer.model.activation_checkpointing_enable()

    def rows(self, pairs: Sequence[Pair], kept: bool) -> list[dict[str, Any]]:
        """Pairs as TRL's data sets hold them: tokenized, and with precompute_ref_log_probs beside
        the log-probs that TRL's own function computes at the start."""
        rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r, *_ in pairs]
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


class Theirs:
    """transformers' model and its `generate`."""

    def __init__(self, folder: Path, device: str, precision: str) -> None:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model, self.device = load(folder, device, dtype), device
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def run(self, prompts: list[list[int]], budgets: list[int], greedy: bool = False) -> Any:
        """New tokens of each row, as many for all."""
        width = max(map(len, prompts))
        ids = [[0] * (width - len(p)) + p for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        inputs = [torch.tensor(x, device=self.device) for x in (ids, mask)]
        how = {"do_sample": False} if greedy else {"do_sample": True} | SAMPLING
        made = self.model.generate(
            inputs[0], attention_mask=inputs[1], max_new_tokens=max(budgets), **how
        )
        return made[:, width:].tolist()
