"""Runs that cannot be lost: killed, told to stop, out of disk, on other ranks; what they leave."""

import datetime
import itertools
import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import torch
import transformers
from helpers import GOLDEN, ROOT, alike, cut, metrics, same, torchrun, until, weights
from safetensors.torch import load_file, save_file

import data
import model as lm
import train

COMMON = split("--steps 5 --batch-size 6 --max-length 64 --lr 2e-4 --log-every 1 --save-every 2")
COMMON += ["--model", str(GOLDEN / "start"), "--data", str(GOLDEN / "rows.jsonl")]
PLAIN = " --temperature 1 --top-k 0 --top-p 1"
METHODS = {
    "sapo": split("--segment-length 6 --replay-capacity 16 --ref-update-every 2" + PLAIN),
    "sapo-orpo": split("--method sapo --loss orpo --segment-length full --drop-identical"),
    "spin": split("--method spin --rounds 2 --max-new-tokens 16"),
    "sgpo": split("--method sgpo --max-new-tokens 16 --improver-epochs 0.5 --rounds 2" + PLAIN),
    "dpo": split("--method dpo --optimizer adamw --eval-every 2 --eval-data ROWS"),
    "orpo": split("--method orpo --schedule cosine"),
    "sft": split("--method sft"),
}
METHODS["sgpo"] += ["--improver-instruction", "{prompt} | {answer}", "--generate-batch-size", "1"]
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


@contextmanager
def interrupted(at: int, *signals: int, where: Any = train, name: str = "step") -> Iterator[None]:
    """Sends signals, or ends all, before the at-th call of a function: the step, in any phase."""
    real, count = getattr(where, name), itertools.count(1)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(count) == at:
            for number in signals:
                signal.raise_signal(number)
            if not signals:
                raise SystemExit
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, wrapped)
        yield


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resumes_to_the_bit_from_wherever_it_was_cut(
    name: str, whole: Any, tmp_path: Path
) -> None:
    """Each run is cut in its second, then in its third step, and so on until it is through."""
    out, resume, cuts = tmp_path / "run", [], 0
    while not (out / "final").exists():
        try:
            with interrupted(2 + cuts % 3):
                assert train.main(flags(name, out, *resume)) == 0
        except SystemExit:
            cuts += 1
        resume = ["--resume"]
        assert cuts < 20
    assert cuts >= 2
    same(out, whole(name))


TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("name", "at", "number"),
    [("sapo", 3, TERM), ("sgpo", 2, TERM), ("sgpo", 4, INT), ("spin", 5, INT)],
)
def test_a_signal_saves_first_and_the_resumed_run_is_the_same(
    name: str, at: int, number: int, whole: Any, tmp_path: Path, capsys: Any
) -> None:
    out, before = tmp_path / "run", signal.getsignal(number)
    with interrupted(at, number):
        assert train.main(flags(name, out, "--save-every", 0)) == 143
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{at}"]
    assert capsys.readouterr().err == f"stopped after step {at}; --resume goes on\n"
    assert train.main(flags(name, out, "--save-every", 0, "--resume")) == 0
    same(out, whole(name))
    assert signal.getsignal(number) is before


def test_a_second_sigint_interrupts_but_not_where_torchrun_sends_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interrupted(2, INT, INT):
        with pytest.raises(KeyboardInterrupt):
            train.main(flags("sft", tmp_path / "one"))
        assert not (tmp_path / "one" / "checkpoints").exists()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with interrupted(2, INT, INT):
        assert train.main(flags("sft", tmp_path / "other")) == 143
    assert (tmp_path / "other" / "checkpoints" / "step-2").exists()


@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_signal_to_torchrun_leaves_a_checkpoint(send: Any, tmp_path: Path) -> None:
    """SIGTERM to torchrun alone, and SIGINT to all processes, as a terminal sends Ctrl-C."""
    out = tmp_path / "run"
    number = TERM if send is os.kill else INT

    def stop(pid: int) -> None:
        until((out / "metrics.jsonl").exists)
        send(pid, number)

    done = torchrun(2, flags("sapo", out, "--steps", 10_000, "--save-every", 0), then=stop)
    assert done.returncode != 0
    assert done.stderr.count("--resume goes on") == 1
    (step,) = (out / "checkpoints").iterdir()
    assert transformers.AutoModelForCausalLM.from_pretrained(step / "policy")


