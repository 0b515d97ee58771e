"""Counting: case, odd captions, tables that start anew, and the bounded merge."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_stats import counting, merge
from dataset_stats.counting import NOUN_SCHEMA, NounCounter, sum_nouns
from dataset_stats.example_places import ROW_BITS, ROW_MASK, noun_masks, places
from dataset_stats.measures import SetMeasures
from dataset_stats.merge import merge_counts
from dataset_stats.noun_table import write_noun_table
from dataset_stats.tagging.plurals import IRREGULAR, PluralFolder
from dataset_stats.tagging.taggers import LexiconTagger

CAPTIONS = [
    "A red dog sits on a bench. The dog's hat isn't blue!",
    "Two dogs, one cat (and a cat) near the water.",
    "",
    "日本 😀 \x00 <script>alert(1)</script> =SUM(A1)",
]


@pytest.fixture(scope="module")
def tagger() -> LexiconTagger:
    return LexiconTagger()


@pytest.fixture(scope="module")
def folder() -> PluralFolder:
    return PluralFolder()


def as_dict(table: pa.Table) -> dict[str, int]:
    return dict(zip(table["noun"].to_pylist(), table["count"].to_pylist(), strict=True))


def test_counts_nouns_tokens_and_a_row_of_each(tagger):
    counter = NounCounter(tagger)
    lengths = counter.count(CAPTIONS[:3], first_row=7)
    nouns = counter.take()
    assert as_dict(nouns)["dog"] == 2 and as_dict(nouns)["cat"] == 2
    assert nouns["noun"].to_pylist() == sorted(nouns["noun"].to_pylist())
    rows = places(nouns["example"].to_numpy(), noun_masks(nouns["noun"].to_numpy()) & ROW_MASK)
    found = dict(zip(nouns["noun"].to_pylist(), rows.tolist(), strict=True))
    assert found["dog"] == 7 and found["cat"] == 8
    assert lengths.num_nouns.sum() == sum(as_dict(nouns).values())
    assert lengths.num_tokens[2] == lengths.num_nouns[2] == 0
    assert len(counter.take()) == 0


words = st.sampled_from(
    [
        "the",
        "a",
        "red",
        "Dog",
        "cats",
        "Run",
        "quickly",
        "CAFÉ",
        "Straße",
        "sits.",
        "on,",
        "it's",
        "(two)",
        "U.S.",
        "“Sale”",
        "3rd",
    ]
)


@settings(max_examples=60, deadline=None)
@given(captions=st.lists(st.lists(words, max_size=9).map(" ".join), min_size=1, max_size=5))
def test_recasing_changes_nothing(tagger, captions):
    def count(change) -> dict[str, int]:
        counter = NounCounter(tagger)
        counter.count([change(caption) for caption in captions])
        return as_dict(counter.take())

    assert count(str.lower) == count(str.upper) == count(str.title) == count(str.swapcase)


def test_one_batch_equals_many(tagger, monkeypatch):
    captions = CAPTIONS * 30
    whole = NounCounter(tagger)
    whole_lengths = whole.count(captions)
    expected = whole.take()
    monkeypatch.setattr(counting, "CAPTIONS_PER_BATCH", 7)
    monkeypatch.setattr(counting, "MAX_WORDS", 20)  # the tables start anew over and over
    small = NounCounter(tagger)
    lengths = small.count(captions)
    assert small.take().equals(expected)
    assert np.array_equal(lengths.num_nouns, whole_lengths.num_nouns)


def test_a_caption_of_a_megabyte(tagger):
    counter = NounCounter(tagger)
    lengths = counter.count(["dog " * 250_000, "x" * 1_000_000])
    assert lengths.num_nouns.tolist() == [250_000, 1]
    assert as_dict(counter.take())["dog"] == 250_000


def noun_table(counts: dict[str, int]) -> pa.Table:
    rows = sorted(counts.items(), key=lambda item: item[0].encode())
    nouns, counts = [noun for noun, _ in rows], [count for _, count in rows]
    return pa.table([nouns, counts, noun_masks(nouns) & ROW_MASK], schema=NOUN_SCHEMA)  # all in row 0


@settings(max_examples=12, deadline=None)
@given(
    sets=st.lists(
        st.lists(
            st.dictionaries(st.text("abé日z", max_size=3), st.integers(1, 9), max_size=12), min_size=1, max_size=7
        ),
        min_size=1,
        max_size=3,
    ),
    batch=st.integers(1, 5),
)
def test_merge_adds_up_whatever_the_batches(tmp_path_factory, sets, batch):
    folder = tmp_path_factory.mktemp("merge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "ROWS_PER_BATCH", batch)
        patch.setattr(merge, "MAX_OPEN_FILES", 2)
        paths: dict[str, list] = {}
        for number, shards in enumerate(sets):
            for shard, counts in enumerate(shards):
                path = folder / f"{number}-{shard}.parquet"
                pq.write_table(noun_table(counts), path)
                paths.setdefault(f"set{number}", []).append(path)
        merge_counts(paths, folder / "nouns.parquet", scratch=folder / "scratch")
    merged = pq.read_table(folder / "nouns.parquet")
    nouns = merged["noun"].to_pylist()
    assert nouns == sorted(set(nouns), key=str.encode)
    for number, shards in enumerate(sets):
        expected: dict[str, int] = {}
        present: dict[str, list[int]] = {}
        for shard, counts in enumerate(shards):
            for noun, count in counts.items():
                expected[noun] = expected.get(noun, 0) + count
                present.setdefault(noun, []).append(shard)
        found = dict(zip(nouns, merged[f"set{number}"].to_pylist(), strict=True))
        examples = dict(zip(nouns, merged[f"set{number} example"].to_pylist(), strict=True))
        assert {noun: count for noun, count in found.items() if count} == expected
        shown = {noun: example for noun, example in examples.items() if example is not None}
        assert shown.keys() == present.keys()
        for noun, example in shown.items():
            mask = int(noun_masks([noun])[0])
            place = int(places(np.array([example]), np.array([mask]))[0])
            assert place == min((shard << ROW_BITS for shard in present[noun]), key=lambda place: place ^ mask)


def test_merging_more_files_takes_no_more_memory(tmp_path, monkeypatch):
    """However many shards there are, at most MAX_OPEN_FILES batches of ROWS_PER_BATCH rows are in memory."""
    monkeypatch.setattr(merge, "ROWS_PER_BATCH", 50)
    monkeypatch.setattr(merge, "MAX_OPEN_FILES", 4)
    largest = 0
    original = merge._sum_rows

    def spy(table: pa.Table, schema: pa.Schema) -> pa.Table:
        nonlocal largest
        largest = max(largest, len(table))
        return original(table, schema)

    monkeypatch.setattr(merge, "_sum_rows", spy)
    paths = []
    for shard in range(30):
        paths.append(tmp_path / f"{shard}.parquet")
        pq.write_table(noun_table({f"n{shard * 7 + number:05d}": 1 for number in range(300)}), paths[-1])
    merge_counts({"a": paths}, tmp_path / "nouns.parquet", scratch=tmp_path / "scratch")
    assert pq.read_table(tmp_path / "nouns.parquet")["a"].to_numpy().sum() == 30 * 300
    assert 50 <= largest <= 4 * 50


@pytest.mark.parametrize(
    ("noun", "singular"),
    [
        ("dogs", "dog"), ("benches", "bench"), ("cities", "city"), ("knives", "knife"), ("shelves", "shelf"),
        ("cookies", "cookie"), ("houses", "house"), ("buses", "bus"), ("men", "man"), ("children", "child"),
        ("leaves", "leaf"), ("potatoes", "potato"), ("raincoats", "raincoat"), ("glass", "glass"), ("lens", "lens"),
        ("dress", "dress"), ("news", "news"), ("series", "series"), ("christmas", "christmas"), ("gas", "gas"),
        ("texas", "texas"), ("physics", "physics"), ("dog", "dog"), ("selfies", "selfies"), ("日本s", "日本s"),
        ("s", "s"),
    ],
)  # fmt: skip
def test_plurals_fold_only_where_the_lexicon_agrees(folder, noun, singular):
    assert folder(noun) == singular


def test_folding_finds_the_lexicons_plurals_and_leaves_its_singulars(folder):
    tags = folder._tags
    plurals = [word for word, tag in tags.items() if tag == "NNS" and word.isalpha() and word.islower()]
    assert sum(folder(word) != word for word in plurals) > 0.9 * len(plurals) > 5000
    assert all(folder(word) == word for word, tag in tags.items() if tag == "NN" and word not in IRREGULAR)


@settings(max_examples=30, deadline=None)
@given(
    counts=st.dictionaries(
        st.sampled_from(["dog", "dogs", "bench", "benches", "glass", "glasses", "lens", "zzton", "man", "men"]),
        st.tuples(st.integers(0, 20), st.integers(0, 20)),
        min_size=1,
    )
)
def test_folded_numbers_are_those_of_the_singular_column(tmp_path_factory, folder, counts):
    out = tmp_path_factory.mktemp("fold")
    names = ["one", "two"]
    totals = {name: sum(pair[index] for pair in counts.values()) for index, name in enumerate(names)}
    files = {}
    for index, name in enumerate(names):
        pq.write_table(noun_table({noun: pair[index] for noun, pair in counts.items() if pair[index]}), out / name)
        files[name] = [out / name]
    merge_counts(files, out / "merged.parquet", scratch=out / "scratch")
    measures = {name: SetMeasures(total_nouns=total, num_captions=1) for name, total in totals.items()}
    write_noun_table(out / "merged.parquet", out, measures=measures, valid_threshold=10, num_top=10, singular=folder)
    table = pq.read_table(out / "nouns.parquet").to_pandas()
    for name, measure in measures.items():
        folded = table.groupby("singular")[name].sum() if len(table) else table[name]
        assert measure.distinct_nouns == (table[name] > 0).sum()
        assert measure.folded_distinct_nouns == (folded > 0).sum()
        assert measure.folded_valid_distinct_nouns == (folded > 10).sum()


@pytest.mark.parametrize("names", [["total", "b"], ["b", "total"]])
def test_a_set_called_total_keeps_its_counts(tmp_path, monkeypatch, names):
    monkeypatch.setattr("dataset_stats.noun_table.ROWS_PER_BATCH", 2)
    counts = {"bench": (1, 1), "cat": (9, 0), "dog": (3, 4), "lamp": (0, 5), "tree": (2, 0)}
    files = {}
    for index, name in enumerate(names):
        pq.write_table(noun_table({noun: pair[index] for noun, pair in counts.items() if pair[index]}), tmp_path / name)
        files[name] = [tmp_path / name]
    merge_counts(files, tmp_path / "merged.parquet", scratch=tmp_path / "scratch")
    measures = {
        name: SetMeasures(total_nouns=total, num_captions=1) for name, total in zip(names, (15, 10), strict=True)
    }
    table = write_noun_table(
        tmp_path / "merged.parquet", tmp_path, measures=measures, valid_threshold=10, num_top=4, singular=None
    )
    shown = table.top[["noun", *names]].to_numpy().tolist()
    assert shown == [["cat", 9, 0], ["dog", 3, 4], ["lamp", 0, 5], ["bench", 1, 1]]


def test_sum_nouns_sorts_by_bytes():
    table = sum_nouns([noun_table({"b": 1, "é": 2}), noun_table({"b": 2, "日": 1})])
    assert as_dict(table) == {"b": 3, "é": 2, "日": 1}
    assert json.dumps(table["noun"].to_pylist()) == json.dumps(["b", "é", "日"])
