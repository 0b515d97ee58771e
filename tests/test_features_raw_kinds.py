"""Captions and latents of the same samples are the same, in whatever way their raw shard comes and is cut."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from feature_run import encoded, extract, picture, write_recipe
from raw_kinds import KINDS, Sample

from captioning.__main__ import main as caption
from pipelines.engine.pieces import Piece, cut_into_pieces
from pipelines.raw.pack import main as pack
from pipelines.raw.patterns import expand_shards
from pipelines.raw.shard_names import shard_name

NUM_SAMPLES = 60
OTHER_KINDS = [
    "folder",
    "metadata.csv",
    "struct",
    "binary",
    "save_to_disk",
    "to_parquet",
    "table.jsonl",
    "table.csv.gz",
]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [
        Sample(f"{number:04d}", encoded(picture(number, width=40 + 8 * (number % 5))), f"text {number}", number % 7)
        for number in range(NUM_SAMPLES)
    ]


def results(folder: Path, shards: Path, patch: pytest.MonkeyPatch, *settings: str) -> tuple[list[dict], bytes, list]:
    """The rows of captions, the tar of latents, and its index, all without the shard's name."""
    write_recipe(folder)
    run = folder / "run"
    (path,) = expand_shards(str(shards))
    words = ["--recipe", str(folder / "recipe.toml"), "--run", str(run), "--set", "captioning.engine=given"]
    patch.setattr("sys.argv", ["captioning", *words, "--text", f"data.shards={shards}"])
    caption()
    extract(run, f"data.shards='{shards}'", 'features.stage1.shards=["*"]', *settings, stage=1)
    name, latents = shard_name(path), run / "features" / "latent-32"
    captions = pq.read_table(run / "captions" / f"{name}.parquet").drop_columns(["shard"]).to_pylist()
    index = pq.read_table(latents / f"{name}.parquet").drop_columns(["shard"]).to_pylist()
    return captions, (latents / f"{name}.tar").read_bytes(), index


@pytest.fixture(scope="module")
def of_tar(tmp_path_factory, samples) -> tuple[list[dict], bytes, list]:
    folder = tmp_path_factory.mktemp("tar")
    with pytest.MonkeyPatch.context() as patch:
        captions, latents, index = results(folder, KINDS["tar"](folder, samples), patch)
    assert [row["caption"] for row in captions] == [sample.text for sample in samples]
    assert [row["label"] for row in index] == [sample.label for sample in samples]
    return captions, latents, index


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_captions_and_latents_are_those_of_a_tar(tmp_path, samples, of_tar, kind, monkeypatch) -> None:
    assert results(tmp_path, KINDS[kind](tmp_path, samples), monkeypatch) == of_tar


@pytest.mark.parametrize("kind", ["folder", "struct", "table.jsonl"])
def test_pieces_of_a_shard_give_the_same(tmp_path, samples, of_tar, kind, monkeypatch) -> None:
    spans = []
    output = Piece.output

    def noted(piece: Piece, suffix: str) -> Path:
        spans.append(piece.span)
        return output(piece, suffix)

    monkeypatch.setattr(Piece, "output", noted)
    monkeypatch.setattr("pipelines.engine.run.cut_into_pieces", in_three)
    assert results(tmp_path, KINDS[kind](tmp_path, samples), monkeypatch) == of_tar
    assert len(set(spans)) == 3


def in_three(sources, output, *, samples_per_slice, finished, **_):
    # As for one worker and a half, so that none are started.
    return cut_into_pieces(sources, output, num_workers=1.5, samples_per_slice=samples_per_slice, finished=finished)  # pyright: ignore


def test_packed_tars_give_the_same(tmp_path, samples, of_tar, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["pack", str(KINDS["table.csv"](tmp_path, samples)), str(tmp_path / "packed")])
    pack()
    assert results(tmp_path, tmp_path / "packed", monkeypatch) == of_tar
