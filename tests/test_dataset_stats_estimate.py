"""Estimates from samples: which rows are drawn, what their errors are worth, and that full counts stay untouched."""

import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stats_run import caption_rows, run_stage, write_caption_shards

from dataset_stats.captions import Address, RawOpening, RowSample, read_rows
from dataset_stats.estimate import estimate_set
from dataset_stats.set_rows import SetRows
from dataset_stats.sources import sample_sources
from errors import UserError
from pipelines.engine.pieces import Source
from pipelines.store.manifest import read_manifest
from pipelines.store.summary import read_summary

NOUNS = ["dog", "cat", "bench", "lamp", "tree", "house", "river", "bridge", "apple", "chair", "table", "window"]
SHARD_SIZES = {"laion_0": 150, "laion_1": 90, "laion_2": 60}


def varied_captions(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    rare = [f"a zq{number}ton" for number in range(count)]
    return [
        "The image shows " + " near ".join(f"a {NOUNS[n]}" for n in rng.integers(0, len(NOUNS), rng.integers(1, 6)))
        + (f" and {rare[index]}." if rng.random() < 0.3 else ".")
        for index in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("estimate") / "run"
    shards = {}
    for number, (shard, size) in enumerate(SHARD_SIZES.items()):
        captions = varied_captions(size, number)
        alt_texts = [f"dog {number}" if number % 7 else None for number in range(size)]
        shards[shard] = caption_rows(shard, alt_texts, captions)
    write_caption_shards(run, shards)
    run_stage(run)
    return run


def sampled_keys(run: Path) -> dict[str, list[str]]:
    """Keys of the samples that were counted, by column."""
    keys: dict[str, list[str]] = {}
    for path in sorted((run / "stats-sample" / "counts").glob("*.captions.parquet")):
        keys.setdefault(path.name.split(".")[1], []).extend(pq.read_table(path)["key"].to_pylist())
    return keys


def test_a_sample_keeps_away_from_the_full_count_and_says_what_it_is(run):
    full = {path.name: path.read_bytes() for path in (run / "stats").iterdir() if path.is_file()}
    summary = read_summary(run)["dataset_stats"]
    run_stage(run, "dataset_stats.sample=120", "dataset_stats.seed=3")
    assert {path.name: path.read_bytes() for path in (run / "stats").iterdir() if path.is_file()} == full
    assert read_summary(run)["dataset_stats"] == summary
    estimate = read_summary(run)["dataset_stats_sample"]["dense"]
    assert estimate["estimate"]["num_samples"] == 300 and estimate["estimate"]["num_drawn"] == 120
    whole, error = estimate["estimate"]["whole_total_nouns"]
    assert 0 < abs(whole - summary["dense"]["total_nouns"]) < 4 * error
    table = (run / "stats-sample" / "table1.md").read_text()
    assert "an estimate from a sample" in table and "dense 120 of 300 samples" in table and " ± " in table
    assert "An estimate, not a full count" in (run / "stats-sample" / "report.html").read_text()
    assert "±" not in (run / "stats" / "table1.md").read_text()
    manifest = read_manifest(run / "stats-sample")
    assert manifest.extra["sample"] == {"size": 120, "seed": 3}
    assert "rate_errors" not in json.dumps(manifest.extra)


def test_the_seed_decides_the_sample_and_workers_do_not(run):
    def outcome(*overrides: str) -> tuple[dict, dict]:
        shutil.rmtree(run / "stats-sample", ignore_errors=True)
        run_stage(run, "dataset_stats.sample=120", *overrides)
        return read_summary(run)["dataset_stats_sample"], sampled_keys(run)

    first = outcome("dataset_stats.seed=3")
    assert outcome("dataset_stats.seed=3", "engine.samples_per_slice=1000") == first
    other = outcome("dataset_stats.seed=4")
    assert other[1] != first[1]
    for keys in (first[1], other[1]):
        assert sorted(keys["caption"]) == sorted(keys["alt_text"]), "alt text and caption of the same images"
        assert len(set(keys["caption"])) == 120


def test_a_sample_of_everything_is_the_full_count_without_error(run):
    run_stage(run, "dataset_stats.sample=100000")
    full, sample = read_summary(run)["dataset_stats"], read_summary(run)["dataset_stats_sample"]
    for name in full:
        estimate = sample[name].pop("estimate")
        assert sample[name] == full[name]
        assert set(estimate["standard_errors"].values()) == {0.0}
        assert estimate["whole_total_nouns"] == [full[name]["total_nouns"], 0.0]


def test_a_sample_too_small_to_have_errors_is_refused(run):
    with pytest.raises(UserError, match="at least 100"):
        run_stage(run, "dataset_stats.sample=20")


def test_a_set_too_large_to_draw_from_is_refused():
    path = str(Address(layout="captions", column="caption", path="a.parquet"))
    sources = [Source(name=str(number), path=path, identity="", num_samples=10_000_000) for number in range(100)]
    with pytest.raises(UserError, match=r"1,000,000,000 samples is more than can be drawn from \(999,999,999\)"):
        sample_sources(sources, 1000, seed=0)
    assert sum(source.num_samples for source in sample_sources(sources[1:], 1000, seed=0)) == 1000


def test_every_row_is_as_likely_to_be_drawn():
    sources = [
        Source(name=name, path=str(Address(layout="captions", column="caption", path=f"{name}.parquet")), identity="",
               num_samples=size)
        for name, size in (("a", 5), ("b", 20), ("c", 75))
    ]  # fmt: skip
    drawn = np.zeros(100)
    first = {"a": 0, "b": 5, "c": 25}
    for seed in range(400):
        sampled = sample_sources(sources, 20, seed=seed)
        assert sum(source.num_samples for source in sampled) == 20
        for source in sampled:
            sample = Address.parse(source.path).sample
            assert sample is not None
            rows = sample.rows()
            assert len(np.unique(rows)) == len(rows) == source.num_samples
            drawn[first[source.name.split(".")[0]] + rows] += 1
    # 400 draws of each row at probability 0.2: 80, with a standard deviation of 8.
    assert drawn.min() > 80 - 5 * 8 and drawn.max() < 80 + 5 * 8


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    texts = [f"text {number}" for number in range(40)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "a.csv").write_text("text\n" + "\n".join(texts) + "\n")
    pq.write_table(pa.table({"text": texts}), folder / "a.parquet", row_group_size=7)
    (folder / "texts").mkdir()
    for number, text in enumerate(texts):
        (folder / "texts" / f"sa_{number:02d}.txt").write_text(text)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for path in sorted((folder / "texts").iterdir()):
            tar.add(path, path.name)
    return {
        "jsonl": folder / "a.jsonl",
        "csv": folder / "a.csv",
        "parquet": folder / "a.parquet",
        "folder": folder / "texts",
        "tar": folder / "a.tar",
    }


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "folder", "tar"])
def test_every_layout_reads_exactly_the_drawn_rows(files, kind):
    layout = kind if kind in ("jsonl", "csv", "parquet") else "text"
    sample = RowSample(num_rows=40, num_chosen=11, seeds=(1, 2))
    address = Address(layout=layout, column="text", path=str(files[kind]), sample=sample)
    assert Address.parse(str(address)) == address

    def texts(start: int, stop: int) -> list[str | None]:
        return [row.text for block in read_rows(address, start, stop, opening=RawOpening()) for row in block]

    assert texts(0, 11) == [f"text {row}" for row in sample.rows()]
    assert texts(0, 4) + texts(4, 8) + texts(8, 11) == texts(0, 11)


