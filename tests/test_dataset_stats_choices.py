"""Sets with a `where`: exact counts by brute force, what another choice counts anew, and what is refused."""

import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from columns_run import write_captions, write_columns
from raw_shards import encode, photo, write_tar
from sound_run import require_sound
from stats_run import run_stage

from dataset_stats import set_rows
from dataset_stats.__main__ import main
from dataset_stats.captions import Address
from dataset_stats.counting import NounCounter
from dataset_stats.example_places import places
from dataset_stats.tagging.taggers import LexiconTagger
from errors import UserError
from pipelines.store.manifest import read_manifest
from pipelines.store.summary import read_summary

WORDS = ("dog", "cat", "tree", "car", "house", "river", "lamp", "boat", "chair", "cloud")
SHARDS = {"sa_0": 60, "sa_1": 37}
RECIPE = """
[data]
shards = "{run}/raw/*.tar"
[engine]
in_process = true
samples_per_slice = 8
[dataset_stats]
tagger = "textblob"
num_gallery_images = 0
valid_threshold = 3
[dataset_stats.sets]
"SAM" = { column = "caption" }
"SAM chosen" = { column = "caption", where = "min_side >= 512 and clip_score > 0.2 and not flags.loop" }
"""
CHOSEN = "dataset_stats.sets.SAM chosen.where"


def rows_of(shard: str) -> list[dict]:
    """Captions of few words, of which some repeat, some are rejects, and some have no score."""
    rng = random.Random(shard)
    rows = []
    for number in range(SHARDS[shard]):
        words = rng.choices(WORDS, weights=range(1, 11), k=rng.randint(1, 4))
        is_reject = number % 11 == 5
        rows.append(
            {
                "key": f"{shard}-{number:03d}",
                "caption": None if is_reject else "A " + " and a ".join(words),
                "flags": ["loop"] if number % 7 == 0 else [],
                "clip_score": None if number % 13 == 3 else rng.choice([0.1, 0.25, 0.3, float("nan")]),
                "reject": "corrupt_image" if is_reject else None,
            }
        )
    return rows


def sides_of(shard: str) -> list[int | None]:
    rng = random.Random(f"{shard} sides")
    return [None if row["reject"] else rng.choice([256, 512, 1024]) for row in rows_of(shard)]


def is_chosen(row: dict, side: int | None) -> bool:
    score = row["clip_score"]
    return side is not None and side >= 512 and score is not None and score > 0.2 and "loop" not in row["flags"]


def write_run(run: Path, sides: dict[str, list[int | None]] | None = None) -> None:
    write_captions(run / "captions", {shard: rows_of(shard) for shard in SHARDS}, flags=["loop"])
    write_sides(run, sides or {shard: sides_of(shard) for shard in SHARDS})


def write_sides(run: Path, sides: dict[str, list[int | None]]) -> None:
    tables = {
        shard: {
            "key": [row["key"] for row in rows_of(shard)],
            "min_side": pa.array(found, pa.int32()),
            "reject": pa.array([row["reject"] for row in rows_of(shard)], pa.string()),
        }
        for shard, found in sides.items()
    }
    write_columns(run / "columns" / "pixels", tables)


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    write_run(tmp_path / "run")
    return tmp_path / "run"


def nouns_of(run: Path) -> dict[str, dict[str, int]]:
    table = pq.read_table(run / "stats" / "nouns.parquet").to_pydict()
    return {
        name: {noun: count for noun, count in zip(table["noun"], table[name], strict=True) if count}
        for name in table
        if name not in ("noun", "singular")
    }


def by_hand(rows: list[dict]) -> Counter[str]:
    counter = NounCounter(LexiconTagger())
    counter.count([row["caption"] for row in rows if row["caption"]])
    table = counter.take()
    return Counter(dict(zip(table["noun"].to_pylist(), table["count"].to_pylist(), strict=True)))


def count_files(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (run / "stats" / "counts").glob("*.parquet")}


