"""From what benchmarks say that an image shows to questions, by plain rules; docs/EVALUATION.md has them in words.

The form of the questions is that of GenEval 2 (Kamath et al. 2025): whether a thing is there, how many, whether it has
a colour, and where it is.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from encoders.answers import NUMBERS
from errors import UserError

WORDING_VERSION = 2  # raise it when the same file gives other questions

ALIKE = ("sheep", "fish", "goldfish", "shrimp", "deer", "scissors", "skis", "broccoli", "bread")
IRREGULAR = {name: name for name in ALIKE} | {
    "person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "goose": "geese",
    "knife": "knives", "leaf": "leaves", "shelf": "shelves", "wolf": "wolves", "scarf": "scarves", "loaf": "loaves",
    "foot": "feet", "tooth": "teeth", "tomato": "tomatoes", "potato": "potatoes",
}  # fmt: skip
PLURAL_ONLY = ("scissors", "skis")
# As prompts say it, and as it is asked.
RELATIONS = {name: name for name in ("next to", "near", "in front of", "behind", "hidden by")} | {
    "on the top of": "on top of", "on the bottom of": "at the bottom of", "on side of": "at the side of",
    "on the left of": "to the left of", "on the right of": "to the right of", "on the side of": "at the side of",
}  # fmt: skip
POSITIONS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
# What stands in a sentence and not in a list of things.
SENTENCE = re.compile(
    r"\b(?:with|on|in|of|at|by|for|to|from|near|behind|above|below|over|under|inside|while|which|that|other|is|are|was|"
    r"were|has|have|had|its|their|his|her|into|through|between|as|against|the)\b",
    re.IGNORECASE,
)
ARTICLE = re.compile(r"^(?:an?|the)\s+", re.IGNORECASE)
NUMBER = re.compile(rf"(an?|{'|'.join(NUMBERS)})\s+", re.IGNORECASE)
SEAM = re.compile(r"\s*,\s*(?:and\s+)?|\s+and\s+")
MAX_WORDS = 5  # of a thing in a list, with its article
MAX_COUNTED_WORDS = 2
RELATION = re.compile(rf"(an?\s.+?)\s({'|'.join(sorted(RELATIONS, key=len, reverse=True))})\s(an?\s.+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about an image: its right answer (`yes`, `no` or a number's word), and what it is about.

    `parents` are the numbers, within the prompt, of questions without whose yes this one has no meaning.
    """

    text: str
    answer: str
    group: str
    parents: tuple[int, ...] = ()