def write_sample(path: Path, nouns: Sequence[list[str] | None]) -> None:
    """A caption file; rows without a list are rejects."""
    lengths = [None if words is None else len(words) for words in nouns]
    columns = {
        "num_tokens": pa.array([None if length is None else 2 * length for length in lengths], pa.int32()),
        "num_nouns": pa.array(lengths, pa.int32()),
        "num_characters": pa.array(lengths, pa.int32()),
        "language": pa.array([None if length is None else "English" for length in lengths], pa.string()),
        "is_boilerplate": pa.array([None if length is None else length % 2 == 0 for length in lengths], pa.bool_()),
        "flags": pa.array([["loop"] if length and length > 9 else [] for length in lengths], pa.list_(pa.string())),
        "reject": pa.array(["no_text" if words is None else None for words in nouns], pa.string()),
        "nouns": pa.array(nouns, pa.list_(pa.string())),
    }
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("reject_fraction", [0.0, 0.4])
def test_errors_are_the_spread_over_samples(tmp_path, reject_fraction):
    """Of a known population, many samples are drawn; what one sample says about its error must be their spread."""
    rng = np.random.default_rng(7)
    population, size, threshold = 6000, 900, 5
    weights = (np.arange(8000) + 2.7) ** -1.07
    lengths = rng.poisson(8, population) + 1
    words = np.split(rng.choice(8000, lengths.sum(), p=weights / weights.sum()), np.cumsum(lengths)[:-1])
    is_reject = rng.random(population) < reject_fraction

    def numbers(drawn: np.ndarray) -> list[float]:
        rows = drawn[~is_reject[drawn]]
        counts = np.bincount(np.concatenate([words[row] for row in rows]))
        dn, vn = (counts > 0).sum(), (counts > threshold).sum()
        long, even = lengths[rows] > 9, lengths[rows] % 2 == 0
        return [dn, vn, vn / dn, lengths[rows].sum(), lengths[rows].mean(), even.mean(), long.mean()]

    spread = np.std([numbers(rng.choice(population, size, replace=False)) for _ in range(150)], axis=0, ddof=1)
    names = [
        "distinct_nouns", "valid_distinct_nouns", "valid_fraction", "total_nouns", "nouns_per_image",
        "boilerplate_fraction", "flag_fraction.loop",
    ]  # fmt: skip
    errors = []
    for seed in range(4):
        rows = rng.choice(population, size, replace=False)
        texts = [None if is_reject[row] else [f"w{word}" for word in words[row]] for row in rows]
        write_sample(tmp_path / "a.parquet", texts)
        estimate = estimate_set(
            SetRows(files=[tmp_path / "a.parquet"]),
            num_samples=population,
            seed=seed,
            valid_threshold=threshold,
            singular=None,
        )
        errors.append([estimate.errors[name] for name in names])
        total = lengths[~is_reject].sum()
        assert abs(estimate.whole_total_nouns[0] - total) < 4.5 * estimate.whole_total_nouns[1]
        rare = f"w{max(int(word[1:]) for word in next(text for text in texts if text))}"
        assert estimate.rate_errors["w0"] > estimate.rate_errors[rare] > 0
    ratios = np.mean(errors, axis=0) / spread
    assert all(0.8 < ratio < 1.6 for ratio in ratios[:3]), f"subsampled: {ratios}"
    assert all(0.8 < ratio < 1.25 for ratio in ratios[3:]), f"closed forms: {ratios}"
