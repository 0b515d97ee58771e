"""Which hashes of 64 bits are near others, without comparing all with all: those that agree in some of their bits.

The bits are dealt out into blocks. Two hashes that differ in at most `radius` bits agree in all but `radius` of the
blocks, so for each choice of that many blocks (a band) those that agree in its bits are compared, and no others. More
blocks make more bands, of more bits: fewer comparisons in more passes. How many are best is found out from the hashes,
whose bits are seldom even. A pair is told by the first band that would find it, once.

What a band needs at a time, a table of the hashes by its bits, is made for ranges of them that fit `max_rows`.
"""

# U hashes, P pairs

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from numba import njit

NUM_BITS = 64
MAX_EXTRA_BLOCKS = 4
MAX_INDEX_BITS = 24
NUM_PROBED = 1 << 14
MAX_ROWS = 1 << 25
MIN_PAIRS, ROWS_PER_PAIR = 1 << 16, 16
MAX_THREADS = 8
# About nanoseconds, beside each other: a row put into a table, a query, a comparison.
ROW_COST, QUERY_COST, COMPARISON_COST = 12.0, 40.0, 1.5

# Of a band: how keys are cut, its blocks, the first key, where the rows of each key begin, rows, and their numbers.
_Table = tuple[np.ndarray, np.ndarray, int, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Bands:
    """Which bits are compared.

    Attributes:
        radius: bits that two hashes may differ in.
        blocks: first bit and number of bits, of a dealt hash.
        chosen: blocks of each band.
    """

    radius: int
    blocks: tuple[tuple[int, int], ...]
    chosen: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(radius: int, num_blocks: int) -> "Bands":
        """Return the bands of so many blocks, at least `radius` + 1."""
        ends = [NUM_BITS * block // num_blocks for block in range(num_blocks + 1)]
        blocks = tuple((start, stop - start) for start, stop in pairwise(ends))
        return Bands(radius=radius, blocks=blocks, chosen=tuple(combinations(range(num_blocks), num_blocks - radius)))

    def block_masks(self) -> np.ndarray:
        """Return the bits of each block, uint64 [blocks]."""
        return np.array([((1 << count) - 1) << first for first, count in self.blocks], np.uint64)

    def num_key_bits(self, band: int) -> int:
        """Return how many bits those that a band compares agree in."""
        return sum(self.blocks[block][1] for block in self.chosen[band])

    def cuts(self, band: int, num_bits: int) -> np.ndarray:
        """Return how a band's first bits make a key: shift down, mask and shift up of each block, uint64 [B, 3]."""
        found, left = [], num_bits
        for block in self.chosen[band]:
            first, count = self.blocks[block]
            count = min(count, left)
            left -= count
            found.append((first, (1 << count) - 1, left))
        return np.array([cut for cut in found if cut[1]], np.uint64)


class NearHashes:
    """Hashes that others are looked for among.

    Args:
        hashes: uint64 [U], all different.
        radius: bits that two may differ in.
        queries_per_hash: how many will be asked of, about, for each that is there.
        num_threads: at most so many bands at a time.
        max_rows: hashes in the table of a band at a time.
    """

    def __init__(
        self,
        hashes: np.ndarray,
        radius: int,
        *,
        queries_per_hash: float = 1.0,
        num_threads: int = 1,
        max_rows: int = MAX_ROWS,
    ) -> None:
        self._hashes = dealt(hashes)
        self.bands = choose_bands(self._hashes, radius, queries_per_hash=queries_per_hash)
        self._num_threads = min(num_threads, MAX_THREADS)
        self._max_rows = max_rows

    def pairs(self) -> np.ndarray:
        """Return which two are near each other, the smaller number first: packed uint64 [P], sorted, see `pack`."""

        def within(table: _Table) -> list[np.ndarray]:
            masks, radius = self.bands.block_masks(), self.bands.radius
            pairs = np.empty(max(MIN_PAIRS, len(table[-1]) // ROWS_PER_PAIR), np.uint64)
            num = _compare_rows(table, masks, radius, pairs)
            if num > len(pairs):
                pairs = np.empty(num, np.uint64)
                _compare_rows(table, masks, radius, pairs)
            return [pairs[:num].copy()]

        return self._find(within)

    def near(self, queries: np.ndarray, *, each: int = 1, skipped: np.ndarray | None = None) -> np.ndarray:
        """Return which queries are near which hashes, packed uint64 [P], sorted, each pair once.

        Args:
            queries: dealt, uint64 [Q]; may be larger than the memory, as `np.memmap`.
            each: so many after one another have one number.
            skipped: for each of these numbers a hash that is not to be told, uint32 [Q / each].
        """
        if not len(queries):
            return np.empty(0, np.uint64)
        skipped = np.empty(0, np.uint32) if skipped is None else skipped

        def among(table: _Table) -> Iterator[np.ndarray]:
            capacity = max(MIN_PAIRS, int(np.diff(table[3]).max()))
            start = 0
            while start < len(queries):
                pairs = np.empty(capacity, np.uint64)
                asked = (queries, start, each, skipped)
                start, num = _compare(asked, table, self.bands.block_masks(), self.bands.radius, pairs)
                yield np.unique(pairs[:num])

        return self._find(among)

    def _find(self, compare: Callable[[_Table], Iterable[np.ndarray]]) -> np.ndarray:
        """Return the packed pairs that bands have, some of them at a time."""

        def find(band: int) -> np.ndarray:
            found = [pairs for table in self._tables(band) for pairs in compare(table)]
            return np.unique(np.concatenate([np.empty(0, np.uint64), *found]))

        with ThreadPoolExecutor(self._num_threads) as pool:
            return np.unique(np.concatenate(list(pool.map(find, range(len(self.bands.chosen))))))

    def _tables(self, band: int) -> Iterator[_Table]:
        """Yield the hashes by the bits of a band, ranges of keys that have at most `max_rows`."""
        bands = self.bands
        num_bits = min(bands.num_key_bits(band), MAX_INDEX_BITS, max(1, len(self._hashes).bit_length()))
        cuts, chosen = bands.cuts(band, num_bits), np.array(bands.chosen[band], np.int64)
        counts = np.zeros(1 << num_bits, np.int64)
        _count(self._hashes, cuts, counts)
        for low, high in _ranges(counts, self._max_rows):
            starts = np.concatenate(([0], np.cumsum(counts[low:high])))
            rows = np.empty(starts[-1], np.uint64)
            numbers = np.empty(starts[-1], np.uint32)
            _fill(self._hashes, cuts, low, starts.copy(), rows, numbers)
            yield cuts, chosen, low, starts, rows, numbers


def pack(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return pairs of numbers below 2^32 as one each, uint64 [P], which sort by the first."""
    return first.astype(np.uint64) << np.uint64(32) | second.astype(np.uint64)


def unpack(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both numbers of packed pairs, uint32 [P] each."""
    return (pairs >> np.uint64(32)).astype(np.uint32), pairs.astype(np.uint32)


def choose_bands(hashes: np.ndarray, radius: int, *, queries_per_hash: float = 1.0) -> Bands:
    """Return the bands by which near ones among hashes, dealt, are found with the least work."""
    most = radius + 1 + MAX_EXTRA_BLOCKS if radius else 1
    every = [Bands.of(radius, num_blocks) for num_blocks in range(radius + 1, most + 1)]
    num = len(hashes)
    return min(every, key=lambda bands: expected_work(bands, hashes, num, queries_per_hash=queries_per_hash))


def expected_work(bands: Bands, hashes: np.ndarray, num: int, *, queries_per_hash: float = 1.0) -> float:
    """Return about how many nanoseconds of one core it takes to look among `num` hashes such as these, dealt."""
    probed = hashes[:: max(1, len(hashes) // NUM_PROBED)]
    work = 0.0
    for band, chosen in enumerate(bands.chosen):
        mask = np.bitwise_or.reduce(bands.block_masks()[list(chosen)])
        _, counts = np.unique(probed & mask, return_counts=True)
        share = float((counts * (counts - 1)).sum()) / max(1, len(probed) * (len(probed) - 1))
        share = max(share, 2.0 ** -min(bands.num_key_bits(band), MAX_INDEX_BITS))
        work += num * (ROW_COST + queries_per_hash * (QUERY_COST + share * num * COMPARISON_COST))
    return work


def dealt(hashes: np.ndarray) -> np.ndarray:
    """Return hashes with their bits dealt out, so that neighbours, which often agree, are in different blocks."""
    out = np.empty(len(hashes), np.uint64)
    _deal(np.ascontiguousarray(hashes, np.uint64), _DEALT, out)
    return out


def _dealing_table() -> np.ndarray:
    """Where the bits of each byte go, uint64 [8, 256]: bit b to 27 b modulo 64."""
    table = np.zeros((8, 256), np.uint64)
    for byte in range(8):
        for value in range(256):
            bits = (8 * byte + bit for bit in range(8) if value >> bit & 1)
            table[byte, value] = sum(1 << (27 * bit % NUM_BITS) for bit in bits)
    return table


_DEALT = _dealing_table()


def _ranges(counts: np.ndarray, max_rows: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of keys with at most `max_rows` rows, or one key each; without those of no rows."""
    ends = np.cumsum(counts)
    low, before = 0, 0
    while low < len(counts) and before < ends[-1]:
        high = max(low + 1, int(np.searchsorted(ends, before + max_rows, side="right")))
        if ends[high - 1] > before:
            yield low, high
        low, before = high, int(ends[high - 1])


@njit(nogil=True, cache=True)
def _deal(hashes: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    for n in range(len(hashes)):
        dealt_bits = np.uint64(0)
        for byte in range(8):
            dealt_bits |= table[byte, (hashes[n] >> np.uint64(8 * byte)) & np.uint64(255)]
        out[n] = dealt_bits


@njit(nogil=True, cache=True, inline="always")
def _key(value: np.uint64, cuts: np.ndarray) -> np.int64:
    key = np.uint64(0)
    for cut in range(len(cuts)):
        key |= ((value >> cuts[cut, 0]) & cuts[cut, 1]) << cuts[cut, 2]
    return np.int64(key)


@njit(nogil=True, cache=True, inline="always")
def _num_ones(value: np.uint64) -> np.int64:
    value -= (value >> np.uint64(1)) & np.uint64(0x5555555555555555)
    value = (value & np.uint64(0x3333333333333333)) + ((value >> np.uint64(2)) & np.uint64(0x3333333333333333))
    value = (value + (value >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((value * np.uint64(0x0101010101010101)) >> np.uint64(56))


@njit(nogil=True, cache=True)
def _count(hashes: np.ndarray, cuts: np.ndarray, counts: np.ndarray) -> None:
    for n in range(len(hashes)):
        counts[_key(hashes[n], cuts)] += 1


@njit(nogil=True, cache=True)
def _fill(
    hashes: np.ndarray,
    cuts: np.ndarray,
    low: int,
    nexts: np.ndarray,
    rows: np.ndarray,
    numbers: np.ndarray,
) -> None:
    for n in range(len(hashes)):
        key = _key(hashes[n], cuts) - low
        if 0 <= key < len(nexts) - 1:
            place = nexts[key]
            nexts[key] += 1
            rows[place], numbers[place] = hashes[n], n


@njit(nogil=True, cache=True, inline="always")
def _is_first(differing: np.uint64, chosen: np.ndarray, masks: np.ndarray) -> bool:
    """Return whether a band is the first whose blocks all agree: by it a pair is told, and by no other."""
    place, block = 0, 0
    while place < len(chosen):
        if differing & masks[block] == 0:
            if chosen[place] != block:
                return False
            place += 1
        block += 1
    return True


@njit(nogil=True, cache=True)
def _compare_rows(table: tuple, masks: np.ndarray, radius: int, pairs: np.ndarray) -> int:
    """Fill `pairs`, while it has room, with rows that are near each other; return how many pairs there are."""
    _, chosen, _, starts, rows, numbers = table
    num = 0
    for key in range(len(starts) - 1):
        for row in range(starts[key], starts[key + 1]):
            for other in range(row + 1, starts[key + 1]):
                differing = rows[row] ^ rows[other]
                if _num_ones(differing) <= radius and _is_first(differing, chosen, masks):
                    if num < len(pairs):
                        # Rows of a key are in the order of their numbers.
                        pairs[num] = np.uint64(numbers[row]) << np.uint64(32) | np.uint64(numbers[other])
                    num += 1
    return num


@njit(nogil=True, cache=True)
def _compare(asked: tuple, table: tuple, masks: np.ndarray, radius: int, pairs: np.ndarray) -> tuple[int, int]:
    """Fill `pairs` with what queries from `start` on are near; return the first that is left, and how many pairs."""
    queries, start, each, skipped = asked
    cuts, chosen, low, starts, rows, numbers = table
    num = 0
    for n in range(start, len(queries)):
        key = _key(queries[n], cuts) - low
        if key < 0 or key >= len(starts) - 1:
            continue
        if num + starts[key + 1] - starts[key] > len(pairs):
            return n, num
        number = n // each
        for row in range(starts[key], starts[key + 1]):
            differing = queries[n] ^ rows[row]
            if _num_ones(differing) > radius:
                continue
            if len(skipped) > 0 and skipped[number] == numbers[row]:
                continue
            if _is_first(differing, chosen, masks):
                pairs[num] = np.uint64(number) << np.uint64(32) | np.uint64(numbers[row])
                num += 1
    return len(queries), num
