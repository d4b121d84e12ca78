"""The lessons: each is a small diff that still applies, and does what its first lines say."""

import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes  # noqa: F401, lessons get one of their own
import numpy as np
import pytest
import torch
import transformers
from helpers import GOLDEN, ROOT, metrics, weights
from safetensors.torch import load_file

LESSONS = sorted(path.stem for path in (ROOT / "tests" / "lessons").glob("*.diff"))
MODULES = ("model", "data", "sapo", "sgpo", "sample", "train")
Lesson = Callable[[str], Any]
USUAL = f"--model {GOLDEN}/start --data {GOLDEN}/rows.jsonl --batch-size 6 --max-length 64 "
USUAL += "--lr 2e-4 --warmup 0 --log-every 1"
SAMPLED = "--temperature 1 --top-k 0 --top-p 1"
RIGHT = """from data import right_answer


def right(prompt: str, answer: str) -> bool:
    task = prompt.removeprefix("<|user|>").removesuffix("<|assistant|>")
    return answer.split()[-1:] == right_answer(task).split()[-1:]
"""
EOS = 256  # of the golden start, whose other ids are bytes


def diff(name: str) -> str:
    return (ROOT / "tests" / "lessons" / f"{name}.diff").read_text()


@pytest.fixture
def lesson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lesson:
    """`lesson(name)`: the product's modules with that lesson, which for the rest of the test are
    what an import gives, and the fakes and TRL's comparison of the tests upon them."""

    def get(name: str) -> Any:
        folder = tmp_path / "product"
        folder.mkdir()
        for module in MODULES:
            shutil.copy(ROOT / f"{module}.py", folder)
        alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
        told: Any = {"cwd": folder, "env": alone, "text": True, "capture_output": True}
        done = subprocess.run(["git", "apply", "-"], input=diff(name), check=False, **told)
        assert done.returncode == 0, done.stderr
        monkeypatch.syspath_prepend(folder)
        for module in (*MODULES, "fakes", "test_trl"):
            monkeypatch.setitem(sys.modules, module, None)  # so that what is there now comes back
            del sys.modules[module]
        made = {module: importlib.import_module(module) for module in (*MODULES, "fakes")}
        return SimpleNamespace(folder=folder, **made)

    return get


def run(m: Any, out: Path, flags: str, usual: str = USUAL) -> dict[str, np.ndarray]:
    """Trains with a lesson; the trace of the first steps."""
    trace = out.with_suffix(".safetensors")
    words = [*usual.split(), *shlex.split(flags), "--out", str(out), "--trace", str(trace)]
    assert m.train.main(words) == 0
    return {name: value.numpy() for name, value in load_file(trace).items()}


def sides(trace: dict[str, np.ndarray], which: str = "pair") -> list[tuple[list[int], ...]]:
    """Prompt, chosen and rejected of all pairs of a trace."""
    parts = np.split(trace[f"{which}/tokens"], np.cumsum(trace[f"{which}/lengths"])[:-1])
    tokens = [part.tolist() for part in parts]
    return [tuple(tokens[i : i + 3]) for i in range(0, len(tokens), 3)]


def is_dpos(trace: dict[str, np.ndarray], first: int = 1) -> None:
    """DPO's loss with beta = 0.1 from the step `first` on, where it is ln 2."""
    sums = (
        [trace[f"pair/{kind}logps/{s}"] for kind in ("", "ref_")] for s in ("chosen", "rejected")
    )
    a, b = (policy - reference for policy, reference in sums)
    steps, losses = trace["pair/step"], trace["pair/losses"]
    expected = np.log1p(np.exp(-0.1 * (a - b)))
    np.testing.assert_allclose(losses[steps >= first], expected[steps >= first], rtol=1e-4)
    np.testing.assert_allclose(losses[steps == first], math.log(2), atol=1e-5)
    assert losses[steps > first].std() > 0.01


# ------------------------------------------------------------------------------- all of them


