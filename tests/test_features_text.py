"""Captions as they are stored: several a sample, in 16 bits or in 8, encoded anew when and only when they change."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from feature_run import extract, write_run
from hypothesis import given
from hypothesis import strategies as st
from tiny_encoders import save_text_encoder

import features.__main__ as features_main
from encoders.opening import open_text_encoder
from errors import UserError
from features.captions import IDENTITIES_NAME, text_identity
from features.quantization import LARGEST, measure_error, restore_text, store_text, summarize_storage
from pipelines.store.feature_store import load_index, payload_crc32, read_payload
from pipelines.store.files import sha256_file
from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport, read_manifest
from pipelines.store.verify.run import verify_run

THREE = 'features.stage2.captions=[{column="caption", weight=6.0}, {column="alt_text"}, {column="title", weight=0.5}]'
SHARD = "laion_00000"
BIT_TYPES = {"float8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}


# -- 8 bits -----------------------------------------------------------------------------------------------------------


def embedding(seed: int, num_tokens: int = 20, width: int = 256) -> torch.Tensor:
    """Values as T5 has them: normal, with a few channels many times larger."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_tokens, width, generator=generator) * 0.1
    values[:, :3] *= 12
    return values


@pytest.mark.parametrize("storage", BIT_TYPES)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-20, 20))
def test_the_error_of_8_bits_is_bounded_value_by_value(storage, seed, exponent):
    values = embedding(seed, 4, 64) * 2.0**exponent
    values[0] = 0
    stored = store_text(values, storage)
    assert stored.scale is not None
    restored = restore_text(stored, storage)
    error = (restored - values).abs()
    scale = torch.from_numpy(stored.scale)[:, None]
    # Half a step of int8; half of the last of three mantissa bits, or half of the smallest subnormal.
    bound = scale / 2 if storage == "int8" else torch.maximum(values.abs() * 2**-4, scale * 2**-10)
    assert (error <= bound * (1 + 1e-5)).all()
    assert (restored[0] == 0).all()
    # The largest value of a token is hit whole.
    torch.testing.assert_close(restored.abs().amax(1), values.abs().amax(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("storage", "largest_rms"), [("float8_e4m3", 0.03), ("int8", 0.04)])
def test_error_figures_are_what_numpy_says(storage, largest_rms):
    totals, expected = [], []
    for seed in range(3):
        values = embedding(seed)
        stored = store_text(values, storage)
        restored = restore_text(stored, storage)
        found = measure_error(values, restored)
        totals.append({"num_captions": 1, "stored_bytes": stored.nbytes, "bfloat16_bytes": 2 * values.numel(), **found})
        exact, error = values.double().numpy(), (restored - values).double().numpy()
        expected.append((error**2).sum() / (exact**2).sum())
    figures = summarize_storage(totals)
    assert figures is not None
    assert figures["relative_rms_error"] == pytest.approx(np.sqrt(np.mean(expected)), rel=1e-3)
    assert figures["relative_rms_error"] < largest_rms
    assert figures["cosine"] > 0.999
    # A byte a value and four a token, where bfloat16 has two a value.
    assert figures["size"] == pytest.approx(0.5 + 4 / (2 * 256), abs=1e-4)
    assert summarize_storage([{"num_captions": 3}]) is None


def test_a_token_at_the_end_of_float32_does_not_become_nan():
    values = torch.full((1, 4), 3e38)
    for storage, largest in LARGEST.items():
        restored = restore_text(store_text(values, storage), storage)
        torch.testing.assert_close(restored, values, rtol=1 / largest, atol=0)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path, num_shards=1, samples_per_shard=10)


