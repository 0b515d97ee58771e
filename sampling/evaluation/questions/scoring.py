"""From answers to the scores of each benchmark; docs/EVALUATION.md says how they differ from their authors' own."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sampling.evaluation.questions.asking import Mode
from sampling.evaluation.questions.layouts import AskedPrompt

SCORING_VERSION = 1  # raise it when the same answers give other scores


@dataclass(frozen=True, kw_only=True)
class AnsweredImage:
    """An image's prompt, how far each of its questions has the right answer (0 to 1), and whether it is what is said.

    Questions without an answer count as wrong, as whatever is not the right word does in the authors' scripts.
    """

    asked: AskedPrompt
    values: Sequence[float]
    is_right: Sequence[bool]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number, from 0 to 1 (higher is better), what it is, and what it is over."""

    metric: str
    value: float
    meaning: str
    num_images: int
    num_prompts: int
    num_questions: int


def answered_images(
    rows: Iterable[dict[str, Any]], asked: Sequence[AskedPrompt], *, mode: Mode, is_absolute: bool
) -> list[AnsweredImage]:
    """Return the images of `rows`, whose prompts `asked` are in the order of the rows.

    With `is_absolute`, a soft answer counts as likely as it is among all tokens, as GenEval 2's authors take it, and
    not among the answers that are understood.
    """
    source = iter(rows)
    images: list[AnsweredImage] = []
    for prompt in asked:
        own = [next(source) for _ in prompt.questions]
        is_right = [row["said"] == row["answer"] for row in own]
        values = [float(right) for right in is_right]
        if mode == "soft":
            values = [_value(row, is_absolute=is_absolute) for row in own]
        images.append(AnsweredImage(asked=prompt, values=values, is_right=is_right))
    assert next(source, None) is None, "one row for each question"
    return images


def _value(row: dict[str, Any], *, is_absolute: bool) -> float:
    if row["share"] is None:
        return 0.0
    return row["share"] * row["mass"] if is_absolute else row["share"]


def score(images: Sequence[AnsweredImage], *, set_name: str, mode: Mode) -> list[Score]:
    """Return the scores of a benchmark, `set_name` as in `evaluation.prompt_set`, the total first."""
    if set_name == "geneval":
        return _geneval(images) + _soft_tifa(images, mode)
    if set_name == "t2i-compbench":
        return _compbench(images)
    if set_name == "dpg-bench":
        return _dpg(images)
    return _soft_tifa(images, mode) + _by_skill(images) + _by_atoms(images)


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean; 0 where a value is."""
    return math.exp(fmean(map(math.log, values))) if min(values) > 0 else 0.0


def _score(
    metric: str, meaning: str, images: Sequence[AnsweredImage], value: Callable[[AnsweredImage], float]
) -> Score:
    return Score(
        metric=metric,
        value=fmean(value(image) for image in images),
        meaning=meaning,
        num_images=len(images),
        num_prompts=len({image.asked.key for image in images}),
        num_questions=sum(len(image.values) for image in images),
    )


def _by_group(images: Sequence[AnsweredImage]) -> dict[str, list[AnsweredImage]]:
    groups: dict[str, list[AnsweredImage]] = {}
    for image in images:
        groups.setdefault(image.asked.group, []).append(image)
    return groups


# Soft-TIFA, of GenEval 2 and of the recipe's own questions


def _soft_tifa(images: Sequence[AnsweredImage], mode: Mode) -> list[Score]:
    names = ("Soft-TIFA AM", "Soft-TIFA GM") if mode == "soft" else ("TIFA", "all right")
    meanings = ("mean of an image's questions", "geometric mean of an image's questions")
    if mode == "hard":
        meanings = ("share of an image's questions answered right", "images whose questions are all answered right")
    return [
        _score(names[0], meanings[0], images, lambda image: fmean(image.values)),
        _score(names[1], meanings[1], images, lambda image: geometric_mean(image.values)),
    ]


def _by_skill(images: Sequence[AnsweredImage]) -> list[Score]:
    skills = dict.fromkeys(question.group for image in images for question in image.asked.questions)
    return [_over_questions(skill, "mean of the questions of this skill", images, skill) for skill in skills]


def _by_atoms(images: Sequence[AnsweredImage]) -> list[Score]:
    counts = sorted({image.asked.num_atoms for image in images if image.asked.num_atoms is not None})
    return [
        _score(
            f"{count} atoms",
            "geometric mean of the questions of prompts that ask for so much",
            [image for image in images if image.asked.num_atoms == count],
            lambda image: geometric_mean(image.values),
        )
        for count in counts
    ]


def _over_questions(metric: str, meaning: str, images: Sequence[AnsweredImage], group: str) -> Score:
    """Return the mean over all questions of a group, of whatever image."""
    values: list[float] = []
    about: list[AnsweredImage] = []
    for image in images:
        own = [
            value
            for value, question in zip(image.values, image.asked.questions, strict=True)
            if question.group == group
        ]
        values += own
        about += [image] if own else []
    return Score(
        metric=metric,
        value=fmean(values),
        meaning=meaning,
        num_images=len(about),
        num_prompts=len({image.asked.key for image in about}),
        num_questions=len(values),
    )


# GenEval: an image is right or not, and tags count alike


def _geneval(images: Sequence[AnsweredImage]) -> list[Score]:
    tags = [
        _score(tag, "images whose questions are all answered right", own, lambda image: float(all(image.is_right)))
        for tag, own in _by_group(images).items()
    ]
    total = Score(
        metric="GenEval by questions",
        value=fmean(tag.value for tag in tags),
        meaning="mean of the tags",
        num_images=len(images),
        num_prompts=len({image.asked.key for image in images}),
        num_questions=sum(len(image.values) for image in images),
    )
    return [total, *tags]


# T2I-CompBench: the product of an image's questions, as BLIP-VQA takes it


def _compbench(images: Sequence[AnsweredImage]) -> list[Score]:
    return [
        _score(
            f"{category} by questions", "product of an image's questions", own, lambda image: math.prod(image.values)
        )
        for category, own in _by_group(images).items()
    ]


# DPG-Bench: the mean of an image's questions, of which those count as 0 that a parent is no to


def _dpg(images: Sequence[AnsweredImage]) -> list[Score]:
    total = _score(
        "DPG-Bench by questions",
        "mean of an image's questions, 0 where a question that it depends on is not answered yes",
        images,
        lambda image: fmean(_with_parents(image)),
    )
    groups = dict.fromkeys(question.group for image in images for question in image.asked.questions)
    meaning = "mean of the questions of this category, whatever they depend on"
    return [total, *(_over_questions(group, meaning, images, group) for group in groups)]


def _with_parents(image: AnsweredImage) -> list[float]:
    """Return the values, 0 of questions with a parent, or a parent's parent, that is not answered yes."""
    questions = image.asked.questions

    def is_asked(place: int, below: tuple[int, ...] = ()) -> bool:
        return all(
            image.is_right[parent] and is_asked(parent, (*below, place))
            for parent in questions[place].parents
            if parent not in below
        )

    return [value if is_asked(place) else 0.0 for place, value in enumerate(image.values)]
