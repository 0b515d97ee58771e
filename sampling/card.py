"""Whether drawing fits a card, and the switches that make it fit: what `make sample PLAN=1` says of memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipelines.as_typed import typed_settings
from sampling.config import ON_A_CPU, ON_A_GPU, SamplingConfig
from sampling.footprint import DECODING, DENOISING, LEADING, READING, TESTING, Footprint, Moment
from sampling.generate import SamplingJob

GIGABYTE = 10**9
# Of a card, what is left for all that is not counted: a tenth, and no less than a driver and its kernels take.
UNCOUNTED_SHARE, UNCOUNTED_BYTES = 0.1, 800_000_000


def usable_bytes(card_bytes: int) -> int:
    """Return what of a card is there for what is counted."""
    return card_bytes - max(UNCOUNTED_BYTES, int(UNCOUNTED_SHARE * card_bytes))


def describe_memory(job: SamplingJob, asked: SamplingConfig) -> list[str]:
    """Return what the job takes at each moment, line by line, and whether that fits the card.

    `asked` is the recipe's table, in which dtypes may be left to the machine that draws.
    """
    card_bytes = find_card_bytes(asked)
    dtypes = ON_A_CPU if card_bytes is None else ON_A_GPU
    update = {name: value for name, value in dtypes.items() if getattr(asked, name) == "auto"}
    footprint = Footprint(
        config=job.config.model_copy(update=update),
        trained=job.trained,
        requests=job.in_order,
        room_bytes=None if card_bytes is None else usable_bytes(card_bytes),
    )
    moments = footprint.moments()
    lines = [_describe(moment) for moment in moments]
    if card_bytes is None:
        return lines
    if usable_bytes(card_bytes) <= 0:
        taken = _gigabytes(UNCOUNTED_BYTES)
        return [*lines, f"a card of {_gigabytes(card_bytes)} has no room for it: workspace and driver take {taken}"]
    card, room = _gigabytes(card_bytes), _gigabytes(usable_bytes(card_bytes))
    if fits(footprint, moments):
        return [*lines, f"a card of {card} has {room} for it, workspace and driver left out: it fits"]
    switches, found = find_switches(footprint, moments)
    said = typed_settings({f"sampling.{name}": value for name, value in switches.items()})
    fullest = _gigabytes(_fullest(found).total_bytes)
    end = f"{said} makes it {fullest}, which fits" if switches else "no setting takes less"
    if switches and _fullest(found).total_bytes > usable_bytes(card_bytes):
        end = f"with {said} it is still {fullest}: set a smaller sampling.size"
    return [*lines, f"a card of {card} has {room} for it, workspace and driver left out: it does not fit; {end}"]


def find_card_bytes(config: SamplingConfig) -> int | None:
    """Return the memory of the card to plan for: the one that the recipe names, else this machine's; None of a CPU."""
    if config.card_gigabytes is not None:
        return int(config.card_gigabytes * GIGABYTE)
    import torch

    if config.device == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


def fits(footprint: Footprint, moments: list[Moment]) -> bool:
    """Whether there is room for the fullest of the moments."""
    assert footprint.room_bytes is not None
    return _fullest(moments).total_bytes <= footprint.room_bytes


def find_switches(footprint: Footprint, moments: list[Moment]) -> tuple[dict[str, Any], list[Moment]]:
    """Return settings that make the moments fit, or as nearly as settings can, and the moments under them.

    Those that cost least come first; what would not help is left as it is.
    """
    chosen: dict[str, Any] = {}
    while not fits(footprint, moments):
        moment = _fullest(moments)
        for update in _smaller(footprint.config, moment):
            tried = replace(footprint, config=footprint.config.model_copy(update=update))
            found = tried.moments()
            if sum(item.total_bytes for item in found if item.name == moment.name) < moment.total_bytes:
                chosen |= update
                footprint, moments = tried, found
                break
        else:
            break
    return chosen, moments


def _smaller(config: SamplingConfig, moment: Moment) -> list[dict[str, Any]]:
    """Return what may make a moment smaller, that which costs least first."""
    half = {"batch_size": config.batch_size // 2}
    candidates: dict[str, list[dict[str, Any]]] = {
        READING: [{"text_encoder": "8bit"}, {"text_encoder": "cpu"}],
        TESTING: [{"vae_dtype": "bfloat16"}, {"weight_dtype": "int8"}],
        LEADING: [{"compile": False}, {"vae_dtype": "bfloat16"}, {"weight_dtype": "int8"}],
        DENOISING: [half, {"compile": False}, {"weight_dtype": "int8"}],
        DECODING: [
            {"vae_tiles": True},
            half,
            {"compile": False},
            {"vae_dtype": "bfloat16"},
            {"weight_dtype": "int8"},
        ],
    }
    return [update for update in candidates[moment.name] if update != {"batch_size": 0}]


def _fullest(moments: list[Moment]) -> Moment:
    return max(moments, key=lambda moment: moment.total_bytes)


def _describe(moment: Moment) -> str:
    parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in moment.parts.items())
    return f"memory while {moment.name}: {_gigabytes(moment.total_bytes)} ({parts})"


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / GIGABYTE:.3g} GB"
