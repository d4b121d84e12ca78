"""The model against transformers and against itself: what it computes, draws, reads, refuses."""

import json
import math
import os
import random
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tape
import torch
import torch.nn.functional as F
import transformers
import varlen_cpu
from conftest import TINY, VARIANTS, tiny
from safetensors.torch import load_file, save_file

import model as lm
from model import (
    Config,
    InputError,
    Linear,
    Packed,
    Transformer,
    generate,
    pair_logprobs,
    sample_tokens,
)

KINDS = list(VARIANTS)


def random_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def random_prompts(lengths: list[int], seed: int = 2) -> list[list[int]]:
    """Prompts without token 0, which transformers' generate would take for padding."""
    rng = random.Random(seed)
    return [[rng.randrange(1, 97) for _ in range(length)] for length in lengths]


def hf_greedy(model: Any, prompt: list[int], count: int, eos: int | None = None) -> list[int]:
    tokens = torch.tensor([prompt])
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens))
    return out[0, len(prompt) :].tolist()


def hf_logprob(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The summed log-prob of a response, the plain way: its own row, full logits."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    targets = torch.tensor(response, dtype=torch.int64)[:, None]
    return logits.float().log_softmax(-1).gather(1, targets).sum()


def ours_from(model: Any, scale: float = 1.0) -> Transformer:
    """Our model with the weights of transformers', or so much of them, without a file."""
    ours = Transformer(Config.from_dict(model.config.to_dict()))
    theirs = {name: weight * scale for name, weight in model.state_dict().items()}
    lacks = ours.load_state_dict(theirs, strict=False)
    assert not lacks.missing_keys and set(lacks.unexpected_keys) <= {"lm_head.weight"}
    return ours


# ------------------------------------------------------------------------------------ the logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind: str, tiny_checkpoint: Any) -> None:
    """With the config as transformers 5 writes it, and as 4 wrote it."""
    folder, theirs = tiny_checkpoint(kind)
    new = Transformer.from_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if rope["rope_type"] == "linear":  # its oldest spelling
        rope["type"] = rope.pop("rope_type")
    raw["torch_dtype"] = raw.pop("dtype")
    if kind != "qwen2-layer-types":
        raw.pop("layer_types", None)
    if kind == "qwen2":
        raw["sliding_window"] = 5  # without use_sliding_window, this does nothing
    (folder / "config.json").write_text(json.dumps(raw))
    old, tokens = Transformer.from_pretrained(folder), random_tokens(3, 60)
    with torch.no_grad():
        for ours in (new, old):
            torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_variants_differ_from_each_other() -> None:
    """The tests above would prove little if a window, a bias or a RoPE changed nothing."""
    tokens = random_tokens(1, 40)
    with torch.no_grad():
        base = ours_from(tiny("llama"))(tokens)
        for kind in ("llama-rope-llama3", "llama-rope-linear", "mistral-window", "qwen2-window"):
            changed = ours_from(tiny(kind, num_key_value_heads=4))(tokens)
            assert (changed - base).abs().max() > 0.1, kind


def test_real_model_gives_transformers_logits_and_answers(smollm2: Path) -> None:
    ours = Transformer.from_pretrained(smollm2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=5e-4, rtol=0)
    answer = generate(ours, [prompt], 12, temperature=0, eos_ids=[2])[0]
    assert answer == hf_greedy(theirs, prompt, 12, eos=2)
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("saved", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_load_into_the_dtype_asked_for(
    dtype: torch.dtype, saved: torch.dtype, tmp_path: Path
) -> None:
    theirs = tiny("llama-gqa-untied").to(saved)
    theirs.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path, dtype=dtype)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight.to(dtype)), name
    assert ours.dtype == dtype and ours(random_tokens(1, 5)).dtype == dtype


# ------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_equals_transformers(kind: str) -> None:
    """Prompts on either side of the window, which decoding also passes."""
    theirs = tiny(kind)
    ours = ours_from(theirs)
    prompts = random_prompts([3, 1, 30, 6, 11])
    wanted = [hf_greedy(theirs, prompt, 16) for prompt in prompts]
    assert generate(ours, prompts, 16, temperature=0) == wanted
    assert generate(ours, prompts, 16, temperature=0, batch_size=2) == wanted


@pytest.mark.parametrize("kind", ["llama-gqa-tied", "mistral-window", "qwen2-window"])
def test_logprobs_of_generation_are_those_of_scoring(kind: str) -> None:
    ours = ours_from(tiny(kind))
    prompts = random_prompts([4, 20, 9])
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 3, "eos_ids": [5, 6]}
    tokens, logprobs = generate(ours, prompts, [5, 18, 9], return_logprobs=True, **options)
    assert tokens == generate(ours, prompts, [5, 18, 9], **options)
    pairs = [(p, t, []) for p, t in zip(prompts, tokens, strict=True)]
    with torch.no_grad():
        scored = lm.pair_token_logprobs(ours, pairs)[1::3]
    for collected, again in zip(logprobs, scored, strict=True):
        torch.testing.assert_close(torch.tensor(collected), again, atol=1e-4, rtol=0)


def test_draws_depend_on_the_rows_own_seed_alone() -> None:
    ours = ours_from(tiny("llama-gqa-untied"))
    prompts, seeds = random_prompts([4, 20, 9, 1, 9, 33]), [11, 12, 13, 14, 15, 16]
    budgets, options = [12, 5, 12, 7, 3, 9], {"temperature": 0.9, "top_p": 0.95, "eos_ids": [5]}
    together = generate(ours, prompts, budgets, seed=seeds, **options)
    for batch_size in (1, 2, 4):
        again = generate(ours, prompts, budgets, seed=seeds, batch_size=batch_size, **options)
        assert again == together
    for i, alone in enumerate(together):
        assert generate(ours, [prompts[i]], budgets[i], seed=[seeds[i]], **options) == [alone]
    longer = generate(ours, prompts, 20, seed=seeds, **options)
    assert [row[:budget] for row, budget in zip(longer, budgets, strict=True)] == together
    backwards = generate(ours, prompts[::-1], budgets[::-1], seed=seeds[::-1], **options)
    assert backwards[::-1] == together


def test_an_int_seed_gives_each_row_its_own_stream() -> None:
    ours = ours_from(tiny("llama"))
    same = [[1, 2, 3]] * 4
    rows = generate(ours, same, 12, temperature=3.0, seed=7)
    assert len({tuple(row) for row in rows}) == 4
    assert rows == generate(ours, same, 12, temperature=3.0, seed=7)
    assert rows != generate(ours, same, 12, temperature=3.0, seed=8)
    assert rows[:2] == generate(ours, same[:2], 12, temperature=3.0, seed=7)


