"""Hashes of texts that are the same in every process and on every machine, unlike Python's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pandas.util import hash_array


def hash_strings(texts: Sequence[str] | np.ndarray) -> np.ndarray:
    """SipHash of each text, by pandas; uint64 [num_texts]."""
    return hash_array(np.asarray(texts, dtype=object), categorize=False)  # pyright: ignore[reportCallIssue]
