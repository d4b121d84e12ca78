"""The roofline's counts, against counts by hand, and its prediction, against a step."""

from typing import Any

import torch
from helpers import script

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


def test_a_step_takes_about_what_is_predicted_and_compiles_once(capsys: Any) -> None:
    flags = "--size small --measure --quick --reps 1 --prompt 32 --response 32 --batch-size 2"
    script("roofline").main([*flags.split(), "--segment-length", "4"])
    text = capsys.readouterr().out
    assert 0.3 < float(text.split("| all ")[1].splitlines()[0].split("|")[-2].split()[0]) < 5
    assert "[2, 2, 2, 2] graphs after each of four steps, 0 breaks" in text