FILTERS = [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 7, 1.0), (1.7, 0, 0.8), (0.8, 12, 0.7)]
FILTERS += [(2.0, 96, 0.95), (1.0, 3, 1.0), (1.0, 500, 1.0), (1.0, 1, 0.01), (1.0, 0, 1e-9)]


@pytest.mark.parametrize("temperature, top_k, top_p", FILTERS)
def test_sampling_distribution_is_transformers(
    temperature: float, top_k: int, top_p: float
) -> None:
    """Every number of a fine grid is drawn once: frequencies are probabilities to within 1/grid."""
    logits = torch.randn(5, 97, generator=torch.Generator().manual_seed(4)) * 2
    if top_p == 1:  # ties, which top-k keeps or cuts together, and top-p in no fixed order
        logits[0, 3:9] = logits[0].max()
    warped = logits / temperature
    if top_k:
        warped = transformers.TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = transformers.TopPLogitsWarper(top_p)(None, warped)
    wanted = warped.double().softmax(-1)
    grid = 4000
    uniforms = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    rows = logits.repeat(grid, 1)  # all rows in one batch, each of which must not see the others
    drawn = lm.sample_tokens(rows, uniforms.repeat_interleave(5), temperature, top_k, top_p)
    for row, probs in zip(drawn.view(grid, 5).T, wanted, strict=True):
        frequencies = row.bincount(minlength=97) / grid
        assert not frequencies[probs == 0].any()
        assert set(row.tolist()) >= set((probs > 2 / grid).nonzero()[:, 0].tolist())
        assert (frequencies - probs).abs().max() <= 1 / grid + 1e-6


def test_the_ends_of_the_unit_interval_are_tokens_with_probability() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert lm.sample_tokens(logits, ends, 1.0, 0, 1.0).tolist() == [1, 3]


def test_generated_frequencies_are_the_models_probabilities() -> None:
    ours, prompt, count = ours_from(tiny("llama")), [5, 6, 7], 3000
    with torch.no_grad():
        probs = (ours(torch.tensor([prompt]))[0, -1] / 4).softmax(-1)
    rows = generate(ours, [prompt] * count, 1, temperature=4.0, seed=1, batch_size=count)
    seen = Counter(row[0] for row in rows)
    for token, p in enumerate(probs.tolist()):
        assert abs(seen[token] / count - p) < 5 * math.sqrt(p * (1 - p) / count) + 1e-3


def test_rows_stop_at_eos_and_at_their_budgets() -> None:
    ours = ours_from(tiny("llama"))
    prompts = random_prompts([4, 7, 2, 5])
    free = generate(ours, prompts, 20, temperature=0)
    eos = [free[0][3], free[1][6]]
    budgets = [20, 20, 0, 2]
    stopped = generate(ours, prompts, budgets, temperature=0, eos_ids=eos)
    for row, whole, budget in zip(stopped, free, budgets, strict=True):
        ends = [i + 1 for i, token in enumerate(whole) if token in eos]
        assert row == whole[: min([*ends, budget])]
    assert stopped[0][-1] in eos and stopped[2] == [] and len(stopped[3]) <= 2
    assert generate(ours, [], 5) == [] and generate(ours, prompts, 0) == [[]] * 4


def test_tokens_are_told_as_they_come() -> None:
    """Each row's in order, of one pass at a time, and its draws are those of a run unwatched."""
    ours = ours_from(tiny("llama"))
    prompts, told = random_prompts([3, 9, 1, 5]), dict[int, list[list[int]]]()
    how: dict[str, Any] = {"seed": 3, "temperature": 2.0, "eos_ids": [7, 11], "batch_size": 3}
    rows = generate(ours, prompts, [9, 1, 30, 0], **how)

    def watch(row: int, tokens: list[int]) -> None:
        told.setdefault(row, []).append(tokens)

    assert generate(ours, prompts, [9, 1, 30, 0], watch=watch, **how) == rows
    assert told == {i: [rows[i][: n + 1] for n in range(len(rows[i]))] for i in range(3)}
    told.clear()
    drafts = [[*row, 5] for row in rows]
    for i, row in enumerate(generate(ours, prompts, 30, drafts=drafts, watch=watch, **how)):
        assert told[i][-1] == row and all(row[: len(x)] == x for x in told[i])


def test_a_row_that_has_stopped_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, rows = ours_from(tiny("mistral-window")), []
    forward = Transformer.forward

    def spy(self: Transformer, tokens: torch.Tensor, layout: Any = None) -> torch.Tensor:
        rows.append(tokens.numel())
        return forward(self, tokens, layout)

    monkeypatch.setattr(Transformer, "forward", spy)
    budgets, lengths = [9, 1, 4, 12, 4, 2], [3, 14, 8, 8, 2, 5]
    answers = generate(ours, random_prompts(lengths), budgets, seed=5)
    assert [len(answer) for answer in answers] == budgets
    assert rows[0] == sum(lengths)  # and padding costs nothing
    assert rows[1:] == [sum(budget > step for budget in budgets) for step in range(1, 12)]


DECODED = ["llama-gqa-tied", "mistral-window", "qwen2-window"]
HOW = {"greedy": (0.0, 0, 1.0), "sampled": (1.3, 0, 0.95), "filtered": (0.8, 20, 0.9)}


def decoded(asked: list[Any], ours: Transformer, how: str, record: Any = None) -> Any:
    """Tokens and log-probs of `_decode`, where some tokens end a row unless greedy ones do."""
    temperature, top_k, top_p = HOW[how]
    pick = partial(sample_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    rows = lm._decode(ours, asked, pick, set(range(40, 44)) if temperature else set(), record)
    return [[token for token, _ in row] for row in rows], [logp for row in rows for _, logp in row]


@pytest.mark.parametrize("kind", DECODED)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("on", [False, True], ids=["by hand", "one kernel"])
def test_replayed_steps_give_the_tokens_of_plain_ones(
    kind: str, how: str, on: bool, kernel: Callable[[bool], None]
) -> None:
    """As a CUDA graph replays them: without Python, and whatever has died is garbage."""
    ours, recorded = ours_from(tiny(kind)), []

    def record(step: Callable[[], None]) -> Any:
        recorded.append(step)
        return tape.record(step)

    budgets = [20, 1, 60, 12, 61, 2, 30, 63]
    prompts = random_prompts([3, 14, 8, 8, 2, 5, 100, 90])
    asked = [(*row, []) for row in zip(prompts, budgets, range(8), strict=True)]
    tokens, logps = decoded(asked, ours, how)
    kernel(on)
    replayed, scores = decoded(asked, ours, how, record)
    assert replayed == tokens
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(logps), atol=1e-4, rtol=1e-5)
    assert 1 <= len(recorded) <= 4  # 8 rows, then at most 4, 2 and 1, whatever they store
    right = [[*row[:5], 3, *row[5:20], *row[24:]] for row in tokens]
    asked = [(*row[:3], guess) for row, guess in zip(asked, right, strict=True)]
    assert decoded(asked, ours, how, record)[0] == tokens


