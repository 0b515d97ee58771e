"""Whether two thumbnails show one picture: what differs between them is little beside what is to be seen in either.

A hash only proposes. Of two pictures of one arrangement the differing colours or shapes are most of what is to be seen;
of a picture stored anew, or smaller, next to nothing differs. Where one may be cropped, the window of the other that it
shows is looked for first, a side at a time.

Who joins whom is in this file, too: what numba keeps of a function does not change when another file does.
"""

# S side of a plane, W steps that a side may be cropped by, K taps of an interpolation

import numpy as np
from numba import njit

from curation.hashing import CHROMA_SIDE, LUMA_SIDE, PLANES

GROUPING_VERSION = 2  # raise it when other samples are grouped here

# Share of the variance of luma and chroma together that may be left unexplained. Of toy pictures and pictures like
# photographs, cropped by up to 5% a side: 0.05 in 99 of 100; two toy pictures of 2,500 come as near.
MAX_UNEXPLAINED = 0.07
# Variance of a cell of a picture that counts as plain: two of those may differ by one level, as roundings do.
PLAIN = 1 / MAX_UNEXPLAINED
# Means of 2 x 2 cells, of 255: a small part of other colour tells pictures apart that are alike otherwise.
MAX_DIFFERENCE = 32.0

CROP_STEP = 0.00625  # of a side
MAX_CROP_STEPS = 10
FIRST_STRIDE = 4
NUM_TAPS = 4

KEPT, EXACT, PERCEPTUAL, MIRRORED, EMBEDDING = range(5)  # how a sample is like the one that stands for it
NONE = np.uint32(0xFFFFFFFF)
LOWER = np.uint64(0xFFFFFFFF)


