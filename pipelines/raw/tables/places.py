"""Which row of a table is of which sample: a row names an image by key or by path, a sample has a shard and a key.

Both are places, last part first: `photos/dogs/7.jpg` is `7/dogs/photos`. They are of one image where one of them
begins with the other, whole parts compared.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from pipelines.raw.caption_files import key_of_path
from pipelines.raw.tables.rows import local_name


class Placed(Protocol):
    """A row of a table, with the place that it names."""

    @property
    def place(self) -> str:
        """Of `place_of`."""
        ...


Row = TypeVar("Row", bound=Placed)


def place_of(name: str) -> str:
    """Return the place that a key, a path or a URL names, without the extension of an image or a text."""
    name = local_name(name.strip()).replace("\\", "/")
    if "://" in name:
        name = name.partition("://")[2].partition("?")[0]
    return _place(key_of_path(name))


def sample_places(shard: str, key: str) -> list[str]:
    """Return the places of a sample, the one that counts first: its key's, and behind that its shard.

    Of a key that is the name of a file, as of a row with `000.jpg`, the second is what a row calls by that name.
    """
    return list(dict.fromkeys(_place(f"{shard}/{name}") for name in (key, key_of_path(key))))


def _place(name: str) -> str:
    return "/".join(reversed([part for part in name.split("/") if part not in ("", ".")]))


def beginnings(place: str) -> list[str]:
    """Return a place and every shorter one it begins with: `7/dogs/photos`, `7/dogs`, `7`."""
    parts = place.split("/")
    return ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]


def choose_rows(rows: Sequence[Row], sample_place: str) -> list[Row]:
    """Return of the rows that may be a sample's those that agree best with its place; several where it is not clear."""

    def agreement(row: Row) -> tuple[int, bool]:
        pairs = zip(row.place.split("/"), sample_place.split("/"), strict=False)
        same = next((number for number, (one, other) in enumerate(pairs) if one != other), None)
        shorter = min(row.place.count("/"), sample_place.count("/")) + 1
        return (shorter if same is None else same), len(row.place) <= len(sample_place)

    if len(rows) < 2:
        return list(rows)
    best = max(map(agreement, rows))
    return [row for row in rows if agreement(row) == best]
