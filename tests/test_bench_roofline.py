"""The roofline's counts, against counts by hand, and its prediction, against a step."""

from collections import Counter
from typing import Any

import pytest
import torch
from helpers import script
from torch.nn.functional import silu

import model as lm


def test_a_linear_layer_a_sum_and_a_copy_are_six_kernels() -> None:
    meter, layer = script("meter").Meter(), torch.nn.Linear(5, 7, False, device="meta")
    with meter:
        x = torch.empty(3, 5, device="meta")
        layer(x).sum().backward()  # two products, a sum, and a 1, which is only repeated
        x.view(5, 3).t().copy_(torch.empty(3, 5, device="meta") + 1)
    products = [("matmul", 210, 4 * (15 + 35 + 21)), ("matmul", 210, 4 * (1 + 15 + 35))]
    rest = [("matmul", 0, 4 * (21 + 1)), ("matmul", 0, 4), ("matmul", 0, 120), ("matmul", 0, 120)]
    assert sorted(meter.kernels["rest"].elements()) == sorted(products + rest)


def test_what_is_fused_reads_once_and_writes_what_others_read() -> None:
    meter, (x, w, v) = (
        script("meter").Meter(),
        (torch.empty(n, 5, device="meta") for n in (3, 5, 5)),
    )
    with meter, meter.fusion.block():
        gate, up = x @ w, x @ v
        out = (silu(gate) * up + gate) @ w  # of these three one kernel: it reads two, writes one
    kernels = meter.kernels["rest"]
    assert kernels.total() == meter.costs["rest", "eager"] == 4 and out.shape == (3, 5)
    assert sum(k[2] * n for k, n in kernels.items()) == 3 * 4 * (15 + 25 + 15) + 4 * 3 * 15


def test_the_host_and_links_take_what_kernels_do_not_hide() -> None:
    meter, roofline = script("meter").Meter(), script("roofline")
    meter.kernels["ema"] = Counter({("matmul", 20.0, 1): 3, ("matmul", 0.0, 6): 1})
    counts = {"eager": 4, "call": 1, "wait": 2, "number": 5, "recorded": 7, "pcie": 8, "nvlink": 90}
    meter.costs.update({("ema", name): n for name, n in counts.items()})
    rates = {"matmul": 10.0, "memory": 2.0, "launch": 0.25, "product": 1.0, "eager": 3.0}
    rates |= {"call": 5.0, "wait": 0.5, "number": 0.1, "recorded": 1.0, "pcie": 2.0, "nvlink": 0.25}
    found = roofline.spent(meter, rates, "ema")  # 13 s of kernels
    assert [*found.values()] == pytest.approx([6, 0, 3, 4, 4, 1.5, 7, 16 + 9.5])


def test_the_passes_of_a_tiny_model_have_the_flops_worked_by_hand() -> None:
    roofline, meter = script("roofline"), script("roofline").Meter()
    policy = roofline.source_of("tiny", "meta", (8, 8), ["--precision", "bf16"]).run.policy
    pairs = roofline.shapes.make_pairs(roofline.shapes.SHAPES["tiny"], 0)
    with roofline.watched(meter, True), meter, meter.within("policy"):
        sum(x.sum() for x in lm.pair_token_logprobs(policy, pairs)).backward()
    kernels = [*meter.kernels["policy"].elements()]
    found = [sum(f for k, f, _ in kernels if k == kind) for kind in ("matmul", "attention")]
    # 24 and 20 tokens, 16 and 12 of them scored; what a query sees: 1 to 16, 9 to 16, 13 to 16
    linear, attention = 2 * (18_432 * 44 + 32 * 300 * 28), 4 * (2 * 136 + 100 + 58) * 32 * 2
    assert found == [3 * linear, 3.5 * attention] and meter.useful == sum(found)


def test_a_rank_takes_an_eighth_and_gathers_the_rest() -> None:
    roofline = script("roofline")
    flags = [*roofline.GPU, "--ema-offload", "--batch-size", 16, "--segment-length", 4]
    one = roofline.count("tiny", "meta", (8, 8), flags)
    rank, weights = roofline.rank_of("tiny", (8, 8), flags, one), 37_792
    assert rank.kernels["ema"] == {("matmul", 0.0, 12 * weights / 8): 1}
    passes = {"reference": 2 * 2, "policy": 2 * (2 + 2 + 4)}  # two micro-batches, bytes a weight
    assert {k: rank.costs[k, "nvlink"] for k in passes} == {
        k: 7 / 8 * n * weights for k, n in passes.items()
    }
    assert one.costs["ema", "pcie"] == 8 * weights and not rank.costs["policy", "pcie"]


def test_a_step_takes_about_what_is_predicted_and_compiles_once(capsys: Any) -> None:
    flags = "--size small --measure --quick --reps 1 --prompt 32 --response 32 --batch-size 2"
    script("roofline").main([*flags.split(), "--segment-length", "4"])
    text = capsys.readouterr().out
    assert 0.3 < float(text.split("| all ")[1].splitlines()[0].split("|")[-2].split()[0]) < 5
    assert "eager: [2, 2, 2, 2] graphs after each of four steps, 0 breaks" in text
