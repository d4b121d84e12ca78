"""Align a language model with no preference data: SAPO and SGPO; SFT, DPO, ORPO, SPIN beside them.

    python train.py                                          # the embedded default, on any CPU
    torchrun --nproc_per_node 8 train.py --method sapo --recipe sapo-mistral-7b \\
        --model DIR --data FILE.jsonl --out OUT
    python train.py ... --out OUT --resume                   # goes on from the newest checkpoint

Every preference method is a source of pairs with a loss on top:

    source.before_step(t) -> pairs (prompt, chosen, rejected)  ->  loss  ->  policy t + 1

The sources and the losses are in sapo.py and sgpo.py. Here are, in this order: the flags, the ranks
(the only place that knows of more than one process), the trainer with its one loop, SGPO's first
phase, and the whole run.

Shapes: N pairs. Log-probs are sums over response tokens, in nats, unless a name says mean.
"""

import argparse
import bisect
import collections
import contextlib
import dataclasses
import datetime
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import data
import model as lm
import sample
import sapo
import sgpo
from data import Pair
from model import InputError, Transformer, hash_seed
from sapo import dpo_loss, orpo_loss

__all__ = ["Config", "Trainer", "dpo_loss", "main", "orpo_loss"]  # the losses are sapo.py's

# -------------------------------------------------------------------------------------- the flags


@dataclass
class Config(sgpo.Settings):
    """Every flag, with its default and where that comes from. The string under a field is its help.

    Those of the methods are inherited from their files. [code] is the official SAPO code, [spin]
    that of SPIN, [ours] our own choice.
    """

    method: Literal["sft", "dpo", "orpo", "spin", "sapo", "sgpo"] = "sapo"
    "where the pairs come from"
    loss: Literal["dpo", "ipo", "hinge", "orpo"] | None = None  # [code] has dpo and orpo
    "the loss on the pairs; default: dpo, and orpo for --method orpo"
    recipe: str | None = None
    "settings by name, listed below; flags given explicitly win over it"
    model: str | None = None
    "a Hugging Face folder to start from; default: a tiny model, pre-trained there and then"
    data: list[str] | None = None
    "JSON or JSONL files of training rows; default: the built-in tasks"
    eval_data: list[str] | None = None
    "JSON or JSONL files of held-out rows"
    out: str = "out"  # [ours]
    "the folder of the run"
    resume: bool = False
    "go on from the newest whole checkpoint in --out"
    chat_template: Literal["chatml", "zephyr", "llama3"] | None = None
    "a chat template by name, for a base model that has none of its own"
    steps: int | None = None
    "optimizer steps; sgpo: of phase 2, in each round; default: as --epochs says"
    epochs: float = 4.0  # [code]
    "passes over the training rows; spin: over the pairs of each iteration; sgpo: over the prompts \
of phase 2, in each round"
    micro_batch_size: int = 4  # [ours]
    "pairs per forward pass and rank; it bounds memory and changes nothing else"
    lr: float = 5e-7  # [code]
    "peak learning rate"
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"  # [code]
    "the optimizer"
    adam_beta2: float = 0.999  # torch's default
    "AdamW's second beta"
    weight_decay: float = 0.0  # [ours]
    "decoupled for AdamW, added to the gradient for RMSprop, as torch has it"
    schedule: Literal["linear", "cosine", "inverse_sqrt", "constant"] = "linear"  # [code]
    "of the learning rate, after the warm-up. Step 1 has a rate above 0, and so has the last step"
    warmup: float = 0.1  # [code]
    "below 1 a share of the steps, otherwise a number of steps"
    max_grad_norm: float = 1.0  # [ours]; 0 is off
    "the gradient is scaled down to this norm; 0: never"
    beta: float = 0.1  # [code]
    "how strongly the reference holds the policy"
    label_smoothing: float = 0.0  # [code]
    "share of pairs assumed to be labelled the wrong way round (cDPO)"
    length_normalize: bool = False  # [code]
    "log-probs per token in place of their sums in the dpo, ipo and hinge losses"
    nll_weight: float = 0.0  # [code]
    "weight of an added NLL term on the chosen side, per response token"
    orpo_lambda: float = 0.05  # [code]
    "weight of ORPO's odds-ratio term"
    max_prompt_length: int | None = None  # [code]: 1792, of 2048
    "rows whose prompt has this many tokens or more are dropped; default: 7/8 of --max-length"
    iteration_lr: list[float] | None = None  # the paper: 5e-7, then 1e-7
    "spin: peak learning rates of the iterations, the last for all that remain; default: --lr"
    iteration_beta: list[float] | None = None  # the paper: 0.1, in the last iteration 5.0
    "spin: betas of the iterations, the last for all that remain; default: --beta"
    temperature: float = 0.7  # [code]; [spin]: 1.0
    "of sampled tokens; 0 is greedy; --method spin alone makes it 1.0"
    top_k: int = 50  # [code]; [spin]: all
    "sample among so many tokens; 0: all; --method spin alone makes it 0"
    top_p: float = 0.95  # [code]; [spin]: 1.0
    "sample among the likeliest tokens of this total probability; --method spin alone makes it 1.0"
    generate_batch_size: int = 64  # [ours]
    "rows decoded together on a rank"
    precision: Literal["fp32", "medium", "bf16"] = "fp32"  # [ours]; [code] has bf16
    "of the computation; weights, gradients, optimizer, EMA are fp32. medium: faster fp32 matmuls, \
whose error is printed at the start"
    ema_offload: bool = False
    "keep the EMA in host memory, one process: it is read once a step, to generate"
    activation_checkpointing: bool = False
    "recompute each block in the backward pass, to save memory"
    compile: bool = False
    "compile each block with torch.compile; the first steps then take a minute or more"
    save_dtype: Literal["fp32", "bf16"] = "fp32"  # [ours]: an update of 5e-7 is lost in bf16
    "type of the weights in OUT/final"
    save_every: int = 0
    "steps between checkpoints; 0: none, but for the one that SIGTERM makes"
    keep: int = 0
    "how many checkpoints are kept, the newest; 0: all"
    log_every: int = 10  # [ours]
    "steps between rows of metrics.jsonl"
    eval_every: int = 0
    "steps between evaluations; 0: at the end only"
    show_every: int = 0
    "steps between sampled pairs shown in colour: A, B, B' and C; 0: never"
    trace: str | None = None
    "a .safetensors file to record the first steps in: pairs, draws, log-probs, losses, norms"
    trace_steps: int = 10  # [ours]
    "how many steps --trace records"


