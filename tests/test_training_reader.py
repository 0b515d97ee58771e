"""Batches hold what plain safetensors reads, and random numbers that depend on step and position alone."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load
from training_run import make_run

from pipelines.feature_store import NULL_CAPTION_FILE, latent_directory, text_directory
from training.data.batch import Batch, BatchAssembler
from training.data.index import FeatureIndex
from training.data.plan import Plan
from training.data.reader import BatchReader

SHARDS = ["laion_0", "laion_1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("reader"))


def open_index(run: Path) -> FeatureIndex:
    return FeatureIndex(latent_directory(run, 32), text_directory(run), SHARDS)


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
    """All samples of the global batches, rank after rank, copied out of the readers' buffers."""
    batches = []
    for rank in range(num_ranks):
        index = open_index(run)
        survey = index.survey()
        plan = Plan(survey.counts, batch_size=12, seed=5, shards_per_block=2)
        assembler = BatchAssembler(index, buckets=survey.buckets, seed=5, stage=2, caption_dropout=dropout)
        with BatchReader(
            plan, assembler, steps=steps, rank=rank, num_ranks=num_ranks, num_micro_batches=num_micro_batches
        ) as reader:
            batches += [clone(batch) for batch in reader]
    return batches


def clone(batch: Batch) -> Batch:
    copied = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in vars(batch).items()}
    return Batch(**copied)


def samples(batches: list[Batch]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor, Batch, int]]:
    for batch in batches:
        assert batch.text is not None
        assert batch.text_mask is not None
        for i, key in enumerate(batch.keys):
            yield key, batch.mean[i], batch.std[i], batch.text[i][batch.text_mask[i]], batch, i


def test_batches_equal_plain_safetensors(run: Path) -> None:
    latents = read_tars(latent_directory(run, 32))
    texts = read_tars(text_directory(run))
    seen = set()
    for key, mean, std, text, batch, i in samples(read_batches(run, steps=range(12), dropout=0.0)):
        seen.add(key)
        assert torch.equal(mean, latents[key]["mean"])
        assert torch.equal(std, latents[key]["std"])
        assert any(torch.equal(text, caption) for caption in texts[key].values())
        assert batch.text is not None
        assert batch.text_mask is not None
        assert not batch.text[i][~batch.text_mask[i]].any(), "padding is zero, whatever the buffer held before"
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


def test_steps_and_stages_draw_other_numbers(run: Path) -> None:
    first, second = read_batches(run, steps=range(2))
    assert not torch.equal(first.noise, second.noise)
    assert not torch.equal(first.noise, first.posterior_noise)
    assert first.noise.std().item() == pytest.approx(1.0, abs=0.05)


def test_labels_are_read_where_there_is_no_text(run: Path) -> None:
    index = FeatureIndex(latent_directory(run, 32), None, ["imagenet_0"])
    survey = index.survey()
    assert survey.max_label == 4
    assert (survey.channels, survey.downsample) == (4, 8)
    plan = Plan(survey.counts, batch_size=6, seed=0, shards_per_block=1)
    assembler = BatchAssembler(index, buckets=survey.buckets, seed=0, stage=1, caption_dropout=0.1)
    with BatchReader(plan, assembler, steps=range(3), rank=0, num_ranks=1) as reader:
        for batch in reader:
            assert batch.text is None
            assert batch.labels is not None
            assert batch.labels.tolist() == [int(key[-3:]) % 5 for key in batch.keys]


def test_buckets_do_not_mix(run: Path) -> None:
    index = FeatureIndex(latent_directory(run, 64), text_directory(run), ["hq_0"])
    survey = index.survey()
    assert survey.buckets == ["48x80", "64x64", "80x48"]
    plan = Plan(survey.counts, batch_size=4, seed=0, shards_per_block=1)
    assembler = BatchAssembler(index, buckets=survey.buckets, seed=0, stage=3, caption_dropout=0.1)
    with BatchReader(plan, assembler, steps=range(20), rank=0, num_ranks=1) as reader:
        shapes = {(batch.bucket, tuple(batch.mean.shape)) for batch in reader}
    assert shapes == {("48x80", (4, 4, 6, 10)), ("64x64", (4, 4, 8, 8)), ("80x48", (4, 4, 10, 6))}


def test_a_tar_cut_short_is_named_by_the_iterator(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    tar = latent_directory(run, 32) / "laion_1.tar"
    with tar.open("r+b") as file:
        file.truncate(tar.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"shard laion_1: sample laion_1_\d+ ends at byte \d+, but its tar has \d+"):
        read_batches(run, steps=range(10))


def test_leaving_the_reader_early_stops_its_thread(run: Path) -> None:
    index = open_index(run)
    survey = index.survey()
    plan = Plan(survey.counts, batch_size=12, seed=5, shards_per_block=2)
    assembler = BatchAssembler(index, buckets=survey.buckets, seed=5, stage=2, caption_dropout=0.1)
    with BatchReader(plan, assembler, steps=range(1000), rank=0, num_ranks=1) as reader:
        next(iter(reader))
    assert not reader._thread.is_alive()


def test_a_sample_without_label_is_refused_in_stage_1(run: Path) -> None:
    with pytest.raises(ValueError, match="shard laion_0: sample laion_0_000 has no class label"):
        FeatureIndex(latent_directory(run, 32), None, ["laion_0"]).survey()
