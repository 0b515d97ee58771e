"""Sentences: where they end in any script, what is no end, and that keeping some of them never changes a word."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.text.sentences import count_words, keep_sentences, sentence_spans, split_sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["A cat sits on a mat.", "It sleeps."],
        ["a red cube.", "a blue ball."],
        ["Dr. Smith is tall.", "He sits approx. 5 m away."],
        ['It reads "No. 5".', "He sits at No. 5 on the street.", "No.", "It is a dog."],
        ["The U.S. flag hangs here.", "Cups, forks, etc. in a box.", "It is 5 p.m.", "The end (e.g. of a day)."],
        ["A book by J. R. R. Tolkien and George W. Bush.", "It is a fig.", "See fig. 3."],
        ['He said "Stop."', "Then he left.", "**A title.**", "More."],
        ["A sign... it reads STOP!", "Does it?"],
        ["A 3.5 m tall tower of version 2.0.", "More."],
        ["Smoke rises… and fades.", "A dog."],
    ],
)
def test_sentences_of_spaced_scripts(sentences: list[str]) -> None:
    assert split_sentences(" ".join(sentences)) == sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("图片中有一只猫。它坐在椅子上！“真的？”他说。", ["图片中有一只猫。", "它坐在椅子上！", "“真的？”", "他说。"]),
        ("一个3.5米高的塔。还有…一只猫。", ["一个3.5米高的塔。", "还有…一只猫。"]),
        ("赤い車です｡青い空。", ["赤い車です｡", "青い空。"]),
        ("यह एक घर है। लाल दरवाज़ा है।", ["यह एक घर है।", "लाल दरवाज़ा है।"]),
        ("هذا بيت. هل ترى؟ نعم.", ["هذا بيت.", "هل ترى؟", "نعم."]),
        ("A cat sits. 猫在睡觉。Then more.", ["A cat sits.", "猫在睡觉。", "Then more."]),
        (
            "# Title\n\nA cube stands\non a table. It is red.\n- A ball\n- A cup. It is blue.\n\n1. Red\n2. Blue",
            [
                "# Title",
                "A cube stands\non a table.",
                "It is red.",
                "- A ball",
                "- A cup.",
                "It is blue.",
                "1. Red",
                "2. Blue",
            ],
        ),
        ("  \n ", []),
    ],
)
def test_other_full_stops_and_lines_of_lists_end_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


def test_sentences_that_are_kept_stand_as_they_stood() -> None:
    text = " One is red.\n\nTwo is blue.  Three is green. 四是黄。五。 "
    assert keep_sentences(text, range(5)) == text.strip()
    assert keep_sentences(text, [2, 0]) == "One is red.  Three is green."
    assert keep_sentences(text, [1, 2]) == "Two is blue.  Three is green."
    assert keep_sentences(text, [3, 4]) == "四是黄。五。"
    assert keep_sentences(text, []) == ""
    with pytest.raises(IndexError, match=r"sentences \[5\] of a text that has 5"):
        keep_sentences(text, [5])


@given(st.text(alphabet='ab A.!?。…\n"*-1)J', max_size=60))
def test_nothing_is_in_no_sentence_or_in_two(text: str) -> None:
    spans = sentence_spans(text)
    ends = [0, *(end for _, end in spans)]
    starts = [*(begin for begin, _ in spans), len(text)]
    assert all(end <= begin and not text[end:begin].strip() for end, begin in zip(ends, starts, strict=True))
    assert keep_sentences(text, range(len(spans))) == text.strip()
    assert all(text[begin:end] == text[begin:end].strip() != "" for begin, end in spans)


def test_words_of_scripts_without_spaces_are_their_letters() -> None:
    assert count_words("A well-lit room, isn't it? 3.5 m") == 7
    assert count_words("一只猫坐。") == 4
    assert count_words("ภาพ") == 3
