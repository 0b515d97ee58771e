"""`make choose`: what is chosen is written, not encoded; a plan counts, finds the nearest ones, writes no choice."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from choose_run import HOSTILE, SHARDS, all_rows, rows_of, type_choose, write_run
from raw_shards import encode, photo, write_tar
from storage_servers import serve_folder

from curation.choose.histograms import empty_histogram
from curation.choose.measures import Cut, measures_of
from curation.choose.survey import NumberSurvey, Survey, ValueSurvey
from curation.choose.tables import ChoosingTable
from errors import UserError
from pipelines.columns.choice_settings import ChoiceSettings
from pipelines.columns.choices import Choice
from pipelines.columns.expressions import parse_expression
from pipelines.columns.written_choices import read_chosen
from pipelines.raw.kinds.file_shard import FileShard
from pipelines.store.manifest import read_manifest

WHERE = (
    "min_side >= 400 and 0.15 < clip_score <= 0.3 and not flags.loop and format in ('jpeg', 'png') and aesthetic > 4"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("choose") / "run"
    write_run(run)
    return run


def survey_of(run: Path, captions: dict[str, float | str] | None = None, shards=tuple(SHARDS), **keys) -> Survey:
    weights = captions or {"caption": 1.0}
    listed = [{"column": column, "weight": weight} for column, weight in weights.items()]
    settings = ChoiceSettings.of("stage2", {**keys, "captions": listed})
    assert settings is not None
    return Survey(ChoosingTable(choice=Choice(run, settings), paths=[], caption_weights=weights), list(shards))


# What each clause of WHERE says of a sample: None is unknown.
def truths(row: dict) -> list[bool | None]:
    return [
        row["min_side"] >= 400,
        np.float32(0.15) < np.float32(row["clip_score"]) <= np.float32(0.3),
        "loop" not in row["flags"],
        None if row["format"] is None else row["format"] in ("jpeg", "png"),
        None if math.isnan(row["aesthetic"]) else row["aesthetic"] > 4,
    ]


def test_histograms_count_every_sample_in_the_bar_and_fate_that_it_has(run) -> None:
    survey, rows = survey_of(run, where=WHERE), all_rows()
    chosen = [all(truths(row)) for row in rows]
    assert survey.total.num_chosen == sum(chosen) > 3
    for number, name in ((0, "min_side"), (1, "clip_score"), (4, "aesthetic")):
        (found,) = survey.clauses[number].measures
        assert isinstance(found, NumberSurvey) and found.histogram is not None
        values = np.array([row[name] for row in rows])
        fates = [
            0 if is_chosen else 2 if truths(row)[number] else 1 for row, is_chosen in zip(rows, chosen, strict=True)
        ]
        assert found.num_unknown == np.isnan(values).sum()
        expected = np.zeros_like(found.histogram.counts)
        edges = found.histogram.edges
        for value, fate in zip(values, fates, strict=True):
            if not math.isnan(value):
                inside = (edges[:-1] < value) & (value <= edges[1:])
                if not found.histogram.is_right_closed:
                    inside = (edges[:-1] <= value) & (value < edges[1:])
                place = int(inside.argmax()) if inside.any() else 0 if value < edges[0] else len(inside) - 1
                expected[place, fate] += 1
        assert np.array_equal(found.histogram.counts, expected)
        # No bar crosses the cut: on one side of it none is lost to the clause, on the other all.
        at = found.measure.cuts[0].value
        assert at in edges
        assert found.histogram.counts[edges[:-1] < at, 0].sum() == 0
    flags, formats = (survey.clauses[number].measures[0] for number in (2, 3))
    assert isinstance(flags, ValueSurvey) and isinstance(formats, ValueSurvey)
    assert flags.counts["yes"].total() == sum(bool(row["flags"]) for row in rows)
    assert flags.counts["yes"][1] == flags.counts["yes"].total()
    for value in ("jpeg", "png", "webp", None):
        of_it = [is_chosen for row, is_chosen in zip(rows, chosen, strict=True) if row["format"] == value]
        assert (formats.counts[value].total(), formats.counts[value][0]) == (len(of_it), sum(of_it))


def test_the_examples_are_the_nearest_ones_whatever_the_order_of_shards(run) -> None:
    survey, rows = survey_of(run, where=WHERE), all_rows()
    for number, name in ((0, "min_side"), (1, "clip_score"), (4, "aesthetic")):
        (found,) = survey.clauses[number].measures
        assert isinstance(found, NumberSurvey)
        for cut, lower, upper in zip(found.measure.cuts, found.lower, found.upper, strict=True):
            values = [row[name] for row in rows if not math.isnan(row[name])]
            above = [value for value in values if cut.is_above(np.array([value]))[0]]
            below = [value for value in values if not cut.is_above(np.array([value]))[0]]
            for picks, side in ((lower, below), (upper, above)):
                distances = sorted(abs(value - cut.value) for value in side)[:8]
                assert [abs(each.value - cut.value) for each in picks.examples] == distances
                by_key = {row["key"]: row for row in rows}
                for each in picks.examples:
                    own = truths(by_key[each.key])
                    assert each.failed == tuple(place for place, is_true in enumerate(own) if not is_true)
                    assert each.is_chosen == all(own)
    other = survey_of(run, where=WHERE, shards=tuple(reversed(SHARDS)))
    assert other.examples() == survey.examples()
    assert {each.is_chosen for each in survey.kept.examples} == {True}
    assert {each.is_chosen for each in survey.lost.examples} == {False}
    # By lot, not the first ones.
    assert len({each.shard for each in survey.lost.examples}) > 1


@pytest.mark.parametrize(
    ("clause", "measures"),
    [
        ("min_side >= 512", {"min_side": [(512, False)]}),
        ("512 < min_side", {"min_side": [(512, True)]}),
        ("min_side <= -2 ** 3", {"min_side": [(-8, True)]}),
        ("0.5 <= clip_score < 2", {"clip_score": [(0.5, False), (2, False)]}),
        ("clip_score > 0.7", {"clip_score": [(float(np.float32(0.7)), True)]}),
        ("not (min_side > 5 or clip_score < 1)", {"min_side": [(5, True)], "clip_score": [(1, False)]}),
        ("width > 2 * min_side", {"width - 2 * min_side": [(0, True)]}),
        ("width / min_side < 3", {"width / min_side": [(3, False)]}),
        ("coalesce(aesthetic, 1) > 0.2", {"coalesce(aesthetic, 1)": [(0.2, True)]}),
        ("min_side in (3, 1)", {"min_side": [(1, False), (3, False)]}),
        ("length(caption) > 9", {"length(caption)": [(9, True)]}),
        ("'dog' in caption", {"'dog' in caption": []}),
        ("flags.loop", {"flags.loop": []}),
        ("is_null(aesthetic) or aesthetic > 4", {"is_null(aesthetic)": [], "aesthetic": [(4, True)]}),
        ("lower(format) == 'PNG'", {"lower(format)": []}),
        ("(aesthetic if flags.loop else width) > 3", {"aesthetic if flags.loop else width": [(3, True)]}),
        ("True", {}),
        ("1 < 2", {}),
        ("1 in (1, 2)", {}),
    ],
)
def test_what_a_clause_compares_is_found(run, clause: str, measures: dict) -> None:
    settings = ChoiceSettings.of("stage2", {"where": "True"})
    assert settings is not None
    schema = Choice(run, settings).columns.schema()
    expression = parse_expression(clause, key="features.stage2.where")
    expression.check(schema, "bool")
    found = measures_of(expression, schema)
    assert {each.expression.text: [(cut.value, cut.is_at_cut_lower) for cut in each.cuts] for each in found} == measures
    for each in found:
        assert each.is_number == (bool(each.cuts))


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_is_an_edge_and_nothing_is_lost(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [rng.normal(5, 1, 999), rng.lognormal(3, 3, 999), rng.integers(0, 2000, 999) * 1.0, np.full(9, 7.0)][
        seed % 4
    ]
    at = float(rng.choice([*values[:3], 0.22, 1e9, -3.0, 1e-12]))
    cuts = [Cut(value=at, is_at_cut_lower=bool(seed % 3)), Cut(value=at + 0.7, is_at_cut_lower=False)][: 1 + seed % 2]
    histogram = empty_histogram(np.sort(values), cuts, is_integer=seed % 4 == 2, num_groups=1)
    infinite = np.array([math.inf, -math.inf])
    histogram.add(np.concatenate([values, infinite]), np.zeros(len(values) + 2, int))
    assert at in histogram.edges
    assert (np.diff(histogram.edges) > 0).all()
    assert histogram.counts.sum() == len(values) + 2
    below = values <= at if cuts[0].is_at_cut_lower else values < at
    assert histogram.counts[histogram.edges[1:] <= at].sum() == below.sum() + 1


def test_weights_say_how_many_samples_they_are_worth_and_what_is_drawn(run) -> None:
    survey = survey_of(
        run,
        {"caption": "clip_score", "short": 0.25},
        where="min_side > 200",
        weight="aesthetic",
        weight_temperature=0.5,
    )
    rows = [row for row in all_rows() if row["min_side"] > 200 and not math.isnan(row["aesthetic"])]
    weights = np.exp(np.array([row["aesthetic"] for row in rows]) / 0.5)
    assert survey.draws.effective_number == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert survey.draws.share_of_largest(len(rows)) == pytest.approx(weights.max() / weights.mean())
    most = [row["key"] for row in sorted(rows, key=lambda row: -row["aesthetic"])][:8]
    assert [each.key for each in survey.draws.most_drawn.examples] == most
    own = np.array([row["clip_score"] for row in rows])
    share = (weights * own / (own + 0.25)).sum() / weights.sum()
    assert survey.draws.captions["caption"] / survey.draws.sum == pytest.approx(share)
    is_sam = np.array([row["shard"] == "sam_00" for row in rows])
    assert survey.draws.by_source["sam_#"] / survey.draws.sum == pytest.approx(weights[is_sam].sum() / weights.sum())
    assert survey.draws.histogram is not None
    assert survey.draws.histogram.counts[:, 0].sum() == len(rows)
    assert survey.draws.histogram.counts[:, 1].sum() == pytest.approx(survey.draws.sum)


class Tags(HTMLParser):
    """Whether every tag that is opened is closed, and which there are."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "line", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect"):
            assert self.open.pop() == tag


