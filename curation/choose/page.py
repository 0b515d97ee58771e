"""`RUN/choose/<table>.html`: what a choice keeps and loses and why, in one file that opens without a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from curation.choose.charts import histogram_chart, shown_number
from curation.choose.draws import Draws
from curation.choose.measures import Cut
from curation.choose.picks import Example
from curation.choose.survey import CHOSEN, LOST, LOST_TO_OTHERS, ClauseSurvey, NumberSurvey, Survey, ValueSurvey
from curation.choose.thumbnails import Shown, show_examples
from pipelines.as_typed import typed_command, typed_flag
from pipelines.columns.choice_counts import ChoiceCounts, ClauseCounts, by_source
from pipelines.command import Command
from pipelines.page_templates import page_template
from pipelines.store.files import atomic_write_bytes

PAGES_FOLDER = "choose"
TEMPLATE = Path(__file__).parent / "templates" / "choose.html.jinja"
# Of what becomes of a sample: the class of its colour, and how it is called.
FATES = {
    CHOSEN: ("kept", "chosen"),
    LOST: ("lost", "lost to this clause"),
    LOST_TO_OTHERS: ("others", "lost to others"),
}
# Of values that are told apart; rarer ones, as each caption is, are counted together.
ROWS_SHOWN, LEAST_SHARE = 12, 0.005


@dataclass(frozen=True, kw_only=True)
class Card:
    """A sample as the page shows it; `fate` is the class of its colour, `why` what becomes of it in words."""

    key: str
    shard: str
    value: str
    image: str
    caption: str
    fate: str
    why: str


@dataclass(frozen=True, kw_only=True)
class CutRows:
    """The samples on either side of a cut."""

    below_title: str
    below: list[Card]
    above_title: str
    above: list[Card]


@dataclass(frozen=True, kw_only=True)
class MeasureView:
    """A measure: a chart and its cuts of a number, rows of (value, counts by fate) of others."""

    text: str
    num_unknown: int
    chart: Markup | None
    log: bool
    cuts: list[CutRows]
    rows: list[tuple[str, list[int]]]


@dataclass(frozen=True, kw_only=True)
class ClauseView:
    """A clause with all that is shown of it; `lost` are shown where no cut is."""

    number: int
    counts: ClauseCounts
    measures: list[MeasureView]
    lost: list[Card]


@dataclass(frozen=True, kw_only=True)
class SourceView:
    """A source: the counts of its shards, how many there are, and its share of all draws."""

    name: str
    num_shards: int
    counts: ChoiceCounts
    share_of_draws: float


def write_page(survey: Survey, command: Command) -> Path:
    """Write the page of a table's choice, and return where it is; reads the images that it shows.

    Raises:
        UserError, StorageError: a raw shard cannot be read; names it.
    """
    settings = survey.table.settings
    shown = show_examples(survey.examples(), survey.table.choice, paths=survey.table.paths, command=command)
    cards = _Cards(survey, shown)
    html = page_template(TEMPLATE, {"number": shown_number}).render(
        run_name=command.run.absolute().name,
        settings=settings,
        total=survey.total,
        clauses=[_clause_view(number, each, survey, cards) for number, each in enumerate(survey.clauses)],
        sources=_sources(survey),
        draws=survey.draws,
        weight_chart=_weight_chart(survey.draws),
        caption_weights=survey.table.caption_weights,
        most_drawn=cards.of(survey.draws.most_drawn.examples),
        kept=cards.of(survey.kept.examples),
        lost=cards.of(survey.lost.examples),
        plan_flag=typed_flag("plan", True),
        features_command=typed_command("features", {"stage": settings.table, "run": command.run}),
    )
    path = command.run / PAGES_FOLDER / f"{settings.table}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, html.encode())
    return path


class _Cards:
    """Makes cards of examples."""

    def __init__(self, survey: Survey, shown: Mapping[tuple[str, str], Shown]) -> None:
        self._clauses = [each.clause.text for each in survey.clauses]
        self._shown = shown

    def of(self, examples: Sequence[Example], clause: int | None = None) -> list[Card]:
        """Return cards, as one clause sees them where it is named."""
        return [self._card(example, clause) for example in examples]

    def _card(self, example: Example, clause: int | None) -> Card:
        shown = self._shown[example.shard, example.key]
        if example.is_chosen:
            fate, why = FATES[CHOSEN]
        elif clause is not None and clause in example.failed:
            fate, why = "lost", "lost"
        else:
            fate = "lost" if clause is None else "others"
            why = f"lost to {self._clauses[example.failed[0]]}" if example.failed else "its weight is unknown"
        return Card(
            key=example.key,
            shard=example.shard,
            value="" if example.value is None else shown_number(example.value),
            image=shown.image,
            caption=shown.caption,
            fate=fate,
            why=why,
        )


def _clause_view(number: int, survey: ClauseSurvey, whole: Survey, cards: _Cards) -> ClauseView:
    counts = whole.total.clauses[number]
    measures = [
        _number_view(each, number, cards) if isinstance(each, NumberSurvey) else _value_view(each)
        for each in survey.measures
    ]
    return ClauseView(number=number, counts=counts, measures=measures, lost=cards.of(survey.lost.examples, number))


def _number_view(survey: NumberSurvey, clause: int, cards: _Cards) -> MeasureView:
    measure, histogram = survey.measure, survey.histogram
    chart = None
    if histogram is not None and histogram.counts.any():
        groups, names = zip(*FATES.values(), strict=True)
        at = ", ".join(shown_number(cut.value) for cut in measure.cuts)
        label = f"Histogram of {measure.expression.text}, with the cut at {at}"
        chart = histogram_chart(histogram, measure.cuts, groups=groups, names=names, label=label)
    cuts = [
        _cut_rows(cut, cards.of(lower.examples, clause), cards.of(upper.examples, clause))
        for cut, lower, upper in zip(measure.cuts, survey.lower, survey.upper, strict=True)
    ]
    return MeasureView(
        text=measure.expression.text,
        num_unknown=survey.num_unknown,
        chart=chart,
        log=histogram is not None and histogram.is_log,
        cuts=cuts,
        rows=[],
    )


def _cut_rows(cut: Cut, below: list[Card], above: list[Card]) -> CutRows:
    at = shown_number(cut.value)
    lower, upper = f"just below {at}", f"just above {at}"
    if cut.is_at_cut_lower:
        lower = f"{at} and {lower}"
    else:
        upper = f"{at} and {upper}"
    return CutRows(below_title=lower, below=below, above_title=upper, above=above)


def _value_view(survey: ValueSurvey) -> MeasureView:
    known = {value: counts for value, counts in survey.counts.items() if value is not None}
    named = [*survey.measure.named]
    others = sorted(known.keys() - set(named), key=lambda value: (-known[value].total(), value))
    least = LEAST_SHARE * (sum(counts.total() for counts in survey.counts.values()) + survey.others.total())
    values = [*named, *(value for value in others if known[value].total() >= least)][:ROWS_SHOWN]
    rows = [(value, [known[value][fate] for fate in FATES]) for value in values]
    rest = [counts for value, counts in known.items() if value not in values] + [survey.others]
    if any(each.total() for each in rest):
        rows.append(("all others", [sum(each[fate] for each in rest) for fate in FATES]))
    if None in survey.counts:
        rows.append(("unknown", [survey.counts[None][fate] for fate in FATES]))
    num_unknown = survey.counts[None].total() if None in survey.counts else 0
    text = survey.measure.expression.text
    return MeasureView(text=text, num_unknown=num_unknown, chart=None, log=False, cuts=[], rows=rows)


def _sources(survey: Survey) -> list[SourceView]:
    of_shards = by_source({name: ChoiceCounts(num_samples=1, num_chosen=0) for name in survey.counts})
    whole = survey.draws.sum
    return [
        SourceView(
            name=name,
            num_shards=of_shards[name].num_samples,
            counts=counts,
            share_of_draws=survey.draws.by_source[name] / whole if whole else 0.0,
        )
        for name, counts in by_source(survey.counts).items()
    ]


def _weight_chart(draws: Draws) -> tuple[Markup, Markup] | None:
    """Return the histogram of the weight over samples, and that over their draws."""
    histogram = draws.histogram
    if histogram is None or not histogram.counts.any():
        return None
    charts = []
    shares = histogram.counts / np.maximum(histogram.counts.sum(axis=0), 1e-300)
    for group, name in enumerate(("samples", "draws")):
        only = np.zeros_like(shares)
        only[:, group] = shares[:, group] * 100
        own = type(histogram)(
            edges=histogram.edges,
            is_log=histogram.is_log,
            is_right_closed=False,
            counts=only[:, [group]],
            num_below=histogram.num_below,
            num_above=histogram.num_above,
        )
        label = f"Histogram of the weight, in shares of all {name}"
        charts.append(histogram_chart(own, (), groups=["kept"], names=[f"% of the {name}"], label=label))
    return charts[0], charts[1]
