"""The worker: cuts the captions of pieces of shards, one row per sample, rejected ones too; no image is read."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from captioning.config import QualityConfig
from captioning.cuts.cutting import AT_LIMIT, CUT, CutRule, CutText, cut_text
from captioning.quality import judge
from captioning.table import count_flags, join_files, write_rows
from encoders.tokens import load_tokenizer
from errors import UserError
from pipelines.as_typed import typed_command
from pipelines.columns.caption_columns import CAPTIONS_SEAM, CLAIMS_SEAM
from pipelines.columns.columns_folders import MAIN_CAPTION
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.store.files import atomic_file, sha256_file
from pipelines.store.tables import MEND_SHARD, read_table

Row = dict[str, Any]
# What a row has of the captions that it is cut of, as those have it.
TAKEN_OVER = ("key", "shard", "alt_text", "width", "height")
OF_CLAIMS = ("unsupported_sentences", "reject")


@dataclass(frozen=True, kw_only=True)
class CutWorkerConfig:
    """What a worker process needs to know.

    Attributes:
        rule: the bounds, without what counts tokens.
        column: of the captions that are cut, in their files.
        claims: the folder of the claims by which sentences are dropped; None drops none.
        tokenizer: a file; None counts no tokens.
    """

    rule: CutRule
    column: str
    quality: QualityConfig
    claims: Path | None = None
    tokenizer: Path | None = None


class CutWorker:
    """Cuts pieces of shards of captions; makes `<shard>.parquet`."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def __init__(self, config: CutWorkerConfig) -> None:
        self._config = config
        self._count = None if config.tokenizer is None else _counter(config.tokenizer)
        rule = config.rule
        self._rule = CutRule(
            max_sentences=rule.max_sentences,
            max_words=rule.max_words,
            max_tokens=rule.max_tokens,
            count_tokens=self._count,
        )

    def __call__(self, piece: Piece) -> PieceReport:
        """Cut the captions of a piece.

        Raises:
            UserError: captions or claims are not those of their manifests, or not of the same samples.
        """
        start_seconds = time.monotonic()
        config, path = self._config, Path(piece.source.path)
        _require_unchanged(path, piece.source.identity, seam=CAPTIONS_SEAM)
        names = dict.fromkeys((*TAKEN_OVER, config.column, "finish_reason", "reject"))
        sources = read_table(path, list(names), mend=MEND_SHARD).to_pylist()
        dropped = self._dropped(piece, [row["key"] for row in sources])
        rows: list[Row] = []
        counts: Counter[str] = Counter()
        for start, stop in piece.slices():
            for source, numbers in zip(sources[start:stop], dropped[start:stop], strict=True):
                rows.append(self._row(source, numbers, counts))
        with atomic_file(piece.output(".parquet")) as output:
            write_rows(rows, output, quality=config.quality, settings={})
        rejected = Counter(row["reject"] for row in rows if row["reject"] is not None)
        counts["num_tokens"] = sum(row.get("num_tokens") or 0 for row in rows)
        return PieceReport(
            num_read=len(rows),
            num_kept=len(rows) - rejected.total(),
            rejected=dict(rejected),
            details=dict(counts) | count_flags(rows),
            busy_seconds=time.monotonic() - start_seconds,
        )

    @staticmethod
    def join(parts: Sequence[Mapping[str, Path]], outputs: Mapping[str, Path]) -> None:
        """Concatenate the parts of a shard."""
        join_files([part[".parquet"] for part in parts], outputs[".parquet"])

    def _dropped(self, piece: Piece, keys: Sequence[str]) -> list[Sequence[int]]:
        """Return, of each caption, the numbers of the sentences that are left out."""
        if self._config.claims is None:
            return [()] * len(keys)
        path = self._config.claims / f"{piece.source.name}.parquet"
        _require_unchanged(path, piece.source.identity, seam=CLAIMS_SEAM)
        claims = read_table(path, ["key", *OF_CLAIMS], mend=MEND_SHARD).to_pylist()
        if [row["key"] for row in claims] != list(keys):
            raise UserError(f"{path} has other samples than {piece.source.path}: `{typed_command('claims')}` mends it")
        return [row["unsupported_sentences"] or () for row in claims]

    def _row(self, source: Row, dropped: Sequence[int], counts: Counter[str]) -> Row:
        row: Row = {**{name: source[name] for name in TAKEN_OVER}, "flags": [], "reject": None}
        if source["reject"] is not None:
            is_told = ":" in source["reject"]
            return {**row, "reject": source["reject"] if is_told else f"caption:{source['reject']}"}
        text = source[self._config.column] or ""
        # Another column is no text of the model, which has stopped for a reason of its own.
        reason = source["finish_reason"] if self._config.column == MAIN_CAPTION else None
        cut = cut_text(text, self._rule, dropped=dropped, is_unfinished=reason == AT_LIMIT)
        counts.update(_counted(text, cut))
        row |= {
            "caption_raw": cut.text,
            "first_caption": None,
            "num_tokens": None if self._count is None else self._count(cut.text),
            "finish_reason": CUT if cut.ends_early else reason,
        }
        return {**row, **judge(row, self._config.quality)}


def _counted(text: str, cut: CutText) -> dict[str, int]:
    return {
        "num_sentences": cut.num_before,
        "num_sentences_kept": cut.num_sentences,
        "num_captions_cut": int(cut.num_sentences < cut.num_before),
        "num_nothing_left": int(cut.num_sentences == 0 and cut.num_before > 0),
        "num_without_text": int(not text.strip()),
    }


def _counter(path: Path) -> Callable[[str], int]:
    """Return what counts the tokens of a text, without those that begin and end it."""
    tokenizer = load_tokenizer(path)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _require_unchanged(path: Path, identity: str, *, seam: str) -> None:
    """Check that a file is the one that the identity of the piece's source names."""
    expected = identity.rpartition(seam)[2].partition("+")[0]
    if (found := sha256_file(path)) != expected:
        raise UserError(
            f"{path} has SHA-256 {found}, but by its manifest {expected}: it has changed; remove it and type the "
            "command that makes it again"
        )