def test_a_set_with_where_counts_what_counting_its_samples_alone_gives(run):
    run_stage(run)
    require_sound(run)
    chosen = [
        row
        for shard in SHARDS
        for row, side in zip(rows_of(shard), sides_of(shard), strict=True)
        if is_chosen(row, side)
    ]
    every = [row for shard in SHARDS for row in rows_of(shard)]
    nouns, summary = nouns_of(run), read_summary(run)["dataset_stats"]
    assert 10 < len(chosen) < len(every) / 2
    assert nouns == {"SAM": by_hand(every), "SAM chosen": by_hand(chosen)}
    found = summary["SAM chosen"]
    assert found["num_captions"] == len(chosen) and found["rejected"] == {}
    assert found["total_nouns"] == by_hand(chosen).total()
    assert found["valid_distinct_nouns"] == sum(count > 3 for count in by_hand(chosen).values())
    texts = [row["caption"] for row in chosen]
    assert found["duplicates"] == len(texts) - len(set(texts))
    lengths = [len(text) for text in texts]
    assert found["lengths"]["characters"]["median"] == np.median(lengths)
    assert found["flags"] == {} and summary["SAM"]["flags"]["loop"] > 0
    assert found["before"] == "SAM" and found["choice"]["num_samples"] == len(every)
    assert found["choice"]["clauses"][0]["text"] == "min_side >= 512"
    assert summary["SAM"]["rejected"] == {"corrupt_image": sum(row["reject"] is not None for row in every)}
    report = read_manifest(run / "stats").shards["SAM chosen"]
    assert (report.num_read, report.num_kept) == (len(every), len(chosen))
    assert report.rejected == {"not_chosen": len(every) - len(chosen)}


def test_the_report_says_what_the_choice_changed(run):
    run_stage(run)
    every = [row for shard in SHARDS for row in rows_of(shard)]
    pairs = [pair for shard in SHARDS for pair in zip(rows_of(shard), sides_of(shard), strict=True)]
    chosen = [row for row, side in pairs if is_chosen(row, side)]
    before, after = by_hand(every), by_hand(chosen)
    is_small = [side is None or side < 512 for _, side in pairs]
    scores = [row["clip_score"] if row["reject"] is None else None for row, _ in pairs]
    is_known = [score is not None and score == score for score in scores]
    is_scored = [known and row["clip_score"] > 0.2 for (row, _), known in zip(pairs, is_known, strict=True)]
    after_it = sum(not small and not scored for small, scored in zip(is_small, is_scored, strict=True))
    text = (run / "stats" / "table1.md").read_text()
    assert f"| Nouns | {before.total():,} | {after.total():,} | {after.total() / before.total():.1%} kept |" in text
    assert f"| DN | {len(before)} | {len(after)} |" in text
    clause = next(line for line in text.splitlines() if line.startswith("| `clip_score > 0.2` |"))
    counts = [int(cell.split(" ")[1]) for cell in clause.split("|")[2:5]]
    # Of rejects clip_score is unknown, whatever stands beside them.
    assert counts == [is_scored.count(False), is_known.count(False), after_it]
    page = (run / "stats" / "report.html").read_text()
    section = page[page.index('<section id="choices">') : page.index('<section id="lengths">')]
    assert f"{len(chosen)} of 97 samples are kept" in section and 'data-file="more-often-SAM chosen"' in section
    assert '<section id="changes">' not in page, "a choice is compared with its own set alone"
    gained = section[section.index('data-file="less-often-SAM chosen"') :]
    lost = max(before, key=lambda noun: before[noun] / (len(every) - 9) - after[noun] / len(chosen))
    assert f'data-text="{lost}"' in gained
    assert f"{after[lost] / before[lost]:.0%}" in gained


def test_a_run_without_choices_has_no_part_about_them(run):
    run_stage(run, "dataset_stats.sets={'SAM' = {}}")
    assert "What the choice changed" not in (run / "stats" / "report.html").read_text()
    assert "Clause" not in (run / "stats" / "table1.md").read_text()


