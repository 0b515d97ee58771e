"""What captions images: the small protocol behind which every engine stands."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from PIL import Image

FinishReason = Literal["stop", "length"]
# The canary needs the first words only.
PROBE_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Request:
    """An image, what to ask about it, and a seed of its own, so that sampling does not depend on its neighbours."""

    image: Image.Image
    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What the model said; `num_tokens` counts its tokens without the end token, or as the server counts them.

    `finish_reason` is `length` when the caption was cut at `captioning.max_new_tokens`, and `stop` otherwise. A server
    that reports no token usage leaves `num_tokens` None. Of a caption that no model has made both are None.
    """

    text: str
    num_tokens: int | None
    finish_reason: FinishReason | None


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why there is no caption of one image, whatever becomes of the others; `reason` goes into the row's `reject`."""

    reason: str
    detail: str


class Captioner(Protocol):
    """Turns what is prepared for each image into its caption."""

    def caption(self, prepared: Iterable[Any], *, repetition_penalty: float = 1.0) -> Sequence[Caption | Refusal]:
        """Return one caption per prepared request, in order; takes the next request only when there is room for it.

        `repetition_penalty` is that of transformers; 1 is none.
        """
        ...


class CaptionEngine(Captioner, Protocol):
    """Captions images in two steps, so that the first can run ahead on the CPU while the device is busy."""

    is_exact: bool
    """Whether greedy captions are the same to the letter at any batch size (float32)."""

    def prepare(self, requests: Sequence[Request]) -> list[Any]:
        """Turn requests into what the device needs; called from several threads.

        None stands for a prompt that leaves no room for its caption in the model's context.
        """
        ...

    def probe(self, prepared: Iterable[Any]) -> Sequence[Caption | Refusal]:
        """Return short greedy captions, whatever the settings: for the canary."""
        ...


def sample_seed(seed: int, shard: str, key: str) -> int:
    """Return the seed of one sample: 63 bits that depend on nothing but the recipe's seed, the shard and the key."""
    digest = hashlib.sha256(f"{seed}\0{shard}\0{key}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") >> 1
