"""What duplicates are told by: a hash of a file's bytes, a small thumbnail, and 64 signs of its lowest frequencies.

The thumbnail is 24 x 24 luma beside 12 x 12 of each chroma: what a duplicate is confirmed by, so that two pictures of
one arrangement in other colours stay apart. The perceptual hash follows from the thumbnail alone, and so do the hashes
of its slightly cropped and mirrored forms (`view_hashes`): whoever looks for those needs no image again.

A bit is whether a cosine coefficient exceeds a small bar, not zero: of symmetric pictures many are zero, and their
signs would be noise.
"""

# N images, V views (windows of the image), W windows of an axis, K frequencies, S side of a plane

import hashlib

import cv2
import numpy as np
from numba import njit

HASHING_VERSION = 1  # raise it when the same image gets other bytes here
LUMA_SIDE = 24
CHROMA_SIDE = 12
PLANES = ((0, LUMA_SIDE), (LUMA_SIDE**2, CHROMA_SIDE), (LUMA_SIDE**2 + CHROMA_SIDE**2, CHROMA_SIDE))  # (offset, side)
THUMBNAIL_BYTES = LUMA_SIDE**2 + 2 * CHROMA_SIDE**2
EXACT_BYTES = 16

NUM_LUMA_BITS = 40
NUM_CHROMA_BITS = 12  # of each
LUMA_BAR = 1.0  # of 255: mean of a coefficient's cosine times the luma
CHROMA_BAR = 0.5
CROP = 0.0375  # of a side: views that are cropped by so much are near all that are cropped by up to 5%
NUM_FREQUENCIES = 9
_RGB_TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], dtype=np.float32
)


def exact_hash(data: bytes) -> bytes:
    """BLAKE2b of an image file's bytes, 16 bytes."""
    return hashlib.blake2b(data, digest_size=EXACT_BYTES).digest()


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Reduce an RGB image, uint8 [H, W, 3] of any size, to uint8 [864]: 24 x 24 luma, then 12 x 12 Cb and Cr (BT.601).

    A cell is the mean of its area. `pixels` may be a reduced decode of the image, of 64 pixels or more a side.
    """
    small = cv2.resize(pixels, (LUMA_SIDE, LUMA_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    planes = small @ _RGB_TO_YCC.T
    chroma = planes[..., 1:].reshape(CHROMA_SIDE, 2, CHROMA_SIDE, 2, 2).mean(axis=(1, 3)) + 128
    parts = (planes[..., 0].ravel(), chroma[..., 0].ravel(), chroma[..., 1].ravel())
    return np.clip(np.rint(np.concatenate(parts)), 0, 255).astype(np.uint8)


def mirrored(thumbnails: np.ndarray) -> np.ndarray:
    """Return the thumbnails of the images as a mirror shows them; uint8 [N, 864]."""
    parts = [
        thumbnails[:, offset : offset + side**2].reshape(-1, side, side)[:, :, ::-1].reshape(-1, side**2)
        for offset, side in PLANES
    ]
    return np.concatenate(parts, axis=1)


def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Return the 64 bits of each thumbnail, uint8 [N, 864] -> uint64 [N]."""
    return view_hashes(thumbnails, crops=False)[:, 0]


def view_hashes(thumbnails: np.ndarray, *, crops: bool) -> np.ndarray:
    """Return the hashes of an image's views: itself and, with `crops`, as it is when sides are cut off, uint64 [N, V].

    Each of the four sides is cut or not, by `CROP`: of an image and one that is cropped from it by up to 5% a side, one
    of these of the one is near the hash of the other. The first view is the image itself.
    """
    windows = [(0.0, 0.0), (CROP, 0.0), (0.0, CROP), (CROP, CROP)] if crops else [(0.0, 0.0)]
    out = np.zeros((len(thumbnails), len(windows) ** 2), dtype=np.uint64)
    luma = np.stack([_window_cosines(LUMA_SIDE, *window) for window in windows])
    chroma = np.stack([_window_cosines(CHROMA_SIDE, *window) for window in windows])
    _hash_views(np.ascontiguousarray(thumbnails), luma, chroma, _LUMA_FREQUENCIES, _CHROMA_FREQUENCIES, out)
    return out


def _lowest_frequencies(count: int) -> np.ndarray:
    """The (vertical, horizontal) frequencies of the `count` lowest coefficients but the mean, int64 [count, 2]."""
    every = [(u, v) for u in range(NUM_FREQUENCIES) for v in range(NUM_FREQUENCIES)]
    return np.array(sorted(every, key=lambda pair: (sum(pair), pair))[1 : count + 1])


_LUMA_FREQUENCIES = _lowest_frequencies(NUM_LUMA_BITS)
_CHROMA_FREQUENCIES = _lowest_frequencies(NUM_CHROMA_BITS)


def _window_cosines(side: int, before: float, after: float) -> np.ndarray:
    """Means of cosines over the cells of an axis, of the window that is left when its ends are cut off; [K, S].

    The window covers cells in part: the cosine is integrated over what it covers.
    """
    edges = np.clip((np.arange(side + 1) / side - before) / (1 - before - after), 0, 1)
    frequencies = np.arange(1, NUM_FREQUENCIES)[:, None]
    waves = np.diff(np.sin(np.pi * frequencies * edges), axis=1) / (np.pi * frequencies)
    return np.concatenate([np.diff(edges)[None], waves])


@njit(cache=True, nogil=True)
def _hash_views(
    thumbnails: np.ndarray,
    luma: np.ndarray,
    chroma: np.ndarray,
    luma_frequencies: np.ndarray,
    chroma_frequencies: np.ndarray,
    out: np.ndarray,
) -> None:
    num_windows = len(luma)
    for n in range(len(thumbnails)):
        bit = 0
        for plane in range(3):
            offset, side = PLANES[plane]
            cosines = luma if plane == 0 else chroma
            frequencies = luma_frequencies if plane == 0 else chroma_frequencies
            middle, bar = (0.0, LUMA_BAR) if plane == 0 else (128.0, CHROMA_BAR)
            rows = np.zeros((num_windows, cosines.shape[1], side))
            for window in range(num_windows):
                for u in range(cosines.shape[1]):
                    for y in range(side):
                        weight = cosines[window, u, y]
                        for x in range(side):
                            rows[window, u, x] += weight * (thumbnails[n, offset + y * side + x] - middle)
            for k in range(len(frequencies)):
                u, v = frequencies[k]
                for vertical in range(num_windows):
                    for horizontal in range(num_windows):
                        total = 0.0
                        for x in range(side):
                            total += rows[vertical, u, x] * cosines[horizontal, v, x]
                        if total > bar:
                            out[n, vertical * num_windows + horizontal] |= np.uint64(1) << np.uint64(bit + k)
            bit += len(frequencies)
