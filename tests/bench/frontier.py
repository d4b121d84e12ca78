"""The frontier: what a method gains against what it forgets, as a curve over rates and lengths.

    python tests/bench/frontier.py --out DIR --seeds 8                     # 128 clean rows
    python tests/bench/frontier.py --out DIR --setting frontier-8 frontier-open
    python tests/bench/frontier.py --out DIR --only SPIN "SAPO, segments"  # and SFT, the control
    python tests/bench/frontier.py --list
    python tests/bench/pictures.py --frontier DIR/frontier.json            # pictures/frontier.svg

A method is run at every rate of a ladder (and of SFT at several lengths) on each start; nothing is
chosen, so that nothing has to be validated. Runs are lines in DIR/results.jsonl, as methods.py has
them. A point is a run: what it *gains*, accuracy at temperature 1 on the kinds that have rows, in
points over the start's, against what it *forgets*: greedy accuracy lost on the kinds that have no
rows, in points; or KL from the start, in nats a response (`methods.kl`).

The curve of a method is the upper hull of the start at (0, 0) and its points, each the mean over
starts: the most that is gained where at most so much is forgotten on average, by one run or by
drawing for each prompt which of two runs answers it. Such a mixture's accuracies lie on the line
between the two, its KL below it, so that the hull is within reach. Where a method forgets less than
is allowed, its curve goes on level. What begins with SFT has no points below that, only a chord.
The numbers are the mean height of the curve up to a budget (its area over the budget) and the
height there, and both less SFT's, with the jackknife's standard error over starts. The budget of
all methods is what SFT forgets where it gains most.

Why means first: the best of noisy points lies too high, and the more so the more there are. In a
simulation of one true curve with errors of 2 points, 8 starts, and 10 points of SFT against 4 of
the other, SFT lay 4.9 ahead where each start had its own hull, and 2.6 with the hull of the means;
1.2 of both is that a hull of 4 points is coarser. 4 against 4 came to 0.2. So SFT, of all lengths
and rates, is a hard control; `--against "SFT, 120 steps"` is the one of as many points.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import methods
from methods import RATES, Arm, Results, Run

# LAB.md's rates are 1e-4 and 3e-4 for SFT, SAPO and SGPO's improver, 3e-5 and 1e-4 for SPIN. On
# one start SAPO on whole responses gains most at 1e-4, and at 1e-3 less for ten times the KL. Those
# that begin at the pre-trained start have 1e-5 in common: below its lowest point a hull is a chord.
WIDE, MIDDLE, LOW, LOWEST = RATES[2:7], RATES[2:6], RATES[1:5], RATES[:4]
FIRST_RATE = 1e-4  # of what others begin with
CONTROL = "SFT"
FORGOTTEN = ("lost", "kl")
Points = Sequence[tuple[float, float]]  # (forgotten, gained)


@dataclass(frozen=True)
class Method:
    """A curve: each arm at each rate. first: what they begin with, which is a point too."""

    arms: tuple[Arm, ...]
    rates: tuple[float, ...]
    first: Arm | None = None

    def runs(self, seed: int) -> list[Run]:
        """Those of one start, what others begin with first."""
        base = Run(self.first, FIRST_RATE, seed, "test") if self.first else None
        made = [Run(arm, rate, seed, "test", base) for arm in self.arms for rate in self.rates]
        return [base, *made] if base else made


Methods = dict[str, Method]


# ------------------------------------------------------------------------------------ the settings


def in_short(lengths: Sequence[int], **which: Any) -> Methods:
    """SFT of several lengths, SPIN, SAPO as the recipe has it and on segments, alone and behind
    SFT. which: rows and tasks."""
    sft = {n: methods.sft(n, **which) for n in lengths}
    whole = Arm(seconds=20, **which)
    return {
        CONTROL: Method(tuple(sft.values()), WIDE),
        "SFT, 120 steps": Method((sft[120],), MIDDLE),
        "SPIN": Method((Arm({"method": "spin"}, seconds=10, **which),), MIDDLE),
        "SAPO": Method((whole,), MIDDLE),
        "SAPO, segments": Method((Arm(methods.SEGMENTS, seconds=15, **which),), MIDDLE),
        "SFT, then SAPO": Method((whole,), LOW, sft[60]),
    }


def in_full() -> Methods:
    """Also SAPO's parts, one by one, SGPO, and what else may come behind SFT."""
    curves = in_short((60, 120))
    (whole,), sft, segments = curves["SAPO"].arms, curves[CONTROL].arms, methods.SEGMENTS
    for name in ("on-policy", "no-ema", "no-replay", "fixed-reference"):
        arm = replace(whole, flags=methods.sapo.ABLATIONS[name])
        curves[f"SAPO, {name}"] = Method((arm,), MIDDLE)
    as_it_was = {"responses_per_prompt": 1, "drop_identical": False}
    curves["SAPO, segments, as it was"] = Method((Arm(segments | as_it_was, seconds=15),), MIDDLE)
    curves["SAPO, segments + NLL"] = Method((Arm(segments | {"nll_weight": 1.0}),), MIDDLE)
    improver, sgpo = methods.improver_and("", ["sgpo"], {}).values()
    curves["SGPO, improver"] = Method((improver,), WIDE)
    curves["SGPO"] = Method((sgpo,), LOWEST, improver)
    curves["SFT, then SPIN"] = replace(curves["SPIN"], rates=LOW, first=sft[0])
    curves["SFT, then SFT"] = Method((sft[1],), MIDDLE, sft[0])
    return curves


