"""The README's pictures, from runs of the product's own commands.

    python tests/bench/pictures.py --out DIR                  # about 4 minutes for each seed
    python tests/bench/pictures.py --frontier DIR/frontier.json    # which frontier.py has written

DIR/SEED holds the runs of a seed: its start, then SAPO, SFT and SGPO from that start. What is there
is not run again, so that a call that was cut goes on; `--starts OTHER` takes the start from there.
Accuracies are kept in DIR/accuracy.json. The pictures are committed.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from xml.sax.saxutils import escape

os.environ["OMP_NUM_THREADS"] = "1"  # sums that do not depend on the cores
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import frontier
import judge
import matplotlib
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

import data
import sample
import sapo
import train
from model import Transformer

FOLDER = Path(__file__).with_suffix("")
STEPS = range(0, 121, 20)  # of the accuracies; the recipe's 120 steps
BIN = 6  # steps averaged for a point of a curve; the reference is refreshed every 30
RUNS = {
    "sapo": "--method sapo --save-every 20",
    "pair": "--recipe tasks-segments --steps 1 --trace {}/pair.safetensors",  # its first pairs
    "sft": "--method sft --recipe tasks --save-every 20",
    "sgpo": "--method sgpo",
}
HOW = {0: "greedy", 1: "T = 1"}
GREY, PURPLE, GREEN, RED, BLUE = "#808080", "#8e5ea2", "#2e8b57", "#d1495b", "#3b76c4"
PARTS = {"x": GREY, "A": PURPLE, "B": GREEN, "B'": RED, "C": BLUE}
METHOD = {"start": GREY, "improver": "#d9a400", "SAPO": BLUE, "SGPO": BLUE, "SFT control": RED}
COLORS = (RED, "#d9a400", GREEN, BLUE, PURPLE, GREY)  # the frontier's curves, SFT first
CURVES = ("SFT", "SPIN", "SAPO", "SAPO, segments", "SFT, then SAPO")
FORGOTTEN = {"lost": "greedy accuracy lost, points", "kl": "nats a response"}
NO_DATE = {"Date": None, "Creator": None}
STYLE = {
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "svg.hashsalt": "pictures", "svg.fonttype": "none", "font.size": 10.5, "axes.titlesize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.prop_cycle": matplotlib.cycler(color=[BLUE, GREEN, RED]), "axes.axisbelow": True,
}  # fmt: skip


class Runs:
    """The runs of all seeds, and what they left behind."""

    def __init__(self, out: Path, starts: Path, seeds: Sequence[int]) -> None:
        self.out, self.starts, self.seeds, self.file = out, starts, seeds, out / "accuracy.json"
        self.known = json.loads(self.file.read_text()) if self.file.exists() else {}

    def make(self, seed: int) -> None:
        """Trains what is not there yet."""
        folder, start = self.out / str(seed), self.starts / str(seed) / "start"
        flags = {name: f"{RUNS[name].format(folder)} --model {start}" for name in RUNS}
        made = {start: ("--method sft --steps 1", start.parent)}  # leaves the start in there
        made |= {folder / n / "final": (flags[n] + " --log-every 1", folder / n) for n in RUNS}
        folder.mkdir(parents=True, exist_ok=True)
        for file, (said, out) in made.items():
            if not file.exists():
                if (out / "args.json").exists():  # it was cut, and has its first step's trace
                    said = re.sub(r" --trace \S+", "", said) + " --resume"
                words = ["train.py", *said.split(), "--seed", str(seed), "--out", str(out)]
                print("python", *words, flush=True)
                subprocess.run([sys.executable, *words], cwd=FOLDER.parents[2], check=True)

    def curves(self, run: str, phase: str, key: str) -> list[list[tuple[float, float]]]:
        """For each seed (last step in the phase, mean) of each BIN rows of metrics.jsonl."""
        found = []
        for seed in self.seeds:
            lines = (self.out / str(seed) / run / "metrics.jsonl").read_text().splitlines()
            rows = [row for row in map(json.loads, lines) if row["phase"] == phase]
            groups = [rows[i : i + BIN] for i in range(0, len(rows) - BIN + 1, BIN)]
            values = [[row[key] for row in group if key in row] for group in groups]
            found.append([(BIN * (i + 1), mean(v)) for i, v in enumerate(values) if v])
        return found

    def accuracy(self, model: str, kind: str, temperature: float) -> list[float]:
        """For each seed, in % of the test prompts: of "start", or of a folder in OUT/SEED."""
        shares = []
        for seed in self.seeds:
            if (key := f"{seed} {model} {temperature:g}") not in self.known:
                folder = (self.starts if model == "start" else self.out) / str(seed) / model
                tokenizer, loaded = data.load_tokenizer(folder), Transformer.from_pretrained(folder)
                found = sample.task_accuracy(loaded, tokenizer, seed, temperature, "test")
                self.known[key] = found
                self.file.write_text(json.dumps(self.known, indent=1) + "\n")
            shares.append(100 * self.known[key][kind])
        return shares

    def pair(self) -> tuple[Any, data.Tokenizer]:
        """The first pair that SAPO with segments makes of the first seed's start, of those in which
        A, B and C all have tokens, C is still there behind B', and B' differs from B."""
        folder = self.out / str(self.seeds[0])
        traced = load_file(folder / "pair.safetensors")
        keys = ("tokens", "lengths", "bounds", "logp")
        made: Any = sapo.unpack({key: traced[f"fresh/{key}"] for key in keys})
        for pair in made:
            start, stop, new_stop, _ = pair.cut
            whole = start > 0 and stop < len(pair.chosen) and new_stop < len(pair.rejected)
            if whole and pair.chosen != pair.rejected:
                return pair, data.load_tokenizer(folder / "pair" / "final")
        raise ValueError("there is no such pair")


# ------------------------------------------------------------------------- a pair, drawn by hand


def draw_pair(runs: Runs) -> str:
    """The general idea, whose boxes are the legend too, over a pair token by token."""
    pair, tokenizer = runs.pair()
    start, stop, *_ = pair.cut  # B' is as long as B where C is left
    prompt = re.sub(r"<\|\w+\|>", "", tokenizer.decode(pair.prompt))
    arrow = "M154 46V68H400V94M395 87L400 95L405 87M266 46V68"
    shapes = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 260" width="800" height="260" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14" fill="#222">',
        '<rect width="800" height="260" fill="white"/>',
        f'<path d="{arrow}" fill="none" stroke="#444"/>',
        note(606, 36, "preferred to y⁻ by the loss"),
        note(414, 75, "the EMA of the policy goes on from x and A,"),
        note(414, 91, "for as many tokens as B has"),
        note(104, 248, "A pair of the built-in tasks, one box a token. Framed: not as in B."),
    ]
    for y, label, name, does in ((16, "y", "B", "cut out"), (98, "y⁻", "B'", "rewritten")):
        parts = {"x": "x", "A": "A: kept", name: f"{name}: {does}", "C": "C: kept"}
        shapes.append(draw_row(y, label, [(*part, 120, False) for part in parts.items()]))
        cells, side = [("x", prompt, 120, False)], pair.chosen if name == "B" else pair.rejected
        for i, (token, other) in enumerate(zip(side, pair.chosen, strict=True)):
            part = "A" if i < start else name if i < stop else "C"
            word = "end" if token in tokenizer.eos_ids else tokenizer.decode([token])
            cells.append((part, word, 38 if word == "end" else 24, token != other))
        y, label = {"B": (158, "chosen"), "B'": (196, "rejected")}[name]
        shapes.append(draw_row(y, label, cells))
    return "\n".join([*shapes, "</svg>\n"])


def note(x: float, y: float, words: str, more: str = "") -> str:
    """Words on the white ground, or with more attributes."""
    return f'<text x="{x:g}" y="{y}"{more} xml:space="preserve">{escape(words)}</text>'


def draw_row(y: float, label: str, cells: Sequence[tuple[str, str, int, bool]]) -> str:
    """Boxes side by side: each of a part, with words in it, of a width, framed or not."""
    shapes, x = [f'<g id="{label}">', note(94, y + 20, label, ' text-anchor="end"')], 104
    for part, words, width, framed in cells:
        edge = ' stroke="#111" stroke-width="2.5"' if framed else ""
        place = f'x="{x}" y="{y}" width="{width}" height="30" rx="4"'
        shapes.append(f'<rect {place} fill="{PARTS[part]}"{edge}/>')
        look = f' class="{part}" fill="white" text-anchor="middle"'
        shapes.append(note(x + width / 2, y + 20, words, look))
        x += width + 3
    return "\n".join([*shapes, "</g>"])


# ------------------------------------------------------------------------------------ the curves


def panels(height: float, layout: Any, title: str) -> tuple[Figure, dict[str, Any]]:
    """A figure 800 points wide."""
    figure = Figure(figsize=(800 / 72, height / 72))
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.08)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure, figure.subplot_mosaic(layout)


def draw_curves(axis: Any, curves: Sequence[Sequence[tuple[float, float]]], **look: Any) -> None:
    """A thin line for each seed, and a thick one for their mean."""
    for points in curves:
        axis.plot(*zip(*points, strict=True), linewidth=0.8, alpha=0.5, color=look["color"])
    means = [
        mean(y for _, y in same) for same in zip(*curves, strict=False)
    ]  # the shortest's steps
    axis.plot([x for x, _ in curves[0]][: len(means)], means, linewidth=2.4, **look)


def draw_sapo(runs: Runs) -> Figure:
    """What the pairs teach, and what that is worth, beside SFT on the same rows."""
    layout = [["loss", "rewards/accuracies", "rewards/margins", "segment/identical"]]
    layout += [["seen 0", "unseen 0", "seen 1", "unseen 1"]]
    seeds = f"seeds {', '.join(map(str, runs.seeds))} (thin) and their mean"
    figure, axes = panels(400, layout, f"SAPO on the built-in tasks: {seeds}")
    titles = ("loss, at first ln 2", "reward accuracy", "reward margin", "share of B' that is B")
    for key, title in zip(layout[0], titles, strict=True):
        draw_curves(axes[key], runs.curves("sapo", "sapo", key), color=BLUE)
        axes[key].set(title=title, xticks=STEPS[::2])
    for key in ("rewards/accuracies", "segment/identical"):
        axes[key].set_ylim(0, 1)
    for name in layout[1]:
        kind, t = name.split()
        for method, run in (("SFT control", "sft"), ("SAPO", "sapo")):
            models = ["start", *(f"{run}/checkpoints/step-{n}/policy" for n in STEPS[1:])]
            found = zip(*(runs.accuracy(model, kind, float(t)) for model in models), strict=True)
            curves = [list(zip(STEPS, shares, strict=True)) for shares in found]
            draw_curves(axes[name], curves, color=METHOD[method], label=method)
        title = f"{kind} kinds, {HOW[int(t)]}"
        axes[name].set(title=title, xlabel="step", xticks=STEPS[::2], ylim=(0, 100))
    axes["seen 0"].set_ylabel("right, in % of held-out")
    axes["seen 0"].legend(loc="lower right")
    return figure


def draw_bars(axis: Any, labels: Sequence[str], bars: dict[str, list[list[float]]]) -> None:
    """For each name a bar at each label: the mean, also in digits, and the standard deviation."""
    width = 0.8 / len(bars)
    for i, (name, values) in enumerate(bars.items()):
        means, spread = [*map(mean, values)], [stdev(v) if len(v) > 1 else 0 for v in values]
        places = [g + (i - (len(bars) - 1) / 2) * width for g in range(len(labels))]
        look = {"color": METHOD.get(name, GREEN), "ecolor": "#444444", "capsize": 3, "label": name}
        axis.bar(places, means, 0.92 * width, yerr=spread, **look)
        for x, height in zip(places, means, strict=True):
            axis.text(x, 2, f"{height:.0f}", ha="center", color="white", fontweight="bold")
    axis.set_xticks(range(len(labels)), labels)


def draw_sgpo(runs: Runs) -> Figure:
    """Both phases' losses, what the improvements are, and what all that is worth."""
    seeds = f"seeds {', '.join(map(str, runs.seeds))}, mean and standard deviation"
    layout = [["improver", "sgpo", "pairs"], ["accuracy"] * 3]
    figure, axes = panels(420, layout, f"SGPO on the built-in tasks: {seeds}")
    titles = {"improver": "phase 1: NLL of the improver", "sgpo": "phase 2: DPO loss"}
    for phase, title in titles.items():
        draw_curves(axes[phase], runs.curves("sgpo", phase, "loss"), color=BLUE)
        axes[phase].set(title=title, xlabel="step")
    judged = [judge.judge(runs.out / str(seed) / "sgpo")[0] for seed in runs.seeds]
    mended, spoilt = ([100 * told[key] for told in judged] for key in ("mended", "spoilt"))
    rest = [100 - a - b for a, b in zip(mended, spoilt, strict=True)]  # two texts: one is right
    labels = ("wrong to\nright", "right to\nwrong", "wrong to\nwrong")
    draw_bars(axes["pairs"], labels, {"": [mended, spoilt, rest]})
    axes["pairs"].set(title="phase 2: its pairs, in %", ylim=(0, 100))
    models = {"start": "start", "improver": "sgpo/improver", "SGPO": "sgpo/final"}
    models["SFT control"] = "sgpo/control"
    cells = [(kind, t) for t in HOW for kind in ("seen", "unseen")]
    bars = {n: [runs.accuracy(folder, *cell) for cell in cells] for n, folder in models.items()}
    draw_bars(axes["accuracy"], [f"{kind} kinds, {HOW[t]}" for kind, t in cells], bars)
    axes["accuracy"].set(ylabel="right, in % of held-out", ylim=(0, 120), yticks=range(0, 101, 25))
    axes["accuracy"].legend(ncols=4, loc="upper center")
    return figure


