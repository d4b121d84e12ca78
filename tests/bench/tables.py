"""Tables for real.py and ifeval.py: what models have on the same prompts, with paired errors.

A column is what a model has: for each seed a dict of lists, a value a prompt (or a pair) by the
name of a row. Lists of one row are of the same prompts in all columns.
"""

import collections
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this folder has a sapo.py too

import methods

import train

Values = dict[str, list[float]]
# Keys of metrics.jsonl that are shown, by what they begin with, in this order.
GROUPS = """loss nll grad_norm logps/ rewards/ pairs/identical segment/ seam/ replay/ improve/
    skipped seconds/ tokens""".split()  # noqa: SIM905


def at_equal_length(values: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """For each pair a number; their mean is the intercept of the regression of the values on the
    gaps (good less weak, in tokens), and the standard error of that mean is the intercept's, robust
    against unequal variances (White's). They are linear in the values, so differences may be taken
    pair by pair."""
    middle, count = statistics.fmean(gaps), len(gaps)
    squares = sum((x - middle) ** 2 for x in gaps) or math.inf  # all gaps equal: no slope
    slope = sum((x - middle) * y for x, y in zip(gaps, values, strict=True)) / squares
    intercept = statistics.fmean(values) - slope * middle
    weights = [1 - count * middle * (x - middle) / squares for x in gaps]
    rest = [y - intercept - slope * x for x, y in zip(gaps, values, strict=True)]
    return [intercept + w * e for w, e in zip(weights, rest, strict=True)]


def less(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], digits: int) -> str:
    """Of (seeds, pairs) values the mean paired difference ± its standard errors: over pairs, each
    its mean over seeds, and over seeds, each its mean over pairs; * if beyond two of each known."""
    by_pair = [[statistics.fmean(x) for x in zip(*many, strict=True)] for many in (ours, theirs)]
    by_seed = [[statistics.fmean(x) for x in many] for many in (ours, theirs)]
    (mean, error), (_, over_seeds) = methods.paired(*by_pair), methods.paired(*by_seed)
    known = [x for x in (error, over_seeds) if not math.isnan(x)]
    told = ", ".join(f"{x:.{digits}f}" for x in known) or "-"
    return f"{mean:+.{digits}f} ± {told}" + " *" * (bool(known) and abs(mean) > 2 * max(known))


def means(ours: Sequence[Sequence[float]], digits: int) -> str:
    """Of (seeds, pairs) values the mean ± its standard error over pairs."""
    pooled = [statistics.fmean(x) for x in zip(*ours, strict=True)]
    mean, error = methods.paired(pooled, [0.0] * len(pooled))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def compared(columns: Mapping[str, Sequence[Values]], control: str = "") -> str:
    """The table of `means`; or that of `less` a column, where that has something."""
    shown: dict[str, dict[str, str]] = {name: {} for name in columns if name != control}
    for name, cells in shown.items():
        for key in columns[name][0]:
            digits = 1 if "%" in key or "tokens" in key else 3
            ours = [values[key] for values in columns[name]]
            theirs = [values.get(key, []) for values in columns[control]] if control else ours
            if ours[0] and theirs[0]:
                cells[key] = less(ours, theirs, digits) if control else means(ours, digits)
    return markdown(shown)


def markdown(columns: Mapping[str, Mapping[str, str]]) -> str:
    """What the columns hold by the names of rows; - where one has nothing."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        cells = [column.get(name, "-") for column in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def logged(file: Path) -> dict[str, dict[str, str]]:
    """What each phase in a metrics.jsonl has logged: means over the steps that have a value, but
    for seconds and tokens, of which the others have 0. In the order of GROUPS."""
    phases = collections.defaultdict[str, list[dict[str, Any]]](list)
    for read in train.json_lines(file):
        row = {key: value for key, value in read.items() if value is not None}
        for part in ("segment", "seam"):
            if f"{part}/new_logps" in row:
                row[f"{part}/logps - new"] = row[f"{part}/logps"] - row[f"{part}/new_logps"]
        phases[row["phase"]].append(row)
    columns = {}
    for phase, rows in phases.items():
        losses = [row["loss"] for row in rows if "loss" in row] or [math.nan]
        column = {"steps": f"{len(rows)}", "first loss": f"{losses[0]:.4g}"}
        keys = dict.fromkeys(key for row in rows for key in row if key != "seconds/eval")
        for key in [key for group in GROUPS for key in keys if key.startswith(group)]:
            values = [row[key] for row in rows if key in row]
            count = len(rows if key.startswith(("seconds/", "tokens/")) else values)
            column[f"`{key}`"] = f"{math.fsum(values) / count:.4g}"
        columns[phase] = column
    return columns
