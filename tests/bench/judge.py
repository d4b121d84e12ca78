"""What SGPO's improvements are worth, from a run's files: `python tests/bench/judge.py OUT`.

On the built-in tasks the checker says it, in shares of the pairs: the answer was right, the
improvement is, wrong became right, right became wrong. Elsewhere the gold response does, where
there is one: how often an improvement, as the answer in I(x, y), makes the gold likelier than the
answer itself does, and by how much, in nats per token; by the improver, of a round's first 256.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this folder has a sapo.py too

import torch

import data
import sgpo
import train
from data import Example, Pair
from model import Transformer, pair_logprobs, read_json

Rows = Sequence[Mapping[str, Any]]  # of pairs.jsonl: round, prompt, chosen, rejected


def by_checker(rows: Rows) -> dict[str, float]:
    """Shares, by `data.check_answer`."""
    answers = [(row["prompt"], row["rejected"], row["chosen"]) for row in rows]
    marks = [(data.check_answer(x, bad), data.check_answer(x, good)) for x, bad, good in answers]
    shares = {
        "right_before": [before for before, _ in marks],
        "right_after": [after for _, after in marks],
        "mended": [after > before == 0 for before, after in marks],
        "spoilt": [before > after == 0 for before, after in marks],
    }
    return {name: sum(found) / len(rows) for name, found in shares.items() if rows}


@torch.no_grad()
def by_gold(
    rows: Rows, golds: Sequence[Example], model: Any, tokenizer: data.Tokenizer, c: train.Config
) -> dict[str, float]:
    """Share and mean gain, of what fits into --max-length; nothing where no row has gold."""
    known = {json.dumps(sgpo.as_prompt(e.messages)): e for e in golds if e.response}
    gains = []
    for row in rows[:256]:
        if example := known.get(json.dumps(row["prompt"])):
            gold = data.encode_example(tokenizer, example).chosen
            answers = (row["chosen"], row["rejected"])
            asked = [sgpo.frame(example.messages, text, tokenizer, c) for text in answers]
            if max(map(len, asked)) + len(gold) <= c.max_length:
                pairs = [Pair(prompt, gold, []) for prompt in asked]
                after, before = pair_logprobs(model, pairs)[0].tolist()
                gains.append((after - before) / len(gold))
    found = {"gold_better": sum(gain > 0 for gain in gains), "gold_gain": sum(gains)}
    return {name: value / len(gains) for name, value in found.items() if gains}


def judge(out: Path, files: Sequence[str] = ()) -> dict[int, dict[str, float]]:
    """By round, of a run's folder. `files`: rows with gold; default: those of its second phase."""
    flags, rounds = read_json(out / "args.json"), dict[int, list[Any]]()
    for row in train.json_lines(out / "pairs.jsonl"):
        rounds.setdefault(row["round"], []).append(row)
    c = train.Config(**{key: value for key, value in flags.items() if key != "inputs"})
    if not (files := files or c.preference_data or c.data or ()):
        return {number: by_checker(rows) for number, rows in rounds.items()}
    how: dict[str, Any] = {"all_turns": c.all_turns, "bad": [] if c.skip_bad_rows else None}
    golds = data.load_examples(files, prompts=True, **how)
    folder = c.improver or out / "improver"
    tokenizer = data.load_tokenizer(folder, c.chat_template, datetime.fromisoformat(c.date or ""))
    model = Transformer.from_pretrained(folder)
    return {number: by_gold(rows, golds, model, tokenizer, c) for number, rows in rounds.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="the folder of a run of SGPO")
    parser.add_argument("--data", nargs="+", default=(), help="rows with gold [the run's own]")
    args = parser.parse_args()
    for number, told in judge(args.out, args.data).items():
        print(f"round {number}: " + ", ".join(f"{key} {x:.4f}" for key, x in told.items()))
