"""What an answer's first token, or its text, says: yes, no or a number, in any spelling."""

import math

import pytest

from encoders.answers import NUMBER_CHOICES, Answers

YES_NO = Answers(yes=("yes",), no=("no",), min_probability=0.05)


@pytest.mark.parametrize(
    ("token", "wanted"),
    [
        *((token, True) for token in ("Yes", " yes", "YES", "▁Yes", "Ġyes", "Y", "yes\n")),
        *((token, False) for token in ("No", " no", "NO", "▁no", "N")),
        *((token, None) for token in ("", " ", "\n", "yesterday", "none", "Maybe", "<s>", "yo", "▁")),
    ],
)
def test_all_spellings_of_yes_and_no_are_known_and_nothing_else(token: str, wanted: bool | None) -> None:
    assert YES_NO.is_yes(token) is wanted


def test_words_of_other_languages_are_a_setting() -> None:
    german = Answers(yes=("ja",), no=("nein", "nicht"), min_probability=0.05)
    assert [german.is_yes(token) for token in ("Ja", " nein", "NICHT", "Yes")] == [True, False, False, None]
    chinese = Answers(yes=("是",), no=("否", "不是"), min_probability=0.05)
    assert [chinese.is_yes(token) for token in ("是", "否", "不", "不是")] == [True, False, False, False]


def test_support_sums_all_spellings_and_is_unknown_where_neither_is_said() -> None:
    tokens = [("Yes", math.log(0.4)), (" yes", math.log(0.2)), ("No", math.log(0.2)), ("Maybe", math.log(0.2))]
    assert YES_NO.support_of(tokens) == 0.75
    assert YES_NO.support_of([("Yes", math.log(0.9))]) == 1.0
    assert YES_NO.support_of([("I", math.log(0.97)), ("No", math.log(0.03))]) is None
    assert YES_NO.support_of([]) is None
    assert YES_NO.support(yes=math.nan, no=math.nan) is None


@pytest.mark.parametrize(
    ("token", "wanted"),
    [
        *((token, "two") for token in ("two", " Two", "2", "tw")),
        *(("1", "one"), ("10", "ten"), ("None", "zero")),
        *((token, None) for token in ("t", "n", "twenty", "12", "several")),
    ],
)
def test_numbers_are_known_by_word_and_digit(token: str, wanted: str | None) -> None:
    assert NUMBER_CHOICES.begun_by(token) == wanted


def test_likelihoods_of_numbers_are_summed_over_their_spellings() -> None:
    tokens = [("3", math.log(0.5)), ("Three", math.log(0.25)), ("four", math.log(0.125)), ("Some", math.log(0.1))]
    likely = NUMBER_CHOICES.likelihoods(tokens)
    assert likely["three"] == pytest.approx(0.75) and likely["four"] == pytest.approx(0.125)
    assert sum(likely.values()) == pytest.approx(0.875)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        *((text, "yes") for text in ("Yes", "yes.", "Yes, there is no dog.", "The answer is yes.")),
        *((text, "no") for text in ("No, it is blue.", "**No**")),
        *((text, None) for text in ("", "I cannot say", "Either yes or no", "Yesterday")),
    ],
)
def test_a_text_says_what_it_begins_with_or_the_only_answer_in_it(text: str, wanted: str | None) -> None:
    assert YES_NO.choices.said_in(text) == wanted


def test_a_text_says_a_number() -> None:
    texts = ("There are three dogs.", "2", "One or two", "Two, I think, or three")
    assert [NUMBER_CHOICES.said_in(text) for text in texts] == ["three", "two", "one", "two"]