@pytest.mark.parametrize("storage", BIT_TYPES)
def test_plain_safetensors_opens_8_bits_and_gives_the_embeddings_back(run, storage, monkeypatch):
    messages = []
    monkeypatch.setattr(features_main.log, "info", messages.append)
    extract(run, f"features.text_storage={storage}")
    directory = run / "features" / "text"
    encoder = open_text_encoder(str(run.parent / "t5"), max_tokens=40, dtype="float32")
    captions = pq.read_table(run / "captions" / f"{SHARD}.parquet").to_pylist()
    tar = np.memmap(directory / f"{SHARD}.tar", np.uint8, mode="r")
    for row, caption in zip(load_index(directory, [SHARD]).to_pylist(), captions, strict=True):
        if row["reject"]:
            assert (row["offset"], row["scale_offset"], row["crc32"]) == (None, None, None)
            continue
        start = row["offset"] // 512 * 512 if row["offset"] % 512 else row["offset"] - 512
        size = int.from_bytes(tar[start : start + 8].tobytes(), "little")
        member = tar[start : row["scale_offset"] + 4 * row["num_tokens"]].tobytes()
        assert start + 8 + size == row["offset"]
        tensors = safetensors.torch.load(member)
        assert tensors["embedding_0"].dtype == BIT_TYPES[storage]
        assert (tensors["scale_0"].dtype, tensors["scale_0"].shape) == (torch.float32, (row["num_tokens"],))
        value = tensors["embedding_0"].float() * tensors["scale_0"][:, None]
        (exact,) = encoder.encode([caption["caption"]])
        assert ((value - exact).norm() / exact.norm()).item() < 0.04
        scale = read_payload(tar, row["scale_offset"], dtype="float32", shape=(row["num_tokens"],))
        bits = tar[row["offset"] : row["offset"] + row["nbytes"]]
        assert row["crc32"] == payload_crc32(bits, scale)
    null = safetensors.torch.load_file(directory / "null.safetensors")
    assert {name: tensor.dtype for name, tensor in null.items()} == {"embedding_0": torch.bfloat16}
    manifest = read_manifest(directory)
    assert manifest.extra["text"]["storage"] == storage
    details = manifest.shards[SHARD].details
    assert details["stored_bytes"] == details["num_tokens"] * (32 + 4)
    assert details["bfloat16_bytes"] == details["num_tokens"] * 64
    figures = summarize_storage([details])
    assert figures is not None
    assert 0 < figures["relative_rms_error"] < 0.04
    (message,) = [message for message in messages if "of bfloat16" in message]
    assert f"{storage} text takes 56.2% of bfloat16; relative RMS error {figures['relative_rms_error']:.2%}" in message
    assert json.loads((run / "summary.json").read_text())["features"]["stage2"]["text_storage"]["storage"] == storage


# -- several captions -------------------------------------------------------------------------------------------------


def add_column(run: Path, name: str, texts: list[str | None]) -> None:
    """Add a column of texts to the captions, as a user with captions of another model would."""
    path = run / "captions" / f"{SHARD}.parquet"
    table = pq.read_table(path)
    rewrite_captions(run, table.append_column(name, pa.array(texts, pa.string())))


def rewrite_captions(run: Path, table: pa.Table) -> None:
    """Replace the captions and what their marker and manifest say of the file; the settings stay as they are."""
    directory = ShardDirectory(run / "captions")
    manifest = read_manifest(directory.path)
    report = manifest.shards[SHARD]
    pq.write_table(table, directory.file(SHARD, ".parquet"))
    files = {".parquet": sha256_file(directory.file(SHARD, ".parquet"))}
    rejects = [reason for reason in table.column("reject").to_pylist() if reason]
    counted = {reason: rejects.count(reason) for reason in set(rejects)}
    changed = ShardReport(
        name=SHARD,
        source=report.source,
        num_read=len(table),
        num_kept=len(table) - len(rejects),
        rejected=counted,
        files=files,
    )
    directory.write_marker(changed, manifest.fingerprint)
    directory.write_manifest(manifest.fingerprint, [SHARD], upstream={}, extra={})


def test_each_caption_is_a_tensor_of_one_member_and_a_row_with_its_weight(run):
    # The first has all three, the fourth lacks its alt text (see write_captions), the sixth has only the dense one.
    add_column(run, "title", [f"title {index}" if index != 5 else " " for index in range(10)])
    table = pq.read_table(run / "captions" / f"{SHARD}.parquet")
    alt_texts = table.column("alt_text").to_pylist()
    alt_texts[5] = None
    position = table.schema.get_field_index("alt_text")
    rewrite_captions(run, table.set_column(position, "alt_text", pa.array(alt_texts, pa.string())))
    extract(run, THREE)
    directory = run / "features" / "text-caption+alt_text+title"
    rows = load_index(directory, [SHARD]).to_pylist()
    assert [row["caption_index"] for row in rows] == [0, 1, 2] * 10
    assert {row["caption_index"]: row["weight"] for row in rows} == {0: 6.0, 1: 1.0, 2: 0.5}
    rejects = {(row["key"], row["caption_index"]): row["reject"] for row in rows if row["reject"]}
    assert rejects == {
        **{("00000002", index): "caption:loop" for index in range(3)},
        ("00000003", 1): "no_alt_text",
        ("00000005", 1): "no_alt_text",
        ("00000005", 2): "no_title",
        ("00000007", 1): "no_alt_text",
    }
    manifest = read_manifest(directory)
    assert (manifest.num_read, manifest.num_kept, manifest.rejected) == (10, 9, {"caption:loop": 1})
    assert manifest.shards[SHARD].details["num_captions"] == 27 - 4
    encoder = open_text_encoder(str(run.parent / "t5"), max_tokens=40, dtype="float32")
    captions = {row["key"]: row for row in pq.read_table(run / "captions" / f"{SHARD}.parquet").to_pylist()}
    tar = np.memmap(directory / f"{SHARD}.tar", np.uint8, mode="r")
    for row in rows:
        if row["reject"] is None:
            column = ("caption", "alt_text", "title")[row["caption_index"]]
            bits = read_payload(tar, row["offset"], dtype="uint16", shape=(row["num_tokens"], 32))
            (expected,) = encoder.encode([captions[row["key"]][column]])
            torch.testing.assert_close(
                torch.from_numpy(bits.copy()).view(torch.bfloat16).float(), expected, atol=0.02, rtol=0.01
            )