@pytest.mark.parametrize("kind", DECODED)
@pytest.mark.parametrize("how", HOW)
def test_a_draft_changes_no_token_and_saves_steps(
    kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, steps, step = ours_from(tiny(kind)), [], lm.Cache.step
    monkeypatch.setattr(
        lm.Cache, "step", lambda self: (steps.append(self.fed_BW.shape), step(self))
    )
    monkeypatch.setattr(lm, "WIDTHS", (4,))
    budgets, prompts = [40, 1, 33, 12, 39], random_prompts([3, 14, 8, 2, 30])
    asked = [(*row, []) for row in zip(prompts, budgets, range(5), strict=True)]
    tokens, logps = decoded(asked, ours, how)
    plain = len(steps)
    assert {shape[1] for shape in steps} == {1} and plain == max(map(len, tokens)) - 1
    # The draft itself; a word mended, two words more, two fewer; the prompts; other rows'; noise.
    mended = [[*r[:5], 3, *r[6:12], 4, 5, *r[12:20], *r[22:]] for r in tokens]
    for drafts in (tokens, mended, prompts, tokens[::-1], random_prompts([50] * 5), [[]] * 5):
        steps.clear()
        again = [(*row[:3], draft) for row, draft in zip(asked, drafts, strict=True)]
        found, scores = decoded(again, ours, how)
        assert found == tokens
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(logps), atol=1e-4, rtol=1e-4)
        if drafts is tokens:
            assert len(steps) == math.ceil(plain / 4)
        if drafts is mended and how != "greedy":  # whose rows repeat themselves
            assert len(steps) <= math.ceil(plain / 4) + 6


def test_a_draft_goes_on_behind_what_was_made_last() -> None:
    draft = [1, 2, 3, 1, 2, 4, 5]
    assert lm.go_on(draft, [1, 2], 0) == 2 and lm.go_on(draft, [1, 2], 4) == 5
    assert lm.go_on(draft, [9, 3, 1, 2], 0) == 5  # the longer n-gram wins over the nearer
    assert lm.go_on(draft, [9], 3) == lm.go_on(draft, [4, 5], 3) == 7 and lm.go_on([], [1], 0) == 0


def test_how_many_are_guessed_follows_what_was_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([5.0, 6.0, 7.0, 7.5, 17.0, 18.0])
    monkeypatch.setattr(lm, "WIDTHS", (4, 1))
    monkeypatch.setattr(lm.time, "perf_counter", lambda: next(now))
    drafts, seen = lm.Drafts([[1, 2, 3], []]), []
    # The prompts' pass is not looked at; then 4 tokens a second, 2 and 8, and 2 in 9.5 seconds.
    for made in (2, 6, 8, 12, 14):
        answers = [[(1, 0.0)] * (made - 1), [(9, 0.0)]]
        seen.append([len(part) for part in drafts.guess([0, 1], answers)])
    assert seen == [[3, 3], [0, 0], [3, 3], [3, 3], [3, 3]]
    assert drafts.rates[4] == pytest.approx((6.06 + 2 / 9.5) / 2, 0.02)
    assert lm.Drafts([[], []]).guess([0, 1], [[(1, 0.0)]] * 2) == [[], []]


