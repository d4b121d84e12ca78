"""Runs that cannot be lost: killed, told to stop, out of disk, on other ranks; what they leave."""

import itertools
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import torch
import transformers
from helpers import GOLDEN, ROOT, alike, metrics, same, torchrun
from safetensors.torch import load_file

import train

COMMON = split("--steps 5 --batch-size 6 --max-length 64 --lr 2e-4 --log-every 1 --save-every 2")
COMMON += ["--model", str(GOLDEN / "start"), "--data", str(GOLDEN / "rows.jsonl")]
PLAIN = " --temperature 1 --top-k 0 --top-p 1"
METHODS = {
    "sapo": split("--segment-length 6 --replay-capacity 16 --ref-update-every 2" + PLAIN),
    "sapo-orpo": split("--method sapo --loss orpo --segment-length full --drop-identical"),
    "spin": split("--method spin --iterations 2 --max-new-tokens 16"),
    "sgpo": split("--method sgpo --max-new-tokens 16 --improver-epochs 0.5 --rounds 2" + PLAIN),
    "dpo": split("--method dpo --optimizer adamw --eval-every 2 --eval-data ROWS"),
    "orpo": split("--method orpo --schedule cosine"),
    "sft": split("--method sft"),
}
METHODS["sgpo"] += ["--improver-instruction", "{prompt} | {answer}"]
METHODS["dpo"][-1] = str(GOLDEN / "rows.jsonl")


def flags(name: str, out: Path, *more: object) -> list[str]:
    return [*COMMON, *METHODS[name], "--out", str(out), *map(str, more)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Uninterrupted runs, by method."""
    folder, done = tmp_path_factory.mktemp("whole"), set()

    def get(name: str) -> Path:
        if name not in done:
            assert train.main(flags(name, folder / name)) == 0
            done.add(name)
        return folder / name

    return get


def interrupted(at: int, how: Any) -> pytest.MonkeyPatch:
    """Has `how()` called in the at-th step of the process, whatever the phase."""
    patch, step, count = pytest.MonkeyPatch(), train.Trainer.step, itertools.count(1)

    def cut(self: Any, t: int) -> Any:
        if next(count) == at:
            how()
        return step(self, t)

    patch.setattr(train.Trainer, "step", cut)
    return patch


def leave() -> None:
    raise SystemExit


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resumes_to_the_bit_from_wherever_it_was_cut(
    name: str, whole: Any, tmp_path: Path
) -> None:
    """Each run is cut in its second, then in its third step, and so on until it is through."""
    out, resume, cuts = tmp_path / "run", [], 0
    while not (out / "final").exists():
        patch = interrupted(2 + cuts % 3, leave)
        try:
            assert train.main(flags(name, out, *resume)) == 0
        except SystemExit:
            cuts += 1
        finally:
            patch.undo()
        resume = ["--resume"]
        assert cuts < 20
    assert cuts >= 2
    same(out, whole(name))


@pytest.mark.parametrize(("name", "at"), [("sapo", 3), ("sgpo", 2), ("sgpo", 4)])
def test_sigterm_saves_first_and_the_resumed_run_is_the_same(
    name: str, at: int, whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    patch = interrupted(at, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main(flags(name, out, "--save-every", 0)) == 143
    patch.undo()
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{at}"]
    assert capsys.readouterr().err == f"stopped after step {at}; --resume goes on\n"
    assert train.main(flags(name, out, "--save-every", 0, "--resume")) == 0
    same(out, whole(name))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(
    whole: Any, tmp_path: Path
) -> None:
    """SIGKILL at moments that nobody chose."""
    out, environment = tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1"}
    kills, resume = 0, []
    while not (out / "final").exists():
        command = [sys.executable, str(ROOT / "train.py"), *flags("sapo", out, *resume)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        if kills < 4:
            seen = (out / "metrics.jsonl").stat().st_size if kills else 0
            while process.poll() is None:  # until something new is logged, and a moment longer
                file = out / "metrics.jsonl"
                if file.exists() and file.stat().st_size > seen:
                    break
                time.sleep(0.01)
            time.sleep(0.02 * kills)
            process.kill()
            kills += 1
        assert process.wait() in (0, -signal.SIGKILL)
        resume = ["--resume"]
    same(out, whole("sapo"))


@pytest.fixture
def little_disk() -> Iterator[Any]:
    """`little_disk(n)`: no file can grow beyond n bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["sapo", "sgpo"])
