"""`python -m training.convert SOURCE FOLDER`: published weights as a folder that this project and diffusers open.

FOLDER gets `transformer/` and, as what the weights were trained with belongs to them, `scheduler/`.
With `--reparameterize` a class-conditional DiT becomes the PixArt that stage 2 starts from, and is compared with it.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from errors import UserError
from pipelines.command import run_command
from pipelines.engine.progress import console
from pipelines.store.files import atomic_folder, atomic_write_json
from pixart.convert import save_diffusers
from pixart.dit import DiT
from pixart.model import PixArt, PixArtConfig
from pixart.processes.make import process_of
from pixart.processes.specs import SCHEDULER_FILE, SCHEDULER_FOLDER
from pixart.reparameterize import reparameterize
from training.stages.networks import count_parameters
from training.stages.stage import find_weights
from training.stages.starts import load_network

# As in a pipeline of diffusers.
WEIGHTS_FOLDER = "transformer"
TIMESTEP = 500  # of the paper, section 2.3
NUM_COMPARED = 4


def main(argv: Sequence[str] | None = None) -> None:
    """Convert SOURCE to FOLDER and say what it is.

    Raises:
        UserError: FOLDER exists, SOURCE is neither network, or is no DiT where one is needed.
    """
    options = _parse(argv)
    if options.folder.exists():
        raise UserError(f"{options.folder} exists already: name a new folder, or remove it first")
    start = find_weights(options.source, key="SOURCE")
    source = start.path
    assert source is not None, "only a stage starts from nothing"
    network = load_network(
        source, options.timestep_shift, sample_size=options.sample_size, key=f"SOURCE {source}", say=_say
    ).float()
    if options.reparameterize:
        if network.kind != "dit":
            raise UserError(f"SOURCE ({source}) is a PixArt: only a class-conditional DiT is re-parameterised")
        _say(f"{source}: {_describe(network)}")
        torch.manual_seed(options.seed)
        dit, network = network, reparameterize(network, _pixart_config(network, options))
        _compare(dit, network)
    _write(network, options.folder, start.process)
    _say(f"{options.folder}: {_describe(network)}")


def _say(line: str) -> None:
    console.print(line, soft_wrap=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.convert", description="Published weights as a folder of ours."
    )
    parser.add_argument(
        "source", help="diffusers folder or hub id, original file (.pth, .pt, .safetensors) of PixArt or DiT"
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="folder to write, with transformer/ and scheduler/ as diffusers has them; must not exist",
    )
    parser.add_argument("--reparameterize", action="store_true", help="turn a class-conditional DiT into a PixArt")
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


def _write(network: DiT | PixArt, folder: Path, process: Mapping[str, Any]) -> None:
    """Write all or nothing under the folder's name: the weights, and beside them what they were trained with."""
    with atomic_folder(folder) as temporary:
        save_diffusers(network, temporary / WEIGHTS_FOLDER)
        atomic_write_json(temporary / SCHEDULER_FOLDER / SCHEDULER_FILE, process_of(process).scheduler_config())


def _describe(network: DiT | PixArt) -> str:
    shape = network.config
    size = f"{shape.num_layers} blocks of width {shape.width}, latents of {shape.sample_size}"
    return f"{shape.title}, {count_parameters(network) / 1e6:,.2f}M parameters, {size}"


if __name__ == "__main__":
    sys.exit(run_command("convert", main))
