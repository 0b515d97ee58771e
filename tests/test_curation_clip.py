"""CLIP's columns: embeddings made once from images, and scores of texts and heads from them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import WIDTH, save_clip
from transformers import AutoProcessor, CLIPModel

from captioning.clip_score import ClipScorer
from captioning.config import CaptioningConfig
from curation.__main__ import main
from errors import MissingFileError, UserError
from pipelines.store.files import sha256_file
from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport, read_manifest
from tests.raw_shards import broken_images, encode, photo, write_tar

NUM_IMAGES = 40
LONG = "sale of many " + "words " * 60
ALT_TEXTS = ["a photo", None, LONG]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one shard of images, one of them broken, and captions of it."""
    members = [(f"{index:03d}.jpg", encode(photo(index, 40 + index, 32))) for index in range(NUM_IMAGES)]
    members.insert(3, ("003a.jpg", broken_images()["truncated"][0]))
    write_tar(tmp_path / "raw/a.tar", members)
    write_captions(tmp_path / "run/captions", [name.removesuffix(".jpg") for name, _ in members])
    return tmp_path / "run"


def write_captions(folder: Path, keys: list[str], *, beside: str | None = None) -> None:
    rows = [
        {"key": key, "caption": f"photo number {key}", "alt_text": ALT_TEXTS[place % 3], "reject": None}
        for place, key in enumerate(keys)
    ]
    rows = [row | ({beside: row["caption"]} if beside else {}) for row in rows]
    rows[5] |= {"caption": None, "alt_text": None, "reject": "empty_caption"}
    schema = pa.schema([(name, pa.string()) for name in rows[0]])
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "a.parquet")
    directory, fingerprint = ShardDirectory(folder), Fingerprint.of({})
    files = {".parquet": sha256_file(folder / "a.parquet")}
    report = ShardReport(
        name="a", source="", num_read=len(rows), num_kept=len(rows) - 1, rejected={"empty_caption": 1}, files=files
    )
    directory.write_marker(report, fingerprint)
    directory.write_manifest(fingerprint, ["a"], upstream={}, extra={})


@pytest.fixture
def columns(run: Path, clip: Path, monkeypatch):
    """Types `make columns` for the run with some scores."""

    def make(*scores: str, settings: tuple[str, ...] = ()) -> Path:
        typed = {"data.shards": str(run.parent / "raw/*.tar"), "engine.in_process": "true"}
        typed |= {"columns.max_reject_fraction": "0.2", "columns.clip_model": str(clip)}
        typed |= {"columns.scores": json.dumps(scores)} | dict(setting.split("=", 1) for setting in settings)
        flags = [part for key, value in typed.items() for part in ("--set", f"{key}={value}")]
        monkeypatch.setattr("sys.argv", ["curation", "--run", str(run), *flags])
        main()
        return run / "columns"

    return make


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def test_embeddings_are_those_of_transformers_and_have_unit_length(run, columns, clip) -> None:
    found = rows(columns("clip") / "clip/a.parquet")
    model: Any = CLIPModel.from_pretrained(clip)
    processor: Any = AutoProcessor.from_pretrained(clip)
    assert [row["key"] for row in found][2:5] == ["002", "003a", "003"]
    assert [row["reject"] for row in found].count(None) == NUM_IMAGES
    assert found[3]["clip_embedding"] is None and found[3]["reject"] is not None
    kept = [row for row in found if row["reject"] is None]
    for index, row in enumerate(kept):
        data = encode(photo(index, 40 + index, 32))
        (run / "one.jpg").write_bytes(data)
        inputs = processor(images=Image.open(run / "one.jpg"), return_tensors="pt")
        with torch.no_grad():
            wanted = model.eval().get_image_features(**inputs).pooler_output[0]
        assert row["clip_embedding"] == pytest.approx((wanted / wanted.norm()).tolist(), abs=2e-3)
    table = pq.read_table(run / "columns/clip/a.parquet")
    assert table["clip_embedding"].type.list_size == WIDTH
    said = read_manifest(run / "columns/clip").extra["score"]["columns"]["clip_embedding"]
    assert said["type"] == f"fixed_size_list<item: halffloat>[{WIDTH}]"