def test_recordings_share_a_pool_that_outlives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA refuses a pool whose graphs are all gone; every new pool would hold on to memory."""
    pools: list[Any] = []

    class Graph:
        def capture_begin(self, pool: Any = None) -> None:
            assert not pools or (pool is not None and pool() is not None)
            pools.append(pool)

        capture_end = replay = lambda self: None

        def pool(self) -> Any:
            return weakref.ref(self)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(lm, "SIDE", lambda: stream)
    monkeypatch.setattr(lm, "LAST", [])
    for _ in range(3):  # of each only this module's reference is left
        lm.record_graph(lambda: None)
    assert len(pools) == 3 and pools[0] is None


def test_float_logits_are_differentiable_where_a_gradient_is_wanted() -> None:
    """Their product in bf16 on a GPU (the meta device stands in for it) has no gradient."""
    x, head = (torch.zeros(n, 8, device="meta", dtype=torch.bfloat16) for n in (3, 5))
    lm.float_logits(x.requires_grad_(), head).sum().backward()
    with torch.no_grad():
        assert lm.float_logits(x, head).dtype == torch.float32 and x.grad is not None


def test_prompts_are_taken_in_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, prompts, passes = ours_from(tiny("mistral-window")), random_prompts([9, 3, 30, 4, 5]), []
    whole = generate(ours, prompts, 6, return_logprobs=True)
    begin = Packed.__init__
    monkeypatch.setattr(Packed, "__init__", lambda *a: (passes.append(a[1]), begin(*a))[1])
    monkeypatch.setattr(lm, "PREFILL", 60)
    some = generate(ours, prompts, 6, return_logprobs=True)
    assert passes == [[3, 4], [5, 9], [30]] and some[0] == whole[0]
    both = (torch.tensor([x for row in side[1] for x in row]) for side in (some, whole))
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama-gqa-tied", "qwen2-window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_for_decoding_is_the_same_model(kind: str, dtype: torch.dtype) -> None:
    """Of its matrices some are one, and all are laid out anew; the model itself is left alone."""
    ours, prompts = ours_from(tiny(kind, hidden_size=64)).to(dtype), random_prompts([3, 14, 8])
    before = {name: (p.data_ptr(), p.clone()) for name, p in ours.named_parameters()}
    fast = ours
    for rows in (0, 3):  # the second time of one that is made so already
        weights = {name: p.detach() for name, p in fast.named_parameters()}
        fast = lm.with_weights(ours.config, weights, rows)
        assert not weights and (rows or len([*fast.parameters()]) <= len(before))
        assert all(
            (x.packed is not None) == bool(rows) for x in fast.modules() if type(x) is Linear
        )
        close = (
            {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
        )
        found = [
            lm._decode(m, [(p, 9, 1, []) for p in prompts], GREEDY, set(), None)
            for m in (ours, fast)
        ]
        for want, got in zip(*found, strict=True):
            assert dtype != torch.float32 or [t for t, _ in got] == [t for t, _ in want]
            torch.testing.assert_close(torch.tensor(got[0][1]), torch.tensor(want[0][1]), **close)
    assert all(
        p.data_ptr() == before[n][0] and torch.equal(p, before[n][1])
        for n, p in ours.named_parameters()
    )


GREEDY = partial(sample_tokens, temperature=0.0, top_k=0, top_p=1.0)
NONSENSE = [("prompts", [[]]), ("max_new_tokens", -1), ("max_new_tokens", [1, 2]), ("seed", [1, 2])]
NONSENSE += [("temperature", -0.1), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0)]
NONSENSE += [("top_p", 1.5), ("batch_size", 0), ("drafts", [[]] * 9)]


@pytest.mark.parametrize("name, value", NONSENSE)
def test_generate_refuses_nonsense(name: str, value: Any) -> None:
    ours = ours_from(tiny("llama"))
    with pytest.raises(ValueError, match="generate needs"):
        generate(ours, **{"prompts": [[1, 2]], "max_new_tokens": 3} | {name: value})


# ----------------------------------------------------------------------------------------- pairs

PAIRS = [  # (prompt, chosen, rejected): where they part, and which side ends first
    ([1, 2, 3], [4, 5, 6, 7, 8], [4, 5, 9, 10]),
    ([1] * 20, [4, 5], [4, 5, 6]),
    ([9], [4, 5, 6, 11, 12, 13, 14], [4, 5]),
    ([3, 4], [7, 7], [7, 7]),
    ([5, 6, 7, 8], [10, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29]),
    ([5], [1], [2]),
    ([8, 8, 8], [1, 2, 3, 4], []),
]


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_equal_two_separate_sequences(kind: str) -> None:
    """Values, counts and gradients, with random weights on the terms so that nothing cancels."""
    theirs = tiny(kind)
    ours = ours_from(theirs)
    weights = torch.randn(2, len(PAIRS), generator=torch.Generator().manual_seed(6))
    more = [(*pair, object()) for pair in PAIRS]  # what a pair holds beside its sides is not read
    chosen, rejected, n_chosen, n_rejected = pair_logprobs(ours, more)
    ((chosen * weights[0]).sum() + (rejected * weights[1]).sum()).backward()
    wanted = [[hf_logprob(theirs, p, r) for r in (c, d)] for p, c, d in PAIRS]
    sum((w * v).sum() for w, v in zip(weights.T, map(torch.stack, wanted), strict=True)).backward()

    assert chosen.dtype == rejected.dtype == torch.float32
    assert n_chosen.tolist() == [len(c) for _, c, _ in PAIRS]
    assert n_rejected.tolist() == [len(r) for _, _, r in PAIRS]
    for side, got in enumerate((chosen, rejected)):
        want = torch.stack([row[side] for row in wanted])
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4 * scale, rtol=1e-3)


def test_a_shared_prefix_is_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    monkeypatch.setattr(
        lm.Branches, "read", lambda self, x, head: widths.append(x.shape[0]) or x.sum(1)
    )
    ours, pair = ours_from(tiny("llama")), ([1] * 10, [2] * 5 + [3], [2] * 5 + [4, 5], object())
    layout = lm.Branches([pair], ours.device)
    ours(layout.tokens, layout)
    assert widths == [10 + 5 + 1 + 2] == [lm.tree_size(pair)]


def graded(ours: Transformer) -> list[torch.Tensor]:
    """The log-probs of PAIRS, and the gradients of a loss of both sides."""
    ours.zero_grad()
    chosen, rejected, *_ = pair_logprobs(ours, PAIRS)
    (chosen - rejected).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in ours.parameters()]
    return [chosen.detach(), rejected.detach(), *gradients]


def test_pairs_without_a_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a prompt"):
        pair_logprobs(ours_from(tiny("llama")), [([], [1], [2])])


def test_bf16_compute_on_fp32_weights_is_close_and_gives_fp32_gradients() -> None:
    ours = ours_from(tiny("llama-gqa-tied"), 0.3)
    with torch.no_grad():
        exact = pair_logprobs(ours, PAIRS)[0]
    ours.compute_dtype = torch.bfloat16
    rounded = pair_logprobs(ours, PAIRS)[0]
    rounded.sum().backward()
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, atol=0.1, rtol=0.02)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())
    assert ours(random_tokens(1, 4)).dtype == torch.bfloat16
    assert len(generate(ours, [[1, 2], [3]], 4)[0]) == 4


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches torch's one kernel for all sequences on, which is on the CPU here."""
    return lambda on: monkeypatch.setattr(
        lm, "has_kernel", varlen_cpu.has_kernel if on else lambda *_: False
    )


KERNEL_KINDS = ["llama-gqa-untied", "llama-head-dim", "mistral-window", "qwen2-window"]


@pytest.mark.parametrize("kind", KERNEL_KINDS)
def test_one_kernel_and_checkpointing_compute_the_same(
    kind: str, kernel: Callable[[bool], None]
) -> None:
    """Prefixes, windows, grouped heads; the values, and their gradients."""
    ours, found = ours_from(tiny(kind)), []
    for on in (False, True):
        kernel(on)
        ours.checkpointing = False
        found.append(graded(ours))
        ours.checkpointing = True
        assert all(torch.equal(a, b) for a, b in zip(graded(ours), found[-1], strict=True))
    for got, want in zip(found[1], found[0], strict=True):
        scale = want.abs().max().item()
        torch.testing.assert_close(got, want, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("kind", KERNEL_KINDS)
def test_one_kernel_in_bf16_is_as_near_to_fp32_as_the_slow_path(
    kind: str, kernel: Callable[[bool], None]
) -> None:
    ours, found = ours_from(tiny(kind), 0.3), []
    for on, ours.compute_dtype in ((False, None), (False, torch.bfloat16), (True, torch.bfloat16)):
        kernel(on)
        ours.zero_grad()
        chosen, rejected, *_ = pair_logprobs(ours, PAIRS)
        (chosen - rejected).sum().backward()
        found.append((chosen.detach(), torch.cat([p.grad.flatten() for p in ours.parameters()])))
    for exact, slow, fast in zip(*found, strict=True):
        assert 0 < (fast - exact).norm() < 1.5 * (slow - exact).norm()


@pytest.mark.parametrize("kind", KERNEL_KINDS)
def test_one_kernel_takes_prompts_and_plain_rows_in(
    kind: str, kernel: Callable[[bool], None]
) -> None:
    ours, found = ours_from(tiny(kind)).requires_grad_(False), []
    prompts, tokens = random_prompts([3, 14, 8, 1, 20]), random_tokens(2, 30)
    for on in (False, True):
        kernel(on)
        cache = lm.Cache(ours, [(p, 10, 0) for p in prompts], GREEDY, 1)
        for i in range(3):
            cache.fed_BW.copy_(torch.arange(5)[:, None] + i)  # the same on both sides
            cache.step()
        found.append([cache.made_2BS, cache.keys, cache.values, ours(tokens)])
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)


