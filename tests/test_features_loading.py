"""What extraction wrote, opened by other people's libraries alone: webdataset, Hugging Face datasets, DuckDB."""

import gc
import warnings

import duckdb
import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from feature_run import extract, write_run

from pipelines.store.feature_store import load_index, read_payload
from pipelines.store.manifest import read_manifest

MIXED = 'features.stage2.captions=[{column="caption", weight=0.9}, {column="alt_text", weight=0.1}]'
SETS = {
    "bfloat16": ("text", ()),
    "float8_e4m3": ("text", ("features.text_storage=float8_e4m3",)),
    "int8": ("text-caption+alt_text", ("features.text_storage=int8", MIXED)),
}
SHARDS = ["laion_00000", "laion_00001"]


@pytest.fixture(scope="module", params=SETS)
def written(request, tmp_path_factory):
    """A run, the folder of its text, and its captions by (key, caption) as our index and payload reader give them."""
    name, overrides = SETS[request.param]
    run = write_run(tmp_path_factory.mktemp(request.param), num_shards=2, samples_per_shard=6)
    extract(run, *overrides)
    directory = run / "features" / name
    expected = {}
    for shard in SHARDS:
        tar = np.memmap(directory / f"{shard}.tar", np.uint8, mode="r")
        for row in load_index(directory, [shard]).to_pylist():
            if row["reject"] is None:
                expected[row["key"], row["caption_index"]] = caption(tar, row, request.param)
    return run, directory, expected


def caption(tar: np.ndarray, row: dict, storage: str) -> torch.Tensor:
    dtype = {"bfloat16": torch.bfloat16, "float8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}[storage]
    values = torch.from_numpy(tar[row["offset"] : row["offset"] + row["nbytes"]].copy()).view(dtype)
    values = values.view(row["num_tokens"], 32).float()
    if row["scale_offset"] is None:
        return values
    scale = read_payload(tar, row["scale_offset"], dtype="float32", shape=(row["num_tokens"],))
    return values * torch.from_numpy(scale.copy())[:, None]


def restored(member: bytes) -> dict[int, torch.Tensor]:
    """The few lines docs/FEATURES.md shows: a member's captions from its bytes, whatever they are stored in."""
    tensors = safetensors.torch.load(member)
    captions = {}
    for name, values in tensors.items():
        kind, index = name.split("_")
        if kind == "embedding":
            scale = tensors.get(f"scale_{index}")
            captions[int(index)] = values.float() if scale is None else values.float() * scale[:, None]
    return captions


def require_equal(members: dict[str, bytes], expected: dict[tuple[str, int], torch.Tensor]) -> None:
    found = {(key, index): values for key, member in members.items() for index, values in restored(member).items()}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


def test_plain_webdataset(written):
    run, directory, expected = written
    with warnings.catch_warnings():
        # webdataset leaves closing its files to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        pattern = "laion_{00000..00001}.tar"
        texts = {sample["__key__"]: sample["safetensors"] for sample in open_tars(directory / pattern)}
        latents = {
            sample["__key__"]: sample["safetensors"] for sample in open_tars(run / "features/latent-32" / pattern)
        }
        gc.collect()
    require_equal(texts, expected)
    assert latents.keys() > texts.keys()
    for member in latents.values():
        tensors = safetensors.torch.load(member)
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        assert found == dict.fromkeys(("mean", "std"), (torch.float16, (4, 4, 4)))


def open_tars(pattern) -> webdataset.WebDataset:
    return webdataset.WebDataset(str(pattern), shardshuffle=False)


@pytest.mark.parametrize("is_streaming", [True, False])
def test_hugging_face_datasets(written, tmp_path, monkeypatch, is_streaming):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    _, directory, expected = written
    files = {"train": [str(directory / f"{shard}.tar") for shard in SHARDS]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        dataset = datasets.load_dataset(
            "webdataset", data_files=files, split="train", streaming=is_streaming, cache_dir=str(tmp_path)
        )
        members = {sample["__key__"]: sample["safetensors"] for sample in dataset}
        del dataset
        gc.collect()
    require_equal(members, expected)


def test_duckdb_reads_the_index(written):
    run, directory, expected = written
    text, latents = (str(folder / "*.parquet") for folder in (directory, run / "features" / "latent-32"))
    with duckdb.connect() as connection:
        num_samples, num_tokens, num_bytes = connection.execute(
            "select count(distinct key), sum(num_tokens), sum(nbytes) from read_parquet(?) where reject is null", [text]
        ).fetchone()
        joined = connection.execute(
            "select count(distinct latents.key) from read_parquet(?) latents"
            " join read_parquet(?) text using (key, shard)"
            " where latents.reject is null and text.reject is null",
            [latents, text],
        ).fetchone()
        rejects = connection.execute(
            "select reject, count(*) from read_parquet(?)"
            " where caption_index = 0 and reject is not null group by reject",
            [text],
        ).fetchall()
    assert num_samples == len({key for key, _ in expected})
    assert num_tokens == sum(len(values) for values in expected.values())
    storage = read_manifest(directory).extra["text"]["storage"]
    assert num_bytes == num_tokens * 32 * (2 if storage == "bfloat16" else 1)
    assert joined == (num_samples,)
    assert dict(rejects) == read_manifest(directory).rejected == {"caption:loop": 1}