def test_there_are_lessons() -> None:
    assert len(LESSONS) >= 12
    tests = Path(__file__).read_text()
    assert all(f'lesson("{name}")' in tests for name in LESSONS)


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_is_small_and_says_what_it_is_and_how_it_is_run(
    name: str, lesson: Lesson, capsys: Any
) -> None:
    """Five lines of idea, at most 40 of change, in the product's style; its command parses."""
    idea, _, change = diff(name).partition("\n\n--- a/")
    assert len(idea.splitlines()) == 5
    changed = re.findall(r"^[-+](?!-- a/|\+\+ b/)", f"-- a/{change}", re.MULTILINE)
    assert len(changed) <= (70 if name == "lora" else 40)
    m = lesson(name)
    for how in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *how, "--config", str(ROOT / ".ruff.toml"), "-q"]
        done = subprocess.run([*command, str(m.folder)], check=False, capture_output=True)
        assert done.returncode == 0, done.stdout.decode()
    (command,) = re.findall(r"^python (\w+)\.py(.*)", idea, re.MULTILINE)
    flags = command[1].partition("&&")[0].replace(" ...", "")
    getattr(m, command[0]).parse_args(shlex.split(flags, comments=True))
    assert "warning" not in "".join(capsys.readouterr())


# --------------------------------------------------------------------------------- the losses


def start(m: Any, folder: Path) -> Path:
    """A random model with the built-in tokenizer."""
    m.data.write_task_tokenizer(folder)
    sizes = {"vocab_size": 260, "eos_token_id": 256, "hidden_size": 32, "intermediate_size": 48}
    config = m.model.Config.from_dict(m.train.START_MODEL | sizes)
    trl = importlib.import_module("test_trl")
    trl.random_model(config, 3).save_pretrained(folder)
    return folder


def test_sppo_is_trls(lesson: Lesson, tmp_path: Path) -> None:
    """Value, gradient and metrics, as for the product's own losses."""
    m = lesson("sppo")
    trl = importlib.import_module("test_trl")
    compare = trl.test_pair_losses_and_their_gradients_are_those_of_trls_trainer
    compare("sppo", {"loss_type": "sppo_hard"}, start(m, tmp_path / "start"), tmp_path)


def test_simpo_is_trls(lesson: Lesson, tmp_path: Path) -> None:
    """Value, gradient and rewards of its CPO trainer, without the NLL that CPO adds."""
    m = lesson("simpo")
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    trl, folder = importlib.import_module("test_trl"), start(m, tmp_path / "start")
    flags = ("--method", "dpo", "--loss", "simpo", "--beta", "2", "--simpo-margin", "1.2")
    row, mine = trl.ours(folder, trl.pairs(), *flags)
    assert mine.models.keys() == {"policy"}
    theirs = CPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder),
        args=CPOConfig(
            tmp_path / "trl", loss_type="simpo", beta=2, simpo_gamma=1.2, cpo_alpha=0.0,
            use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, max_length=64,
            remove_unused_columns=False,
        ),
        train_dataset=trl.WORDS,
        processing_class=transformers.AutoTokenizer.from_pretrained(folder, pad_token="<|end|>"),
    )  # fmt: skip
    value, logged = theirs.get_batch_loss_metrics(theirs.model, trl.orpo_batch(trl.pairs()))
    value.backward()
    assert row["loss"] == pytest.approx(value.item(), rel=1e-5)
    trl.same_gradients(mine.policy, theirs.model)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert row[key] == pytest.approx(logged[key], rel=1e-4)


# ------------------------------------------------------------------------- where pairs come from


def test_random_takes_other_rows_responses(lesson: Lesson, tmp_path: Path) -> None:
    trace = run(
        lesson("random"), tmp_path / "run",
        f"--method random --beta 0.1 --steps 2 --eval-data {GOLDEN}/rows.jsonl",
    )  # fmt: skip
    _, chosen, rejected = zip(*sides(trace), strict=True)
    for step in (0, 6):
        batch = chosen[step : step + 6]
        assert rejected[step : step + 6] == (batch[-1], *batch[:-1])
    assert all(good != bad for good, bad in zip(chosen, rejected, strict=True))
    is_dpos(trace)


