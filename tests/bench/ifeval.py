"""IFEval's prompts, answered greedily, and checked by a program: before and after training.

    python tests/bench/ifeval.py --prompts FILE --out DIR --models before=FOLDER after=FOLDER

FILE has IFEval's rows (google-research, Apache 2.0). Each answer is a line of DIR/NAME.jsonl, and
is not made again. Strict accuracies, of prompts (all instructions followed) and of instructions,
compared with the first model's, prompt by prompt; real.py has them for all its models.

The checkers are our own, as those of lm-eval 0.4.13 need nltk with a file that it downloads, and
langdetect. What is different from lm-eval's:

- sentences, words in capitals: by regular expressions, not by nltk's tokenizers;
- languages: by script and by frequent words, not by langdetect;
- a letter that is to be counted and is "#" or "!" is counted: lm-eval counts a letter at random;
- answers end after --tokens, 256 unless told otherwise, and not after 1280: what must be long, or
  must end in some way, is right more seldom than elsewhere. Compare models, not papers.
"""

import argparse
import collections
import itertools
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this folder has a sapo.py too

import tables  # before torch: it takes one thread
from tables import Values

import data
import train
from model import Transformer, generate, hash_seed

SECONDS = 1.6  # of a prompt with 256 tokens, for the estimate alone: one core of an AMD EPYC
BATCH = 64  # prompts between writes
Row = Mapping[str, Any]  # of the prompts' file, or of an answers' file

# ------------------------------------------------------------------------------------ the checkers

SCRIPTS = {"TAMIL": "ta", "HANGUL": "ko", "BENGALI": "bn", "THAI": "th", "KANNADA": "kn"}
SCRIPTS |= {"GURMUKHI": "pa", "TELUGU": "te", "GUJARATI": "gu"}
FREQUENT = {  # words by language, where some languages have one script
    "en": "the of and to in is that for it with as on be this are you your not or by a an have",
    "de": "der die das und ist nicht ein eine zu den mit von für auf sie ich es werden wurde kann",
    "es": "el los las y que en un una por con para es del se al como su más está no",
    "fr": "le les des et est un une dans que pour qui pas sur vous ce au avec nous du sont",
    "it": "il di che è non un una per con sono della del le gli nel alla ha questo da essere",
    "pt": "o os um uma não com para por que do da em é você no na mais ou ser seu",
    "sw": "ya wa na kwa ni katika za la hii cha kuwa hiyo au yako kama si tafadhali moja",
    "fi": "ja on ei se että oli ovat kuin tai mutta myös voi tämä ole olla sen jos joka",
    "vi": "là và của có không một cho được các những với trong này đã người bạn phải hoặc để",
    "ru": "и в не на что с это как по из для или быть он она вы мы у к я",  # noqa: RUF001
    "bg": "и в не на да е се от за че по с това със ще или са бъде към трябва",  # noqa: RUF001
    "hi": "है के में की से और का को हैं यह पर नहीं एक ने हो लिए कि",
    "mr": "आहे आणि च्या आहेत या हे नाही करा ते एक तुम्ही साठी किंवा की मध्ये होते कृपया",
    "ne": "छ र को मा हो लाई यो गर्न छन् पनि भएको छैन हुन् तपाईं गर्नुहोस् वा एक यस",
    "ar": "في من على أن إلى هذا هذه لا أو التي ما هو مع عن يجب كان لم هي",
    "fa": "است در از به که این را با برای آن یک می شده های نیست باید شما یا",
    "ur": "ہے کے میں کی سے اور کا کو ہیں یہ پر نہیں ایک نے کہ اس کریں",
}
WORDS = {language: frozenset(words.split()) for language, words in FREQUENT.items()}
# A full stop behind one of these ends no sentence.
ABBREVIATED = r"[a-hj-z]|mr|mrs|ms|dr|prof|st|sr|jr|vs|inc|ltd|co|corp|u\.s|u\.k|a\.m|p\.m|ph\.d"


def language(text: str) -> str | None:
    """The code of the language most likely to be a text's; None where it has no letters."""
    names = (unicodedata.name(x, "").split(" ")[0].split("-")[0] for x in text if x.isalpha())
    scripts = collections.Counter(names).most_common(1)
    if not scripts or scripts[0][0] in SCRIPTS:
        return SCRIPTS[scripts[0][0]] if scripts else None
    said = [word.strip(".,:;!?()[]\"'*_«»“”।،؟۔") for word in text.lower().split()]  # noqa: RUF001
    script = [x for x in WORDS if unicodedata.name(FREQUENT[x][0]).split(" ")[0] == scripts[0][0]]
    return max(script or ["en"], key=lambda code: sum(word in WORDS[code] for word in said))


