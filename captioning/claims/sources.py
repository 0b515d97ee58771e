"""The captions that are asked about: where a column of them lies, which shards have it, and what each row says."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from errors import UserError
from pipelines.columns.caption_columns import CAPTIONS_SEAM, CaptionColumn, RunCaptions, mend_captions
from pipelines.columns.columns_folders import MAIN_CAPTION
from pipelines.engine.pieces import Source
from pipelines.raw.samples import RawSample
from pipelines.raw.shards import RawShard
from pipelines.store.files import sha256_file
from pipelines.store.tables import read_table


def score_of(column: CaptionColumn) -> str:
    """Return the folder of a column's claims below `columns/`: `claims` of the captions themselves."""
    return "claims" if column.name == MAIN_CAPTION else f"claims@{column.name}"


def claim_sources(captions: RunCaptions, raw: Sequence[Source], column: CaptionColumn) -> list[Source]:
    """Return the raw shards as sources whose identity changes with their captions, too.

    Raises:
        UserError: as `RunCaptions.require_shards` does.
    """
    captions.require_shards(column, raw)
    return [
        Source(
            name=source.name,
            path=source.path,
            identity=f"{source.identity}{CAPTIONS_SEAM}{column.sha256(source.name)}",
            num_samples=source.num_samples,
        )
        for source in raw
    ]


def split_identity(identity: str) -> tuple[str, str]:
    """Return the identity of the raw shard and the SHA-256 of its captions, of one of `claim_sources`."""
    raw, _, captions = identity.rpartition(CAPTIONS_SEAM)
    return raw, captions


@dataclass(frozen=True, kw_only=True)
class CaptionTexts:
    """A shard's captions: keys, texts and rejects, one each per sample, in raw order."""

    path: Path
    keys: list[str]
    texts: list[str | None]
    rejects: list[str | None]

    @property
    def columns(self) -> tuple[list[str], list[str | None], list[str | None]]:
        """All of it, for a hash."""
        return self.keys, self.texts, self.rejects

    def by_key(self, raw: RawShard) -> dict[str, tuple[str | None, str | None]]:
        """Return text and reject of each sample that is sound as it lies in the raw shard.

        Raises:
            UserError: the captions are of other samples.
        """
        if self.keys != [sample.key for sample in raw.samples]:
            raise UserError(f"{self.path} has other samples than {raw.name}; {mend_captions()}")
        rows = zip(raw.samples, self.texts, self.rejects, strict=True)
        return {sample.key: (text, reject) for sample, text, reject in rows if sample.reject is None}


def read_texts(path: Path, column: str, *, sha256: str) -> CaptionTexts:
    """Read a column of a captions file that has this hash.

    Raises:
        UserError: the file is not there or damaged, has changed, or lacks the column.
    """
    table = read_table(path, ["key", column, "reject"], mend=mend_captions())
    if (found := sha256_file(path)) != sha256:
        raise UserError(f"{path} has SHA-256 {found}, but by its manifest {sha256}: it has changed; {mend_captions()}")
    keys, texts, rejects = (table.column(name).to_pylist() for name in ("key", column, "reject"))
    return CaptionTexts(path=path, keys=keys, texts=texts, rejects=rejects)


def text_of(sample: RawSample, texts: dict[str, tuple[str | None, str | None]]) -> tuple[str | None, str | None]:
    """Return text and reject of a sample."""
    return texts[sample.key] if sample.reject is None else (None, sample.reject)
