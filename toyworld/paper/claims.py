"""What a claim on the page is: the paper's words and figures, ours beside them, and whether it holds here.

Words stand in `claims.toml`; what was found is read from the runs.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from toyworld.paper.estimates import Verdict

WORDS = Path(__file__).parent / "claims.toml"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Figures for people, cells as they are shown; the first column is the rows' names."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture for the page, as a data URI, with what stands below it."""

    source: str
    title: str


@dataclass(frozen=True, kw_only=True)
class PictureRow:
    """Pictures of one arm, the same prompts in each row."""

    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True, kw_only=True)
class TextPair:
    """A picture with the text it came with and its caption."""

    picture: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Words:
    """What is said of a claim.

    Attributes:
        name: in `summary.json` and of its anchor.
        title: the claim in a few words.
        place: where the paper has it.
        says: what the paper says, with its numbers.
        ran: what is compared here.
        criterion: what has to be so for it to hold; `{margin}` stands for the margin in points.
        margin: of shares that are to be alike.
        limits: what the toy world does not show of it.
        command: what makes our figures.
        why: why there is no miniature of it.
    """

    name: str
    title: str
    place: str
    says: str
    ran: str = ""
    criterion: str = ""
    margin: float = 0.0
    limits: str = ""
    command: str = ""
    why: str = ""

    @property
    def condition(self) -> str:
        """The criterion, with its margin."""
        return self.criterion.format(margin=f"{100 * self.margin:g}")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the runs show of a claim.

    Attributes:
        verdict: by the criterion, with the figures it was told from.
        measured: further figures, in a sentence.
        theirs: the paper's figures.
        ours: the same of this world.
        figures: for machines.
        seeds: of the trainings.
    """

    verdict: Verdict
    measured: str = ""
    theirs: Table | None = None
    ours: Table | None = None
    chart: Markup | None = None
    chart_title: str = ""
    pictures: Sequence[PictureRow] = ()
    texts: Sequence[TextPair] = ()
    links: Sequence[tuple[str, str]] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = ()


def read_words() -> dict[str, Words]:
    """Return what is said of each claim, by name, in the order of the page."""
    tables = tomllib.loads(WORDS.read_text(encoding="utf-8"))
    return {name: Words(name=name, **table) for name, table in tables.items()}