def sentences(text: str) -> int:
    """How many a text has; its end ends one."""
    count, rest = 0, text.strip()
    for end in re.finditer(r"(\S*?)([.?!]+)[\"')\]}*”’]*(?=\s+(\S))", rest):  # noqa: RUF001
        word, mark, after = end[1].lower().lstrip("(\"'*"), end[2], end[3]
        within = re.fullmatch(ABBREVIATED, word) or (word.isdigit() and after.islower())
        goes_on = within if mark == "." else mark in ("..", "...") and not after.isupper()
        count += not goes_on
    return count + bool(rest)


def capitals(text: str) -> int:
    """Words without a small letter; what follows an apostrophe is one of its own ("IT'S": 2)."""
    words = re.sub(r"('(?:S|M|D|LL|RE|VE)|N'T)\b", r" \1", text)
    return sum(x.isupper() for x in re.split(r"[\s,;:?!()\[\]{}<>\"@#$%&*`]+|--+|\.\.+", words))


def enough(count: int, k: Mapping[str, Any]) -> bool:
    """Whether a count is as an instruction's kwargs have it: "less than" their number, or not."""
    bound = next(value for value in k.values() if isinstance(value, int))
    return count < bound if "less than" in k.values() else count >= bound


def times(pattern: str, text: str) -> int:
    """How often a pattern is in a text."""
    return len(re.findall(pattern, text))


def low(text: str) -> str:
    """In small letters, stripped."""
    return text.strip().lower()


def parts(text: str, divider: str) -> list[str]:
    """What lies between dividers, stripped; one at either end parts nothing."""
    said = [part.strip() for part in text.split(divider)]
    return said[said[0] == "" : len(said) - (said[-1] == "")]


def first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Whether there are so many paragraphs, and the nth begins with the word."""
    said = [part.strip() for part in text.split("\n\n")]
    if sum(map(bool, said)) != num_paragraphs or not said[nth_paragraph - 1]:
        return False
    word = said[nth_paragraph - 1].split()[0].lower().lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0] == first_word.lower()


def highlights(text: str) -> int:
    """How many *parts* and **parts** there are within a line. Of two **parts** the space between
    them counts too, as in lm-eval."""
    single = [x for x in re.findall(r"\*[^\n*]*\*", text) if x.strip("*").strip()]
    return len(single) + sum(bool(x.strip()) for x in re.findall(r"\*\*([^\n*]*)\*\*", text))


def is_json(text: str) -> bool:
    """Whether all of it is JSON; it may be fenced."""
    try:
        json.loads(re.sub(r"^```(json|Json|JSON)?", "", text.strip()).removesuffix("```").strip())
    except ValueError:
        return False
    return True


POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
# By the second part of an instruction's id: a check of a text and the instruction's kwargs.
CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "capital_word_frequency": lambda x, k: enough(capitals(x), k),
    "constrained_response": lambda x, k: times(r"My answer is (yes|no|maybe)\.", x) > 0,
    "end_checker": lambda x, k: low(x).strip('"').endswith(low(k["end_phrase"])),
    "english_capital": lambda x, k: x.isupper() and language(x) == "en",
    "english_lowercase": lambda x, k: x.islower() and language(x) == "en",
    "existence": lambda x, k: all(word.lower() in x.lower() for word in k["keywords"]),
    "forbidden_words": lambda x, k: not times(rf"(?i)\b({'|'.join(k['forbidden_words'])})\b", x),
    "frequency": lambda x, k: enough(x.lower().count(low(k["keyword"])), k),
    "json_format": lambda x, k: is_json(x),
    "letter_frequency": lambda x, k: enough(x.lower().count(k["letter"].lower()), k),
    "multiple_sections": lambda x, k: enough(times(rf"{k['section_spliter']}\s?\d+", x), k),
    "no_comma": lambda x, k: "," not in x,
    "nth_paragraph_first_word": lambda x, k: first_word(x, **k),
    "number_bullet_lists": lambda x, k: times(r"(?m)^\s*(?:\*[^*]|-).*$", x) == k["num_bullets"],
    "number_highlighted_sections": lambda x, k: enough(highlights(x), k),
    "number_paragraphs": lambda x, k: all(y := parts(x, "***")) and len(y) == k["num_paragraphs"],
    "number_placeholders": lambda x, k: enough(times(r"\[.*?\]", x), k),
    "number_sentences": lambda x, k: enough(sentences(x), k),
    "number_words": lambda x, k: enough(times(r"\w+", x), k),
    "postscript": lambda x, k: times(POSTSCRIPTS[k["postscript_marker"].strip()], x.lower()) > 0,
    "quotation": lambda x, k: len(y := x.strip()) > 1 and y[0] == y[-1] == '"',
    "repeat_prompt": lambda x, k: low(x).startswith(low(k["prompt_to_repeat"])),
    "response_language": lambda x, k: language(x) in (k["language"], None),
    "title": lambda x, k: times(r"<<[^\n]*[^\s<>][^\n]*>>", x) > 0,
    "two_responses": lambda x, k: len(said := parts(x, "******")) == len({*said} - {""}) == 2,
}


def followed(row: Row, text: str) -> list[bool]:
    """Which of a row's instructions a text follows; an empty one none."""
    both = zip(row["instruction_id_list"], row["kwargs"], strict=True)
    return [bool(text.strip()) and CHECKS[name.split(":")[1]](text, how) for name, how in both]


