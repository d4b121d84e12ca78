"""The checkers of tests/bench/ifeval.py, case by case, and its file of answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import GOLDEN, script

ifeval = script("ifeval")


@pytest.mark.parametrize(
    ("name", "how", "right", "wrong"),
    [
        ("change_case:capital_word_frequency",
         {"capital_relation": "at least", "capital_frequency": 2}, "IT\'S", "U.S. is"),
        ("change_case:english_capital", {}, "THE END OF IT.", "The END OF IT."),
        ("change_case:english_capital", {}, "THE END", "DAS ENDE IST NICHT DA"),
        ("change_case:english_lowercase", {}, "it is the end", "das ist nicht das ende"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say it. "}, " say it. No", "It. Say"),
        ("combination:two_responses", {}, "******a ****** b", "a****** ******b"),
        ("combination:two_responses", {}, "a******b\n******", "a******a"),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b c]", "[a]"),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "P.P.S. x", "P.S. x"),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "a\np. s. b", "PS b"),
        ("detectable_format:constrained_response", {}, "My answer is no.", "My answer is no"),
        ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
        ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2},
         "Day 1\na Day2", "Day 1, Days 2"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n - b", "* a\n** b"),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2},
         "*a* and **b**", "*a* ** **"),
        ("detectable_format:title", {}, "<<A>>\nb", "<< >> b"),
        ("keywords:existence", {"keywords": ["a b", "C"]}, "A b c", "a c"),
        ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "cats", "A Cat!"),
        ("keywords:frequency", {"keyword": " cat", "relation": "less than", "frequency": 2},
         "Cat", "catcat"),
        ("keywords:letter_frequency", {"letter": "#", "let_relation": "at least",
         "let_frequency": 2}, "##", "#"),
        ("language:response_language", {"language": "de"}, "Das ist nicht gut.", "This is good."),
        ("language:response_language", {"language": "mr"}, "हे चांगले आहे", "यह अच्छा है"),
        ("language:response_language", {"language": "ko"}, "좋아요 OK", "It is OK."),
        ("language:response_language", {"language": "ru"}, "12", "it is"),
        ("length_constraints:nth_paragraph_first_word",
         {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"}, "a\n\n\"So, b", "a\n\nsoo"),
        ("length_constraints:nth_paragraph_first_word",
         {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "so"}, "so", "so\n\nso"),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***a*** b", "a***b***c"),
        ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 3},
         "Mr. A. ran. \"Why?\" he said.", "At 3.5 p.m. Dr. No... left."),
        ("length_constraints:number_words", {"relation": "less than", "num_words": 3},
         "one two", "a-b c"),
        ("punctuation:no_comma", {}, "a", "a,"),
        ("startend:end_checker", {"end_phrase": "Bye."}, 'x bye."\n', "bye. x"),
        ("startend:quotation", {}, ' "a" ', '"'),
    ],
)  # fmt: skip
def test_a_checker_tells_right_from_wrong(name: str, how: Any, right: str, wrong: str) -> None:
    row = {"instruction_id_list": [name], "kwargs": [how]}
    assert ifeval.followed(row, right) == [True] and ifeval.followed(row, wrong) == [False]
    assert ifeval.followed(row, " \n") == [False]


def test_each_kind_of_instruction_has_a_checker_and_the_error_of_a_ratio_is_its_own() -> None:
    assert len(ifeval.CHECKS) == 25
    told = [{"followed": x, "tokens": 3, "ended": True} for x in ([True], [True, False, False])]
    column = ifeval.values(told)
    assert column["IFEval, prompts, %"] == [100, 0]
    # 2 of 4; a prompt has two on average: 50 + 100 * (1 - 0.5) / 2 and 50 + 100 * (1 - 1.5) / 2
    assert column["IFEval, instructions, %"] == [75, 25]


def test_answers_are_made_once_and_the_rest_after_a_cut(tmp_path: Path, capsys: Any) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    kinds = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    rows = [kinds | {"key": i, "prompt": f"add {i} 1"} for i in range(5)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(GOLDEN / "start")
    flags = ["--prompts", str(prompts), "--out", str(out), "--tokens", "8"]
    flags += ["--models", f"before={model}", f"after={model}"]
    ifeval.main([*flags, "--limit", "3"])
    first = (out / "before.jsonl").read_text()
    assert len(first.splitlines()) == 3 and "+0.0" in capsys.readouterr().out
    ifeval.main(flags)
    whole = (out / "before.jsonl").read_text()
    assert whole.startswith(first) and len(whole.splitlines()) == 5
    assert "punctuation:no_comma, 5" in capsys.readouterr().out
    ifeval.main(flags)
    assert (out / "before.jsonl").read_text() == whole
    with pytest.raises(SystemExit, match="another model or length"):
        ifeval.main([*flags, "--tokens", "9"])
