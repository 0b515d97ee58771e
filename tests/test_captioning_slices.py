"""The second try of captions that loop: what is kept, what is said about it, and that nothing depends on cuts."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from captioning.config import CaptioningConfig
from captioning.loops import repeated_ngram_ratio
from captioning.worker import CaptionWorker, CaptionWorkerConfig
from pipelines.engine.pieces import Piece
from pipelines.raw.reading import AS_IT_COMES
from pipelines.raw.shards import shard_source
from tests.raw_shards import write_laion

TOY = Path(__file__).resolve().parent.parent / "toyworld" / "weights" / "llava"
# Pairs of words, so that a fair share of the toy captions counts as loops.
EAGER = {"ngram_words": 2, "max_repeated_ngram_ratio": 0.15, "repetition_penalty": 1.3}


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    return write_laion(tmp_path_factory.mktemp("raw") / "laion_00000.tar", 20)


def make_worker(**loop_retry: Any) -> CaptionWorker:
    table = {"model": str(TOY), "max_new_tokens": 60, "batch_size": 8, "loop_retry": loop_retry}
    captioning = CaptioningConfig.model_validate(table)
    return CaptionWorker(
        CaptionWorkerConfig(captioning=captioning, reading=AS_IT_COMES, max_pixels=1_000_000, num_threads=1)
    )


def run(worker: CaptionWorker, shard: Path, folder: Path, *, start: int = 0, stop: int = 20) -> Path:
    piece = Piece(source=shard_source(str(shard)), start=start, stop=stop, folder=folder, samples_per_slice=8)
    worker(piece)
    return piece.output(".parquet")


def test_loops_are_asked_again_once_and_everything_else_is_left_alone(shard, tmp_path) -> None:
    once = pq.read_table(run(make_worker(**{**EAGER, "repetition_penalty": 1.0}), shard, tmp_path / "once"))
    worker = make_worker(**EAGER)
    twice = pq.read_table(run(worker, shard, tmp_path / "twice"))
    num_retried = 0
    for before, after in zip(once.to_pylist(), twice.to_pylist(), strict=True):
        assert before["first_caption"] is None and "retried" not in before["flags"]
        if repeated_ngram_ratio(before["caption_raw"], 2) <= EAGER["max_repeated_ngram_ratio"]:
            assert after == before
            continue
        num_retried += 1
        assert after["first_caption"] == before["caption_raw"] and "retried" in after["flags"]
        assert after["caption_raw"] != before["caption_raw"]
    assert 3 < num_retried < 20
    # The same bytes again, and however the shard is cut.
    whole = run(worker, shard, tmp_path / "again")
    assert whole.read_bytes() == run(worker, shard, tmp_path / "third").read_bytes()
    spans = ((0, 8), (8, 16), (16, 20))
    parts = [run(worker, shard, tmp_path / "parts", start=start, stop=stop) for start, stop in spans]
    worker.join([{".parquet": part} for part in parts], {".parquet": tmp_path / "joined.parquet"})
    assert (tmp_path / "joined.parquet").read_bytes() == whole.read_bytes()


def test_the_second_try_is_decoding_and_not_a_threshold(shard, tmp_path) -> None:
    """Thresholds of `quality` decide no captions: rows differ in their flags only."""
    worker = make_worker(**EAGER)
    lenient = pq.read_table(run(worker, shard, tmp_path / "lenient")).drop_columns(["flags", "repeated_ngram_ratio"])
    strict = make_worker(**EAGER)
    quality = strict._settings.quality.model_copy(update={"ngram_words": 2, "max_repeated_ngram_ratio": 0.0})
    strict._settings = strict._slices._config = strict._settings.model_copy(update={"quality": quality})
    table = pq.read_table(run(strict, shard, tmp_path / "strict"))
    assert sum("loop" in row["flags"] for row in table.to_pylist()) > 10
    assert table.drop_columns(["flags", "repeated_ngram_ratio"]).equals(lenient)
