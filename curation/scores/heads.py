"""Scores that small heads over CLIP's embeddings give: aesthetic, watermark, NSFW, or what a user has trained."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

from curation.scores.clip import CLIP_KEY, EMBEDDING, EMBEDDINGS_FOLDER, ClipChoice, unit_embeddings
from curation.scores.protocol import Column, Reads, TableScore
from encoders.clip_heads import ClipHead, find_head, load_head
from errors import UserError
from pipelines.store.files import sha256_file


class Head(TableScore):
    """One number for each image, of a head in one of the published layouts; no image is read for it again."""

    version: ClassVar[int] = 1
    needs: ClassVar[Literal["image", "text", "table"]] = "table"
    reads = (Reads(folder=EMBEDDINGS_FOLDER, columns=(EMBEDDING,)),)

    def __init__(self, name: str, *, file: str, clip: ClipChoice) -> None:
        self.name = name
        self._file = file
        self._clip = clip
        meaning = f"What the head {Path(file).name} makes of CLIP's embedding"
        self.columns = (Column(name=name, type=pa.float32(), unit="", meaning=meaning),)

    @property
    def _key(self) -> str:
        return f"columns.heads.{self.name}.file"

    @cached_property
    def _head(self) -> ClipHead:
        return load_head(find_head(self._file, key=self._key), key=self._key)

    def settings(self) -> dict[str, Any]:
        """Return the hash of its weights."""
        return {"head": f"sha256:{sha256_file(find_head(self._file, key=self._key))}"}

    def require(self) -> None:
        """Find out that it is no head, or one for embeddings of another width, before any work starts."""
        width = self._clip.width()
        if self._head.width != width:
            raise UserError(
                f"{self._key} = {self._file!r} reads embeddings of width {self._head.width}, but those of {CLIP_KEY} = "
                f"{self._clip.model!r} are {width} wide: it was made for another CLIP"
            )

    def measure(self, table: pa.Table) -> Mapping[str, Any]:
        """Return the numbers."""
        return {self.name: self._head.scores(unit_embeddings(table[f"clip.{EMBEDDING}"]))}
