"""What can be sampled from: a run's checkpoint and all that it says about itself, or a diffusers transformer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.images import aspect_buckets
from pipelines.models import resolve_model
from sampling.config import EncoderConfig

if TYPE_CHECKING:
    from pixart.dit import DiT
    from pixart.model import PixArt

KINDS = {"ada_norm_zero": "dit", "ada_norm_single": "pixart"}
VAE_FACTOR = 8
DEFAULT_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A transformer and what belongs to it.

    Attributes:
        name: for people, such as "stage 2, step 4000".
        kind: "dit" (classes) or "pixart" (text).
        model_folder: the diffusers folder of its weights.
        identity: hash of the weights.
        resolution: base resolution in pixels.
        buckets: (height, width) in pixels that it was trained at.
        text: model, revision and max_tokens of its text encoder; None for a DiT.
        vae: model and revision; scaling_factor and shift_factor where the training recorded them.
        schedule: of the diffusion it was trained with, as diffusers' schedulers name it.
    """

    name: str
    kind: str
    model_folder: Path
    identity: str
    num_classes: int | None
    resolution: int
    buckets: tuple[tuple[int, int], ...]
    text: dict[str, Any] | None
    vae: dict[str, Any]
    schedule: dict[str, Any]

    def load(self) -> PixArt | DiT:
        """Read the transformer, in evaluation mode, on the CPU."""
        from pixart.convert import load_diffusers

        return load_diffusers(self.model_folder).eval().requires_grad_(False)


def open_run_checkpoint(run: Path, stage_name: str) -> Checkpoint:
    """Open what `latest` points to in `RUN/training/<stage name>`; the weights are read later.

    Raises:
        FileNotFoundError: the stage has no checkpoint yet.
        ValueError: the checkpoint has no EMA weights.
    """
    stage_folder = run / "training" / stage_name
    latest = stage_folder / "latest"
    if not latest.is_file():
        stage = stage_name.removeprefix("stage").replace("-", " PHASE=")
        raise FileNotFoundError(f"{stage_folder} has no checkpoint: run `make train RUN={run} STAGE={stage}` first")
    folder = stage_folder / latest.read_text(encoding="utf-8").strip()
    trainer = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    if trainer["weights"] != "ema":
        raise ValueError(f"{folder} holds {trainer['weights']} weights, samples are drawn from ema weights")
    return Checkpoint(
        name=f"{stage_name.replace('stage', 'stage ')}, step {trainer['step']}",
        kind=trainer["kind"],
        model_folder=folder / "model",
        identity=resolve_model(str(folder / "model")).identity,
        num_classes=_read_config(folder / "model").get("num_embeds_ada_norm") if trainer["kind"] == "dit" else None,
        resolution=trainer["resolution"],
        buckets=_trained_sizes(trainer["resolution"], trainer["buckets"]),
        text=trainer["text"],
        vae=trainer["vae"],
        schedule=trainer["schedule"],
    )


def open_transformer_folder(folder: Path, encoders: EncoderConfig) -> Checkpoint:
    """Open a diffusers folder of a PixArt or DiT transformer, or a pipeline's folder with such a `transformer/`.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is another kind of model.
    """
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"sampling.checkpoint {folder} has no config.json of a transformer")
    config = _read_config(folder)
    kind = KINDS.get(config.get("norm_type", ""))
    if kind is None:
        raise ValueError(f"sampling.checkpoint {folder} is a {config.get('_class_name')}, not a PixArt or DiT")
    resolution = config["sample_size"] * VAE_FACTOR
    text = {"model": encoders.text_model, "revision": encoders.text_revision, "max_tokens": encoders.max_tokens}
    return Checkpoint(
        name=folder.parent.name if folder.name in ("transformer", "model") else folder.name,
        kind=kind,
        model_folder=folder,
        identity=resolve_model(str(folder)).identity,
        num_classes=config.get("num_embeds_ada_norm") if kind == "dit" else None,
        resolution=resolution,
        buckets=aspect_buckets(resolution) if kind == "pixart" else ((resolution, resolution),),
        text=text if kind == "pixart" else None,
        vae={"model": encoders.vae_model, "revision": encoders.vae_revision},
        schedule=DEFAULT_SCHEDULE,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _trained_sizes(resolution: int, buckets: list[str]) -> tuple[tuple[int, int], ...]:
    """Return (height, width) of the trainer's bucket names "HxW"; none at all means square."""
    if not buckets:
        return ((resolution, resolution),)
    sizes = [bucket.split("x") for bucket in buckets]
    return tuple((int(height), int(width)) for height, width in sizes)
