"""A long run on a tiny model: does it keep its memory and its file handles?

    python tests/bench/soak.py            # 2,000 steps of SAPO, a few minutes
    python tests/bench/soak.py --method sgpo --rounds 40 --steps 50

Prints resident memory, open file handles and Python's live objects every tenth of the run. Flags
that it does not know go to train.py.
"""

import gc
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT))

import train  # noqa: E402


def status() -> tuple[float, int, int]:
    """Resident MiB, open handles, live objects."""
    gc.collect()
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1]) / 1024, len(os.listdir("/proc/self/fd")), len(gc.get_objects())


def main() -> None:
    """Runs train.py with a tap on its steps."""
    step = train.step

    def tapped(c: train.Config, learner: train.Learner, source: Any, t: int) -> Any:
        last = source.bounds[-1] - 1
        if t % max(1, (last + 1) // 10) == 0 or t == last:
            memory, handles, objects = status()
            told = f"{memory:8.1f} MiB {handles:4} handles {objects:8} objects"
            print(f"{c.method:4} step {t:6} {told}", flush=True)
        return step(c, learner, source, t)

    train.step = tapped
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model", str(GOLDEN / "start"), "--data", str(GOLDEN / "rows.jsonl")]
        flags += ["--out", f"{folder}/run", "--steps", "2000", "--batch-size", "4"]
        flags += ["--max-length", "64", "--segment-length", "6", "--replay-capacity", "64"]
        flags += ["--max-new-tokens", "16", "--log-every", "1000", "--save-every", "100"]
        flags += ["--keep", "2", "--improver-instruction", "{prompt} | {answer}"]
        raise SystemExit(train.main([*flags, *sys.argv[1:]]))


if __name__ == "__main__":
    main()
