"""What a caption claims."""

import pytest

from captioning.claims.splitting import Claim, is_english, split_claims


def texts(caption: str, split: str = "clauses") -> list[list[str]]:
    """The claims of a caption, by sentence."""
    claims = split_claims(caption, split=split)  # pyright: ignore[reportArgumentType]
    return [[c.text for c in claims if c.sentence == number] for number in sorted({c.sentence for c in claims})]


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        (
            "The image shows a red circle on the left, a blue box at the bottom and a green star. The sky is grey.",
            [
                ["The image shows a red circle on the left", "a blue box at the bottom", "a green star"],
                ["The sky is grey"],
            ],
        ),
        ("On the left side, there is a small red circle.", [["On the left side, there is a small red circle"]]),
        (
            "In this picture, there are a cup in the middle and a spoon beside it.",
            [["In this picture, there are a cup in the middle", "a spoon beside it"]],
        ),
        (
            "A man stands between the tree and the house, while a dog follows him.",
            [["A man stands between the tree and the house", "a dog follows him"]],
        ),
        ("The flag is black and white, bright and large.", [["The flag is black and white, bright and large"]]),
        ("Two birds; one of them is black.", [["Two birds", "one of them is black"]]),
        ("", []),
        ("  … !!", []),
    ],
)
def test_english_sentences_are_cut_where_a_new_thing_begins(caption: str, wanted: list[list[str]]) -> None:
    assert texts(caption) == wanted


@pytest.mark.parametrize(
    "caption",
    [
        "Ein Hund und eine Katze sitzen auf dem Sofa, und a propos die Sonne scheint.",
        "Un chat est assis sur la table, a un chien.",
        "Una mesa, the gato y un perro en la cocina de la casa de campo",
        "一只猫坐在沙发上，a 旁边有一只狗。",
    ],
)
def test_sentences_of_other_languages_are_one_claim_each(caption: str) -> None:
    assert not is_english(caption)
    assert len(split_claims(caption, split="clauses")) == 1


def test_sentences_may_be_whole_claims_and_keep_their_numbers() -> None:
    caption = "A dog and a cat sit there. ... The sun is out, and a bird sings."
    assert texts(caption, "sentences") == [["A dog and a cat sit there"], ["The sun is out, and a bird sings"]]
    assert split_claims(caption, split="clauses")[-1] == Claim(sentence=1, text="a bird sings")
