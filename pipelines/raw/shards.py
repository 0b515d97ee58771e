"""Raw shards: samples in an order of their own, with image, texts and class, read by place from wherever they are."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from errors import UserError
from pipelines.engine.pieces import Source
from pipelines.raw.kinds.file_shard import FileShard
from pipelines.raw.kinds.folder_shards import classes_of, is_local_folder
from pipelines.raw.kinds.local_files import LocalFiles
from pipelines.raw.kinds.row_shards import open_rows
from pipelines.raw.kinds.table_shards import table_members
from pipelines.raw.kinds.tar_shards import TarMembers
from pipelines.raw.reading import AS_IT_COMES, Reading, UnreadableShardError
from pipelines.raw.samples import RawSample
from pipelines.raw.shard_headers import ShardHeaders, ShardSummary
from pipelines.raw.shard_names import shard_name
from pipelines.raw.shard_warnings import say_what_headers_tell
from pipelines.raw.summaries import read_summaries, recall_or_read_headers
from pipelines.raw.tables.row_texts import RowTexts
from pipelines.store.files import RangeFile, is_remote, open_ranges

FAULTS_NAMED = 5


class RawShard(Protocol):
    """An open raw shard: samples in order, read by place, from any thread.

    Attributes:
        name: see `shard_name`.
        identity: changes when a sample does.
        samples: one `RawSample` per key; those with `reject` set are faulty.
        unusable: names of links, devices and paths that leave the shard.
        strays: names of what belongs to no sample.
        fault: what is wrong with the shard as a whole, such as that it is cut off; None if nothing is.
        has_labels: whether some samples have a class, so that others lack theirs.
    """

    path: str
    name: str
    identity: str
    samples: Sequence[RawSample]
    unusable: Sequence[str]
    strays: Sequence[str]
    fault: str | None
    has_labels: bool

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns of its rows; none where samples are files alone."""
        ...

    def image_bytes(self, sample: RawSample) -> bytes:
        """Return the encoded image of a sample that is not rejected.

        Raises:
            SampleReject: it has none after all, as a table may name a file that is gone.
            StorageError: it cannot be had; names the shard.
        """
        ...

    def image_start(self, sample: RawSample, num_bytes: int) -> bytes:
        """Return the first bytes of the encoded image, all of it where that costs no more; raises as `image_bytes`."""
        ...

    def text(self, sample: RawSample) -> str | None:
        """Return the text that came with the image, or None.

        Raises:
            SampleReject: it is in an unknown encoding (`not_utf8`), or in JSON that is none (`corrupt_alt_text`).
        """
        ...

    def alt_text(self, sample: RawSample) -> str | None:
        """Return `text` if it can be read, else None: where a text is only shown, or no reason to lose the sample."""
        ...

    def named_text(self, sample: RawSample, name: str) -> str | None:
        """Return one of several texts that came with the image, by the name of its member, field or column, or None.

        Raises:
            SampleReject: as `text`.
        """
        ...

    def text_names(self, sample: RawSample) -> list[str]:
        """Return by which names `named_text` has texts of a sample, as far as names tell; of JSON it does not."""
        ...

    def label(self, sample: RawSample) -> int | None:
        """Return the class of a sample, or None where there is none that fits int32."""
        ...


@contextlib.contextmanager
def open_shard(
    path: str, reading: Reading = AS_IT_COMES, *, run: Path | None = None, identity: str | None = None
) -> Iterator[RawShard]:
    """Open a raw shard, local or remote.

    Args:
        reading: what counts as image and text of a sample.
        run: where what a command has found out before is kept; without it the shard is looked at anew.
        identity: of the shard that is expected.

    Raises:
        UserError: the file is no shard, cannot be read by place, or has changed; names the shard.
        StorageError: it cannot be read; names the shard.
    """
    if is_local_folder(path):
        yield _open_folder(path, _known_headers(path, None, reading, run=run, identity=identity), reading)
        return
    with open_ranges(path) as file:
        headers = _known_headers(path, file, reading, run=run, identity=identity)
        if headers.summary.kind == "rows":
            with open_rows(path, file, headers, reading) as shard:
                yield shard
        elif headers.summary.kind == "table":
            yield FileShard(path, table_members(path, headers), headers, reading=reading, texts=RowTexts([path]))
        else:
            yield FileShard(path, TarMembers(path, file), headers, reading=reading)
        if is_remote(path):
            # A local file that is replaced stays open as it was; of a remote one, later ranges would be another's.
            with open_ranges(path) as again:
                if again.stamp != file.stamp:
                    raise UserError(f"{path} has changed while it was read; run the command again")


def _known_headers(
    path: str, file: RangeFile | None, reading: Reading, *, run: Path | None, identity: str | None
) -> ShardHeaders:
    """Return what is known of a shard, or read it; raises `UserError` if it is not the one that is expected."""
    headers = recall_or_read_headers(path, file, reading, run=run, identity=identity)
    if identity not in (None, headers.summary.identity):
        raise UserError(f"{path} has changed since this command began; run it again")
    return headers


def _open_folder(path: str, headers: ShardHeaders, reading: Reading) -> RawShard:
    folder = path.removeprefix("file://")
    texts = RowTexts([f"{folder}/{table}" for table in headers.tables]) if headers.tables else None
    classes = classes_of(headers.samples) if reading.dialect == "imagenet" else None
    members = LocalFiles(folder, headers.files)
    return FileShard(path, members, headers, reading=reading, texts=texts, classes=classes)


@dataclass(frozen=True, kw_only=True)
class ShardDescription:
    """A shard as a source for `run_over_shards`; `num_texts` of its samples have a text, as far as headers tell."""

    source: Source
    num_texts: int


def describe_shards(
    paths: Sequence[str], reading: Reading = AS_IT_COMES, *, run: Path | None = None
) -> list[ShardDescription]:
    """Describe raw shards, in order, from their headers; with `run`, those are read once and remembered there.

    What is odd about them is logged, see `say_what_headers_tell`: what can be read is used.

    Raises:
        UserError: some files are no shards, or cannot be read by place; names them.
        StorageError: a shard cannot be read; names it.
    """
    summaries = read_summaries(paths, reading, run=run)
    if errors := [str(summary) for summary in summaries if isinstance(summary, UnreadableShardError)]:
        more = [f"and {len(errors) - FAULTS_NAMED} more"] if len(errors) > FAULTS_NAMED else []
        raise UserError("\n".join([*errors[:FAULTS_NAMED], *more]))
    found = [summary for summary in summaries if isinstance(summary, ShardSummary)]
    say_what_headers_tell(paths, found, reading)
    described = []
    for path, summary in zip(paths, found, strict=True):
        source = Source(name=shard_name(path), path=path, identity=summary.identity, num_samples=summary.num_samples)
        described.append(
            ShardDescription(source=source, num_texts=0 if reading.dialect == "sa1b" else summary.num_texts)
        )
    return described


def shard_source(path: str, reading: Reading = AS_IT_COMES) -> Source:
    """Describe one raw shard as a source for `run_over_shards`; reads its headers."""
    return describe_shards([path], reading)[0].source
