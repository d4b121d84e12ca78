"""Makes the golden traces anew: `python tests/golden/make.py [OUT/start]`.

The runs start from `start/`, the embedded default's start (seed 42) in bf16; OUT/start, where
given, takes its place. They train on `rows.jsonl`, 24 rows of the built-in tasks, for six steps.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import data  # noqa: E402
import train  # noqa: E402
from model import Transformer  # noqa: E402

COMMON = "--model start --data rows.jsonl --steps 6 --trace-steps 6 --batch-size 6 --max-length 64 "
COMMON += "--lr 2e-4 --warmup 2"
SAPO = "--method sapo --segment-length 6 --replay-capacity 16 --ref-update-every 3 --ema-decay 0.5 "
SAPO += "--temperature 1.5 --top-k 0 --top-p 1"
RUNS = {
    "sapo-dpo": f"{SAPO} --loss dpo --beta 0.1",
    "sapo-orpo": f"{SAPO} --loss orpo --orpo-lambda 0.05 --optimizer adamw",
    "spin": "--method spin --loss dpo --beta 0.1 --rounds 2 --max-new-tokens 24",
    "sgpo": "--method sgpo --loss dpo --beta 0.1 --target-source gold --improver-epochs 0.5 "
    "--improver-lr 1e-4 --steps 2 --rounds 2 --trace-steps 99 --temperature 1 --top-k 0 --top-p 1 "
    "--max-new-tokens 24 --fence-k 1.5 --improver-instruction {prompt}_|_{answer}",
    "dpo": "--method dpo --loss dpo --beta 0.1 --nll-weight 0.2 --schedule cosine",
}


def record(name: str, trace: Path) -> None:
    """Runs one of RUNS, with its trace in a file."""
    here = {"start": str(HERE / "start"), "rows.jsonl": str(HERE / "rows.jsonl")}
    flags = [here.get(word, word) for word in f"{COMMON} {RUNS[name]}".split()]
    flags = [flag.replace("_|_", " | ") for flag in flags]
    with tempfile.TemporaryDirectory() as folder:
        if train.main([*flags, "--out", folder, "--trace", str(trace)]):
            raise SystemExit(2)


def main() -> None:
    """The start and the rows where a start is given, then all traces."""
    for folder in sys.argv[1:2]:
        Transformer.from_pretrained(folder, torch.bfloat16).save_pretrained(HERE / "start")
        data.load_tokenizer(folder).save(HERE / "start")
        examples = data.task_examples("clean", 24, 7)
        lines = [
            {"prompt": e.messages[0]["content"], "chosen": e.response, "rejected": e.rejected}
            for e in examples
        ]
        (HERE / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in RUNS:
        file = HERE / f"{name}.safetensors"
        file.unlink(missing_ok=True)
        record(name, file)


if __name__ == "__main__":
    main()
