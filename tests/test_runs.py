"""Runs that cannot be lost: killed, told to stop, out of disk, on other ranks; what they leave."""

import datetime
import functools
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import torch
import transformers
from helpers import GOLDEN, ROOT, alike, cut, metrics, same, torchrun, until, weights
from safetensors.torch import load_file, save_file

import model as lm
import train

COMMON = split("--steps 5 --batch-size 6 --max-length 64 --lr 2e-4 --log-every 1 --save-every 2")
COMMON += ["--model", str(GOLDEN / "start"), "--data", str(GOLDEN / "rows.jsonl")]
PLAIN = " --temperature 1 --top-k 0 --top-p 1"
METHODS = {
    "sapo": split("--segment-length 6 --replay-capacity 16 --ref-update-every 2" + PLAIN),
    "sapo-orpo": split("--method sapo --loss orpo --segment-length full --drop-identical"),
    "sft-first": split("--sft-first 2 --sft-lr 1e-3 --segment-length 6 --replay-capacity 0"),
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
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def get(name: str) -> Path:
        assert train.main(flags(name, folder / name)) == 0
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


def test_sft_first_is_a_run_of_sft_and_then_one_from_what_it_left(
    whole: Any, tmp_path: Path
) -> None:
    first, then = tmp_path / "sft", tmp_path / "then"
    assert train.main([*flags("sft", first), "--steps", "2", "--lr", "1e-3"]) == 0
    more = ["--model", str(first / "final"), "--sft-first", "0"]
    assert train.main([*flags("sft-first", then), *more]) == 0
    rows, both = metrics(whole("sft-first")), metrics(first) + metrics(then)
    assert [row["phase"] for row in rows] == ["sft"] * 2 + ["sapo"] * 5
    assert [row["step"] for row in rows] == [*range(1, 8)]
    assert [row["loss"] for row in rows] == [row["loss"] for row in both]
    for name, other in (("sft", first), ("final", then)):
        expected = weights(other)
        found = weights(whole("sft-first"), name)
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", ["sapo", "sgpo", "sft-first"])
def test_a_finished_run_goes_on_with_more_steps_from_its_last_checkpoint(
    name: str, whole: Any, tmp_path: Path, capsys: Any
) -> None:
    out = shutil.copytree(whole(name), tmp_path / "run")
    before, more = metrics(out), flags(name, out, "--steps", 8, "--resume")
    steps = before[-1]["step"] + (6 if name == "sgpo" else 3)  # two rounds of eight
    assert train.main(more) == 0
    assert [row["step"] for row in metrics(out)] == [*range(1, steps + 1)]
    assert metrics(out)[:4] == before[:4]
    weighed = weights(out)
    assert train.main(more) == 0
    assert "finished" in capsys.readouterr().out.splitlines()[-1]
    shutil.rmtree(out / "checkpoints")
    assert train.main([*more, "--steps", "9"]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert all(torch.equal(value, weighed[key]) for key, value in weights(out).items())


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


@pytest.mark.parametrize(("send", "number"), [(os.kill, TERM), (os.killpg, INT)])
def test_a_signal_to_torchrun_leaves_a_checkpoint(send: Any, number: int, tmp_path: Path) -> None:
    """SIGTERM to torchrun alone, and SIGINT to all processes, as a terminal sends Ctrl-C."""
    out = tmp_path / "run"

    def stop(pid: int) -> None:
        until((out / "metrics.jsonl").exists)
        send(pid, number)

    done = torchrun(2, flags("sapo", out, "--steps", 10_000, "--save-every", 0), then=stop)
    assert done.returncode != 0
    assert done.stderr.count("--resume goes on") == 1
    (step,) = (out / "checkpoints").iterdir()
    assert transformers.AutoModelForCausalLM.from_pretrained(step / "policy")


@pytest.mark.parametrize("at", [1, 8, 11])
def test_what_is_generated_before_a_signal_is_kept_and_nothing_is_written_twice(
    at: int, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """In the first eight of 24 drafts, of a round's improvements, of the next round's answers."""
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


def test_a_fresh_run_takes_nothing_that_one_before_it_generated(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for how in ([], ["--temperature", 0]):
        with interrupted(1, TERM, where=lm, name="generate"):
            assert train.main(flags("sgpo", out, *how)) == 143
        rows = [json.loads(x) for x in (out / ".generated.jsonl").read_text().splitlines()]
        assert len(rows) == 8  # of 24, not the next eight


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
    "held-out": ("sapo", "--eval-data", lambda f: shorten(f / "eval-data.jsonl")),
    "prompts": ("sgpo", "prompts", lambda f: shorten(f / "preference-data.jsonl")),
    "targets": ("sgpo", "--target-source", lambda f: shorten(f / "target-source.jsonl")),
    "template": ("sapo", "tokenizer or chat template", lambda f: renew(f / "model", "a")),
    "tokenizer": ("sapo", "tokenizer", lambda f: (f / "model/tokenizer.json").open("a").write(" ")),
    "weights": ("sapo", "weights", lambda f: widen(f / "model/model.safetensors")),
    "config": ("sapo", "weights", lambda f: (f / "model/config.json").open("a").write(" ")),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_run_goes_on_with_what_it_began_with_or_not_at_all(
    what: str, tmp_path: Path, capsys: Any
) -> None:
    method, named, change = OTHERS[what]
    rows = [json.loads(line) for line in (GOLDEN / "rows.jsonl").read_text().splitlines()]
    rows = [row | {"response": row["rejected"], "improved": row["chosen"]} for row in rows]
    shutil.copytree(GOLDEN / "start", tmp_path / "model")
    more: list[Any] = ["--model", tmp_path / "model"]
    of_sgpo = ["--preference-data", "--target-source"] if method == "sgpo" else []
    for flag in ("--data", "--eval-data", *of_sgpo):
        more += [flag, tmp_path / f"{flag[2:]}.jsonl"]
        more[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = flags(method, tmp_path / "run", *more)
    cut(run, lambda source, t: t == 1)
    change(tmp_path)
    capsys.readouterr()
    assert train.main([*run, "--resume"]) == (2 if named else 0)
    told = f"error: --resume with another {named}.*\n" if named else ""
    assert re.fullmatch(told, capsys.readouterr().err)


def test_a_run_that_goes_on_another_day_has_the_date_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = [3]
    now = lambda: datetime.datetime(2026, 1, *day).timestamp()  # noqa: E731
    monkeypatch.setattr(train.time, "time", now)
    shutil.copytree(GOLDEN / "start", tmp_path / "model")
    renew(tmp_path / "model", "{{ strftime_now('%d') }}")
    out, more = tmp_path / "cut", ("--model", tmp_path / "model")
    cut(flags("sapo", out, *more), lambda source, t: t == 3)
    day[0] = 4
    assert train.main(flags("sapo", out, *more, "--resume")) == 0
    assert json.loads((out / "args.json").read_text())["date"][:10] == "2026-01-03"
    assert train.main(flags("sapo", tmp_path / "dated", *more, "--date", "2026-01-03")) == 0
    same(out, tmp_path / "dated")
    assert train.main(flags("sapo", tmp_path / "today", *more)) == 0
    assert metrics(tmp_path / "today") != metrics(out)


@pytest.mark.parametrize(
    "row", [{"index": "0"}, {"index": True}, {"response": None}, {"improved": 3}, {"index": [1]}]
)
def test_a_malformed_row_among_the_targets_of_a_run_is_one_line(
    row: dict[str, Any], tmp_path: Path, capsys: Any
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
        if kills < 3:
            until(lambda p, seen: p.poll() is not None or size() > seen, process, size())
            time.sleep(0.03 * kills)  # until something new is logged, and a moment longer
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
    assert re.fullmatch("error: .*\n", capsys.readouterr().err)
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
        if world == 1:
            assert train.main(flags("sapo", out, *more)) == 0
        else:
            done = torchrun(world, flags("sapo", out, *more))
            assert done.returncode == 0, done.stderr[-3000:]
        if not more:  # as if it had been cut behind the second step
            shutil.rmtree(out / "final")
            shutil.rmtree(out / "checkpoints" / "step-4")
    alike(out, whole("sapo"))


@pytest.mark.parametrize("name", ["sapo", "spin", "sgpo"])
def test_a_checkpoint_is_a_model_and_a_state_of_tensors(name: str, whole: Any) -> None:
    for step in (whole(name) / "checkpoints").iterdir():
        files = {path.suffix for path in step.rglob("*") if path.is_file()}
        assert files == {".safetensors", ".json"}
        found = {path.name for path in (*step.iterdir(), *(step / "state").iterdir())}
        assert found == {"policy", "state", "model.safetensors"}
        assert transformers.AutoModelForCausalLM.from_pretrained(step / "policy")


def test_nothing_is_pickled_whatever_lies_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("pickle")

    names = "load loads dump dumps Unpickler Pickler"
    for module, name in [(pickle, x) for x in names.split()] + [(torch, "load"), (torch, "save")]:
        monkeypatch.setattr(module, name, forbidden)
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(GOLDEN / "start", model)
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
def test_a_symbolic_link_leads_no_write_outside(name: str, tmp_path: Path, capsys: Any) -> None:
    out, victim = tmp_path / "run", tmp_path / "victim"
    out.mkdir()
    victim.mkdir()
    (victim / "kept").write_text("no JSON, and not read as such")
    (out / name).symlink_to(victim / "kept" if "." in name[1:] else victim)
    assert train.main(flags("sapo", out, "--resume")) == 2
    assert "symbolic link" in capsys.readouterr().err
    assert [path.name for path in victim.iterdir()] == ["kept"]
    assert (victim / "kept").read_text().startswith("no JSON")


def test_losses_that_are_not_finite_are_skipped_and_five_in_a_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The third step's, which the weights must not notice, then those from the fifth on."""
    out, real, calls = tmp_path / "run", train.summary, itertools.count(1)
    bad = {3: math.inf, **dict.fromkeys(range(5, 99), math.nan)}

    def summary(*args: Any) -> dict[str, float]:
        row, n = real(*args), next(calls)
        return row | {"loss": bad.get(n, row["loss"])}

    monkeypatch.setattr(train, "summary", summary)
    assert train.main(flags("sft", out, "--steps", 12, "--save-every", 1, "--keep", 7)) == 2
    steps = {f"step-{i}": out / "checkpoints" / f"step-{i}" for i in range(2, 9)}
    told = f"5 steps in a row: try a lower --lr; the last checkpoint is {steps['step-8']}\n"
    assert capsys.readouterr().err.endswith(told)
    assert {path.name for path in (out / "checkpoints").iterdir()} == steps.keys()  # the newest
    rows = metrics(out)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 2, 3, 4, 5, 6]
    assert rows[2]["loss"] is None  # JSON has no infinity
    policies = [weights(steps[f"step-{i}"], "policy") for i in (2, 3, 4)]
    assert all(torch.equal(policies[0][key], policies[1][key]) for key in policies[0])
    assert not all(torch.equal(policies[1][key], policies[2][key]) for key in policies[0])


MOST = {"sapo --replay-capacity 0": 0, "sapo --replay-capacity 7 --ref-update fixed": 7}
MOST |= {"sapo-orpo": 0, "dpo": 24, "sgpo --keep-cut": 24}


@pytest.mark.parametrize("case", MOST)
def test_log_probs_are_kept_of_pairs_that_can_come_again(case: str, tmp_path: Path) -> None:
    """The reference's, in checkpoints too."""
    (name, *more), out = case.split(), tmp_path / "run"
    assert train.main(flags(name, out, "--save-every", 1, "--steps", 9, *more)) == 0
    states = [load_file(file) for file in out.glob("checkpoints/*/state/model.safetensors")]
    assert MOST[case] / 2 <= max(len(state["known.keys"]) for state in states) <= MOST[case]
    seen = [row.get("tokens/reference", 0) for row in metrics(out)]
    assert all(seen[i] <= row.get("tokens/policy", 0) for i, row in enumerate(metrics(out)))
    if name == "dpo":  # 24 rows in batches of six: the fourth step has seen them all
        assert min(seen[:4]) > 0 == max(seen[4:])


GRADIENTS = """
import sys, train
from pathlib import Path
from data import Pair

c = train.parse_args("--data x --micro-batch-size 1 --activation-checkpointing --loss orpo".split())
ranks = train.Ranks()
learner = train.Learner(c, Path(sys.argv[1]), None, ranks)
held, shares = [], learner.shares

def watched(pairs):
    for share in shares(pairs):
        yield share  # resumed behind the micro-batch
        grads = [p.grad.to_local() for p in learner.policy.parameters()]
        for module in learner.policy.modules():
            group = getattr(module, "_get_fsdp_state", lambda: None)()
            for param in group._fsdp_param_group.fsdp_params if group else ():
                grads += [param.unsharded_accumulated_grad, param._unsharded_param.grad]
        held.append(sum(grad.nbytes for grad in grads if grad is not None))

learner.shares = watched
pairs = [Pair([*range(9)], [*range(n, 40)], [*range(n, 60)]) for n in (10, 15, 20, 25, 30, 35)]
learner.score(pairs, 0, learn=True)
sys.stdout.write(f"held {max(held)}\\n")  # in one piece: ranks share the pipe, unbuffered
"""


def test_a_rank_holds_its_share_of_the_gradient(tmp_path: Path) -> None:
    """After each micro-batch, not after the last alone: else a rank needs room for all of it."""
    (tmp_path / "grads.py").write_text(GRADIENTS)
    done = torchrun(2, [GOLDEN / "start"], tmp_path / "grads.py")
    assert done.returncode == 0, done.stderr[-3000:]
    held = [int(x) for x in re.findall(r"held (\d+)", done.stdout)]
    whole = sum(4 * x.numel() for x in load_file(GOLDEN / "start/model.safetensors").values())
    assert (len(held), sum(held)) == (2, whole)


def test_a_lost_rank_is_missed_in_half_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """But where one works alone, in a week."""
    waits = dict[str, Any]()
    for name in ("init_process_group", "new_group", "init_device_mesh"):
        note = functools.partial(lambda n, *_, timeout=None, **__: waits.update({n: timeout}), name)
        monkeypatch.setattr(train.dist, name, note)
    monkeypatch.setenv("WORLD_SIZE", "2")
    train.Ranks()
    assert waits["init_process_group"] == datetime.timedelta(minutes=30)
    assert waits["new_group"] == datetime.timedelta(days=7)
