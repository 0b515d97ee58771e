"""`make verify` of columns and choices: damaged and missing files, other samples, and what is only old."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from columns_run import write_columns
from raw_shards import encode, photo, write_laion
from sound_run import require_sound

import curation.__main__ as columns
import curation.choose.__main__ as choose
from pipelines.store.files import sha256_file
from pipelines.store.manifest import ShardDirectory, read_manifest
from pipelines.store.verify.run import verify_run

SHARDS = ("laion_0", "laion_1", "laion_2")
NUM_SAMPLES = 20  # of fewer, headers are not remembered
RECIPE = """
[data]
shards = "{run}/raw/*"

[engine]
in_process = true

[columns]
scores = ["pixels", "hashes"]

[columns.tables.ratings]
files = "RATINGS"

[features.stage2]
resolution = 64
where = "min_side > 10 and stars >= 2"
"""


def type_command(main: Callable[[], None], run: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    recipe = run.parent / "recipe.toml"
    recipe.write_text(RECIPE.replace("RATINGS", str(run.parent / "ratings.csv")))
    monkeypatch.setattr("sys.argv", ["columns", "--recipe", str(recipe), "--run", str(run), *words])
    main()


def write_ratings(run: Path, stars: int = 0) -> None:
    lines = [f"{number:09d},{stars or 1 + number % 3}" for number in range(3 * NUM_SAMPLES)]
    (run.parent / "ratings.csv").write_text("\n".join(["key,stars", *lines, ""]))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run = tmp_path / "run"
    for number, shard in enumerate(SHARDS):
        write_laion(run / "raw" / f"{shard}.tar", NUM_SAMPLES, first=NUM_SAMPLES * number)
    # A shard of rows, whose keys are none of its headers'.
    rows = [{"key": f"p{number}", "image": encode(photo(number)), "stars": 2} for number in range(NUM_SAMPLES)]
    pq.write_table(pa.Table.from_pylist(rows), run / "raw" / "photos.parquet")
    write_ratings(run)
    with (run.parent / "ratings.csv").open("a") as file:
        file.writelines(f"p{number},3\n" for number in range(NUM_SAMPLES))
    type_command(columns.main, run, monkeypatch)
    type_command(choose.main, run, monkeypatch)
    type_command(choose.main, run, monkeypatch, "--plan")
    return run


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0 if path.suffix == ".json" else len(data) // 2] ^= 0x80
    path.write_bytes(data)


def gone(path: Path) -> None:
    path.unlink()


DAMAGES: list[tuple[str, dict[Callable[[Path], None], str], str]] = [
    (
        "columns/pixels/laion_1.parquet",
        {cut: "SHA-256 of laion_1.parquet is not the manifest's", flip: "SHA-256", gone: "is missing"},
        "make columns RUN=",
    ),
    ("columns/pixels/.done/laion_1.json", {cut: "is damaged", flip: "damaged", gone: "not exist"}, "make columns"),
    ("columns/ratings/manifest.json", {cut: "is damaged", flip: "is damaged"}, "it is summed up anew"),
    (
        "choices/stage2/laion_1.parquet",
        {cut: "SHA-256 of laion_1.parquet is not the manifest's", flip: "SHA-256", gone: "is missing"},
        "make choose STAGE=stage2 RUN=",
    ),
    ("choices/stage2/.done/laion_1.json", {cut: "is damaged", flip: "damaged", gone: "not exist"}, "make choose STAGE"),
    ("choices/stage2/manifest.json", {cut: "is damaged", flip: "is damaged"}, "make choose STAGE=stage2"),
    ("choose/stage2.html", {cut: "is cut short"}, "it is only for people to look at"),
]
CASES = [(name, way, said, mend) for name, ways, mend in DAMAGES for way, said in ways.items()]


def test_every_file_of_columns_and_choices_is_known_and_each_damage_named_with_its_command(run) -> None:
    findings = require_sound(run)
    assert {path.parent.name for path in findings.others} == {"raw"}
    assert [note for note in findings.notes if "raw" not in note] == []
    kinds = {path.relative_to(run).parts[0] for path in findings.checked}
    assert {"columns", "choices", "choose"} <= kinds
    for name, way, said, mend in CASES:
        path = run / name
        whole = path.read_bytes()
        way(path)
        (problem, *others) = verify_run(run).problems
        assert not others, (name, way, others)
        assert said in str(problem) and mend in problem.mend, (name, way, problem)
        path.write_bytes(whole)


def test_claims_have_a_command_of_their_own(run) -> None:
    claims = run / "columns" / "claims@short"
    write_columns(
        claims, {"laion_0": {"key": [f"{n:09d}" for n in range(NUM_SAMPLES)], "num_claims": [1] * NUM_SAMPLES}}
    )
    gone(claims / "laion_0.parquet")
    (problem,) = verify_run(run).problems
    assert problem.mend.startswith("`make claims RUN=")


def rewrite(file: Path, table: pa.Table) -> None:
    """Write a file of columns as a command would have that had other samples before it."""
    folder = ShardDirectory(file.parent)
    manifest = read_manifest(file.parent)
    pq.write_table(table, file)
    for path in (file.parent / ".done" / f"{file.stem}.json", file.parent / "manifest.json"):
        text = path.read_text()
        path.write_text(text.replace(manifest.shards[file.stem].files[".parquet"], sha256_file(file)))
    assert folder.path == file.parent


def test_files_of_other_samples_are_named(run) -> None:
    file = run / "columns" / "hashes" / "laion_1.parquet"
    table = pq.read_table(file)
    rewrite(file, table.take([1, 0, *range(2, NUM_SAMPLES)]))
    (problem,) = verify_run(run).problems
    assert (problem.directory, problem.shard) == (file.parent, "laion_1")
    assert problem.text == (
        f"its rows are not the samples of {run / 'raw' / 'laion_1.tar'}: row 1 is of '000000021', and the sample there "
        "is '000000020'"
    )
    assert problem.mend == f"`rm {file}`, then `make columns RUN={run}`"
    rewrite(file, table.slice(0, 3))
    (problem,) = verify_run(run).problems
    assert "it has 3 rows, and there are 20 samples" in problem.text


def test_a_shard_of_columns_that_is_missing_in_the_middle_is_named(run) -> None:
    folder = ShardDirectory(run / "columns" / "hashes")
    manifest = read_manifest(folder.path)
    for path in (folder.file("laion_1", ".parquet"), folder.path / ".done" / "laion_1.json"):
        path.unlink()
    names = [name for name in manifest.shards if name != "laion_1"]
    folder.write_manifest(manifest.fingerprint, names, upstream={}, extra=manifest.extra)
    (problem,) = verify_run(run).problems
    assert (problem.directory, problem.shard) == (folder.path, "laion_1")
    assert "missing, though shards before and after it are there" in str(problem)
    assert "make columns" in problem.mend and "SHARDS of all of them" in problem.mend


def test_a_choice_by_other_columns_is_noted_until_it_is_made_anew(run, monkeypatch) -> None:
    write_ratings(run, stars=3)
    type_command(columns.main, run, monkeypatch)
    (note,) = [note for note in require_sound(run).notes if "choices" in note]
    assert note == (
        f"{run / 'choices' / 'stage2'}: 4 of 4 shards were chosen by other columns than there are now, first laion_0: "
        f"`make choose STAGE=stage2 RUN={run}` makes them anew"
    )
    type_command(choose.main, run, monkeypatch)
    assert not [note for note in require_sound(run).notes if "choices" in note]
    # Columns that it does not read may change.
    manifest = run / "columns" / "hashes" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text())))
    assert not [note for note in require_sound(run).notes if "choices" in note]


def test_columns_of_a_shard_that_was_replaced_are_noted_once_it_is_read_again(run, monkeypatch) -> None:
    write_laion(run / "raw" / "laion_2.tar", NUM_SAMPLES, first=100)
    # Whoever reads the headers again remembers them.
    type_command(columns.main, run, monkeypatch, "--plan")
    findings = verify_run(run)
    (first, second) = [note for note in findings.notes if "other raw shards" in note]
    assert first == (
        f"{run / 'columns' / 'hashes'}: 1 of 4 shards were made from other raw shards than there are now, first "
        f"laion_2: `make columns RUN={run}` makes them anew"
    )
    assert "columns/pixels" in second
    assert {problem.shard for problem in findings.problems} == {"laion_2"}
    assert "its rows are not the samples of" in str(findings.problems[0])
