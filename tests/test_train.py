"""train.py and sample.py: whole runs on a tiny random model, their files, and their equals."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import GOLDEN, alike, metrics, same, torchrun, weights
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model as lm
import sample
import sapo
import train
from model import Transformer, hash_seed


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the built-in tokenizer, as an ordinary folder."""
    folder = tmp_path_factory.mktemp("start") / "model"
    data.write_task_tokenizer(folder)
    raw = train.START_MODEL | {"vocab_size": 260, "eos_token_id": 256, "hidden_size": 32}
    fresh = Transformer(lm.Config.from_dict(raw | {"intermediate_size": 48}))
    fresh.init_weights(seed=1)
    fresh.save_pretrained(folder)
    return folder


ROWS = str(GOLDEN / "rows.jsonl")
SMALL = ["--steps", "6", "--batch-size", "5", "--max-length", "64", "--segment-length", "6"]
SMALL += ["--lr", "1e-3", "--log-every", "1", "--replay-capacity", "12", "--ref-update-every", "2"]
SMALL += ["--temperature", "1", "--top-k", "0", "--top-p", "1", "--segment-rule", "uniform"]
EVALUATED = ["--save-every", 3, "--eval-data", ROWS, "--eval-every", 3]


def run(*flags: object) -> int:
    return train.main([str(flag) for flag in flags])


def error_line(capsys: Any) -> str:
    """What bad input printed on stderr: one line."""
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    return shown


@pytest.fixture
def usual(start: Path, tmp_path: Path) -> list[object]:
    """The flags of a small run into tmp_path/run."""
    return ["--model", start, "--data", ROWS, "--out", tmp_path / "run", *SMALL]


