"""What columns say of a set's samples: duplicate images and claims, counted exactly, only where they are there."""

import random
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from columns_run import write_captions, write_columns
from sound_run import require_sound
from stats_run import run_stage

from dataset_stats import marked_nouns
from dataset_stats.counting import NounCounter
from dataset_stats.tagging.taggers import LexiconTagger
from errors import UserError
from pipelines.store.manifest import read_manifest
from pipelines.store.summary import read_summary

RECIPE = """
[data]
shards = "{run}/raw/*.tar"
[engine]
in_process = true
[dataset_stats]
tagger = "textblob"
num_gallery_images = 0
[dataset_stats.sets]
"SAM" = {}
"kept" = { where = "min_side >= 512" }
"""
SHARDS = ("sa_0", "sa_1")
NUM_ROWS = 40
THINGS = ("dog", "cat", "tree", "lamp")


def samples_of(shard: str) -> list[dict]:
    """A caption of three sentences each, of which some are unsupported, most often one about a boat."""
    rng = random.Random(shard)
    samples = []
    for number in range(NUM_ROWS):
        things = rng.choices(THINGS, k=2)
        has_boat = number % 3 == 0
        supports = [rng.choice([0.9, None]), rng.choice([0.9, 0.9, 0.2]), 0.1 if has_boat else 0.8]
        last = "A boat floats." if has_boat else f"A {rng.choice(THINGS)} stands."
        samples.append(
            {
                "key": f"{shard}-{number:02d}",
                "caption": f"A {things[0]} sits. A {things[1]} runs. {last}",
                "min_side": rng.choice([256, 512]),
                "supports": supports,
                "kind": rng.choice([None, None, "exact", "perceptual"]),
                "group": f"group {rng.randrange(9)}",
            }
        )
    samples[7] |= {"caption": None, "supports": None, "kind": None, "group": None}
    return samples


def write_claims(folder: Path, shards: dict[str, list[dict]]) -> None:
    tables = {}
    for shard, samples in shards.items():
        supports = [sample["supports"] for sample in samples]
        known = [found and [support for support in found if support is not None] for found in supports]
        marked = [
            found and [number for number, support in enumerate(found) if support is not None and support < 0.5]
            for found in supports
        ]
        tables[shard] = {
            "key": [sample["key"] for sample in samples],
            "num_claims": pa.array([found and len(found) for found in supports], pa.int32()),
            "num_unknown": pa.array([found and found.count(None) for found in supports], pa.int32()),
            "unsupported_share": pa.array(
                [None if own is None or not of else len(own) / len(of) for own, of in zip(marked, known, strict=True)],
                pa.float32(),
            ),
            "unsupported_sentences": pa.array(marked, pa.list_(pa.int32())),
            "reject": pa.array([None if found else "no_caption" for found in supports], pa.string()),
        }
    write_columns(folder, tables)


def write_duplicates(run: Path, shards: dict[str, list[dict]]) -> None:
    tables = {
        shard: {
            "key": [sample["key"] for sample in samples],
            "duplicate": pa.array([sample["caption"] and sample["kind"] is not None for sample in samples], pa.bool_()),
            "duplicate_of": pa.array([sample["kind"] and sample["group"] for sample in samples], pa.string()),
            "duplicate_kind": pa.array([sample["kind"] for sample in samples], pa.string()),
            "duplicate_group": pa.array([sample["group"] for sample in samples], pa.string()),
        }
        for shard, samples in shards.items()
    }
    write_columns(run / "columns" / "duplicates", tables)


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    run = tmp_path / "run"
    captions = {
        shard: [
            {"key": sample["key"], "caption": sample["caption"], "reject": None if sample["caption"] else "corrupt"}
            for sample in samples_of(shard)
        ]
        for shard in SHARDS
    }
    write_captions(run / "captions", captions, flags=[])
    sides = {
        shard: {
            "key": [sample["key"] for sample in samples_of(shard)],
            "min_side": pa.array(
                [sample["caption"] and sample["min_side"] for sample in samples_of(shard)], pa.int32()
            ),
        }
        for shard in SHARDS
    }
    write_columns(run / "columns" / "pixels", sides)
    return run


def write_scores(run: Path) -> None:
    write_claims(run / "columns" / "claims", {shard: samples_of(shard) for shard in SHARDS})
    write_duplicates(run, {shard: samples_of(shard) for shard in SHARDS})


def page_of(run: Path) -> str:
    return (run / "stats" / "report.html").read_text()


def test_claims_and_duplicate_images_are_those_of_the_set(run):
    write_scores(run)
    run_stage(run)
    require_sound(run)
    every = [sample for shard in SHARDS for sample in samples_of(shard) if sample["caption"]]
    summary = read_summary(run)["dataset_stats"]
    for name, own in {"SAM": every, "kept": [each for each in every if each["min_side"] >= 512]}.items():
        claims, images = summary[name]["claims"], summary[name]["image_duplicates"]
        supports = [support for sample in own for support in sample["supports"]]
        marked = [any(support is not None and support < 0.5 for support in sample["supports"]) for sample in own]
        assert (claims["num_captions"], claims["num_claims"]) == (len(own), 3 * len(own))
        assert claims["num_unknown"] == supports.count(None)
        assert claims["num_unsupported"] == sum(support is not None and support < 0.5 for support in supports)
        assert claims["num_marked"] == sum(marked)
        assert images["num_samples"] == len(own)
        assert images["kinds"] == dict(sorted(Counter(each["kind"] for each in own if each["kind"]).items()))
        sizes = Counter(Counter(each["group"] for each in own).values())
        assert images["groups"] == {
            "2": sizes[2],
            "3": sizes[3],
            "4 to 9": sum(sizes[size] for size in range(4, 10)),
            "10 or more": sum(count for size, count in sizes.items() if size >= 10),
        }
        assert images["largest_group"] == max(sizes)
    assert read_manifest(run / "stats").extra["sets"]["SAM"]["claims"] == summary["SAM"]["claims"]
    text = (run / "stats" / "table1.md").read_text()
    assert "| Unsupported claims | " in text and "| Duplicates of another image | " in text
    assert "| Duplicate images | " in text, "what the choice changed has them, too"


