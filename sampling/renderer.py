"""The models at work: prompts to text embeddings, noise to latents, latents to images."""

# B images, C latent channels, h x w latent size

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from features.encoders import LatentCodec, TextEncoder, clean_prompt, select_device
from pipelines.manifest import require_same
from pipelines.progress import get_logger
from pixart.dit import DiT
from sampling.checkpoints import Checkpoint
from sampling.config import SamplingConfig
from sampling.denoise import Predict, denoise, draw_noise, make_generators, predict_from_labels, predict_from_text
from sampling.requests import ImageRequest
from sampling.solvers import make_solver

log = get_logger("sampling")


def encode_prompts(prompts: Sequence[str], config: SamplingConfig, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return an embedding [num_tokens, d_text] for each distinct prompt; the encoder is freed before this returns."""
    assert checkpoint.text is not None
    distinct = list(dict.fromkeys(prompts))
    encoder = TextEncoder.load(
        checkpoint.text["model"],
        checkpoint.text["revision"],
        max_tokens=checkpoint.text["max_tokens"],
        device=_device(config),
        dtype=config.text_dtype,
    )
    for prompt in distinct:
        _warn_of_lost_words(encoder, prompt)
    return dict(zip(distinct, encoder.encode(distinct), strict=True))


class Renderer:
    """A checkpoint's transformer and VAE on their device, ready to draw batches of one size.

    Raises:
        ValueError: the VAE's scaling is not the one that the transformer was trained with.
    """

    def __init__(self, config: SamplingConfig, checkpoint: Checkpoint, texts: Mapping[str, Tensor]) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.texts = texts
        self.device = _device(config)
        automatic = "bfloat16" if self.device.startswith("cuda") else "float32"
        dtype = getattr(torch, automatic if config.dtype == "auto" else config.dtype)
        self.model = checkpoint.load().to(self.device, dtype)
        self.codec = LatentCodec.load(checkpoint.vae["model"], checkpoint.vae["revision"], device=self.device)
        for name in ("scaling_factor", "shift_factor"):
            found: Any = getattr(self.codec, name)
            require_same(name, checkpoint.vae.get(name, found), found, where=f"VAE {checkpoint.vae['model']}")

    def draw(self, requests: Sequence[ImageRequest]) -> list[Image.Image]:
        """Return one image per request; all are of one size, and none depends on the others."""
        height, width = requests[0].height, requests[0].width
        shape = (self.codec.channels, height // self.codec.downsample, width // self.codec.downsample)
        generators = make_generators([request.seed for request in requests])
        solver = make_solver(self.config.solver, self.checkpoint.schedule, num_steps=self.config.num_steps)
        noise = draw_noise(generators, shape).to(self.device)  # [B, C, h, w]
        latents = denoise(self._predict(requests), noise, solver, generators=generators)
        return self.codec.decode(latents / self.codec.scaling_factor + self.codec.shift_factor)

    def _predict(self, requests: Sequence[ImageRequest]) -> Predict:
        scale = self.config.guidance_scale
        if isinstance(self.model, DiT):
            labels = [request.label for request in requests if request.label is not None]
            return predict_from_labels(self.model, labels, guidance_scale=scale)
        return predict_from_text(
            self.model,
            [self.texts[request.prompt] for request in requests],
            self.texts[self.config.negative_prompt],
            guidance_scale=scale,
            size_pixels=(requests[0].height, requests[0].width),
        )


def _device(config: SamplingConfig) -> str:
    return select_device(config.device, num_threads=config.num_threads or torch.get_num_threads())


def _warn_of_lost_words(encoder: TextEncoder, prompt: str) -> None:
    tokens = encoder.tokenizer(clean_prompt(prompt)).input_ids
    if len(tokens) > encoder.max_tokens:
        # the last place is the end-of-sequence token's
        lost = encoder.tokenizer.decode(tokens[encoder.max_tokens - 1 :], skip_special_tokens=True)
        log.warning(
            f"prompt of {len(tokens)} tokens, the model reads {encoder.max_tokens}; "
            f"lost: {lost if len(lost) <= 200 else lost[:200] + ' …'}"
        )
