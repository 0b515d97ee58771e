"""Keys of a recipe's table about questions of yes and no: the words that models say them with."""

from collections.abc import Sequence
from typing import Self

import pydantic

from pipelines.recipe import Decides, TableConfig


class YesNoKeys(TableConfig):
    """The words of yes and those of no."""

    yes: Decides[Sequence[str]] = pydantic.Field(
        default=("yes",), min_length=1, description="Words of yes, in whatever case"
    )
    no: Decides[Sequence[str]] = pydantic.Field(default=("no",), min_length=1, description="Words of no")

    @pydantic.model_validator(mode="after")
    def _check_words(self) -> Self:
        if both := {word.casefold() for word in self.yes} & {word.casefold() for word in self.no}:
            raise ValueError(f"{sorted(both)[0]!r} is among the words of yes and of no")
        if blank := [word for word in (*self.yes, *self.no) if not word.strip()]:
            raise ValueError(f"{blank[0]!r} is no word of yes or no")
        return self
