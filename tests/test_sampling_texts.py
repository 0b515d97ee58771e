"""Where prompts are encoded: live, in 8 bits, or earlier; and that the encoder is gone before anything is denoised."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from sampling_run import MAX_TOKENS, PROMPTS, make_run, write_recipe
from torch.multiprocessing.reductions import StorageWeakRef

from encoders.living_bytes import plain_parts
from encoders.opening import open_text_encoder
from encoders.t5 import T5Encoder
from errors import UserError
from features.quantization import store_text
from pipelines.store.families import NULL_CAPTION_FILE, TEXT_SCHEMA, text_directory
from pipelines.store.feature_store import FeatureTarWriter, write_index, write_tensors
from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport
from sampling import renderer, text_encoding
from sampling.__main__ import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def sample(run: Path, **table: object) -> None:
    main(["--recipe", str(write_recipe(run, **table)), "--run", str(run), "--stage", "2"])


def images(run: Path) -> dict[str, np.ndarray]:
    folder = run / "samples" / "stage2"
    return {row["key"]: np.asarray(Image.open(folder / f"{row['key']}.png")).astype(int) for row in PROMPTS}


def largest_difference(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> int:
    return max(int(np.abs(first[key] - second[key]).max()) for key in first)


def write_features(run: Path, storage: str) -> None:
    """Write the prompts' embeddings as `make features` would have, captions with the keys of the prompt file."""
    directory = ShardDirectory(text_directory(run))
    directory.path.mkdir(parents=True)
    encoder = open_text_encoder(str(run / "t5"), max_tokens=MAX_TOKENS, dtype="float32")
    rows = []
    with FeatureTarWriter(directory.file("s0", ".tar")) as tar:
        for row, embedding in zip(PROMPTS, encoder.encode([row["prompt"] for row in PROMPTS]), strict=True):
            text = store_text(embedding, storage)
            tensors = {"embedding_0": text.values} | ({} if text.scale is None else {"scale_0": text.scale})
            offsets = tar.add(row["key"], tensors)
            place = {"offset": offsets["embedding_0"], "scale_offset": offsets.get("scale_0")}
            size = {"nbytes": text.values.nbytes, "num_tokens": len(embedding)}
            rows.append({"key": row["key"], "shard": "s0", "caption_index": 0, **place, **size})
    write_index(directory.file("s0", ".parquet"), rows, TEXT_SCHEMA)
    null = store_text(encoder.encode([""])[0], "bfloat16")
    write_tensors(directory.path / NULL_CAPTION_FILE, {"embedding_0": null.values})
    fingerprint = Fingerprint.of({"storage": storage})
    directory.write_marker(ShardReport(name="s0", source="x", num_read=3, num_kept=3), fingerprint)
    text = {"model": str(run / "t5"), "max_tokens": MAX_TOKENS, "storage": storage}
    directory.write_manifest(fingerprint, ["s0"], upstream={}, extra={"text": text})


@pytest.mark.parametrize("text_encoder", ["device", "8bit", "cpu"])
def test_the_memory_of_the_encoder_is_free_before_the_first_step(run, monkeypatch, text_encoder):
    storages: list[StorageWeakRef] = []
    load, draw = text_encoding.open_text_encoder, renderer.Renderer.draw

    def recording(*arguments, **options):
        encoder = load(*arguments, **options)
        for weight in encoder.model.parameters():
            storages.extend(StorageWeakRef(part.untyped_storage()) for part in plain_parts(weight))
        return encoder

    def checking(self, *arguments):
        assert len(storages) >= 15 and all(storage.expired() for storage in storages)
        return draw(self, *arguments)

    monkeypatch.setattr(text_encoding, "open_text_encoder", recording)
    monkeypatch.setattr(renderer.Renderer, "draw", checking)
    # Nothing may wait for a collection of cycles, which comes when it comes.
    gc.disable()
    try:
        sample(run, text_encoder=text_encoder)
    finally:
        gc.enable()
    assert len(images(run)) == 3


def test_text_encoder_on_the_cpu_draws_the_same_images(run):
    sample(run)
    expected = images(run)
    sample(run, text_encoder="cpu", seed=1)
    sample(run, text_encoder="cpu")
    assert largest_difference(images(run), expected) == 0


