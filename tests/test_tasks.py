"""Properties of the built-in tasks, and of the checkpoint-like tokenizer that they come with."""

import random
from collections import Counter
from pathlib import Path

import pytest
import transformers

import data
from model import InputError

KINDS = {*data.SEEN, *data.UNSEEN}


def prompt_of(example: data.Example) -> str:
    return example.messages[-1]["content"]


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("reverse abcd", "a-b-c-d > dcba"),
        ("add 46 27", "6+7=13-4+2=7 > 73"),
        ("add 99 11", "9+1=10-9+1=11 > 110"),
        ("sort dbca", "d-b-c-a > abcd"),
        ("second abcdef", "a-b-c-d-e-f > bdf"),
        ("double abc", "a-b-c > aabbcc"),
        ("rotate abcd", "a-b-c-d > bcda"),
        ("count a xaya", "0-1-1-2 > 2"),
        ("swap abcde", "a-b-c-d-e > ebcda"),
    ],
)
def test_answers_by_hand(prompt: str, answer: str) -> None:
    assert data.right_answer(prompt) == answer
    assert data.check_answer(prompt, answer)
    assert data.check_answer(data.REWRITE_PROMPT.format(prompt=prompt, draft="x > y"), answer)
    assert data.task_kind(prompt) == prompt.split(" ")[0]


@pytest.mark.parametrize("split", ["pretrain", "clean", "validation", "test"])
def test_same_seed_same_examples_and_more_begin_with_fewer(split: str) -> None:
    many = data.task_examples(split, 200, 7)
    assert many == data.task_examples(split, 200, 7)
    assert many[:50] == data.task_examples(split, 50, 7)
    assert many != data.task_examples(split, 200, 8)


def test_held_out_prompts_are_in_no_training_split_of_any_seed() -> None:
    def prompts(split: str, n: int) -> set[str]:
        made = (e for seed in range(3) for e in data.task_examples(split, n, seed, 0.4))
        return {prompt_of(e).split(" | ")[0] for e in made}

    training = prompts("pretrain", 20_000) | prompts("clean", 500)
    validation, test = prompts("validation", 1000), prompts("test", 1000)
    assert not training & validation and not training & test and not validation & test


def test_kinds_of_each_split_and_prompts_are_many() -> None:
    for split, kinds in (("validation", KINDS), ("test", KINDS), ("clean", set(data.SEEN))):
        assert {data.task_kind(prompt_of(e)) for e in data.task_examples(split, 64, 3)} == kinds
    assert not set(data.SEEN) & set(data.UNSEEN)
    examples = data.task_examples("pretrain", 40_000, 1)
    counts = Counter(data.task_kind(prompt_of(e)) for e in examples)
    assert counts == dict.fromkeys(KINDS, 5000)
    many = Counter(data.task_kind(prompt) for prompt in {prompt_of(e) for e in examples})
    assert all(many[kind] > 3000 for kind in KINDS - {"add"})  # there are 8,100 sums in all


@pytest.mark.parametrize("split", ["clean", "validation", "test"])
def test_gold_is_right_and_rejected_is_flawed(split: str) -> None:
    for example in data.task_examples(split, 2000, 5):
        assert data.check_answer(prompt_of(example), example.response)
        assert example.rejected is not None
        assert not data.check_answer(prompt_of(example), example.rejected)


@pytest.mark.parametrize("rewrite_share", [0.0, 0.4])
def test_half_of_the_pretraining_answers_of_each_kind_are_right(rewrite_share: float) -> None:
    examples = data.task_examples("pretrain", 16_000, 2, rewrite_share)
    for kind in KINDS:
        rows = [e for e in examples if data.task_kind(prompt_of(e)) == kind]
        right = sum(data.check_answer(prompt_of(e), e.response) for e in rows) / len(rows)
        assert 0.45 < right < 0.55, kind  # 2,000 rows: the deviation is 0.011
    rewriting = [e for e in examples if " | " in prompt_of(e)]
    assert abs(len(rewriting) / len(examples) - rewrite_share) < 0.02


def test_a_rewrite_is_independent_of_its_draft() -> None:
    examples = data.task_examples("pretrain", 16_000, 2, 1.0)
    halves: dict[bool, list[bool]] = {True: [], False: []}
    for example in examples:
        prompt, draft = prompt_of(example).split(" | ")
        halves[data.check_answer(prompt, draft)].append(data.check_answer(prompt, example.response))
    for answers in halves.values():
        assert 0.47 < sum(answers) / len(answers) < 0.53


def test_flaws_are_of_four_kinds_and_differ_between_equal_prompts() -> None:
    rng = random.Random(0)
    flawed = [data.flawed_answer("a-b-c-d > dcba", rng) for _ in range(400)]
    assert "a-b-c-d > dcba" not in flawed
    assert {"dcba", "a-b-d > dcba", "a-b-c-d > dcbj", "a-b-c-d = dcba"} <= set(flawed)


def test_unknown_splits_and_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="split 'train' is not one of"):
        data.task_examples("train", 1, 0)
    for prompt in ("", "reverse", "reverse a b", "add 1 2", "add x y", "what is 1+1?"):
        with pytest.raises(InputError, match="built-in task"):
            data.check_answer(prompt, "x")


def test_the_tokenizer_is_an_ordinary_one_and_spells_tasks(tmp_path: Path) -> None:
    data.write_task_tokenizer(tmp_path)
    ours = data.load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "sort ba é🙂"}]
    chat = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ours.apply_chat_template(turns, add_generation_prompt=True) == chat
    assert ours.decode(chat) == theirs.decode(chat)
    assert ours.encode("ab") == [97, 98]
    assert ours.vocab_size == len(theirs) == 260
    assert ours.eos_ids == (theirs.eos_token_id,) == (256,)
    examples = data.task_examples("clean", 128, 1)
    kept, pairs, counts = data.encode_examples(examples, ours, 64, 56)
    assert kept == examples
    assert counts == {"rows": 128, "dropped_prompt": 0, "cut_response": 0, "cut_rejected": 0}
    for example, pair in zip(examples, pairs, strict=True):
        assert ours.decode(pair.prompt) == f"<|user|>{prompt_of(example)}<|assistant|>"
        assert ours.decode(pair.chosen) == example.response + "<|end|>"
        assert ours.decode(pair.rejected) == f"{example.rejected}<|end|>"
        assert len(pair.chosen) <= 24
