"""A raw shard whose samples are files: the members of a tar or of a folder, one image and its texts per key."""

from collections.abc import Sequence
from typing import Protocol

from errors import StorageError
from pipelines.raw.patterns import shard_name
from pipelines.raw.reading import Reading
from pipelines.raw.samples import Member, RawSample
from pipelines.raw.shard_headers import ShardHeaders
from pipelines.raw.texts import (
    decode_caption,
    json_members,
    read_json_record,
    text_members,
    text_of_record,
)
from pipelines.store.files import RangeFile

MAX_LABEL = 2**31 - 1
MAX_LABEL_DIGITS = 100


class Members(Protocol):
    """What holds the members of a shard."""

    def read(self, member: Member, num_bytes: int | None = None) -> bytes:
        """Return a member's bytes, or its first `num_bytes`.

        Raises:
            StorageError: they cannot be had, or the shard has changed; names it.
        """
        ...


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


class FileShard:
    """A `RawShard` of files, read by place."""

    def __init__(self, path: str, members: Members, headers: ShardHeaders, *, reading: Reading) -> None:
        self.path = path
        self.name = shard_name(path)
        self.samples: Sequence[RawSample] = headers.samples
        self.identity = headers.summary.identity
        self.unusable: Sequence[str] = headers.summary.unusable
        self.strays: Sequence[str] = headers.summary.strays
        self.fault = headers.summary.fault
        self.has_labels = any("cls" in sample.members for sample in headers.samples)
        self._members, self._reading = members, reading

    def image_bytes(self, sample: RawSample) -> bytes:
        """See `RawShard`."""
        assert sample.image_extension is not None, f"{self.name}: {sample.key} has no image"
        return self._members.read(sample.members[sample.image_extension])

    def image_start(self, sample: RawSample, num_bytes: int) -> bytes:
        """See `RawShard`."""
        assert sample.image_extension is not None, f"{self.name}: {sample.key} has no image"
        return self._members.read(sample.members[sample.image_extension], num_bytes)

    def alt_text(self, sample: RawSample) -> str | None:
        """See `RawShard`: the text of a text file that has one, else of the JSON."""
        if self._reading.dialect == "sa1b":
            return None
        if self._reading.text_column is not None:
            return self.named_text(sample, self._reading.text_column)
        text = None
        for extension in text_members(list(sample.members), sample.image_extension):
            text = decode_caption(self._members.read(sample.members[extension]))
            if text:
                return text
        if self._reading.dialect not in ("generic", "imagenet"):
            for extension in json_members(sample.key, sample.members):
                found = text_of_record(read_json_record(self._members.read(sample.members[extension])))
                text = found if found is not None else text
        return text

    def named_text(self, sample: RawSample, name: str) -> str | None:
        """See `RawShard`: `name` is a text file's (`txt`, `caption` of `x.caption.txt`) or a field's of the JSON."""
        for extension in text_members(list(sample.members), sample.image_extension):
            if name in (extension, extension.partition(".")[0]):
                return decode_caption(self._members.read(sample.members[extension]))
        for extension in json_members(sample.key, sample.members):
            found = text_of_record(read_json_record(self._members.read(sample.members[extension])), name)
            if found is not None:
                return found
        return None

    def label(self, sample: RawSample) -> int | None:
        """See `RawShard`: of an ImageNet-style sample, its `.cls`."""
        if "cls" not in sample.members:
            return None
        text = self._members.read(sample.members["cls"]).decode("ascii", errors="replace").strip()
        # Python refuses to read a number of thousands of digits.
        if not text.isdecimal() or len(text) > MAX_LABEL_DIGITS:
            return None
        label = int(text)
        return label if label <= MAX_LABEL else None
