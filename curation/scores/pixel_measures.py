"""What `pixels` measures of decoded pixels; each function says its formula."""

# H W height and width in pixels, L luminance 0 to 255 (ITU-R 601: 0.299 R + 0.587 G + 0.114 B)

from collections.abc import Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np

from curation.scores.scaling import fit

# The longer side at which sharpness is compared, of larger images: what is sharp at the size it is trained on counts.
SHARPNESS_SIDE = 512
# The longer side at which colours are looked at.
COLOUR_SIDE = 128
# A line belongs to a border while so many of its pixels are within so many levels of the border's colour.
BORDER_SHARE, BORDER_LEVELS = 0.97, 20
# A bar is at least so much of the side that it lies on.
MIN_BAR = 0.02


def sharpness(luminance: np.ndarray) -> float:
    """Return the variance of the Laplacian of L, whose longer side is `SHARPNESS_SIDE` at most.

    Var(L(x-1,y) + L(x+1,y) + L(x,y-1) + L(x,y+1) - 4 L(x,y)), edges mirrored; Pech-Pacheco et al., 2000.
    """
    _, deviation = cv2.meanStdDev(cv2.Laplacian(fit(luminance, SHARPNESS_SIDE), cv2.CV_16S))
    return float(deviation[0, 0]) ** 2


def histogram_measures(luminance: np.ndarray) -> dict[str, float]:
    """Return entropy, brightness and contrast, from the shares p of the 256 levels of L over all pixels.

    Entropy is -sum p log2 p, 0 to 8 bits; brightness the mean of L / 255, contrast its standard deviation.
    """
    counts = np.bincount(luminance.ravel(), minlength=256) if luminance.size < 256 else _histogram(luminance)
    shares = counts / luminance.size
    levels = np.arange(256) / 255
    mean = float(shares @ levels)
    there = shares[shares > 0]
    return {
        "entropy": max(0.0, float(-(there * np.log2(there)).sum())),
        "brightness": mean,
        "contrast": float(np.sqrt(shares @ (levels - mean) ** 2)),
    }


def _histogram(luminance: np.ndarray) -> np.ndarray:
    return cv2.calcHist([luminance], [0], None, [256], [0, 256]).ravel().astype(np.float64)


def colourfulness(pixels: np.ndarray) -> float:
    """Return Hasler and Süsstrunk's M3 (2003) of an RGB image, whose longer side is `COLOUR_SIDE` at most.

    With rg = R - G and yb = (R + G) / 2 - B: sqrt(var rg + var yb) + 0.3 sqrt(mean rg ^ 2 + mean yb ^ 2); 0 is grey,
    33 average, above 80 very colourful.
    """
    red, green, blue = np.moveaxis(fit(pixels, COLOUR_SIDE).astype(np.float32), 2, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    return float(np.sqrt(rg.var() + yb.var()) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2))


class Borders(NamedTuple):
    """Bars of one colour along each side, as shares of height or width."""

    top: float
    bottom: float
    left: float
    right: float

    @property
    def area(self) -> float:
        """Which share of the image they cover."""
        return 1 - max(0.0, 1 - self.top - self.bottom) * max(0.0, 1 - self.left - self.right)


def find_borders(small: np.ndarray) -> tuple[Borders, bool]:
    """Return the bars of an RGB image ([H, W, 3], scaled so that noise of JPEG is averaged), and whether it has some
    above and below of one colour, and none beside it, or the other way round.

    A side's colour is the median of its outermost line. Lines belong to the bar while `BORDER_SHARE` of their pixels
    are within `BORDER_LEVELS` of it in each channel; bars of less than `MIN_BAR` are none.
    """
    turned = small.transpose(1, 0, 2)
    top, top_colour = _bar(small)
    bottom, bottom_colour = _bar(small[::-1])
    left, left_colour = _bar(turned)
    right, right_colour = _bar(turned[::-1])
    borders = Borders(top, bottom, left, right)
    if max(borders) == 1:
        return borders, False
    rows = min(top, bottom) > 0 and _are_alike(top_colour, bottom_colour)
    sides = min(left, right) > 0 and _are_alike(left_colour, right_colour)
    return borders, rows != sides


def _bar(lines: np.ndarray) -> tuple[float, np.ndarray]:
    """Return which share of the lines, from the first on, is a bar, and its colour."""
    colour = np.median(lines[0], axis=0).astype(np.int16)
    # Most images have none, which the first line tells.
    if not _belongs(lines[:1], colour)[0]:
        return 0.0, colour
    belongs = _belongs(lines, colour)
    num_lines = len(lines) if belongs.all() else int(np.argmin(belongs))
    share = num_lines / len(lines)
    return (share if share >= MIN_BAR else 0.0), colour


def _belongs(lines: np.ndarray, colour: np.ndarray) -> np.ndarray:
    is_near = (np.abs(lines.astype(np.int16) - colour) <= BORDER_LEVELS).all(axis=2)
    return is_near.mean(axis=1) >= BORDER_SHARE


def _are_alike(colour: np.ndarray, other: np.ndarray) -> bool:
    return bool((np.abs(colour - other) <= BORDER_LEVELS).all())


def measure_pixels(pixels: np.ndarray, small: np.ndarray) -> Mapping[str, Any]:
    """Return all of the above of an RGB image, uint8 [H, W, 3], and of a smaller one of the same."""
    luminance = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    borders, is_letterbox = find_borders(small)
    return {
        "sharpness": sharpness(luminance),
        **histogram_measures(luminance),
        "colourfulness": colourfulness(small),
        "border_fraction": borders.area,
        "letterbox": is_letterbox,
    }
