"""What a rank holds, against the README's formula: `python tests/bench/memory.py`.

Runs three steps of SAPO on a model of 60 million random weights with 1, 2 and 4 processes (gloo),
and reads each process's peak of resident memory, less what it had when torch was imported. glibc is
told to give freed memory back at once (MALLOC_MMAP_THRESHOLD_); it keeps as much again otherwise.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

WIDTH, LAYERS = 768, 8


def peak(name: str) -> float:
    """Resident MiB of this process: VmRSS now, or VmHWM at its highest."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if name in x)
    return int(line.split()[1]) / 1024


def worker(folder: str, flags: list[str]) -> None:
    """One rank: trains, and leaves its figures."""
    import train

    before = peak("VmRSS")
    code = train.main(flags)
    result = {"before": before, "peak": peak("VmHWM")}
    Path(folder, f"rank-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(result))
    raise SystemExit(code)


def make_model(folder: Path) -> int:
    """A random model with the built-in tokenizer; its number of weights."""
    import data
    import train
    from model import Config, Transformer

    raw = train.START_MODEL | {
        "vocab_size": 260, "eos_token_id": 256, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
        "intermediate_size": 8 * WIDTH // 3, "num_attention_heads": 12, "num_key_value_heads": 12,
    }  # fmt: skip
    model = Transformer(Config.from_dict(raw))
    model.init_weights(0)
    model.save_pretrained(folder)
    data.write_task_tokenizer(folder)
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    """The table."""
    with tempfile.TemporaryDirectory() as place:
        count = make_model(Path(place) / "model")
        rows = ROOT / "tests" / "golden" / "rows.jsonl"
        print(
            f"{count / 1e6:.1f} million weights; MiB a rank: formula, measured peak (largest rank)"
        )
        for world in (1, 2, 4):
            out = Path(place) / f"out-{world}"
            flags = ["--model", f"{place}/model", "--data", str(rows), "--out", str(out)]
            flags += ["--steps", "3", "--batch-size", "4", "--micro-batch-size", "1"]
            flags += ["--segment-length", "6", "--max-length", "64"]
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command = [*launch, f"--nproc_per_node={world}", __file__, "worker", place, *flags]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
            subprocess.run(command, env=environment, check=True, capture_output=True)
            found = [json.loads(f.read_text()) for f in Path(place).glob("rank-*.json")]
            used = max(x["peak"] - x["before"] for x in found[:world])
            gathered, stepping = 4 * count * (world > 1), 4 * count / LAYERS / world
            formula = (20 * count / world + max(gathered, stepping)) / 2**20
            print(f"{world} ranks  {formula:7.0f}  {used:7.0f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3:])
    else:
        main()
