"""SGPO with targets from a real OpenAI-compatible server, `transformers serve`, on this machine.

    python tests/bench/targets.py --data rows.jsonl --rows 24 --max-new-tokens 64

Starts the server with SmolLM2-135M-Instruct, which is no stronger than the model that it is to
teach: this measures the path, not the method. It writes 1,024 tokens at most, whatever the rows, so
that it may take longer than a client usually waits. Runs train.py against it, and again with the
gold responses as targets, and prints a table of what came of both.
"""

import argparse
import contextlib
import io
import json
import math
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import judge  # noqa: E402
from smollm2 import smollm2_folder  # noqa: E402

import train  # noqa: E402


@contextlib.contextmanager
def serving(folder: Path, log: Path) -> Iterator[str]:
    """The URL of a server that answers with the model in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["transformers", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        for _ in range(300):
            if server.poll() is not None:
                raise SystemExit(f"the server ended:\n{log.read_text()[-2000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def run(args: argparse.Namespace, folder: Path, rows: Path, out: Path, *more: str) -> list[str]:
    """Trains; the table's column."""
    flags = ["--method", "sgpo", "--model", str(folder), "--data", str(rows), "--out", str(out)]
    flags += ["--steps", str(args.steps), "--batch-size", "4", "--max-length", "1024"]
    flags += ["--max-new-tokens", str(args.max_new_tokens), "--improver-epochs", "1"]
    flags += ["--log-every", "1", "--seed", str(args.seed), *more]
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        if train.main(flags):
            raise SystemExit("train.py failed")
    lines = [json.loads(x) for x in (out / "improver_targets.jsonl").read_text().splitlines()]
    report = json.loads((out / "improver_filter.json").read_text())
    logged = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    told = next(row for row in logged if "improve/pairs" in row)
    gold = judge.judge(out)[0]
    rate = re.findall(r"targets \d+/\d+ ([\d.]+)/s", said.getvalue())
    words = [len(x["improved"].split()) for x in lines if x["improved"]]
    drafts = [len(x["response"].split()) for x in lines]
    return [
        rate[-1] if rate else "-",
        f"{sum(x['improved'] is None for x in lines)} of {len(lines)}",
        f"{sum(drafts) / len(drafts):.0f}",
        f"{sum(words) / max(1, len(words)):.0f}",
        f"{report['q1']:.2f} {report['median']:.2f} {report['q3']:.2f}",
        f"{report['dropped']} beyond {report['fence']:.2f}",
        f"{told['improve/pairs']:.0f} pairs, {100 * told['improve/identical']:.0f}% identical",
        f"{100 * gold.get('gold_better', math.nan):.0f}%",
        f"{gold.get('gold_gain', math.nan):+.3f}",
        f"{logged[-1]['rewards/margins']:+.4f}",
        f"{time.perf_counter() - began:.0f}",
    ]


def main() -> None:
    """Both runs, and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="rows of messages, as for train.py")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    folder, train.data.TargetServer.TIMEOUT = smollm2_folder(), 600.0
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.jsonl"
        lines = Path(args.data).read_text(encoding="utf-8").splitlines()[: args.rows]
        rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
        with serving(folder, Path(place) / "server.log") as url:
            asked = ("--target-source", url, "--target-model", str(folder))
            asked += ("--target-workers", "2")
            columns = [run(args, folder, rows, Path(place) / "server", *asked)]
        columns.append(run(args, folder, rows, Path(place) / "gold", "--target-source", "gold"))
    names = [
        "requests a second", "targets dropped", "words of an answer", "words of a target",
        "perplexity: Q1, median, Q3", "dropped by the fence", "phase 2",
        "gold likelier behind the improvement", "by (nats a token)", "last margin", "seconds",
    ]  # fmt: skip
    print(f"{'':38}{'transformers serve':>28}{'gold':>28}")
    for name, cells in zip(names, zip(*columns, strict=True), strict=True):
        print(f"{name:38}" + "".join(f"{cell:>28}" for cell in cells))


if __name__ == "__main__":
    main()