def test_a_written_file_gives_the_images_of_the_encoder(run):
    sample(run, negative_prompt="blue")
    expected = images(run)
    sample(run, negative_prompt="blue", write_embeddings="{run}/texts.safetensors")
    (run / "t5").rename(run / "elsewhere")  # the machine that draws need not have the encoder
    precomputed = {
        "text_encoder": "precomputed",
        "text_embeddings": "{run}/texts.safetensors",
        "negative_prompt": "blue",
    }
    sample(run, **precomputed)
    assert largest_difference(images(run), expected) == 0
    with pytest.raises(UserError, match=r"texts\.safetensors lacks 'a purple fox'"):
        sample(run, **precomputed, prompt="a purple fox")


@pytest.mark.parametrize(("storage", "tolerance"), [("bfloat16", 2), ("int8", 8), ("float8_e4m3", 40)])
def test_text_features_give_the_images_of_the_encoder(run, storage, tolerance):
    sample(run)
    expected = images(run)
    write_features(run, storage)
    sample(run, text_encoder="precomputed")
    assert largest_difference(images(run), expected) <= tolerance


def test_text_features_are_found_by_key_where_texts_are_the_same(run):
    write_features(run, "bfloat16")
    sample(run, text_encoder="precomputed")
    expected = images(run)
    prompts = run / "raw" / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row | {"prompt": "a photo"}) + "\n" for row in PROMPTS))
    sample(run, text_encoder="precomputed")
    assert largest_difference(images(run), expected) == 0


def test_embeddings_of_another_encoder_are_refused(run, caplog):
    written, precomputed = run / "texts.safetensors", {"text_encoder": "precomputed"}
    # Encoded now, though the recipe reads embeddings that are still to be written.
    sample(run, **precomputed, text_embeddings=str(written), write_embeddings=str(written))
    with safe_open(written, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert metadata["text_model"] == str(run / "t5")
    narrow = {name: tensor[:, :16].contiguous() for name, tensor in tensors.items()}
    spoilt = {name: tensor * torch.nan for name, tensor in tensors.items()}
    for changed, message in (
        (narrow, "embeddings are 16 wide, but stage 2"),
        (spoilt, r"texts\.safetensors: the embedding of '' is not finite; write it again with s"),
    ):
        save_file(changed, written, metadata=metadata)
        with pytest.raises(UserError, match=message):
            sample(run, **precomputed, text_embeddings=str(written))
    assert not list((run / "samples").glob("*/*.png"))
    save_file(tensors, written, metadata=metadata | {"text_model": "google/t5"})
    sample(run, **precomputed, text_embeddings=str(written))
    assert f"is of google/t5, the checkpoint reads {run / 't5'}'s" in caplog.text


def test_text_features_that_do_not_fit_are_refused(run):
    write_features(run, "bfloat16")
    for table, message in (
        ({"prompt": "a fox"}, r"features/text has no caption of 'a-fox-"),
        ({"negative_prompt": "blue"}, r"sampling\.negative_prompt 'blue': text features hold only that of ''"),
        ({"text_embeddings": "{run}/none.safetensors"}, r"none\.safetensors does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            sample(run, text_encoder="precomputed", **table)
    assert not list((run / "samples").glob("*/*.png"))


def test_eight_bits_draw_nearly_the_same_images(run):
    sample(run)
    expected = images(run)
    sample(run, text_encoder="8bit")
    assert 0 < largest_difference(images(run), expected) <= 16


def test_an_encoder_that_overflows_leaves_no_image(run, monkeypatch):
    encode = T5Encoder.encode
    monkeypatch.setattr(T5Encoder, "encode", lambda self, texts: [x * torch.inf for x in encode(self, texts)])
    with pytest.raises(
        UserError, match=r"gives no finite embedding of '': its weights are at fault, put them there anew$"
    ):
        sample(run)
    assert not list((run / "samples").glob("*/*.png"))


def test_a_missing_encoder_is_named_before_anything_is_loaded(run):
    (run / "t5").rename(run / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"text encoder of stage 2, step 7: model folder .*t5 does not exist"):
        sample(run)