def draw_losses(_: Any = None) -> Figure:
    """The losses by the margin, and how hard each pulls there."""
    figure, axes = panels(250, [["loss", "pull", "orpo"]], "The losses by the margin, β = 0.1")
    c = train.Config()
    for kind in ("dpo", "ipo", "hinge"):
        gap = torch.linspace(-20, 30, 251, dtype=torch.float64, requires_grad=True)
        zero, one = torch.zeros_like(gap), torch.ones_like(gap)
        c.loss = kind  # type: ignore[assignment]
        losses = sapo.pair_loss(c, 0.1, (gap, zero, one, one), (zero, zero))[0]
        (slope,) = torch.autograd.grad(losses.sum(), gap)
        x, unit = gap.detach(), losses[100].detach()  # at a margin of 0
        axes["loss"].plot(x, losses.detach() / unit, label=kind, linewidth=2)
        axes["pull"].plot(x, -slope / unit, linewidth=2)
    axes["loss"].set(title="loss, as a share of that at Δ = 0", xlabel="Δ, nats", ylim=(-0.1, 4))
    axes["loss"].legend()
    axes["pull"].set(title="its pull, minus the slope", xlabel="Δ, nats", ylim=(-0.3, 0.4))
    for middle in (-4.0, -1.0, -0.25):
        reach = min(4.0, -2 * middle)
        x = torch.linspace(-reach, reach, 161, dtype=torch.float64)
        y = sapo.orpo_loss(middle + x / 2, middle - x / 2, 0.05)
        axes["orpo"].plot(x, y, linewidth=2, label=f"around {middle:g}")
    axes["orpo"].set(title="orpo's odds-ratio term, λ = 0.05", ylim=(0, 0.4))
    axes["orpo"].set_xlabel("margin of mean log-probs, nats per token")
    axes["orpo"].legend(title="mean log-probs")
    return figure


