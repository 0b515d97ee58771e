"""A codec's folder: diffusers' `config.json` and weights, which `features.vae_model` opens."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from encoders.kl import CONFIG_DEFAULTS, KLCodec
from encoders.weights import ModelSource, load_pretrained, read_config
from errors import UserError
from pipelines.store.files import atomic_write_json
from training.codec.autoencoder import Autoencoder, AutoencoderConfig

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
# What a config says of latents, and not what its network is.
OF_LATENTS = ("scaling_factor", "shift_factor")


def read_codec_config(source: ModelSource, *, key: str) -> AutoencoderConfig:
    """Return the shape of an AutoencoderKL.

    Raises:
        UserError: it is another model, such as an AutoencoderDC, whose training is another one; names `key`.
    """
    config = read_config(source)
    assert config is not None, "it has been fetched"
    kind = config.get("_class_name", KLCodec.class_name)
    if kind != KLCodec.class_name:
        raise UserError(f"{key} {source.location} is a {kind}: only an {KLCodec.class_name} is trained here")
    return AutoencoderConfig(config)


def scaling_of(config: AutoencoderConfig) -> dict[str, float]:
    """Return what latents are scaled and shifted by, diffusers' defaults included; no shift where there is none."""
    stored = {name: CONFIG_DEFAULTS[name] for name in OF_LATENTS} | dict(config.diffusers)
    return {name: float(stored[name]) for name in OF_LATENTS if stored[name] is not None}


def load_codec(source: ModelSource, *, key: str) -> Autoencoder:
    """Return the network of an AutoencoderKL, fp32 on the CPU.

    Raises:
        UserError: it is another model, or lacks weights; names `key`.
    """
    config = read_codec_config(source, key=key)
    model = load_pretrained(KLCodec.model_class(), source, settings={"low_cpu_mem_usage": False}, key=key)
    network = config.network()
    network.load_state_dict(model.float().state_dict())
    return network


def save_codec(config: AutoencoderConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write weights by name, fp32, and the config, as a folder that diffusers opens."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WEIGHTS
    path.touch()
    mode = path.stat().st_mode
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path, metadata={"format": "pt"})
    # safetensors puts a file of its own in the place, which its owner alone may read, whatever the umask says.
    path.chmod(mode)
    atomic_write_json(folder / CONFIG, dict(config.diffusers))


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights that `save_codec` wrote, by name."""
    return load_file(folder / WEIGHTS)
