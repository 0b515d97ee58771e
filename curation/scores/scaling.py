"""Images made smaller by means of areas, in the threads that decode."""

import cv2
import numpy as np

cv2.setNumThreads(1)  # images are looked at in threads of the caller's


def fit(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return `pixels` ([height, width] or [height, width, 3]), scaled so that the longer side is `side`.

    Smaller ones stay as they are.
    """
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