def draw_frontier(told: dict[str, Any]) -> Figure:
    """What is gained against what is forgotten: a curve a method, a point a rate (and length)."""
    count = len(told["starts"])
    title = f"What is gained against what is forgotten: {count} starts, mean and standard error"
    figure, axes = panels(330, [list(FORGOTTEN)], title)
    for kind, label in FORGOTTEN.items():
        budget = told["budgets"][kind]
        far = 1.4 * budget or 1.0
        for name, color in zip(told["curves"], COLORS, strict=False):
            points = told["curves"][name]
            hull = frontier.curve(points, kind)
            for point, (x, y) in zip(points, hull[1:], strict=True):
                wide, high = (stderr(point[key]) for key in (kind, "gain"))
                axes[kind].errorbar(x, y, high, wide, "o", color=color, markersize=4, linewidth=0.8)
            knots = [0.0, *sorted(x for x, _ in hull if 0 < x < far), far]
            heights = [frontier.gain_at(hull, x) for x in knots]
            axes[kind].plot(knots, heights, color=color, linewidth=2, label=name)
        axes[kind].axvline(budget, color=GREY, linewidth=0.8, linestyle="dotted")
        axes[kind].set(xlabel=label, xlim=(-0.1 * far, far), ylim=(0, None))
    first, second = axes.values()
    first.set(ylabel="gained at T = 1 on seen kinds", title="forgotten: greedily, on unseen kinds")
    second.set(title="forgotten: KL from the start")
    second.legend(loc="lower right")
    return figure


