"""Features of chosen samples: others are not encoded, a wider choice adds what is missing, a narrower one nothing."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from columns_run import write_columns
from feature_run import extract, write_run

import features.latent_worker
from errors import UserError
from features.completing import CompletingWorker
from pipelines.store.manifest import read_manifest

SHARDS = ("laion_00000", "laion_00001")
NUM_SAMPLES = 20


def keys_of(shard: str) -> list[str]:
    return [f"{int(shard[-5:]):03d}{index:05d}" for index in range(NUM_SAMPLES)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a column `number`, which numbers the samples of each shard."""
    run = write_run(tmp_path)
    write_columns(
        run / "columns" / "numbers",
        {name: {"key": keys_of(name), "number": list(range(NUM_SAMPLES))} for name in SHARDS},
    )
    return run


def where(text: str, table: str = "stage2") -> str:
    return f"features.{table}.where={text}"


def members(folder: Path, shard: str = SHARDS[0]) -> dict[str, list[bytes]]:
    """The payloads of each sample that a directory holds, as its index finds them."""
    tar = np.memmap(folder / f"{shard}.tar", np.uint8, mode="r")
    found: dict[str, list[bytes]] = {}
    for row in pq.read_table(folder / f"{shard}.parquet").to_pylist():
        if row["reject"] is None:
            start = row.get("offset", row.get("mean_offset"))
            found.setdefault(row["key"], []).append(tar[start : start + row["nbytes"]].tobytes())
    return found


