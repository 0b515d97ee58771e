"""Samples whose captions are given: headers of images are read, texts looked up, and no model is asked."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from captioning.config import CaptioningConfig
from captioning.engines.protocol import Caption
from captioning.given.addresses import MAIN_COLUMN
from captioning.given.index import NO_CAPTION, Found, TextIndex
from captioning.loading import LoadedSample, SampleLoader
from pipelines.raw.images import SampleReject, decode_image
from pipelines.raw.samples import RawSample
from pipelines.raw.shards import RawShard
from pipelines.raw.sizes import measure_image
from pipelines.raw.tables.places import sample_places

# In a row, but no column: what is wrong with the text that came with the image.
ALT_TEXT_FAULT = "alt_text_fault"


@dataclass(frozen=True, kw_only=True)
class GivenColumn:
    """A column of given texts: `own` names a text of the samples, or else they are found in the index."""

    name: str
    own: str | None
    index: Path | None


class GivenTexts:
    """The texts of all columns, for samples of any shard; open in one process."""

    def __init__(self, columns: Sequence[GivenColumn]) -> None:
        self.columns = columns
        self._indexes = {column.name: TextIndex(column.index) for column in columns if column.index is not None}

    def find(self, raw: RawShard, sample: RawSample) -> dict[str, Found]:
        """Return what each column has for a sample."""
        return {column.name: self._find(column, raw, sample) for column in self.columns}

    def _find(self, column: GivenColumn, raw: RawShard, sample: RawSample) -> Found:
        if column.name in self._indexes:
            return self._indexes[column.name].find(sample_places(raw.name, sample.key))
        try:
            text = raw.named_text(sample, column.own) if column.own else raw.text(sample)
        except SampleReject as reject:
            return Found(fault=reject.reason)
        text = (text or "").strip()
        return Found(text=text) if text else Found(fault=NO_CAPTION)


class GivenLoader(SampleLoader):
    """Loads samples with their texts; `look` alone needs an image decoded."""

    def __init__(
        self,
        raw: RawShard,
        config: CaptioningConfig,
        texts: GivenTexts,
        *,
        max_pixels: int,
        look: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        super().__init__(raw, config, max_pixels=max_pixels, look=look)
        self._texts = texts

    def _load_group(self, samples: Sequence[RawSample]) -> list[LoadedSample]:
        return [self._open(sample) for sample in samples]

    def _open(self, sample: RawSample) -> LoadedSample:
        row: dict[str, Any] = {"key": sample.key, "shard": self._raw.name, "flags": [], "reject": None}
        look = None
        try:
            if sample.reject is not None:
                raise SampleReject(sample.reject)
            try:
                row["alt_text"] = self._raw.text(sample)
            except SampleReject as reject:
                # It matters only where it is the caption, and is counted.
                row[ALT_TEXT_FAULT] = reject.reason
            if self._look is not None:
                image = decode_image(self._raw.image_bytes(sample), max_pixels=self._max_pixels)
                size, look = image.size, self._look(image)
            else:
                size = measure_image(self._raw, sample, max_pixels=self._max_pixels)
            self.require_limits(*size)
            row["width"], row["height"] = size
            found = self._texts.find(self._raw, sample)
            if not any(text.text for text in found.values()):
                raise SampleReject(found[MAIN_COLUMN].fault or NO_CAPTION)
        except SampleReject as reject:
            return LoadedSample(row={**row, "reject": reject.reason}, prepared=None, look=None)
        row |= {name: text.text for name, text in found.items() if name != MAIN_COLUMN}
        return LoadedSample(row=row, prepared=found[MAIN_COLUMN].text or "", look=look)


class GivenEngine:
    """The `Captioner` of captions that are there: it says what it is handed."""

    def caption(self, prepared: Iterable[str], *, repetition_penalty: float = 1.0) -> Sequence[Caption]:
        """Return the texts as captions."""
        return [Caption(text=text, num_tokens=None, finish_reason=None) for text in prepared]