def test_a_block_compiles_whole_and_once_for_all_layers_and_batches(
    kernel: Callable[[bool], None],
) -> None:
    """Two windows, with gradients and without: four graphs for twelve layers, and no break."""
    layers = {"num_hidden_layers": 12, "max_window_layers": 6}
    ours = ours_from(tiny("qwen2-window", **layers))
    kernel(True)
    want = pair_logprobs(ours, PAIRS)[0]
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in ours.model["layers"]:
        block.compile(fullgraph=True, dynamic=True, backend=count)
    for batch in (PAIRS, PAIRS[:3], PAIRS[2:], PAIRS[4:6]):
        pair_logprobs(ours, batch)[0].sum().backward()
        with torch.no_grad():
            got = pair_logprobs(ours, batch)[0]
    assert len(graphs) == 4
    torch.testing.assert_close(got, want[4:6], atol=1e-4, rtol=1e-5)
    torch._dynamo.reset()


def test_where_a_gpu_has_no_kernel_the_heads_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fused kernel for CUDA takes fp32 and grouped heads (the meta device stands in for it)."""
    heads: list[tuple[int, int, bool]] = []
    real = F.scaled_dot_product_attention

    def spy(q: Any, k: Any, v: Any, enable_gqa: bool = False, **more: Any) -> torch.Tensor:
        heads.append((q.shape[1], k.shape[1], enable_gqa))
        return real(q, k, v, enable_gqa=enable_gqa, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    config = Config.from_dict({**TINY, "model_type": "llama", "num_key_value_heads": 2})
    for device, want in (("cpu", (4, 2, True)), ("meta", (4, 4, False))):
        with torch.device(device):
            ours = Transformer(config)
            ours(torch.zeros(2, 5, dtype=torch.int64))
        assert set(heads) == {want}
        heads.clear()


def test_the_kernel_is_asked_for_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    half, cuda = torch.bfloat16, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert lm.has_kernel(cuda, half, 128) and lm.has_kernel(cuda, torch.float16, 8)
    assert not lm.has_kernel(cuda, torch.float32, 128)
    assert not lm.has_kernel(torch.device("cpu"), half, 128)
    assert not lm.has_kernel(cuda, half, 12) and not lm.has_kernel(cuda, half, 264)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not lm.has_kernel(cuda, half, 128)


def test_a_gpu_is_used_by_the_tests_only_where_it_is_asked_for() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] or not torch.cuda.is_available()


@pytest.mark.parametrize("kept", [0, 97 * 200, 2**26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_in_chunks_and_their_gradients_are_those_of_the_whole(
    kept: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm, "LOGITS", {"cpu": 97 * 128})
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 16, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(97, 16, generator=generator).requires_grad_()
    targets = torch.randint(97, (300,), generator=generator)
    weights = torch.randn(300, generator=generator)
    logits = F.linear(x, head.to(dtype)).float()
    want = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    want_x, want_head = torch.autograd.grad((want * weights).sum(), (x, head))
    got = lm.TokenLogprobs.apply(x, head, targets, kept)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    near = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.02}
    for _ in range(2):  # the second time nothing that was kept is left
        loss = (got * weights).sum()
        got_x, got_head = torch.autograd.grad(loss, (x, head), retain_graph=True)
        assert got_x.dtype == dtype and got_head.dtype == torch.float32
        torch.testing.assert_close(got_x, want_x, **near)
        torch.testing.assert_close(got_head, want_head, **near)
    assert lm.TokenLogprobs.apply(x[:0], head, targets[:0], kept).shape == (0,)


def test_the_head_runs_at_response_positions_alone_a_chunk_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = ours_from(tiny("llama"))
    heads, linear = [], F.linear

    def spy(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        if weight.shape[0] == 97:
            heads.append(x.shape[:-1].numel())
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    monkeypatch.setattr(lm, "LOGITS", {"cpu": 97 * 128})
    long = [([1] * 50, [2] * 300, [3] * 300), ([1] * 400, [2] * 9, [2] * 9)]
    with torch.no_grad():
        pair_logprobs(ours, long)
    assert max(heads) <= 128 and sum(heads) == 300 + 300 + 9
    for keep, again in ((2**26, 0), (97 * 256, 609 - 256), (0, 609)):
        monkeypatch.setattr(lm, "KEPT", {"cpu": keep})
        heads.clear()
        pair_logprobs(ours, long)[0].sum().backward()
        assert sum(heads) == 609 + again


# ------------------------------------------------------------------------------ reading and writing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_models_load_back_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = tiny(kind)
    ours = ours_from(theirs).to(dtype)
    ours.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path, dtype=dtype)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert type(model) is type(theirs) and model.dtype == dtype
    assert not any(info.values())
    loaded = model.state_dict()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
        assert torch.equal(weight, loaded[name]), name
    with torch.no_grad():
        logits = ours.float()(random_tokens(1, 20))
        assert (model.float()(random_tokens(1, 20)).logits - logits).abs().max() < 1e-4


def test_large_models_are_sharded_and_a_folder_holds_the_last_saved_in_it(tmp_path: Path) -> None:
    first, second = (ours_from(tiny("llama-gqa-untied", seed=seed)) for seed in (1, 2))
    for ours, most in ((first, 5 * 10**9), (second, 20_000), (first, 5 * 10**9)):
        weights = dict(ours.named_parameters())
        lm.write_config(tmp_path, ours.config, ours.dtype)
        lm.write_weights(tmp_path, weights, shard_bytes=most)
        again = Transformer.from_pretrained(tmp_path).state_dict()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
        for name, weight in weights.items():
            assert torch.equal(weight, again[name]) and torch.equal(weight, theirs[name])
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        _, *others = load_file(file).values()
        assert sum(4 * t.numel() for t in others) <= 20_000


@pytest.mark.parametrize("shard_bytes", [16, 10**9])
def test_any_tensors_are_written_and_read_by_name(shard_bytes: int, tmp_path: Path) -> None:
    tree = {
        "a": torch.arange(6, dtype=torch.float64).view(2, 3),
        "b.step": torch.tensor(3.0),
        "none": torch.zeros(0, dtype=torch.int64),
        "c": torch.tensor([2**62, -1]),
    }
    lm.write_weights(tmp_path, tree, shard_bytes=shard_bytes)
    read = lm.Tensors(tmp_path)
    assert read.keys() == tree.keys() and len(read) == 4 and "d" not in read
    for name, value in tree.items():
        assert torch.equal(read[name], value) and read[name].dtype == value.dtype
    with pytest.raises(KeyError):
        read["d"]


def test_tensors_are_fetched_on_all_ranks_written_on_one_and_read_when_asked_for(
    tmp_path: Path,
) -> None:
    fetched: list[torch.Tensor] = []
    tree, file = {"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "model.safetensors"

    def fetch(tensor: torch.Tensor) -> torch.Tensor:
        fetched.append(tensor)
        return tensor.bfloat16()

    lm.write_weights(tmp_path, tree, fetch, write=False, shard_bytes=4)
    assert [*map(id, fetched)] == [*map(id, tree.values())] and not [*tmp_path.iterdir()]
    lm.write_weights(tmp_path, tree, fetch)
    tensors, content = lm.Tensors(tmp_path), file.read_bytes()
    assert tensors["a"].dtype == torch.bfloat16
    file.unlink()
    with pytest.raises(InputError, match=str(file)):
        tensors["b"]
    file.write_bytes(content[:-3])
    with pytest.raises(InputError, match=str(file)):
        lm.Tensors(tmp_path)


def test_what_a_malformed_file_raises_is_one_line_that_names_it() -> None:
    for error, words in (
        (KeyError("vocab"), "KeyError"), (FileNotFoundError("x"), "missing"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad\nbyte"), "malformed"),
        (RecursionError("deep"), "malformed"), (InputError("as it was"), "as it was"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words) as caught, lm.reading("dir/file"):
            raise error
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("as it" if words == "as it was" else "dir/file is ")
    with pytest.raises(KeyboardInterrupt), lm.reading("dir/file"):
        raise KeyboardInterrupt


def test_initial_weights_are_a_function_of_the_seed_and_guess_evenly() -> None:
    config = Config.from_dict({**TINY, "model_type": "llama", "tie_word_embeddings": True})
    a, b, c = (Transformer(config) for _ in range(3))
    for ours, seed in ((a, 1), (b, 1), (c, 2)):
        ours.init_weights(seed)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.model["embed_tokens"].weight, c.model["embed_tokens"].weight)
    with torch.no_grad():
        loss = -pair_logprobs(a, [([1], random_tokens(50).tolist(), [])])[0] / 50
    assert abs(loss.item() - math.log(97)) < 0.5


def test_seeds_are_the_same_on_every_machine() -> None:
    assert lm.hash_seed(1, "segment", 2) == 2054739034395909203
    parts = [(1, "segment", 2), (1, "segment", 3), (1, 23), (12, 3), ("12", 3), ("a",)]
    seeds = {lm.hash_seed(*some) for some in parts}
    assert len(seeds) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)


# ------------------------------------------------------------------------- configs as found outside

GENERIC = {"bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02}
GENERIC |= {"transformers_version": "4.40.0", "use_cache": True, "attention_dropout": 0.0}
LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
LLAMA31 |= {"original_max_position_embeddings": 8192}
LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = LLAMA | {
    "rope_scaling": None, "pretraining_tp": 1, "max_position_embeddings": 8192,
    "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8,
    "rope_theta": 500000.0, "attention_bias": False, "eos_token_id": [128001, 128008, 128009],
}  # fmt: skip
MISTRAL = LLAMA | {"model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8}
MISTRAL |= {"rope_theta": 10000.0, "sliding_window": 4096, "max_position_embeddings": 32768}
QWEN2 = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 131072,
    "use_sliding_window": False, "max_window_layers": 28, "tie_word_embeddings": False,
}  # fmt: skip
FOUND: dict[str, dict[str, Any]] = {  # config.json files of well-known checkpoints
    "llama-2-7b": LLAMA | {
        "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "pad_token_id": 0,
        "torch_dtype": "float16", "_name_or_path": "x", "max_sequence_length": 2048,
        "rope_scaling": None, "pretraining_tp": 1,
    },
    "llama-3-8b": LLAMA3 | {"torch_dtype": "bfloat16", "eos_token_id": 128009},
    "llama-3.1-8b": LLAMA3 | {"mlp_bias": False, "rope_scaling": LLAMA31},
    "llama-3.2-1b": LLAMA3 | {
        "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "rope_scaling": LLAMA31 | {"factor": 32.0}, "tie_word_embeddings": True,
    },
    "smollm2-1.7b": LLAMA | {
        "is_llama_config": True, "rope_interleaved": False, "rope_theta": 130000,
        "transformers.js_config": {"dtype": "q4"}, "vocab_size": 49152, "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 24, "tie_word_embeddings": True,
        "rope_scaling": None, "pad_token_id": 2,
    },
    "mistral-7b-v0.1": MISTRAL,
    "mistral-7b-v0.3": MISTRAL | {
        "vocab_size": 32768, "rope_theta": 1000000.0, "sliding_window": None, "head_dim": None,
    },
    "zephyr-7b-sft-full": MISTRAL | {"pad_token_id": 2, "_name_or_path": "x"},
    "qwen2-7b": QWEN2,
    "qwen2.5-0.5b": QWEN2 | {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "use_mrope": False,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "sliding_window": 32768, "max_window_layers": 24, "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_configs_of_known_checkpoints_are_read(name: str) -> None:
    raw = GENERIC | FOUND[name]
    config = Config.from_dict(raw)
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    rope = raw.get("rope_scaling") or {}
    assert len(config.windows) == raw["num_hidden_layers"] and config.head_dim == head_dim
    for key in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "vocab_size"):
        assert getattr(config, key) == raw[key]
    assert config.rope_theta == raw.get("rope_theta", 10000.0)
    assert config.factor == rope.get("factor", 1.0)
    window = raw.get("sliding_window") if raw["model_type"] == "mistral" else None
    assert set(config.windows) == {window}
    assert config.qkv_bias == (raw["model_type"] == "qwen2") and not config.attention_bias
    theirs = transformers.AutoConfig.for_model(**raw)
    assert theirs.head_dim == config.head_dim if hasattr(theirs, "head_dim") else True


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 32}
SCALED = {"rope_type": "linear", "factor": 4.0}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
UNKNOWN = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "logit_scale": 0.06}
UNKNOWN |= {"partial_rotary_factor": 0.5, "rope_interleaved": True, "use_qk_norm": True}
UNKNOWN |= {"num_local_experts": 8, "residual_multiplier": 0.22}
WRONG: list[tuple[str, str, list[Any]]] = [  # (family, key, its values): the error names the key
    *(("llama", key, [None, "8", True, 0, -4, 2.0, 10**12, [8]]) for key in SIZES),
    ("llama", "num_attention_heads", [None, "8", True, 0, -4, 2.0, 10**12, [8]]),
    ("llama", "model_type", ["gpt2", None, ["llama"]]),
    ("llama", "quantization_config", [{"quant_method": "gptq", "bits": 4}]),
    ("llama", "hidden_act", ["gelu", ["silu"], "", None]),
    *(("llama", key, [value]) for key, value in UNKNOWN.items()),
    ("llama", "layer_types", [["sliding_attention"] * 3]),
    ("mistral", "layer_types", [["full_attention"] * 3]),
    ("mistral", "attention_bias", [True]),
    ("mistral", "use_sliding_window", [True]),
    ("mistral", "sliding_window", ["4096", True, -5]),
    ("qwen2", "layer_types", [["full_attention"] * 2, [[], {}, None], "full_attention"]),
    ("qwen2", "layer_types", [["full_attention", "linear_attention", "full_attention"]]),
    ("qwen2", "layer_types", [{"0": "full_attention"}]),
    ("qwen2", "max_window_layers", ["2", -1, None]),
    ("qwen2", "use_sliding_window", [1]),
    ("qwen2", "sliding_window", [0]),
    ("llama", "tie_word_embeddings", ["false", None]),
    ("llama", "attention_bias", [1]),
    ("llama", "mlp_bias", ["yes"]),
    ("llama", "rms_norm_eps", [math.nan, 0, -1e-5, "1e-5", None, True]),
    ("llama", "num_key_value_heads", [3, 8]),
    ("llama", "head_dim", [7, 2**21]),
    ("llama", "num_attention_heads:head_dim", [64]),
    ("llama", "num_hidden_layers", [10**6]),
    ("llama", "rope_theta", [0, "10000", math.inf, 10**40, None]),
    ("llama", "rope_scaling", ["linear", [2.0]]),
    ("llama", "rope_type", ["yarn"]),
    ("llama", "rope_scaling:rope_type", [SCALED | {"rope_type": "yarn"}]),
    ("llama", "rope_scaling:rope_type", [{"type": "dynamic", "factor": 4.0}]),
    ("llama", "rope_scaling:rope_type", [SCALED | {"rope_type": ["linear"]}]),
    ("llama", "rope_scaling:factor", [{"rope_type": "linear"}, ROPE | {"factor": True}]),
    ("llama", "rope_scaling:factor", [SCALED | {"factor": 0}, SCALED | {"factor": "2"}]),
    ("llama", "rope_scaling:low_freq_factor", [ROPE | {"low_freq_factor": 4.0}]),
    ("llama", "rope_scaling:high_freq_factor", [ROPE | {"high_freq_factor": None}]),
    ("llama", "rope_scaling:attention_factor", [ROPE | {"attention_factor": 1.5}]),
    ("llama", "rope_parameters:partial_rotary_factor", [{"partial_rotary_factor": 0.25}]),
    ("llama", "rope_parameters:full_attention", [{"full_attention": {"rope_type": "default"}}]),
]
REFUSED = [(family, key, value) for family, key, values in WRONG for value in values]


@pytest.mark.parametrize("family, key, value", REFUSED)
def test_what_is_not_implemented_or_not_sound_is_an_error_that_names_the_key(
    family: str, key: str, value: Any
) -> None:
    base = {**TINY, "model_type": family}
    if family == "qwen2":
        base |= {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    Config.from_dict(base)
    where, _, named = key.partition(":")
    with pytest.raises(InputError, match=named or where) as caught:
        Config.from_dict(base | {where: value}, "dir/config.json")
    assert str(caught.value).startswith("dir/config.json: ") and "\n" not in str(caught.value)


def test_two_rope_objects_must_agree() -> None:
    base = {**TINY, "model_type": "llama", "rope_scaling": ROPE}
    Config.from_dict({**base, "rope_parameters": dict(ROPE)})
    with pytest.raises(InputError, match="rope_parameters"):
        Config.from_dict({**base, "rope_parameters": ROPE | {"factor": 2.0}})


def test_a_key_that_transformers_ignores_is_ignored() -> None:
    """Mistral has no use_sliding_window: false there does not switch its window off."""
    raw = {**TINY, "sliding_window": 9, "use_sliding_window": False}
    assert Config.from_dict(raw | {"model_type": "mistral"}).windows == (9, 9, 9)
    assert Config.from_dict(raw | {"model_type": "llama"}).windows == (None,) * 3


# ---------------------------------------------------------------------------------- broken folders


def refuses(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        Transformer.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) <= 1000
    assert all(word in message for word in (str(folder), *words)), message


NO_OBJECT = [b"", b"{", b"[]", b"null", b"3", b'{"model_type": "llama"', b"\x00\x01"]
NO_OBJECT += [b"\xff\xfe\x80", b"[" * 100_000, b"9" * 5000]


@pytest.mark.parametrize("content", NO_OBJECT)
def test_config_that_is_no_json_object(content: bytes, tiny_checkpoint: Any) -> None:
    folder, _ = tiny_checkpoint("llama")
    (folder / "config.json").write_bytes(content)
    refuses(folder, "config.json")


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces tensors of a checkpoint (dots written as __); None removes one."""
    weights = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        weights[name.replace("__", ".")] = value  # type: ignore[assignment]
    kept = {name: value for name, value in weights.items() if value is not None}
    save_file(kept, folder / "model.safetensors")


