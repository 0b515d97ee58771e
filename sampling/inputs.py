"""What decides images beside the settings: weights, process, text encoder or embeddings, VAE."""

from collections.abc import Mapping
from typing import Any

from encoders.text import DEFAULT_CLEANING
from encoders.weights import resolve_model
from errors import MissingFileError
from pipelines.as_typed import typed_command, typed_path
from pipelines.store.files import sha256_file
from pipelines.store.manifest import MANIFEST_NAME
from sampling.config import SamplingConfig
from sampling.control_kind import identify_maps
from sampling.students import student_identity
from sampling.trained_model import TrainedModel, resolve_part

SAMPLING_VERSION = 2  # raise it when the same settings give other images


def image_inputs(config: SamplingConfig, trained: TrainedModel) -> dict[str, Any]:
    """Return what decides images beside the settings."""
    text = {} if trained.text is None else {"text": _text_identity(config, trained, trained.text)}
    vae = resolve_part(trained, "VAE", trained.vae)
    return {
        "version": SAMPLING_VERSION,
        "checkpoint": trained.identity,
        **_process_identity(trained.process),
        "vae": {**trained.vae, "model": vae.identity},
        **text,
        **student_identity(trained),
        **({"control_maps": identify_maps(trained)} if config.control_is == "photo" else {}),
    }


def _process_identity(process: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of the process decides an image: not the loss, nor the times trained at."""
    schedule = process["schedule"]
    # Few processes bring settings of the sampler; images of the others were made before there were any.
    sampler = {"sampler": process["sampler"]} if "sampler" in process else {}
    if process["name"] == "ddpm":  # of which images made before there was another name the schedule alone
        return {"schedule": schedule, **sampler}
    network = {"network_schedule": process["network_schedule"]} if "network_schedule" in process else {}
    return {"process": process["name"], "schedule": {"shift": schedule["shift"]}, **network, **sampler}


def _text_identity(config: SamplingConfig, trained: TrainedModel, text: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the embeddings: the encoder, or the file or manifest that holds them."""
    if config.text_encoder != "precomputed":
        model = resolve_part(trained, "text encoder", text).identity
        found = {"model": model, "max_tokens": text["max_tokens"]}
        if text.get("cleaning", DEFAULT_CLEANING) != DEFAULT_CLEANING:
            found["cleaning"] = text["cleaning"]
        if "tokenizer" in text:
            found["tokenizer"] = resolve_model(text["tokenizer"]).identity
        # Of earlier versions, which had other steps, "int8".
        return found | ({"weights": "int8 by torchao"} if config.text_encoder == "8bit" else {})
    path = typed_path(config.text_embeddings)
    path = path / MANIFEST_NAME if path.is_dir() else path
    if not path.is_file():
        raise MissingFileError(
            f"sampling.text_embeddings {path} does not exist: sampling.write_embeddings writes a file, "
            f"`{typed_command('features')}` the text features of a run"
        )
    return {"embeddings": sha256_file(path), "max_tokens": text["max_tokens"]}
