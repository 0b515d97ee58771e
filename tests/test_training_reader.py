"""Batches hold what plain safetensors reads, and random numbers that depend on step and position alone."""

import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load
from torch.utils._pytree import tree_map_only
from training_run import make_run, write_latents, write_text

from errors import UserError
from pipelines.store.families import NULL_CAPTION_FILE, latent_directory, text_directory
from training.data.assembly import BatchAssembler
from training.data.batch import Batch, PackedRows
from training.data.datasets import Dataset
from training.data.directories import open_directory
from training.data.index import FeatureIndex
from training.data.plan import Plan
from training.data.reader import BatchReader
from training.data.survey import Survey, make_survey, survey_shards

SHARDS = ["laion_0", "laion_1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("reader"))


def open_index(run: Path, shards: list[str] = SHARDS, *, resolution: int = 32, has_text: bool = True) -> FeatureIndex:
    folders = [latent_directory(run, resolution), text_directory(run)][: 2 if has_text else 1]
    directories = [open_directory(str(folder)) for folder in folders]
    return FeatureIndex([Dataset(run=str(run), directories=directories, shards=shards)])


def survey_of(index: FeatureIndex) -> Survey:
    return make_survey(index, survey_shards(index, range(len(index))))


def open_reader(
    index: FeatureIndex,
    *,
    steps: range,
    batch_size: int = 12,
    stream: int = 2,
    rank: int = 0,
    num_ranks: int = 1,
    num_micro_batches: int = 1,
    dropout: float = 0.1,
    checks_payloads: bool = False,
    survey: Survey | None = None,
) -> BatchReader:
    survey = survey or survey_of(index)
    plan = Plan(
        survey.counts,
        weights=[dataset.weight for dataset in index.datasets],
        batch_size=batch_size,
        seed=5,
        shards_per_block=2,
    )
    assembler = BatchAssembler(
        index.datasets[0],
        buckets=survey.buckets,
        seed=5,
        stream=stream,
        caption_dropout=dropout,
        checks_payloads=checks_payloads,
    )
    return BatchReader(
        plan, index, assembler, steps=steps, rank=rank, num_ranks=num_ranks, num_micro_batches=num_micro_batches
    )


def batches_of(reader: BatchReader) -> list[Batch]:
    """All batches, copied out of the reader's buffers."""
    with reader:
        return [clone(packed.to(torch.device("cpu"))) for packed in reader]


def read_tars(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    tensors = {}
    for name in SHARDS:
        with tarfile.open(directory / f"{name}.tar") as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                tensors[member.name.removesuffix(".safetensors")] = load(file.read())
    return tensors


def read_batches(
    run: Path, *, steps: range, num_ranks: int = 1, num_micro_batches: int = 1, dropout: float = 0.1
) -> list[Batch]:
    """All samples of the global batches, rank after rank."""
    return [
        batch
        for rank in range(num_ranks)
        for batch in batches_of(
            open_reader(
                open_index(run),
                steps=steps,
                rank=rank,
                num_ranks=num_ranks,
                num_micro_batches=num_micro_batches,
                dropout=dropout,
            )
        )
    ]


def clone(batch: Batch) -> Batch:
    return Batch(**tree_map_only(torch.Tensor, torch.clone, vars(batch)))


def samples(batches: list[Batch]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor, Batch, int]]:
    for batch in batches:
        assert batch.text is not None
        assert batch.std is not None
        for i, key in enumerate(batch.keys):
            text = batch.text.values[batch.text.offsets[i] : batch.text.offsets[i + 1]]
            yield key, batch.mean[i], batch.std[i], text, batch, i


def test_batches_equal_plain_safetensors(run: Path) -> None:
    latents = read_tars(latent_directory(run, 32))
    texts = read_tars(text_directory(run))
    seen = set()
    for key, mean, std, text, batch, _ in samples(read_batches(run, steps=range(12), dropout=0.0)):
        seen.add(key)
        assert torch.equal(mean, latents[key]["mean"])
        assert torch.equal(std, latents[key]["std"])
        assert any(torch.equal(text, caption) for caption in texts[key].values())
        assert batch.text is not None
        assert not batch.text.values[batch.text.offsets[-1] :].any(), "zero, whatever the buffer held before"
    assert seen == latents.keys() & texts.keys(), "samples without latents or without captions are left out"


def test_dropped_captions_are_the_null_record(run: Path) -> None:
    null = next(iter(load((text_directory(run) / NULL_CAPTION_FILE).read_bytes()).values()))
    dropped = [
        torch.equal(text, null)
        for *_, text, batch, i in samples(read_batches(run, steps=range(50)))
        if batch.is_dropped[i]
    ]
    assert all(dropped)
    assert 30 < len(dropped) < 90, "a tenth of 600"


def test_captions_are_chosen_by_weight(run: Path) -> None:
    texts = read_tars(text_directory(run))
    is_first = [
        torch.equal(text, texts[key]["embedding_0"])
        for key, _, _, text, _, _ in samples(read_batches(run, steps=range(60), dropout=0.0))
        if len(texts[key]) == 2
    ]
    assert np.mean(is_first) == pytest.approx(0.75, abs=0.08)


@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), [(2, 1), (3, 2), (1, 4)])
def test_world_size_changes_no_sample_and_no_random_number(run: Path, num_ranks: int, num_micro_batches: int) -> None:
    whole = read_batches(run, steps=range(7, 8))
    parts = read_batches(run, steps=range(7, 8), num_ranks=num_ranks, num_micro_batches=num_micro_batches)
    assert [key for batch in parts for key in batch.keys] == whole[0].keys
    for name in ("mean", "posterior_noise", "noise", "timestep_draws", "is_dropped"):
        assert torch.equal(torch.cat([getattr(batch, name) for batch in parts]), getattr(whole[0], name)), name
    expected = [text for *_, text, _, _ in samples(whole)]
    found = [text for *_, text, _, _ in samples(parts)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(("shards", "num_epochs"), [(SHARDS[:1], 3), (SHARDS, 12)])
def test_all_ranks_together_read_every_key_once_an_epoch(
    run: Path, shards: list[str], num_epochs: int, num_ranks: int
) -> None:
    """32 samples of one shard are 1 1/3 batches of 24, 50 of two are 2 1/12: epochs end inside batches."""
    index = open_index(run, shards)
    (num_samples,) = survey_of(index).num_samples
    steps = range(num_epochs * num_samples // 24)
    readers = [
        open_reader(index, steps=steps, batch_size=24, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)
    ]
    keys = Counter(key for reader in readers for batch in batches_of(reader) for key in batch.keys)
    assert len(keys) == num_samples
    assert set(keys.values()) == {num_epochs}


def test_steps_and_stages_draw_other_numbers(run: Path) -> None:
    first, second = read_batches(run, steps=range(2))
    assert not torch.equal(first.noise, second.noise)
    assert not torch.equal(first.noise, first.posterior_noise)
    assert first.noise.std().item() == pytest.approx(1.0, abs=0.05)


def test_labels_are_read_where_there_is_no_text(run: Path) -> None:
    index = open_index(run, ["imagenet_0"], has_text=False)
    survey = survey_of(index)
    assert survey.max_label == 4
    assert (survey.channels, survey.downsample) == (4, 8)
    for batch in batches_of(open_reader(index, steps=range(3), batch_size=6, stream=1)):
        assert batch.text is None
        assert batch.labels is not None
        assert batch.labels.tolist() == [int(key[-3:]) % 5 for key in batch.keys]


def test_latents_of_a_codec_without_deviation_are_their_means(run: Path, tmp_path: Path) -> None:
    plain = tmp_path / "run"
    write_latents(plain, 32, dict.fromkeys(SHARDS, 20), buckets=["32x32"], is_bucketed=False, has_std=False)
    write_text(plain, dict.fromkeys(SHARDS, 20))
    stored = read_tars(latent_directory(plain, 32))
    assert all(tensors.keys() == {"mean"} for tensors in stored.values())
    for batch in batches_of(open_reader(open_index(plain), steps=range(3), checks_payloads=True)):
        assert (batch.std, batch.posterior_noise) == (None, None)
        assert torch.equal(batch.draw_latents(), torch.stack([stored[key]["mean"] for key in batch.keys]).float())
        assert batch.noise.std().item() == pytest.approx(1.0, abs=0.05)


def test_buckets_do_not_mix(run: Path) -> None:
    index = open_index(run, ["hq_0"], resolution=64)
    assert survey_of(index).buckets == ["48x80", "64x64", "80x48"]
    batches = batches_of(open_reader(index, steps=range(20), batch_size=4, stream=3))
    shapes = {(batch.bucket, tuple(batch.mean.shape)) for batch in batches}
    assert shapes == {("48x80", (4, 4, 6, 10)), ("64x64", (4, 4, 8, 8)), ("80x48", (4, 4, 10, 6))}


@pytest.mark.parametrize("storage", ["float8_e4m3", "int8"])
def test_compact_captions_are_the_stored_values_times_their_scale(tmp_path: Path, storage: str) -> None:
    run = make_run(tmp_path)
    shutil.rmtree(text_directory(run))
    write_text(run, {"laion_0": 40, "laion_1": 23}, storage=storage)
    stored = read_tars(text_directory(run))
    null = next(iter(load((text_directory(run) / NULL_CAPTION_FILE).read_bytes()).values()))
    num_dropped = 0
    for key, _, _, text, batch, i in samples(
        batches_of(open_reader(open_index(run), steps=range(12), checks_payloads=True))
    ):
        num_dropped += int(batch.is_dropped[i])
        parts = [(f"embedding_{k}", f"scale_{k}") for k in range(2) if f"embedding_{k}" in stored[key]]
        values = [(stored[key][value].float() * stored[key][scale][:, None]).bfloat16() for value, scale in parts]
        assert any(torch.equal(text, value) for value in ([null] if batch.is_dropped[i] else values))
        assert batch.text is not None
        assert not batch.text.values[batch.text.offsets[-1] :].any()
    assert num_dropped


def test_a_batch_of_dropped_captions_alone_is_the_null_record(run: Path) -> None:
    batches = batches_of(open_reader(open_index(run), steps=range(2), batch_size=2, dropout=1.0))
    for batch in batches:
        assert batch.text is not None and batch.text.offsets.tolist() == [0, 2, 4]
        assert torch.equal(batch.text.values[:4], torch.ones(4, 16, dtype=torch.bfloat16))


def test_datasets_are_mixed_by_weight_and_read_from_their_own_folders(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path)
    shutil.rmtree(text_directory(other))
    write_text(other, {"laion_0": 40, "laion_1": 23}, storage="bfloat16", seed=1)
    index = FeatureIndex(
        [
            replace(open_index(run).datasets[0], weight=0.25),
            replace(open_index(other, ["laion_0"]).datasets[0], weight=0.75),
        ]
    )
    texts = [read_tars(text_directory(folder)) for folder in (run, other)]
    found = [0, 0]
    for key, _, _, text, _, _ in samples(batches_of(open_reader(index, steps=range(40), dropout=0.0))):
        is_from = [any(torch.equal(text, caption) for caption in source[key].values()) for source in texts]
        assert sum(is_from) == 1, "the same keys, but each dataset's own captions"
        found[is_from.index(True)] += 1
    assert found == pytest.approx([120, 360], abs=3)


def test_the_same_key_in_two_shards_is_two_samples(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for directory in (latent_directory(run, 32), text_directory(run)):
        for suffix in (".tar", ".parquet"):
            shutil.copy(directory / f"laion_0{suffix}", directory / f"laion_1{suffix}")
    index = open_index(run)
    (num_samples,) = survey_of(index).num_samples
    batches = batches_of(open_reader(index, steps=range(num_samples // 2), batch_size=2))
    assert set(Counter(key for batch in batches for key in batch.keys).values()) == {2}, "drawn once from each shard"


def test_a_key_twice_in_one_index_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path = latent_directory(run, 32) / "laion_1.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table.slice(3, 1)]), path)
    with pytest.raises(UserError, match=r"shard laion_1 of .*latent-32: key laion_1_003 is there twice"):
        survey_of(open_index(run))


@pytest.mark.parametrize("family", ["latent-32", "text"])
@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
def test_a_missing_file_in_the_middle_is_named_before_training(tmp_path: Path, family: str, suffix: str) -> None:
    run = make_run(tmp_path)
    (run / "features" / family / f"laion_1{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{family}/laion_1\{suffix}.* missing"):
        survey_of(open_index(run))


def cut(path: Path, num_bytes: int) -> None:
    with path.open("r+b") as file:
        file.truncate(num_bytes)


def test_a_cut_tar_is_named_before_training(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    cut(text_directory(run) / "laion_1.tar", 9000)
    with pytest.raises(UserError, match=r"shard laion_1: .*text/laion_1.tar has 9000 bytes, but .* cut short"):
        survey_of(open_index(run))


def test_a_tar_cut_or_lost_while_training_is_named_by_the_iterator(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    index = open_index(run)
    survey = survey_of(index)
    tar = latent_directory(run, 32) / "laion_1.tar"
    cut(tar, tar.stat().st_size // 2)
    with pytest.raises(UserError, match=r"shard laion_1: sample laion_1_\d+ ends at byte \d+, but its tar has \d+"):
        batches_of(open_reader(index, steps=range(10), survey=survey))
    tar.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard laion_1: .*laion_1.tar is missing; make its features again"):
        batches_of(open_reader(index, steps=range(10), survey=survey))


@pytest.mark.parametrize(("family", "what"), [("latent-32", "latents"), ("text", "text")])
def test_a_flipped_byte_is_named_on_the_rank_that_reads_it(tmp_path: Path, family: str, what: str) -> None:
    run = make_run(tmp_path)
    index = open_index(run)
    table = index.table(1)
    latents, text = table.families["latents"], table.families["text"]
    row = next(row for row in range(20) if text.starts[row + 1] - text.starts[row] == 1)
    offset = int(
        latents.column("std_offset")[row] if family == "latent-32" else text.column("offset")[text.starts[row]]
    )
    with (run / "features" / family / "laion_1.tar").open("r+b") as file:
        file.seek(offset + 1)
        flipped = file.read(1)[0] ^ 1
        file.seek(offset + 1)
        file.write(bytes([flipped]))
    key = table.keys[row]
    failed = []
    for rank in range(3):
        try:
            batches_of(open_reader(index, steps=range(4), rank=rank, num_ranks=3, dropout=0, checks_payloads=True))
        except UserError as error:
            assert f"shard laion_1: {what} of sample {key} has CRC-32" in str(error)
            failed.append(rank)
    assert len(failed) == 1, "48 of 50 samples are read once, the changed one among them, by one of three ranks"


def test_a_damaged_null_caption_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path = text_directory(run) / "null.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"text/null\.safetensors is damaged .*; remove it and type `make features`"):
        batches_of(open_reader(open_index(run), steps=range(1)))


def test_leaving_the_reader_early_stops_its_thread(run: Path) -> None:
    with open_reader(open_index(run), steps=range(1000)) as reader:
        next(iter(reader))
    assert not reader._thread.is_alive()


def test_a_sample_without_label_is_refused_by_a_dit(run: Path) -> None:
    with pytest.raises(UserError, match="shard laion_0: sample laion_0_000 has no class label"):
        survey_of(open_index(run, ["laion_0"], has_text=False))


@pytest.mark.parametrize("dropped", [[], [1], [0, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_captions_lie_end_to_end_dropped_ones_as_the_null_caption(dropped: list[int], dtype: torch.dtype) -> None:
    lengths, null = torch.tensor([3, 100, 1, 200]), torch.randn(4, 6, dtype=torch.bfloat16)
    is_dropped = torch.zeros(4, dtype=torch.bool).index_fill(0, torch.tensor(dropped, dtype=torch.int64), True)
    num_stored = int(lengths[~is_dropped].sum())
    rows = PackedRows(
        values=torch.randn(num_stored, 6).to(dtype),
        scale=None if dtype == torch.bfloat16 else torch.rand(num_stored),
        lengths=lengths.where(~is_dropped, len(null)),
        is_dropped=is_dropped,
        null=null,
    )
    text = rows.to(torch.device("cpu"))
    stored = rows.values if rows.scale is None else (rows.values.float() * rows.scale[:, None]).bfloat16()
    kept = iter(stored.split(lengths[~is_dropped].tolist()))
    captions = [null if is_null else next(kept) for is_null in is_dropped]
    assert torch.equal(text.values[: text.offsets[-1]], torch.cat(captions))
    assert not text.values[text.offsets[-1] :].any() and len(text.values) % 256 == 0
    assert text.values.dtype == torch.bfloat16 and text.offsets.dtype == torch.int32
    assert text.offsets.diff().tolist() == list(map(len, captions))
    assert text.max_length == max(map(len, captions))