@pytest.mark.parametrize("at", [1, 4, 8, 11, 14])
def test_what_is_generated_before_a_signal_is_kept_and_nothing_is_written_twice(
    at: int, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """In the first eight of 24 drafts; of the answers and of the improvements of each round."""
    out, seeds, real = tmp_path / "run", list[int](), lm.generate

    def generate(*args: Any, seed: list[int], **how: Any) -> Any:
        seeds.extend(seed)
        return real(*args, seed=seed, **how)

    monkeypatch.setattr(lm, "generate", generate)
    with interrupted(at, TERM, where=lm, name="generate"):
        assert train.main(flags("sgpo", out, "--save-every", 0)) == 143
    assert capsys.readouterr().err == "stopped while answers were generated; --resume goes on\n"
    kept = (out / ".generated.jsonl").read_text().splitlines()
    assert len(kept) == len(seeds) < 24 * at
    steps = [path.name for path in out.glob("checkpoints/*")]
    assert steps == (["step-9"] if at > 9 else [])
    assert train.main(flags("sgpo", out, "--save-every", 0, "--resume")) == 0
    assert len(set(seeds)) == len(seeds)
    same(out, whole("sgpo"))
    assert not (out / ".generated.jsonl").exists()


def shorten(file: Path) -> None:
    """Takes the last line away."""
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def renew(folder: Path, add: str) -> None:
    """Changes a model's chat template."""
    file = folder / "tokenizer_config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"chat_template": add + raw["chat_template"]}))


def widen(file: Path) -> None:
    save_file({key: value.float() for key, value in load_file(file).items()}, file)


OTHERS: dict[str, tuple[str, str, Callable[[Path], object]]] = {  # method, name, change
    "nothing": ("sgpo", "", lambda f: None),
    "rows": ("sapo", "--data", lambda f: shorten(f / "data.jsonl")),
    "gold rows": ("sgpo", "--data", lambda f: shorten(f / "data.jsonl")),
    "held-out": ("sapo", "--eval-data", lambda f: shorten(f / "eval.jsonl")),
    "prompts": ("sgpo", "prompts", lambda f: shorten(f / "prompts.jsonl")),
    "targets": ("sgpo", "--target-source", lambda f: shorten(f / "targets.jsonl")),
    "template": ("sapo", "tokenizer or chat template", lambda f: renew(f / "model", "a")),
    "tokenizer": ("sapo", "tokenizer", lambda f: (f / "model/tokenizer.json").open("a").write(" ")),
    "weights": ("sapo", "weights", lambda f: widen(f / "model/model.safetensors")),
    "config": ("sapo", "weights", lambda f: (f / "model/config.json").open("a").write(" ")),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_run_goes_on_with_what_it_began_with_or_not_at_all(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, named, change = OTHERS[what]
    rows = [json.loads(line) for line in (GOLDEN / "rows.jsonl").read_text().splitlines()]
    for name in ("data", "eval", "prompts", "targets"):
        told = [row | {"response": row["rejected"], "improved": row["chosen"]} for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in (told if name == "targets" else rows))
        (tmp_path / f"{name}.jsonl").write_text(text)
    shutil.copytree(GOLDEN / "start", tmp_path / "model")
    more = ["--model", tmp_path / "model", "--data", tmp_path / "data.jsonl"]
    more += ["--eval-data", tmp_path / "eval.jsonl"]
    if method == "sgpo":
        more += ["--preference-data", tmp_path / "prompts.jsonl"]
        more += ["--target-source", tmp_path / "targets.jsonl"]
    run = flags(method, tmp_path / "run", *more)
    cut(run, lambda source, t: t == 1)
    change(tmp_path)
    capsys.readouterr()
    assert train.main([*run, "--resume"]) == (2 if named else 0)
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: --resume with another {named}" if named else "")
    assert shown.count("\n") == bool(named)


def test_a_run_that_goes_on_another_day_has_the_date_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime.datetime):
        day = 3

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2026, 1, cls.day)

    monkeypatch.setattr(datetime, "datetime", Clock)
    monkeypatch.setattr(data, "datetime", Clock)
    shutil.copytree(GOLDEN / "start", tmp_path / "model")
    renew(tmp_path / "model", "{{ strftime_now('%d') }}")

    def run(name: str, *more: object) -> list[str]:
        return flags("sapo", tmp_path / name, "--model", tmp_path / "model", *more)

    cut(run("cut"), lambda source, t: t == 3)
    Clock.day = 4
    assert train.main([*run("cut"), "--resume"]) == 0
    assert json.loads((tmp_path / "cut" / "args.json").read_text())["date"][:10] == "2026-01-03"
    assert train.main(run("dated", "--date", "2026-01-03")) == 0
    same(tmp_path / "cut", tmp_path / "dated")
    assert train.main(run("today")) == 0
    assert metrics(tmp_path / "today") != metrics(tmp_path / "dated")


@pytest.mark.parametrize(
    "row", [{"index": "0"}, {"index": True}, {"response": None}, {"improved": 3}, {"index": [1]}]
)
def test_a_malformed_row_among_the_targets_of_a_run_is_one_line(
    row: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    cut(flags("sgpo", out), lambda source, t: True)
    capsys.readouterr()
    with (out / "improver_targets.jsonl").open("a") as file:
        whole = {"index": 0, "prompt": "sort ba", "response": "a", "improved": "ab"}
        file.write(json.dumps(whole | row) + "\n")
    assert train.main(flags("sgpo", out, "--resume")) == 2
    told = f"error: {out}/improver_targets.jsonl: row 25 is no target of a run; remove it\n"
    assert capsys.readouterr().err == told


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(
    whole: Any, tmp_path: Path
) -> None:
    """SIGKILL at moments that nobody chose."""
    out, environment = tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1"}
    size = lambda: sum(file.stat().st_size for file in out.glob("metrics.jsonl"))  # noqa: E731
    kills, resume = 0, []
    while not (out / "final").exists():
        command = [sys.executable, str(ROOT / "train.py"), *flags("sapo", out, *resume)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        if kills < 4:
            until(lambda p, seen: p.poll() is not None or size() > seen, process, size())
            time.sleep(0.02 * kills)  # until something new is logged, and a moment longer
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
def test_a_checkpoint_is_a_model_and_a_state_of_tensors(name: str, whole: Any) -> None:
    for step in (whole(name) / "checkpoints").iterdir():
        files = {path.suffix for path in step.rglob("*") if path.is_file()}
        assert files == {".safetensors", ".json"}
        assert sorted(path.name for path in step.iterdir()) == ["policy", "state"]
        assert [path.name for path in (step / "state").iterdir()] == ["model.safetensors"]
        assert transformers.AutoModelForCausalLM.from_pretrained(step / "policy")


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
    for path in (out / "checkpoints/step-4", out / "checkpoints/step-4/state", out):
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
    (victim / "kept").write_text("{}")
    (out / name).symlink_to(victim / "kept" if "." in name[1:] else victim)
    assert train.main(flags("sapo", out, "--resume")) == 2
    assert "symbolic link" in capsys.readouterr().err
    assert [path.name for path in victim.iterdir()] == ["kept"]
    assert (victim / "kept").read_text() == "{}"


def losing(patch: pytest.MonkeyPatch, value: float, steps: Collection[int]) -> None:
    """Gives the run's n-th step a loss that is not finite."""
    real, calls = train.summary, itertools.count(1)

    def summary(*args: Any) -> dict[str, float]:
        return real(*args) | ({"loss": value} if next(calls) in steps else {})

    patch.setattr(train, "summary", summary)


def test_a_loss_that_is_not_finite_is_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the third step is made infinite; the weights must not notice."""
    out = tmp_path / "run"
    losing(monkeypatch, math.inf, [3])
    assert train.main(flags("sft", out, "--save-every", 1)) == 0
    rows = metrics(out)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1]
    assert rows[2]["loss"] is None  # JSON has no infinity
    policies = [weights(out, f"checkpoints/step-{i}/policy") for i in (2, 3, 4)]
    assert all(torch.equal(policies[0][key], policies[1][key]) for key in policies[0])
    assert not all(torch.equal(policies[1][key], policies[2][key]) for key in policies[0])


def test_five_bad_steps_end_the_run_and_name_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    losing(monkeypatch, math.nan, range(3, 99))
    assert train.main(flags("sft", out, "--steps", 9)) == 2
    told = f"5 steps in a row: try a lower --lr; the last checkpoint is {out}/checkpoints/step-"
    assert told in capsys.readouterr().err


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
    real = train.Learner.reference_logps
    forgetful = lambda *args, keep: real(*args, keep=False)  # noqa: E731
    monkeypatch.setattr(train.Learner, "reference_logps", forgetful)
    assert train.main(flags("spin", tmp_path / "anew", "--steps", 9)) == 0
    for mine, theirs in zip(metrics(tmp_path / "kept"), metrics(tmp_path / "anew"), strict=True):
        for key in ("loss", "rewards/margins", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "more", "most"),
    [
        ("sapo", "--replay-capacity 0", 0),
        ("sapo", "--replay-capacity 7 --ref-update fixed", 7),
        ("sapo-orpo", "--steps 3", 0),
        ("dpo", "", 24),
        ("sgpo", "--keep-cut", 24),
    ],
)
def test_reference_log_probs_of_pairs_that_cannot_come_again_are_not_kept(
    name: str, more: str, most: int, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert train.main(flags(name, out, "--save-every", 1, "--steps", 9, *split(more))) == 0
    kept = [
        len(load_file(step / "state/model.safetensors")["known.keys"])
        for step in (out / "checkpoints").iterdir()
    ]
    assert most / 2 <= max(kept) <= most


GRADIENTS = """
import sys, train
from pathlib import Path
from data import Pair
from safetensors.torch import save_file

c = train.parse_args("--data x --micro-batch-size 1 --activation-checkpointing --loss orpo".split())
ranks = train.Ranks()
learner = train.Learner(c, Path(sys.argv[1]), None, ranks)
held, shares = [], learner.shares

def watched(pairs):
    for share in shares(pairs):
        yield share  # resumed behind the micro-batch
        grads = [train.local(p.grad) for p in learner.policy.parameters()]
        for module in learner.policy.modules() if ranks.world > 1 else ():
            group = getattr(module, "_get_fsdp_state", lambda: None)()
            for param in group._fsdp_param_group.fsdp_params if group else ():
                grads += [param.unsharded_accumulated_grad, param._unsharded_param.grad]
        held.append(sum(grad.nbytes for grad in grads if grad is not None))

learner.shares = watched
pairs = [Pair([*range(9)], [*range(n, 40)], [*range(n, 60)]) for n in (10, 15, 20, 25, 30, 35)]
learner.score(pairs, 0, learn=True)
print("held", ranks.rank, max(held))
grads = {name: ranks.whole(p.grad) for name, p in learner.policy.named_parameters()}
if ranks.first:
    save_file(grads, sys.argv[2])
"""


def test_a_rank_holds_its_share_of_the_gradient_and_ranks_agree(tmp_path: Path) -> None:
    """After each micro-batch, not after the last alone: else a rank needs room for all of it."""
    (tmp_path / "grads.py").write_text(GRADIENTS)
    files = {world: tmp_path / f"{world}.safetensors" for world in (1, 2)}
    for world, file in files.items():
        done = torchrun(world, [GOLDEN / "start", file], tmp_path / "grads.py")
        assert done.returncode == 0, done.stderr[-3000:]
        held = [int(x.split()[2]) for x in done.stdout.splitlines() if x.startswith("held")]
        grads = load_file(file)
        assert len(held) == world
        assert sum(held) == sum(grad.nbytes for grad in grads.values())
    one = load_file(files[1])
    assert all(torch.allclose(grads[key], one[key], rtol=1e-4, atol=1e-6) for key in one)


def test_a_lost_rank_is_missed_in_half_an_hour_but_where_one_works_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: dict[str, Any] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *_, timeout=None, **__: waits.update({name: timeout})

    for name in ("init_process_group", "new_group", "init_device_mesh"):
        monkeypatch.setattr(train.dist, name, note(name))
    monkeypatch.setenv("WORLD_SIZE", "2")
    train.Ranks()
    assert waits["init_process_group"] == datetime.timedelta(minutes=30)
    assert waits["new_group"] == datetime.timedelta(days=7)
