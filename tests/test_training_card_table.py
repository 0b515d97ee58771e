"""What the released models take of cards of each size, as the docs have it, is what the code reckons today."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sampling_footprint import published, requests_of

from errors import UserError
from pipelines.raw.images import aspect_buckets
from pipelines.recipe import load_recipe
from pixart.branching import new_branch
from pixart.dit import DiT
from pixart.model import PIXART_XL_2_1024, PixArt, PixArtConfig
from pixart.processes.ddpm import DDPM
from pixart.processes.make import process_of
from sampling.card import find_switches, fits, usable_bytes
from sampling.config import ON_A_GPU, SamplingConfig
from sampling.footprint import Footprint
from training.config import StageTraining, stage_training
from training.data.blank import SampleShape
from training.launch.memory import choose_shares, find_saving
from training.launch.reckoning import Demand
from training.launch.start import StepBytes, card_bytes
from training.loop.footprint import Step
from training.loop.zero import compute_dtype
from training.objectives.consistency import Consistency
from training.objectives.denoise import Denoise
from training.objectives.inputs import NetworkInputs
from training.objectives.matching import DistributionMatching
from training.objectives.objective import Objective
from training.stages.critics import add_critic
from training.stages.networks import blank_network, count_weights
from training.stages.shared_weights import SharedWeights
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
# The same of docs/FAST.md.
DISTILLED = {
    "α, all weights": ("pixart-lcm", "lcm", 1024, 120, True),
    "α, LoRA": ("pixart-lcm", "lcm-lora", 1024, 120, True),
    "Σ, all weights": ("pixart-sigma-lcm", "lcm", 1024, 300, False),
}
FINISHED = {"α": ("pixart-lcm", "dmd", 1024, 120, True)}
# And of docs/CONTROL.md.
LED = {
    "α": ("pixart-control", "control", 1024, 120, True),
    "Σ": ("pixart-sigma-control", "control", 1024, 300, False),
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
def page(file: str, title: str) -> dict[str, list[str]]:
    """Return the table under a title, by the names of its rows."""
    section = (REPOSITORY / "docs" / file).read_text().split(f"# {title}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {name: cells for name, *cells in rows}


SMALL_CARD, STUDENT, BRANCH = ("GPU.md", "One small card"), ("FAST.md", "What training costs"), ("CONTROL.md", "Cards")
FINISH = ("FAST.md", "A finish for one or two steps")


def test_the_pages_have_these_cards_and_rows() -> None:
    table = page(*SMALL_CARD)
    assert table["GB"] == [f"{card}" for card in CARDS]
    assert table.keys() >= {*TRAINED, *DRAWN}
    assert page(*STUDENT).keys() >= DISTILLED.keys() and page(*BRANCH).keys() >= LED.keys()


def objective_of(settings: StageTraining, device: torch.device, *, null_tokens: int) -> Objective:
    process, dtype = process_of(settings.process_spec, device=device), compute_dtype(settings)
    inputs = NetworkInputs(
        scaling_factor=1.0,
        shift_factor=0.0,
        null_label=None,
        dtype=dtype,
        control="control-hed" if settings.has_control else None,
    )
    if settings.objective == "denoise":
        return Denoise(process=process, inputs=inputs)
    assert isinstance(process, DDPM)
    null = torch.empty(null_tokens, 4096, dtype=torch.bfloat16, device=device)
    matching, guidance = settings.matching, settings.consistency.guidance_range
    if settings.objective == "distribution_matching":
        guidance = (matching.guidance_scale, matching.guidance_scale)
    student = Consistency(process=process, inputs=inputs, null_text=null, guidance_range=guidance, huber_c=0.001)
    if settings.objective == "consistency":
        return student
    return DistributionMatching(
        student=student,
        schedules=matching.times,
        compared=(matching.compared_from, matching.compared_to),
        consistency_weight=matching.consistency_weight,
    )


def networks_of(settings: StageTraining, config: PixArtConfig) -> dict[str, DiT | PixArt]:
    """Return the networks of a stage, whose teacher is what it starts from, without values."""
    network = blank_network(replace(config, has_guidance_condition=settings.is_told_guidance))
    assert isinstance(network, PixArt)
    own = dict(network.named_parameters())
    if settings.has_control:
        with torch.device("meta"):
            network.control = new_branch(config, settings.control_copies)
    trainable_of(settings).prepare(network, seed=0, dtype=compute_dtype(settings), key="training.trains")
    if settings.objective == "denoise":
        return {"network": network}
    networks: dict[str, DiT | PixArt] = {"network": network}
    if settings.objective == "consistency" or settings.matching.consistency_weight:
        networks["target"] = SharedWeights(network, is_partitioned=False).average_of(network)
    teacher = blank_network(config).requires_grad_(False)
    # That equal ones are shared is told by values, see test_training_shared_weights.py.
    held = {name: weight for name, weight in own.items() if not weight.requires_grad}
    teacher.load_state_dict(held, strict=False, assign=True)
    if settings.objective == "distribution_matching":
        add_critic(network, teacher)
    return networks | {"teacher": teacher}


def demand_of(row: tuple[str, str, int, int, bool], folder: Path) -> tuple[Demand, str]:
    """What a stage of a recipe asks of one card, as `make train` opens it but for weights: those have no values."""
    recipe, stage, resolution, num_tokens, is_told_size = row
    settings = stage_training(load_recipe(REPOSITORY / "recipes" / f"{recipe}.toml"), stage)
    networks = networks_of(settings, PixArtConfig(sample_size=resolution // 8, has_size_condition=is_told_size))

    def objective(device: torch.device) -> Objective:
        return objective_of(settings, device, null_tokens=num_tokens)

    height, width = max(aspect_buckets(resolution, multiple=16), key=lambda size: size[0] * size[1])
    sample = SampleShape(
        channels=4,
        height=height // 8,
        width=width // 8,
        num_text_tokens=num_tokens,
        text_width=4096,
        channels_beside={"control-hed": 4} if settings.has_control else {},
    )
    dtype = compute_dtype(settings)
    step = Step(settings=settings, objective=objective, networks=networks, sample=sample, dtype=dtype)
    tokens, share = height * width // 256, settings.global_batch_size
    size_bytes = StepBytes(
        step, path=folder / "memory.json", device=torch.device("cpu"), share=share, sample_tokens=tokens
    )
    roles = objective(torch.device("meta")).networks
    return Demand(
        settings=settings,
        weights=count_weights(roles, networks),
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
@pytest.mark.parametrize(
    ("where", "name", "row"),
    [
        (where, name, row)
        for where, rows in ((SMALL_CARD, TRAINED), (STUDENT, DISTILLED), (FINISH, FINISHED), (BRANCH, LED))
        for name, row in rows.items()
    ],
)
def test_training_takes_what_the_page_says(where: Any, name: str, row: Any, tmp_path: Path) -> None:
    demand, basis = demand_of(row, tmp_path)
    table = page(*where)
    assert table[name] == [trained_cell(demand, int(card), basis) for card in table["GB"]]


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
    assert page(*SMALL_CARD)[name] == drawn_cells(tmp_path, name, CARDS)