def _taps(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the cells of a cropped axis lie in the whole one, by steps cut off before and after.

    Returns: first taps, int64 [W, W, S], and weights, float32 [W, W, S, K]: Catmull-Rom between the middles of cells.
    """
    steps = np.arange(MAX_CROP_STEPS + 1) * CROP_STEP
    before, after = steps[:, None, None], steps[None, :, None]
    places = (before + (np.arange(side) + 0.5) / side * (1 - before - after)) * side - 0.5
    first = np.floor(places)
    t = places - first
    weights = (
        -0.5 * t**3 + t**2 - 0.5 * t,
        1.5 * t**3 - 2.5 * t**2 + 1,
        -1.5 * t**3 + 2 * t**2 + 0.5 * t,
        0.5 * t**3 - 0.5 * t**2,
    )
    return first.astype(np.int64) - 1, np.stack(weights, axis=-1).astype(np.float32)


_LUMA_FIRST, _LUMA_WEIGHTS = _taps(LUMA_SIDE)
_CHROMA_FIRST, _CHROMA_WEIGHTS = _taps(CHROMA_SIDE)
_CHROMA_AREA = (LUMA_SIDE // CHROMA_SIDE) ** 2
_NUM_WEIGHTS = 3 * LUMA_SIDE**2


@njit(nogil=True, cache=True)
def _is_same_picture(first: np.ndarray, second: np.ndarray, crops: bool) -> bool:
    """Return whether two thumbnails, uint8 [864], show one picture; with `crops` either may be cropped a little."""
    window = np.zeros(4, np.int64)
    if _is_near(first, second, window):
        return True
    # A crop of what is plain looks as it does. Of blank images there may be very many, and windows take their time.
    if not crops or _is_plain(first) or _is_plain(second):
        return False
    return _shows(first, second, window) or _shows(second, first, window)


@njit(nogil=True, cache=True)
def _is_plain(thumbnail: np.ndarray) -> bool:
    total = _variation(_plane(thumbnail, 0))
    for index in range(1, 3):
        total += _CHROMA_AREA * _variation(_plane(thumbnail, index))
    return total <= PLAIN * _NUM_WEIGHTS


@njit(nogil=True, cache=True)
def _shows(whole: np.ndarray, part: np.ndarray, window: np.ndarray) -> bool:
    """Return whether `part` is a window of `whole`, left in `window`: steps cut off top, bottom, left and right."""
    _fit(_plane(whole, 0), _plane(part, 0), window)
    return _is_near(whole, part, window)


@njit(nogil=True, cache=True)
def _plane(thumbnail: np.ndarray, index: int) -> np.ndarray:
    offset, side = PLANES[index]
    return thumbnail[offset : offset + side * side].copy().reshape(side, side).astype(np.float32)


@njit(nogil=True, cache=True)
def _cut(plane: np.ndarray, window: np.ndarray, first: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return a window of a plane, resampled to its size, float32 [S, S]."""
    side = len(plane)
    across = np.empty((side, side), np.float32)
    out = np.empty((side, side), np.float32)
    starts, parts = first[window[2], window[3]], weights[window[2], window[3]]
    for x in range(side):
        for y in range(side):
            total = np.float32(0)
            for k in range(NUM_TAPS):
                total += parts[x, k] * plane[y, min(max(starts[x] + k, 0), side - 1)]
            across[y, x] = total
    starts, parts = first[window[0], window[1]], weights[window[0], window[1]]
    for y in range(side):
        out[y] = 0
        for k in range(NUM_TAPS):
            row, part = min(max(starts[y] + k, 0), side - 1), parts[y, k]
            for x in range(side):
                out[y, x] += part * across[row, x]
    return out


@njit(nogil=True, cache=True)
def _squares(first: np.ndarray, second: np.ndarray) -> np.float32:
    total = np.float32(0)
    for y in range(first.shape[0]):
        for x in range(first.shape[1]):
            difference = first[y, x] - second[y, x]
            total += difference * difference
    return total


@njit(nogil=True, cache=True)
def _variation(plane: np.ndarray) -> float:
    total, squares = 0.0, 0.0
    for y in range(plane.shape[0]):
        for x in range(plane.shape[1]):
            value = np.float64(plane[y, x])
            total += value
            squares += value * value
    return squares - total * total / plane.size


@njit(nogil=True, cache=True)
def _fit(whole: np.ndarray, part: np.ndarray, window: np.ndarray) -> None:
    """Find the window of `whole` that is most like `part`, by sides in turn, in ever smaller steps."""
    window[:] = 0
    best = _squares(whole, part)
    window[:] = FIRST_STRIDE
    found = _squares(_cut(whole, window, _LUMA_FIRST, _LUMA_WEIGHTS), part)
    if found < best:
        best = found
    else:
        window[:] = 0
    stride = FIRST_STRIDE
    while stride > 0:
        is_better = True
        while is_better:
            is_better = False
            for side in range(4):
                for sign in (-1, 1):
                    before = window[side]
                    if 0 <= before + sign * stride <= MAX_CROP_STEPS:
                        window[side] = before + sign * stride
                        found = _squares(_cut(whole, window, _LUMA_FIRST, _LUMA_WEIGHTS), part)
                        if found < best:
                            best, is_better = found, True
                        else:
                            window[side] = before
        stride //= 2


@njit(nogil=True, cache=True)
def _is_near(whole: np.ndarray, part: np.ndarray, window: np.ndarray) -> bool:
    is_whole = window[0] + window[1] + window[2] + window[3] == 0
    unexplained, of_whole, of_part = 0.0, 0.0, 0.0
    for index in range(3):
        of_first, second = _plane(whole, index), _plane(part, index)
        if is_whole:
            first = of_first
        elif index == 0:
            first = _cut(of_first, window, _LUMA_FIRST, _LUMA_WEIGHTS)
        else:
            first = _cut(of_first, window, _CHROMA_FIRST, _CHROMA_WEIGHTS)
        if _most_different(first, second) > MAX_DIFFERENCE:
            return False
        area = 1 if index == 0 else _CHROMA_AREA
        unexplained += area * _squares(first, second)
        of_whole += area * _variation(first)
        of_part += area * _variation(second)
    return bool(unexplained <= MAX_UNEXPLAINED * (min(of_whole, of_part) + PLAIN * _NUM_WEIGHTS))


@njit(nogil=True, cache=True)
def _most_different(first: np.ndarray, second: np.ndarray) -> np.float32:
    most = np.float32(0)
    for y in range(first.shape[0] - 1):
        for x in range(first.shape[1] - 1):
            total = np.float32(0)
            for down in range(2):
                for right in range(2):
                    total += first[y + down, x + right] - second[y + down, x + right]
            most = max(most, abs(total) / 4)
    return most


@njit(nogil=True, cache=True)
def _first_of(pairs: np.ndarray, number: np.int64) -> int:
    """Return where the pairs of a number begin."""
    low, high = 0, len(pairs)
    wanted = np.uint64(number) << np.uint64(32)
    while low < high:
        middle = (low + high) // 2
        if pairs[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@njit(nogil=True, cache=True)
def _mirror(thumbnail: np.ndarray) -> np.ndarray:
    out = np.empty_like(thumbnail)
    for plane in range(3):
        offset, side = PLANES[plane]
        for y in range(side):
            for x in range(side):
                out[offset + y * side + x] = thumbnail[offset + y * side + side - 1 - x]
    return out


@njit(nogil=True, cache=True)
def _best(sample: np.int64, other: np.int64, best: int, shown: np.ndarray, state: tuple) -> int:
    """Return the rank of a kept sample if it is better than the best and shows the same, else the best."""
    rank, tried, thumbnails, rows, crops = state
    if rank[other] >= best or tried[other] == sample:
        return best
    tried[other] = sample
    return rank[other] if _is_same_picture(thumbnails[rows[other]], shown, crops) else best


@njit(nogil=True, cache=True)
def _best_of_bucket(sample: np.int64, bucket: np.int64, best: int, shown: np.ndarray, state: tuple, kept: tuple) -> int:
    samples, starts, num_kept = kept
    for index in range(starts[bucket], starts[bucket] + num_kept[bucket]):
        best = _best(sample, np.int64(samples[index]), best, shown, state)
    return best


@njit(nogil=True, cache=True)
def _best_by_views(
    sample: np.int64,
    own: np.int64,
    best: int,
    shown: np.ndarray,
    pairs: tuple,
    state: tuple,
    kept: tuple,
    leader: np.ndarray,
) -> int:
    """Return the best of those near a view of the sample, and of those a view of which is near it."""
    forward, backward = pairs
    index = _first_of(forward, sample)
    while index < len(forward) and forward[index] >> np.uint64(32) == sample:
        best = _best_of_bucket(sample, np.int64(forward[index] & LOWER), best, shown, state, kept)
        index += 1
    index = _first_of(backward, own)
    while index < len(backward) and backward[index] >> np.uint64(32) == own:
        other = np.int64(backward[index] & LOWER)
        if leader[other] == other:
            best = _best(sample, other, best, shown, state)
        index += 1
    return best


@njit(nogil=True, cache=True)
def group_samples(
    ranked: np.ndarray,
    bucket: np.ndarray,
    pairs: tuple,
    state: tuple,
    state_mirrored: tuple,
    kept: tuple,
    leader: np.ndarray,
    kind: np.ndarray,
) -> None:
    """Fill `leader` and `kind`: each of `ranked` joins the best kept sample that shows the same, see `grouping.group`.

    Args:
        ranked: the samples, the best first.
        bucket: of each sample.
        pairs: of buckets, of a sample and a bucket, turned, and both of mirrored samples; packed and sorted.
        state: ranks of samples, for which sample each was tried last, thumbnails, rows in them, and `crops`.
        state_mirrored: the same for what a mirror shows.
        kept: room for the kept samples of each bucket, where each begins, and how many there are.
    """
    between, views, views_of, mirrored, mirrored_of = pairs
    _, _, thumbnails, rows, _ = state
    samples, starts, num_kept = kept
    for place in range(len(ranked)):
        sample = np.int64(ranked[place])
        if rows[sample] == NONE:
            continue
        own, shown = np.int64(bucket[sample]), thumbnails[rows[sample]]
        best = _best_of_bucket(sample, own, place, shown, state, kept)
        index = _first_of(between, own)
        while index < len(between) and between[index] >> np.uint64(32) == own:
            best = _best_of_bucket(sample, np.int64(between[index] & LOWER), best, shown, state, kept)
            index += 1
        best = as_shown = _best_by_views(sample, own, best, shown, (views, views_of), state, kept, leader)
        if len(mirrored) > 0:
            both = (mirrored, mirrored_of)
            best = _best_by_views(sample, own, best, _mirror(shown), both, state_mirrored, kept, leader)
        if best < place:
            leader[sample] = ranked[best]
            kind[sample] = PERCEPTUAL if best == as_shown else MIRRORED
        else:
            samples[starts[own] + num_kept[own]] = sample
            num_kept[own] += 1
