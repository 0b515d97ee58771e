"""Which row of a table is of which sample: a row names an image by key or by path, a sample has a shard and a key.

Both are places, last part first: `photos/dogs/7.jpg` is `7/dogs/photos`. They are of one image where one of them
begins with the other, whole parts compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.raw.samples import IMAGE_EXTENSIONS, split_at_extension

KNOWN_EXTENSIONS = (*sorted(IMAGE_EXTENSIONS), "txt", "caption", "text")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a source of texts: its number, the place it names, and its text or what is wrong with it."""

    number: int
    place: str
    text: str | None
    fault: str | None


def place_of(name: str) -> str:
    """Return the place that a key, a path or a URL names, without the extension of an image or a text."""
    name = name.strip().replace("\\", "/")
    if "://" in name:
        name = name.partition("://")[2].partition("?")[0]
    stem, extension = split_at_extension(name)
    if extension.lower().rpartition(".")[2] in KNOWN_EXTENSIONS:
        name = stem
    return "/".join(reversed([part for part in name.split("/") if part not in ("", ".")]))


def sample_place(shard: str, key: str) -> str:
    """Return the place of a sample: its key's, and behind that its shard."""
    return "/".join(reversed([part for part in (shard, *key.split("/")) if part not in ("", ".")]))


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
