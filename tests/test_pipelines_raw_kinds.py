"""Raw shards of every kind give the same samples, and each kind's own faults are counted or named."""

import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from raw_kinds import KINDS, Sample
from raw_shards import encode, photo

from pipelines.raw.patterns import expand_shards
from pipelines.raw.reading import Reading
from pipelines.raw.shards import describe_shards, open_shard

NUM_SAMPLES = 60


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    texts = ('ein Hund, "quer"', "富士山と桜", "plain text", "two words")
    return [
        Sample(
            f"{'in/deep/' if number % 3 else ''}{number:04d}", encode(photo(number), "PNG"), texts[number % 4], number
        )
        for number in sorted(range(NUM_SAMPLES), key=lambda number: f"{'in/deep/' if number % 3 else ''}{number:04d}")
    ]


def read(path: str, *, run=None, reading: Reading | None = None) -> list[tuple]:
    with open_shard(path, reading or Reading(), run=run) as raw:
        return [
            (
                sample.key,
                raw.image_bytes(sample),
                raw.alt_text(sample),
                raw.named_text(sample, "text"),
                raw.label(sample),
            )
            for sample in raw.samples
            if sample.reject is None
        ]


def key_in(kind: str, sample: Sample) -> str:
    # Hugging Face's `save_to_disk` keeps the names of files without their folders.
    return sample.key.rpartition("/")[2] if kind == "save_to_disk" else sample.key


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_samples_come_out_of_every_kind(tmp_path, samples, kind) -> None:
    (path,) = expand_shards(str(KINDS[kind](tmp_path, samples)))
    run = tmp_path / "run"
    (described,) = describe_shards([path], run=run)
    assert described.source.num_samples == described.num_texts == NUM_SAMPLES
    has_column = kind not in ("tar", "folder")  # of files `txt` is the name
    expected = [(key_in(kind, s), s.image, s.text, s.text if has_column else None, s.label)
                for s in samples]  # fmt: skip
    assert read(path, run=run) == expected
    # Threads that read ahead of each other, and backwards, get the same.
    order = random.Random(0).sample(range(NUM_SAMPLES), NUM_SAMPLES)
    with open_shard(path, run=run, identity=described.source.identity) as raw, ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda number: raw.image_bytes(raw.samples[number]), order))
        assert raw.has_labels
        assert images == [expected[number][1] for number in order]
        assert raw.image_bytes(raw.samples[0]).startswith(raw.image_start(raw.samples[0], 16)[:16])
    assert describe_shards([path]) == describe_shards([path], run=run) == [described]
    # A copy elsewhere is the same shard.
    place = tmp_path / "elsewhere" / tmp_path.name
    shutil.copytree(tmp_path, place, ignore=shutil.ignore_patterns("elsewhere", "run"))
    copy = describe_shards([path.replace(str(tmp_path), str(place))])[0].source
    assert copy.identity == described.source.identity