def stderr(values: Sequence[float]) -> float:
    """Of a mean; of one value there is none."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


PICTURES: dict[str, Any] = {"pair.svg": draw_pair, "sapo.svg": draw_sapo, "sgpo.svg": draw_sgpo}
PICTURES |= {"losses.svg": draw_losses, "frontier.svg": draw_frontier}


def write(name: str, runs: Any, folder: Path) -> None:
    """A picture as a file, the same bytes from the same runs."""
    with matplotlib.rc_context(STYLE):
        made = PICTURES[name](runs)
        if isinstance(made, Figure):
            made.savefig(file := io.StringIO(), format="svg", metadata=NO_DATE)
            made = re.sub(
                r'(?<=[ "(-])\d+\.\d{3,}', lambda found: f"{float(found[0]):.1f}", file.getvalue()
            )
            made = re.sub(r" *\n *", "\n", made)
    (folder / name).write_text(made, encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    """Trains, measures, draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="the runs")
    parser.add_argument("--starts", type=Path, help="a folder of SEED/start; default: --out")
    parser.add_argument("--seeds", type=int, nargs="+", default=(42, 1, 2))
    parser.add_argument("--frontier", type=Path, help="draw frontier.svg, of frontier.py's numbers")
    parser.add_argument("--curves", nargs="+", metavar="CURVE", default=CURVES)
    args = parser.parse_args(argv)
    FOLDER.mkdir(exist_ok=True)
    if args.frontier:
        told = json.loads(args.frontier.read_text())
        told["curves"] = {n: told["curves"][n] for n in args.curves}
        write("frontier.svg", told, FOLDER)
    if args.out:
        runs = Runs(args.out.resolve(), (args.starts or args.out).resolve(), args.seeds)
        for seed in args.seeds:
            runs.make(seed)
        for name in PICTURES.keys() - {"frontier.svg"}:
            write(name, runs, FOLDER)


if __name__ == "__main__":
    main(sys.argv[1:])