def test_a_clip_score_is_that_of_captioning_and_needs_no_image_again(run, columns, clip, monkeypatch) -> None:
    columns("clip")
    monkeypatch.setattr("encoders.vision.ClipTowers.prepare", None)
    folder = columns("clip", "clip_score")
    scorer = ClipScorer(CaptioningConfig(clip_model=str(clip)))
    images = [photo(index, 40 + index, 32) for index in range(NUM_IMAGES)]
    monkeypatch.undo()
    pixels = [scorer.prepare(decoded(encode(image))) for image in images]
    embeddings = scorer.embed_images(pixels)
    captions = {row["key"]: row for row in rows(run / "captions/a.parquet")}
    wanted = scorer.scores(embeddings, [captions[f"{i:03d}"]["caption"] or "" for i in range(NUM_IMAGES)])
    found = {row["key"]: row for row in rows(folder / "clip_score/a.parquet")}
    assert list(found) == list(captions)
    assert found["003a"]["reject"].startswith("clip:") and found["004"]["reject"] == "captions:empty_caption"
    for index, score in enumerate(wanted):
        if (row := found[f"{index:03d}"])["reject"] is None:
            assert row["clip_score"] == pytest.approx(score, abs=3e-4)
    of_alt = rows(folder / "clip_score@alt_text/a.parquet")
    for row in of_alt:
        text = captions[row["key"]]["alt_text"]
        assert (row["clip_score"] is None) == (text is None or row["reject"] is not None)
        if row["clip_score"] is not None:
            assert (row["clip_tokens_cut"] > 0) == (text == LONG) and row["clip_tokens"] > 2
    cut = scorer.count_cut([captions[row["key"]]["alt_text"] for row in of_alt if row["clip_score"] is not None])
    details = read_manifest(folder / "clip_score@alt_text").shards["a"].details
    assert details["null_clip_score"] > 10
    assert {name: details[name] for name in details if "clip_t" in name and "null" not in name} == {
        "clip_texts": cut.num_texts,
        "clip_texts_cut": cut.num_cut,
        "max_clip_tokens": 40,
        "clip_tokens": cut.num_tokens,
        "clip_tokens_cut": cut.num_tokens_cut,
    }


def test_texts_beside_the_captions_are_scored_as_the_captions_are(run, columns) -> None:
    keys = pq.read_table(run / "captions/a.parquet")["key"].to_pylist()
    shutil.rmtree(run / "captions")
    write_captions(run / "captions", keys, beside="second")
    folder = columns("clip_score", settings=('columns.caption_columns=["caption","second"]',))
    assert rows(folder / "clip_score@second/a.parquet") == rows(folder / "clip_score/a.parquet")


def decoded(data: bytes) -> Image.Image:
    from pipelines.raw.images import decode_image

    return decode_image(data, max_pixels=10**8)


def test_what_is_cut_off_is_said(run, columns, caplog) -> None:
    columns("clip", "clip_score")
    said = [record.getMessage() for record in caplog.records if "tokens that this CLIP reads" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("clip_score@alt_text: 12 of 25 texts are longer than the 40 tokens that this CLIP reads")


def save_head(path: Path, width: int = WIDTH) -> Path:
    torch.manual_seed(1)
    save_file({"weight": torch.randn(1, width), "bias": torch.randn(1)}, path)
    return path


def test_a_head_gives_a_column_of_its_name_without_images_and_anew_when_it_changes(run, columns, monkeypatch) -> None:
    head = save_head(run.parent / "head.safetensors")
    setting = f'columns.heads={{aesthetic={{file="{head}"}}}}'
    folder = columns("aesthetic", settings=(setting,))
    embeddings = rows(folder / "clip/a.parquet")
    weights = load_file(head)
    for row, of_image in zip(rows(folder / "aesthetic/a.parquet"), embeddings, strict=True):
        if of_image["reject"] is not None:
            assert row["aesthetic"] is None and row["reject"] == f"clip:{of_image['reject']}"
            continue
        embedding = torch.tensor(of_image["clip_embedding"])
        wanted = (weights["weight"] @ (embedding / embedding.norm()) + weights["bias"]).item()
        assert row["aesthetic"] == pytest.approx(wanted, abs=1e-5)
    made = (folder / "clip/a.parquet").stat().st_mtime_ns
    save_file({"weight": torch.ones(1, WIDTH), "bias": torch.zeros(1)}, head)
    before = (folder / "aesthetic/a.parquet").read_bytes()
    columns("aesthetic", settings=(setting,))
    assert (folder / "aesthetic/a.parquet").read_bytes() != before
    assert (folder / "clip/a.parquet").stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["columns.clip_model=toyworld/weights/vae"],
            "'toyworld/weights/vae' is a None, not a CLIP",
        ),
        (["columns.clip_model=nobody/clip"], "columns.clip_model = 'nobody/clip' (main) is no local folder"),
        (["columns.device=cuda"], "columns.device is cuda, but torch"),
        (
            ['columns.heads={aesthetic={file="missing.pth"}}'],
            "aesthetic.file: missing.pth does not exist",
        ),
        (['columns.heads={pixels={file="{head}"}}'], "columns.heads.pixels: a score is called pixels already"),
        (
            ['columns.heads={aesthetic={file="{wide}"}}'],
            "of width 7, but those of columns.clip_model = ",
        ),
        (['columns.heads={Aesthetic={file="{head}"}}'], "columns.heads.Aesthetic"),
        (['columns.caption_columns=["short"]'], "which 1 of 1 shards lack (a): type make caption"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_said_before_any_image_is_read(
    run, columns, settings: list[str], message: str, monkeypatch
) -> None:
    monkeypatch.setattr("curation.image_pass.ImagePassWorker.__call__", None)
    files = {"{head}": save_head(run.parent / "h.safetensors"), "{wide}": save_head(run.parent / "w.safetensors", 7)}
    for name, path in files.items():
        settings = [setting.replace(name, str(path)) for setting in settings]
    scores = ["aesthetic"] if any("heads" in setting for setting in settings) else ["clip"]
    scores = ["clip_score"] if "short" in settings[0] else scores
    with pytest.raises((UserError, MissingFileError)) as error:
        columns(*scores, settings=tuple(settings))
    assert message in " ".join(str(error.value).replace("`", "").split())
