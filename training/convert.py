"""`python -m training.convert SOURCE TARGET`: weights between the layouts of diffusers and of the original code.

A folder gets `transformer/` and, as what the weights were trained with belongs to them, `scheduler/`: this project and
diffusers open it. A file `.pth`, `.pt` or `.safetensors` gets the names of PixArt's or DiT's own code.
With `--reparameterize` a class-conditional DiT becomes the PixArt that stage 2 starts from, and is compared with it.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from encoders.weights import identity_of
from errors import UserError
from pipelines.as_typed import typed_path
from pipelines.command import run_command
from pipelines.engine.progress import console, get_logger
from pipelines.store.bases import adapter_identity
from pipelines.store.checkpoints import MODEL, TRAINER, named_checkpoint
from pipelines.store.files import atomic_file, atomic_folder, atomic_write_json, sha256_file
from pixart.adapters import merge
from pixart.belonging import compare_base
from pixart.convert import PUBLISHED_HEADS, original_weights, save_diffusers
from pixart.dit import DiT
from pixart.layouts import DERIVED_KEYS, NULL_CAPTION, require_finite
from pixart.model import PixArt, PixArtConfig
from pixart.origins import ORIGINS_FILE, Fact, Origins
from pixart.processes.make import process_of
from pixart.processes.specs import SCHEDULER_FILE, SCHEDULER_FOLDER, network_schedule_of, with_student_of
from pixart.reparameterize import reparameterize
from pixart.tensor_files import NUM_HEADS, ORIGINS, read_weight_file
from pixart.transformer_config import to_json
from pixart.weight_files import is_original_name
from training.exports.average import put_average, require_length
from training.exports.branch import convert_branch, find_source
from training.exports.card import CARD, Card
from training.exports.null_caption import known_null_caption
from training.exports.pipeline import find_parts, write_parts
from training.exports.students import describe_one_guidance, with_one_guidance
from training.exports.typed_adapters import find_adapter, open_adapter, typed_weights
from training.stages.networks import count_parameters
from training.stages.stage import StartingPoint, find_weights, from_checkpoint
from training.stages.starts import load_network, with_adapters

log = get_logger("convert")

# As in a pipeline of diffusers.
WEIGHTS_FOLDER = "transformer"
TIMESTEP = 500  # of the paper, section 2.3
NUM_COMPARED = 4


def main(argv: Sequence[str] | None = None) -> None:
    """Convert SOURCE to TARGET and say what it is.

    Raises:
        UserError: TARGET exists, SOURCE is neither network, is no DiT where one is needed, or has no original layout.
    """
    options = _parse(argv)
    if options.target.exists():
        raise UserError(f"{options.target} exists already: name a new one, or remove it first")
    length = require_length(options.ema)
    branch = find_source(options.source)
    if branch is not None:
        _require_plain_branch(options)
        convert_branch(branch, options.target, location=options.source, say=_say)
        return
    start = _find_start(options.source)
    source = start.path
    assert source is not None, "only a stage starts from nothing"
    network = load_network(
        source, options.timestep_shift, sample_size=options.sample_size, key=f"SOURCE {source}", say=_say
    )
    adapters = _wanted_adapters(start, options)
    network = with_adapters(
        network, start, key=f"SOURCE {options.source}", leaves_out=[path for _, path, _ in adapters]
    )
    if length is not None:
        put_average(network, start, length, source=options.source, say=_say)
    origins = start.origins
    _say(f"{source}: {origins.describe(reads_text=network.kind == 'pixart')}")
    process = start.process if origins.process is None else origins.process.value
    merged = {}
    if adapters:
        merged, process = _add_adapters(network, start, adapters, process=process)
    former = process
    network, process = with_one_guidance(network, process, options.cfg, source=f"SOURCE {options.source}")
    origins = _kept(origins, process, source=source, is_reparameterised=options.reparameterize)
    if options.reparameterize:
        if network.kind != "dit":
            raise UserError(f"SOURCE ({source}) is a PixArt: only a class-conditional DiT is re-parameterised")
        _say(f"{source}: {_describe(network)}")
        torch.manual_seed(options.seed)
        dit = network.float()
        network = reparameterize(dit, _pixart_config(dit, options))
        _compare(dit, network)
    if is_original_name(options.target.name):
        if options.pipeline:
            raise UserError(f"{options.target} is a file, and a pipeline is a folder: name one, or leave PIPELINE out")
        derived = {} if options.reparameterize else _derived(start, origins, network)
        _write_original(network, options.target, derived, origins=origins, process=process)
    else:
        card = Card(
            checkpoint=_checkpoint_of(start),
            title=options.target.name,
            origins=origins,
            merged=merged,
            average_length=length,
        )
        _write(network, options.target, process, card=card, is_pipeline=options.pipeline)
    _say(f"{options.target}: {_describe(network)}")
    for line in describe_one_guidance(former, process):
        _say(f"{options.target}: {line}")


def _require_plain_branch(options: argparse.Namespace) -> None:
    """Refuse what is asked of whole networks alone, where SOURCE is a control branch."""
    asked = {
        "LORA": options.lora,
        "EMA": options.ema,
        "PIPELINE": options.pipeline,
        "REPARAMETERIZE": options.reparameterize,
    }
    for name, value in asked.items():
        if value:
            raise UserError(f"SOURCE ({options.source}) is a control branch, and {name} is for whole networks")


def _kept(origins: Origins, process: Mapping[str, Any], *, source: Path, is_reparameterised: bool) -> Origins:
    """Return what holds for the weights that are written, too: fresh ones that read the text were trained with none."""
    own = Fact(value=dict(process), source=str(source))
    if is_reparameterised:
        return Origins(vae=origins.vae, vae_scale=origins.vae_scale, vae_shift=origins.vae_shift, process=own)
    return replace(origins, process=own)


def _find_start(source: str) -> StartingPoint:
    """Return the weights that a stage's folder or one of its checkpoints means: the average; else what is named."""
    checkpoint = named_checkpoint(typed_path(source))
    return find_weights(source, key="SOURCE") if checkpoint is None else from_checkpoint(checkpoint)