def writers(m: Any, **flags: Any) -> Any:
    """A run whose models answer with their weight. The policy's is 1, and rises by 1 a step."""

    class Writers(m.fakes.Run):  # type: ignore[misc, name-defined]
        def generate(self, model: Any, asked: Any, *_: Any, **__: Any) -> Any:
            super().generate(model, asked)
            return [([int(model.weight.item()), m.fakes.EOS], -1.0) for _ in asked]

    return Writers(lambda _: [], **flags)


def test_tspins_further_pairs_are_the_opponents_answers_over_the_starts(
    lesson: Lesson, tmp_path: Path
) -> None:
    """By hand: iterations begin at steps 0, 2 and 6, with opponents of weights 1, 3 and 7; the
    start has weight 5."""
    m = lesson("tspin")
    rows = [m.data.Pair([1, i], [10 + i, m.fakes.EOS], []) for i in range(4)]
    source = m.sapo.TSPIN(rows, writers(m, batch_size=4))
    source.bounds, source.run.models["start"] = [0, 2, 6, 10], m.fakes.weights(5.0)
    for t in range(10):
        batch = source.before_step(t)
        plain, more = batch[:4], batch[4:]
        newest = 1 if t < 2 else 3 if t < 6 else 7
        assert all(pair.chosen[0] == 10 + pair.prompt[1] for pair in plain)
        now = [pair.prompt for pair in plain if pair.rejected[0] == newest]
        assert [pair.prompt for pair in more] == (now if t >= 2 else [])
        assert all((p.chosen[0], p.rejected[0]) == (newest, 5) for p in more)
        assert len(source.picked) == len(batch)
        source.run.train()
    assert source.run.names.count("start") == 4
    trace = run(m, tmp_path / "run", "--method tspin --rounds 2 --steps 6 --max-new-tokens 12")
    is_dpos(trace)
    assert len(trace["pair/losses"]) > 6 * 6