def test_a_plan_writes_a_page_and_no_choice_and_reads_the_images_it_shows_alone(run, monkeypatch) -> None:
    read: list[str] = []
    image_bytes = FileShard.image_bytes

    def count(self, sample):
        read.append(sample.key)
        return image_bytes(self, sample)

    monkeypatch.setattr(FileShard, "image_bytes", count)
    before = {path for path in run.rglob("*") if ".headers" not in path.parts}
    type_choose(run, monkeypatch, f"features.stage2.where={WHERE}", plan=True)
    page = run / "choose" / "stage2.html"
    after = {path for path in run.rglob("*") if ".headers" not in path.parts}
    assert after - before <= {page, page.parent, run / ".run.lock", run / "run.json"}
    assert not (run / "choices").exists()
    text = page.read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    shown = {(tag, own["title"]) for tag, own in tags.seen if tag == "p" and "title" in own}
    assert len(read) == len(set(read)) == len(shown) < 140
    # Nothing that a caption says becomes a part of the page.
    assert HOSTILE not in text and "&lt;script&gt;window.hacked" in text
    assert not any(tag == "script" or any(name.startswith("on") for name in own) for tag, own in tags.seen)
    assert all(own["src"].startswith("data:image/webp;base64,") for tag, own in tags.seen if tag == "img")
    num_chosen = sum(all(truths(row)) for row in all_rows())
    assert f"{num_chosen} of 150 samples are chosen" in text
    type_choose(run, monkeypatch, f"features.stage2.where={WHERE}", plan=True)
    assert page.read_text() == text


