"""What a score is: columns of numbers about each sample, with what they are made from and what decides them.

A score is small and picklable: what is heavy, such as a model, it loads in the worker with its first batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

# Why a sample has no columns; null where it has.
REJECT = "reject"
# The longer side of what most scores look at.
SMALL_SIDE = 256


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a score: its type, its unit (`pixels`, `bits`, empty for a plain number), and a line of meaning."""

    name: str
    type: pa.DataType
    unit: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Reads:
    """Columns of another folder of the run, such as `columns/clip` or `captions`, that a score is made from.

    Attributes:
        keeps_rejected: a sample that the folder rejects has columns of the score all the same.
    """

    folder: str
    columns: tuple[str, ...]
    keeps_rejected: bool = False


@dataclass(kw_only=True)
class LoadedImage:
    """The image of one sample: `data` as they are stored, `image` in RGB as it is shown (see `decode_image`)."""

    key: str
    data: bytes
    image: Image.Image

    @cached_property
    def pixels(self) -> np.ndarray:
        """Its pixels, uint8 [height, width, 3]."""
        return np.asarray(self.image)

    @cached_property
    def small(self) -> np.ndarray:
        """Its pixels with a longer side of `SMALL_SIDE` at most, uint8 [height, width, 3]."""
        # Of no use to a plan or to help, and it takes its time to load.
        from curation.scores.scaling import fit

        return fit(self.pixels, SMALL_SIDE)


class Score:
    """What all scores have; subclass one of the three below.

    Attributes:
        name: of its folder, `columns/<name>`: small letters, digits and `_`; behind `@` the caption column it is about.
        version: raised when a change of code changes numbers; the score is then made anew, alone.
        needs: what it is made from.
        columns: what it gives, in order.
        reads: the folders of the run that it is made from, beside images.
    """

    name: str
    version: ClassVar[int]
    needs: ClassVar[Literal["image", "text", "table"]]
    columns: tuple[Column, ...]
    reads: tuple[Reads, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Return, as JSON values, what decides its numbers, beside its version and its inputs."""
        return {}

    def require(self) -> None:
        """Find out what is missing or does not fit before any work starts; may load what is small.

        Raises:
            UserError: a model, a file or a device.
        """

    @property
    def schema(self) -> pa.Schema:
        """The columns of its files."""
        return pa.schema(
            [("key", pa.string()), *((each.name, each.type) for each in self.columns), (REJECT, pa.string())]
        )

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        columns = {
            each.name: {"type": str(each.type), "unit": each.unit, "meaning": each.meaning} for each in self.columns
        }
        return {"name": self.name, "version": self.version, "needs": self.needs, "columns": columns}


class ImageScore(Score):
    """Measures images; all that are pending share one pass, in which each image is decoded once.

    Attributes:
        few_samples: up to so many take less time than Ray's workers take to start.
    """

    needs: ClassVar[Literal["image", "text", "table"]] = "image"
    few_samples: ClassVar[int] = 2_000

    def look(self, loaded: LoadedImage) -> Any:
        """Return the small part that is kept of an image; called in a thread that decodes, many at a time.

        Raises:
            SampleReject: this score has nothing to say of the image.
        """
        raise NotImplementedError

    def measure(self, looks: Sequence[Any]) -> Mapping[str, Any]:
        """Return each column (what `pa.array` takes, or an array) of some images, in order; at most a slice of them.

        It may give `reject`, too: a reason for each image, or None.
        """
        raise NotImplementedError


class TableScore(Score):
    """Made from columns that are there, shard by shard."""

    few_samples: ClassVar[int] = 200_000

    def measure(self, table: pa.Table) -> Mapping[str, Any]:
        """Return each column for the rows of a part of a shard, which has `key` and `<folder>.<column>` of its `reads`.

        Only rows that none of the folders rejects. It may give `reject`, too, as `ImageScore.measure` may.
        """
        raise NotImplementedError

    def details(self, made: pa.Table) -> dict[str, int]:
        """Return counts about rows that it has made, to be summed over a shard; of `max_<...>` the largest is kept."""
        del made
        return {}

    def say(self, details: Mapping[str, int]) -> str | None:
        """Return what its counts over all shards have to say to the user, as a sentence; None where that is nothing."""
        del details
        return None

    def source(self, shard: str) -> str:
        """Return what changes when an input beside `reads` does, such as the hash of a user's table."""
        del shard
        return ""


class RunScore(Score):
    """Made from columns of all shards together: a change of one shard makes it anew in all."""

    needs: ClassVar[Literal["image", "text", "table"]] = "table"

    def source(self) -> str:
        """Return what changes when an input beside `reads` does, such as the hash of a user's table."""
        return ""

    def measure_run(
        self, shards: Sequence[str], read: Callable[[str], pa.Table], scratch: Path
    ) -> Iterator[Mapping[str, Any]]:
        """Yield the columns of each shard, in the order of `shards`, for the rows of `read(shard)`.

        Args:
            shards: names, sorted.
            read: gives a shard's rows that none of `reads` rejects: `key` and `<folder>.<column>`; without `reads`
                those of all samples.
            scratch: a folder for files of its own, which is removed after it.
        """
        raise NotImplementedError