def rejects(folder: Path) -> Mapping[str, int]:
    return read_manifest(folder).rejected


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of images that were decoded to be encoded, in no order."""
    seen: list[str] = []
    prepare = features.latent_worker.LatentWorker._prepare

    def count(self, row, data):
        if row["reject"] is None:
            seen.append(row["key"])
        return prepare(self, row, data)

    monkeypatch.setattr(features.latent_worker.LatentWorker, "_prepare", count)
    return seen


def test_only_chosen_samples_are_encoded_in_every_family(run: Path, counted: list[str]) -> None:
    extract(run, where("number < 5"))
    text, latents = run / "features" / "text", run / "features" / "latent-32"
    assert sorted(members(latents)) == keys_of(SHARDS[0])[:5]
    assert sorted(counted) == sorted(keys_of(SHARDS[0])[:5] + keys_of(SHARDS[1])[:5])
    assert rejects(latents) == {"not_chosen": 30}
    # Sample 2 of the first shard has no caption.
    assert rejects(text) == {"not_chosen": 30, "caption:loop": 1}
    assert len(members(text)) == 4
    choice = read_manifest(run / "choices" / "stage2")
    assert (choice.extra["num_samples"], choice.extra["num_chosen"]) == (40, 10)


def test_a_wider_choice_encodes_what_is_missing_and_a_narrower_one_nothing(run: Path, counted: list[str]) -> None:
    latents, text = run / "features" / "latent-32", run / "features" / "text"
    extract(run, where("number < 5 or number == 12"))
    before, texts = members(latents), members(text)
    counted.clear()
    extract(run, where("number < 10"))
    assert sorted(counted) == sorted(keys_of(SHARDS[0])[5:10] + keys_of(SHARDS[1])[5:10])
    after = members(latents)
    # What is in it stays, byte for byte and in raw order.
    assert list(after) == [*keys_of(SHARDS[0])[:10], keys_of(SHARDS[0])[12]]
    assert before.items() <= after.items()
    assert texts.items() <= members(text).items()
    assert rejects(latents) == {"not_chosen": 18}
    assert not (latents / ".earlier").exists()
    states = [state_of(latents), state_of(text)]
    counted.clear()
    extract(run, where("number < 3"))
    extract(run, where("number < 3"))
    assert counted == []
    assert [state_of(latents), state_of(text)] == states
    assert read_manifest(run / "choices" / "stage2").num_kept == 6
    # Without a choice all are wanted.
    extract(run)
    assert len(counted) == 18
    assert rejects(latents) == {}
    whole = run.parent / "whole"
    extract(run, "features.stage2.image_variant=whole", "features.stage2.text_variant=whole")
    for folder in (latents, text):
        assert list(members(folder)) == list(members(folder.with_name(f"{folder.name}@whole")))
    assert not whole.exists()


def test_tables_that_share_a_folder_fill_it_with_what_each_needs(run: Path) -> None:
    extract(run, where("number < 5"))
    extract(run, where("number >= 15", "stage3"), stage=3)
    assert list(members(run / "features" / "text", SHARDS[1])) == [*keys_of(SHARDS[1])[:5], *keys_of(SHARDS[1])[15:]]
    assert list(members(run / "features" / "latent-48", SHARDS[1])) == keys_of(SHARDS[1])[15:]
    assert sorted(path.name for path in (run / "choices").iterdir()) == ["stage2", "stage3"]


@pytest.mark.parametrize("dies_at", [1, 2, 3, 4])
def test_killed_and_typed_again_is_complete(run: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int) -> None:
    extract(run, where("number < 5"))
    extract(run, where("number < 15"), "features.stage2.image_variant=whole", "features.stage2.text_variant=whole")
    calls = 0
    work = CompletingWorker.__call__

    def die(self, piece):
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise KeyboardInterrupt
        return work(self, piece)

    with monkeypatch.context() as patch:
        patch.setattr(CompletingWorker, "__call__", die)
        with pytest.raises(KeyboardInterrupt):
            extract(run, where("number < 15"))
    # Whoever has less in mind meanwhile loses nothing.
    extract(run, where("number < 8"))
    extract(run, where("number < 15"))
    for name in ("latent-32", "text"):
        for shard in SHARDS:
            folder, whole = run / "features" / name, run / "features" / f"{name}@whole"
            assert list(members(folder, shard)) == list(members(whole, shard))
            table = pq.read_table(folder / f"{shard}.parquet")
            assert table["reject"].to_pylist() == pq.read_table(whole / f"{shard}.parquet")["reject"].to_pylist()
        assert read_manifest(run / "features" / name).rejected == read_manifest(whole).rejected
        details = [read_manifest(path).shards[SHARDS[1]].details for path in (folder, whole)]
        assert details[0].keys() == details[1].keys()
        assert details[0].get("num_tokens") == details[1].get("num_tokens")
        assert not (folder / ".earlier").exists()


def test_a_choice_does_not_count_as_rejects_nor_hide_them(run: Path) -> None:
    extract(run, where("number == 3"), "features.stage2.max_reject_fraction=0")
    write_columns(run / "columns" / "sizes", {SHARDS[0]: {"key": keys_of(SHARDS[0]), "area": [1.0] * NUM_SAMPLES}})
    with pytest.raises(UserError, match=r"where: .*columns/sizes.*lacks 1 of 2 shards: laion_00001; .* columns"):
        extract(run, where("area < 3"))


def test_a_plan_counts_what_would_be_encoded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extract(run, where("number < 5"))
    capsys.readouterr()
    extract(run, where("number < 8 and number > 0"), plan=True)
    printed = capsys.readouterr().err
    assert "14 of 40 samples are chosen (35.0%)" in printed
    assert "number < 8: removes 24 alone; 24 after those before it" in printed
    assert "number > 0: removes 2 alone; 2 after those before it" in printed
    (line,) = [line for line in printed.splitlines() if "latents" in line and "│" in line]
    assert [cell.strip() for cell in line.split("│")[1:4]] == ["latents", "14", "6"]
    assert read_manifest(run / "choices" / "stage2").num_kept == 10


def test_weights_by_expression_encode_nothing_anew(run: Path, counted: list[str]) -> None:
    text = run / "features" / "text"
    extract(run, "features.captions=[{column='caption',weight=0.5}]")
    counted.clear()
    before = state_of(text)
    for weight in ("number + 1", "exp(number / 10)"):
        extract(
            run,
            f"features.stage2.captions=[{{column='caption',weight='{weight}'}}]",
            "features.stage2.weight=number",
            "features.stage2.weight_temperature=2",
        )
    assert counted == []
    assert state_of(text) == before
    table = pq.read_table(run / "choices" / "stage2" / f"{SHARDS[0]}.parquet")
    assert table["weight.caption"].to_pylist()[10] == pytest.approx(np.e)
    assert table["weight"].to_pylist()[-1] == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["features.stage2.weight_temperature=2"], "weight_temperature = 2.0 is of weight, which is not there"),
        (["features.stage2.captions=[{column='caption',weight=-1}]"], "weight = -1.*greater than 0"),
        ([where("numbr < 5")], r"features.stage2.where: there is no column 'numbr' \(did you mean number\?\)"),
        ([where("number > 100")], "keeps nothing: 0 of 40 samples"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_encoded(run: Path, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        extract(run, *settings)
    assert not (run / "features").exists()
    # What was refused is nothing that later commands take.
    assert not (run / "run.json").exists()


def test_columns_of_other_samples_are_refused(run: Path) -> None:
    tables = {name: {"key": keys_of(name)[:-1], "number": list(range(NUM_SAMPLES - 1))} for name in SHARDS}
    write_columns(run / "columns" / "numbers", tables)
    with pytest.raises(UserError, match=r"laion_00000 has 20 samples, but its columns have 19"):
        extract(run, where("number < 3"))
    tables = {name: {"key": keys_of(name)[::-1], "number": list(range(NUM_SAMPLES))} for name in SHARDS}
    write_columns(run / "columns" / "numbers", tables)
    with pytest.raises(UserError, match="is not of the samples that"):
        extract(run, where("number < 3"))