def test_examples_and_quotes_of_a_choice_are_captions_that_it_keeps(run, monkeypatch):
    monkeypatch.setattr(set_rows, "ROWS_PER_BATCH", 7)  # several batches a shard
    seen = {}
    true_merge = set_rows.sum_nouns
    monkeypatch.setattr(set_rows, "sum_nouns", lambda tables: seen.setdefault(len(seen), true_merge(tables)))
    run_stage(run, 'dataset_stats.sets={"SAM chosen" = { where = "min_side >= 512 and lower(caption) != \'\'" }}')
    masks = {name: set_rows.noun_masks([name]) & set_rows.ROW_MASK for name in WORDS}
    for number, shard in enumerate(SHARDS):
        kept = {
            index: row["caption"]
            for index, (row, side) in enumerate(zip(rows_of(shard), sides_of(shard), strict=True))
            if side is not None and side >= 512 and row["caption"]
        }
        table = seen[number]
        for noun, example in zip(table["noun"].to_pylist(), table["example"].to_pylist(), strict=True):
            if noun in WORDS:
                least = min(index ^ int(masks[noun][0]) for index, text in kept.items() if noun in text.split())
                assert example == least
                assert int(places(np.array([example]), masks[noun])[0]) in kept


def test_another_choice_counts_nothing_anew_and_columns_that_changed_neither(run):
    run_stage(run)
    before, files = read_summary(run)["dataset_stats"], count_files(run)
    assert len(files) == 4, "captions that a set chooses from are counted once for all of its sets"
    run_stage(run, f"{CHOSEN}=min_side >= 1024")
    other = read_summary(run)["dataset_stats"]
    assert count_files(run) == files
    assert other["SAM"] == before["SAM"] and other["SAM chosen"]["num_captions"] != before["SAM chosen"]["num_captions"]
    run_stage(run)
    assert read_summary(run)["dataset_stats"] == before
    write_sides(run, {shard: [side and 1024 for side in sides_of(shard)] for shard in SHARDS})
    run_stage(run)
    wider = read_summary(run)["dataset_stats"]
    assert count_files(run) == files and wider["SAM"] == before["SAM"]
    assert wider["SAM chosen"]["num_captions"] > before["SAM chosen"]["num_captions"]


def test_nothing_is_done_where_neither_choice_nor_columns_changed(run, capsys):
    run_stage(run)
    report = (run / "stats" / "report.html").stat().st_mtime_ns
    run_stage(run)
    assert (run / "stats" / "report.html").stat().st_mtime_ns == report
    write_sides(run, {shard: sides_of(shard) for shard in SHARDS})  # the same bytes
    run_stage(run)
    assert (run / "stats" / "report.html").stat().st_mtime_ns == report


def test_only_captions_that_changed_are_counted_anew(run):
    run_stage(run)
    files = count_files(run)
    rows = {shard: rows_of(shard) for shard in SHARDS}
    rows["sa_1"][0]["caption"] = "A harbour"
    write_captions(run / "captions", rows, flags=["loop"])
    run_stage(run)
    assert {name for name, time in count_files(run).items() if files[name] != time} == {
        name for name in files if name.startswith("sa_1")
    }


def test_a_choice_without_a_set_of_all_brings_its_own(run):
    run_stage(run, 'dataset_stats.sets={"big" = { shards = ["sa_1"], where = "min_side >= 1024" }}')
    nouns = nouns_of(run)
    assert list(nouns) == ["big.all", "big"]
    assert nouns["big.all"] == by_hand(rows_of("sa_1"))
    assert read_summary(run)["dataset_stats"]["big"]["before"] == "big.all"


