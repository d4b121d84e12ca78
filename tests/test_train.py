"""train.py and sample.py: whole runs on a tiny random model, their files, and their equals."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import ROOT, alike, cut, metrics, torchrun
from safetensors.torch import load_file, save_file

import data
import model as lm
import sample
import train
from model import Transformer, hash_seed
from sapo import batch_indices


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


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file of 20 pairs with the built-in tasks' texts."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"prompt": e.messages[0]["content"], "chosen": e.response, "rejected": e.rejected}
        for e in data.task_examples("clean", 20, 7)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


SMALL = ["--steps", "6", "--batch-size", "5", "--max-length", "64", "--segment-length", "6"]
SMALL += ["--lr", "1e-3", "--log-every", "1", "--replay-capacity", "12", "--ref-update-every", "2"]
SMALL += ["--temperature", "1", "--top-k", "0", "--top-p", "1", "--segment-rule", "uniform"]


def run(*flags: object) -> int:
    return train.main([str(flag) for flag in flags])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What bad input printed on stderr: one line."""
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    return shown


@pytest.fixture(scope="module")
def sapo_run(start: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of six steps, with checkpoints after the third and the sixth."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    flags = ("--model", start, "--data", rows, "--out", out, "--save-every", 3)
    assert run(*flags, "--eval-data", rows, "--eval-every", 3, *SMALL) == 0
    return out


def test_a_run_leaves_the_files_of_the_contract(sapo_run: Path) -> None:
    table = metrics(sapo_run, timings=True)
    assert [row["step"] for row in table] == [1, 2, 3, 4, 5, 6]
    promised = (
        "loss rewards/chosen rewards/rejected rewards/margins logps/chosen logps/rejected lr "
    )
    promised += "grad_norm tokens_per_second seconds/generate seconds/reference seconds/policy "
    promised += "seconds/optimizer seconds/ema tokens/generate tokens/reference tokens/policy "
    promised += "replay/size replay/age replay/times_sampled segment/identical segment/logps "
    promised += "segment/new_logps segment/kl"
    assert all(set(promised.split()) <= row.keys() | {"seconds/ema"} for row in table)
    assert ["seconds/ema" in row for row in table] == [False, *[True] * 5]
    assert all("logps/chosen_drift" in row for row in table[4:])  # by then each row has been seen
    assert all("seam/new_logps" in row for row in table)
    assert table[0]["segment/kl"] == pytest.approx(0, abs=1e-5)  # the policy wrote them itself
    assert [row["replay/size"] for row in table] == [5, 10, 12, 12, 12, 12]
    assert ["eval/loss" in row for row in table] == [False, False, True, False, False, True]
    assert "eval/rewards/accuracies" in table[-1]
    args = json.loads((sapo_run / "args.json").read_text())
    assert args["beta"] == 0.1
    assert args["steps"] == 6
    assert sorted(p.name for p in (sapo_run / "checkpoints").iterdir()) == ["step-3", "step-6"]
    assert not [p for p in sapo_run.iterdir() if p.name.startswith(".")]


def test_the_first_loss_is_ln_2_and_later_ones_are_not(sapo_run: Path) -> None:
    losses = [row["loss"] for row in metrics(sapo_run)]
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
    saved = load_file(sapo_run / "final" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["policy", "ema", "reference"])
def test_a_checkpoint_holds_each_model_as_a_folder(sapo_run: Path, name: str) -> None:
    folder = sapo_run / "checkpoints" / "step-6" / name
    assert transformers.AutoModelForCausalLM.from_pretrained(folder)
    if name == "policy":
        final, last = (load_file(f / "model.safetensors") for f in (sapo_run / "final", folder))
        assert all(torch.equal(final[key], last[key]) for key in final)


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    sapo_run: Path, start: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    flags = ["--model", start, "--data", rows, "--out", out, "--save-every", 3]
    flags += ["--eval-data", rows, "--eval-every", 3, *SMALL]
    cut([str(flag) for flag in flags], lambda _, t: t == 4)
    assert len(metrics(out)) == 4
    assert run(*flags) == 2  # without --resume the folder is taken
    assert run(*flags, "--resume") == 0
    assert metrics(out) == metrics(sapo_run)
    one, other = (load_file(f / "final" / "model.safetensors") for f in (out, sapo_run))
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_resuming_a_finished_run_says_so(sapo_run: Path, start: Path, rows: Path, capsys) -> None:
    before = (sapo_run / "metrics.jsonl").read_bytes()
    assert run("--model", start, "--data", rows, "--out", sapo_run, "--resume", *SMALL) == 0
    assert "finished" in capsys.readouterr().out
    assert (sapo_run / "metrics.jsonl").read_bytes() == before


def test_resuming_without_a_checkpoint_starts_afresh(
    start: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    assert run("--model", start, "--data", rows, "--out", out, "--resume", *SMALL) == 0
    assert len(metrics(out)) == 6


def test_resuming_with_other_flags_is_an_error_that_lists_them(
    sapo_run: Path,
    start: Path,
    rows: Path,
    tmp_path: Path,
    capsys,
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "args.json").write_text((sapo_run / "args.json").read_text())
    flags = ("--model", start, "--data", rows, "--out", out, "--resume", *SMALL)
    assert run(*flags, "--beta", 0.2, "--save-every", 3) == 2
    assert "--beta" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["start", "control", "final", "metrics.jsonl", "checkpoints"])
def test_what_another_run_left_is_not_taken_for_ones_own(
    name: str, start: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    flags = ["--model", start, "--data", rows, "--out", tmp_path, *SMALL]
    for resume in ([], ["--resume"])[: 1 if name == "final" else 2]:
        assert run(*flags, *resume) == 2
        assert capsys.readouterr().err.startswith("error: --")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("harm", ["source", "optimizer", "policy", "trainer"])
def test_a_harmed_checkpoint_is_left_out_for_the_one_before_it(
    harm: str, sapo_run: Path, start: Path, rows: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "run"
    shutil.copytree(sapo_run, out)
    shutil.rmtree(out / "final")
    newest = out / "checkpoints" / "step-6"
    if harm == "source":
        (newest / "source.safetensors").write_bytes(b"\0" * 30)
    if harm == "optimizer":
        shutil.rmtree(newest / "optimizer")
    if harm == "policy":
        file = newest / "policy" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-7])
    if harm == "trainer":
        (newest / "trainer.json").write_text("{")
    flags = ["--model", start, "--data", rows, "--out", out, "--resume", "--save-every", 3]
    flags += ["--eval-data", rows, "--eval-every", 3, *SMALL]
    assert run(*flags) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith(f"warning: {newest} is not whole")
    assert "resuming after step 3" in shown.out
    assert metrics(out) == metrics(sapo_run)
    one, other = (load_file(f / "final" / "model.safetensors") for f in (out, sapo_run))
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_fewer_steps_than_are_done_is_an_error(
    sapo_run: Path, start: Path, rows: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "run"
    shutil.copytree(sapo_run, out)
    shutil.rmtree(out / "final")
    flags = ["--model", start, "--data", rows, "--out", out, "--resume", "--save-every", 3]
    assert run(*flags, "--eval-data", rows, "--eval-every", 3, *SMALL, "--steps", 4) == 2
    assert str(out / "checkpoints" / "step-6") in capsys.readouterr().err.split("error: ")[1]


@pytest.mark.parametrize("world", [2, 4])
def test_more_ranks_give_the_run_of_one(
    sapo_run: Path, start: Path, rows: Path, tmp_path: Path, world: int
) -> None:
    out = tmp_path / "run"
    flags = ["--model", start, "--data", rows, "--out", out, "--save-every", 3]
    flags += ["--eval-data", rows, "--eval-every", 3, "--micro-batch-size", 2, *SMALL]
    done = torchrun(world, flags)
    assert done.returncode == 0, done.stderr[:6000]
    alike(out, sapo_run, ("final", "checkpoints/step-6/ema", "checkpoints/step-6/reference"))
    drawn = [load_file(f / "checkpoints/step-6/source.safetensors") for f in (out, sapo_run)]
    for key, value in drawn[1].items():
        same = torch.allclose if value.is_floating_point() else torch.equal
        assert same(drawn[0][key], value), key


def test_micro_batches_do_not_change_the_gradient(
    sapo_run: Path, start: Path, rows: Path, tmp_path: Path
) -> None:
    flags = ("--model", start, "--data", rows, "--out", tmp_path / "run", "--micro-batch-size", 1)
    assert run(*flags, "--nll-weight", 0, *SMALL) == 0
    one, other = (load_file(f / "final/model.safetensors") for f in (tmp_path / "run", sapo_run))
    assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in other)


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_baselines_run_and_equal_a_plain_transformers_loop(
    method: str, start: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    flags = ["--method", method, "--model", start, "--data", rows, "--out", out]
    assert run(*flags, "--warmup", 0, "--schedule", "constant", *SMALL) == 0

    tokenizer = data.load_tokenizer(start)
    pairs, _ = data.encode_examples(data.load_examples(rows, True), tokenizer, 64, 56)
    policy, reference = (transformers.AutoModelForCausalLM.from_pretrained(start) for _ in range(2))

    def logps(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]

    optimizer = torch.optim.RMSprop(policy.parameters(), lr=1e-3)
    for t in range(6):
        batch = [pairs[i] for i in batch_indices(t, 5, len(pairs), 42)]
        tokens = sum(len(pair.chosen) for pair in batch)
        loss = torch.zeros(())
        for prompt, chosen, rejected in batch:
            good = logps(policy, prompt, chosen)
            if method in ("sft", "orpo"):
                loss = loss - good.sum() / tokens
            if method == "sft":
                continue
            bad = logps(policy, prompt, rejected)
            if method == "orpo":
                odds = [p.mean().exp() / (1 - p.mean().exp()) for p in (good, bad)]
                loss = loss - 0.05 * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1]))) / 5
            else:
                with torch.no_grad():
                    base = [logps(reference, prompt, side).sum() for side in (chosen, rejected)]
                gap = (good.sum() - base[0]) - (bad.sum() - base[1])
                loss = loss - torch.log(torch.sigmoid(0.1 * gap)) / 5
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        assert metrics(out)[t]["loss"] == pytest.approx(loss.item(), abs=2e-5)
    final = transformers.AutoModelForCausalLM.from_pretrained(out / "final").state_dict()
    assert all(torch.allclose(final[k], v, atol=2e-4) for k, v in policy.state_dict().items())


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss", "orpo", "--optimizer", "adamw", "--schedule", "inverse_sqrt"],
        ["--loss", "ipo", "--schedule", "cosine", "--replay-capacity", "0"],
        ["--loss", "hinge", "--segment-length", "full", "--drop-identical"],
        ["--precision", "bf16", "--activation-checkpointing", "--save-dtype", "bf16"],
        ["--precision", "medium", "--ref-update", "policy", "--label-smoothing", "0.1"],
    ],
)
def test_every_switch_runs(flags: list[str], start: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run("--model", start, "--data", rows, "--out", out, *SMALL, *flags, "--steps", 2) == 0
    assert all(math.isfinite(row["loss"]) for row in metrics(out))
    if "bf16" in flags:
        assert metrics(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert (
            load_file(out / "final/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
        )
    torch.set_float32_matmul_precision("highest")


def test_medium_states_its_error_and_its_speed_here(
    start: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--data", rows, "--out", tmp_path / "run", *SMALL, "--precision", "medium")
    assert run("--model", start, *flags, "--steps", 1) == 0
    torch.set_float32_matmul_precision("highest")
    said = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("precision medium"))
    found = re.fullmatch(r".*: error (\S+) of a matrix product, (\S+) times fp32's speed", said)
    assert found and 0 <= float(found[1]) < 0.01 and float(found[2]) > 0


def test_the_error_of_medium_is_a_share_of_the_products_norm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a stand-in that rounds to bf16: 8 bits, of which each product loses half of the last."""
    product = torch.Tensor.__matmul__

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if torch.get_float32_matmul_precision() == "medium":
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    error = float(train.medium_error(torch.device("cpu")).split()[3])
    torch.set_float32_matmul_precision("highest")
    assert 1e-3 < error < 4e-3


def test_a_reference_held_in_bf16_computes_as_one_that_is_rounded_in_use(start: Path) -> None:
    config = train.parse_args(["--data", "none", "--precision", "bf16"])
    ranks = train.Ranks()
    held, rounded = (ranks.build(start, config, role) for role in ("reference", "policy"))
    types = {p.dim(): p.dtype for p in held.parameters()}
    assert types == {1: torch.float32, 2: torch.bfloat16}
    pairs = [([5, 6, 7], [8, 9, 10, 256], [8, 11, 12, 13, 256])]
    for a, b in zip(lm.pair_logprobs(held, pairs), lm.pair_logprobs(rounded, pairs), strict=True):
        assert torch.equal(a, b)


def test_an_ema_in_host_memory_changes_nothing_and_wants_one_process(
    start: Path, rows: Path, tmp_path: Path, sapo_run: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    flags = ["--model", start, "--data", rows, *SMALL, "--ema-offload"]
    assert run(*flags, "--out", out) == 0
    assert [row["loss"] for row in metrics(out)] == [row["loss"] for row in metrics(sapo_run)]
    monkeypatch.setattr(train.Ranks, "__init__", lambda self: vars(self).update(world=2, rank=0))
    capsys.readouterr()
    assert run(*flags, "--out", tmp_path / "other") == 2
    assert "--ema-offload is for one process" in error_line(capsys)


def test_compiled_bf16_with_checkpointing_starts_with_ln_2_too(
    start: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    flags = ["--compile", "--precision", "bf16", "--activation-checkpointing", "--steps", 2]
    assert run("--model", start, "--data", rows, "--out", out, *SMALL, *flags) == 0
    losses = [row["loss"] for row in metrics(out)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert math.isfinite(losses[1])
    assert losses[1] != losses[0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("cosine", [0.5, 1, 1, 0.8535534, 0.5, 0.1464466]),
        ("inverse_sqrt", [0.5, 1, 0.8164966, 0.7071068, 0.6324555, 0.5773503]),
    ],
)
def test_schedules_by_hand(schedule: str, expected: list[float]) -> None:
    trainer = train.Trainer.__new__(train.Trainer)
    trainer.config = train.Config(schedule=schedule, warmup=2.0, lr=3.0)  # type: ignore[arg-type]
    trainer.steps, trainer.bounds = 6, [0, 6]
    assert [trainer.lr_at(t) / 3 for t in range(6)] == pytest.approx(expected)


def test_explicit_flags_win_over_the_recipe_and_the_recipe_over_defaults() -> None:
    config = train.parse_args(["--recipe", "sapo-orpo-mistral-7b", "--data", "x", "--lr", "1e-6"])
    assert (config.loss, config.optimizer, config.lr) == ("orpo", "adamw", 1e-6)
    sft = train.parse_args(["--recipe", "sapo-orpo-mistral-7b", "--data", "x", "--method", "sft"])
    assert (sft.loss, sft.optimizer) == (None, "adamw")
    same = train.parse_args(["--recipe", "sapo-orpo-mistral-7b", "--data", "x", "--method", "sapo"])
    assert same.loss == "orpo"
    assert train.parse_args(["--data", "x"]).lr == 5e-7
    assert train.parse_args([]).recipe == "tasks"
    assert train.parse_args(["--epochs", "2"]).steps is None
    assert train.parse_args(["--data", "x"]).max_prompt_length == 1792


@pytest.mark.parametrize("name", train.RECIPES)
def test_every_recipe_is_a_run_that_could_start(name: str) -> None:
    config = train.parse_args(["--recipe", name, "--data", "rows.jsonl"])
    assert vars(config).items() >= train.RECIPES[name].items()


def test_recipes_hold_the_papers_values() -> None:
    """PAPERS, "Settings [code]" and "Baselines"."""
    recipe = lambda name: train.parse_args(["--recipe", name, "--data", "x"])  # noqa: E731
    sapo = recipe("sapo-llama3-8b")
    values = (sapo.lr, sapo.schedule, sapo.warmup, sapo.optimizer, sapo.batch_size, sapo.epochs)
    assert values == (5e-7, "linear", 0.1, "rmsprop", 64, 4)
    values = (sapo.max_length, sapo.max_prompt_length, sapo.precision, sapo.seed, sapo.beta)
    assert values == (2048, 1792, "bf16", 42, 0.1)
    values = (sapo.temperature, sapo.top_k, sapo.top_p, sapo.segment_length, sapo.ema_decay)
    assert values == (0.7, 50, 0.95, "256", 0.5)
    assert (sapo.replay_capacity, sapo.ref_update, sapo.ref_update_every) == (16000, "ema", 108)
    orpo = recipe("sapo-orpo-mistral-7b")
    values = (orpo.loss, orpo.lr, orpo.schedule, orpo.warmup, orpo.optimizer, orpo.orpo_lambda)
    assert values == ("orpo", 5e-6, "inverse_sqrt", 100, "adamw", 0.05)
    spin = recipe("spin-mistral-7b")
    values = (spin.iterations, spin.lr, spin.beta, spin.optimizer, spin.batch_size)
    assert values == (4, 5e-7, 0.1, "rmsprop", 64)
    assert (spin.temperature, spin.top_k, spin.top_p, spin.max_new_tokens) == (1, 0, 1, 256)
    start = recipe("sft-llama3-8b")
    assert (start.method, start.epochs, start.lr, start.schedule) == ("sft", 3, 2e-5, "cosine")


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
    name: str, changed: dict[str, Any]
) -> None:
    for base in ("tasks", "sapo-llama3-8b", "sapo-orpo-llama3-8b"):
        if "ref_update" in changed and "orpo" in base:
            continue
        one, other = (
            vars(train.parse_args(["--recipe", recipe, "--data", "x"]))
            for recipe in (base, f"{base}-{name}")
        )
        differing = {k: other[k] for k in one if k != "recipe" and one[k] != other[k]}
        assert differing == changed


def test_spins_own_sampling_is_its_default_and_can_be_changed() -> None:
    parse = lambda *flags: train.parse_args(["--data", "x", *flags])  # noqa: E731
    assert (parse().temperature, parse().top_k, parse().top_p) == (0.7, 50, 0.95)
    spin = parse("--method", "spin", "--top-k", "5")
    assert (spin.temperature, spin.top_k, spin.top_p) == (1.0, 5, 1.0)


def test_a_flag_that_the_method_does_not_read_is_warned_of(capsys) -> None:
    train.parse_args(["--data", "x", "--method", "dpo", "--segment-length", "8", "--beta", "1"])
    assert capsys.readouterr().out == "warning: --segment-length is not read here\n"


def test_help_names_every_flag_and_recipe(capsys) -> None:
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert all(
        f"--{name.replace('_', '-')}" in shown for name, _, _ in sample.help_strings(train.Config)
    )
    assert all(name in shown for name in train.RECIPES)


def test_a_step_without_finite_gradients_is_skipped_and_five_end_the_run(
    start: Path,
    rows: Path,
    tmp_path: Path,
    capsys,
) -> None:
    flags = ["--model", start, "--data", rows, "--out", tmp_path / "run", *SMALL]
    assert run(*flags, "--lr", "1e3", "--schedule", "constant", "--steps", 40) == 2
    assert "not finite" in capsys.readouterr().err


BAD_FLAGS: list[tuple[list[str], str]] = [
    (["--lr", "nan"], "--lr"),
    (["--lr", "-1"], "--lr"),
    (["--lr", "fast"], "--lr"),
    (["--steps", "0"], "--steps"),
    (["--steps", "3", "--epochs", "2"], "--epochs"),
    (["--batch-size", "0"], "--batch-size"),
    (["--micro-batch-size", "-2"], "--micro-batch-size"),
    (["--beta", "0"], "--beta"),
    (["--beta", "inf"], "--beta"),
    (["--ema-decay", "1.5"], "--ema-decay"),
    (["--segment-length", "none"], "--segment-length"),
    (["--segment-length", "0"], "--segment-length"),
    (["--top-p", "0"], "--top-p"),
    (["--temperature", "-1"], "--temperature"),
    (["--max-length", "1"], "--max-length"),
    (["--max-length", "16", "--max-prompt-length", "32"], "--max-prompt-length"),
    (["--max-prompt-length", "4"], "--max-prompt-length"),
    (["--method", "magic"], "--method"),
    (["--loss", "magic"], "--loss"),
    (["--method", "sft", "--loss", "dpo"], "--loss"),
    (["--method", "orpo", "--loss", "dpo"], "--loss"),
    (["--recipe", "magic"], "--recipe"),
    (["--sample-every", "2", "--replay-capacity", "0"], "--sample-every"),
    (["--unknown", "1"], "--unknown"),
    (["--stepz", "1"], "--stepz"),
    (["--label-smoothing", "0.7"], "--label-smoothing"),
    (["--seed", "-1"], "--seed"),
    (["--chat-template", "magic"], "--chat-template"),
    (["--chat-template", "llama3"], "llama3"),  # its tokens are not in this vocabulary
    (["--data", "missing.jsonl"], "missing.jsonl"),
    (["--eval-data", "missing.jsonl"], "missing.jsonl"),
    (["--model", "missing"], "missing"),
    (["--out", "/proc/nowhere"], "--out"),
    (["--data"], "--data"),
    (["--nll-weight", "1", "--loss", "orpo"], "--nll-weight"),
    (["--nll-weight", "1", "--method", "sft"], "--nll-weight"),
    (["--label-smoothing", "0.1", "--loss", "ipo"], "--label-smoothing"),
    (["--length-normalize", "--loss", "orpo"], "--length-normalize"),
    (["--method", "spin", "--iteration-lr", "1e-4", "-1"], "--iteration-lr"),
    (["--method", "spin", "--iteration-beta", "0"], "--iteration-beta"),
    (["--method", "spin", "--iterations", "0"], "--iterations"),
    (["--responses-per-prompt", "2", "--replay-capacity", "0"], "--responses-per-prompt"),
    (["--out", "x" * 300], "x"),
    (["--model", "x" * 300], "x"),
]


@pytest.mark.parametrize(("flags", "named"), BAD_FLAGS, ids=lambda x: " ".join(x)[:40])
def test_bad_flags_give_one_line_and_leave_nothing(
    flags: list[str],
    named: str,
    start: Path,
    rows: Path,
    tmp_path: Path,
    capsys,
) -> None:
    out = tmp_path / "run"
    usual = {"--model": start, "--data": rows, "--out": out, "--max-length": 64}
    usual = {k: v for k, v in usual.items() if k not in flags}
    assert run(*(x for pair in usual.items() for x in pair), *flags) == 2
    shown = error_line(capsys)
    assert named in shown
    assert not out.exists()


ASKED = '{"role": "user", "content": "sort ba"}'
BAD_DATA: dict[str, bytes] = {
    "empty": b"",
    "white space": b" \n\n\t",
    "not UTF-8": b'{"prompt": "\xff", "response": "x"}',
    "UTF-16": '{"prompt": "a", "response": "b"}'.encode("utf-16"),
    "a number": b"3",
    "a string": b'"prompt"',
    "a list of numbers": b"[1, 2]",
    "a list in a list": b'[[{"prompt": "a", "response": "b"}]]',
    "an empty list": b"[]",
    "an open list": b'[{"prompt": "a", "response": "b"}',
    "cut off": b'{"prompt": "a", "respon',
    "two rows a line": b'{"prompt": "a", "response": "b"} {"prompt": "a", "response": "b"}',
    "no response": b'{"prompt": "a"}',
    "no prompt": b'{"response": "b"}',
    "response is null": b'{"prompt": "a", "response": null}',
    "response is a number": b'{"prompt": "a", "response": 3}',
    "response is empty": b'{"prompt": "a", "response": " "}',
    "prompt is an object": b'{"prompt": {}, "response": "b"}',
    "no turns": b'{"messages": []}',
    "a turn is text": b'{"messages": ["a", "b"]}',
    "no answer": f'{{"messages": [{ASKED}]}}'.encode(),
    "unknown role": f'{{"messages": [{ASKED}, {{"role": "tool", "content": "x"}}]}}'.encode(),
    "no content": f'{{"messages": [{ASKED}, {{"role": "assistant"}}]}}'.encode(),
    "deeply nested": b"[" * 100_000,
    "a huge number": b'{"prompt": "a", "response": ' + b"9" * 5000 + b"}",
    "all too long": json.dumps({"prompt": "x" * 60, "response": "b"}).encode(),
    "a good row, then a bad one": b'{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n',
}


@pytest.mark.parametrize("name", BAD_DATA)
@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_bad_data_gives_one_line_and_leaves_nothing(
    flag: str, name: str, start: Path, rows: Path, tmp_path: Path, capsys
) -> None:
    file, out = tmp_path / "bad.jsonl", tmp_path / "run"
    file.write_bytes(BAD_DATA[name])
    usual = {"--model": start, "--data": rows, "--out": out, "--max-length": 64} | {flag: file}
    assert run(*(x for pair in usual.items() for x in pair), "--steps", 1) == 2
    shown = error_line(capsys)
    assert "bad.jsonl" in shown or name == "all too long"
    assert not out.exists()


def test_a_good_row_beside_them_runs(start: Path, tmp_path: Path) -> None:
    file = tmp_path / "good.jsonl"
    file.write_text('{"prompt": "sort ba", "response": "b-a > ab"}\n')
    flags = ["--data", file, "--eval-data", file, "--out", tmp_path / "run", "--max-length", 64]
    assert run("--model", start, *flags, "--steps", 1) == 0


def spoil(name: str, folder: Path) -> None:
    """Makes a checkpoint folder wrong in one way."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    raw = json.loads(config.read_text())
    if name == "no config":
        config.unlink()
    if name == "config is no JSON":
        config.write_text("{")
    if name == "family":
        config.write_text(json.dumps(raw | {"model_type": "gpt2"}))
    if name == "vocabulary":
        config.write_text(json.dumps(raw | {"vocab_size": 300}))
    if name == "huge":
        config.write_text(json.dumps(raw | {"hidden_size": 2**20, "num_attention_heads": 2**10}))
    if name == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    if name == "garbage":
        weights.write_bytes(b"\xff" * 4000)
    if name == "not finite":
        tensors = load_file(weights)
        tensors["model.norm.weight"][3] = math.nan
        save_file(tensors, weights)
    if name == "no weights":
        weights.unlink()
    if name == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    template = {
        "template syntax": "{% for %}",
        "template escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "template loops": "{% for i in range(999999999) %}x{% endfor %}",
        "template raises": "{{ raise_exception('no') }}",
        "template forgets": "{% if add_generation_prompt %}>{% else %}<{% endif %}",
        "template is empty": "{{ '' }}",
    }.get(name)
    if template is not None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    if name == "long header":
        weights.write_bytes((2**40).to_bytes(8, "little") + weights.read_bytes()[8:])
    if name == "a link to nowhere":
        weights.unlink()
        weights.symlink_to(folder / "nowhere")
    if name == "index leads out":
        weights.rename(folder / "other.safetensors")
        index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if name == "no template":
        text = (folder / "tokenizer_config.json").read_text()
        kept = {k: v for k, v in json.loads(text).items() if k != "chat_template"}
        (folder / "tokenizer_config.json").write_text(json.dumps(kept))


KINDS = "no config,config is no JSON,family,vocabulary,huge,truncated,garbage,no weights,"
KINDS += "no tokenizer,no template,not finite,template syntax,template escapes,template loops,"
KINDS += "template raises,template forgets,template is empty,long header,a link to nowhere,"
KINDS += "index leads out"


@pytest.mark.parametrize("name", KINDS.split(","))
def test_a_bad_checkpoint_gives_one_line_and_leaves_nothing(
    name: str,
    start: Path,
    rows: Path,
    tmp_path: Path,
    capsys,
) -> None:
    folder, out = tmp_path / "model", tmp_path / "run"
    folder.mkdir()
    for path in start.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spoil(name, folder)
    assert run("--model", folder, "--data", rows, "--out", out, *SMALL) == 2
    shown = error_line(capsys)
    assert str(folder) in shown or "template" in name
    assert not (out / "metrics.jsonl").exists()
    assert name == "not finite" or not out.exists()


def test_the_embedded_default_makes_start_control_result_and_table(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    monkeypatch.setitem(train.START, "steps", 3)
    out = tmp_path / "run"
    assert run("--out", out, "--steps", 2, "--batch-size", 4) == 0
    shown = capsys.readouterr().out
    for name in ("start", "sft control", "sapo"):
        assert any(line.startswith(name) and line.count("/") == 4 for line in shown.split("\n"))
        assert Transformer.from_pretrained(out / {"sapo": "final"}.get(name, name.split()[-1]))
    assert [row["step"] for row in metrics(out)] == [2]
    assert "eval/accuracy/unseen" in metrics(out)[-1]
    # the start is an ordinary checkpoint: --model takes it
    assert (
        run("--model", out / "start", "--out", tmp_path / "b", "--steps", 1, "--batch-size", 2) == 0
    )


def test_one_seed_gives_one_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train.START, "steps", 2)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        flags = ("--method", "sft", "--out", tmp_path / name, "--steps", 1, "--batch-size", 2)
        assert run(*flags, "--seed", seed) == 0
    files = [(tmp_path / n / "start/model.safetensors").read_bytes() for n in "abc"]
    assert files[0] == files[1] != files[2]


def test_sampling_answers_a_prompt_and_a_file(sapo_run: Path, tmp_path: Path, capsys) -> None:
    model = ["--model", str(sapo_run / "final"), "--max-new-tokens", "5"]
    assert sample.main([*model, "--prompt", "reverse abc"]) == 0
    first = capsys.readouterr().out
    assert sample.main([*model, "--prompt", "reverse abc"]) == 0
    assert capsys.readouterr().out == first
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    turns = [{"role": "user", "content": "sort cab"}, {"role": "assistant", "content": "abc"}]
    rows = [{"prompt": "reverse abc"}, {"messages": turns}, {"prompt": turns[:1]}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sample.main([*model, "--prompts", str(questions), "--out", str(answers)]) == 0
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["prompt"] for row in written] == ["reverse abc", "sort cab", "sort cab"]
    assert all(isinstance(row["response"], str) for row in written)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "START"], "--prompt"),
        (["--model", "START", "--prompt", "a", "--prompts", "b"], "--prompt"),
        (["--model", "missing", "--prompt", "a"], "missing"),
        (["--prompt", "a"], "--model"),
        (["--model", "START", "--prompts", "missing.jsonl"], "missing.jsonl"),
        (["--model", "START", "--prompt", "a", "--top-p", "2"], "--top-p"),
        (["--model", "START", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--model", "START", "--prompt", "a", "--out", "x"], "--out"),
        (["--model", "START", "--prompt", ""], "empty"),
        (["--model", "START", "--prompts", ""], "data file"),
        (["--model", "START", "--prompts", "ROWS", "--out", "/proc/x"], "/proc"),
        (["--model", "START", "--prompts", "ROWS", "--out", "/tmp"], "folder"),
    ],
)
def test_bad_flags_of_sampling_give_one_line(
    flags: list[str], named: str, start: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"START": str(start), "ROWS": str(rows)}
    assert sample.main([known.get(flag, flag) for flag in flags]) == 2
    shown = error_line(capsys)
    assert named in shown


def test_seeds_do_not_depend_on_the_process() -> None:
    assert hash_seed(42, "segment", 3) == hash_seed(42, "segment", 3) < 2**63
    assert hash_seed(4, 2) != hash_seed(42)
    code = "from model import hash_seed; print(hash_seed('a', 1))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == hash_seed("a", 1)


def test_sampling_that_fails_leaves_no_file(start: Path, rows: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(start, broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    flags = ["--model", broken, "--prompts", rows, "--out", tmp_path / "answers.jsonl"]
    assert sample.main([str(flag) for flag in flags]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
