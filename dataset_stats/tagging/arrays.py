"""An array that grows at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class GrowingArray:
    """A numpy array with amortised appends; `values` is a view of what has been written.

    Args:
        dtype: element type.
        num_columns: None for a vector, else the width of the table.
    """

    def __init__(self, dtype: Any, *, num_columns: int | None = None) -> None:
        self._columns = () if num_columns is None else (num_columns,)
        self._buffer = np.zeros((64, *self._columns), dtype=dtype)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def values(self) -> np.ndarray:
        """What has been written, as a view that is valid until the next `extend`."""
        return self._buffer[: self._size]

    def clear(self) -> None:
        """Forget everything written."""
        self._size = 0

    def extend(self, rows: Sequence[Any] | np.ndarray) -> None:
        """Append `rows` at the end."""
        if len(rows) == 0:
            return
        size = self._size + len(rows)
        self.reserve(len(rows))[self._size : size] = rows
        self._size = size

    def reserve(self, num_rows: int) -> np.ndarray:
        """Buffer with room for `num_rows` behind what has been written; call `accept` for rows written there."""
        size = self._size + num_rows
        if size > len(self._buffer):
            larger = np.zeros((max(size, 2 * len(self._buffer)), *self._columns), dtype=self._buffer.dtype)
            larger[: self._size] = self.values
            self._buffer = larger
        return self._buffer

    def accept(self, num_rows: int) -> None:
        """Count `num_rows` rows that were written into the reserved buffer."""
        self._size += num_rows
