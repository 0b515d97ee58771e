"""The rule `diffusers` is what diffusers' PixArt pipelines do with `clean_caption=True`, text for text."""

import random

import pytest
from diffusers import PixArtAlphaPipeline

from encoders.text import clean_text

TEXTS = [
    "",
    "A small cactus with a happy face in the Sahara desert.",
    "  Don't CRY ...  it's free shipping, worldwide shipping!  ",
    "see https://www.example.com/a%20b?c=d and www.shop.ru/x, or mail@host.org",
    "<person> &amp; <b>bold</b> &quot;quoted&quot; &amp;lt;i&amp;gt; <br/> <a href='x'>y</a>",
    "@artist_name on instagram #12 #1234 #123456 1234567 192.168.10.1 7:45 ",
    "photo.jpg image.PNG free download free page 12 click here click for more jpg images",
    "“Curly” «guillemets» ‘single’ — em–dash ―bar 〜wave",
    "日本語 の テキスト 中文 ㍿ 㐀 ㋐ ㇰ 한국어",
    "this-is-my-cute-cat this_is_my_cat jc6640 jc6640vc 6640vc231 j2d1a2a 1024x768 3.5×2 2х4",
    "naÃ¯ve cafÃ© ChloÃ© CAFÃ‰ \\n line\nbreak\ttab ***SALE*** [x] {y} (z) a\\/b | c * d",
    "'quoted all'", '"x"', ".hidden", "_a:", "a : b", "1,000.5/2 a,b.c/d e...f", "a+b+", "%41%42 100% 5+5", "-x-",
]  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    pipeline = object.__new__(PixArtAlphaPipeline)
    return lambda text: pipeline._text_preprocessing(text, clean_caption=True)[0]


def test_texts_of_every_rule_are_cleaned_as_diffusers_cleans_them(theirs):
    changed = 0
    for text in TEXTS:
        assert clean_text(text, "diffusers") == theirs(text), text
        changed += clean_text(text, "diffusers") != clean_text(text, "lower")
    assert changed > 12


@pytest.mark.filterwarnings("ignore::bs4.MarkupResemblesLocatorWarning")
def test_mixtures_of_their_parts_are_cleaned_as_diffusers_cleans_them(theirs):
    random_parts = random.Random(0)
    parts = [part for text in TEXTS for part in (*text.split(), " ", text[:3], text[-2:])]
    parts += [chr(random_parts.choice([*range(32, 127), 0xA7, 0xB4, 0x2014, 0x4E2D, 0xE9])) for _ in range(200)]
    for _ in range(1500):
        text = random_parts.choice(["", " "]).join(random_parts.choices(parts, k=random_parts.randint(1, 12)))
        assert clean_text(text, "diffusers") == theirs(text), text


def test_marks_that_no_parser_knows_stay() -> None:
    """diffusers ends in a traceback at them, and one caption would end the features of all."""
    assert clean_text("A Dog <![ x", "diffusers") == "a dog <! x"


# Of what the expressions look for: addresses, names of files, spaces around points, sizes.
PARTS = [
    "a",
    "b",
    "1",
    "2",
    ".",
    "-",
    "/",
    "@",
    " ",
    "  ",
    "_",
    "com",
    "co",
    ".ru",
    ".png",
    ".jpg",
    "jpeg",
    "http:",
    "é",
]
PARTS += [
    "https://",
    "www:",
    "www.",
    "я",
    "х",
    ":",
    ",",
    "'",
    "\n",
    "\u3000",
    "%",
    "+",
    "<b>",
    ".it",
    "://",
    "1.5x2.",
    "٣",
]


@pytest.mark.filterwarnings("ignore::bs4.MarkupResemblesLocatorWarning")
def test_what_begins_once_in_each_run_finds_what_begins_anywhere(theirs):
    chosen = random.Random(3)
    for _ in range(1500):
        text = "".join(chosen.choices(PARTS, k=chosen.randint(1, 14)))
        assert clean_text(text, "diffusers") == theirs(text), text


@pytest.mark.timeout(120)
@pytest.mark.parametrize("part", [".", "a-", "a.", "1.a", " ", "a.com@", "1"])
def test_long_texts_without_spaces_are_cleaned_as_short_ones_are(theirs, part: str) -> None:
    """diffusers' expressions take minutes of 20,000 characters: what comes out is known from a few."""
    short, long = part * 30, part * (20_000 // len(part))
    expected = theirs(f"x {short}_ y")
    assert clean_text(f"x {short}_ y", "diffusers") == expected
    kept = clean_text(f"x {long}_ y", "diffusers")
    assert kept.split()[:1] == expected.split()[:1] and kept.split()[-1:] == expected.split()[-1:]
