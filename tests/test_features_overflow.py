"""Features that are not finite: counted, and named with what to try."""

import json

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from feature_run import extract, write_run

from encoders.kl import KLCodec
from errors import UserError
from pipelines.store.manifest import read_manifest

LETTER = "q"


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path, num_shards=2, samples_per_shard=20)


def spoil_letter(run):
    """Let captions with this letter overflow, as fp16 did for some words; returns the keys of each shard's."""
    weights = run.parent / "t5" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    vocabulary = json.loads((run.parent / "t5" / "tokenizer.json").read_text())["model"]["vocab"]
    tensors["shared.weight"][vocabulary[LETTER]] = float("inf")
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    keys = {}
    for path in sorted((run / "captions").glob("*.parquet")):
        rows = pq.read_table(path).to_pylist()
        keys[path.stem] = [row["key"] for row in rows if not row["reject"] and LETTER in row["caption"]]
    return keys


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_an_embedding_that_is_not_finite_is_a_counted_reject(run, capsys):
    keys = spoil_letter(run)
    shown, count = ", ".join(keys["laion_00000"][:3]), sum(map(len, keys.values()))
    assert 3 < len(keys["laion_00000"]) < 20 and keys["laion_00001"]
    folder = run / "features" / "text"
    message = (
        f"{folder}: {count} features are not finite and left out, first of shard laion_00000: {shown}, … "
        f"({folder}/laion_00000.parquet lists them as reject); 1 more shards have some. "
        "features.text_dtype is 'float32' already: look at what these samples are, and at the weights of "
        f"features.text_model {run.parent}/t5"
    )
    with pytest.raises(UserError, match="max_reject_fraction"):
        extract(run, "features.max_reject_fraction=0.1")
    assert said(capsys).count(message) == 1
    assert not (folder / "manifest.json").exists()
    extract(run, "features.max_reject_fraction=1.0")
    assert said(capsys).count(message) == 1
    manifest = read_manifest(folder)
    assert manifest.rejected == {"caption:loop": 1, "non_finite_text": count}
    assert manifest.num_kept == 39 - count
    extract(run, "features.max_reject_fraction=1.0")
    assert "not finite" not in said(capsys)


def test_a_caption_that_is_not_finite_is_named_though_its_sample_has_another(run, capsys):
    keys = spoil_letter(run)["laion_00001"]
    only = 'features.stage2.shards=["laion_00001"]'
    captions = 'features.stage2.captions=[{column="caption"}, {column="alt_text"}]'
    extract(run, only, captions, "features.max_reject_fraction=1.0")
    kept = [key for key in keys if int(key) % 4 != 3]
    assert f"{len(keys)} features are not finite and left out, first of shard laion_00001: {keys[0]}" in said(capsys)
    assert read_manifest(run / "features" / "text-caption+alt_text").num_kept == 20 - (len(keys) - len(kept))


def test_a_latent_that_is_not_finite_is_a_counted_reject(run, capsys):
    weights = run.parent / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["quant_conv.bias"][0] = 1e6
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    extract(run, "features.max_reject_fraction=1.0", "features.vae_dtype=bfloat16")
    assert read_manifest(run / "features" / "latent-32").rejected == {"non_finite_latent": 40}
    text = said(capsys)
    assert (
        "latent-32: 40 features are not finite and left out, first of shard laion_00000: 00000000, 00000001, " in text
    )
    assert "features.vae_dtype = 'float32', where it is 'bfloat16' now, may hold them; it makes all of this fol" in text


def test_one_latent_that_is_not_finite_stops_no_preview(run, capsys, monkeypatch):
    start = KLCodec.start

    def spoilt(self, images):
        mean, std = start(self, images)()
        is_it = images.float().mean((1, 2, 3)) == brightness
        return lambda: (mean.masked_fill(is_it[:, None, None, None], torch.nan), std)

    brightness = -1.0
    seen = []
    monkeypatch.setattr(KLCodec, "start", lambda self, images: seen.append(images) or start(self, images))
    extract(run)
    brightness = seen[0].float().mean((1, 2, 3))[1]
    before = read_manifest(run / "features" / "latent-32").shards["laion_00000"].details
    for path in (run / "features" / "latent-32").rglob("*.json"):
        path.unlink()
    monkeypatch.setattr(KLCodec, "start", spoilt)
    capsys.readouterr()
    extract(run)
    manifest = read_manifest(run / "features" / "latent-32")
    assert manifest.rejected == {"non_finite_latent": 1}
    assert manifest.shards["laion_00000"].details.keys() == before.keys()
    assert "1 features are not finite and left out, first of shard laion_00000: 0000000" in said(capsys)
