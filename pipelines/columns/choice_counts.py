"""How many samples a choice keeps, and what each of its clauses removes: of a shard, or summed over many."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

DIGITS = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class ClauseCounts:
    """What a clause of `where` removes.

    Attributes:
        removes_alone: samples of which it is not true: it is false, or unknown.
        removes_after: those of them that the clauses written before it keep.
        unknown: those of which it is unknown, as a column of theirs is.
    """

    text: str
    removes_alone: int = 0
    removes_after: int = 0
    unknown: int = 0


@dataclass(frozen=True, kw_only=True)
class WeightCounts:
    """What a weight is; of the samples that `where` keeps.

    Attributes:
        unknown: samples of which it is not known: those of a sample's weight are not chosen.
        zero: samples that are chosen and never drawn.
        least, most: of all that are known; None of none.
    """

    text: str
    unknown: int = 0
    zero: int = 0
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True, kw_only=True)
class ChoiceCounts:
    """What a choice makes of some samples; `caption_weights` are by column of captions."""

    num_samples: int
    num_chosen: int
    clauses: Sequence[ClauseCounts] = ()
    weight: WeightCounts | None = None
    caption_weights: Mapping[str, WeightCounts] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return what `to_json` gave."""
        weight = content["weight"]
        return cls(
            num_samples=content["num_samples"],
            num_chosen=content["num_chosen"],
            clauses=[ClauseCounts(**clause) for clause in content["clauses"]],
            weight=None if weight is None else WeightCounts(**weight),
            caption_weights={column: WeightCounts(**found) for column, found in content["caption_weights"].items()},
        )


def sum_counts(counts: Iterable[ChoiceCounts]) -> ChoiceCounts:
    """Return what one choice makes of the samples of several shards together."""
    all_of = list(counts)
    if not all_of:
        return ChoiceCounts(num_samples=0, num_chosen=0)
    first = all_of[0]
    weights = [each.weight for each in all_of if each.weight is not None]
    return ChoiceCounts(
        num_samples=sum(each.num_samples for each in all_of),
        num_chosen=sum(each.num_chosen for each in all_of),
        clauses=[_sum_clauses([each.clauses[place] for each in all_of]) for place in range(len(first.clauses))],
        weight=_sum_weights(weights) if weights else None,
        caption_weights={
            column: _sum_weights([each.caption_weights[column] for each in all_of]) for column in first.caption_weights
        },
    )


def source_of(shard: str) -> str:
    """Return where a shard comes from, as far as its name tells: `laion_#` of `laion_00012`."""
    return DIGITS.sub("#", shard)


def by_source(counts: Mapping[str, ChoiceCounts]) -> dict[str, ChoiceCounts]:
    """Return counts of shards by where they come from: those whose names differ in numbers alone are of one source."""
    groups: dict[str, list[ChoiceCounts]] = {}
    for shard, found in sorted(counts.items()):
        groups.setdefault(source_of(shard), []).append(found)
    return {source: sum_counts(found) for source, found in groups.items()}


def describe_counts(counts: ChoiceCounts) -> list[str]:
    """Return lines for people: how many are chosen, and what each clause and each weight has to do with it."""
    share = counts.num_chosen / counts.num_samples if counts.num_samples else 0.0
    lines = [f"{counts.num_chosen:,} of {counts.num_samples:,} samples are chosen ({share:.1%})"]
    for clause in counts.clauses:
        unknown = f", of which {clause.unknown:,} are unknown" if clause.unknown else ""
        lines.append(
            f"{clause.text}: removes {clause.removes_alone:,} alone{unknown}; "
            f"{clause.removes_after:,} after those before it"
        )
    if counts.weight is not None and not _says_nothing(counts.weight):
        lines.append(f"weight {_described(counts.weight, unknown='are not chosen')}")
    for column, weight in counts.caption_weights.items():
        if not _says_nothing(weight):
            lines.append(f"weight of {column} {_described(weight, unknown='never draw this caption')}")
    return lines


def _says_nothing(weight: WeightCounts) -> bool:
    """Whether the clauses have kept nothing that could have a weight."""
    return weight.least is None and not weight.unknown


def _described(weight: WeightCounts, *, unknown: str) -> str:
    extent = "is never known" if weight.least is None else f"is {weight.least:.4g} to {weight.most:.4g}"
    parts = [f"{weight.text}: {extent}"]
    if weight.unknown:
        parts.append(f"{weight.unknown:,} samples of which it is unknown {unknown}")
    if weight.zero:
        parts.append(f"it is 0 for {weight.zero:,}")
    return "; ".join(parts)


def _sum_clauses(clauses: Sequence[ClauseCounts]) -> ClauseCounts:
    return ClauseCounts(
        text=clauses[0].text,
        removes_alone=sum(clause.removes_alone for clause in clauses),
        removes_after=sum(clause.removes_after for clause in clauses),
        unknown=sum(clause.unknown for clause in clauses),
    )


def _sum_weights(weights: Sequence[WeightCounts]) -> WeightCounts:
    return WeightCounts(
        text=weights[0].text,
        unknown=sum(weight.unknown for weight in weights),
        zero=sum(weight.zero for weight in weights),
        least=min((weight.least for weight in weights if weight.least is not None), default=None),
        most=max((weight.most for weight in weights if weight.most is not None), default=None),
    )
