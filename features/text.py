"""The text family: captions of `captions/<shard>.parquet` to T5 embeddings in `features/text/<shard>.tar`."""

# k captions of a sample, L real tokens of a caption, D text width

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow.parquet as pq

from encoders.devices import choose_device
from encoders.opening import open_text_encoder
from features.quantization import StoredText, measure_error, restore_text, store_text
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.store.families import NULL_CAPTION_FILE, TEXT_SCHEMA
from pipelines.store.feature_store import FeatureTarWriter, join_shards, payload_crc32, write_index, write_tensors
from pipelines.store.files import atomic_file

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class TextWorkerConfig:
    """What a `TextWorker` needs; `directory` is where the null caption's record goes."""

    model: str
    revision: str | None
    dtype: str
    storage: str
    max_tokens: int
    batch_tokens: int | None
    device: str
    num_threads: int
    caption_weights: dict[str, float]
    directory: Path


@dataclass(frozen=True, kw_only=True)
class _Caption:
    """One of a sample's captions: its text, and its index row as far as it is known before encoding."""

    text: str
    row: dict[str, Any]


class TextWorker:
    """Encodes the captions of a shard; one tar member per sample kept, one index row per sample and caption column."""

    suffixes: ClassVar[tuple[str, ...]] = (".tar", ".parquet")
    join = staticmethod(join_shards)

    def __init__(self, config: TextWorkerConfig) -> None:
        import torch

        torch.set_num_threads(config.num_threads)
        self._config = config
        self._encoder = open_text_encoder(
            config.model,
            config.revision,
            max_tokens=config.max_tokens,
            device=choose_device(config.device, key="features.device"),
            dtype=config.dtype,
            batch_tokens=config.batch_tokens,
        )
        # Every worker writes the same bytes, each atomically, so it does not matter which one is last.
        (null_embedding,) = self._encoder.encode([""])
        null = store_text(null_embedding, "bfloat16")
        write_tensors(config.directory / NULL_CAPTION_FILE, {"embedding_0": null.values})

    def __call__(self, piece: Piece) -> PieceReport:
        """Write the tar and index of samples [piece.start, piece.stop)."""
        samples = _read_captions(piece, self._config.caption_weights)
        tally = _TextCounts(self._config.max_tokens)
        rows: list[dict[str, Any]] = []
        with atomic_file(piece.output(".tar")) as tar_path, FeatureTarWriter(tar_path) as tar:
            for start, stop in piece.slices():
                rows += self._encode_slice(samples[start - piece.start : stop - piece.start], tar, tally)
        with atomic_file(piece.output(".parquet")) as index_path:
            write_index(index_path, rows, TEXT_SCHEMA)
        return PieceReport(
            num_read=len(samples),
            num_kept=len(samples) - tally.rejected.total(),
            rejected=dict(tally.rejected),
            details=tally.details,
        )

    def _encode_slice(
        self, samples: Sequence[Sequence[_Caption]], tar: FeatureTarWriter, tally: "_TextCounts"
    ) -> list[dict[str, Any]]:
        texts = [caption.text for captions in samples for caption in captions if caption.row["reject"] is None]
        embeddings = iter(self._encoder.encode(texts))
        rows: list[dict[str, Any]] = []
        for captions in samples:
            stored: dict[int, StoredText] = {}
            for index, caption in enumerate(captions):
                if caption.row["reject"] is None:
                    embedding = next(embeddings)
                    if embedding.isfinite().all():
                        stored[index] = store_text(embedding, self._config.storage)
                        tally.count(embedding, stored[index], self._config.storage)
                    else:
                        caption.row["reject"] = "non_finite_text"
            if stored:
                _write_sample(captions, stored, tar)
            else:
                tally.rejected[captions[0].row["reject"]] += 1
            rows += [caption.row for caption in captions]
        return rows


class _TextCounts:
    """What a piece's report says beyond its rows."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self.rejected: Counter[str] = Counter()
        self.details: dict[str, Any] = {"num_captions": 0, "num_tokens": 0, "num_at_token_limit": 0}

    def count(self, embedding: "torch.Tensor", stored: StoredText, storage: str) -> None:
        """Add one stored caption."""
        found: dict[str, Any] = {
            "num_captions": 1,
            "num_tokens": len(embedding),
            "num_at_token_limit": int(len(embedding) == self._max_tokens),
        }
        if stored.scale is not None:
            found |= {"stored_bytes": stored.nbytes, "bfloat16_bytes": 2 * stored.values.size}
            found |= measure_error(embedding, restore_text(stored, storage))
        for name, value in found.items():
            before = self.details.get(name, 0)
            self.details[name] = max(before, value) if name.startswith("max_") else before + value


def _write_sample(captions: Sequence[_Caption], stored: Mapping[int, StoredText], tar: FeatureTarWriter) -> None:
    """Write one sample's member, and put into its captions' rows where each payload is."""
    # Scales last: values then start at multiples of a cache line for every D that is one itself.
    tensors: dict[str, np.ndarray] = {f"embedding_{index}": text.values for index, text in stored.items()}
    tensors |= {f"scale_{index}": text.scale for index, text in stored.items() if text.scale is not None}
    offsets = tar.add(captions[0].row["key"], tensors)
    for index, text in stored.items():
        payloads = [text.values] if text.scale is None else [text.values, text.scale]
        captions[index].row.update(
            offset=offsets[f"embedding_{index}"],
            scale_offset=offsets.get(f"scale_{index}"),
            nbytes=text.values.nbytes,
            crc32=payload_crc32(*payloads),
            num_tokens=len(text.values),
        )


def _read_captions(piece: Piece, weights: Mapping[str, float]) -> list[list[_Caption]]:
    """Return the captions of each sample, one per column of `weights`, those it lacks too."""
    columns = ["key", *weights, "reject"]
    table = pq.read_table(piece.source.path, columns=columns).slice(piece.start, piece.stop - piece.start)
    return [
        [_to_caption(row, index, shard=piece.source.name, weights=weights) for index in range(len(weights))]
        for row in table.to_pylist()
    ]


def _to_caption(row: Mapping[str, Any], index: int, *, shard: str, weights: Mapping[str, float]) -> _Caption:
    column, weight = list(weights.items())[index]
    text = row[column] or ""
    reject = None if row["reject"] is None else f"caption:{row['reject']}"
    if reject is None and not text.strip():
        reject = f"no_{column}"
    content = {"key": row["key"], "shard": shard, "caption_index": index, "weight": weight, "reject": reject}
    return _Caption(text=text, row=content)