def test_a_set_that_has_the_name_of_a_comparison_keeps_it(run):
    chosen = '"big" = { shards = ["sa_1"], column = "caption", where = "min_side > 512" }'
    run_stage(run, f'dataset_stats.sets={{{chosen}, "big.all" = {{ shards = ["sa_0"], column = "caption" }}}}')
    nouns = nouns_of(run)
    assert list(nouns) == ["big.all.all", "big", "big.all"]
    assert nouns["big.all.all"] == by_hand(rows_of("sa_1")) and nouns["big.all"] == by_hand(rows_of("sa_0"))
    assert read_summary(run)["dataset_stats"]["big"]["before"] == "big.all.all"


def test_a_sample_of_a_choice_is_what_it_keeps_of_the_sample(run, caplog):
    run_stage(run, "dataset_stats.sample=100")
    found = read_summary(run)["dataset_stats_sample"]
    whole = sum(
        is_chosen(row, side) for shard in SHARDS for row, side in zip(rows_of(shard), sides_of(shard), strict=True)
    )
    assert found["SAM chosen"]["num_captions"] == whole, "the sample is the whole set"
    assert found["SAM chosen"]["estimate"]["num_samples"] == found["SAM chosen"]["estimate"]["num_drawn"] == whole
    assert set(found["SAM chosen"]["estimate"]["standard_errors"].values()) == {0.0}


def test_raw_shards_may_be_chosen_from(run):
    folder = run / "raw"
    folder.mkdir()
    members = [(f"{row['key']}.txt", (row["caption"] or "none").encode()) for row in rows_of("sa_1")]
    images = [(f"{row['key']}.jpg", encode(photo(8))) for row in rows_of("sa_1")]
    write_tar(folder / "sa_1.tar", [pair for both in zip(images, members, strict=True) for pair in both])
    run_stage(run, 'dataset_stats.sets={"web" = { layout = "raw", shards = ["sa_1"], where = "min_side >= 512" }}')
    sides = sides_of("sa_1")
    rows = [row for row, side in zip(rows_of("sa_1"), sides, strict=True) if side is not None and side >= 512]
    assert nouns_of(run)["web"] == by_hand(rows)


def test_a_plan_says_what_would_be_counted(run, caplog, monkeypatch):
    recipe = run.parent / "recipe.toml"
    monkeypatch.setattr("sys.argv", ["dataset_stats", "--recipe", str(recipe), "--run", str(run), "--plan"])
    with caplog.at_level("INFO"):
        main()
    num_chosen = sum(
        is_chosen(row, side) for shard in SHARDS for row, side in zip(rows_of(shard), sides_of(shard), strict=True)
    )
    assert f"{num_chosen:,} of 97 samples are chosen" in caplog.text
    assert "clip_score > 0.2: removes" in caplog.text and "of which" in caplog.text
    assert not (run / "stats").exists()


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("min_sied >= 512", r"dataset_stats\.sets\.SAM chosen\.where: there is no column 'min_sied'.*min_side"),
        ("min_side >= 4096", r"SAM chosen\.where = 'min_side >= 4096' keeps nothing: 0 of 97 samples"),
        ("min_side = 512", r"dataset_stats\.sets\.SAM chosen\.where"),
        ("min_side + 1", r"is a number, and what is true or false is needed"),
        ("not duplicate", r"there is no column 'duplicate' yet: .*makes it"),
    ],
)
def test_what_is_wrong_with_where_is_said_before_anything_is_counted(run, where, told):
    with pytest.raises(UserError, match=told):
        run_stage(run, f"{CHOSEN}={where}")
    assert not (run / "stats").exists()


def test_shards_without_the_columns_are_named_with_the_command(run):
    shutil.rmtree(run / "columns")
    write_sides(run, {"sa_0": sides_of("sa_0")})
    with pytest.raises(UserError, match=r"lacks 1 of 2 shards: sa_1; `make columns RUN="):
        run_stage(run)