def test_dittos_kinds_of_pair_have_the_papers_shares(lesson: Lesson, tmp_path: Path) -> None:
    """By hand: of ten pairs seven, two and one. Version k is of the policy's weight 1 + 2k."""
    m = lesson("ditto")
    rows = [m.data.Pair([1, i], [20 + i, m.fakes.EOS], []) for i in range(2)]
    flags = {"batch_size": 10, "responses_per_prompt": 5, "resample_every": 2, "method": "ditto"}
    source, older = m.sapo.DITTO(rows, writers(m, **flags)), set()
    for t in range(8):
        newest, kinds = 1 + 2 * (t // 2), [0, 0, 0]
        again = m.sapo.DITTO(rows, source.run)  # as in a run that is resumed
        again.load_state_dict(source.state_dict())
        batch = source.before_step(t)
        assert again.before_step(t) == batch
        for _, (good, _), (bad, _), _ in batch:
            assert good >= 20 or good == newest > bad
            kinds[2 if good < 20 else bad < newest] += 1
            older |= {bad} - {newest}
        assert kinds == ([7, 2, 1] if t >= 2 else [10, 0, 0])
        source.run.train()
    assert older == {1, 3, 5} and set(source.run.names) == {"policy"}
    flags = "--method ditto --sft-first 2 --steps 4 --resample-every 2 --max-new-tokens 12 "
    trace = run(m, tmp_path / "run", f"{flags} --beta 0.1 --responses-per-prompt 2")
    is_dpos(trace, first=3)  # where the policy is the SFT model, the reference


def test_aepo_stores_rewrites_that_are_near_to_all_and_far_from_each_other(
    lesson: Lesson, tmp_path: Path
) -> None:
    """By hand: A and C are alike, B shares half with them, D nothing with any. The mean similarity
    to the others is 1/2, 1/3, 1/2 and 0; w times that of the two comes off: AC is 1/2 - w, AB
    5/12 - w/2, AD 1/4."""
    m = lesson("aepo")
    rewrites = [m.data.Pair([1], [2], bad) for bad in ([1, 2, 3], [1, 2, 4], [3, 2, 1], [7, 8])]
    choose = lambda k, weight: m.sapo.representative(rewrites, k, weight)  # noqa: E731
    assert choose(2, 0.1) == [0, 2]
    assert choose(2, 0.25) == [0, 1]
    assert choose(2, 0.5) == [0, 3]
    assert choose(1, 1.0) == [0]
    assert choose(9, 1.0) == [0, 1, 2, 3]
    flags = f"--method sapo --segment-length full --steps 1 --responses-per-prompt 4 {SAMPLED}"
    every = sides(run(m, tmp_path / "all", flags), "fresh")
    stored = sides(run(m, tmp_path / "some", f"{flags} --store 2 --store-weight 0.5"), "fresh")
    expected = []
    for i in range(6):
        row = [m.data.Pair(*pair) for pair in every[i::6]]
        assert len({tuple(pair.prompt) for pair in row}) == 1
        expected += [tuple(row[j][:3]) for j in m.sapo.representative(row, 2, 0.5)]
    assert len(every) == 24 and stored == expected


def test_checked_leaves_out_pairs_whose_rejected_side_is_right(
    lesson: Lesson, tmp_path: Path
) -> None:
    """On the built-in tasks, with a checker that looks at the result alone, not at the working."""
    m, file = lesson("checked"), tmp_path / "right.py"
    file.write_text(RIGHT)
    flags = f"--method sapo --segment-length full --steps 1 --responses-per-prompt 4 {SAMPLED}"
    every = sides(run(m, tmp_path / "all", flags), "fresh")
    kept = sides(run(m, tmp_path / "kept", f"{flags} --checker {file}"), "fresh")
    tokenizer, wrong = m.data.load_tokenizer(GOLDEN / "start"), []
    for pair in every:
        prompt = bytes(pair[0][1:-1]).decode()
        result = m.data.right_answer(prompt).split()[-1:]
        wrong += [pair] if tokenizer.response_text(pair[2]).split()[-1:] != result else []
    assert kept == wrong and 0 < len(wrong) < 24
    (row,) = metrics(tmp_path / "kept")
    assert row["segment/right"] == pytest.approx(1 - len(wrong) / 24)
    assert m.train.main([*USUAL.split(), "--out", str(tmp_path / "none"), "--checker", "none"]) == 2


def test_synpos_two_sides_come_from_the_start_and_from_the_improver(
    lesson: Lesson, tmp_path: Path
) -> None:
    m, gold = lesson("synpo"), tmp_path / "gold"
    instruction = "--improver-instruction '{prompt} | {answer}' --max-new-tokens 24"
    run(m, gold, f"--method sgpo --target-source gold --improver-mix 0 --fence-k 0 --steps 1 "
        f"--improver-lr 1e-3 {instruction} {SAMPLED}")  # fmt: skip
    both = f"--method sgpo --improver {GOLDEN}/start --improver-model {gold}/improver --steps 2"
    data = f"--preference-data {GOLDEN}/rows.jsonl"
    rest = USUAL.partition("--data")[2].partition(".jsonl")[2]
    trace = run(m, tmp_path / "run", f"{both} {data} {SAMPLED} --improve-temperature 0 "
                "--max-new-tokens 24 --beta 0.1", rest)  # fmt: skip
    is_dpos(trace)  # so that the policy begins at the start, which is the reference
    np.testing.assert_allclose(trace["pair/logp"], trace["pair/ref_logps/rejected"], atol=1e-3)
    tokenizer = m.data.load_tokenizer(GOLDEN / "start")
    rows = [json.loads(x) for x in (tmp_path / "run" / "pairs.jsonl").read_text().splitlines()]
    said = [f"<|user|>{x['prompt']} | {x['rejected']}<|assistant|>" for x in rows]
    found = {}
    for name, folder in (("improver", gold / "improver"), ("start", GOLDEN / "start")):
        model = m.model.Transformer.from_pretrained(folder)
        new = m.model.generate(
            model, [*map(tokenizer.encode, said)], 24, temperature=0, eos_ids=[EOS]
        )
        found[name] = [tokenizer.response_text(answer) for answer in new]
    assert found["improver"] == [x["chosen"] for x in rows] != found["start"]


# ------------------------------------------------------------------------------------ the trainer


def test_apo_goes_on_along_the_change_of_a_round(lesson: Lesson, tmp_path: Path) -> None:
    """By hand: 3 comes from 1, and goes on to 4. In SPIN's rounds of 1, 2 and 2 steps: after the
    first from the start, after the second from the first one's own result, after the last not."""
    m = lesson("apo")
    policy, before = m.fakes.weights(3.0, 5.0), m.fakes.weights(1.0, 6.0)
    m.sapo.accelerate(policy, before, 0.5)
    assert policy.weight.tolist() == [[4.0, 4.5]] and before.weight.tolist() == [[3.0, 5.0]]
    flags = "--method spin --rounds 3 --max-new-tokens 12 --save-every 1 --steps"
    run(m, tmp_path / "plain", f"{flags} 5")
    run(m, tmp_path / "run", f"{flags} 5 --momentum 0.5")
    at = lambda t, name="policy", out="run": weights(  # noqa: E731
        tmp_path / out / "checkpoints" / f"step-{t}", name
    )
    origin, first = weights(GOLDEN, "start"), at(1, out="plain")
    second = {name: at(3, "state")[f"before.{name}"] for name in first}
    last = {name: at(5, "state")[f"before.{name}"] for name in first}
    for name, value in first.items():
        old = origin[name].float()
        assert torch.allclose(at(1)[name], value + 0.5 * (value - old), atol=1e-6)
        expected = second[name] + 0.5 * (second[name] - value)
        assert torch.allclose(at(3)[name], expected, atol=1e-6)
        assert torch.equal(last[name], second[name])
    assert not torch.equal(at(1)[name], value)


def test_what_tensorboard_is_told_is_in_its_file(lesson: Lesson, tmp_path: Path) -> None:
    m, out = lesson("tensorboard"), tmp_path / "run"
    run(m, out, "--method dpo --steps 3 --tensorboard")
    reading = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    read = reading.EventAccumulator(str(out / "tensorboard" / "metrics"))
    read.Reload()
    rows = metrics(out, ())
    assert [row["step"] for row in rows] == [1, 2, 3]
    for name in rows[0].keys() - {"step", "phase"}:
        told = [(event.step, event.value) for event in read.Scalars(name)]
        assert told == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("tspin", "--method tspin --rounds 2"),
        ("ditto", "--method ditto --sft-first 2 --resample-every 2"),
        ("apo", "--method spin --rounds 3 --momentum 0.5"),
    ],
)
def test_a_lessons_run_that_is_cut_goes_on_and_ends_the_same(
    name: str, flags: str, lesson: Lesson, tmp_path: Path
) -> None:
    m, out = lesson(name), tmp_path / "run"
    words = [*USUAL.split(), *flags.split(), "--steps", "6", "--max-new-tokens", "12"]
    words += ["--save-every", "2", "--out", str(out)]
    assert m.train.main(words) == 0
    whole, rows = weights(out), metrics(out)
    shutil.rmtree(out / "final")
    *_, cut = sorted((out / "checkpoints").iterdir())
    shutil.rmtree(cut)
    assert m.train.main([*words, "--resume"]) == 0
    assert metrics(out) == rows
    assert all(torch.equal(weights(out)[key], value) for key, value in whole.items())