NORM = "model__norm__weight"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({NORM: None}, ["missing", "model.norm.weight"]),
        ({"model__surplus": torch.ones(2)}, ["unexpected", "model.surplus"]),
        ({"model\n__odd": torch.ones(2)}, ["unexpected"]),
        ({NORM: torch.ones(31)}, ["model.norm.weight", "[31]", "[32]"]),
        ({NORM: torch.ones(32, 1)}, ["model.norm.weight", "[32, 1]"]),
        ({NORM: torch.ones(32, dtype=torch.int64)}, ["model.norm.weight", "I64"]),
        ({NORM: torch.ones(32, dtype=torch.float64)}, ["model.norm.weight", "F64"]),
        ({NORM: torch.ones(32).to(torch.float8_e4m3fn)}, ["model.norm.weight", "F8"]),
        ({"model__layers__3__input_layernorm__weight": torch.ones(32)}, ["unexpected"]),
        ({"lm_head__weight": None}, ["missing", "lm_head.weight"]),
    ],
)
def test_tensors_that_do_not_fit(changes: Any, words: list[str], tiny_checkpoint: Any) -> None:
    folder, _ = tiny_checkpoint("llama")
    edit(folder, **changes)
    refuses(folder, *words)


def test_a_tied_head_saved_twice_is_accepted_and_old_buffers_but_no_other_head(
    tiny_checkpoint: Any,
) -> None:
    folder, theirs = tiny_checkpoint("llama-gqa-tied")
    head, old = theirs.lm_head.weight.detach().clone(), "model__layers__0__self_attn__rotary_emb"
    edit(folder, lm_head__weight=head, **{f"{old}__inv_freq": torch.ones(4)})
    with torch.no_grad():
        logits = Transformer.from_pretrained(folder)(random_tokens(1, 9))
        torch.testing.assert_close(logits, theirs(random_tokens(1, 9)).logits, atol=1e-4, rtol=0)
    edit(folder, lm_head__weight=torch.ones(97, 32))
    refuses(folder, "lm_head.weight", "tie_word_embeddings")


