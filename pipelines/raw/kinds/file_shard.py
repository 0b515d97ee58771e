"""A raw shard whose samples are files: members of a tar or folder, or named by a table; an image a key, and texts."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from pipelines.raw.images import SampleReject
from pipelines.raw.reading import Reading
from pipelines.raw.samples import Member, RawSample
from pipelines.raw.shard_headers import ShardHeaders
from pipelines.raw.shard_names import shard_name
from pipelines.raw.tables.row_texts import RowTexts, label_of
from pipelines.raw.texts import (
    TEXT_EXTENSIONS,
    decode_caption,
    json_members,
    read_json_record,
    text_members,
    text_of_record,
)


class Members(Protocol):
    """What holds the members of a shard."""

    def read(self, member: Member, num_bytes: int | None = None) -> bytes:
        """Return a member's bytes, or its first `num_bytes`.

        Raises:
            StorageError: they cannot be had, or the shard has changed; names it.
        """
        ...


class FileShard:
    """A `RawShard` of files, read by place."""

    def __init__(
        self,
        path: str,
        members: Members,
        headers: ShardHeaders,
        *,
        reading: Reading,
        texts: RowTexts | None = None,
        classes: Mapping[str, int] | None = None,
    ) -> None:
        """Serve the samples that `headers` tell of.

        Args:
            texts: of the rows that samples have.
            classes: by the folder that a key begins with.
        """
        summary = headers.summary
        self.path = path
        self.name = shard_name(path)
        self.samples: Sequence[RawSample] = headers.samples
        self.identity = summary.identity
        self.unusable: Sequence[str] = summary.unusable
        self.strays: Sequence[str] = summary.strays
        self.fault = summary.fault
        self.has_labels = summary.has_labels or bool(classes)
        self._members, self._reading, self._texts, self._classes = members, reading, texts, classes or {}

    @property
    def columns(self) -> Sequence[str]:
        """See `RawShard`."""
        return self._texts.columns if self._texts is not None else ()

    def image_bytes(self, sample: RawSample) -> bytes:
        """See `RawShard`."""
        assert sample.image_extension is not None, f"{self.name}: {sample.key} has no image"
        return self._members.read(sample.members[sample.image_extension])

    def image_start(self, sample: RawSample, num_bytes: int) -> bytes:
        """See `RawShard`."""
        assert sample.image_extension is not None, f"{self.name}: {sample.key} has no image"
        return self._members.read(sample.members[sample.image_extension], num_bytes)

    def text(self, sample: RawSample) -> str | None:
        """See `RawShard`: the text of a text file that has one, else of the sample's row, else of the JSON."""
        if self._reading.dialect == "sa1b":
            return None
        if self._reading.text_column is not None:
            return self.named_text(sample, self._reading.text_column)
        text = None
        for extension in text_members(list(sample.members), sample.image_extension):
            text = decode_caption(self._members.read(sample.members[extension]))
            if text:
                return text
        if self._texts is not None and sample.row is not None:
            found = self._texts.text(sample.row)
            text = text if found is None else found
        if not text and self._reading.dialect not in ("generic", "imagenet"):
            for extension in json_members(sample.key, sample.members):
                found = text_of_record(read_json_record(self._members.read(sample.members[extension])))
                text = text if found is None else found
                if text:
                    return text
        return text

    def alt_text(self, sample: RawSample) -> str | None:
        """See `RawShard`."""
        try:
            return self.text(sample)
        except SampleReject:
            return None

    def named_text(self, sample: RawSample, name: str) -> str | None:
        """See `RawShard`: `name` is a text file's (`txt`, or `caption` of `x.caption.txt`), a column's or a field's."""
        texts = text_members(list(sample.members), sample.image_extension)
        for extension in (*texts, *(f"{name}.{extension}" for extension in TEXT_EXTENSIONS)):
            if name in (extension, extension.partition(".")[0]) and extension in sample.members:
                return decode_caption(self._members.read(sample.members[extension]))
        if self._texts is not None and sample.row is not None:
            found = self._texts.named_text(sample.row, name)
            if found is not None:
                return found
        for extension in json_members(sample.key, sample.members):
            found = text_of_record(read_json_record(self._members.read(sample.members[extension])), name)
            if found is not None:
                return found
        return None

    def text_names(self, sample: RawSample) -> list[str]:
        """See `RawShard`."""
        names = text_members(list(sample.members), sample.image_extension)
        return [*names, *(self._texts.text_columns if self._texts is not None and sample.row is not None else [])]

    def label(self, sample: RawSample) -> int | None:
        """See `RawShard`: of an ImageNet-style sample its `.cls`, else that of its row, else its folder's number."""
        if "cls" in sample.members:
            return label_of(self._members.read(sample.members["cls"]).decode("ascii", errors="replace"))
        if self._texts is not None and sample.row is not None:
            return self._texts.label(sample.row)
        return self._classes.get(sample.key.partition("/")[0])
