"""The one place that gathers what weights were trained with: our `trainer.json`, a record beside them, the pipeline
around them, their own config, and the shapes of published models; in this order, where they say the same thing.

Nothing here needs torch.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixart.origins import ORIGINS_FILE, Fact, Origins, Positions, origins_of_json
from pixart.processes.scheduler_configs import spec_beside
from pixart.processes.specs import SCHEDULER_FILE, SCHEDULER_FOLDER, WEIGHT_FOLDERS, spec_of_trainer
from pixart.published import PIPELINE_TEXTS, recognise
from pixart.stored_shapes import (
    CONDITIONED_SIDE,
    CONFIG_NAME,
    DIT_DEFAULTS,
    PIXART_DEFAULTS,
    adaln_of,
    default_interpolation_scale,
    kind_of,
)
from pixart.weight_files import read_json

# Beside `model/` in a checkpoint of ours.
TRAINER_FILE, CHECKPOINT_WEIGHTS = "trainer.json", "model"
PIPELINE_FILE, PIPELINE_WEIGHTS = "model_index.json", "transformer"
# What diffusers takes where the config of a VAE does not say it.
VAE_SCALE = 0.18215
# The class that published configs of before diffusers 0.28 name; those that were written since name one of its own.
PUBLISHED_CLASS = "Transformer2DModel"
HUB_FOLDER = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")


def origins_of_folder(weights: Path, *, location: str = "") -> Origins:
    """Return what is known of a diffusers folder of weights, which has a `config.json`.

    `location` is what it was named by: a path or hub id.

    Raises:
        MissingFileError: it has no config.json.
        UserError: a file that tells of it is damaged, or it is of another model or of a process that is not supported.
    """
    found, is_recorded = Origins(), False
    trainer = weights.parent / TRAINER_FILE
    if weights.name == CHECKPOINT_WEIGHTS and trainer.is_file():
        found, is_recorded = origins_of_trainer(read_json(trainer), source=str(trainer)), True
    places = (weights, weights.parent) if weights.name in WEIGHT_FOLDERS else (weights,)
    for path in (folder / ORIGINS_FILE for folder in places):
        if path.is_file():
            found, is_recorded = found.or_else(origins_of_json(read_json(path), source=str(path))), True
    index = weights.parent / PIPELINE_FILE
    pipeline = None
    if weights.name == PIPELINE_WEIGHTS and index.is_file():
        pipeline = str(read_json(index).get("_class_name"))
        found = found.named_too(_of_pipeline(index, pipeline))
    if (spec := spec_beside(weights)) is not None:
        scheduler = weights.parent / SCHEDULER_FOLDER / SCHEDULER_FILE
        found = found.or_else(Origins(process=Fact(value=spec, source=str(scheduler))))
    own, like = _of_config(weights / CONFIG_NAME, pipeline, location=f"{location} {_hub_name(weights)}")
    # What we wrote down is all that there is to know: weights of our own may well have the shape of published ones.
    return found.or_else(own) if is_recorded else found.or_else(own).named_too(like)


def origins_of_trainer(trainer: Mapping[str, Any], *, source: str) -> Origins:
    """Return what a `trainer.json` of ours says; of a DiT there is no text."""
    text, vae = trainer.get("text") or {}, trainer.get("vae") or {}
    fields = trainer.get("fingerprint", {})
    facts: dict[str, Any] = {"max_tokens": text.get("max_tokens")}
    if "model" in text:
        facts["text_encoder"] = _names(text["model"], fields.get("text.text_model"))
        # Trainings of before there was a choice cleaned by the rule that came first.
        facts["cleaning"] = text.get("cleaning", "lower")
    if "model" in vae:
        facts["vae"] = _names(vae["model"], fields.get("latents.vae_model"))
    facts |= {"text_revision": text.get("revision"), "vae_revision": vae.get("revision")}
    facts |= {"vae_scale": vae.get("scaling_factor"), "vae_shift": vae.get("shift_factor")}
    if "interpolation_scale" in trainer and "factor" in vae:
        side = trainer["resolution"] // vae["factor"]
        facts["positions"] = Positions(sample_size=side, scale=trainer["interpolation_scale"])
    if "process" in trainer or "schedule" in trainer:
        facts["process"] = spec_of_trainer(trainer)
    return Origins(**{name: Fact(value=value, source=source) for name, value in facts.items() if value is not None})


def origins_of_file(
    path: Path, shape: Mapping[str, Any], *, kind: str, num_null_tokens: int | None, record: Mapping[str, Any] | None
) -> Origins:
    """Return what is known of an original file.

    Args:
        path: of the file.
        shape: of its network, by the names of its config; `sample_size` None where it holds no positions.
        kind: "pixart" or "dit".
        num_null_tokens: rows of the null caption in it.
        record: what a file of ours says of its origins.
    """
    scale = shape.get("interpolation_scale", 1.0)
    own = _of_network(kind, shape, scale=scale, source=str(path))
    if num_null_tokens is not None:
        own = dataclasses.replace(own, max_tokens=Fact(value=num_null_tokens, source=str(path)))
    if record is not None:
        return origins_of_json(record, source=str(path)).or_else(own)
    like = recognise(
        kind, shape, scale=scale, num_null_tokens=num_null_tokens, is_file=True, location=str(path.absolute())
    )
    return own.or_else(like)


def _names(model: str, identity: str | None) -> tuple[str, ...]:
    return (model,) if identity is None else (model, identity)


def _of_pipeline(index: Path, class_name: str) -> Origins:
    """Return what the folders beside the transformer's say, and of its texts the pipeline's class."""
    facts: dict[str, Fact[Any]] = {}
    folder = index.parent
    if (folder / "text_encoder").is_dir():
        facts["text_encoder"] = Fact(value=(str(folder / "text_encoder"),), source=str(index))
    if class_name in PIPELINE_TEXTS:
        max_tokens, cleaning = PIPELINE_TEXTS[class_name]
        source = f"{class_name} of {index}"
        facts |= {
            "max_tokens": Fact(value=max_tokens, source=source),
            "cleaning": Fact(value=cleaning, source=source),
        }
    path = folder / "vae" / CONFIG_NAME
    if path.is_file():
        config = read_json(path)
        facts |= {
            "vae": Fact(value=(str(folder / "vae"),), source=str(index)),
            "vae_scale": Fact(value=config.get("scaling_factor", VAE_SCALE), source=str(path)),
            "vae_shift": Fact(value=config.get("shift_factor") or 0.0, source=str(path)),
        }
    return Origins(**facts)


def _of_config(path: Path, pipeline: str | None, *, location: str) -> tuple[Origins, Origins]:
    """Return what a config says, and what is true of the published models that are like it."""
    stored = read_json(path)
    kind = kind_of(stored, path)
    config = {**(PIXART_DEFAULTS if kind == "pixart" else DIT_DEFAULTS), **stored}
    side, scale, is_told = config["sample_size"], 1.0, None
    if kind == "pixart":
        said, is_told = config["interpolation_scale"], config["use_additional_conditions"]
        scale = default_interpolation_scale(side) if said is None else float(said)
        is_told = side == CONDITIONED_SIDE if is_told is None else bool(is_told)
    shape = {
        "num_layers": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "head_dim": config["attention_head_dim"],
        "patch_size": config["patch_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "sample_size": side,
        "caption_channels": config["caption_channels"],
        "has_size_condition": is_told,
        "adaln": adaln_of(config),
        "num_classes": config.get("num_embeds_ada_norm"),
    }
    like = recognise(
        kind,
        shape,
        scale=scale,
        says_scale=stored.get("interpolation_scale") is not None,
        is_as_published=stored.get("_class_name") == PUBLISHED_CLASS,
        pipeline=pipeline,
        location=location,
    )
    return _of_network(kind, shape, scale=scale, source=str(path)), like


def _of_network(kind: str, shape: Mapping[str, Any], *, scale: float, source: str) -> Origins:
    is_told = bool(shape.get("has_size_condition")) if kind == "pixart" else False
    own = Origins(has_size_condition=Fact(value=is_told, source=source))
    if (side := shape["sample_size"]) is None:
        return own
    return dataclasses.replace(own, positions=Fact(value=Positions(sample_size=side, scale=scale), source=source))


def _hub_name(weights: Path) -> str:
    """Return the hub id of a folder in the hub's cache, else its path."""
    match = HUB_FOLDER.search(f"{weights.absolute().as_posix()}/")
    return weights.absolute().as_posix() if match is None else f"{match[1]}/{match[2]}"
