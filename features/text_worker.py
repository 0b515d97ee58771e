"""The worker of the text family: captions of a shard tokenised, encoded, and written as embeddings.

While a GPU encodes a slice, the one before is written.
"""

# k captions of a sample, L real tokens of a caption, D text width

import functools
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from features.captions import CaptionPlaces
from features.overflow import NON_FINITE_TEXT, NUM_NON_FINITE_CAPTIONS
from features.quantization import StoredText, measure_error, restore_text, store_text
from features.text_settings import TextSettings, write_null_caption
from features.unreadable import NUM_UNREAD_CAPTIONS, NUM_UNREAD_TOKENS, NUM_UNREADABLE, UNREADABLE
from features.writer import SliceWriter
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.engine.rejects import NOT_CHOSEN, is_wanted
from pipelines.store.families import text_schema
from pipelines.store.feature_store import FeatureTarWriter, join_shards, write_index
from pipelines.store.files import atomic_file

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class TextWorkerConfig:
    """What a `TextWorker` needs; `directory` is where the null caption's record goes."""

    text: TextSettings
    places: CaptionPlaces
    is_long_run: bool
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

        torch.set_num_threads(config.text.num_threads)
        self._config = config
        self._encoder = config.text.open_encoder(is_long_run=config.is_long_run)
        self._family = text_schema(
            config.text.storage, self._encoder.spec.width, rows_per_sample=len(config.caption_weights)
        )
        # Every worker writes the same bytes, each atomically, so it does not matter which one is last.
        (null,) = self._encoder.encode([""])
        write_null_caption(config.directory, null)

    def __call__(self, piece: Piece) -> PieceReport:
        """Write the tar and index of samples [piece.start, piece.stop)."""
        samples = _read_captions(piece, self._config)
        _leave_out(samples, piece)
        counts = TextCounts(self._config.text.max_tokens)
        rows: list[dict[str, Any]] = []
        ahead = replace(piece, on_slice=None)  # a slice that has begun is not done
        with atomic_file(piece.output(".tar")) as tar_path, FeatureTarWriter(tar_path) as tar, SliceWriter() as writer:
            slices = [samples[start - piece.start : stop - piece.start] for start, stop in ahead.slices()]
            encoded = self._encoder.embed_each(self._tokenize(of_slice, counts) for of_slice in slices)
            for _, of_slice, embeddings in zip(piece.slices(), slices, encoded, strict=True):
                writer.write(functools.partial(self._store_slice, of_slice, embeddings, tar, counts, rows=rows))
        with atomic_file(piece.output(".parquet")) as index_path:
            write_index(index_path, rows, self._family.columns)
        return PieceReport(
            num_read=len(samples),
            num_kept=len(samples) - counts.rejected.total(),
            rejected=dict(counts.rejected),
            details=counts.details,
        )

    def _tokenize(self, samples: Sequence[Sequence[_Caption]], counts: "TextCounts") -> list[list[int]]:
        """Return the tokens of the captions of a slice, and reject those of which nothing is left."""
        captions = [caption for sample in samples for caption in sample if caption.row["reject"] is None]
        found = self._encoder.tokenize([caption.text for caption in captions])
        kinds, kept = self._encoder.token_kinds, []
        for caption, tokens in zip(captions, found, strict=True):
            is_unreadable, num_unread = kinds.is_unreadable(tokens), kinds.num_unread(tokens)
            if is_unreadable:
                # It has no payload: the CRC-32 of the text says which text that is, whatever becomes of the captions.
                caption.row.update(reject=UNREADABLE, crc32=zlib.crc32(caption.text.encode()))
            else:
                kept.append(tokens)
            if is_unreadable or num_unread:
                counts.count_unread(num_unread, is_unreadable=is_unreadable)
        return kept

    def _store_slice(
        self,
        samples: Sequence[Sequence[_Caption]],
        embeddings: "Sequence[torch.Tensor]",
        tar: FeatureTarWriter,
        counts: "TextCounts",
        *,
        rows: list[dict[str, Any]],
    ) -> None:
        """Write the embeddings of samples; adds their index rows to `rows`."""
        of_texts = iter(embeddings)
        for captions in samples:
            stored: dict[int, StoredText] = {}
            for index, caption in enumerate(captions):
                if caption.row["reject"] is None:
                    embedding = next(of_texts)
                    if embedding.isfinite().all():
                        stored[index] = store_text(embedding, self._config.text.storage)
                        counts.count(embedding, stored[index], self._config.text.storage)
                    else:
                        caption.row["reject"] = NON_FINITE_TEXT
                        counts.count_non_finite()
            if stored:
                kept = [captions[index].row for index in stored]
                self._family.write(tar, kept, [text.parts for text in stored.values()])
            else:
                counts.rejected[captions[0].row["reject"]] += 1
            rows += [caption.row for caption in captions]


class TextCounts:
    """What a piece's report says beyond its rows."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self.rejected: Counter[str] = Counter()
        self.details: dict[str, Any] = {"num_captions": 0, "num_tokens": 0, "num_at_token_limit": 0}

    def count_non_finite(self) -> None:
        """Add one caption that is not stored; reports without any are as they were before there was this count."""
        self.details[NUM_NON_FINITE_CAPTIONS] = self.details.get(NUM_NON_FINITE_CAPTIONS, 0) + 1

    def count_unread(self, num_tokens: int, *, is_unreadable: bool) -> None:
        """Add one caption with tokens that stand for nothing, stored or not; reports without any have no such count."""
        found = {NUM_UNREAD_CAPTIONS: 1, NUM_UNREAD_TOKENS: num_tokens, NUM_UNREADABLE: int(is_unreadable)}
        for name, value in found.items():
            self.details[name] = self.details.get(name, 0) + value

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


def _read_captions(piece: Piece, config: TextWorkerConfig) -> list[list[_Caption]]:
    """Return the captions of each sample, one per column, those it lacks too."""
    rows = config.places.read(piece.source.name, piece.start, stop=piece.stop)
    return [
        [
            _to_caption(row, index, shard=piece.source.name, weights=config.caption_weights)
            for index in range(len(row) - 1)
        ]
        for row in rows
    ]


def _leave_out(samples: Sequence[Sequence[_Caption]], piece: Piece) -> None:
    """Reject the captions of samples that are not wanted."""
    for index, captions in enumerate(samples, piece.start):
        if not is_wanted(piece, index):
            for caption in captions:
                caption.row["reject"] = NOT_CHOSEN


def _to_caption(row: Mapping[str, Any], index: int, *, shard: str, weights: Mapping[str, float]) -> _Caption:
    column, weight = list(weights.items())[index]
    text, reject = row[column]
    text = text or ""
    if reject is not None and ":" not in reject:  # a cut of captions has told whose reject it is
        reject = f"caption:{reject}"
    if reject is None and not text.strip():
        reject = f"no_{column}"
    content = {"key": row["key"], "shard": shard, "caption_index": index, "weight": weight, "reject": reject}
    return _Caption(text=text, row=content)