def test_of_remote_shards_whose_headers_are_known_the_images_that_are_shown_are_read(tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    write_run(run)
    for path in (run / "raw").iterdir():  # whole pictures, so that headers are little beside them
        keys = [row["key"] for row in rows_of(path.stem)]
        write_tar(path, [(f"{key}.jpg", encode(photo(n, 300, 200), quality=100)) for n, key in enumerate(keys)])
    raw = (run / "raw").rename(tmp_path / "raw")
    with serve_folder(raw) as server:
        names = ",".join(f"{server.url}/{path.name}" for path in sorted(raw.iterdir()))
        where = "features.stage2.where=min_side > 800"
        type_choose(run, monkeypatch, where, plan=True, text=f"data.shards={names}")
        before = server.bytes_sent
        type_choose(run, monkeypatch, where, plan=True, text=f"data.shards={names}")
        text = (run / "choose" / "stage2.html").read_text()
        num_shown = len(set(re.findall(r'title="(\S+/\S+)"', text)))
        assert text.count("<img") >= num_shown > 20
        num_bytes = sum(path.stat().st_size for path in raw.iterdir())
        # Ranges are a little longer than images.
        assert 0 < server.bytes_sent - before < 0.6 * num_bytes


def test_a_choice_is_written_and_nothing_encoded(tmp_path, monkeypatch, caplog) -> None:
    run = tmp_path / "run"
    write_run(run)
    type_choose(run, monkeypatch, "features.stage2.where=min_side > 500", stage="2")
    keys, chosen = read_chosen(run / "choices" / "stage2", "laion_1")
    assert (keys, chosen.tolist()) == (
        [row["key"] for row in rows_of("laion_1")],
        [row["min_side"] > 500 for row in rows_of("laion_1")],
    )
    assert sorted(read_manifest(run / "choices" / "stage2").shards) == sorted(SHARDS)
    assert not (run / "features").exists() and not (run / "choose").exists()
    # Without a table all that choose are meant.
    other = "features.stage3={extends='stage2',shards=['sam_*'],where='width > 900'}"
    type_choose(run, monkeypatch, "features.stage2.where=min_side > 500", other)
    assert sorted(path.name for path in (run / "choices").iterdir()) == ["stage2", "stage3"]
    assert sorted(read_manifest(run / "choices" / "stage3").shards) == ["sam_00"]
    assert "nothing to choose anew" in caplog.text


def test_a_choice_of_nothing_has_its_page_and_is_refused(run, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"features.stage2.where = .* keeps nothing: 0 of 150 samples"):
        type_choose(run, monkeypatch, "features.stage2.where=min_side > 9000", plan=True)
    text = (run / "choose" / "stage2.html").read_text()
    assert "Nothing is chosen" in text
    assert "<svg" in text and ">9,000</text>" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "no table of .features. has a where, a weight, or captions"),
        (["features.stage2.where=min_sid > 3"], r"there is no column 'min_sid' \(did you mean min_side\?\)"),
        (["features.stage2.where=sharpness > 3"], r"no column 'sharpness' yet: .*columns"),
        (["features.stage2.where=min_side > 3", "features.stage2.shards=['lion_*']"], "pattern 'lion_.' matches none"),
        (["features.stage2.weight=5"], "features.stage2.weight: "),
        (
            ["features.stage2.weight=min_side - 500"],
            r"weight: min_side - 500 is -\d+ for 'laion_0-\d+' of laion_0, and for",
        ),
    ],
)
def test_what_is_wrong_is_said_as_for_features(run, monkeypatch, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        type_choose(run, monkeypatch, *settings, plan=True)
    with pytest.raises(UserError, match=message):
        type_choose(run, monkeypatch, *settings)
    assert not (run / "choices").exists() and not (run / "run.json").exists()


def test_values_that_are_all_unknown_have_no_chart(tmp_path) -> None:
    run = tmp_path / "run"
    write_run(run)
    survey = survey_of(run, where="log(-min_side) > 1 or min_side > 200")
    (lost, side) = survey.clauses[0].measures
    assert isinstance(lost, NumberSurvey) and lost.histogram is not None
    assert (lost.num_unknown, lost.histogram.counts.sum()) == (150, 0)
    assert isinstance(side, NumberSurvey) and side.measure.is_integer