def test_a_sample_without_any_caption_is_one_counted_reject(run):
    both = 'features.stage2.captions=[{column="alt_text"}, {column="title"}]'
    add_column(run, "title", [f"title {index}" if index not in (3, 4) else None for index in range(10)])
    extract(run, both)
    manifest = read_manifest(run / "features" / "text-alt_text+title")
    # Key 3 has neither; key 4 has an alt text, key 7 a title.
    assert manifest.rejected == {"caption:loop": 1, "no_alt_text": 1}
    assert manifest.num_kept == 8


def test_a_column_that_is_not_there_is_named(run):
    with pytest.raises(
        UserError, match=r"features\.stage2\.captions names 'title', but .* has no such captions; .* alt_text, caption"
    ):
        extract(run, THREE)


def test_a_column_that_holds_no_texts_is_named(run):
    table = pq.read_table(run / "captions" / f"{SHARD}.parquet")
    rewrite_captions(run, table.append_column("title", pa.array(range(10))))
    with pytest.raises(UserError, match=r"features\.stage2\.captions names 'title'"):
        extract(run, THREE)


# -- what is encoded anew ---------------------------------------------------------------------------------------------


def encoded_shards(run: Path) -> int:
    """Return the time of the text tar: it changes when the captions are encoded anew."""
    return (run / "features" / "text" / f"{SHARD}.tar").stat().st_mtime_ns


def test_new_flags_leave_the_embeddings_alone_and_new_words_do_not(run):
    extract(run)
    before = encoded_shards(run)
    table = pq.read_table(run / "captions" / f"{SHARD}.parquet")
    flagged = table.append_column("flags", pa.array([["truncated"]] * 10))
    rewrite_captions(run, flagged)
    extract(run)
    assert encoded_shards(run) == before
    known = json.loads((run / "features" / "text" / IDENTITIES_NAME).read_text())
    assert known[SHARD][0] == sha256_file(run / "captions" / f"{SHARD}.parquet")
    texts = flagged.column("caption").to_pylist()
    texts[6] += " indeed"
    position = flagged.schema.get_field_index("caption")
    rewrite_captions(run, flagged.set_column(position, "caption", pa.array(texts, pa.string())))
    extract(run)
    assert encoded_shards(run) != before


def test_a_clip_score_leaves_the_embeddings_alone_and_other_settings_of_captioning_do_not(run):
    extract(run)
    before, directory = encoded_shards(run), ShardDirectory(run / "captions")
    plain = read_manifest(directory.path)

    def set_captions(settings: dict[str, str], texts: str) -> None:
        fingerprint = Fingerprint.of(plain.fingerprint.fields | settings)
        directory.write_marker(plain.shards[SHARD], fingerprint)
        directory.write_manifest(fingerprint, [SHARD], upstream={}, extra={"texts": texts})

    set_captions({"clip_model": "clip"}, plain.fingerprint.digest)
    extract(run)
    assert encoded_shards(run) == before and verify_run(run).problems == []
    set_captions({"prompt": "another"}, "another")
    (problem,) = verify_run(run).problems
    assert problem.text.startswith(f"made from captions {plain.fingerprint.digest}, but")
    extract(run)
    assert encoded_shards(run) != before and verify_run(run).problems == []


def test_another_reject_is_encoded_anew(run):
    extract(run)
    before = encoded_shards(run)
    table = pq.read_table(run / "captions" / f"{SHARD}.parquet")
    rejects = table.column("reject").to_pylist()
    rejects[8] = "loop"
    position = table.schema.get_field_index("reject")
    rewrite_captions(run, table.set_column(position, "reject", pa.array(rejects, pa.string())))
    extract(run)
    assert encoded_shards(run) != before
    assert read_manifest(run / "features" / "text").rejected == {"caption:loop": 2}


def test_an_identity_depends_on_the_columns_encoded_alone(run):
    path = run / "captions" / f"{SHARD}.parquet"
    before = [text_identity(path, [column]) for column in ("caption", "alt_text")]
    table = pq.read_table(path)
    position = table.schema.get_field_index("alt_text")
    pq.write_table(table.set_column(position, "alt_text", pc.utf8_upper(table.column("alt_text"))), path)
    after = [text_identity(path, [column]) for column in ("caption", "alt_text")]
    assert (before[0] == after[0], before[1] == after[1]) == (True, False)


