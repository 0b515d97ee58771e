"""Which class opens a model's folder, by its `config.json`: text encoders and latent codecs, one place for each.

Another kind is a file of its own, as `encoders/t5.py` and `encoders/dc.py` are, and its name here. What is wrong with a
model is said with a `key`: the recipe's for the text encoder or the codec of features, unless the model is another's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoders.compilation import can_compile
from encoders.dc import DCCodec
from encoders.kl import KLCodec
from encoders.latents import DiffusersCodec, LatentCodec, LatentSpec, require_vae_dtype
from encoders.t5 import T5Encoder
from encoders.text import (
    DEFAULT_BATCH_TOKENS,
    DEFAULT_CLEANING,
    HiddenStatesEncoder,
    TextEncoder,
    TextSpec,
    require_text_dtype,
    text_batches,
)
from encoders.text_decoder import DecoderTextEncoder
from encoders.tokens import pretrained_tokenizer
from encoders.weights import ModelSource, fetch_files, read_config, resolve_model
from errors import UserError

if TYPE_CHECKING:
    import torch

TEXT_KEY, VAE_KEY = "features.text_model", "features.vae_model"
TEXT_CLASSES: tuple[type[HiddenStatesEncoder], ...] = (T5Encoder, DecoderTextEncoder)
CODEC_CLASSES: tuple[type[DiffusersCodec], ...] = (KLCodec, DCCodec)


def text_spec(
    source: ModelSource, *, max_tokens: int, cleaning: str = DEFAULT_CLEANING, key: str = TEXT_KEY
) -> TextSpec | None:
    """Return the spec of a text encoder, None if a hub model is not in the cache yet.

    Raises:
        MissingFileError: a local folder has no config.json.
        UserError: it is a model of a kind that no class here opens.
    """
    config = read_config(source)
    if config is None:
        return None
    width_key = _text_class(source, config, key=key).width_key
    if not isinstance(width := config.get(width_key), int):
        raise UserError(f"{key} {source.location}: config.json gives no {width_key}, the width of the embeddings")
    return TextSpec(width=width, max_tokens=max_tokens, cleaning=cleaning, identity=source.identity)


def open_text_encoder(
    model: str,
    revision: str | None = None,
    *,
    max_tokens: int,
    cleaning: str = DEFAULT_CLEANING,
    device: str | torch.device = "cpu",
    dtype: str = "bfloat16",
    batch_tokens: int | None = None,
    tokenizer: str | None = None,
    is_8bit: bool = False,
    is_long_run: bool = False,
    key: str = TEXT_KEY,
) -> TextEncoder:
    """Load the text encoder of a local folder or hub id.

    `batch_tokens` bounds a batch, padding included; None is `DEFAULT_BATCH_TOKENS` of the device. `tokenizer` is a
    folder, where the tokenizer does not lie beside the weights. `is_8bit` rounds the weights of linear layers, so
    that the device never holds the whole encoder as it lies on disk. In a long run seconds of compilation pay, where
    there is what it takes.

    Raises:
        MissingFileError: there is no such folder, or no model in it.
        UserError: `dtype` is not bfloat16 or float32, no class here opens the model, or its checkpoint lacks weights.
    """
    _require_dtype(require_text_dtype, dtype)
    import torch

    source = resolve_model(model, revision)
    encoder_class = _text_class(source, _require_config(source, key=key), key=key)
    loaded = encoder_class.load_weights(source, dtype=getattr(torch, dtype), key=key)
    if is_8bit:
        from encoders.int8_weights import round_weights

        round_weights(loaded, device=torch.device(device))
    loaded = loaded.to(torch.device(device))
    spec = text_spec(source, max_tokens=max_tokens, cleaning=cleaning, key=key)
    assert spec is not None, f"{source.location} has been loaded, but its config.json is not in the cache"
    batches = text_batches(batch_tokens or DEFAULT_BATCH_TOKENS[torch.device(device).type])
    encoder = encoder_class(spec, loaded, pretrained_tokenizer(source, folder=tokenizer), batches)
    if is_long_run and can_compile(torch.device(device)):
        encoder.compile_kernels()
    return encoder


def blank_text_encoder(
    model: str, revision: str | None = None, *, dtype: str, is_8bit: bool = False, key: str = TEXT_KEY
) -> HiddenStatesEncoder:
    """Return the text encoder of a local folder or hub id on the meta device: it has shapes and no values.

    It knows no tokens and no limit of them. Raises as `open_text_encoder` does, but for weights.
    """
    import torch

    source = resolve_model(model, revision)
    config = _require_config(source, key=key)
    encoder_class = _text_class(source, config, key=key)
    blank = encoder_class.blank_weights(config).to(getattr(torch, dtype))
    if is_8bit:
        from encoders.int8_weights import round_weights

        round_weights(blank, device=torch.device("meta"))
    spec = TextSpec(width=config[encoder_class.width_key], max_tokens=0, cleaning="none", identity=source.identity)
    return encoder_class(spec, blank, None, text_batches(DEFAULT_BATCH_TOKENS["cpu"]))


def blank_codec(model: str, revision: str | None = None, *, dtype: str, key: str = VAE_KEY) -> DiffusersCodec:
    """Return the latent codec of a local folder or hub id on the meta device: it has shapes and no values.

    Raises as `open_codec` does, but for weights.
    """
    import torch

    source = resolve_model(model, revision)
    config = _require_config(source, key=key)
    return _codec_class(source, config, key=key).blank(config, dtype=getattr(torch, dtype))


def latent_spec(source: ModelSource, *, key: str = VAE_KEY) -> LatentSpec | None:
    """Return the spec of a latent codec, None if a hub model is not in the cache yet.

    Raises:
        MissingFileError: a local folder has no config.json.
        UserError: it is a model of a kind that no class here opens.
    """
    config = read_config(source)
    if config is None:
        return None
    codec_class = _codec_class(source, config, key=key)
    try:
        return codec_class.read_spec(config, identity=source.identity)
    except UserError as error:
        raise UserError(f"{key} {source.location}: {error}") from None


def open_codec(
    model: str,
    revision: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    is_long_run: bool = False,
    key: str = VAE_KEY,
) -> LatentCodec:
    """Load the latent codec of a local folder or hub id; in a long run of encoding seconds of compilation pay.

    Raises:
        MissingFileError: there is no such folder, or no model in it.
        UserError: `dtype` is not float32 or bfloat16, no class here opens the model, or its checkpoint lacks weights.
    """
    _require_dtype(require_vae_dtype, dtype)
    import torch

    source = resolve_model(model, revision)
    codec_class = _codec_class(source, _require_config(source, key=key), key=key)
    loaded = codec_class.load_weights(source, dtype=getattr(torch, dtype), key=key).to(torch.device(device))
    spec = latent_spec(source, key=key)
    assert spec is not None, f"{source.location} has been loaded, but its config.json is not in the cache"
    codec = codec_class(spec, loaded, f"{key} {source.location}")
    if torch.device(device).type == "cuda":
        codec.adapt_to_gpu()
    if is_long_run and can_compile(torch.device(device)):
        codec.compile_blocks()
    return codec


def _require_dtype(require: Callable[[str], None], dtype: str) -> None:
    """Refuse a dtype where no config has done it."""
    try:
        require(dtype)
    except ValueError as error:
        raise UserError(str(error)) from None


def _text_class(source: ModelSource, config: Mapping[str, Any], *, key: str) -> type[HiddenStatesEncoder]:
    kind = config.get("model_type")
    for text_class in TEXT_CLASSES:
        if kind in text_class.model_types:
            return text_class
    known = ", ".join(name for text_class in TEXT_CLASSES for name in text_class.model_types)
    raise UserError(f"{key} {source.location} is a model of type {kind}, not one of {known}")


def _codec_class(source: ModelSource, config: Mapping[str, Any], *, key: str) -> type[DiffusersCodec]:
    # Folders of before diffusers wrote the class name hold the only class there was; transformers writes model_type.
    kind = config.get("_class_name", config.get("model_type", KLCodec.class_name))
    for codec_class in CODEC_CLASSES:
        if kind == codec_class.class_name:
            return codec_class
    known = " or ".join(codec_class.class_name for codec_class in CODEC_CLASSES)
    raise UserError(f"{key} {source.location} is a {kind}, not {known}")


def _require_config(source: ModelSource, *, key: str) -> dict[str, Any]:
    """Return a model's config.json; a hub model's is fetched first."""
    config = read_config(source)
    if config is None:
        fetch_files(source, ["config.json"], key=key)
        config = read_config(source)
    assert config is not None, f"{Path(source.location)} has been fetched"
    return config