@pytest.fixture(scope="module")
def sapo_run(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of six steps, with checkpoints after the third and the sixth."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run("--model", start, "--data", ROWS, "--out", out, *EVALUATED, *SMALL) == 0
    return out


@pytest.fixture
def unfinished(sapo_run: Path, tmp_path: Path) -> Path:
    """tmp_path/run: `sapo_run`, as it was before it wrote its result."""
    out = tmp_path / "run"
    shutil.copytree(sapo_run, out)
    shutil.rmtree(out / "final")
    return out


def test_a_run_leaves_the_files_of_the_contract(sapo_run: Path) -> None:
    table = metrics(sapo_run, left_out=())
    assert [row["step"] for row in table] == [1, 2, 3, 4, 5, 6]
    promised = """loss rewards/chosen rewards/rejected rewards/margins logps/chosen logps/rejected
        lr grad_norm tokens_per_second seconds/generate seconds/reference seconds/policy
        seconds/optimizer seconds/ema tokens/generate tokens/reference tokens/policy
        replay/size replay/age replay/times_sampled segment/identical segment/logps
        segment/new_logps segment/kl segment/ended segment/unended seam/new_logps"""
    assert all(set(promised.split()) <= row.keys() | {"seconds/ema"} for row in table)
    assert ["seconds/ema" in row for row in table] == [False, *[True] * 5]
    assert table[0]["segment/kl"] == pytest.approx(0, abs=1e-5)  # the policy wrote them itself
    assert [row["replay/size"] for row in table] == [5, 10, 12, 12, 12, 12]
    assert ["eval/loss" in row for row in table] == [False, False, True, False, False, True]
    assert "eval/rewards/accuracies" in table[-1]
    args = json.loads((sapo_run / "args.json").read_text())
    assert args["beta"] == [0.1]
    assert args["steps"] == 6
    assert sorted(p.name for p in (sapo_run / "checkpoints").iterdir()) == ["step-3", "step-6"]
    assert not [p for p in sapo_run.iterdir() if p.name.startswith(".")]
    losses = [row["loss"] for row in table]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert max(losses) - min(losses) > 1e-4


def test_the_result_loads_in_transformers_with_our_logits_and_ids(sapo_run: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(sapo_run / "final")
    tokenizer = transformers.AutoTokenizer.from_pretrained(sapo_run / "final")
    ours = data.load_tokenizer(sapo_run / "final")
    turns = [{"role": "user", "content": "reverse abc"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == ours.apply_chat_template(turns, add_generation_prompt=True)
    tokens = torch.tensor([ids])
    logits = Transformer.from_pretrained(sapo_run / "final")(tokens)
    assert torch.allclose(theirs(tokens).logits, logits, atol=1e-5)
    assert theirs.generation_config.eos_token_id == [256]
    saved = weights(sapo_run)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    policy = weights(sapo_run, "checkpoints/step-6/policy")
    assert all(torch.equal(saved[key], policy[key]) for key in saved)


def test_resuming_a_finished_run_says_so(sapo_run: Path, usual: list[object], capsys: Any) -> None:
    before = (sapo_run / "metrics.jsonl").read_bytes()
    assert run(*usual, "--out", sapo_run, "--resume") == 0
    assert "finished" in capsys.readouterr().out
    assert (sapo_run / "metrics.jsonl").read_bytes() == before


def test_resuming_without_a_checkpoint_starts_afresh(usual: list[object], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert run(*usual, "--resume", "--steps", 1) == 0
    assert len(metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--beta", "0.2"], "--beta was [0.1]"),
        (["--date", "2001-01-01"], "--date was 2"),
        (["--steps", "4"], "step-6 is beyond that already"),
    ],
)
def test_resuming_with_other_flags_is_an_error_that_lists_them(
    flags: list[str], named: str, unfinished: Path, usual: list[object],
    capsys: Any,
) -> None:  # fmt: skip
    assert run(*usual, *EVALUATED, *flags, "--resume") == 2
    assert named in capsys.readouterr().err.split("error: ")[1]


@pytest.mark.parametrize("name", ["start", "control", "final", "metrics.jsonl", "checkpoints"])
def test_what_another_run_left_is_not_taken_for_ones_own(
    name: str, usual: list[object], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    for resume in ([], ["--resume"])[: 1 if name == "final" else 2]:
        assert run(*usual, *resume) == 2
        assert error_line(capsys).startswith("error: --")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


HARMS: dict[str, Callable[[Path], object]] = {
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "state": lambda folder: (folder / "state/model.safetensors").write_bytes(b"\0" * 30),
    "half a state": lambda folder: shorten(folder / "state/model.safetensors"),
    "policy": lambda folder: shorten(folder / "policy/model.safetensors"),
}


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_checkpoint_is_left_out_for_the_one_before_it(
    harm: str, unfinished: Path, sapo_run: Path, usual: list[object],
    capsys: Any,
) -> None:  # fmt: skip
    newest = unfinished / "checkpoints" / "step-6"
    HARMS[harm](newest)
    assert run(*usual, *EVALUATED, "--resume") == 0
    shown = capsys.readouterr()
    assert shown.err.startswith(f"warning: {newest} is not whole")
    assert "resuming after step 3" in shown.out
    same(unfinished, sapo_run)


def test_four_ranks_run_as_one_does(sapo_run: Path, usual: list[object], tmp_path: Path) -> None:
    """test_runs.py, test_spin.py and test_sgpo.py have two."""
    done = torchrun(4, [*usual, *EVALUATED, "--micro-batch-size", 2, "--activation-checkpointing"])
    assert done.returncode == 0, done.stderr[:6000]
    names = ("final", "checkpoints/step-6/policy", "checkpoints/step-6/state")
    alike(tmp_path / "run", sapo_run, names)


def test_micro_batches_change_nothing(sapo_run: Path, usual: list[object], tmp_path: Path) -> None:
    assert run(*usual, "--micro-batch-size", 1, "--nll-weight", 0) == 0
    one, other = weights(tmp_path / "run"), weights(sapo_run)
    assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in other)


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss", "orpo", "--optimizer", "adamw", "--schedule", "inverse_sqrt"],
        ["--loss", "ipo", "--schedule", "cosine", "--replay-capacity", "0"],
        ["--loss", "hinge", "--segment-length", "full", "--drop-identical"],
        ["--precision", "bf16", "--activation-checkpointing", "--save-dtype", "bf16"],
        ["--precision", "bf16", "--activation-checkpointing", "--compile"],
        ["--precision", "medium", "--ref-update", "policy", "--label-smoothing", "0.1"],
    ],
)
def test_every_switch_runs(flags: list[str], usual: list[object], tmp_path: Path) -> None:
    assert run(*usual, *flags, "--steps", 2) == 0
    torch.set_float32_matmul_precision("highest")
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert all(map(math.isfinite, losses))
    if "--precision" in flags:
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
        assert losses[1] != losses[0]
    dtype = torch.bfloat16 if "--save-dtype" in flags else torch.float32
    assert weights(tmp_path / "run")["model.norm.weight"].dtype == dtype


def test_a_reference_held_in_bf16_computes_as_one_that_is_rounded_in_use(start: Path) -> None:
    config = train.parse_args(["--data", "none", "--precision", "bf16"])
    ranks = train.Ranks()
    held, rounded = (ranks.build(start, config, role) for role in ("reference", "policy"))
    types = {p.dim(): p.dtype for p in held.parameters()}
    assert types == {1: torch.float32, 2: torch.bfloat16}
    pairs = [data.Pair([5, 6, 7], [8, 9, 10, 256], [8, 11, 12, 13, 256])]
    for a, b in zip(lm.pair_logprobs(held, pairs), lm.pair_logprobs(rounded, pairs), strict=True):
        assert torch.equal(a, b)


def test_an_ema_in_host_memory_changes_nothing_and_wants_one_process(
    usual: list[object], tmp_path: Path, sapo_run: Path,
    capsys: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert run(*usual, "--ema-offload") == 0
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert losses == [row["loss"] for row in metrics(sapo_run)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    capsys.readouterr()
    assert run(*usual, "--ema-offload", "--out", tmp_path / "other") == 2
    assert "--ema-offload is for one process" in error_line(capsys)


def test_an_ema_in_host_memory_is_averaged_where_the_policy_is_as_one_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each parameter goes there once and comes back once; only the last copy is waited for."""

    class There(torch.nn.Parameter):
        device = torch.device("cuda")

    copies = list[bool]()

    def send(x: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        assert device.type == "cuda" and non_blocking
        return x.clone()

    def copy(x: torch.Tensor, y: torch.Tensor, non_blocking: bool) -> None:
        copies.append(non_blocking)
        x.data = y

    here, beside, policy = (torch.nn.Linear(64, 50) for _ in range(3))
    beside.load_state_dict(here.state_dict())
    sapo.ema_update(beside, policy, 0.7)
    for name, value in [*policy.named_parameters()]:
        setattr(policy, name, There(value.data))
    monkeypatch.setattr(torch.Tensor, "to", send)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    sapo.ema_update(here, policy, 0.7)
    monkeypatch.undo()
    assert copies == [True, False]
    assert all(map(torch.equal, here.parameters(), beside.parameters()))


def test_an_ema_in_host_memory_is_pinned_and_goes_up_once_to_be_rounded_there(
    start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the meta device stands for the GPU."""
    config = train.parse_args(["--data", "none", "--precision", "bf16", "--ema-offload"])
    ranks, pinned = train.Ranks(), list[bool]()
    ranks.device = torch.device("meta")

    def empty_like(x: torch.Tensor, device: str = "", pin_memory: bool = False) -> torch.Tensor:
        pinned.append(pin_memory)
        return torch.empty(x.shape, device=device or x.device)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    ema = ranks.build(start, config, "ema")
    monkeypatch.undo()
    assert sum(pinned) == len([*ema.parameters()]) and ema.device.type == "cpu"
    assert all(map(torch.equal, ema.parameters(), Transformer.from_pretrained(start).parameters()))
    moves = set[Any]()

    class Moves(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), more: Any = None
        ) -> Any:
            if func is torch.ops.aten._to_copy.default:
                moves.add((args[0].device.type, (more or {})["dtype"]))
            return func(*args, **(more or {}))

    with Moves(), ranks.decoder(ema) as ready:
        assert {(p.device.type, p.dtype) for p in ready.parameters()} == {("meta", torch.bfloat16)}
    assert moves == {("cpu", torch.float32), ("meta", torch.bfloat16)}


def learner_of(start: Path, *flags: str) -> train.Learner:
    config = train.parse_args(["--data", "none", *flags])
    return train.Learner(config, start, data.load_tokenizer(start), train.Ranks())


PAIRS = [data.Pair([5, 6, n], [8, 9, 10, 256], [8, 11, 12, 13, 256]) for n in range(5)]


class Casts(TorchDispatchMode):
    """Counts the matrices that are rounded."""

    count = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        casts = func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype")
        self.count += casts is torch.bfloat16 and tuple(args[0].shape) in ((32, 32), (48, 32))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("more", [[], ["--activation-checkpointing"]])
def test_matrices_are_rounded_once_a_step_with_the_gradients_of_rounding_in_each_pass(
    more: list[str], start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The built-in model's embedding, also its head, stays in fp32: it is looked up and summed."""
    found = []
    for once in (True, False):
        if not once:
            monkeypatch.setattr(train, "passes", lambda *_: contextlib.nullcontext())
        learner = learner_of(start, "--precision", "bf16", "--micro-batch-size", "2", *more)
        names = [name for name, _ in learner.policy.named_parameters()]
        with Casts() as casts:
            table = learner.score(PAIRS, 0, learn=True)
        grads = {name: p.grad for name, p in learner.policy.named_parameters()}
        assert [*grads] == names and all(p.is_leaf for p in learner.policy.parameters())
        found.append((casts.count, table, grads))
    (few, table, grads), (many, again, others) = found
    layers = learner.policy.config.num_hidden_layers
    assert few == 6 * layers and many >= 3 * few  # of down_proj, 32 x 48, none is counted
    assert all(torch.equal(table[key], again[key]) for key in again)
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert all(torch.equal(grads[name], others[name]) for name in others)


def test_clocks_within_clocks(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, now = learner_of(start, "--method", "sft"), iter(range(20))  # a second a look
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(now)))
    learner.begin_step(0.1)  # 0
    with learner.clock("source"):  # 1 to 6
        for _ in range(2):  # 2 and 3, 4 and 5
            with learner.clock("generate"):
                pass
    row = learner.spent([data.Pair([1, 2], [3], [])])  # 7
    assert row["seconds/generate"] == 2 and row["seconds/source"] == 3
    assert row["tokens_per_second"] == 3 / 7


@pytest.mark.parametrize("method", ["sapo", "spin", "sgpo"])
def test_deterministic_runs_with_every_source_and_changes_nothing_on_a_cpu(
    method: str, usual: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    seen, real = list[bool](), torch.Tensor.backward

    def backward(loss: torch.Tensor) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        real(loss)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    flags = [*usual, "--method", method, "--steps", 2, "--micro-batch-size", 2]
    flags += ["--max-new-tokens", 8, "--max-length", 300] if method != "sapo" else []
    short = ["--improver-instruction", "{prompt} | {answer}", "--keep-cut", "--batch-size", 2]
    flags += short if method == "sgpo" else []
    assert run(*flags) == 0 and not any(seen) and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    seen.clear()
    assert run(*flags, "--deterministic", "--out", tmp_path / "again") == 0
    assert seen and all(seen) and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    same(tmp_path / "again", tmp_path / "run")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("cosine", [0.5, 1, 1, 0.8535534, 0.5, 0.1464466]),
        ("inverse_sqrt", [0.5, 1, 0.8164966, 0.7071068, 0.6324555, 0.5773503]),
    ],
)
def test_schedules_by_hand(schedule: Any, expected: list[float]) -> None:
    config = train.Config(schedule=schedule, warmup=2.0)
    assert [train.lr_at(config, t, 6, 3.0) / 3 for t in range(6)] == pytest.approx(expected)


def test_inverse_sqrt_without_a_warm_up_is_that_of_transformers() -> None:
    config = train.Config(schedule="inverse_sqrt", warmup=0.0)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3.0)
    theirs = transformers.get_inverse_sqrt_schedule(optimizer, num_warmup_steps=0)
    for t in range(51):
        assert train.lr_at(config, t, 200, 3.0) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert train.lr_at(config, 50, 200, 1.0) == pytest.approx(0.9975, abs=1e-5)


def parse(*flags: str) -> train.Config:
    return train.parse_args(["--data", "x", *flags])


def test_explicit_flags_win_over_the_recipe_and_the_recipe_over_defaults() -> None:
    config = parse("--recipe", "sapo-orpo-mistral-7b", "--lr", "1e-6")
    assert (config.loss, config.optimizer, config.lr) == ("orpo", "adamw", [1e-6])
    sft = parse("--recipe", "sapo-orpo-mistral-7b", "--method", "sft")
    assert (sft.loss, sft.optimizer) == (None, "adamw")
    assert parse("--recipe", "sapo-orpo-mistral-7b", "--method", "sapo").loss == "orpo"
    assert parse().lr == [5e-7]
    assert train.parse_args([]).recipe == "tasks"
    assert train.parse_args(["--epochs", "2"]).steps is None
    assert parse().max_prompt_length == 1792


PAPERS: dict[str, dict[str, Any]] = {  # PAPERS, "Settings [code]" and "Baselines"
    "sapo-llama3-8b": {
        "lr": [5e-7], "schedule": "linear", "warmup": 0.1, "optimizer": "rmsprop", "batch_size": 64,
        "epochs": 4, "max_length": 2048, "max_prompt_length": 1792, "precision": "bf16", "seed": 42,
        "beta": [0.1], "temperature": 0.7, "top_k": 50, "top_p": 0.95, "segment_length": "256",
        "ema_decay": 0.5, "replay_capacity": 16000, "ref_update": "ema", "ref_update_every": 108,
    },
    "sapo-orpo-mistral-7b": {
        "loss": "orpo", "lr": [5e-6], "schedule": "inverse_sqrt", "warmup": 100,
        "optimizer": "adamw", "orpo_lambda": 0.05,
    },
    "spin-mistral-7b": {
        "optimizer": "rmsprop", "batch_size": 64, "temperature": 1, "top_k": 0, "top_p": 1,
        "max_new_tokens": 256,  # what else it says: test_spin.py
    },
    "sft-llama3-8b": {
        "method": "sft", "epochs": 3, "batch_size": 128, "lr": [2e-5], "schedule": "cosine",
        "all_turns": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", train.RECIPES | PAPERS)
def test_every_recipe_could_start_and_holds_the_papers_values(name: str) -> None:
    config = parse("--recipe", name)
    assert vars(config).items() >= (train.RECIPES[name] | PAPERS.get(name, {})).items()


@pytest.mark.parametrize("base", ["tasks", "sapo-llama3-8b", "sapo-orpo-llama3-8b"])
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("on-policy", {"ema_decay": 0.0, "replay_capacity": 0}),
        ("no-ema", {"ema_decay": 0.0}),
        ("no-replay", {"replay_capacity": 0}),
        ("no-segment", {"segment_length": "full"}),
        ("fixed-reference", {"ref_update": "fixed"}),
        ("policy-reference", {"ref_update": "policy"}),
    ],
)
def test_an_ablation_changes_what_its_name_says_and_nothing_else(
    name: str, changed: dict[str, Any], base: str
) -> None:
    if f"{base}-{name}" not in train.RECIPES:  # ORPO has no reference, the tasks no segments
        assert ("orpo" in base and "ref_update" in changed) or (base, name) == (
            "tasks",
            "no-segment",
        )
        return
    one, other = (vars(parse("--recipe", recipe)) for recipe in (base, f"{base}-{name}"))
    assert changed == {k: other[k] for k in one if k != "recipe" and one[k] != other[k]}


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("spin", {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "rounds": 4}),
        ("sft", {"lr": [2e-5], "optimizer": "adamw", "schedule": "cosine", "epochs": 3.0}),
        ("orpo", {"lr": [5e-6], "optimizer": "adamw", "schedule": "inverse_sqrt"}),
        ("orpo", {"warmup": 100.0, "epochs": 3.0}),
        ("sapo", {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "lr": [5e-7]}),
        ("dpo", {"optimizer": "rmsprop", "schedule": "linear", "epochs": 4.0, "warmup": 0.1}),
    ],
)
def test_a_methods_own_defaults_can_be_changed(method: str, own: dict[str, Any]) -> None:
    assert vars(parse("--method", method)).items() >= own.items()
    assert parse("--method", method, "--top-k", "5", "--lr", "3e-4").lr == [3e-4]


