"""What the benchmarks share: shapes, alternated timing, the machine's own rates, memory, tables.

A measurement is a dict of calls by name, which `alternate` runs in turn, once each in every
repetition, forwards and then backwards, after a first round that is not timed. Ratios are taken
within a repetition, so that what else the machine does at the time falls on both sides.

The machine's rates come from the same rounds: a square matmul in each precision, and a copy, whose
bytes count twice, as read and as written. Kept apart from the product: nothing here is faster or
slower for a change of it.
"""

import argparse
import contextlib
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402

import data  # noqa: E402
import model as lm  # noqa: E402
import train  # noqa: E402
from data import Pair  # noqa: E402

PRECISIONS = ("fp32", "medium", "bf16")


@dataclass(frozen=True)
class Shape:
    """A Llama, and the lengths of its pairs in tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    pairs: int = 2
    prompt: int = 256
    response: int = 256
    shared: int = 128  # by the last pair; the first shares 0, those between lie between

    @property
    def body(self) -> int:
        """Weights of the blocks' matrices."""
        head_dim = self.hidden // self.heads
        attention = 2 * self.hidden * (self.hidden + self.kv_heads * head_dim)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head(self) -> int:
        """Weights of the head, which is not tied to the embedding."""
        return self.hidden * self.vocabulary

    @property
    def large(self) -> bool:
        """Whether two of these with their optimizers are too much for a device of 141 GB."""
        return self.body > 2e9

    def __str__(self) -> str:
        count = (self.body + 2 * self.head) / 1e6
        text = f"hidden {self.hidden}, {self.layers} layers, {self.heads}/{self.kv_heads} heads, "
        return text + f"vocabulary {self.vocabulary:,}, {count:,.0f} million weights"


SHAPES = {
    "tiny": Shape(32, 2, 4, 2, 64, 300, 2, 8, 8, 4),
    "small": Shape(384, 8, 6, 2, 1024, 32_000),
    "wide": Shape(256, 4, 4, 2, 688, 128_256),
    "llama1b": Shape(2048, 16, 32, 8, 8192, 128_256, 8),
    "llama3b": Shape(3072, 28, 24, 8, 8192, 128_256, 8),
    "llama8b": Shape(4096, 32, 32, 8, 14336, 128_256, 8),
}


def arguments(text: str, sizes: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags that all benchmarks have, and those meant for train.py."""
    cuda = torch.cuda.is_available()
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--reps", type=int, default=5, help="timed repetitions [5]")
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=list(sizes))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--no-memory", action="store_true", help="skip the runs for peak memory")
    parser.add_argument("--folder", help="where the random models are kept [a temporary one]")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # a row, to measure its peak memory
    args, rest = parser.parse_known_args()
    if args.quick:
        args.size = ["tiny"]
    if args.reps < 1:
        parser.error("--reps must be at least 1")
    return args, rest


@contextlib.contextmanager
def place(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of the random models."""
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(args.folder or scratch)


def write_model(shape: Shape, folder: Path, device: str) -> Path:
    """A model of random weights with the built-in tokenizer, in bf16 where it is large; once."""
    made = folder / f"{shape.hidden}-{shape.layers}-{shape.vocabulary}"
    if (made / "config.json").exists():
        return made
    raw = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "rms_norm_eps": 1e-5,
        "intermediate_size": shape.inner, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "max_position_embeddings": 8192,
        "eos_token_id": 256, "bos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    with torch.device("meta"):
        model = lm.Transformer(lm.Config.from_dict(raw))
    model = model.to(torch.bfloat16 if shape.large else torch.float32).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.fill_(1)
        else:
            std = 0.02 if "embed" in name else parameter.shape[1] ** -0.5
            parameter.data.normal_(0, std, generator=generator)
    model.save_pretrained(made)
    data.write_task_tokenizer(made)
    return made


def make_pairs(shape: Shape, seed: int) -> list[Pair]:
    """Random tokens, EOS never among them; the lengths are the same for every seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(260, shape.vocabulary, (count,), generator=generator).tolist()

    pairs = []
    for i in range(shape.pairs):
        alike = draw(shape.shared * i // max(1, shape.pairs - 1))
        sides = [alike + draw(shape.response - len(alike)) for _ in range(2)]
        pairs.append(Pair(draw(shape.prompt), *sides))
    return pairs


class Machine(train.Ranks):
    """The product's ranks on the device that was asked for.

    `one`: the reference is the policy itself, which is right as long as its log-probs are taken
    before the first update and kept: for models of which two do not fit.
    """

    def __init__(self, device: str, one: bool = False) -> None:
        super().__init__()
        self.device, self.one = torch.device(device), one

    def build(self, folder: Path, config: train.Config, learns: bool) -> lm.Transformer:
        """As the product does, but for `one`."""
        if learns or not self.one:
            self.last = super().build(folder, config, learns)
        return self.last


def trainer(folder: Path, rows: list[Pair], ranks: Machine, flags: Sequence[object]) -> Any:
    """A trainer of the product's, as train.py makes it, on rows of tokens."""
    argv = ["--model", folder, "--data", "none", "--schedule", "constant", "--warmup", 0, *flags]
    config = train.parse_args([*map(str, argv)])
    tokenizer = data.load_tokenizer(folder)
    job = train.Job(folder, rows, [], tokenizer, folder / "metrics.jsonl", folder / "final")
    return train.Trainer(config, job, ranks)


@contextlib.contextmanager
def matmuls(precision: str) -> Iterator[None]:
    """What train.py sets for a run with this --precision, for a while."""
    torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


# --------------------------------------------------------------------------------------- the clock


def seconds_of(call: Callable[[], Any], device: str) -> float:
    """One call's wall time; on CUDA until the device has done all of it."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


Times = dict[str, list[float]]


def alternate(calls: dict[str, Callable[[int], Any]], reps: int, device: str) -> Times:
    """Seconds of each call(repetition), repetitions from 1 on; call(0) goes before, untimed."""
    seconds: Times = {name: [] for name in calls}
    for rep in range(reps + 1):
        names = list(calls) if rep % 2 else list(reversed(calls))
        for name in names:
            gc.collect()
            value = seconds_of(lambda name=name: calls[name](rep), device)  # type: ignore[misc]
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


def report_peak(call: Callable[[], Any], device: str) -> None:
    """In a process of its own: prints what a call took at its highest above what was there."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        found = torch.cuda.max_memory_allocated() - before
    else:
        status = Path("/proc/self/status").read_text().splitlines()
        before = 1024 * int(next(x for x in status if "VmRSS" in x).split()[1])
        call()
        found = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"peak": found}))


def peak(name: str, folder: Path) -> str:
    """The peak memory of one row in GB: this script anew, with --only. glibc is told to give freed
    memory back at once, or it would keep what the models' loading needed."""
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