TASKS = {  # the built-in tasks; all [ours], from the prototypes' measurements
    "steps": 120, "batch_size": 32, "micro_batch_size": 32, "lr": 1e-4, "max_length": 128,
    "segment_length": "8", "segment_rule": "uniform", "temperature": 1.0, "top_k": 0, "top_p": 1.0,
    "replay_capacity": 512, "ref_update_every": 30, "generate_batch_size": 256,
    "max_new_tokens": 40,
}  # fmt: skip
TASKS_SGPO = TASKS | {
    "method": "sgpo", "lr": 3e-6, "improver_lr": 1e-4, "improver_epochs": 4.0,
    "responses_per_prompt": 8, "improve_temperature": 0.0,
    "improver_instruction": data.REWRITE_PROMPT.replace("{draft}", "{answer}"),
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {"tasks": TASKS, "tasks-sgpo": TASKS_SGPO}
RECIPES |= sapo.RECIPES | sgpo.RECIPES
RECIPES |= {f"tasks-{name}": TASKS | change for name, change in sapo.ABLATIONS.items()}
OWN: dict[str, dict[str, Any]] = {"spin": {"temperature": 1.0, "top_k": 0, "top_p": 1.0}}  # [spin]
READ_BY = {  # flags that only these methods read
    **dict.fromkeys(vars(sapo.Settings)["__annotations__"], ("sapo",)),
    **dict.fromkeys(vars(sgpo.Settings)["__annotations__"], ("sgpo",)),
    **dict.fromkeys(("iterations", "iteration_lr", "iteration_beta"), ("spin",)),
    **dict.fromkeys(("temperature", "top_k", "top_p"), ("sapo", "spin", "sgpo")),
    **dict.fromkeys(("generate_batch_size", "show_every"), ("sapo", "spin", "sgpo")),
    "max_new_tokens": ("spin", "sgpo"), "responses_per_prompt": ("sapo", "sgpo"),
    "ema_offload": ("sapo",),
}  # fmt: skip
ASKING = {"target_model", "target_workers", "target_timeout", "target_max_tokens"}  # of a server
ASKING |= {"target_instruction"}
for _name in ("seed", "batch_size", "max_length"):
    del READ_BY[_name]  # all do
START: dict[str, Any] = {  # how the built-in start is trained: an SFT run like any other
    "method": "sft", "loss": None, "steps": 1800, "batch_size": 32, "micro_batch_size": 32,
    "lr": 4e-3, "optimizer": "adamw", "adam_beta2": 0.98, "warmup": 80.0, "schedule": "linear",
    "weight_decay": 0.0, "max_grad_norm": 1.0, "log_every": 50,
    "save_every": 0, "eval_every": 0, "show_every": 0, "save_dtype": "fp32", "max_length": 128,
    "max_prompt_length": None, "precision": "fp32",
}  # fmt: skip
REWRITE_SHARE = 0.2  # of the start's rows: a draft to be answered with another draft
START_MODEL = {  # RoPE base 100, for short rows: 10,000 gave a prototype 22% in place of 65%
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 168, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 100.0,
    "tie_word_embeddings": True, "max_position_embeddings": 2048, "hidden_act": "silu",
}  # fmt: skip
MAY_CHANGE = {"resume", "out", "steps", "epochs", "log_every", "save_every", "show_every"}
MAY_CHANGE |= {"trace", "trace_steps", "keep"}


RANGES = {  # the smallest and the largest value of each number
    **dict.fromkeys(("steps", "batch_size", "micro_batch_size", "generate_batch_size"), (1, 1e9)),
    **dict.fromkeys(("ema_every", "ref_update_every", "sample_every", "log_every"), (1, 1e9)),
    **dict.fromkeys(("save_every", "eval_every", "show_every", "keep"), (0, 1e9)),
    **dict.fromkeys(("top_k", "warmup"), (0, 1e9)),
    **dict.fromkeys(("nll_weight", "orpo_lambda", "max_grad_norm"), (0, 1e6)),
    **dict.fromkeys(("temperature", "improve_temperature"), (0, 1e6)),
    "epochs": (1e-9, 1e6), "lr": (1e-30, 1e3), "beta": (1e-9, 1e6), "weight_decay": (0, 1),
    "ema_decay": (0, 1), "top_p": (1e-9, 1), "adam_beta2": (0, 1 - 1e-9), "seed": (0, 2**62),
    "label_smoothing": (0, 0.5), "max_length": (2, 1e7), "max_prompt_length": (2, 1e7),
    "replay_capacity": (0, 1e9), "responses_per_prompt": (1, 1e4), "iterations": (1, 1e4),
    "max_new_tokens": (1, 1e7), "trace_steps": (1, 1e6), "rounds": (1, 1e4),
    "improver_epochs": (1e-9, 1e6), "improver_lr": (1e-30, 1e3), "improver_mix": (0, 0.99),
    "fence_k": (0, 1e6), "target_workers": (1, 1000), "target_max_tokens": (0, 1e7),
    "target_timeout": (1e-3, 1e6),
}  # fmt: skip


def parse_args(argv: Sequence[str]) -> Config:
    """Flags -> Config: defaults, then the recipe's values, then what was given explicitly."""
    listing = [
        f"  {name}\n    " + " ".join(f"{key}={value}" for key, value in values.items())
        for name, values in RECIPES.items()
    ]
    parser = sample.Parser(
        prog="train.py",
        description=(__doc__ or "").split("\n")[0],
        epilog="recipes (`tasks`, or `tasks-sgpo`, is in force where no --data is given):\n"
        + "\n".join(listing),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_fields(Config)
    given = vars(parser.parse_args(argv))
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
    for name in unread(method, given):
        print(f"warning: --{name.replace('_', '-')} is not read here")
    if method == "sgpo" and given.get("improver") and "improver_instruction" not in given:
        file = Path(given["improver"]) / sample.IMPROVER_FILE
        if file.exists():  # how it was asked in training
            values["improver_instruction"] = sample.read_instruction(file)
    return check(Config(**values))


def unread(method: str, given: dict[str, Any]) -> list[str]:
    """The flags that were given, and that such a run does not read."""
    source = given.get("target_source", "")
    idle = {name for name in given if method not in READ_BY.get(name, (method,))}
    if method == "sgpo" and not source.startswith(("http://", "https://")):
        idle |= {name for name in given if name in ASKING}
    if method == "sgpo" and given.get("improver"):
        phase_1 = ("target_", "improver_epochs", "improver_lr", "improver_mix", "fence_", "model")
        idle |= {name for name in given if name.startswith(phase_1)}
    return [name for name in given if name in idle]


def check(config: Config) -> Config:
    """Raises InputError for values that make no sense, alone or together."""
    for name, (low, high) in RANGES.items():
        if (value := getattr(config, name)) is not None:
            sample.check_range(name, value, low, high)
    for name in ("iteration_lr", "iteration_beta"):
        for value in getattr(config, name) or ():
            sample.check_range(name, value, *RANGES[name.removeprefix("iteration_")])
    length = config.segment_length
    if length != "full" and not (length.isdecimal() and 0 < int(length) < 10**9):
        raise InputError(f"--segment-length is {length!r}, not a number of tokens or 'full'")
    if config.max_prompt_length is None:
        config.max_prompt_length = max(2, config.max_length * 7 // 8)
    if config.max_prompt_length > config.max_length:
        raise InputError(
            f"--max-prompt-length {config.max_prompt_length} leaves no room for a response within "
            f"--max-length {config.max_length}"
        )
    if config.method == "sft" and config.loss is not None:
        raise InputError(f"--loss {config.loss} needs pairs, and --method sft has none")
    if config.method == "orpo" and config.loss not in (None, "orpo"):
        raise InputError(f"--method orpo with --loss {config.loss}: that is --method dpo")
    if config.method != "sft" and config.loss is None:
        config.loss = "orpo" if config.method == "orpo" else "dpo"
    more = max(config.sample_every, config.responses_per_prompt) > 1
    if config.method == "sapo" and config.replay_capacity == 0 and more:
        names = "--sample-every and --responses-per-prompt"
        raise InputError(f"{names} above 1 need a replay buffer, and --replay-capacity is 0")
    if config.nll_weight and config.loss in (None, "orpo"):
        raise InputError("--nll-weight adds to a loss without an NLL term; SFT and ORPO have one")
    if config.label_smoothing and config.loss != "dpo":
        raise InputError(f"--label-smoothing is for --loss dpo, not {config.loss or 'SFT'}")
    if config.length_normalize and config.loss in (None, "orpo"):
        raise InputError(
            "--length-normalize is for the dpo, ipo and hinge losses; SFT and ORPO "
            "are per token as they are"
        )
    if config.method == "sgpo":
        check_sgpo(config)
    if config.chat_template and config.model is None:
        raise InputError("--chat-template is for --model: the built-in start has its own")
    return config


def check_sgpo(config: Config) -> None:
    """The same for SGPO's flags; says which source of targets is meant by default."""
    config.model = config.improver or config.model
    source = config.target_source or ("tasks" if config.data is None else "gold")
    config.target_source = source
    if is_url(config):
        target_server(config)
        if not config.target_model:
            raise InputError("--target-source is a URL: --target-model must say which model to ask")
    if source == "tasks" and config.data is not None:
        raise InputError("--target-source tasks mends the built-in tasks, and --data is given")
    if config.keep_identical and config.loss != "orpo" and not config.nll_weight:
        raise InputError(
            "--keep-identical is for --loss orpo or --nll-weight: no other loss learns"
        )
    for name in ("improver_instruction", "target_instruction"):
        for part in ("{prompt}", "{answer}"):
            if part not in getattr(config, name):
                raise InputError(f"--{name.replace('_', '-')} holds no {part}")


# -------------------------------------------------------------------------------------- the ranks


def outline(folder: Path) -> Transformer:
    """The model in a folder without its weights, once their headers agree with its config."""
    raw = lm.read_json(folder / "config.json")
    with torch.device("meta"):
        model = Transformer(lm.Config.from_dict(raw, f"{folder}/config.json"))
    lm.find_weights(dict(model.named_parameters()), folder)
    return model


def local(value: Tensor) -> Tensor:
    """This rank's share of a tensor, itself where it is not sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def medium_error(device: torch.device) -> str:
    """What --precision medium does here: the error of a product of two random matrices, as a share
    of its norm, and its time, both against fp32."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1024, 1024, generator=generator).to(device) for _ in range(2))
    products, seconds = [], []
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        times = []
        for _ in range(8):
            began = time.perf_counter()
            product = a @ b
            product[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - began)
        products.append(product)
        seconds.append(min(times))
    error = float((products[1] - products[0]).norm() / products[0].norm())
    ratio = seconds[0] / seconds[1]
    return (
        f"precision medium: error {error:.1e} of a matrix product, {ratio:.1f} times fp32's speed"
    )


class Stopped(Exception):
    """SIGTERM came, and what is to be saved has been."""


class Ranks:
    """The processes of the run, and the only place that knows how many there are."""

    def __init__(self) -> None:
        self.asked_to_stop = False  # by SIGTERM
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            patience = datetime.timedelta(days=7)  # one rank asks for targets, the others wait
            dist.init_process_group("nccl" if cuda else "gloo", timeout=patience)
            self.mesh = dist.init_device_mesh(self.device.type, (self.world,))

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def build(self, folder: Path, config: Config, role: str) -> Transformer:
        """Loads the policy, the EMA or the reference, each rank its shard of it. They are fp32, but
        for the reference's matrices: those are held as they would be rounded for each product."""
        model = outline(folder)
        model.compute_dtype = torch.bfloat16 if config.precision == "bf16" else None
        model.checkpointing = config.activation_checkpointing
        for parameter in model.parameters():
            if role == "reference" and parameter.dim() == 2 and model.compute_dtype:
                parameter.data = parameter.data.to(model.compute_dtype)
        device = "cpu" if role == "ema" and config.ema_offload else self.device
        if config.compile:
            for block in model.model["layers"].children():
                # Shapes differ from batch to batch. What is fused rounds as what is not, or bf16
                # differs with and without gradients, and the first loss is not ln 2.
                block.compile(dynamic=True, options={"emulate_precision_casts": True})
        if self.world > 1:
            policy = MixedPrecisionPolicy(model.compute_dtype, torch.float32)
            for block in model.model["layers"].children():
                fully_shard(block, mesh=self.mesh, mp_policy=policy)
            # By default the root stays whole until a backward pass. After a forward pass without
            # one (the EMA, the reference, an evaluation) the next update of it would be lost.
            fully_shard(model, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)
        model.to_empty(device=device).requires_grad_(role == "policy")
        lm.load_weights(dict(model.named_parameters()), folder, self.place)
        return model

    def place(self, parameter: Tensor, value: Tensor) -> None:
        """parameter <- this rank's share of a whole value."""
        if isinstance(parameter, DTensor):
            chunks = value.chunk(self.world)
            value = chunks[self.rank] if self.rank < len(chunks) else value[:0]
        local(parameter).copy_(value)

    def whole(self, value: Tensor) -> Tensor:
        """The whole of a sharded tensor, on every rank (collective)."""
        value = value.detach()
        return value.full_tensor() if isinstance(value, DTensor) else value

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def stops(self) -> bool:
        """Whether any rank was asked to stop; the same answer on all."""
        return bool(self.sum(torch.tensor(float(self.asked_to_stop), device=self.device)))

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world > 1:
            dist.barrier()

    @contextlib.contextmanager
    def decoder(self, model: Transformer) -> Iterator[Transformer]:
        """The model, for decoding, in whose shapes nothing is compiled."""
        with torch.compiler.set_stance("force_eager"):
            yield self.snapshot(model)

    def snapshot(self, model: Transformer) -> Transformer:
        """The model in its compute type with all weights at hand: ranks stop decoding at different
        times, and must not wait for each other."""
        dtype = model.compute_dtype or model.dtype
        if self.world == 1 and dtype == model.dtype and self.device == model.device:
            return model
        weights = {name: p.detach() for name, p in model.named_parameters()}
        cast = {name: torch.empty_like(weight, dtype=dtype) for name, weight in weights.items()}
        torch._foreach_copy_([*map(local, cast.values())], [*map(local, weights.values())])
        whole = {name: self.whole(weight).to(self.device) for name, weight in cast.items()}
        return lm.with_weights(model.config, whole)

    def share_rows(self, mine: dict[int, list[int]], count: int) -> list[list[int]]:
        """Every rank's rows of tokens, by index, on every rank. No pickle: padded integers."""
        if self.world == 1 or count == 0:
            return [mine[i] for i in range(count)]
        lengths = torch.zeros(count, dtype=torch.int64, device=self.device)
        for i, row in mine.items():
            lengths[i] = len(row)
        self.sum(lengths)
        table = torch.zeros(count, int(lengths.max()), dtype=torch.int64, device=self.device)
        for i, row in mine.items():
            table[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        self.sum(table)
        return [r[:n] for r, n in zip(table.tolist(), lengths.tolist(), strict=True)]


# ------------------------------------------------------------------------------------ the trainer


@dataclass
class Job:
    """What one training run reads and writes; the start and the control are runs of their own."""

    start: Path  # the model's folder
    rows: list[Pair]
    eval_rows: list[Pair]
    tokenizer: data.Tokenizer
    metrics: Path  # a JSON object per logged step
    final: Path  # the trained model
    checkpoints: Path | None = None
    test: Callable[[Transformer], dict[str, float]] | None = None  # more held-out metrics
    trace: sample.Trace | None = None
    asks: Sequence[sgpo.Ask] = ()  # SGPO's prompts
    on_tasks: bool = False  # answers can be checked
    before: int = 0  # steps of the phases before this one
    phase: str = ""  # its name, where it is not the method's


# What `Trainer.score` tells of each pair. The last five: the log-probs of B, of B', of C after B
# and of C after B', all under the policy, and the tokens computed.
COLUMNS = """losses logps/chosen logps/rejected ref_logps/chosen ref_logps/rejected rewards/chosen
    rewards/rejected logps/segment logps/new_segment logps/rest logps/new_rest tokens""".split()  # noqa: SIM905


def schedule(config: Config, rows: int) -> list[int]:
    """The steps at which the learning rate's schedule begins, and the last step's end: SPIN's
    iterations and SGPO's rounds each have one of their own."""
    c = config
    passes = c.epochs * (2 * c.iterations - 1 if c.method == "spin" else 1)
    steps = c.steps or max(1, math.ceil(passes * rows / c.batch_size - 1e-9))
    if c.method == "spin":
        return [*sapo.spin_starts(steps, c.iterations), steps]
    if c.method == "sgpo":
        return [steps * i for i in range(c.rounds + 1)]
    return [0, steps]


def nth(values: Sequence[float] | None, n: int, default: float) -> float:
    """The n-th of the values, the last for all that remain; where there are none the default."""
    return values[min(n, len(values) - 1)] if values else default


class Trainer:
    """Models, optimizer, source and the loop that makes them meet."""

    def __init__(self, config: Config, job: Job, ranks: Ranks) -> None:
        self.config, self.job, self.ranks = config, job, ranks
        self.beta, self.drift = config.beta, sapo.Drift()
        self.seconds: dict[str, float] = {}
        self.generated, self.referred = 0, 0  # tokens in this step, sampled and by the reference
        self.known_logps: dict[int, tuple[float, ...]] = {}  # by the reference, for a pair's digest
        self.reference_version = 0
        self.bad_steps = self.skipped = 0  # updates left out: in a row, and in all
        self.nll_weight = 1.0 if config.loss in (None, "orpo") else config.nll_weight
        self.policy = ranks.build(job.start, config, "policy")
        self.optimizer = self.make_optimizer()  # at once: after a forward it may hold stale objects
        self.models = {"policy": self.policy}
        if config.method == "sapo":
            self.models["ema"] = ranks.build(job.start, config, "ema")
        if config.method == "spin" or config.loss not in (None, "orpo"):
            self.models["reference"] = ranks.build(job.start, config, "reference")
        self.take(job.rows)

    def take(self, rows: list[Pair]) -> None:
        """Makes these rows what is trained on: the number of steps follows, and the source."""
        self.job.rows, count = rows, len(self.job.asks or rows)
        self.bounds = schedule(self.config, count)
        self.steps = self.bounds[-1]
        epoch = math.ceil(count / self.config.batch_size)  # in steps
        self.source = self.make_source(self.config.ref_update_every or epoch)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """RMSprop or AdamW, a multi-tensor pass for each block: its temporaries are then small."""
        c, blocks = self.config, [*self.policy.model["layers"].children()]
        inner = {p for block in blocks for p in block.parameters()}
        others = [p for p in self.policy.parameters() if p not in inner]
        parameters = [{"params": [*block.parameters()]} for block in blocks]
        parameters.append({"params": others})
        settings: dict[str, Any] = {"lr": c.lr, "weight_decay": c.weight_decay, "foreach": True}
        if c.optimizer == "rmsprop":
            return torch.optim.RMSprop(parameters, **settings)
        settings["betas"] = (0.9, c.adam_beta2)
        return torch.optim.AdamW(parameters, **settings)

    def make_source(self, ref_update_every: int) -> sapo.Source:
        """The source of pairs that --method names. A new method is a branch here."""
        c, rows = self.config, self.job.rows
        if c.method in ("sft", "dpo", "orpo"):
            if c.method == "sft":
                rows = [Pair(row.prompt, row.chosen, []) for row in rows]
            return sapo.Static(rows, c)
        if c.method == "spin":
            opponent = self.models["reference"]
            return sapo.SPIN(rows, self.policy, opponent, self.generate, c, self.bounds)
        eos_ids = self.job.tokenizer.eos_ids
        if c.method == "sgpo":
            check = data.check_answer if self.job.on_tasks else None
            known = (self.job.asks, self.policy, self.generate, c, self.job.tokenizer, self.bounds)
            return sgpo.SGPO(*known, self.gold_scores, check)
        models = (self.policy, self.models["ema"], self.models.get("reference"))
        c = dataclasses.replace(c, ref_update_every=ref_update_every)
        return sapo.SAPO(rows, *models, self.generate, c, eos_ids, self.phase)

    def gold_scores(self, rows: Sequence[Pair]) -> list[float]:
        """Summed log-probs of responses under the reference, or the policy where there is none."""
        held, began = self.seconds, time.perf_counter()
        self.seconds = {}  # its time is no policy's or reference's of the step
        stats = self.score(rows, False, self.models.get("reference", self.policy))
        self.seconds = held | {"judge": time.perf_counter() - began}
        return stats[:, COLUMNS.index("logps/chosen")].tolist()

    def train(self) -> None:
        """The loop. t counts optimizer updates done."""
        t = self.restore() if self.config.resume else 0
        began, first = time.perf_counter(), t
        while t < self.steps:
            row = self.step(t)
            t += 1
            if t == self.steps or (self.config.eval_every and t % self.config.eval_every == 0):
                row |= self.evaluate()
            told = {"seconds/eval", "improve/pairs"} & row.keys()
            if t % self.config.log_every == 0 or t == self.steps or told:
                self.log(t, row, (time.perf_counter() - began) / (t - first))
            stops = self.ranks.stops()
            if stops or (self.config.save_every and t % self.config.save_every == 0):
                self.save(t)
            if stops:
                raise Stopped(f"stopped after step {self.job.before + t}; --resume goes on")
        self.save_final()

    def step(self, t: int) -> dict[str, float]:
        """One update: pairs, gradients over micro-batches, clipping, the optimizer. Its row."""
        c, began = self.config, time.perf_counter()
        iteration, first, _ = self.stretch(t)
        if t == first:  # SPIN's iterations and SGPO's rounds are runs of their own
            self.optimizer.state.clear()
        if c.method == "spin":
            self.beta = nth(c.iteration_beta, iteration, c.beta)
        self.seconds, self.generated, self.referred = {}, 0, 0
        with self.phase("source"):
            pairs = self.source.before_step(t)
        self.write_pairs()
        row = {"lr": self.lr_at(t), "pairs": float(len(pairs)), "grad_norm": 0.0}
        stats = torch.zeros(0, len(COLUMNS), dtype=torch.float64)
        if pairs:
            stats = self.score(pairs, learn=True)
            row |= self.summary(pairs, stats, "")
            row |= self.drift.observe(pairs, stats[:, COLUMNS.index("logps/chosen")].tolist())
            with self.phase("optimizer"):
                row["grad_norm"] = self.update(row["lr"], row["loss"])
        row["skipped"] = float(self.skipped)
        row["tokens/generate"] = float(self.generated)
        if self.compares:
            row["tokens/reference"] = float(self.referred)
        if c.show_every and t % c.show_every == 0 and self.ranks.first:
            shown = [pair for pair in pairs if isinstance(pair, sapo.SegmentPair)]
            print(*(sample.paint(pair, self.job.tokenizer.decode) for pair in shown[:1]), sep="\n")
        sides = [side for p in pairs for side in p[1:] if side]
        tokens = sum(map(len, sides)) + sum(len(p.prompt) * (1 + bool(p.rejected)) for p in pairs)
        row["tokens_per_second"] = tokens / (time.perf_counter() - began)
        row |= self.source.metrics | {f"seconds/{k}": v for k, v in self.seconds.items()}
        self.record(self.job.before + t + 1, pairs, stats, row)
        return row

    def write_pairs(self) -> None:
        """Appends what SGPO's source has just made to pairs.jsonl, as rows that --data reads."""
        if not (isinstance(self.source, sgpo.SGPO) and self.source.fresh and self.ranks.first):
            return
        read = self.job.tokenizer.response_text
        with self.job.metrics.with_name("pairs.jsonl").open("a", encoding="utf-8") as file:
            for ask, pair in zip(self.source.asked, self.source.fresh, strict=True):
                row = {"round": self.source.round, "prompt": as_prompt(ask.messages)}
                row |= {"chosen": read(pair.chosen), "rejected": read(pair.rejected)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def record(self, step: int, pairs: list[Pair], stats: Tensor, row: dict[str, float]) -> None:
        """The step, for --trace: the policy's norm is that after it, the EMA's that within it."""
        if self.job.trace is None or step > self.config.trace_steps:
            return
        norms = {f"norm/{name}": math.nan for name in ("policy", "ema", "reference")}
        norms |= {f"norm/{name}": self.norm(model) for name, model in self.models.items()}
        if self.ranks.first:
            scalars = {key: row.get(key, math.nan) for key in ("loss", "nll", "grad_norm", "lr")}
            scalars |= norms | {"beta": self.beta}
            columns = dict(zip(COLUMNS, stats.unbind(1), strict=True))
            self.job.trace.add(step, pairs, self.source.picked, columns, self.source.fresh, scalars)

    def norm(self, model: Transformer) -> float:
        """The root of the sum of all squared weights, summed in float64 (collective)."""
        squares = sum(local(p).detach().double().square().sum() for p in model.parameters())
        return math.sqrt(float(self.ranks.sum(torch.as_tensor(squares))))

    def stretch(self, t: int) -> tuple[int, int, int]:
        """The number, first step and end of the iteration or round of step t."""
        number = bisect.bisect_right(self.bounds, t, hi=len(self.bounds) - 1) - 1
        return number, self.bounds[number], self.bounds[number + 1]

    def lr_at(self, t: int) -> float:
        """The learning rate of the update from t to t + 1: lr / W, 2 lr / W, ... over W warm-up
        steps, lr at the last of them, then down; the linear schedule ends at lr / (T - W)."""
        c = self.config
        number, first, end = self.stretch(t)
        steps, t, peak = end - first, t - first, c.lr
        if c.method == "spin":
            peak = nth(c.iteration_lr, number, c.lr)
        warmup = round(c.warmup * steps) if c.warmup < 1 else round(c.warmup)
        if t < warmup:
            return peak * (t + 1) / warmup
        done = (t - warmup) / max(1, steps - warmup)
        if c.schedule == "linear":
            return peak * (1 - done)
        if c.schedule == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * done))
        if c.schedule == "inverse_sqrt":
            return peak * math.sqrt(max(1, warmup) / (t + 1))
        return peak

    def shares(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[int], list[Pair], Tensor, bool]]:
        """This rank's micro-batches: places among the pairs, the pairs, their weights, and whether
        it is the last.

        Each rank takes every world-th pair in order of length, so that all have alike work. Where
        they do not come out even, a rank repeats a pair with weight 0: all must run as many passes.
        """
        count, size = len(pairs), self.config.micro_batch_size
        order = sorted(range(count), key=lambda i: sum(map(len, pairs[i])))
        mine = order[self.ranks.rank :: self.ranks.world]
        real = len(mine)
        mine += order[-1:] * (math.ceil(count / self.ranks.world) - real)
        for first in range(0, len(mine), size):
            places = mine[first : first + size]
            weights = torch.tensor([float(first + k < real) for k in range(len(places))])
            batch = [pairs[i] for i in places]
            yield places, batch, weights.to(self.ranks.device), first + size >= len(mine)

    def reference_logps(self, pairs: Sequence[Pair], keep: bool) -> Tensor:
        """(N, 2) float32 on every rank: summed log-probs of chosen and rejected by the reference.

        They are computed once for a pair, and kept until the reference changes; all ranks keep the
        same. `keep`: false for pairs that will not come again.
        """
        if self.source.reference_version != self.reference_version:
            self.reference_version = self.source.reference_version
            self.known_logps.clear()
        keys = [hash_seed(*pair) for pair in pairs]
        missing = dict(zip(keys, pairs, strict=True))
        missing = {key: pair for key, pair in missing.items() if key not in self.known_logps}
        table = torch.zeros(len(missing), 2, dtype=torch.float64, device=self.ranks.device)
        for places, batch, weights, _ in self.shares(list(missing.values())):
            with self.phase("reference"), torch.no_grad():
                sums = lm.pair_logprobs(self.models["reference"], batch)[:2]
            table[places] += torch.stack(sums, dim=1).double() * weights[:, None]
        self.referred += sum(map(lm.tree_size, missing.values()))
        found = dict(zip(missing, map(tuple, self.ranks.sum(table).tolist()), strict=True))
        rows = [found[key] if key in found else self.known_logps[key] for key in keys]
        if keep:
            self.known_logps |= found
        return torch.tensor(rows, dtype=torch.float32, device=self.ranks.device).view(-1, 2)

    def score(self, pairs: Sequence[Pair], learn: bool, alone: Transformer | None = None) -> Tensor:
        """(N, 12) float64 on every rank, COLUMNS in the pairs' order; `learn`: the gradient too;
        `alone`: a model to take in the policy's place, without a reference.
        """
        c, count = self.config, len(pairs)
        stats = torch.zeros(count, len(COLUMNS), dtype=torch.float64, device=self.ranks.device)
        tokens = sum(len(pair.chosen) for pair in pairs)
        constants = (self.beta, c.label_smoothing, c.orpo_lambda, c.length_normalize)
        references = torch.zeros(count, 2, device=self.ranks.device)
        if self.compares and alone is None:
            references = self.reference_logps(pairs, keep=learn)
        for places, batch, weights, last in self.shares(pairs):
            if isinstance(self.policy, FSDPModule):
                self.policy.set_requires_gradient_sync(last)
            reference = references[places].unbind(1)
            with self.phase("policy"), torch.set_grad_enabled(learn):
                parts = lm.pair_token_logprobs(alone or self.policy, batch)
                policy = lm.pair_sums(parts)
                losses, *rewards = sapo.pair_loss(c.loss, policy, reference, *constants)
                loss = (losses * weights).sum() / count
                loss = loss - self.nll_weight * (policy[0] * weights).sum() / tokens
                if learn:  # FSDP averages gradients over ranks; the sum is wanted
                    (loss * self.ranks.world).backward()
            computed = torch.tensor([lm.tree_size(pair) for pair in batch], device=loss.device)
            whole = (losses, *policy[:2], *reference, *rewards)
            segments = sapo.segment_logprobs(batch, parts).unbind(1)
            columns = torch.stack([x.detach().double() for x in (*whole, *segments, computed)], 1)
            stats[places] += columns * weights[:, None]
        return self.ranks.sum(stats).cpu()  # once: each number read from a device waits for it

    @property
    def compares(self) -> bool:
        """Whether the loss reads the reference."""
        return self.config.loss not in (None, "orpo")

    def summary(self, pairs: Sequence[Pair], stats: Tensor, prefix: str) -> dict[str, float]:
        """Means over the pairs; accuracies leave out pairs whose two sides are equal."""
        column = dict(zip(COLUMNS, stats.unbind(1), strict=True))
        row = {"nll": -float(column["logps/chosen"].sum()) / sum(len(p.chosen) for p in pairs)}
        row["loss"] = float(column["losses"].mean()) + self.nll_weight * row["nll"]
        row["logps/chosen"] = float(column["logps/chosen"].mean())
        row["tokens/policy"] = float(column["tokens"].sum())
        if self.config.method != "sft" and all(pair.rejected for pair in pairs):
            good, bad = column["rewards/chosen"], column["rewards/rejected"]
            told = torch.tensor([p.rejected != p.chosen for p in pairs])
            for key in ("logps/rejected", "rewards/chosen", "rewards/rejected"):
                row[key] = float(column[key].mean())
            row["rewards/margins"] = float((good - bad).mean())
            if told.any():
                row["rewards/accuracies"] = float((good > bad)[told].double().mean())
            row["pairs/identical"] = 1 - float(told.double().mean())
            segments = stats[:, COLUMNS.index("logps/segment") : COLUMNS.index("tokens")]
            row |= sapo.segment_metrics(pairs, segments)
        return {prefix + key: value for key, value in row.items()}

    def update(self, lr: float, loss: float) -> float:
        """Clips, steps, and returns the gradient's norm before clipping. A step whose loss or norm
        is not finite is skipped; five in a row end the run."""
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
        if self.bad_steps == 5:
            last = max(self.checkpoints().items(), default=(0, "none: see --save-every"))[1]
            raise InputError(
                "loss or gradient was not finite 5 steps in a row: try a lower --lr; "
                f"the last checkpoint is {last}"
            )
        return value

    def generate(
        self,
        model: Transformer,
        prompts: list[list[int]],
        budgets: list[int],
        seeds: list[int],
        temperature: float | None = None,
    ) -> tuple[list[list[int]], list[float]]:
        """`generate` with the rows spread over the ranks; every rank gets all of the answer: the
        new tokens, and the sum of their log-probs under the model as it is."""
        c, count = self.config, len(prompts)
        mine = range(self.ranks.rank, count, self.ranks.world)
        sampling: dict[str, Any] = {
            "temperature": c.temperature if temperature is None else temperature,
            "top_k": c.top_k, "top_p": c.top_p, "eos_ids": self.job.tokenizer.eos_ids,
            "batch_size": c.generate_batch_size, "seed": [seeds[i] for i in mine],
            "return_logprobs": True,
        }  # fmt: skip
        prompts, budgets = [prompts[i] for i in mine], [budgets[i] for i in mine]
        with self.phase("generate"), self.ranks.decoder(model) as ready:
            new, logps = lm.generate(ready, prompts, budgets, **sampling)
            rows = self.ranks.share_rows(dict(zip(mine, new, strict=True)), count)
            sums = torch.zeros(count, dtype=torch.float64, device=self.ranks.device)
            sums[list(mine)] = torch.tensor([math.fsum(x) for x in logps]).to(sums)
        self.generated += sum(map(len, rows))
        return rows, self.ranks.sum(sums).tolist()

    def evaluate(self) -> dict[str, float]:
        """Held-out rows scored as training pairs are, and what the job's own test measures."""
        row: dict[str, float] = {}
        began = time.perf_counter()
        with self.phase("eval"):
            if self.job.eval_rows:
                pairs = self.source.eval_pairs(self.job.eval_rows)
                row |= self.summary(pairs, self.score(pairs, learn=False), "eval/")
            if self.job.test is not None:
                with self.ranks.decoder(self.policy) as ready:
                    row |= self.job.test(ready)
        return row | {"seconds/eval": time.perf_counter() - began}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time within to `seconds[name]`, less that of phases within this one."""
        began, before = time.perf_counter(), sum(self.seconds.values())
        yield
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        inner = sum(self.seconds.values()) - before
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began - inner

    def log(self, step: int, row: dict[str, float], pace: float) -> None:
        """Appends the row to metrics.jsonl and prints the line that a person reads."""
        if not self.ranks.first:
            return
        name = self.job.phase or self.config.method
        whole = {"step": self.job.before + step, "phase": name} | row
        whole = {k: None if v in (math.inf, -math.inf) or v != v else v for k, v in whole.items()}
        with self.job.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole) + "\n")
        names = {"loss": "loss", "rewards/accuracies": "acc", "rewards/margins": "margin"}
        names |= {"segment/identical": "same", "grad_norm": "norm", "lr": "lr"}
        shown = " ".join(f"{names[k]} {row[k]:.4g}" for k in names if k in row)
        left = round(pace * (self.steps - step))
        clock = f"{1 / pace:.2f} steps/s {left // 60}:{left % 60:02} left"
        print(f"{name} {step}/{self.steps} {shown} {clock}", flush=True)

    # What a run leaves behind. All ranks call these: the weights are gathered by all of them.

    def save_model(self, model: Transformer, folder: Path, dtype: torch.dtype) -> None:
        """A Hugging Face folder of a model, with its tokenizer."""
        parameters = dict(model.named_parameters())
        sizes = {name: p.numel() * dtype.itemsize for name, p in parameters.items()}
        if self.ranks.first:
            folder.mkdir(parents=True)
            lm.write_config(folder, model.config, dtype)
            self.job.tokenizer.save(folder)
            file = folder / "generation_config.json"  # others should stop where we do
            raw = lm.read_json(file) if file.exists() else {}
            raw["eos_token_id"] = list(self.job.tokenizer.eos_ids)
            file.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
            if self.config.method == "sgpo" or self.job.phase == "improver":  # for --improve
                said = json.dumps({"instruction": self.config.improver_instruction}, indent=2)
                (folder / sample.IMPROVER_FILE).write_text(said + "\n", encoding="utf-8")
        fetch = lambda name: self.ranks.whole(parameters[name]).to(dtype).cpu()  # noqa: E731
        lm.write_weights(folder, sizes, fetch, self.ranks.first)

    def save_final(self) -> None:
        """OUT/final: the policy, in the type that --save-dtype says."""
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.config.save_dtype]
        self.publish(self.job.final, lambda folder: self.save_model(self.policy, folder, dtype))

    def save(self, step: int) -> None:
        """checkpoints/step-N: models, optimizer and source after N updates."""
        if self.job.checkpoints is not None:
            number = self.job.before + step
            self.publish(self.job.checkpoints / f"step-{number}", self.write_checkpoint)
            if self.config.keep and self.ranks.first:
                for _, folder in sorted(self.checkpoints().items())[: -self.config.keep]:
                    shutil.rmtree(folder)

    def publish(self, folder: Path, write: Callable[[Path], None]) -> None:
        """Writes a folder that appears whole or not at all: beside its place, then renamed. What
        cannot be written whole, as where the disk is full, is taken away."""
        partial, old = folder.with_name(f".{folder.name}"), folder.with_name(f".{folder.name}.old")
        if self.ranks.first:
            for path in (partial, old):
                shutil.rmtree(path, ignore_errors=True)
        self.ranks.barrier()
        try:
            write(partial)
            if self.ranks.first:
                for path in (*(f for f in partial.rglob("*") if f.is_file()), partial):
                    flush(path)
        except BaseException:
            if self.ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self.ranks.barrier()
        if self.ranks.first:
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
            flush(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
        self.ranks.barrier()

    def write_checkpoint(self, folder: Path) -> None:
        """Models as Hugging Face folders, the rest as safetensors."""
        for name, model in self.models.items():
            self.save_model(model, folder / name, torch.float32)
        state = {
            f"{name}.{key}": value
            for name, parameter in self.policy.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        sizes = {name: value.numel() * value.element_size() for name, value in state.items()}
        if self.ranks.first:
            (folder / "optimizer").mkdir()
            save_file(self.source.state_dict(), folder / "source.safetensors")
            save_file(self.drift.state_dict(), folder / "drift.safetensors")
            kept = torch.tensor([*self.known_logps.values()], dtype=torch.float64).view(-1, 2)
            keys = torch.tensor([*self.known_logps], dtype=torch.int64)
            save_file({"keys": keys, "logps": kept}, folder / "reference_logps.safetensors")
            counts = {"skipped": self.skipped, "bad_steps": self.bad_steps, "bounds": self.bounds}
            counts |= {"reference_version": self.reference_version}
            (folder / "trainer.json").write_text(json.dumps(counts) + "\n", encoding="utf-8")
        fetch = lambda name: self.ranks.whole(state[name]).cpu()  # noqa: E731
        lm.write_weights(folder / "optimizer", sizes, fetch, self.ranks.first)

    def checkpoints(self) -> dict[int, Path]:
        """The checkpoints on disk by their number of steps."""
        folders = [] if self.job.checkpoints is None else self.job.checkpoints.glob("step-*")
        return {int(f.name[5:]): f for f in folders if f.name[5:].isdecimal()}

    def check(self, folder: Path) -> None:
        """Raises InputError where a checkpoint is not whole; headers are read, and no weights."""
        for name, model in self.models.items():
            lm.find_weights(dict(model.named_parameters()), folder / name)
        lm.weight_files(folder / "optimizer")
        lm.read_json(folder / "trainer.json")
        for name in ("source", "drift", "reference_logps"):
            with lm.open_safetensors(folder / f"{name}.safetensors"):
                pass

    def restore(self) -> int:
        """Takes up the newest whole checkpoint of this phase; returns the steps that it has done of
        it, or 0 where there is none."""
        before, step = self.job.before, self.job.before
        for number, folder in sorted(self.checkpoints().items(), reverse=True):
            if number <= before:
                break
            try:
                self.check(folder)
            except InputError as error:
                if self.ranks.first:
                    print(f"warning: {folder} is not whole, and left out: {error}", file=sys.stderr)
                continue
            step = number
            break
        if step - before > self.steps:
            raise InputError(f"--steps {self.steps}, but {folder} is beyond that already")
        if step > before:
            for name, model in self.models.items():
                parameters = dict(model.named_parameters())
                lm.load_weights(parameters, folder / name, self.ranks.place)
            self.restore_optimizer(folder / "optimizer")
            for name, part in (("source", self.source), ("drift", self.drift)):
                with lm.open_safetensors(folder / f"{name}.safetensors") as file:
                    part.load_state_dict({k: file.get_tensor(k) for k in sorted(file.keys())})
            counts = lm.read_json(folder / "trainer.json")
            self.skipped, self.bad_steps = int(counts["skipped"]), int(counts["bad_steps"])
            self.bend(counts["bounds"], step - before)
            self.reference_version = int(counts["reference_version"])
            with lm.open_safetensors(folder / "reference_logps.safetensors") as file:
                keys, kept = file.get_tensor("keys").tolist(), file.get_tensor("logps").tolist()
            self.known_logps = dict(zip(keys, map(tuple, kept), strict=True))
        if self.job.trace is not None:
            self.job.trace.forget_after(step)
        if self.ranks.first:
            keep_rows(self.job.metrics, "step", step)
            if isinstance(self.source, sgpo.SGPO):
                keep_rows(self.job.metrics.with_name("pairs.jsonl"), "round", self.source.round)
            found_one = step > before
            print(
                f"resuming after step {step}" if found_one else "no checkpoint yet: starting afresh"
            )
        return step - before

    def bend(self, old: list[int], done: int) -> None:
        """Takes up the saved schedule. Where --steps has changed, what is left of it is stretched
        over what is left now: iterations and rounds that have begun stay where they are."""
        left = max(1, old[-1] - done)
        ratio = (self.steps - done) / left
        bent = [at if at < done else done + round((at - done) * ratio) for at in old[:-1]]
        self.bounds[:] = [*bent, self.steps]  # in place: the source has it too

    def restore_optimizer(self, folder: Path) -> None:
        """Fills the optimizer's state, each rank its shards."""
        files = lm.weight_files(folder)
        for name, parameter in self.policy.named_parameters():
            state = self.optimizer.state[parameter]
            for key in ("step", "square_avg", "exp_avg", "exp_avg_sq"):
                if f"{name}.{key}" in files:
                    with lm.open_safetensors(files[f"{name}.{key}"]) as file:
                        value = file.get_tensor(f"{name}.{key}")
                    state[key] = value if key == "step" else torch.zeros_like(parameter).detach()
                    self.ranks.place(state[key], value)


def json_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a file and their objects; one that was not written whole is left out."""
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError):  # a kill cut it off, perhaps within a character
            if isinstance(row := json.loads(line), dict):
                yield line, row


def keep_rows(path: Path, key: str, most: int) -> None:
    """Drops the rows of what a resumed run does again: those whose key is above a value."""
    if path.exists():
        kept = [line + b"\n" for line, row in json_lines(path) if row.get(key, most + 1) <= most]
        write_text(path, b"".join(kept).decode("utf-8"))


def write_text(path: Path, text: str) -> None:
    """Writes a file that is the old one or the new one at any time, and never half of it."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    partial.rename(path)


def flush(path: Path) -> None:
    """Has a file's content, or a folder's entries, written to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def as_prompt(messages: data.Messages) -> Any:
    """A conversation as a row's "prompt": the text where it is one turn of the user's."""
    alone = len(messages) == 1 and messages[0]["role"] == "user"
    return messages[0]["content"] if alone else list(messages)


# ------------------------------------------------------------------------------ SGPO's first phase


def train_improver(config: Config, job: Job, ranks: Ranks, asks: Sequence[sgpo.Ask]) -> int:
    """OUT/improver: the start, fine-tuned to improve its own answers. Returns the steps it took."""
    folder, note = job.metrics.with_name("improver"), job.metrics.with_name("improver_filter.json")
    if folder.exists():
        return int(lm.read_json(note)["steps"])
    settings = dataclasses.replace(
        config, method="sft", loss=None, lr=config.improver_lr, epochs=config.improver_epochs,
        steps=None, nll_weight=0.0, label_smoothing=0.0, length_normalize=False,
    )  # fmt: skip
    job = dataclasses.replace(job, final=folder, phase="improver", asks=(), test=None, eval_rows=[])
    trainer = Trainer(settings, job, ranks)
    targets = Targets(config, job.metrics.with_name("improver_targets.jsonl"), ranks)
    measured = lm.read_json(note)["perplexities"] if note.exists() else []
    models = (trainer.policy, trainer.generate, trainer.gold_scores)
    rows, report = sgpo.improver_phase(asks, *models, config, job.tokenizer, targets, measured)
    trainer.take(rows)
    if ranks.first:
        told = f"{report['targets']} targets, and {report['too_long']} too long; "
        print(f"{told}{report['dropped']} beyond the fence, {report['fence']}", flush=True)
        write_text(note, json.dumps({"steps": trainer.steps} | report, indent=1) + "\n")
    trainer.train()
    return trainer.steps


class Targets:
    """--target-source, and OUT/improver_targets.jsonl with a row for each draft.

    Each row is written as soon as it is known, and what is in the file is not asked for again.
    """

    def __init__(self, config: Config, path: Path, ranks: Ranks) -> None:
        self.config, self.path, self.ranks = config, path, ranks
        self.rows: dict[int, dict[str, Any]] = {}

    def known(self, drafts: Sequence[sgpo.Ask]) -> Collection[int]:
        """The drafts that the file has; all of them where the targets are a file of the user's."""
        if self.config.target_source not in ("gold", "tasks") and not is_url(self.config):
            return range(len(drafts))
        for _, row in json_lines(self.path):
            i = row["index"] if row.keys() >= {"index", "prompt", "response", "improved"} else -1
            if 0 <= i < len(drafts) and row["prompt"] == as_prompt(drafts[i].messages):
                self.rows[i] = row
        return self.rows.keys()

    def obtain(self, drafts: Sequence[sgpo.Ask], answers: dict[int, str]) -> list[data.Target]:
        """Has the first rank ask for what is missing; the others wait, and hear of a failure."""
        if not self.rows and not answers:
            return data.load_targets(self.config.target_source or "")
        failure: Exception | None = None
        if self.ranks.first:
            try:
                self.gather(drafts, answers)
            except (InputError, OSError, Stopped) as error:
                failure = error
        failed = self.ranks.sum(torch.tensor(float(failure is not None), device=self.ranks.device))
        if failure is not None:
            raise failure
        if failed:
            raise Stopped("rank 0 could not obtain the targets")
        return data.load_targets(self.path)

    def gather(self, drafts: Sequence[sgpo.Ask], answers: dict[int, str]) -> None:
        """Asks and writes; at the end the rows are in the drafts' order."""
        self.write()
        with self.path.open("a", encoding="utf-8") as file:
            for i, improved, why in improvements(self.config, drafts, answers):
                self.rows[i] = {
                    "index": i, "prompt": as_prompt(drafts[i].messages), "response": answers[i],
                    "improved": improved,
                } | ({"dropped": why} if why else {})  # fmt: skip
                file.write(json.dumps(self.rows[i], ensure_ascii=False) + "\n")
                file.flush()
                if self.ranks.asked_to_stop:
                    raise Stopped("stopped while targets were asked for; --resume goes on")
        self.write()
        dropped = collections.Counter(row.get("dropped") for row in self.rows.values())
        print(", ".join(f"{n} {why or 'targets'}" for why, n in dropped.items()), flush=True)

    def write(self) -> None:
        """The file anew, in order."""
        rows = (json.dumps(row, ensure_ascii=False) for _, row in sorted(self.rows.items()))
        write_text(self.path, "".join(row + "\n" for row in rows))


def improvements(
    config: Config, drafts: Sequence[sgpo.Ask], answers: dict[int, str]
) -> Iterator[tuple[int, str | None, str]]:
    """(which draft, its improvement, ""), as they come, or (which, None, why there is none)."""
    if not is_url(config):
        for i, answer in answers.items():
            text, improved = drafts[i].messages[-1]["content"], drafts[i].response
            if config.target_source == "tasks":
                rng = random.Random(hash_seed(config.seed, "mend", i))
                improved = data.mend_answer(text, answer, rng)
            yield i, improved or None, "" if improved else "no gold"
        return
    server, places = target_server(config), list(answers)
    questions = [
        sgpo.target_prompt(
            drafts[i].messages, drafts[i].response, answer, config.target_instruction
        )
        for i, answer in answers.items()
    ]
    began = told = time.perf_counter()
    for done, (place, found, why) in enumerate(server.ask_all(questions), 1):
        yield places[place], found, why
        now = time.perf_counter()
        if now - told > 10 or done == len(questions):
            rate, told = done / (now - began), now
            left = round((len(questions) - done) / rate)
            clock = f"{rate:.2f} requests/s {left // 60}:{left % 60:02} left"
            print(f"targets {done}/{len(questions)} {clock}", flush=True)


# ---------------------------------------------------------------------------------- the whole run


def main(argv: Sequence[str]) -> int:
    """Parses, runs, and turns bad input into one line and exit status 2."""
    ranks = None

    def on_sigterm(*_: Any) -> None:
        if ranks is None:
            raise SystemExit(143)
        ranks.asked_to_stop = True

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        config = parse_args(argv)
        ranks = Ranks()
        run(config, ranks)
        return 0
    except (InputError, OSError, SafetensorError) as error:  # the last where a disk is full
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(1)  # rank 0 most likely says the same, and torchrun then ends this one
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 143
    finally:
        signal.signal(signal.SIGTERM, before)
        if dist.is_initialized():
            dist.destroy_process_group()


def run(config: Config, ranks: Ranks) -> None:
    """Reads the data, makes or takes the start, trains, and says what came of it."""
    out, on_tasks = Path(config.out), config.data is None
    if config.improver is not None and config.preference_data:
        on_tasks = False
    if config.ema_offload and ranks.world > 1:
        raise InputError("--ema-offload is for one process; over several the EMA is sharded")
    torch.set_float32_matmul_precision("highest")
    if config.precision == "medium":
        told = medium_error(ranks.device)  # and sets it
        if ranks.first:
            print(told, flush=True)
    if config.resume and (out / "final").exists():
        print(f"{out} holds a finished run: nothing to resume")
        return
    start = Path(config.model) if config.model else out / "start"
    tokenizer = load_tokenizer(config)
    if config.model:
        sample.check_vocabulary(tokenizer, outline(start), start)
    rows, eval_rows = read_rows(config, tokenizer, ranks)
    asks, wanted = read_asks(config, tokenizer, ranks) if config.method == "sgpo" else ([], [])
    trace = sample.Trace(config.trace, config) if config.trace is not None else None
    claim(out, config, ranks)
    if config.model is None and not start.exists():
        pretrain(config, start, tokenizer, ranks)

    def test(model: Transformer) -> dict[str, float]:
        shares = sample.task_accuracy(model, tokenizer, config.seed, 0.0, "validation")
        return {f"eval/accuracy/{kind}": share for kind, share in shares.items()}

    job = Job(start, rows, eval_rows, tokenizer, out / "metrics.jsonl", out / "final")
    job.test = test if on_tasks else None
    job.checkpoints, job.trace = out / "checkpoints", trace
    control = dataclasses.replace(config, method="sft", loss=None, resume=False, save_every=0)
    beside = dataclasses.replace(job, metrics=out / "control.jsonl", final=out / "control")
    beside.checkpoints, beside.trace = None, None
    if config.method == "sgpo":
        job.asks, job.on_tasks = wanted, on_tasks and config.preference_data is None
        if config.improver is None:
            job.before, job.start = train_improver(config, job, ranks, asks), out / "improver"
        control.lr = config.improver_lr
    control.steps = job.before + schedule(config, len(wanted or rows))[-1]  # as all phases take
    with_control = on_tasks and config.method != "sft"
    if with_control and not (out / "control").exists():
        if ranks.first:
            beside.metrics.unlink(missing_ok=True)
        Trainer(control, beside, ranks).train()
    Trainer(config, job, ranks).train()
    if on_tasks and ranks.first:
        models = {"start": start, "sft control": out / "control", "improver": out / "improver"}
        models = {name: path for name, path in models.items() if path.exists()}
        sample.print_accuracies(models | {config.method: out / "final"}, tokenizer, config.seed)
    if ranks.first:
        sample.plot_curves(out)
        print(f"the trained model is in {out / 'final'}")


def load_tokenizer(config: Config) -> data.Tokenizer:
    """The start's tokenizer, or the built-in one."""
    if config.model is not None:
        return data.load_tokenizer(config.model, config.chat_template)
    with tempfile.TemporaryDirectory() as folder:
        data.write_task_tokenizer(folder)
        return data.load_tokenizer(folder)


def read_rows(
    config: Config, tokenizer: data.Tokenizer, ranks: Ranks
) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out rows as token ids; prints once what was dropped and cut.

    Only methods that learn from the data's own pairs need a rejected side; held-out rows keep
    theirs where they have one.
    """
    paired = config.method in ("dpo", "orpo")

    def encode(examples: list[data.Example]) -> list[Pair]:
        limits = (config.max_length, config.max_prompt_length or 0)
        rows, counts = data.encode_examples(examples, tokenizer, *limits)
        if ranks.first:
            print(", ".join(f"{n} {key.replace('_', ' ')}" for key, n in counts.items() if n))
        return rows

    held_out: list[Pair] = []
    if config.eval_data:
        held_out = encode(data.load_examples(config.eval_data, paired or None))
    if config.method == "sgpo" and config.data is not None:
        return [], held_out  # `read_asks` reads them
    if config.data is None:
        return encode(task_rows(config, 128)), held_out
    return encode(data.load_examples(config.data, paired)), held_out


def read_asks(
    config: Config, tokenizer: data.Tokenizer, ranks: Ranks
) -> tuple[list[sgpo.Ask], list[sgpo.Ask]]:
    """SGPO's prompts for phase 1 and for phase 2, with gold responses where there are any. Raises
    InputError for what could not be used later, when targets have been paid for."""

    def encode(examples: Sequence[data.Example]) -> list[sgpo.Ask]:
        asks = []
        for example in examples:
            if example.messages[-1]["role"] != "user":
                raise InputError(f"{example.where}: the turn before the response is not the user's")
            prompt, gold, _ = data.encode_example(tokenizer, example)
            if len(prompt) < (config.max_prompt_length or 0):
                gold = gold[: config.max_length - len(prompt)] if example.response else []
                asks.append(sgpo.Ask(example.messages, example.response, prompt, gold))
        kept = sgpo.leave_room(asks, tokenizer, config) if asks else []
        if not kept:
            raise InputError(
                f"none of the {len(examples)} prompts is left: they have "
                f"{config.max_prompt_length} tokens or more; raise --max-prompt-length"
            )
        if ranks.first:
            print(f"{len(kept)} prompts, {len(examples) - len(kept)} dropped for their length")
        return kept

    asks = []
    if config.improver is None:
        clean = data.load_asks(config.data) if config.data else task_rows(config, 128)
        asks = encode(clean)
        if config.target_source == "gold" and not any(ask.gold for ask in asks):
            raise InputError("--target-source gold, and no row of --data has a response")
        if config.target_source not in ("gold", "tasks") and not is_url(config):
            data.load_targets(config.target_source or "")
    paths = config.preference_data or config.data
    return asks, encode(data.load_asks(paths) if paths else task_rows(config, 1024))


def task_rows(config: Config, count: int) -> list[data.Example]:
    """Built-in tasks with right answers; the first 128 are the clean set."""
    return data.task_examples("clean", count, config.seed)


def target_server(config: Config) -> data.TargetServer:
    """The server of --target-source. Raises InputError for a URL or a key that cannot be right."""
    c, key = config, os.environ.get("OPENAI_API_KEY", "").strip() or None
    settings = (c.target_workers, c.target_timeout, c.target_max_tokens)
    return data.TargetServer(
        (c.target_source or "").rstrip("/"), c.target_model or "", key, *settings
    )


def is_url(config: Config) -> bool:
    """Whether the targets are asked from a server."""
    return (config.target_source or "").startswith(("http://", "https://"))


def claim(out: Path, config: Config, ranks: Ranks) -> None:
    """Takes --out for this run, or on resume checks that the run in it was started alike."""
    args, made = out / "args.json", "start control metrics.jsonl final checkpoints improver"
    made += " improver_targets.jsonl pairs.jsonl"
    for path in out.iterdir() if out.is_dir() else ():
        if path.is_symlink():
            raise InputError(f"--out {out} holds a symbolic link, {path.name}: take another folder")
    taken = [name for name in made.split() if (out / name).exists()]
    if taken and not config.resume:
        raise InputError(f"--out {out} holds {taken[0]} of another run: --resume or another folder")
    if taken and not args.is_file():
        raise InputError(f"--resume: {out} has no args.json to tell which run it is; take another")
    if config.resume and args.is_file():
        saved, now = lm.read_json(args), dataclasses.asdict(config)
        differing = [k for k in now if k not in MAY_CHANGE and now[k] != saved.get(k)]
        if differing:
            told = ", ".join(f"--{k.replace('_', '-')} was {saved.get(k)}" for k in differing)
            raise InputError(f"--resume with other flags than {out} was started with: {told}")
        for name in ("steps", "epochs"):
            if ranks.first and saved.get(name) != now[name]:
                told = f"--{name} was {saved.get(name)} and is {now[name]}"
                print(f"warning: {told}: the schedule bends", file=sys.stderr)
    problem = ""
    if ranks.first:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_text(args, json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        except OSError as error:
            problem = error.strerror or "not writable"
    if ranks.sum(torch.tensor(float(bool(problem)), device=ranks.device)):
        raise InputError(f"--out {out} cannot be written: {problem}")


def pretrain(config: Config, start: Path, tokenizer: data.Tokenizer, ranks: Ranks) -> None:
    """Makes the built-in start: random weights, then SFT on answers of mixed quality.

    REWRITE_SHARE of the rows ask for a draft to be rewritten, which SGPO's improver builds on.
    """
    settings = dataclasses.replace(config, **START)
    blank = start.with_name(".blank")
    if ranks.first:
        print("pre-training the built-in start", flush=True)
        shutil.rmtree(blank, ignore_errors=True)
        raw = START_MODEL | {
            "vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_ids[0],
        }  # fmt: skip
        fresh = Transformer(lm.Config.from_dict(raw))
        fresh.init_weights(config.seed)
        fresh.save_pretrained(blank)
        tokenizer.save(blank)
        start.with_suffix(".jsonl").unlink(missing_ok=True)
    ranks.barrier()
    count = (settings.steps or 0) * settings.batch_size
    examples = data.task_examples("pretrain", count, config.seed, REWRITE_SHARE)
    rows, _ = data.encode_examples(examples, tokenizer, settings.max_length, settings.max_length)
    job = Job(blank, rows, [], tokenizer, start.with_suffix(".jsonl"), start)
    Trainer(dataclasses.replace(settings, resume=False), job, ranks).train()
    if ranks.first:
        shutil.rmtree(blank)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
