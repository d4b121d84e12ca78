"""What the benchmarks share: flags, alternated timing, the machine's own rates, memory, tables.

A measurement is a dict of calls by name, which `alternate` runs in turn, once each in every
repetition, in one order and then in the other. Ratios are taken within a repetition, so that what
else the machine does at the time falls on both sides.

The machine's rates come from the same rounds: a square matmul in each precision, and a copy, whose
bytes count twice, as read and as written. Kept apart from the product: nothing here is faster or
slower for a change of it.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import shapes
import torch
import transformers

PRECISIONS = ("fp32", "medium", "bf16")
Flags = dict[str, dict[str, Any]]  # a flag and how argparse is told of it


def arguments(
    argv: Sequence[str], text: str, sizes: Sequence[str], more: Flags | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """The flags that all benchmarks have, with `more` of this one; and those meant for train.py."""
    cuda = torch.cuda.is_available()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--reps", type=int, default=5, help="timed repetitions [5]")
    parser.add_argument("--size", nargs="+", choices=shapes.SHAPES, default=list(sizes))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--quick", action="store_true", help="a tiny model, no memory")
    parser.add_argument("--no-memory", action="store_true", help="skip the runs for peak memory")
    parser.add_argument("--folder", help="where the random models are kept [a temporary one]")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # a row, to measure its peak memory
    for flag, how in (more or {}).items():
        parser.add_argument(flag, **how)
    args, rest = parser.parse_known_args(argv)
    if args.quick:
        args.size, args.no_memory = ["tiny"], True
    if args.reps < 1:
        parser.error("--reps must be at least 1")
    return args, rest


@contextlib.contextmanager
def place(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of the random models."""
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(args.folder or scratch)


@contextlib.contextmanager
def matmuls(precision: str) -> Iterator[None]:
    """What train.py sets for a run with this --precision, for a while."""
    torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


# --------------------------------------------------------------------------------------- the clock


def seconds_of(call: Callable[[int], Any], rep: int, device: str) -> float:
    """The wall time of call(rep); on CUDA until the device has done all of it."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call(rep)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


Times = dict[str, list[float]]


def alternate(
    calls: dict[str, Callable[[int], Any]], reps: int, device: str, warm: bool = False
) -> Times:
    """Seconds of each call(repetition), repetitions from 1 on. Unless the calls are warm already,
    call(0) goes before, untimed."""
    seconds: Times = {name: [] for name in calls}
    for rep in range(int(warm), reps + 1):
        names = list(calls) if rep % 2 else list(reversed(calls))
        gc.collect()
        for name in names:
            value = seconds_of(calls[name], rep, device)
            if rep:
                seconds[name].append(value)
    return seconds


def matmul_calls(device: str, quick: bool) -> tuple[dict[str, Callable[[int], Any]], float]:
    """The machine's matmul in each precision, as calls for `alternate`; the FLOPs of one call."""
    size = 256 if quick else 2048 if device == "cpu" else 8192
    times = 1 if device == "cpu" else 10

    def call(precision: str) -> Callable[[int], Any]:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

        def run(_: int) -> None:
            with matmuls(precision):
                for _ in range(times):
                    a @ b

        return run

    return {f"matmul {p}": call(p) for p in PRECISIONS}, 2.0 * size**3 * times


def copy_call(device: str, quick: bool) -> tuple[Callable[[int], Any], float]:
    """A copy within the machine's memory, as a call for `alternate`; the bytes that it moves."""
    size = 2**20 if quick else 2**27 if device == "cpu" else 2**30
    a, b = (torch.ones(size, device=device) for _ in range(2))
    return lambda _: b.copy_(a), 8.0 * size


# --------------------------------------------------------------------------------------- memory


def resident(key: str) -> int:
    """Bytes of memory that this process has (VmRSS) or had at most (VmHWM), as Linux tells."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith(key)).split()[1])


def report_peak(call: Callable[[], Any], device: str) -> None:
    """In a process of its own: prints what a call took at its highest above what was there."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        found = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, begins anew
        before = resident("VmRSS")
        call()
        found = resident("VmHWM") - before
    print(json.dumps({"peak": found}))


def peak(name: str, folder: Path, args: argparse.Namespace) -> str:
    """The peak memory of one row in GB: this script anew, with --only. glibc is told to give freed
    memory back at once, or it would keep what the models' loading needed."""
    if args.no_memory:
        return "-"
    command = [sys.executable, *sys.argv, "--folder", str(folder), "--only", name]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return "out of memory" if "out of memory" in done.stderr else "failed"
    return f"{json.loads(done.stdout.splitlines()[-1])['peak'] / 1e9:.2f}"


# --------------------------------------------------------------------------------------- tables


def spread(values: Sequence[float], digits: int = 2) -> str:
    """median (minimum to maximum)."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def speed(seconds: Times, name: str, base: str | None) -> str:
    """How many times as fast as another row, within each repetition."""
    if base is None or base not in seconds:
        return "-"
    pairs = zip(seconds[base], seconds[name], strict=True)
    return spread([theirs / ours for theirs, ours in pairs])


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    print(f"\n{title}\n")
    for row in (head, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)) + " |")
    sys.stdout.flush()
