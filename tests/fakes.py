"""A run for sources to ask, without a model: weights of one number, and made-up answers."""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

import train
from data import Pair

EOS = 9


def weights(*values: float) -> torch.nn.Linear:
    """A model of so many weights."""
    layer = torch.nn.Linear(len(values), 1, bias=False)
    layer.weight.data = torch.tensor([values])
    return layer


class Run:
    """A `sapo.Run` whose answers to prompts are `say`'s, cut at their budgets, and which remembers
    what it was asked: models by name, prompts, budgets and seeds."""

    clock = contextlib.nullcontext

    def __init__(self, say: Callable[..., list[int]], tokenizer: Any = None, **flags: Any) -> None:
        usual = {"loss": "dpo", "batch_size": 2, "max_length": 64, "seed": 0, "steps": 9}
        self.say, self.config = say, train.Config(**usual | flags)
        self.tokenizer = tokenizer or SimpleNamespace(eos_ids=[EOS])
        self.models = {name: weights(1.0) for name in ("policy", "ema", "reference")}
        self.names, self.prompts = list[str](), list[list[int]]()
        self.budgets, self.seeds = list[int](), list[int]()

    def generate(self, model: Any, asked: Any, *_: Any, keep: bool = False) -> Any:
        for prompt, budget, seed in asked:
            self.names += [name for name, known in self.models.items() if known is model]
            self.prompts.append(prompt)
            self.budgets.append(budget)
            self.seeds.append(seed)
        return [(self.say(prompt)[:budget], -1.0) for prompt, budget, _ in asked]

    def sums(self, _: Any, pairs: list[Pair]) -> list[tuple[float, float]]:
        return [(-float(len(x.chosen)), -float(len(x.rejected))) for x in pairs]

    def train(self) -> None:
        """The update from policy t to t + 1."""
        self.models["policy"].weight.data += 1
