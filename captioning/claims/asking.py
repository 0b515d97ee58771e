"""Who is asked about claims: a model in this process, or one behind a server."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from PIL import Image

from captioning.claims.config import ClaimsConfig
from encoders.answers import Answers

Supports = list[float | None]


class ClaimAsker(Protocol):
    """Asks in two steps, so that the first can run ahead on the CPU while the device is busy."""

    def prepare(self, image: Image.Image, questions: Sequence[str]) -> Any:
        """Turn the questions about an image into what the device needs; called from several threads."""
        ...

    def supports(self, prepared: Iterable[Any]) -> list[Supports]:
        """Return, for each image in order, how far each of its claims is supported; None where nobody knows."""
        ...


def answers_of(claims: ClaimsConfig) -> Answers:
    """Return the words of yes and no of a recipe."""
    return Answers(yes=tuple(claims.yes), no=tuple(claims.no), min_probability=claims.min_answer_probability)