def test_a_full_disk_is_one_line_and_leaves_a_run_that_can_go_on(
    name: str, whole: Any, tmp_path: Path, little_disk: Any, capsys: Any
) -> None:
    out = tmp_path / "run"
    little_disk(200_000)  # of weights of 650,000
    assert train.main(flags(name, out)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert not list(out.glob("checkpoints/.*")) + list(out.glob("checkpoints/*"))
    little_disk(resource.RLIM_INFINITY)
    assert train.main(flags(name, out, "--resume")) == 0
    same(out, whole(name))


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(
    first: int, then: int, whole: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for world, more in ((first, []), (then, ["--resume"])):
        done = torchrun(world, flags("sapo", out, *more))
        assert done.returncode == 0, done.stderr[-3000:]
        if not more:  # as if it had been cut behind the second step
            shutil.rmtree(out / "final")
            shutil.rmtree(out / "checkpoints" / "step-4")
    alike(out, whole("sapo"))


def test_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train.main(flags("dpo", out, "--save-every", 1, "--keep", 2)) == 0
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-4", "step-5"]


@pytest.mark.parametrize("name", ["sapo", "spin", "sgpo"])
def test_a_checkpoint_is_safetensors_and_json_and_its_models_load_in_transformers(
    name: str, whole: Any
) -> None:
    for step in (whole(name) / "checkpoints").iterdir():
        files = {path.suffix for path in step.rglob("*") if path.is_file()}
        assert files == {".safetensors", ".json"}
        for config in step.glob("*/config.json"):
            assert transformers.AutoModelForCausalLM.from_pretrained(config.parent)


def test_nothing_is_pickled_whatever_lies_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("pickle")

    for module, name in (
        (pickle, "load"), (pickle, "loads"), (pickle, "dump"), (pickle, "dumps"),
        (pickle, "Unpickler"), (pickle, "Pickler"), (torch, "load"), (torch, "save"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, forbidden)
    model, out = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    for path in (GOLDEN / "start").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl"):
        (model / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert train.main(flags("sapo", out, "--model", model, "--steps", 4)) == 0
    for path in (out / "checkpoints" / "step-4", out):
        (path / "optimizer.pt").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    shutil.rmtree(out / "final")
    assert train.main(flags("sapo", out, "--model", model, "--steps", 4, "--resume")) == 0
    assert not list(tmp_path.rglob("pwned"))
    (model / "model.safetensors").unlink()  # and weights in a pickle alone are none
    assert train.main(flags("sapo", tmp_path / "other", "--model", model)) == 2


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "args.json", ".final"])
def test_a_symbolic_link_leads_no_write_outside(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, victim = tmp_path / "run", tmp_path / "victim"
    out.mkdir()
    victim.mkdir()
    (victim / "kept").write_text("mine")
    (out / name).symlink_to(victim / "kept" if "." in name[1:] else victim)
    assert train.main(flags("sapo", out, "--resume")) == 2
    assert "symbolic link" in capsys.readouterr().err
    assert [path.name for path in victim.iterdir()] == ["kept"]
    assert (victim / "kept").read_text() == "mine"


def test_a_loss_that_is_not_finite_is_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the third step is made infinite; the weights must not notice."""
    out, real = tmp_path / "run", train.Trainer.summary
    calls = itertools.count(1)

    def summary(self: Any, *args: Any) -> dict[str, float]:
        row = real(self, *args)
        return row | ({"loss": math.inf} if next(calls) == 3 else {})

    monkeypatch.setattr(train.Trainer, "summary", summary)
    assert train.main(flags("sft", out, "--save-every", 1)) == 0
    rows = metrics(out)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1]
    assert rows[2]["loss"] is None  # JSON has no infinity
    weights = [load_file(out / f"checkpoints/step-{i}/policy/model.safetensors") for i in (2, 3, 4)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[1][key], weights[2][key]) for key in weights[0])


def test_five_bad_steps_end_the_run_and_name_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, real = tmp_path / "run", train.Trainer.summary
    calls = itertools.count(1)

    def summary(self: Any, *args: Any) -> dict[str, float]:
        row = real(self, *args)
        return row | ({"loss": math.nan} if next(calls) > 2 else {})

    monkeypatch.setattr(train.Trainer, "summary", summary)
    assert train.main(flags("sft", out, "--steps", 9)) == 2
    assert str(out / "checkpoints" / "step-") in capsys.readouterr().err


def test_the_reference_sees_a_pair_once_until_it_changes(tmp_path: Path) -> None:
    """24 rows in batches of six: the fourth step has seen them all; in the sapo run the reference
    is another one at steps 1, 3 and 5, and until then drawn pairs may be known."""
    assert train.main(flags("dpo", tmp_path / "dpo", "--steps", 9)) == 0
    seen = [row["tokens/reference"] for row in metrics(tmp_path / "dpo")]
    assert min(seen[:4]) > 0
    assert max(seen[4:]) == 0
    assert train.main(flags("sapo", tmp_path / "sapo", "--replay-capacity", 6)) == 0
    rows = metrics(tmp_path / "sapo")
    assert all(row["tokens/reference"] <= row["tokens/policy"] for row in rows)
    assert all(rows[i]["tokens/reference"] > 0 for i in (0, 2, 4))


def test_what_is_kept_of_the_reference_equals_what_is_computed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train.main(flags("spin", tmp_path / "kept", "--steps", 9)) == 0
    real = train.Trainer.reference_logps
    forgetful = lambda self, pairs, keep: real(self, pairs, keep=False)  # noqa: E731
    monkeypatch.setattr(train.Trainer, "reference_logps", forgetful)
    assert train.main(flags("spin", tmp_path / "anew", "--steps", 9)) == 0
    for mine, theirs in zip(metrics(tmp_path / "kept"), metrics(tmp_path / "anew"), strict=True):
        for key in ("loss", "rewards/margins", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5)
