"""Open-ended tasks: many right answers of different quality, for the laboratory.

A prompt has a rule and the beginning of a word, "rise bd"; an answer goes on with it, one to four
letters under the rule, "b-d-e-h-k". Each letter more makes it better and is a chance to go wrong:
quality is the share of the four letters that an answer adds, and 0 if it breaks the rule anywhere.
So the likelihood of one good answer does not say all: most good answers to a prompt are in no row.

`stand_in` puts these tasks in the built-in ones' place: the functions below have the names, the
arguments and the meaning of those in data.py that they replace.
"""

import contextlib
import random
from collections.abc import Callable, Iterator

import data
from data import Example, InputError
from model import hash_seed

SEEN = ("rise", "free", "again", "near")  # kinds that the clean set has
UNSEEN = ("fall", "swing", "leap", "even")  # kinds that only pre-training has
LETTERS = "abcdefghijklmnop"  # with 12 some kinds had fewer than 20 prompts in a split
MOST = 4  # letters that an answer may add


def _up(word: str) -> int:
    """Where the next letter of a `swing` lies: 1 above, -1 below."""
    return -1 if len(word) > 1 and word[-1] > word[-2] else 1


def _gap(word: str, letter: str) -> int:
    return ord(letter) - ord(word[-1])


RULES: dict[str, Callable[[str, str], bool]] = {  # may this letter follow this word?
    "rise": lambda word, letter: letter > word[-1],
    "free": lambda word, letter: letter not in word,  # no letter twice
    "again": lambda word, letter: letter in word and letter != word[-1],
    "near": lambda word, letter: 1 <= abs(_gap(word, letter)) <= 2,
    "fall": lambda word, letter: letter < word[-1],
    "swing": lambda word, letter: _gap(word, letter) * _up(word) > 0,  # up, down, up, ...
    "leap": lambda word, letter: abs(_gap(word, letter)) >= 5,
    "even": lambda word, letter: _gap(word, letter) % 2 == 0 and letter != word[-1],
}


def extend(kind: str, word: str, count: int, rng: random.Random) -> str | None:
    """The word with `count` letters more under the rule, at random; None where there is no way."""
    if not count:
        return word
    for letter in rng.sample(LETTERS, len(LETTERS)):
        if RULES[kind](word, letter):
            longer = extend(kind, word + letter, count - 1, rng)
            if longer:
                return longer
    return None


def lawful(kind: str, start: str, letters: str) -> int:
    """How many of the letters may follow `start`, up to the first that may not."""
    for i, letter in enumerate(letters):
        if letter not in LETTERS or not RULES[kind](start + letters[:i], letter):
            return i
    return len(letters)


def parts(prompt: str) -> tuple[str, str]:
    """("rise", "bd") of "rise bd", also of a prompt that has a draft behind it."""
    kind, _, word = prompt.split(" | ")[0].partition(" ")
    if kind not in RULES or not word or set(word) - set(LETTERS):
        raise InputError(f"{prompt!r} is no open-ended task such as 'rise bd'")
    return kind, word


def task_kind(prompt: str) -> str:
    """One of SEEN or of UNSEEN."""
    return parts(prompt)[0]


def check_answer(prompt: str, answer: str) -> float:
    """Its quality: letters added, a share of MOST; 0 for a wrong one."""
    kind, start = parts(prompt)
    letters = answer.split("-")
    word = "".join(letters)
    added = word[len(start) :]
    broken = any(len(letter) != 1 for letter in letters) or not word.startswith(start)
    if broken or not 0 < len(added) <= MOST or lawful(kind, start, added) < len(added):
        return 0.0
    return len(added) / MOST


def flawed_answer(prompt: str, answer: str, rng: random.Random) -> str:
    """A right answer, spoilt in one of four ways."""
    spoilt = answer
    while check_answer(prompt, spoilt):  # "b-d-b" of "b-d-b-d-b" is right again
        spoilt = _spoilt(*parts(prompt), answer.replace("-", ""), rng)
    return spoilt


