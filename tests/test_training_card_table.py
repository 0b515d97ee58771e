"""docs/GPU.md, "One small card": what the released models take of cards of each size is what the code reckons today."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sampling_footprint import published, requests_of

from errors import UserError
from pipelines.raw.images import aspect_buckets
from pipelines.recipe import load_recipe
from pixart.model import PIXART_XL_2_1024, PixArt, PixArtConfig
from pixart.processes.make import process_of
from pixart.processes.specs import ddpm_spec
from sampling.card import find_switches, fits, usable_bytes
from sampling.config import ON_A_GPU, SamplingConfig
from sampling.footprint import Footprint
from training.config import stage_training
from training.data.blank import SampleShape
from training.launch.memory import choose_shares, find_saving
from training.launch.reckoning import Demand
from training.launch.start import StepBytes, card_bytes
from training.loop.footprint import Step
from training.loop.zero import compute_dtype
from training.objectives.denoise import Denoise
from training.objectives.inputs import NetworkInputs
from training.objectives.objective import Trained
from training.stages.networks import blank_network, count_weights
from training.stages.trainable import trainable_of

REPOSITORY = Path(__file__).resolve().parent.parent
CARDS = (8, 12, 16, 24, 32, 40, 48, 80)
GIGABYTE = 10**9
# Name of a row: recipe, stage, resolution, text tokens, and whether the network is told each image's size.
TRAINED = {
    "LoRA, 512px": ("lora", "style", 512, 120, False),
    "LoRA, 1024px": ("lora", "style", 1024, 120, True),
    "all, 512px": ("dreambooth", "dreambooth", 512, 120, False),
    "all, 1024px": ("pixart-alpha-released", "alpha-1024", 1024, 120, True),
    "all, Sigma 1024px": ("pixart-sigma", "sigma-1024", 1024, 300, False),
    "all, Sigma 2K": ("pixart-sigma", "sigma-2k", 2048, 300, False),
}
DRAWN = {
    "drawing, 1024px": (PIXART_XL_2_1024, 120),
    "drawing, Sigma 2K": (PixArtConfig(sample_size=256, interpolation_scale=4.0), 300),
}
# As the page shortens settings.
SHORT = {
    "offload = average": "average",
    "optimizer = adamw8bit": "8bit",
    "offload = optimizer": "host",
    "zero_stage = 0": "",
    "text_encoder = 8bit": "T5 8bit",
    "vae_tiles = True": "tiles",
    "vae_dtype = bfloat16": "VAE bf16",
    "weight_dtype = int8": "int8",
}


def shorten(switches: dict[str, Any]) -> list[str]:
    return [short for name, value in switches.items() if (short := SHORT[f"{name} = {value}"])]


@cache
def page() -> dict[str, list[str]]:
    section = (REPOSITORY / "docs" / "GPU.md").read_text().split("### One small card")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {name: cells for name, *cells in rows}


def test_the_page_has_these_cards_and_rows() -> None:
    assert page()["GB"] == [f"{card}" for card in CARDS]
    assert page().keys() >= {*TRAINED, *DRAWN}


def demand_of(name: str, folder: Path) -> tuple[Demand, str]:
    """What a stage of a recipe asks of one card, as `make train` opens it but for weights: those have no values."""
    recipe, stage, resolution, num_tokens, is_told_size = TRAINED[name]
    settings = stage_training(load_recipe(REPOSITORY / "recipes" / f"{recipe}.toml"), stage)
    dtype, side = compute_dtype(settings), resolution // 8
    network = blank_network(PixArtConfig(sample_size=side, has_size_condition=is_told_size))
    trainable_of(settings).prepare(network, seed=0, dtype=dtype, key="training.trains")

    def objective(device: torch.device) -> Denoise:
        inputs = NetworkInputs(scaling_factor=1.0, shift_factor=0.0, null_label=None, dtype=dtype)
        return Denoise(process=process_of(ddpm_spec(), device=device), inputs=inputs)

    height, width = max(aspect_buckets(resolution, multiple=16), key=lambda size: size[0] * size[1])
    sample = SampleShape(channels=4, height=height // 8, width=width // 8, num_text_tokens=num_tokens, text_width=4096)
    step = Step(settings=settings, objective=objective, networks={"network": network}, sample=sample, dtype=dtype)
    tokens, share = height * width // 256, settings.global_batch_size
    size_bytes = StepBytes(
        step, path=folder / "memory.json", device=torch.device("cpu"), share=share, sample_tokens=tokens
    )
    assert isinstance(network, PixArt)
    return Demand(
        settings=settings,
        weights=count_weights({"network": Trained()}, {"network": network}),
        num_ranks=1,
        sample_tokens=tokens,
        step_bytes=size_bytes,
        batch_bytes=lambda size: 2 * step.batch_bytes(size),
    ), size_bytes.basis


def trained_cell(demand: Demand, card: int, basis: str) -> str:
    room = {"available_bytes": card_bytes(card), "basis": basis}
    switches: list[str] = []
    try:
        found = choose_shares(demand, **room)
    except UserError:
        saving = find_saving(demand, **room)
        if saving is None:
            return "no"
        switches, found = shorten(dict(saving[0])), saving[1]
    return ", ".join([*switches, f"{found.micro_batch_size} {found.kept}", f"{found.total_bytes / GIGABYTE:.1f}"])


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_training_takes_what_the_page_says(name: str, tmp_path: Path) -> None:
    demand, basis = demand_of(name, tmp_path)
    assert page()[name] == [trained_cell(demand, card, basis) for card in CARDS]


def drawn_cells(folder: Path, name: str, cards: Sequence[int]) -> list[str]:
    config, max_tokens = DRAWN[name]
    trained = published(folder, config, max_tokens=max_tokens)
    cells: list[str] = []
    known: dict[tuple[Any, ...], Any] = {}
    for card in cards:
        footprint = Footprint(
            config=SamplingConfig.model_validate(ON_A_GPU),
            trained=trained,
            requests=requests_of(1, trained.resolution),
            room_bytes=usable_bytes(card * GIGABYTE),
            known=known,
        )
        switches, moments = find_switches(footprint, footprint.moments())
        fullest = max(moment.total_bytes for moment in moments) / GIGABYTE
        cells.append(", ".join([*shorten(switches), f"{fullest:.1f}"]) if fits(footprint, moments) else "no")
    return cells


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_drawing_takes_what_the_page_says(name: str, tmp_path: Path) -> None:
    assert page()[name] == drawn_cells(tmp_path, name, CARDS)