def plural(noun: str) -> str:
    """Return the plural of a noun of several words, by the common rules of English and a few exceptions."""
    *before, last = noun.split(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif re.search(r"(?:s|x|z|ch|sh)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = f"{last[:-1]}ies"
    else:
        last += "s"
    return " ".join([*before, last])


def is_there(phrase: str) -> Question:
    """Ask for a thing, with its article or, of several, without."""
    article = ARTICLE.match(phrase)
    if article is None:
        said = f"Are there {phrase}"
    else:
        thing = phrase[article.end() :]
        word = article.group().strip().lower()
        said = f"Is there {_article(thing) if word == 'the' else word} {thing}"
    return Question(text=f"{said} in the image?", answer="yes", group="object")


def how_many(things: str, number: int) -> Question:
    """Ask for a number of things, which are said in the plural.

    Raises:
        UserError: there is no word for the number.
    """
    if not 0 <= number < len(NUMBERS):
        raise UserError(f"{number} {things} are asked for, and answers are understood up to {len(NUMBERS) - 1}")
    return Question(text=f"How many {things} are in the image?", answer=NUMBERS[number], group="count")


def whole(prompt: str) -> Question:
    """Ask for a prompt as it stands, as VQAScore does (Lin et al. 2024)."""
    return Question(text=f'Does this image show "{prompt}"?', answer="yes", group="whole")


def _article(thing: str) -> str:
    return "an" if thing[:1].lower() in "aeiou" else "a"


# GenEval: what must be there, and what must not


def geneval_questions(
    include: Sequence[Mapping[str, Any]], exclude: Sequence[Mapping[str, Any]] = ()
) -> list[Question]:
    """Return the questions of one line of evaluation_metadata.jsonl.

    Raises:
        UserError: a number is too large, or a place is none of GenEval's.
    """
    questions: list[Question] = []
    limits = [(item["class"], item["count"]) for item in exclude]
    for item in include:
        name, count = item["class"], item["count"]
        if (name, count + 1) in limits:
            limits.remove((name, count + 1))
            questions.append(how_many(plural(name), count))
        elif count > 1:
            questions.append(_number_or_more(name, count, answer="yes"))
        else:
            questions.append(_any_of(name))
        if "color" in item:
            questions.append(_coloured(name, item["color"], is_one=count == 1))
        if "position" in item:
            where, other = item["position"]
            questions.append(_placed(name, where, include[other]["class"]))
    return questions + [_number_or_more(name, count, answer="no") for name, count in limits]


def _any_of(name: str) -> Question:
    if name in PLURAL_ONLY:
        return Question(text=f"Are there any {name} in the image?", answer="yes", group="object")
    return is_there(f"{_article(name)} {name}")


def _number_or_more(name: str, count: int, *, answer: str) -> Question:
    if count == 1:
        return Question(text=_any_of(name).text, answer=answer, group="object")
    return Question(text=f"Are there {count} or more {plural(name)} in the image?", answer=answer, group="count")


def _coloured(name: str, colour: str, *, is_one: bool) -> Question:
    is_single = is_one and name not in PLURAL_ONLY
    said = f"Is the {name}" if is_single else f"Are the {plural(name)}"
    return Question(text=f"{said} {colour}?", answer="yes", group="attribute")


def _placed(name: str, where: str, other: str) -> Question:
    if where not in POSITIONS:
        raise UserError(f"position {where!r} is not one of {', '.join(POSITIONS)}")
    be = "Are" if name in PLURAL_ONLY else "Is"
    return Question(text=f"{be} the {name} {POSITIONS[where]} the {other}?", answer="yes", group="position")


# T2I-CompBench: prompts that are lists of things, or one thing and where it is; others are asked for as they stand


def compbench_questions(category: str, prompt: str) -> list[Question]:
    """Return the questions of a prompt of T2I-CompBench, by its category."""
    if category in ("color", "shape", "texture"):
        questions = [is_there(thing) for thing in _things(prompt)]
    elif category in ("spatial", "3d_spatial"):
        questions = _spatial(prompt)
    elif category == "numeracy":
        questions = _counted(prompt)
    else:
        questions = []
    return questions or [whole(prompt)]


def _things(prompt: str) -> list[str]:
    """Return the parts of a list of things; none where the prompt is a sentence."""
    parts = SEAM.split(prompt.strip(" ."))
    bare = [ARTICLE.sub("", part) for part in parts]
    is_list = all(0 < len(part.split()) <= MAX_WORDS and not SENTENCE.search(part) for part in bare)
    return parts if is_list else []


def _spatial(prompt: str) -> list[Question]:
    found = RELATION.fullmatch(prompt.strip(" ."))
    if found is None:
        return []
    first, relation, second = found.groups()
    bare = [ARTICLE.sub("", thing) for thing in (first, second)]
    asked = f"Is the {bare[0]} {RELATIONS[relation.lower()]} the {bare[1]}?"
    return [is_there(first), is_there(second), Question(text=asked, answer="yes", group="position")]


def _counted(prompt: str) -> list[Question]:
    questions: list[Question] = []
    for part in _things(prompt):
        number = NUMBER.match(part)
        if number is None or len(part[number.end() :].split()) > MAX_COUNTED_WORDS:
            return []
        word, things = number.group(1).lower(), part[number.end() :]
        count = 1 if word in ("a", "an") else NUMBERS.index(word)
        questions.append(how_many(plural(things) if count == 1 else things, count))
    return questions