@pytest.mark.parametrize(
    ("flags", "unread"),
    [
        ("--method dpo --segment-length 8 --beta 1", "segment-length"),
        ("--nll-weight 1 --loss orpo --length-normalize", "length-normalize nll-weight"),
        ("--label-smoothing 0.1 --loss ipo", "label-smoothing"),
        ("--method sft --beta 0.1 --batch-size 2", "beta"),
        ("--loss orpo --ref-update fixed --ref-update-every 3", "ref-update ref-update-every"),
        ("--method dpo --orpo-lambda 0.1", "orpo-lambda"),
        ("--adam-beta2 0.9", "adam-beta2"),
        ("--temperature 0 --top-k 5 --top-p 0.9", "top-k top-p"),
        ("--method spin --gate --rounds 2", "gate"),
        ("--method dpo --keep-identical --sft-first 2 --sft-lr 1e-4", "keep-identical"),
        ("--method sgpo --sft-first 2 --sft-lr 1e-4", "sft-first sft-lr"),
        ("--sft-lr 1e-4", "sft-lr"),
        ("--method dpo --all-turns --skip-bad-rows", "all-turns"),
        ("--method sgpo --all-turns --skip-bad-rows", ""),
        ("--method sgpo --optimizer adamw --adam-beta2 0.9 --trace-steps 3", "trace-steps"),
    ],
)
def test_a_flag_that_nothing_reads_is_warned_of_once(
    flags: str, unread: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse(*flags.split())
    shown = capsys.readouterr()
    assert shown.out == ""
    named = [f"warning: --{name} is not read by such a run" for name in unread.split()]
    assert sorted(shown.err.splitlines()) == named
    monkeypatch.setenv("RANK", "1")
    parse(*flags.split())
    assert capsys.readouterr().err == ""


def test_flags_about_rows_are_not_read_without_files(capsys: Any) -> None:
    train.parse_args(["--skip-bad-rows", "--all-turns"])
    assert capsys.readouterr().err.count("is not read by such a run") == 2


def test_a_runs_first_line_says_what_it_is(start: Path, usual: list[object], capsys: Any) -> None:
    assert run(*usual, "--method", "sft", "--steps", "2") == 0
    first = capsys.readouterr().out.splitlines()[0]
    expected = "method sft, loss nll, model {}, 24 rows, 2 steps, rate 0.001, adamw, fp32"
    assert first == expected.format(start)


def test_help_names_every_flag_and_recipe(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in shown for field in fields(train.Config))
    assert all(name in shown for name in train.RECIPES)


BAD_FLAGS = (
    """
--lr nan; --lr -1; --lr fast; --steps 0; --batch-size 0; --micro-batch-size -2; --beta 0; --beta inf
--ema-decay 1.5; --segment-length none; --segment-length 0; --top-p 0; --temperature -1; --seed -1
--max-length 1; --max-prompt-length 4; --max-length 16 --max-prompt-length 32: --max-prompt-length
--steps 3 --epochs 2: --epochs; --unknown 1; --stepz 1; --label-smoothing 0.7; --method magic
--loss magic; --method sft --loss dpo: --loss; --method orpo --loss dpo: --loss; --recipe magic
--sample-every 2 --replay-capacity 0
--replay-capacity 63: --replay-capacity 63 is below --batch-size 64; --trace x.st --resume
--chat-template magic; --chat-template llama3: llama3; --date yesterday; --date 2026-02-30
--data missing.jsonl: missing.jsonl; --eval-data missing.jsonl: missing.jsonl; --data
--model missing: missing; --out /proc/nowhere: /proc/nowhere; --out LONG: xxx; --model LONG: xxx
--beta 0.1 --loss orpo: --orpo-lambda; --beta 0.1 --method orpo: --orpo-lambda
--method spin --lr 1e-4 -1: --lr; --method spin --beta 0: --beta; --method spin --rounds 0: --rounds
--method spin --iterations 2: --iterations; --lr 1 1; --beta 1 1; --method dpo --lr 1 1: --lr
--method spin --rounds 2 --lr 1 1 1: --lr; --method sgpo --data ROWS --beta 1 1: --beta
""".strip()
    .replace("\n", "; ")
    .split("; ")
)  # after a colon what is named, if not the first flag


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_give_one_line_and_leave_nothing(
    case: str, usual: list[object], tmp_path: Path, capsys: Any
) -> None:
    flags, _, named = case.replace("LONG", "x" * 300).replace("ROWS", ROWS).partition(": ")
    room = [] if "--max-length" in flags else ["--max-length", 64]
    assert run(*usual[:6], *room, *flags.split()) == 2
    assert (named or flags.split()[0]) in error_line(capsys)
    assert not (tmp_path / "run").exists()


BAD_DATA: dict[str, bytes] = {  # more of them are in test_data.py
    "empty": b"",
    "not UTF-8": b'{"prompt": "\xff", "response": "x"}',
    "no response": b'{"prompt": "a"}',
    "all too long": json.dumps({"prompt": "x" * 60, "response": "b"}).encode(),
    "a good row, then a bad one": b'{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n',
}


@pytest.mark.parametrize("name", BAD_DATA)
@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_bad_data_gives_one_line_and_leaves_nothing(
    flag: str, name: str, usual: list[object], tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(BAD_DATA[name])
    assert run(*usual, flag, file) == 2
    assert "bad.jsonl" in (shown := error_line(capsys)) or name == "all too long", shown
    assert not (tmp_path / "run").exists()


def test_a_row_can_be_left_out_or_be_several(
    usual: list[object], tmp_path: Path, capsys: Any
) -> None:
    file, user = tmp_path / "some.jsonl", {"role": "user", "content": "sort ba"}
    good, tool = ({"role": role, "content": "b-a > ab"} for role in ("assistant", "tool"))
    rows = [[user, good, user, good], [user], [user, tool, good], [user, good | {"content": ""}]]
    file.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    flags = [*usual, "--data", file, "--eval-data", file, "--steps", 1]
    assert run(*flags) == 2
    shown = error_line(capsys)
    assert f"{file}:2: " in shown and shown.endswith("; --skip-bad-rows leaves such rows out\n")
    assert not (tmp_path / "run").exists()
    assert run(*flags, "--skip-bad-rows", "--all-turns") == 0
    shown = capsys.readouterr().out.splitlines()
    assert "2 rows, 1 steps" in shown[0]
    assert shown[1] == shown[3] == "2 rows"
    assert shown[2] == shown[4]
    assert shown[2].startswith(f"3 bad rows, the first: {file}:2: 'messages' should end with")
    asked = ["--method", "sgpo", "--skip-bad-rows", "--all-turns", "--out", tmp_path / "sgpo"]
    asked += [
        "--max-length",
        200,
        "--max-new-tokens",
        4,
        "--improver-instruction",
        "{prompt}{answer}",
    ]
    assert run(*flags, *asked) == 0  # a user's turn alone is a prompt
    assert "3 rows\n2 bad rows, the first: " in capsys.readouterr().out
    file.write_text(json.dumps({"messages": [user]}))
    assert run(*flags, "--out", tmp_path / "none", "--skip-bad-rows") == 2
    assert "no row is left: 0 prompts have " in error_line(capsys)


def test_a_good_row_beside_them_runs(usual: list[object], tmp_path: Path) -> None:
    file = tmp_path / "good.jsonl"
    file.write_text('{"prompt": "sort ba", "response": "b-a > ab"}\n')
    assert run(*usual, "--data", file, "--eval-data", file, "--steps", 1) == 0


def edit(folder: Path, name: str, **changes: Any) -> None:
    """Changes values in a JSON file; None takes one out."""
    values = json.loads((folder / name).read_text()) | changes
    left = {key: value for key, value in values.items() if value is not None}
    (folder / name).write_text(json.dumps(left))


def infect(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, folder / "model.safetensors")


def template(text: str | None) -> Callable[[Path], object]:
    return lambda folder: edit(folder, "tokenizer_config.json", chat_template=text)


SPOILT: dict[str, Callable[[Path], object]] = {  # more: test_model, test_data
    "no config": lambda f: (f / "config.json").unlink(),
    "family": lambda f: edit(f, "config.json", model_type="gpt2"),
    "vocabulary": lambda f: edit(f, "config.json", vocab_size=300),
    "huge": lambda f: edit(f, "config.json", hidden_size=2**20, num_attention_heads=2**10),
    "truncated": lambda f: shorten(f / "model.safetensors"),
    "not finite": infect,
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "no template": template(None),
    "template escapes": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template raises": template("{{ raise_exception('no') }}"),
    "template forgets": template("{% if add_generation_prompt %}>{% else %}<{% endif %}"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_bad_checkpoint_gives_one_line_and_leaves_nothing(
    name: str, start: Path, usual: list[object], tmp_path: Path, capsys: Any
) -> None:
    folder, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(start, folder)
    SPOILT[name](folder)
    assert run(*usual, "--model", folder) == 2
    shown = error_line(capsys)
    assert str(folder) in shown or "template" in name
    assert not (out / "metrics.jsonl").exists()
    assert name == "not finite" or not out.exists()


@pytest.mark.parametrize("method", ["sapo", "sgpo"])
def test_the_embedded_default_makes_start_control_result_and_table(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(train.START, "steps", 3)
    out, real = tmp_path / "run", data.task_examples
    monkeypatch.setattr(data, "task_examples", lambda split, n, *how: real(split, n // 8, *how))
    assert run("--out", out, "--method", method, "--steps", 2, "--batch-size", 4) == 0
    shown = capsys.readouterr().out
    for name in ("start", "sft control", method):
        assert any(line.startswith(name) and line.count("/") == 4 for line in shown.split("\n"))
        assert Transformer.from_pretrained(out / {method: "final"}.get(name, name.split()[-1]))
    assert metrics(out)[-1]["phase"] == method
    assert "eval/accuracy/unseen" in metrics(out)[-1]
    # the start is an ordinary checkpoint: --model takes it
    assert run("--model", out / "start", "--out", tmp_path / "b", "--steps", 1) == 0


def test_one_seed_gives_one_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train.START, "steps", 2)
    monkeypatch.setattr(sample, "task_accuracy", lambda *_: {"seen": 0.0, "unseen": 0.0})  # slow
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        flags = ("--method", "sft", "--out", tmp_path / name, "--steps", 1, "--batch-size", 2)
        assert run(*flags, "--seed", seed) == 0
    files = [(tmp_path / n / "start/model.safetensors").read_bytes() for n in "abc"]
    assert files[0] == files[1] != files[2]


def test_sampling_answers_a_prompt_and_each_time_alike(sapo_run: Path, capsys: Any) -> None:
    """Files of prompts: test_sample.py; their formats: test_data.py."""
    model = ["--model", str(sapo_run / "final"), "--max-new-tokens", "5"]
    for _ in range(2):
        assert sample.main([*model, "--prompt", "reverse abc"]) == 0
    shown = capsys.readouterr().out
    assert shown[: len(shown) // 2] * 2 == shown != ""


BAD_SAMPLING = (
    """
--model START -> --prompt; --model START --prompt a --prompts b -> --prompt; --prompt a -> --model
--model missing --prompt a -> missing; --model START --prompts missing.jsonl -> missing.jsonl
--model START --prompt a --top-p 2 -> --top-p; --model START --prompt a --out x -> --out
--model START --prompt a --max-new-tokens 0 -> --max-new-tokens; --model START --prompt= -> empty
--model START --prompts= -> data file; --model START --prompts ROWS --out /proc/x -> /proc
--model START --prompts ROWS --out /tmp -> folder
""".strip()
    .replace("\n", "; ")
    .split("; ")
)


@pytest.mark.parametrize("case", BAD_SAMPLING)
def test_bad_flags_of_sampling_give_one_line(case: str, start: Path, capsys: Any) -> None:
    flags, _, named = case.partition(" -> ")
    known = {"START": str(start), "ROWS": ROWS}
    assert sample.main([known.get(flag, flag) for flag in flags.split()]) == 2
    assert named in error_line(capsys)


def test_seeds_do_not_depend_on_the_process() -> None:
    assert hash_seed("a", 1) == 6222101017213550541


def test_sampling_that_fails_leaves_no_file(start: Path, tmp_path: Path) -> None:
    shutil.copytree(start, tmp_path / "model")
    shorten(tmp_path / "model" / "model.safetensors")
    flags = ["--model", str(tmp_path / "model"), "--prompts", ROWS]
    assert sample.main([*flags, "--out", str(tmp_path / "answers.jsonl")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