def read(file: Path, limit: int = 10**6) -> Sequence[Row]:
    """The first rows of the prompts' file, in an order that depends on the prompts alone."""
    return sorted(train.json_lines(file), key=lambda row: hash_seed("ifeval", row["prompt"]))[
        :limit
    ]


def answers(model: Path, rows: Sequence[Row], file: Path, tokens: int) -> list[Row]:
    """The lines of `file` for the rows, after those that are missing were made: key, answer,
    number of its tokens, whether it ended; and here, which instructions it follows."""
    of = [f"{model.parent.name}/{model.name}", tokens]
    known = {told["key"]: told for told in train.json_lines(file)}
    if any(told["of"] != of for told in known.values()):
        raise SystemExit(f"{file} is of another model or length: take another --out, or delete it")
    if missing := [row for row in rows if row["key"] not in known]:
        minutes = SECONDS * len(missing) * tokens / 256 / 60
        print(f"{file.stem}: {len(missing)} prompts, about {minutes:.0f} minutes", flush=True)
        tokenizer, loaded = data.load_tokenizer(model), Transformer.from_pretrained(model)
        how: dict[str, Any] = {"temperature": 0.0, "eos_ids": tokenizer.eos_ids}
    for i in range(0, len(missing), BATCH):
        some = missing[i : i + BATCH]
        asked = [[{"role": "user", "content": row["prompt"]}] for row in some]
        prompts = [tokenizer.apply_chat_template(turns, True) for turns in asked]
        for row, ids in zip(some, generate(loaded, prompts, tokens, **how), strict=True):
            told = {"key": row["key"], "of": of, "answer": tokenizer.response_text(ids)}
            told |= {"tokens": len(ids), "ended": ids[-1] in tokenizer.eos_ids}
            known[row["key"]] = told
        train.append(file, [known[row["key"]] for row in some])
    return [known[x["key"]] | {"followed": followed(x, known[x["key"]]["answer"])} for x in rows]


def values(told: Sequence[Row]) -> Values:
    """A value a prompt, in %, or tokens. `instructions`: their mean is the share of all
    instructions, and their standard error that of a ratio: a prompt's come together."""
    right, asked = ([f(t["followed"]) for t in told] for f in (sum, len))
    share, size = sum(right) / sum(asked), sum(asked) / len(told)
    return {
        "IFEval, prompts, %": [100.0 * all(t["followed"]) for t in told],
        "IFEval, instructions, %": [
            100 * (share + (r - share * n) / size) for r, n in zip(right, asked, strict=True)
        ],
        "IFEval, tokens of an answer": [float(t["tokens"]) for t in told],
        "IFEval, ended, %": [100.0 * t["ended"] for t in told],
    }


def by_kind(found: Mapping[str, Sequence[Row]], rows: Sequence[Row]) -> str:
    """What each kind of instruction comes to, in %, with its number."""
    kinds, shown = [kind for row in rows for kind in row["instruction_id_list"]], {}
    asked = sorted(collections.Counter(kinds).items())
    for name, told in found.items():
        marks = [mark for t in told for mark in t["followed"]]
        right = collections.Counter(itertools.compress(kinds, marks))
        shown[name] = {f"{kind}, {n}": f"{100 * right[kind] / n:.0f}" for kind, n in asked}
    return tables.markdown(shown)


def main(argv: Sequence[str] | None = None) -> None:
    """Answers, checks, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--limit", type=int, default=10**6, help="prompts, in hash order [all]")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most [256]")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rows, folders = read(args.prompts, args.limit), dict(x.split("=", 1) for x in args.models)
    place = {name: (Path(x), rows, args.out / f"{name}.jsonl") for name, x in folders.items()}
    found = {name: answers(*where, args.tokens) for name, where in place.items()}
    columns = {name: [values(told)] for name, told in found.items()}
    print(f"\n{len(rows)} prompts, mean ± standard error\n\n{tables.compared(columns)}\n")
    first, *others = columns
    less = f"Differences to {first}, paired:\n\n{tables.compared(columns, first)}\n\n"
    print(less * bool(others) + by_kind(found, rows))


if __name__ == "__main__":
    main()
