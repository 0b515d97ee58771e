"""A tar as a raw shard: its members by their place."""

from errors import StorageError
from pipelines.raw.kinds.tar_headers import read_tar
from pipelines.raw.reading import UnreadableShardError
from pipelines.raw.samples import Member, group_samples
from pipelines.raw.shard_headers import ShardHeaders, ShardSummary, has_text
from pipelines.store.files import RangeFile


def read_tar_headers(path: str, file: RangeFile) -> ShardHeaders:
    """Read and group the headers of the tar at `path`.

    Raises:
        UnreadableShardError: it is no tar; names it.
    """
    try:
        contents = read_tar(file)
    except UnreadableShardError as error:
        raise UnreadableShardError(f"{path} is not a readable tar: {error}") from None
    grouped = group_samples(contents.entries, num_bytes=file.size)
    summary = ShardSummary(
        kind="tar",
        stamp=file.stamp,
        image_column=None,
        identity=contents.identity,
        num_samples=len(grouped.samples),
        num_texts=sum(map(has_text, grouped.samples)),
        has_labels=any("cls" in sample.members for sample in grouped.samples),
        unusable=grouped.unusable,
        strays=grouped.strays,
        fault=contents.fault,
    )
    return ShardHeaders(summary=summary, samples=grouped.samples)


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
