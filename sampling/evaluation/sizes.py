"""From which sizes the images of a set reach a network's size, and how many lose their edges: counted and said."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NUM_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class SetSizes:
    """Widths and heights in pixels of a set's usable images, before and after they are fitted to a network.

    Attributes:
        target: what the network sees, (width, height).
        counts: images of each size (width, height).
        resized_to: the shortest side in pixels or (width, height) that images get before edges are cut off; None where
            they keep their size.
        cropped: of which of them edges are cut off: "none", "oblong" ones (of another shape than the target) or "all".
    """

    target: tuple[int, int]
    counts: Mapping[tuple[int, int], int]
    resized_to: int | tuple[int, int] | None
    cropped: str

    @property
    def num_images(self) -> int:
        """Images in all."""
        return sum(self.counts.values())

    @property
    def num_resized(self) -> int:
        """Images that have not the size already that they are resized to."""
        return sum(count for size, count in self.counts.items() if self._is_resized(size))

    @property
    def num_cropped(self) -> int:
        """Images of which edges are cut off."""
        width, height = self.target
        is_cropped = {"none": lambda size: False, "all": lambda size: True}.get(
            self.cropped, lambda size: size[0] * height != size[1] * width
        )
        return sum(count for size, count in self.counts.items() if is_cropped(size))

    def _is_resized(self, size: tuple[int, int]) -> bool:
        if self.resized_to is None:
            return False
        return (min(size) if isinstance(self.resized_to, int) else size) != self.resized_to

    def as_json(self) -> dict[str, Any]:
        """Return the counts, and the most frequent sizes by name."""
        return {
            "to": _name(self.target),
            "num_images": self.num_images,
            "num_resized": self.num_resized,
            "num_cropped": self.num_cropped,
            "num_sizes": len(self.counts),
            "most_frequent": {_name(size): self.counts[size] for size in self._by_count()[:NUM_NAMED]},
        }

    def _by_count(self) -> list[tuple[int, int]]:
        return sorted(self.counts, key=lambda size: (-self.counts[size], size))


def describe_sizes(sizes: Mapping[str, Any] | None) -> str:
    """Return counts of `SetSizes.as_json` in words, such as "96 of 96 resized to 224x224 (from 64x64)"."""
    if sizes is None:
        return "sizes unknown: the features are of before they were written down"
    num_images, num_sizes = sizes["num_images"], sizes["num_sizes"]
    cropped = f", {sizes['num_cropped']:,} cropped" if sizes["num_cropped"] else ", none cropped"
    named = ", ".join(sizes["most_frequent"])
    more = f" and {num_sizes - len(sizes['most_frequent']):,} other sizes" if num_sizes > NUM_NAMED else ""
    return f"{sizes['num_resized']:,} of {num_images:,} resized to {sizes['to']}{cropped} (they are {named}{more})"


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