def _wanted_adapters(start: StartingPoint, options: argparse.Namespace) -> list[tuple[str, Path, float]]:
    """Return what LORA and WEIGHTS ask for: each adapter as it is called, where its file lies, and its weight.

    As in drawing, WEIGHTS alone is for the adapter that SOURCE is a checkpoint of, and such a one is not added twice.
    """
    locations = [location.strip() for location in options.lora.split(",")] if options.lora else []
    if options.weights and not locations and start.adapters:
        locations = [str(start.adapters[-1])]
    if not locations and not options.weights:
        return []
    weights = typed_weights(options.weights, locations)
    return [(location, find_adapter(location), weight) for location, weight in zip(locations, weights, strict=True)]


def _add_adapters(
    network: DiT | PixArt, start: StartingPoint, wanted: Sequence[tuple[str, Path, float]], *, process: dict[str, Any]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Add the changes of adapters, each times its weight, as drawing with them does.

    Returns what the card says, and the process, which adapters of few steps make a student's.
    """
    if network.kind != "pixart":
        raise UserError(f"LORA is for a PixArt, but SOURCE ({start.path}) is a class-conditional DiT")
    source = start.path
    assert source is not None, "only a stage starts from nothing"
    identity = identity_of(source)
    adapters, merged = [], {}
    for location, path, weight in wanted:
        adapter = open_adapter(path, network)
        for note in (
            *adapter.notes,
            *compare_base(
                adapter.path,
                adapter.belongs_to,
                title=str(source),
                location=str(source),
                identity=identity,
                adapters=set(map(adapter_identity, start.adapters)),
                process=process,
            ),
        ):
            log.warning(note)
        _say(f"{adapter.path}: {len(adapter.layers)} layers are changed by {weight:g} times the adapter's change")
        adapters.append((adapter, weight))
        if weight:
            process = with_student_of(process, adapter.belongs_to)
        said = f"`{location}` (sha256:{sha256_file(adapter.path)})"
        merged[said] = merged.get(said, 0.0) + weight
    merge(network.float(), adapters)
    return merged, process


def _say(line: str) -> None:
    console.print(line, soft_wrap=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.convert", description="Weights between diffusers' layout and the original ones."
    )
    parser.add_argument(
        "source",
        help="stage of a run, diffusers folder or hub id, original file (.pth, .pt, .safetensors) of PixArt or DiT",
    )
    parser.add_argument(
        "target",
        type=lambda text: typed_path(text),
        help="what to write, must not exist: a folder, with transformer/ and scheduler/ as diffusers has them, or a "
        "file .pth, .pt or .safetensors with the names of PixArt's or DiT's own code",
    )
    parser.add_argument("--reparameterize", action="store_true", help="turn a class-conditional DiT into a PixArt")
    parser.add_argument("--lora", default="", help="adapters to merge: files, folders or stages, commas between them")
    parser.add_argument("--weights", default="", help="how much of each, commas between them; 1 unless given")
    parser.add_argument(
        "--cfg",
        type=float,
        help="guidance to fold into weights distilled to few steps that are told theirs; 4.5 or the nearest of theirs",
    )
    parser.add_argument("--ema", default="", help="relative length of the average, of a stage with ema = 'power'")
    parser.add_argument(
        "--pipeline",
        action="store_true",
        help="make the folder a whole pipeline of diffusers, with text encoder and VAE where they are on this machine",
    )
    parser.add_argument("--caption-channels", type=int, default=4096, help="width of the text encoder (T5-XXL: 4096)")
    parser.add_argument("--adaln", choices=("single", "per-block"), default="single", help="per-block: Figure 6")
    parser.add_argument("--sample-size", type=int, default=32, help="latent side, for files that hold no positions")
    parser.add_argument(
        "--timestep-shift",
        type=int,
        choices=(0, 1),
        help="of a DiT in diffusers' layout: 0 for official weights that were converted, as facebook/DiT-XL-2-256",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the fresh weights that read the text")
    return parser.parse_args(argv)


def _pixart_config(dit: DiT, options: argparse.Namespace) -> PixArtConfig:
    shape = dit.config
    return PixArtConfig(
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        patch_size=shape.patch_size,
        in_channels=shape.in_channels,
        out_channels=shape.out_channels,
        caption_channels=options.caption_channels,
        sample_size=shape.sample_size,
        adaln=options.adaln,
    )


@torch.no_grad()
def _compare(dit: DiT, model: PixArt) -> None:
    """Print how far the outputs are apart at the timestep of the conversion, for random latents and texts."""
    shape = model.config
    latents = torch.randn(NUM_COMPARED, shape.in_channels, shape.sample_size, shape.sample_size)
    text = torch.randn(NUM_COMPARED, 8, shape.caption_channels)
    moments = torch.full((NUM_COMPARED,), TIMESTEP)
    expected = dit(latents, moments, None)
    difference = float((model(latents, moments, text) - expected).abs().max())
    scale = float(expected.abs().max())
    console.print(f"at t = {TIMESTEP} the output is the DiT's without class to {difference:.1e} (largest: {scale:.2g})")


def _write(
    network: DiT | PixArt,
    folder: Path,
    process: Mapping[str, Any],
    *,
    card: Card,
    is_pipeline: bool,
) -> None:
    """Write all or nothing under the folder's name: the weights, and beside them what they were trained with."""
    scheduler, parts = process_of(process).scheduler_config(), None
    if is_pipeline:
        if network.kind != "pixart":
            raise UserError("SOURCE is a DiT, and pipelines are made of a PixArt alone: leave PIPELINE out")
        parts = find_parts(network.config, card.origins)
        for name, part in (("text encoder", parts.text_encoder), ("VAE", parts.vae)):
            if part is None:
                log.warning(f"{folder} is without its {name}, which is not on this machine: {CARD} says how to pass it")
    with atomic_folder(folder) as temporary:
        save_diffusers(network, temporary / WEIGHTS_FOLDER)
        atomic_write_json(temporary / SCHEDULER_FOLDER / SCHEDULER_FILE, scheduler)
        atomic_write_json(temporary / ORIGINS_FILE, card.origins.to_json())
        if parts is not None:
            write_parts(temporary, parts, scheduler_class=scheduler["_class_name"])
        class_name = to_json(network.config)["_class_name"] if parts is None else parts.class_name
        card.write(temporary, class_name=class_name, parts=parts)


def _checkpoint_of(start: StartingPoint) -> Path | None:
    """Return the folder of the checkpoint of ours that weights are of, be they named by their own folder in it."""
    if start.checkpoint is not None:
        return start.checkpoint.path
    folder = None if start.path is None or start.path.name != MODEL else start.path.parent
    return folder if folder is not None and (folder / TRAINER).is_file() else None


def _derived(start: StartingPoint, origins: Origins, network: DiT | PixArt) -> dict[str, Tensor]:
    """Return what an original file holds beside weights: no network of ours has a place for it."""
    source, checkpoint = start.path, _checkpoint_of(start)
    assert source is not None, "only a stage starts from nothing"
    if checkpoint is not None and network.kind == "pixart":
        null = known_null_caption(checkpoint, origins, width=network.config.caption_channels)
        return {} if null is None else {NULL_CAPTION: null}
    if source.is_dir():
        return {}
    derived = {name: value for name, value in read_weight_file(source).tensors.items() if name in DERIVED_KEYS}
    require_finite(derived, where=f"SOURCE {source}")
    return derived


def _write_original(
    network: DiT | PixArt, path: Path, derived: Mapping[str, Tensor], *, origins: Origins, process: Mapping[str, Any]
) -> None:
    """Write all or nothing under the file's name; PixArt's own files have their weights under `state_dict`.

    Heads of a width that was never published are noted beside them, and what a PixArt was trained with, which the
    original code passes over.
    """
    try:
        weights = {**original_weights(network), **derived}
    except UserError as error:
        raise UserError(f"{path} would be no original file: {error}; name a folder, which says such things") from None
    if network_schedule_of(process) is None:
        log.warning(
            f"{path} says to this project alone that the weights were trained with {process['name']}: original code "
            "takes ddpm's noise"
        )
    noted: dict[str, Any] = {} if network.config.width in PUBLISHED_HEADS else {NUM_HEADS: network.config.num_heads}
    if noted:
        log.info(f"{path} says beside the weights that it has {noted[NUM_HEADS]} heads: no width like it was published")
    if network.kind == "pixart" and NULL_CAPTION not in weights:
        log.warning(
            f"{path} has no {NULL_CAPTION}, what the text encoder gives for no text: original code draws it at random "
            "and needs it for guidance; this project computes it"
        )
    if network.kind == "pixart":
        noted[ORIGINS] = json.dumps(origins.to_json())
    with atomic_file(path) as temporary:
        if path.suffix.lower() == ".safetensors":
            save_file(weights, temporary, metadata={"format": "pt", **{name: str(n) for name, n in noted.items()}})
        elif network.kind == "dit" and not noted:
            torch.save(weights, temporary)
        else:  # DiT's own code looks for an average in a file with more than weights
            torch.save({"state_dict" if network.kind == "pixart" else "ema": weights, **noted}, temporary)


def _describe(network: DiT | PixArt) -> str:
    shape = network.config
    size = f"{shape.num_layers} blocks of width {shape.width}, latents of {shape.sample_size}"
    return f"{shape.title}, {count_parameters(network) / 1e6:,.2f}M parameters, {size}"


if __name__ == "__main__":
    sys.exit(run_command("convert", main))