SETTINGS = {
    "frontier": in_full(),
    **{f"frontier-{n}": in_short((30, 60, 120), rows=f"clean {n}") for n in (16, 8, 4)},
    "frontier-open": in_short((30, 60, 120), tasks="open"),
}


# -------------------------------------------------------------------------------------- the runs


def starts_of(curves: Methods, seeds: Sequence[int]) -> list[Run]:
    """The measurements of the starts."""
    some = next(iter(curves.values()))
    return [methods.untrained({"": some.arms[0]}, seed, "test") for seed in seeds]


def plan(curves: Methods, results: Results, seeds: Sequence[int]) -> str:
    """How much is to be done yet."""
    runs = results.missing(run for m in curves.values() for s in seeds for run in m.runs(s))
    starts = sum(not results.started(run) for run in starts_of(curves, seeds))
    minutes = (sum(run.arm.seconds for run in runs) + starts * methods.PRETRAINING) / 60
    return f"{starts} starts and {len(runs)} runs, about {minutes:.0f} minutes of one idle core"


def gather(setting: str, curves: Methods, results: Results, seeds: Sequence[int]) -> dict[str, Any]:
    """What the table and the picture are made of: of each curve its runs, their values a list over
    starts. Seconds and tokens are with those of what a run begins with."""
    known = results.known
    starts = [known[run.key] for run in starts_of(curves, seeds)]
    told: dict[str, Any] = {"setting": setting, "starts": [*seeds], "curves": {}}
    for name, method in curves.items():
        told["curves"][name] = points = []
        for runs in zip(*map(method.runs, seeds), strict=True):
            found = [known[run.key] for run in runs]
            both = [*zip(found, starts, strict=True)]
            point = {
                "rate": runs[0].rate,
                "steps": runs[0].arm.flags.get("steps", methods.train.TASKS["steps"]),
                "gain": [a["seen/1"] - b["seen/1"] for a, b in both],
                "lost": [b["unseen/0"] - a["unseen/0"] for a, b in both],
                "kl": [a["kl"] for a in found],
            }
            before = [known[run.base.key] for run in runs if run.base]
            for key in ("seconds", "generated"):
                point[key] = sum(x[key] for x in found + before) / len(runs)
            points.append(point)
    return told


# --------------------------------------------------------------------------------- the statistics


def gain_at(points: Points, budget: float) -> float:
    """The height of the hull: the most that is gained where at most `budget` is forgotten, by a
    point or between one that forgets less and one that forgets more."""
    less = [(x, y) for x, y in points if x <= budget]
    more = [(x, y) for x, y in points if x > budget]
    between = [y + (v - y) * (budget - x) / (u - x) for x, y in less for u, v in more]
    return max([y for _, y in less] + between)


def mean_gain(points: Points, budget: float) -> float:
    """The mean height from 0 to the budget, exactly: the hull is straight between points."""
    if not budget:
        return gain_at(points, 0.0)
    knots = [0.0, *sorted(x for x, _ in points if 0 < x < budget), budget]
    spans = itertools.pairwise((x, gain_at(points, x)) for x in knots)
    return sum((b - a) * (low + high) / 2 for (a, low), (b, high) in spans) / budget


def jackknife(without: Sequence[float]) -> float:
    """The standard error of a number, from what it is with each start left out."""
    n, mean = len(without), statistics.fmean(without)
    return math.sqrt((n - 1) / n * sum((x - mean) ** 2 for x in without)) if n > 1 else math.nan


