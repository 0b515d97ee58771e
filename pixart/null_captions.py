"""The null caption that original files hold, compared with what a text encoder gives for no text.

PixArt-alpha's code draws it at random, trains with that and draws with it; Sigma's holds what T5 gives for "", padded.
Here, as in diffusers, it is always what the text encoder gives: of alpha's random one it is another.
"""

# L rows of the stored one, n real tokens of the text encoder's, D text width

import math
from typing import Literal

from torch import Tensor

# of root mean square: an encoder in bfloat16 is off by 1 to 2%, another one's output by more than its own size
MAX_ERROR = 0.15
# deviations that the spread and the tails of random numbers may be off, of as many numbers as there are
MAX_DEVIATIONS = 6.0


def compare_null_caption(stored: Tensor, encoded: Tensor) -> Literal["same", "random", "other"]:
    """Return what a file's null caption [L, D] is beside the text encoder's [n, D]: `same`, drawn at `random`, `other`.

    Of the padding behind the n real tokens nothing is compared: it is masked wherever text is.
    """
    if stored.shape[1:] == encoded.shape[1:] and len(encoded) <= len(stored):
        ours = encoded.float()
        error = (stored[: len(encoded)].float() - ours).square().mean() / ours.square().mean().clamp(min=1e-12)
        if float(error.sqrt()) < MAX_ERROR:
            return "same"
    return "random" if is_random(stored) else "other"


def is_random(stored: Tensor) -> bool:
    """Whether a null caption [L, D] is normal numbers over the root of D, as alpha's code begins it."""
    values = stored.double().flatten() * math.sqrt(stored.shape[-1])
    number = values.numel()
    spread, tails = float(values.square().mean()), float(values.pow(4).mean())
    # of normal numbers the second moment is 1 and the fourth 3, with variances 2 and 96
    return abs(spread - 1) < MAX_DEVIATIONS * math.sqrt(2 / number) and abs(tails - 3) < MAX_DEVIATIONS * math.sqrt(
        96 / number
    )


def describe_null_caption(kind: Literal["random", "other"], *, file: str) -> str:
    """Return what is said of a null caption that is not the text encoder's."""
    if kind == "random":
        what = "was drawn at random, as PixArt-alpha's code does: guidance of those who drew with it led away from that"
    else:
        what = "is not what the text encoder gives for no text"
    return f"the null caption in {file} {what}; here, as in diffusers, guidance leads away from what the encoder gives"
