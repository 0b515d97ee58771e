"""The one place that compares what weights were trained with and what they are to be used with.

Nothing here needs torch.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pixart.origins import Fact, Origins, Positions

# What may differ on purpose, by the names that a recipe gives: text encoder, tokens, cleaning, latents, positions.
COMPARED = ("text_encoder", "max_tokens", "cleaning", "vae", "positions")
# Rules of cleaning between which T5 sees no difference: its tokenizer drops space around a text.
ALIKE_CLEANINGS = ({"strip", "none"},)
# A commit of the hub, whole or cut; names of branches and tags may mean another one tomorrow.
COMMIT = re.compile(r"[0-9a-f]{7,40}")
# What may be in doubt of a difference.
NAMES_DIFFER = "whether they are the same, nothing here tells"
LOOKS_ALIKE = "whether they are those weights, nothing here tells"

# Of two lists of names: whether they are of one model, None where nothing tells.
Likeness = Callable[[Sequence[str], Sequence[str]], bool | None]


@dataclass(frozen=True, kw_only=True)
class Uses:
    """What weights are to be used with, as features or a recipe say it; for each see `Origins`. None counts for all."""

    text_encoder: tuple[str, ...] | None = None
    text_revision: str | None = None
    max_tokens: int | None = None
    cleaning: str | None = None
    vae: tuple[str, ...] | None = None
    vae_revision: str | None = None
    vae_scale: float | None = None
    vae_shift: float | None = None
    positions: Positions | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Something that is to be otherwise than the weights were trained with.

    Attributes:
        name: one of `COMPARED`.
        used: what is to be used, in words or as a recipe has it.
        trained: what the weights were trained with, in the same way, and where that is known from.
        doubt: None where it is sure, else in words what nothing tells: whether models of two names are one, or whether
            the weights are the published ones that they look like.
    """

    name: str
    used: str
    trained: str
    doubt: str | None = None


def differences(
    origins: Origins, uses: Uses, *, is_same_text_encoder: Likeness, is_same_codec: Likeness
) -> list[Difference]:
    """Return what is not as the weights were trained, as far as it is known; the order is that of `COMPARED`."""
    found = [
        _models("text_encoder", uses.text_encoder, origins.text_encoder, is_same_text_encoder),
        _revisions(
            "text_encoder",
            (uses.text_encoder, uses.text_revision),
            (origins.text_encoder, origins.text_revision),
            is_same_text_encoder,
        ),
        _values("max_tokens", uses.max_tokens, origins.max_tokens),
        _cleanings(uses.cleaning, origins.cleaning),
        _models("vae", uses.vae, origins.vae, is_same_codec),
        _revisions("vae", (uses.vae, uses.vae_revision), (origins.vae, origins.vae_revision), is_same_codec),
        _values("vae", uses.vae_scale, origins.vae_scale, unit="scale "),
        _values("vae", uses.vae_shift, origins.vae_shift, unit="shift "),
        _positions(uses.positions, origins.positions),
    ]
    return [difference for difference in found if difference is not None]


def _models(
    name: str, used: tuple[str, ...] | None, trained: Fact[tuple[str, ...]] | None, likeness: Likeness
) -> Difference | None:
    if used is None or trained is None or (is_same := likeness(trained.value, used)):
        return None
    doubt = NAMES_DIFFER if is_same is None else None
    return _difference(name, repr(used[0]), repr(trained.value[0]), trained, doubt=doubt)


def _revisions(
    name: str,
    used: tuple[tuple[str, ...] | None, str | None],
    trained: tuple[Fact[tuple[str, ...]] | None, Fact[str] | None],
    likeness: Likeness,
) -> Difference | None:
    """Compare commits of one model of the hub, where both are known; two whose weights are the same are one."""
    (used_names, used_revision), (trained_names, fact) = used, trained
    if used_names is None or used_revision is None or trained_names is None or fact is None:
        return None
    model = used_names[0]
    if model != trained_names.value[0]:
        return None
    shorter, longer = sorted((used_revision, fact.value), key=len)
    if not (COMMIT.fullmatch(shorter) and COMMIT.fullmatch(longer)) or longer.startswith(shorter):
        return None
    if likeness((f"{model}@{fact.value}",), (f"{model}@{used_revision}",)):
        return None
    return _difference(name, f"{model!r} at revision {used_revision}", f"revision {fact.value}", fact)


def _values(name: str, used: float | None, trained: Fact[Any] | None, *, unit: str = "") -> Difference | None:
    if used is None or trained is None or math.isclose(used, trained.value, rel_tol=1e-5, abs_tol=1e-9):
        return None
    return _difference(name, f"{unit}{used:g}", f"{unit}{trained.value:g}", trained)


def _cleanings(used: str | None, trained: Fact[str] | None) -> Difference | None:
    if used is None or trained is None or used == trained.value:
        return None
    if any({used, trained.value} <= alike for alike in ALIKE_CLEANINGS):
        return None
    return _difference("cleaning", repr(used), repr(trained.value), trained)


def _positions(used: Positions | None, trained: Fact[Positions] | None) -> Difference | None:
    """Compare positions at one resolution: at another they may well be others, as the paper's are at 512 pixels."""
    if used is None or trained is None or used.sample_size != trained.value.sample_size:
        return None
    if math.isclose(used.scale, trained.value.scale, rel_tol=1e-5):
        return None
    return _difference("positions", f"{used.scale:g}", f"{trained.value.scale:g}", trained)


def _difference(name: str, used: str, trained: str, fact: Fact[Any], *, doubt: str | None = None) -> Difference:
    doubt = doubt if fact.is_sure else LOOKS_ALIKE
    return Difference(name=name, used=used, trained=f"{trained} ({fact.source})", doubt=doubt)