def curve(points: Sequence[Mapping[str, Any]], kind: str, left_out: int | None = None) -> Points:
    """The start and the points of a curve, each the mean over starts, of which one may be left out.
    kind: of FORGOTTEN."""

    def mean(values: Sequence[float]) -> float:
        return statistics.fmean(x for i, x in enumerate(values) if i != left_out)

    return [(0.0, 0.0), *((mean(point[kind]), mean(point["gain"])) for point in points)]


def budget_of(told: Mapping[str, Any], kind: str) -> float:
    """What the control forgets where it gains most; 0 if it forgets nothing there."""
    points = curve(told["curves"][told["control"]], kind)
    return max(0.0, max(points, key=lambda point: point[1])[0])


def compared(told: Mapping[str, Any], name: str, kind: str, number: Any) -> tuple[float, ...]:
    """A curve's `mean_gain` or `gain_at`; that less the control's; the standard error of this."""
    budget, curves, control = told["budgets"][kind], told["curves"], told["control"]

    def of(left_out: int | None) -> tuple[float, float]:
        one, other = (number(curve(curves[n], kind, left_out), budget) for n in (name, control))
        return one, one - other

    starts = range(len(told["starts"]))
    left = [of(i)[1] for i in starts] if len(starts) > 1 else [0.0]
    return *of(None), jackknife(left)


def report(told: Mapping[str, Any]) -> str:
    """The table in Markdown, a row a curve; * is beyond two standard errors."""
    lost, kl = (told["budgets"][kind] for kind in FORGOTTEN)
    heads = ["points", "most"]
    for budget in (f"{lost:.1f} points", f"{kl:.2f} nats"):
        for how in ("up to", "at"):
            heads += [f"{how} {budget}", f"\N{MINUS SIGN} {told['control']}"]
    heads += ["seconds", "tokens"]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, points in told["curves"].items():
        gains = [y for _, y in curve(points, "kl")]
        cells = [f"{len(points)}", f"{max(gains):+.1f}"]
        for kind in FORGOTTEN:
            for number in (mean_gain, gain_at):
                value, less, error = compared(told, name, kind, number)
                star = " *" * (abs(less) > 2 * error)
                cells += [f"{value:.1f}", f"{less:+.1f} ± {error:.1f}{star}"]
                cells[-1] = "" if name == told["control"] else cells[-1]
        for key in ("seconds", "generated"):
            cells.append(f"{statistics.fmean(point[key] for point in points):.0f}")
        lines.append(f"| **{name}** | " + " | ".join(cells) + " |")
    title = (
        f"{told['setting']}: {len(told['starts'])} starts; points of accuracy that are gained at "
    )
    title += "T = 1 on seen kinds where so much is forgotten"
    return "\n".join([title, "", *lines])


# ---------------------------------------------------------------------------------------- the whole


def main(argv: Sequence[str]) -> None:
    """Runs, and after each start writes the table and its numbers anew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/methods"))
    parser.add_argument("--setting", nargs="+", default=["frontier"], choices=SETTINGS)
    parser.add_argument("--seeds", type=int, default=5, help="how many starts [5]")
    parser.add_argument("--only", nargs="+", metavar="CURVE", help="these, and --against")
    parser.add_argument("--against", default=CONTROL, metavar="CURVE", help="the control [SFT]")
    parser.add_argument("--budget", nargs=2, type=float, metavar=("POINTS", "NATS"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--list", action="store_true", help="the curves and their cost")
    args = parser.parse_args(argv)
    seeds, results = list(methods.TEST[: args.seeds]), Results(args.out, args.workers)
    for setting in args.setting:
        curves = SETTINGS[setting]
        wanted = {args.against, *(args.only or curves)}
        if unknown := wanted - curves.keys():
            parser.error(f"no curve of {setting}: {', '.join(sorted(unknown))}")
        curves = {name: curves[name] for name in curves if name in wanted}
        print(f"\n## {setting}: {'; '.join(curves)}\n{plan(curves, results, seeds)}", flush=True)
        if args.list:
            continue
        results.need(starts_of(curves, seeds))
        for n, seed in enumerate(seeds, 1):
            runs = [run for method in curves.values() for run in method.runs(seed)]
            results.need(run for run in runs if not run.base)
            results.need(run for run in runs if run.base)
            told = gather(setting, curves, results, seeds[:n]) | {"control": args.against}
            found = args.budget or [budget_of(told, kind) for kind in FORGOTTEN]
            told["budgets"] = dict(zip(FORGOTTEN, found, strict=True))
            (args.out / f"{setting}.json").write_text(json.dumps(told, indent=1) + "\n")
            (args.out / f"{setting}.md").write_text(report(told) + "\n")
        print(f"\n{report(told)}\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
