"""What a table of `[features]` says of the samples that are trained on: which, and how often."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pipelines.columns.expressions import Expression, parse_expression
from pipelines.store.manifest import Fingerprint

CHOICES = "choices"
# Raised when a change of code changes what is chosen by unchanged expressions of unchanged columns.
CHOICE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ChoiceSettings:
    """The keys of `[features.<table>]` that choose, as they are written.

    Attributes:
        table: its name.
        section: of the recipe, in which the table is.
        where: samples of which this is true are chosen; None chooses all.
        weight: how often a sample is drawn, in proportion; None draws all alike.
        weight_temperature: with it a sample's weight is exp(weight / temperature).
        caption_weights: by column, the weights of captions that are expressions.
    """

    table: str
    where: str | None = None
    weight: str | None = None
    weight_temperature: float | None = None
    caption_weights: Mapping[str, str] = field(default_factory=dict)
    section: str = "features"

    @classmethod
    def of(cls, table: str, keys: Mapping[str, Any]) -> Self | None:
        """Return those of a named table, whose keys are `keys`; None of one that chooses nothing.

        Raises:
            UserError: an expression is none; names its key.
        """
        captions = keys.get("captions") or ()
        own: dict[str, Any] = {name: keys.get(name) for name in ("where", "weight", "weight_temperature")}
        weights = {each["column"]: each["weight"] for each in captions if isinstance(each.get("weight"), str)}
        settings = cls(table=table, caption_weights=weights, **own)
        if own["where"] is None and own["weight"] is None and not weights:
            return None
        # What is wrong with them is said before anything else is looked at.
        _ = settings.where_expression, settings.weight_expression, settings.caption_expressions
        return settings

    def directory(self, run: Path) -> Path:
        """Return where the choice is kept."""
        return run / CHOICES / self.table

    @cached_property
    def where_expression(self) -> Expression | None:
        """The expression of `where`."""
        return None if self.where is None else parse_expression(self.where, key=self.key("where"))

    @cached_property
    def weight_expression(self) -> Expression | None:
        """The expression of `weight`."""
        return None if self.weight is None else parse_expression(self.weight, key=self.key("weight"))

    @cached_property
    def caption_expressions(self) -> dict[str, Expression]:
        """The expressions of captions' weights, by column."""
        return {
            column: parse_expression(text, key=self.key(f"captions: weight of {column}"))
            for column, text in self.caption_weights.items()
        }

    @property
    def fingerprint(self) -> Fingerprint:
        """What decides the choice, beside the columns."""
        return Fingerprint.of(
            {
                "version": CHOICE_VERSION,
                "where": self.where,
                "weight": self.weight,
                "weight_temperature": self.weight_temperature,
                "caption_weights": dict(self.caption_weights),
            }
        )

    def key(self, name: str) -> str:
        """Return what errors call one of the keys."""
        return f"{self.section}.{self.table}.{name}"