# -------------------------------------------------------------------------------------- the model


def test_qwen3s_logits_are_transformers(lesson: Lesson, tmp_path: Path) -> None:
    """A random model whose heads are wider than its hidden size would make them; the cache too."""
    m = lesson("qwen3")
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model("qwen3", **sizes)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data.normal_(float(parameter.dim() == 1), 0.3, generator=generator)
    theirs.eval().save_pretrained(tmp_path / "qwen3")
    ours = m.model.Transformer.from_pretrained(tmp_path / "qwen3")
    tokens = torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert torch.allclose(ours(tokens), expected, atol=1e-4)
    prompt = tokens[0].tolist()
    new = theirs.generate(tokens[:1], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert m.model.generate(ours, [prompt], 12, temperature=0)[0] == new[0, 19:].tolist()
    fused = m.model.with_weights(ours.config, dict(ours.named_parameters()))
    assert m.model.generate(fused, [prompt], 12, temperature=0)[0] == new[0, 19:].tolist()
    with torch.no_grad():
        assert torch.allclose(fused(tokens), expected, atol=1e-4)


def test_lora_is_pefts_and_its_merged_model_loads_in_transformers(
    lesson: Lesson, tmp_path: Path
) -> None:
    m, out = lesson("lora"), tmp_path / "run"
    peft = importlib.import_module("peft")
    flags = "--method dpo --lora-rank 4 --lora-alpha 12 --steps 4 --save-every 2 --lr 3e-3"
    trace = run(m, out, flags)
    is_dpos(trace)
    origin = {name: value.float() for name, value in weights(GOLDEN, "start").items()}
    trained = weights(out / "checkpoints" / "step-4", "policy")
    assert all(torch.equal(trained[name], value) for name, value in origin.items())
    adapters = {name: value for name, value in trained.items() if name not in origin}
    assert len(adapters) == 2 * sum("self_attn" in name for name in origin)
    assert all(value.abs().sum() > 0 for value in adapters.values())
    pairs = [m.data.Pair(*pair) for pair in sides(trace)]  # the reference is the start to the end
    start = m.model.Transformer.from_pretrained(GOLDEN / "start")
    with torch.no_grad():
        found = m.model.pair_logprobs(start, pairs)[0]
    np.testing.assert_allclose(trace["pair/ref_logps/chosen"], found.numpy(), rtol=1e-4, atol=1e-4)

    base = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "start", dtype=torch.float32)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=12, target_modules=names))
    for name, value in adapters.items():
        place = name.replace(".lora.a", ".lora_A.default.weight")
        place = place.replace(".lora.b", ".lora_B.default.weight")
        adapted.get_parameter(f"base_model.model.{place}").data.copy_(value)
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "final")
    c = m.train.parse_args([*USUAL.split(), *flags.split()])
    learner = m.train.Learner(c, GOLDEN / "start", m.data.load_tokenizer(GOLDEN / "start"),
                              m.train.Ranks())  # fmt: skip
    ours, reference = learner.policy, learner.models["reference"]
    same = [(p.data_ptr(), dict(ours.named_parameters())[name].data_ptr())
            for name, p in reference.named_parameters()]  # fmt: skip
    assert all(a == b for a, b in same)  # one copy of the weights
    tokens = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(tokens), reference(tokens))
        for name, value in adapters.items():
            ours.get_parameter(name).copy_(value)
        expected = adapted(tokens).logits
        assert torch.allclose(ours(tokens), expected, atol=1e-4)
        assert torch.allclose(merged(tokens).logits, expected, atol=1e-4)
        assert not torch.allclose(reference(tokens), expected, atol=0.01)
        fused = m.model.with_weights(ours.config, ours.merged())
        assert torch.allclose(fused(tokens), expected, atol=1e-4)

    whole = weights(out)  # resumed from the middle it ends the same
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints" / "step-4")
    assert m.train.main([*USUAL.split(), *flags.split(), "--out", str(out), "--resume"]) == 0
    assert all(torch.equal(weights(out)[name], value) for name, value in whole.items())
    with pytest.raises(m.model.InputError, match="lora-rank"):
        m.train.parse_args(["--method", "spin", "--lora-rank", "2"])
