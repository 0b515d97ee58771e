"""Slices are written in a thread, in order, while the next is encoded; its errors are the worker's."""

import threading
from pathlib import Path

import pytest
from feature_run import extract, write_run

from encoders.kl import KLCodec
from encoders.text import HiddenStatesEncoder
from features.latent_worker import LatentWorker
from features.text_worker import TextWorker
from features.writer import SliceWriter

PATIENCE_SECONDS = 60.0


def test_functions_run_in_order_and_all_of_them_before_the_writer_is_left():
    done, may_end = [], threading.Event()
    with SliceWriter() as writer:
        writer.write(lambda: (may_end.wait(PATIENCE_SECONDS), done.append(0))[1])
        assert done == []
        may_end.set()
        for number in range(1, 5):
            writer.write(lambda number=number: done.append(number))
    assert done == [0, 1, 2, 3, 4]


def fail() -> None:
    raise OSError("no space")


def test_what_a_function_raises_comes_with_the_next_or_at_the_end():
    done = []
    with pytest.raises(OSError, match="no space"), SliceWriter() as writer:
        writer.write(fail)
        writer.write(lambda: done.append(1))
    with pytest.raises(OSError, match="no space"), SliceWriter() as writer:
        writer.write(fail)
    assert done == []


def test_an_error_of_the_worker_is_not_hidden_by_one_of_the_writer_and_waits_for_it():
    done, has_failed = [], threading.Event()

    def write() -> None:
        has_failed.wait(PATIENCE_SECONDS)
        done.append(1)
        fail()

    with pytest.raises(ValueError, match="first"), SliceWriter() as writer:
        writer.write(write)
        has_failed.set()
        raise ValueError("first")
    assert done == [1]


@pytest.mark.parametrize(
    ("worker_class", "starter"),
    [(TextWorker, (HiddenStatesEncoder, "_start")), (LatentWorker, (KLCodec, "start"))],
    ids=["text", "latents"],
)
def test_the_next_slice_is_encoded_while_one_is_written(tmp_path: Path, monkeypatch, worker_class, starter):
    run = write_run(tmp_path, num_shards=1, samples_per_shard=20)
    start, store = getattr(*starter), worker_class._store_slice
    is_writing, has_moved_on = threading.Event(), threading.Event()

    def start_and_tell(self, *arguments):
        if is_writing.is_set():
            has_moved_on.set()
        return start(self, *arguments)

    def store_late(self, *arguments, **options):
        is_writing.set()
        assert has_moved_on.wait(PATIENCE_SECONDS), "nothing is encoded while this is written"
        store(self, *arguments, **options)

    monkeypatch.setattr(*starter, start_and_tell)
    monkeypatch.setattr(worker_class, "_store_slice", store_late)
    extract(run)
