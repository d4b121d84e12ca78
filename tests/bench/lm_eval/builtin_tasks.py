"""The test prompts of the built-in tasks for lm-eval, and whether it scores a model as we do.

    python tests/bench/lm_eval/builtin_tasks.py OUT/final

needs `pip install "lm-eval[hf]"` beside requirements.txt. It runs lm-eval, which loads the folder
by transformers, on the tasks of the two YAML files here, and prints its figures beside ours:

    builtin_generate    greedy answers that are right to the letter; `sample.task_accuracy`
    builtin_choice      the right answer is likelier than a flawed one; `model.pair_logprobs`

Exit status 1 where an answer is scored differently, or a log-prob differs by more than 1e-3.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))

import data  # noqa: E402

COUNT, SEED = 512, 42  # what the table at the end of `python train.py` is over


def rows(**_: Any) -> dict[str, Any]:
    """What the YAML files' `custom_dataset` asks for: the splits."""
    import datasets

    examples = data.task_examples("test", COUNT, SEED)
    keys = ("prompt", "right", "flawed")
    values = [(e.messages[-1]["content"], e.response, e.rejected) for e in examples]
    made = [dict(zip(keys, row, strict=True)) for row in values]
    return {"test": datasets.Dataset.from_list(made)}


def lm_eval(folder: str, out: Path) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval logged of each question, by task."""
    command = f"-m lm_eval --model hf --model_args pretrained={folder},dtype=float32"
    command += f" --device cpu --batch_size 32 --include_path {HERE}"
    command += " --tasks builtin_generate,builtin_choice --apply_chat_template"
    command += f" --output_path {out} --log_samples"
    subprocess.run([sys.executable, *command.split()], check=True)
    samples = {}
    for task in ("builtin_generate", "builtin_choice"):
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        logged = [json.loads(line) for line in file.read_text().splitlines()]
        samples[task] = sorted(logged, key=lambda row: row["doc_id"])
    return samples


def main(folder: str) -> int:
    """Both, beside each other."""
    from model import Transformer, pair_logprobs
    from sample import task_accuracy

    with tempfile.TemporaryDirectory() as out:
        theirs = lm_eval(folder, Path(out))
    model, tokenizer = Transformer.from_pretrained(folder), data.load_tokenizer(folder)
    examples = data.task_examples("test", COUNT, SEED)
    kinds = [data.task_kind(example.messages[-1]["content"]) in data.SEEN for example in examples]
    ours = task_accuracy(model, tokenizer, SEED, 0.0, "test")
    wrong = 0
    for name, seen in (("seen", True), ("unseen", False)):
        marks = [
            row["exact_match"]
            for row, is_seen in zip(theirs["builtin_generate"], kinds, strict=True)
            if is_seen == seen
        ]
        share = sum(marks) / len(marks)
        wrong += share != ours[name]
        print(f"greedy answers, {name} kinds: lm-eval {share:.4f}, ours {ours[name]:.4f}")
    pairs = []
    for example in examples:  # lm-eval scores an answer without the EOS behind it
        pair = data.encode_example(tokenizer, example)
        pairs.append(data.Pair(pair.prompt, pair.chosen[:-1], pair.rejected[:-1]))
    sums = [part.tolist() for part in pair_logprobs(model, pairs)[:2]]
    logged = [[float(r[0]) for r in row["filtered_resps"]] for row in theirs["builtin_choice"]]
    apart = max(
        abs(mine - other)
        for both, found in zip(zip(*sums, strict=True), logged, strict=True)
        for mine, other in zip(both, found, strict=True)
    )
    shares = [sum(a > b for a, b in both) / COUNT for both in (logged, zip(*sums, strict=True))]
    print(f"right answer likelier: lm-eval {shares[0]:.4f}, ours {shares[1]:.4f}")
    print(f"largest difference of a log-prob: {apart:.2e} nats")
    return int(wrong > 0 or apart > 1e-3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", help="a model trained on the built-in tasks")
    sys.exit(main(parser.parse_args().folder))