def test_captions_that_are_no_parquet_are_named(run):
    (run / "captions" / f"{SHARD}.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"laion_00000\.parquet is no readable table .* type `make caption` again"):
        extract(run)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("features.max_tokens=5", "max_tokens: 40 -> 5"),
        ("features.text_storage=int8", "text_storage: bfloat16 -> int8"),
        ("features.text_dtype=bfloat16", "text_dtype: float32 -> bfloat16"),
        ("features.text_weight_dtype=int8", "text_weight_dtype: None -> int8"),
    ],
)
def test_what_is_computed_anew_says_which_setting_changed(run, capsys, override, field):
    extract(run)
    capsys.readouterr()
    extract(run, override)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("made anew") == 1
    assert f"text: 1 of 1 shards were made with other settings ({field}) and are made anew, first {SHARD}" in said


def test_an_encoder_with_weights_in_8_bits_gives_nearly_the_same_and_its_name_to_what_reads_it(run):
    extract(run)
    whole = captions_of(run)
    assert "weight_dtype" not in read_manifest(run / "features" / "text").extra["text"]
    extract(run, "features.text_weight_dtype=int8")
    rounded = captions_of(run)
    assert read_manifest(run / "features" / "text").extra["text"]["weight_dtype"] == "int8"
    error = torch.linalg.vector_norm(rounded - whole) / torch.linalg.vector_norm(whole)
    assert 1e-4 < error < 0.03


def test_a_variant_lies_beside_the_others_and_verify_knows_it(run):
    extract(run)
    before = {path: path.read_bytes() for path in (run / "features").rglob("*") if path.is_file()}
    extract(run, "features.text_variant=short", "features.max_tokens=5", "features.image_variant=b")
    assert {path.name for path in (run / "features").iterdir()} == {"latent-32", "latent-32@b", "text", "text@short"}
    assert {path: path.read_bytes() for path in before} == before
    assert read_manifest(run / "features" / "text@short").extra["text"]["max_tokens"] == 5
    assert verify_run(run).problems == []


def captions_of(run: Path) -> torch.Tensor:
    """Return all embeddings of the run's shard end to end, float32."""
    directory = run / "features" / "text"
    tar = np.memmap(directory / f"{SHARD}.tar", np.uint8, mode="r")
    rows = [row for row in load_index(directory, [SHARD]).to_pylist() if row["reject"] is None]
    shapes = [(row["num_tokens"], row["nbytes"] // 2 // row["num_tokens"]) for row in rows]
    parts = [
        read_payload(tar, row["offset"], dtype="uint16", shape=shape) for row, shape in zip(rows, shapes, strict=True)
    ]
    return torch.from_numpy(np.concatenate(parts).copy()).view(torch.bfloat16).float()


def test_other_weights_and_another_model_are_named_too(run, capsys):
    sets = 'features.stage2.captions=[{{column="caption", weight={}}}, {{column="alt_text"}}]'
    extract(run, sets.format(9.0))
    save_text_encoder(run.parent / "t5", seed=1)
    capsys.readouterr()
    extract(run, sets.format(4.0))
    said = " ".join(capsys.readouterr().err.split())
    change = r"\(caption_weights: \[9\.0, 1\.0\] -> \[4\.0, 1\.0\]; text_model: sha256:\w+ -> sha256:\w+\)"
    assert re.search(rf"made with other settings {change} and are made anew", said)
    weights = load_index(run / "features" / "text-caption+alt_text", [SHARD]).column("weight").to_pylist()
    assert weights == [4.0, 1.0] * 10


def test_sigma_has_300_tokens_and_another_vae(run):
    """Only the recipe differs: the limit, and the channels and scale of the VAE's own config."""
    path = run / "captions" / f"{SHARD}.parquet"
    table = pq.read_table(path)
    texts = ["a red circle " * 40, *table.column("caption").to_pylist()[1:]]
    position = table.schema.get_field_index("caption")
    rewrite_captions(run, table.set_column(position, "caption", pa.array(texts, pa.string())))
    config = run.parent / "vae" / "config.json"
    sdxl = {"scaling_factor": 0.13025, "shift_factor": 0.25}
    config.write_text(json.dumps(json.loads(config.read_text()) | sdxl))
    extract(run, "features.max_tokens=300")
    rows = load_index(run / "features" / "text", [SHARD]).to_pylist()
    assert rows[0]["num_tokens"] == 300
    text = read_manifest(run / "features" / "text")
    assert (text.extra["text"]["max_tokens"], text.shards[SHARD].details["num_at_token_limit"]) == (300, 1)
    vae = read_manifest(run / "features" / "latent-32").extra["vae"]
    assert (vae["scaling_factor"], vae["shift_factor"], vae["channels"]) == (0.13025, 0.25, 4)
