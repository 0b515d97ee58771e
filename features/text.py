"""The text family: captions of `captions/<shard>.parquet` to T5 embeddings in `features/text/<shard>.tar`."""

# L real tokens of a caption, D text width

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow.parquet as pq

from features.encoders import TextEncoder, select_device
from pipelines.feature_store import (
    NULL_CAPTION_FILE,
    TEXT_SCHEMA,
    FeatureTarWriter,
    join_shards,
    write_index,
    write_tensors,
)
from pipelines.pieces import Piece, PieceReport
from pipelines.storage import atomic_file

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class TextWorkerConfig:
    """What a `TextWorker` needs; `directory` is where the null caption's record goes."""

    model: str
    revision: str | None
    dtype: str
    max_tokens: int
    batch_size: int
    device: str
    num_threads: int
    caption_column: str
    directory: Path


@dataclass(frozen=True)
class _Caption:
    key: str
    text: str
    reject: str | None


class TextWorker:
    """Encodes the captions of a shard; one tar member per caption kept, one index row per sample."""

    suffixes: ClassVar[tuple[str, ...]] = (".tar", ".parquet")
    join = staticmethod(join_shards)

    def __init__(self, config: TextWorkerConfig) -> None:
        self._config = config
        self._encoder = TextEncoder.load(
            config.model,
            config.revision,
            max_tokens=config.max_tokens,
            device=select_device(config.device, num_threads=config.num_threads),
            dtype=config.dtype,
            batch_size=config.batch_size,
        )
        # Every worker writes the same bytes, each atomically, so it does not matter which one is last.
        (null_embedding,) = self._encoder.encode([""])
        write_tensors(config.directory / NULL_CAPTION_FILE, {"embedding_0": _bfloat16_bits(null_embedding)})

    def __call__(self, piece: Piece) -> PieceReport:
        """Write the tar and index of samples [piece.start, piece.stop)."""
        captions = _read_captions(piece, self._config.caption_column)
        rows: list[dict[str, Any]] = []
        with atomic_file(piece.output(".tar")) as tar_path, FeatureTarWriter(tar_path) as tar:
            for start, stop in piece.slices():
                rows += self._encode_slice(captions[start - piece.start : stop - piece.start], tar, piece.source.name)
        with atomic_file(piece.output(".parquet")) as index_path:
            write_index(index_path, rows, TEXT_SCHEMA)
        rejected = Counter(row["reject"] for row in rows if row["reject"] is not None)
        lengths = [row["num_tokens"] for row in rows if row["reject"] is None]
        return PieceReport(
            num_read=len(rows),
            num_kept=len(lengths),
            rejected=dict(rejected),
            details={
                "num_tokens": sum(lengths),
                "num_at_token_limit": sum(length == self._config.max_tokens for length in lengths),
            },
        )

    def _encode_slice(self, captions: Sequence[_Caption], tar: FeatureTarWriter, shard: str) -> list[dict[str, Any]]:
        good = [caption.text for caption in captions if caption.reject is None]
        embeddings = iter(self._encoder.encode(good))
        rows = []
        for caption in captions:
            row = {"key": caption.key, "shard": shard, "caption_index": 0, "reject": caption.reject}
            if caption.reject is None:
                row |= _store(caption.key, next(embeddings), tar)
            rows.append(row)
        return rows


def _store(key: str, embedding: "torch.Tensor", tar: FeatureTarWriter) -> dict[str, Any]:
    """Write one embedding [L, D]; returns the rest of its index row."""
    if not embedding.isfinite().all():
        return {"reject": "non_finite_text"}
    bits = _bfloat16_bits(embedding)
    offsets = tar.add(key, {"embedding_0": bits})
    return {"offset": offsets["embedding_0"], "nbytes": bits.nbytes, "num_tokens": len(bits), "weight": 1.0}


def _bfloat16_bits(embedding: "torch.Tensor") -> np.ndarray:
    import torch

    return embedding.to(torch.bfloat16).view(torch.uint16).numpy()


def _read_captions(piece: Piece, column: str) -> list[_Caption]:
    columns = ["key", column, "reject"]
    table = pq.read_table(piece.source.path, columns=columns).slice(piece.start, piece.stop - piece.start)
    return [_to_caption(row, column) for row in table.to_pylist()]


def _to_caption(row: Mapping[str, Any], column: str) -> _Caption:
    if row["reject"] is not None:
        return _Caption(row["key"], "", f"caption:{row['reject']}")
    text = row[column] or ""
    return _Caption(row["key"], text, None if text.strip() else f"no_{column}")