def test_contents_lead_to_every_part(run):
    for write in (lambda run: None, write_scores):
        write(run)
        run_stage(run)
        contents = re.search(r'<nav id="contents".*?</nav>', page_of(run), re.DOTALL)
        assert contents is not None
        parts = re.findall(r'<section id="([^"]+)"', page_of(run))
        assert re.findall(r'href="#([^"]+)"', contents[0]) == parts and "choices" in parts


def test_nouns_of_unsupported_sentences_are_told_with_their_rates(run):
    write_scores(run)
    run_stage(run)
    page = page_of(run)
    section = page[page.index('data-file="unsupported-nouns-SAM"') :].partition("</table>")[0]
    counter = NounCounter(LexiconTagger())
    for shard in SHARDS:
        for sample in samples_of(shard):
            for support, sentence in zip(sample["supports"] or (), (sample["caption"] or "").split(". "), strict=False):
                if support is not None and support < 0.5:
                    counter.count([sentence])
    nouns = counter.take()
    marked = dict(zip(nouns["noun"].to_pylist(), nouns["count"].to_pylist(), strict=True))
    rows = section.split("<tr>")[2:]
    assert 'data-text="boat"' in rows[0], "the noun that most often is not there comes first"
    assert f'<td class="n">{marked["boat"]}</td>' in rows[0]
    assert f"{1000 * marked['boat'] / sum(marked.values()):,.1f}" in rows[0]


def test_few_of_many_marked_captions_are_read(run, monkeypatch):
    monkeypatch.setattr(marked_nouns, "MAX_CAPTIONS", 2)  # one a shard
    write_scores(run)
    run_stage(run)
    assert 'data-file="unsupported-nouns-SAM"' not in page_of(run), "of two captions no noun occurs three times"


def test_without_columns_the_report_says_what_makes_them_and_is_made_anew_when_they_come(run):
    run_stage(run)
    page = page_of(run)
    assert "of the claims" not in page and 'id="claims"' not in page and 'id="image-duplicates"' not in page
    assert f"Claims of SAM, kept: <code>make claims RUN={run}</code>" in page
    assert "Duplicate images of SAM, kept: <code>make columns" in page
    counts = {path: path.stat().st_mtime_ns for path in (run / "stats" / "counts").glob("*.parquet")}
    write_scores(run)
    run_stage(run)
    assert 'id="claims"' in page_of(run) and 'id="not-measured"' not in page_of(run)
    assert "of the claims (" in page_of(run) and "are duplicates of another one" in page_of(run)
    assert {path: path.stat().st_mtime_ns for path in counts} == counts, "nothing is counted anew"


def test_claims_of_a_pass_are_those_of_its_own_column(run):
    write_scores(run)
    shorts = {
        shard: [{"key": each["key"], "caption": each["caption"]} for each in samples_of(shard)] for shard in SHARDS
    }
    write_captions(run / "captions@short", shorts, flags=[])
    run_stage(run, 'dataset_stats.sets={"short" = { column = "short" }}')
    told = f"Claims of short: <code>make claims RUN={run}</code>, with short in captioning.claims.of</li>"
    assert told in page_of(run) and "image-duplicates" in page_of(run)
    write_claims(run / "columns" / "claims@short", {shard: samples_of(shard) for shard in SHARDS})
    run_stage(run, 'dataset_stats.sets={"short" = { column = "short" }}')
    assert read_summary(run)["dataset_stats"]["short"]["claims"]["num_claims"] > 0


def test_columns_of_some_shards_are_counted_and_said_to_be_of_some(run):
    write_claims(run / "columns" / "claims", {"sa_0": samples_of("sa_0")})
    run_stage(run)
    assert read_summary(run)["dataset_stats"]["SAM"]["claims"]["num_captions"] == NUM_ROWS - 1
    assert "Claims of SAM, kept: <code>make claims" in page_of(run)


def test_columns_of_other_samples_are_refused(run):
    others = [{**sample, "key": f"other {sample['key']}"} for sample in samples_of("sa_0")]
    write_claims(run / "columns" / "claims", {"sa_0": others})
    with pytest.raises(UserError, match=r"claims/sa_0\.parquet is not of the same samples as the captions of sa_0"):
        run_stage(run)


def test_a_sample_has_the_columns_of_the_samples_drawn(run):
    write_scores(run)
    run_stage(run, "dataset_stats.sample=100")  # all of them
    found = read_summary(run)["dataset_stats_sample"]["SAM"]
    assert found["claims"]["num_captions"] == found["image_duplicates"]["num_samples"] == 2 * NUM_ROWS - 2
