"""A look at the model before it captions millions of images: does it see them, and does batching leave it alone?"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from captioning.engines.protocol import CaptionEngine, Refusal, Request
from errors import UserError

SHORT_PROMPT = "Describe this image."
LONG_TAIL = " Mention what is in the foreground, what is in the background, and where everything is."
# In half precision a near tie may fall differently at another batch size, but hardly in the first words.
NUM_COMPARED_WORDS = 3
MIN_CONTRAST = 8.0


class CanaryError(UserError):
    """The model cannot be trusted with this job; says why."""


class RefusedProbeError(CanaryError):
    """This image is refused, which says nothing about the others; says why."""


def is_worth_showing(image: Image.Image) -> bool:
    """Whether an image differs enough from a black one to tell whether the model sees it."""
    values = np.asarray(image.resize((32, 32)).convert("L"), dtype=np.float32)
    return bool(values.std() >= MIN_CONTRAST)


def check_engine(engine: CaptionEngine, image: Image.Image, prompt: str) -> None:
    """Caption `image` and a black one, together and one by one.

    Raises:
        CanaryError: both got the same caption, so that the image does not reach the model; or a caption changed with
            the number of prompts beside it, so that padding or masks are wrong.
        RefusedProbeError: there is no caption to compare; another image may do.
    """
    black = Image.new("RGB", image.size)
    prompts = [prompt, prompt, SHORT_PROMPT, prompt + LONG_TAIL]
    images = [image, black, image, image]
    requests = [Request(image=image, prompt=text, seed=0) for image, text in zip(images, prompts, strict=True)]
    together = _probe(engine, requests)
    if together[0] == together[1]:
        raise CanaryError(
            f"captioning.model does not see the image: {prompt!r} gets the same caption for an image of the shard and "
            f"for a black one: {together[0]!r}"
        )
    for number, request in enumerate(requests):
        alone = _probe(engine, [request])[0]
        if not _agree(alone, together[number], is_exact=engine.is_exact):
            raise CanaryError(
                f"captioning.model depends on what it is batched with: {request.prompt!r} gets {alone!r} alone and "
                f"{together[number]!r} in a batch of {len(requests)}"
            )


def _probe(engine: CaptionEngine, requests: Sequence[Request]) -> list[str]:
    prepared = engine.prepare(requests)
    if None in prepared:
        raise UserError("captioning.max_new_tokens and the default prompt do not fit the model's context")
    texts = []
    for request, caption in zip(requests, engine.probe(prepared), strict=True):
        if isinstance(caption, Refusal):
            raise RefusedProbeError(f"{caption.reason}: {request.prompt!r}: {caption.detail}")
        texts.append(caption.text)
    return texts


def _agree(alone: str, together: str, *, is_exact: bool) -> bool:
    if is_exact:
        return alone == together
    return alone.split()[:NUM_COMPARED_WORDS] == together.split()[:NUM_COMPARED_WORDS]
