"""The frozen T5 and VAE of the paper behind two small classes; sampling uses the same ones as feature extraction."""

# B batch, L text tokens (with padding), D text width, C latent channels, H W pixels, h w latent height and width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from encoders.models import resolve_model
from pipelines.engine.progress import get_logger

if TYPE_CHECKING:
    import torch
    from PIL import Image

log = get_logger("features")
Item = TypeVar("Item")

FP16_REFUSAL = "T5 was trained in bfloat16 and its activations overflow float16, which gives inf and nan embeddings"
TEXT_DTYPES = ("bfloat16", "float32")
VAE_DTYPES = ("float32", "bfloat16")
# Tokens of a batch, padding included: enough to keep a GPU busy; few enough for activations to stay in a CPU's cache.
DEFAULT_BATCH_TOKENS = {"cuda": 8192, "cpu": 1024}


def clean_prompt(text: str) -> str:
    """Return `text` as T5 sees it: lower case, without surrounding space, as diffusers' PixArt pipelines do."""
    return text.lower().strip()


class Batches:
    """Cuts work into batches that cost at most `size`; one that does not fit the memory halves the size for good.

    Args:
        size: captions are counted in tokens with their padding, images one by one.
        cost: of the first item of a batch, and so of each other: items come largest first, or all alike.
    """

    def __init__(self, size: int, *, cost: Callable[[Any], int] = lambda item: 1) -> None:
        self.size = size
        self._cost = cost

    def run(self, items: Sequence[Item], encode: Callable[[Sequence[Item]], list[Any]]) -> Iterator[Any]:
        """Yield one result of `encode` per item, in order.

        Raises:
            torch.OutOfMemoryError, RuntimeError: a single item does not fit; the latter is what a CPU raises.
        """
        import torch

        start = 0
        while start < len(items):
            cost = self._cost(items[start])
            batch = items[start : start + max(1, self.size // cost)]
            try:
                results = encode(batch)
            except RuntimeError as error:
                if not _is_out_of_memory(error) or len(batch) == 1:
                    raise
                results = None
            # Out here the error and its frames are gone, and with them what they held of the memory.
            if results is None:
                self.size = len(batch) // 2 * cost
                torch.cuda.empty_cache()
                log.warning(f"out of memory: going on with batches of {len(batch) // 2}")
                continue
            start += len(results)
            yield from results


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def select_device(device: str, *, num_threads: int) -> str:
    """Turn `auto` into `cuda` or `cpu`, and give torch `num_threads` threads on the CPU."""
    import torch

    torch.set_num_threads(num_threads)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _require_complete(model_id: str, class_name: str, loading: dict[str, Any]) -> None:
    """Refuse a checkpoint that would leave weights at their random start: the loaders only log that."""
    wrong = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in loading.get(kind, ())]
    if wrong or loading.get("error_msgs"):
        some = ", ".join(sorted(wrong)[:3]) or str(loading["error_msgs"][0])
        raise ValueError(
            f"{model_id} does not hold the weights of a {class_name}: {len(wrong)} would stay random ({some}, ...). "
            f"Save the model as a {class_name}; the encoder of a T5ForConditionalGeneration alone has other key names"
        )


def text_batches(num_tokens: int) -> Batches:
    """Return batches of token lists, longest first, of at most `num_tokens` with padding."""
    return Batches(num_tokens, cost=len)


def fuse_gelu(model: Any) -> Any:
    """Give a T5 encoder the tanh-approximated GELU as one kernel; transformers' "gelu_new" makes it of eight."""
    import torch

    for block in model.encoder.block:
        feed_forward = block.layer[-1].DenseReluDense
        if type(feed_forward.act).__name__ == "NewGELUActivation":
            feed_forward.act = torch.nn.GELU(approximate="tanh")
    return model


@dataclass
class TextEncoder:
    """The encoder half of a T5 and its tokenizer; make it with `load`.

    Attributes:
        max_tokens: longest embedding; longer prompts are truncated, the end-of-sequence token kept.
        d_text: width of an embedding.
    """

    model: Any
    tokenizer: Any
    max_tokens: int
    d_text: int
    device: torch.device
    batches: Batches

    @classmethod
    def load(
        cls,
        model: str,
        revision: str | None = None,
        *,
        max_tokens: int,
        device: str = "cpu",
        dtype: str = "bfloat16",
        batch_tokens: int | None = None,
        tokenizer: str | None = None,
    ) -> TextEncoder:
        """Load a local folder or hub id.

        `batch_tokens` bounds a batch, padding included; None is `DEFAULT_BATCH_TOKENS` of the device. `tokenizer` is
        a folder, where the tokenizer does not lie beside the weights.

        Raises:
            ValueError: `dtype` is not bfloat16 or float32, or the checkpoint lacks weights of the encoder.
        """
        if dtype not in TEXT_DTYPES:
            reason = f": {FP16_REFUSAL}" if dtype == "float16" else ""
            raise ValueError(f"features.text_dtype {dtype} is not one of {', '.join(TEXT_DTYPES)}{reason}")
        import torch
        from transformers import AutoTokenizer, T5EncoderModel
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        source = resolve_model(model, revision)
        loaded: Any = T5EncoderModel.from_pretrained(
            source.location,
            revision=source.revision or "main",
            dtype=getattr(torch, dtype),
            output_loading_info=True,
        )
        encoder, loading = loaded
        _require_complete(model, "T5EncoderModel", loading)
        tokenizes = AutoTokenizer.from_pretrained(tokenizer or source.location, revision=source.revision)
        target = torch.device(device)
        encoder = fuse_gelu(encoder.to(target).eval().requires_grad_(False))
        batches = text_batches(batch_tokens or DEFAULT_BATCH_TOKENS[target.type])
        return cls(encoder, tokenizes, max_tokens, encoder.config.d_model, target, batches)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, cleaned and cut at `max_tokens`, the end-of-sequence token included."""
        if not texts:
            return []
        cleaned = [clean_prompt(text) for text in texts]
        return self.tokenizer(cleaned, truncation=True, max_length=self.max_tokens, add_special_tokens=True).input_ids

    def encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Return one embedding [num_tokens, D] per text, real tokens only, in the model's dtype, on the CPU.

        Texts of like length share a batch and are padded to the longest of it, never to `max_tokens`. Values may be
        nan or inf where the model overflows: the caller decides what to do with the sample.
        """
        ids = self.tokenize(texts)
        order = sorted(range(len(ids)), key=lambda index: (-len(ids[index]), index))
        results = self.batches.run([ids[index] for index in order], self._encode_batch)
        embeddings = dict(zip(order, results, strict=True))
        return [embeddings[index] for index in range(len(ids))]

    def _encode_batch(self, ids: Sequence[list[int]]) -> list[torch.Tensor]:
        import torch

        lengths = [len(tokens) for tokens in ids]
        input_ids = torch.full((len(ids), max(lengths)), self.tokenizer.pad_token_id)  # [B, L]
        mask = torch.zeros_like(input_ids)
        for row, tokens in enumerate(ids):
            input_ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        with torch.inference_mode():
            hidden = self.model(input_ids.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state
        hidden = hidden.cpu()  # [B, L, D]
        return [hidden[row, :length].clone() for row, length in enumerate(lengths)]


@dataclass
class LatentCodec:
    """An `AutoencoderKL`: images to the mean and deviation of their latents, and back; make it with `load`.

    Latents are unscaled here: `scaling_factor` and `shift_factor` are for who trains or samples on them.
    """

    model: Any
    device: torch.device
    dtype: torch.dtype
    channels: int
    downsample: int
    scaling_factor: float
    shift_factor: float

    @classmethod
    def load(
        cls, model: str, revision: str | None = None, *, device: str = "cpu", dtype: str = "float32"
    ) -> LatentCodec:
        """Load a local folder or hub id.

        Raises:
            ValueError: `dtype` is not float32 or bfloat16, or the checkpoint lacks weights of the VAE.
        """
        if dtype not in VAE_DTYPES:
            reason = ": this VAE overflows float16 and gives black images" if dtype == "float16" else ""
            raise ValueError(f"features.vae_dtype {dtype} is not one of {', '.join(VAE_DTYPES)}{reason}")
        import torch
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        source = resolve_model(model, revision)
        loaded: Any = AutoencoderKL.from_pretrained(
            source.location,
            revision=source.revision,
            torch_dtype=getattr(torch, dtype),
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
        vae, loading = loaded
        _require_complete(model, "AutoencoderKL", loading)
        vae = vae.to(torch.device(device)).eval().requires_grad_(False)
        if torch.device(device).type == "cuda":
            # What tensor cores want; on a CPU it makes the convolutions eight times slower.
            vae = vae.to(memory_format=torch.channels_last)
        return cls(
            vae,
            torch.device(device),
            getattr(torch, dtype),
            channels=vae.config.latent_channels,
            downsample=2 ** (len(vae.config.block_out_channels) - 1),
            scaling_factor=vae.config.scaling_factor,
            shift_factor=vae.config.shift_factor or 0.0,
        )

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the latents, fp32 [B, C, h, w] on the CPU, unscaled.

        Args:
            images: [B, 3, H, W], uint8, or floats in [-1, 1]; H and W multiples of `downsample`.
        """
        import torch

        if images.dtype == torch.uint8:
            images = images.to(self.device).to(torch.float32) / 127.5 - 1.0
        with torch.inference_mode():
            distribution = self.model.encode(images.to(self.device, self.dtype)).latent_dist
        return distribution.mean.float().cpu(), distribution.std.float().cpu()  # [B, C, h, w]

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Return one image per unscaled latent of [B, C, h, w].

        Raises:
            ValueError: the VAE gives values that are not finite.
        """
        import torch
        from PIL import Image

        with torch.inference_mode():
            images = self.model.decode(latents.to(self.device, self.dtype)).sample  # [B, 3, H, W]
        if not images.isfinite().all():
            raise ValueError("the VAE gave pixels that are not finite: its weights (features.vae_model) are at fault")
        pixels = ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8).cpu()
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
