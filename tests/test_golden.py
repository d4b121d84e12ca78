"""tests/golden/: traces that a run of ours repeats, and that transformers and numpy agree with."""

import json
import math
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import GOLDEN, ROOT
from safetensors import safe_open
from safetensors.numpy import load_file

import train
from data import Pair

MAKE = runpy.run_path(str(GOLDEN / "make.py"))
NAMES = list(MAKE["RUNS"])


def trace(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A golden trace and the flags it was made with."""
    with safe_open(GOLDEN / f"{name}.safetensors", "np") as file:
        return load_file(GOLDEN / f"{name}.safetensors"), json.loads(file.metadata()["args"])


def unpack(values: dict[str, np.ndarray], kind: str = "pair") -> list[Pair]:
    ends = np.cumsum(values[f"{kind}/lengths"])
    sides = [side.tolist() for side in np.split(values[f"{kind}/tokens"], ends[:-1])]
    return [Pair(*sides[i : i + 3]) for i in range(0, len(sides), 3)]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_repeats_its_golden_trace(name: str, tmp_path: Path) -> None:
    MAKE["record"](name, tmp_path / "trace.safetensors")
    again, golden = load_file(tmp_path / "trace.safetensors"), trace(name)[0]
    assert again.keys() == golden.keys()
    for key, value in golden.items():
        if value.dtype.kind == "f":
            # Two machines' sums differ, in a gradient's norm by 1.5e-4 of it.
            rtol = 1e-3 if key == "step/grad_norm" else 1e-4
            np.testing.assert_allclose(again[key], value, rtol=rtol, atol=2e-5, err_msg=key)
        else:
            np.testing.assert_array_equal(again[key], value, err_msg=key)


def logps(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """(T,) log-probs of a response's tokens under a transformers model."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def norm(model: Any) -> float:
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_a_transformers_loop_fed_with_the_pairs_gets_the_same_numbers(name: str) -> None:
    """Every method's step as one would write it first: another model, optimizer and loss."""
    values, args = trace(name)
    load = transformers.AutoModelForCausalLM.from_pretrained
    policy, ema, reference = (load(GOLDEN / "start", dtype=torch.float32) for _ in range(3))
    kinds = {"rmsprop": torch.optim.RMSprop, "adamw": torch.optim.AdamW}
    decay = {"weight_decay": args["weight_decay"]}
    optimizer = kinds[args["optimizer"]](policy.parameters(), **decay)
    pairs, count = unpack(values), len(values["step/step"])
    starts = [0, 2]  # SPIN's: its second iteration passes over twice as many pairs
    alone = [  # SGPO's first phase: no pairs yet
        not any(
            pair.rejected for pair, at in zip(pairs, values["pair/step"], strict=True) if at == step
        )
        for step in values["step/step"]
    ]
    frozen = alone.count(True)  # its second: in rounds of two, against the model of that time
    if args["method"] == "sgpo":
        starts = [0, frozen, frozen + 2]
    for t in range(count):
        if args["method"] == "sapo":
            for mine, theirs in zip(ema.parameters(), policy.parameters(), strict=True):
                mine.data = mine.data if t == 0 else 0.5 * mine.data + 0.5 * theirs.data
            if t % args["ref_update_every"] == 0:
                reference.load_state_dict(ema.state_dict())
            assert norm(ema) == pytest.approx(values["step/norm/ema"][t], rel=1e-6)
        if args["method"] in ("spin", "sgpo") and t in starts:
            if args["method"] == "spin" or t == frozen:
                reference.load_state_dict(policy.state_dict())
            optimizer = kinds[args["optimizer"]](policy.parameters(), **decay)
        places = [i for i in range(len(pairs)) if values["pair/step"][i] == t + 1]
        tokens = sum(len(pairs[i].chosen) for i in places)
        weight = 1.0 if args["loss"] == "orpo" or alone[t] else args["nll_weight"]
        loss = torch.zeros(())
        for i in places:
            prompt, chosen, rejected, _ = pairs[i]
            if alone[t]:
                loss = loss - logps(policy, prompt, chosen).sum() / tokens
                continue
            good, bad = logps(policy, prompt, chosen), logps(policy, prompt, rejected)
            assert good.sum().item() == pytest.approx(
                values["pair/logps/chosen"][i], rel=1e-4, abs=1e-3
            )
            assert bad.sum().item() == pytest.approx(
                values["pair/logps/rejected"][i], rel=1e-4, abs=1e-3
            )
            if args["loss"] == "orpo":
                p, q = good.mean().exp(), bad.mean().exp()
                odds = torch.log(p / (1 - p) / (q / (1 - q)))
                one = -args["orpo_lambda"] * torch.nn.functional.logsigmoid(odds)
            else:
                with torch.no_grad():
                    base = [logps(reference, prompt, side).sum() for side in (chosen, rejected)]
                assert base[0].item() == pytest.approx(
                    values["pair/ref_logps/chosen"][i], rel=1e-4, abs=1e-3
                )
                gap = (good.sum() - base[0]) - (bad.sum() - base[1])
                one = -torch.nn.functional.logsigmoid(values["step/beta"][t] * gap)
            assert one.item() == pytest.approx(values["pair/losses"][i], abs=1e-4)
            loss = loss + one / len(places) - weight * good.sum() / tokens
        optimizer.zero_grad()
        loss.backward()
        grad = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = values["step/lr"][t]
        optimizer.step()
        assert loss.item() == pytest.approx(values["step/loss"][t], abs=1e-5)
        assert grad.item() == pytest.approx(values["step/grad_norm"][t], rel=1e-3)
        assert norm(policy) == pytest.approx(values["step/norm/policy"][t], rel=1e-6)


@pytest.mark.parametrize("name", ["sapo-dpo", "sapo-orpo"])
def test_drawn_pairs_lie_where_the_trace_says_in_a_first_in_first_out_buffer(name: str) -> None:
    values, args = trace(name)
    fresh, drawn, kept = unpack(values, "fresh"), unpack(values), list[Pair]()
    for step in range(1, 7):
        kept += [pair for pair, at in zip(fresh, values["fresh/step"], strict=True) if at == step]
        kept = kept[-args["replay_capacity"] :]
        for i in np.flatnonzero(values["pair/step"] == step):
            assert drawn[i] == kept[values["pair/place"][i]]


@pytest.mark.parametrize("name", ["sapo-dpo", "sapo-orpo"])
def test_fresh_pairs_are_cut_and_spliced_by_the_rules(name: str) -> None:
    values, args = trace(name)
    for pair, (start, stop, new) in zip(
        unpack(values, "fresh"), values["fresh/bounds"], strict=True
    ):
        assert stop - start == min(int(args["segment_length"]), len(pair.chosen))
        assert start <= max(0, len(pair.chosen) - 1 - (stop - start))
        assert pair.rejected[:start] == pair.chosen[:start]
        ended = 256 in pair.rejected[start:new]
        assert pair.rejected[new:] == ([] if ended else pair.chosen[stop:])
    asked = {tuple(pair.prompt) for pair in unpack(values, "fresh")[:24]}
    assert len(asked) == 24  # four batches of six: every row once


def test_the_readmes_checker_tells_a_right_implementation_from_a_wrong_one() -> None:
    shown = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"<!-- check -->\n```python\n(.*?)```", shown, re.DOTALL)
    assert len(code.strip().splitlines()) <= 20
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(GOLDEN / "start", dtype=torch.float32)

    def logp(prompt: np.ndarray, response: np.ndarray) -> float:
        with torch.no_grad():
            return float(logps(model, prompt.tolist(), response.tolist()).sum())

    def dpo_loss(*sums: np.ndarray) -> np.ndarray:
        chosen, rejected, ref_chosen, ref_rejected = sums
        return np.log1p(np.exp(-0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        exec(code, {"logp": logp, "dpo_loss": dpo_loss})
        with pytest.raises(AssertionError):
            exec(code, {"logp": lambda p, r: logp(p, r[1:]), "dpo_loss": dpo_loss})
        with pytest.raises(AssertionError):
            exec(code, {"logp": logp, "dpo_loss": lambda *x: dpo_loss(x[1], x[0], x[3], x[2])})


@pytest.mark.parametrize("name", ["there.st", "nowhere/trace.st", "folder", "", "/proc/trace.st"])
def test_a_trace_that_cannot_be_written_is_an_error_before_anything_starts(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.st").write_text("something of the user's")
    (tmp_path / "folder").mkdir()
    usual = ["--model", str(GOLDEN / "start"), "--data", str(GOLDEN / "rows.jsonl")]
    flags = ["--out", str(tmp_path / "run"), "--trace", str(tmp_path / name) if name else ""]
    assert train.main([*usual, *flags, "--steps", "1"]) == 2
    assert re.fullmatch(r"error: .*(--trace|trace\.st).*\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "there.st").read_text() == "something of the user's"