def header(content: Any) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"garbage that is no header" * 40,
        (2**62).to_bytes(8, "little") + b"{}",
        header({"a": ONE}),  # its data are missing
        header({"a": ONE | {"data_offsets": [0, 2**60]}}) + bytes(8),
        header({"a": ONE | {"data_offsets": [8, 0]}}) + bytes(8),
        header({"a": ONE | {"shape": [2**40, 2**40]}}) + bytes(8),
        header({"a": ONE | {"shape": [-2]}}) + bytes(8),
        header({"a": ONE | {"dtype": "F7"}}) + bytes(8),
        header({"a": 3}),
        header([1, 2]),
        header(b'{"a\xff": 3}'),
        header(b"[" * 50_000),
        header({"a": ONE}) + bytes(9),
        *(0.1, 0.5, 0.9999),  # the share that is there of a sound file
    ],
)
def test_files_that_are_no_safetensors(content: bytes | float, tiny_checkpoint: Any) -> None:
    file = tiny_checkpoint("llama")[0] / "model.safetensors"
    if isinstance(content, float):
        content = file.read_bytes()[: int(content * file.stat().st_size)]
    file.write_bytes(content)
    refuses(file.parent, file.name)


NO_SHARDS = [3, "", "..", "absent.safetensors", "../outside.safetensors", "/outside.safetensors"]
NO_SHARDS += ["nul\x00.safetensors", "\ud800.safetensors", "config.json"]
NO_MAPS = [None, {}, ["model-1.safetensors"], *({"model.norm.weight": name} for name in NO_SHARDS)]