def test_columns_of_other_samples_are_refused(run):
    tables = {
        shard: {"key": [f"other-{number}" for number in range(count)], "min_side": pa.array([512] * count, pa.int32())}
        for shard, count in SHARDS.items()
    }
    write_columns(run / "columns" / "pixels", tables)
    with pytest.raises(UserError, match="are not of the same samples"):
        run_stage(run, f"{CHOSEN}=min_side >= 512")


def write_file(path: Path, shard: str, **columns: pa.Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"TEXT": [row["caption"] for row in rows_of(shard)], **columns}), path)


def test_parquet_files_are_chosen_from_by_their_own_columns(run):
    scores = {shard: [row["clip_score"] for row in rows_of(shard)] for shard in SHARDS}
    for shard, found in scores.items():  # files of one name in two folders
        write_file(run.parent / shard / "part.parquet", shard, similarity=pa.array(found, pa.float64()))
    choice = f'"b" = {{ files = "{run.parent}/sa_*/part.parquet", where = "similarity > 0.2" }}'
    run_stage(run, f"dataset_stats.sets={{ {choice} }}")
    rows = [row for shard in SHARDS for row in rows_of(shard)]
    kept = [row for row in rows if row["clip_score"] is not None and row["clip_score"] > 0.2]
    assert nouns_of(run) == {"b.all": by_hand(rows), "b": by_hand(kept)}
    files = count_files(run)
    run_stage(run, f"dataset_stats.sets={{ {choice.replace('0.2', '0.27')} }}")
    assert count_files(run) == files
    few = [row for row in kept if row["clip_score"] > 0.27]
    assert nouns_of(run)["b"] == by_hand(few)
    run_stage(run, f"dataset_stats.sets={{ {choice} }}", "dataset_stats.sample=100")
    num_texts = sum(row["caption"] is not None for row in kept)
    assert read_summary(run)["dataset_stats_sample"]["b"]["num_captions"] == num_texts


def test_files_without_the_columns_are_named(run):
    write_file(run.parent / "a.parquet", "sa_0", similarity=pa.array([0.3] * SHARDS["sa_0"]))
    write_file(run.parent / "b.parquet", "sa_1", punsafe=pa.array([0.3] * SHARDS["sa_1"]))
    sets = f'{{"a" = {{ files = ["{run.parent}/a.parquet", "{run.parent}/b.parquet"], where = "similarity > 0.2" }}}}'
    with pytest.raises(UserError, match=r"dataset_stats\.sets\.a\.where: .*/b\.parquet has no column 'similarity'"):
        run_stage(run, f"dataset_stats.sets={sets}")
    (run.parent / "c.csv").write_text("caption,score\nA dog,1\n")
    with pytest.raises(UserError, match=r"c\.csv has no columns with types: a set with where is of RUN/captions"):
        run_stage(run, f'dataset_stats.sets={{"c" = {{ files = "{run.parent}/c.csv", where = "score > 0" }}}}')


def test_addresses_with_nouns_are_read_back():
    address = Address(layout="captions", column="caption", path="/a#b.parquet", keeps_nouns=True)
    assert Address.parse(str(address)) == address


def test_a_pass_of_captions_is_a_column_and_may_be_chosen_from(run):
    shorts = {
        shard: [{**row, "caption": row["caption"] and row["caption"].partition(" and ")[0]} for row in rows_of(shard)]
        for shard in SHARDS
    }
    write_captions(run / "captions@short", shorts, flags=["loop"])
    sets = '{"short" = { column = "short" }, "brief" = { column = "short", where = "min_side >= 512" }}'
    run_stage(run, f"dataset_stats.sets={sets}")
    sides = [side for shard in SHARDS for side in sides_of(shard)]
    rows = [row for shard in SHARDS for row in shorts[shard]]
    kept = [row for row, side in zip(rows, sides, strict=True) if side is not None and side >= 512]
    assert nouns_of(run) == {"short": by_hand(rows), "brief": by_hand(kept)}
    assert read_summary(run)["dataset_stats"]["short"]["flags"]["loop"] > 0
