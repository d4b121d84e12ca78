"""The losses against TRL's own trainers: the same pairs, the same loss, the same gradient."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import trl
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import data
import model as lm
import train
from data import Pair
from sapo import compares, copy_weights, orpo_loss

WORDS = datasets.Dataset.from_list([{"prompt": "sort ba", "chosen": "ab", "rejected": "ba"}])


def random_model(config: lm.Config, seed: int) -> lm.Transformer:
    """A model whose probabilities are far from uniform."""
    made = lm.Transformer(config)
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    return made


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A random model with the built-in tokenizer."""
    folder = tmp_path / "start"
    data.write_task_tokenizer(folder)
    raw = train.START_MODEL | {"vocab_size": 260, "eos_token_id": 256, "hidden_size": 32}
    config = lm.Config.from_dict(raw | {"intermediate_size": 48})
    random_model(config, 3).save_pretrained(folder)
    return folder


def pairs(prompts: int = 4) -> list[Pair]:
    """Eight pairs of unequal lengths, half of which begin alike."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda n: torch.randint(0, 256, (n,), generator=generator).tolist()  # noqa: E731
    made = []
    for i in range(8):
        shared = draw(3 * (i % 2))
        made.append(Pair(draw(prompts), shared + draw(2 + i), shared + draw(9 - i)))
    return made


def ours(start: Path, batch: list[Pair], *flags: str) -> tuple[dict[str, float], Any]:
    """Our metrics and the learner that has the gradient; the reference is another model."""
    c = train.parse_args(["--model", str(start), "--data", "x", "--max-length", "64", *flags])
    learner = train.Learner(c, start, data.load_tokenizer(start), train.Ranks())
    if compares(c):
        copy_weights(learner.models["reference"], random_model(learner.policy.config, 4))
    return train.summary(batch, learner.score(batch, 0, learn=True), c), learner


def same_gradients(mine: Any, theirs: Any) -> None:
    """Equal within rounding, parameter by parameter."""
    named = dict(theirs.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in mine.parameters())
    assert largest > 1e-3
    for name, parameter in mine.named_parameters():
        assert torch.allclose(parameter.grad, named[name].grad, atol=2e-5 * largest), name


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("dpo", {"loss_type": "sigmoid"}),
        ("dpo --length-normalize", {"loss_type": "sigmoid_norm"}),
        ("hinge", {"loss_type": "hinge"}),
        ("ipo --length-normalize", {"loss_type": "ipo"}),
        ("dpo --nll-weight 0.7", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
        ("hinge --nll-weight 2", {"loss_type": ["hinge", "sft"], "loss_weights": [1.0, 2.0]}),
    ],
)
def test_pair_losses_and_their_gradients_are_those_of_trls_trainer(
    loss: str, settings: dict[str, Any], start: Path, tmp_path: Path
) -> None:
    batch = pairs()
    row, mine = ours(start, batch, "--method", "dpo", "--beta", "0.3", "--loss", *loss.split())
    reference = transformers.AutoModelForCausalLM.from_pretrained(start)
    weights = dict(random_model(mine.policy.config, 4).named_parameters())
    reference.load_state_dict(weights, strict=False)
    theirs = trl.DPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(start),
        ref_model=reference,
        args=trl.DPOConfig(
            tmp_path / "trl", beta=0.3, use_cpu=True, bf16=False, report_to=[],
            gradient_checkpointing=False, **settings,
        ),
        train_dataset=WORDS,
        processing_class=transformers.AutoTokenizer.from_pretrained(start),
    )  # fmt: skip
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r, _ in batch]
    value = theirs._compute_loss(theirs.model, DataCollatorForPreference(0)(rows), False)
    value.backward()
    assert row["loss"] == pytest.approx(value.item(), rel=1e-5)
    same_gradients(mine.policy, theirs.model)
    logged = {k: v[-1] for k, v in theirs._metrics["eval"].items()}
    for key in ("chosen", "rejected", "margins", "accuracies"):
        assert row[f"rewards/{key}"] == pytest.approx(logged[f"rewards/{key}"], rel=1e-4)
    for key in ("logps/chosen", "logps/rejected"):
        assert row[key] == pytest.approx(logged[key], rel=1e-5)


@pytest.fixture
def orpo(start: Path, tmp_path: Path) -> Any:
    """TRL's ORPO trainer on the start."""
    return ORPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(start),
        args=ORPOConfig(
            tmp_path / "trl", beta=0.4, use_cpu=True, bf16=False, report_to=[],
            gradient_checkpointing=False, max_length=64, remove_unused_columns=False,
        ),
        train_dataset=WORDS,
        processing_class=transformers.AutoTokenizer.from_pretrained(start, pad_token="<|end|>"),
    )  # fmt: skip


def orpo_batch(batch: list[Pair]) -> dict[str, Tensor]:
    """What TRL's collator would make of the pairs."""
    made = {}
    for side in ("chosen", "rejected"):
        rows = [(pair.prompt, getattr(pair, side)) for pair in batch]
        columns = {
            "input_ids": ([p + r for p, r in rows], 0),
            "attention_mask": ([[1] * len(p + r) for p, r in rows], 0),
            "labels": ([[-100] * len(p) + r for p, r in rows], -100),
        }
        for key, (values, filler) in columns.items():
            tensors = [torch.tensor(value) for value in values]
            made[f"{side}_{key}"] = pad_sequence(tensors, True, filler)
    return made


def test_orpo_and_its_gradient_are_those_of_trls_trainer_but_for_the_prompts_nll(
    orpo: Any, start: Path, tmp_path: Path
) -> None:
    """TRL's NLL is over prompt and response, ours over the response alone. Behind a prompt of one
    token, which has no NLL, the two agree."""
    for length in (1, 4):
        batch = pairs(prompts=length)
        row, mine = ours(start, batch, "--method", "orpo", "--orpo-lambda", "0.4")
        orpo.model.zero_grad()
        value, logged = orpo.get_batch_loss_metrics(orpo.model, orpo_batch(batch))
        value.backward()
        if length == 1:
            assert row["loss"] == pytest.approx(value.item(), rel=1e-5)
            same_gradients(mine.policy, orpo.model)
        else:
            assert abs(row["loss"] - value.item()) > 0.01
            theirs = value.item() - logged["nll_loss"]
            assert row["loss"] - row["nll"] == pytest.approx(theirs, abs=1e-4)
        for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies"):
            assert row[key] == pytest.approx(logged[key], rel=1e-5)


def test_the_odds_ratio_term_is_trls_until_a_probability_nears_one(orpo: Any) -> None:
    """There TRL's has no finite value, and ours holds on to odds of a million to one."""
    values = torch.tensor([[-3.0, -0.7, -0.1, -1e-3, -0.02], [-2.0, -9, -0.2, -3, -8]])
    mine = [x.clone().requires_grad_() for x in values]
    theirs = [x.clone().requires_grad_() for x in values]
    loss, ratio = orpo_loss(*mine, lam=0.4), -orpo.odds_ratio_loss(*theirs)[0]
    assert torch.allclose(loss, ratio, rtol=1e-5)
    loss.sum().backward()
    ratio.sum().backward()
    for x, y in zip(mine, theirs, strict=True):
        assert torch.allclose(x.grad, y.grad, rtol=1e-4)
    for term, finite in ((orpo_loss, True), (lambda *x: orpo.odds_ratio_loss(*x)[0], False)):
        certain = torch.zeros(1, requires_grad=True)
        term(torch.tensor([-1.0]), certain).sum().backward()
        assert bool(torch.isfinite(certain.grad).all()) == finite