@pytest.mark.parametrize("index", [{}, [1], *({"weight_map": value} for value in NO_MAPS)])
def test_an_index_that_names_no_shards_beside_it(index: Any, tiny_checkpoint: Any) -> None:
    folder, _ = tiny_checkpoint("llama")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(folder)


def test_shards_that_overlap_or_lack_a_tensor(tiny_checkpoint: Any) -> None:
    folder, _ = tiny_checkpoint("llama")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first, second = dict([*weights.items()][:9]), dict([*weights.items()][9:])
    shards = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    save_file(first, folder / "a.safetensors")
    refuses(folder, "b.safetensors")
    save_file(second, folder / "b.safetensors")
    Transformer.from_pretrained(folder)
    save_file(weights, folder / "b.safetensors")
    refuses(folder, "another file")
    save_file(dict([*second.items()][1:]), folder / "b.safetensors")
    refuses(folder, "missing")


def test_folders_without_weights_or_config(tiny_checkpoint: Any) -> None:
    folder, _ = tiny_checkpoint("llama")
    (folder / "model.safetensors").unlink()
    refuses(folder, "no model.safetensors")
    (folder / "model.safetensors").mkdir()
    refuses(folder, "no model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")  # a pickle is never read
    refuses(folder, "no model.safetensors")
    (folder / "config.json").unlink()
    refuses(folder, "config.json is missing")
    (folder / "config.json").mkdir()
    refuses(folder, "config.json")
    refuses(folder / "absent", "config.json is missing")


@pytest.mark.parametrize(
    "claim",
    [
        {"vocab_size": 2**22, "hidden_size": 2**22},
        {"intermediate_size": 2**22, "num_hidden_layers": 1024},
        {"num_attention_heads": 2**15, "num_key_value_heads": 2**15, "head_dim": 128},
    ],
)
def test_a_config_of_huge_claims_is_refused_before_memory_is_taken(
    claim: dict[str, int], tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = tiny_checkpoint("llama")
    raw = json.loads((folder / "config.json").read_text()) | claim
    (folder / "config.json").write_text(json.dumps(raw))
    allocated: list[Any] = []
    monkeypatch.setattr(Transformer, "to_empty", lambda self, **options: allocated.append(options))
    refuses(folder)
    assert not allocated


def test_nothing_is_filled_before_all_is_known_to_fit(tiny_checkpoint: Any) -> None:
    folder, _ = tiny_checkpoint("llama")
    edit(folder, model__norm__weight=torch.ones(31))
    ours = ours_from(tiny("llama", seed=9))
    before = {name: p.clone() for name, p in ours.named_parameters()}
    with pytest.raises(InputError):
        lm.load_weights(dict(ours.named_parameters()), folder)
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())