def _spoilt(kind: str, start: str, word: str, rng: random.Random) -> str:
    flaw = rng.randrange(4)
    if flaw == 0:  # without the beginning
        return "-".join(word[len(start) :])
    if flaw == 1:  # a letter of the beginning is missing
        i = rng.randrange(len(start))
        return "-".join(word[:i] + word[i + 1 :])
    if flaw == 2:  # a hyphen is missing
        i = rng.randrange(1, len(word))
        return f"{'-'.join(word[:i])}{'-'.join(word[i:])}"
    i = rng.randrange(len(start), len(word))  # a letter that the rule forbids
    wrong = [letter for letter in LETTERS if not RULES[kind](word[:i], letter)]
    return "-".join(word[:i] + rng.choice(wrong) + word[i + 1 :])


def mend_answer(prompt: str, draft: str, rng: random.Random) -> str:
    """What a stronger model might make of a draft: as far as it is right, and a letter more. The
    best are left as they are."""
    kind, start = parts(prompt)
    if check_answer(prompt, draft) == 1:
        return draft
    word = draft.replace("-", "")
    added = word[len(start) :] if word.startswith(start) else ""
    kept = start + added[: lawful(kind, start, added[: MOST - 1])]
    longer = extend(kind, kept, 1, rng) or extend(kind, start, MOST, rng)
    assert longer is not None  # a prompt has room for MOST
    return "-".join(longer)


def task_examples(split: str, n: int, seed: int, rewrite_share: float = 0.0) -> list[Example]:
    """As data.task_examples. "pretrain" has answers of all lengths, half of them flawed; in the
    other splits the response is long, and `rejected` is flawed or short."""
    rng = random.Random(hash_seed("open-ended", split, seed))
    kinds = (
        SEEN if split == "clean" else [k for both in zip(SEEN, UNSEEN, strict=True) for k in both]
    )
    return [_example(split, i, kinds[i % len(kinds)], rewrite_share, rng) for i in range(n)]


def _example(split: str, i: int, kind: str, rewrite_share: float, rng: random.Random) -> Example:
    prompt = _prompt(kind, rng)
    while hash_seed("split", prompt) % 10 not in data.TENTHS[split]:
        prompt = _prompt(kind, rng)
    rejected = None
    if split != "pretrain":
        answer = _answer(prompt, rng.choice((3, 4, 4)), rng)
        short = _answer(prompt, rng.choice((1, 2)), rng)
        rejected = short if rng.random() < 0.5 else flawed_answer(prompt, answer, rng)
    else:
        draft, answer = (_mixed(prompt, rng) for _ in range(2))
        if rng.random() < rewrite_share:
            prompt = data.REWRITE_PROMPT.format(prompt=prompt, draft=draft)
    return Example(({"role": "user", "content": prompt},), answer, rejected, f"open:{split}:{i}")


def _prompt(kind: str, rng: random.Random) -> str:
    """A rule and two to four letters that it allows, with room for MOST more."""
    while True:
        start = rng.choice(LETTERS)
        if kind == "again":  # which needs letters to repeat
            start = "".join(rng.sample(LETTERS, rng.randint(2, 4)))
        else:
            start = extend(kind, start, rng.randint(1, 3), rng) or ""
        if start and extend(kind, start, MOST, rng):
            return f"{kind} {start}"


def _answer(prompt: str, count: int, rng: random.Random) -> str:
    """A right answer that adds so many letters."""
    return "-".join(extend(*parts(prompt), count, rng) or "")


def _mixed(prompt: str, rng: random.Random) -> str:
    """An answer of any length, flawed half of the time."""
    answer = _answer(prompt, rng.randint(1, MOST), rng)
    return answer if rng.random() < 0.5 else flawed_answer(prompt, answer, rng)


@contextlib.contextmanager
def stand_in(wanted: bool = True) -> Iterator[None]:
    """Within, the product's built-in tasks are these ones, if `wanted`."""
    names = ("SEEN", "UNSEEN", "task_kind", "check_answer", "mend_answer", "task_examples")
    held = {name: getattr(data, name) for name in names}
    if wanted:
        vars(data).update({name: globals()[name] for name in names})
    try:
        yield
    finally:
        vars(data).update(held)
