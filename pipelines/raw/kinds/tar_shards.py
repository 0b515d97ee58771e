"""A tar as a raw shard: its members by their place."""

from errors import StorageError, describe_unfetched
from pipelines.raw.kinds.tar_headers import read_tar
from pipelines.raw.reading import UnreadableShardError
from pipelines.raw.samples import Member, group_samples
from pipelines.raw.shard_headers import ShardHeaders, ShardSummary, count_rejects, count_unknown_texts, has_text
from pipelines.store.files import RangeFile

HEAD_BYTES = 512
UNPACK = "unpack it and name the folder"
UNCOMPRESS = "uncompress it: samples of a compressed tar cannot be read by their place"
# What people take for raw shards, by how it begins.
OTHER_FORMATS = (
    (b"PK\x03\x04", f"is a ZIP file (as .xlsx and .npz are): {UNPACK}"),
    (b"PK\x05\x06", "is a ZIP file without members"),
    (b"7z\xbc\xaf\x27\x1c", f"is a 7z archive: {UNPACK}"),
    (b"Rar!\x1a\x07", f"is a RAR archive: {UNPACK}"),
    (b"BZh", f"is compressed by bzip2; {UNCOMPRESS}"),
    (b"\xfd7zXZ\x00", f"is compressed by xz; {UNCOMPRESS}"),
    (b"\x28\xb5\x2f\xfd", f"is compressed by zstd; {UNCOMPRESS}"),
    (b"%PDF-", "is a PDF"),
    (b"SQLite format 3\x00", "is a database of SQLite: write its rows as Parquet or CSV"),
    (b"\x93NUMPY", "is an array of NumPy"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file: write its images as files or Parquet"),
)


def read_tar_headers(path: str, file: RangeFile) -> ShardHeaders:
    """Read and group the headers of the tar at `path`.

    Raises:
        UnreadableShardError: it is no tar; names it.
    """
    try:
        contents = read_tar(file)
    except UnreadableShardError as error:
        raise UnreadableShardError(f"{path} is not a readable tar: {_other_format(file) or error}") from None
    grouped = group_samples(contents.entries, num_bytes=file.size)
    summary = ShardSummary(
        kind="tar",
        stamp=file.stamp,
        image_column=None,
        identity=contents.identity,
        rejects=count_rejects(grouped.samples),
        num_samples=len(grouped.samples),
        num_texts=sum(map(has_text, grouped.samples)),
        has_labels=any("cls" in sample.members for sample in grouped.samples),
        unusable=grouped.unusable,
        unknown_texts=count_unknown_texts(grouped.samples),
        strays=grouped.strays,
        fault=contents.fault,
    )
    return ShardHeaders(summary=summary, samples=grouped.samples)


def _other_format(file: RangeFile) -> str | None:
    """What a file that is no tar is, if its first bytes say it."""
    head = file.read(0, min(HEAD_BYTES, file.size))
    found = next((f"it {words}" for magic, words in OTHER_FORMATS if head.startswith(magic)), None)
    if found is None and (words := describe_unfetched(head)):
        found = f"it {words}"
    if found is None and head.lstrip()[:1] in (b"{", b"["):
        found = "it begins as JSON does: a table is known by its name, .json or .jsonl"
    return found


class TarMembers:
    """The members of an open tar."""

    def __init__(self, path: str, file: RangeFile) -> None:
        self._path, self._file = path, file

    def read(self, member: Member, num_bytes: int | None = None) -> bytes:
        """Return a member's bytes, or its first `num_bytes`.

        Raises:
            StorageError: they cannot be had, or the tar has become shorter; names it.
        """
        size = member.size if num_bytes is None else min(num_bytes, member.size)
        data = self._file.read(member.offset, size)
        if len(data) != size:
            raise StorageError(
                f"{self._path}: ends at byte {member.offset + len(data):,}; it has changed while it was read"
            )
        return data
