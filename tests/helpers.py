"""What several tests do with whole runs."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from sapo import Source

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
BENCH = ROOT / "tests" / "bench"


def script(name: str) -> Any:
    """A benchmark as a module of its own, which finds its neighbours as when it is the script."""
    if str(BENCH) not in sys.path:
        sys.path.append(str(BENCH))  # last, as their sapo.py is not the product's
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def metrics(
    out: Path, left_out: tuple[str, ...] = ("seconds", "tokens_per")
) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, without what begins with some prefixes."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in rows]


def weights(out: Path, name: str = "final") -> dict[str, torch.Tensor]:
    """The tensors of a model in a run's folder."""
    return load_file(out / name / "model.safetensors")


def same(one: Path, other: Path) -> None:
    """The same rows and the same weights, to the bit."""
    assert metrics(one) == metrics(other)
    a, b = weights(one), weights(other)
    assert all(torch.equal(a[key], b[key]) for key in b)


def alike(one: Path, other: Path, names: Sequence[str] = ("final",)) -> None:
    """Rows and weights of runs on different numbers of ranks, which agree within rounding."""
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine.pop("phase") == theirs.pop("phase")
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    for name in names:
        a, b = weights(one, name), weights(other, name)
        for key, value in b.items():
            exact = not value.is_floating_point()  # of tokens, places, counts
            assert torch.equal(a[key], value) if exact else torch.allclose(a[key], value, atol=2e-4)


def torchrun(
    world: int,
    flags: Sequence[object],
    program: Path = ROOT / "train.py",
    then: Callable[[int], object] = lambda pid: None,
) -> subprocess.CompletedProcess[str]:
    """A program on so many processes; `then` is called with torchrun's process id meanwhile."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--shutdown-timeout"]
    launch += ["60", f"--nproc_per_node={world}", str(program), *map(str, flags)]
    process = subprocess.Popen(
        launch,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    then(process.pid)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(launch, process.returncode, out, err)


def until(ready: Callable[..., bool], *about: Any) -> None:
    """Waits for what another process does."""
    for _ in range(6000):
        if ready(*about):
            return
        time.sleep(0.01)
    raise AssertionError("nothing came within a minute")


def cut(flags: Sequence[str], here: Callable[[Source, int], bool]) -> None:
    """Runs train.py until a step t of a source of which `here` is true, and kills it before it."""

    def killed(c: Any, learner: Any, source: Source, t: int, real: Any = train.step) -> Any:
        if here(source, t):
            raise SystemExit
        return real(c, learner, source, t)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "step", killed)
        with pytest.raises(SystemExit):
            train.main(flags)
