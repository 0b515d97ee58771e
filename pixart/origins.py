"""What weights were trained with, each fact with where it is known from; `evidence.py` gathers it.

Nothing here needs torch. None is what nobody says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from errors import UserError
from pixart.processes.specs import is_spec, process_title, student_of

# The record in an export of ours, beside the weights' folder or in it.
ORIGINS_FILE = "origins.json"
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Fact(Generic[Value]):
    """A value, and where it is known from, such as "published as PixArt-alpha/PixArt-XL-2-512x512" or a file.

    It is not sure where the weights only look like those it is true of.
    """

    value: Value
    source: str
    is_sure: bool = True


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Positions of image tokens: of latents `sample_size` a side, divided by `scale`."""

    sample_size: int
    scale: float

    def scale_at(self, sample_size: int) -> float:
        """Return the scale at which latents of another size span the same positions (paper A.5, the DiffFit trick)."""
        return self.scale * sample_size / self.sample_size


@dataclass(frozen=True, kw_only=True)
class Origins:
    """What weights were trained with.

    Attributes:
        text_encoder: the names it goes by, hub ids or folders, the surest first.
        text_revision: commit of the hub under which it goes by the first of them.
        max_tokens: of its texts.
        cleaning: rule by which texts were cleaned, as `features.text_cleaning` names them.
        vae: the names that the latent codec goes by.
        vae_revision: as `text_revision`.
        vae_scale, vae_shift: the network saw (latent - shift) * scale.
        positions: of its image tokens.
        has_size_condition: whether it is told each image's size.
        process: its spec.
    """

    text_encoder: Fact[tuple[str, ...]] | None = None
    text_revision: Fact[str] | None = None
    max_tokens: Fact[int] | None = None
    cleaning: Fact[str] | None = None
    vae: Fact[tuple[str, ...]] | None = None
    vae_revision: Fact[str] | None = None
    vae_scale: Fact[float] | None = None
    vae_shift: Fact[float] | None = None
    positions: Fact[Positions] | None = None
    has_size_condition: Fact[bool] | None = None
    process: Fact[dict[str, Any]] | None = None

    def facts(self) -> dict[str, Fact[Any] | None]:
        """Return all by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def or_else(self, other: Origins) -> Origins:
        """Return these facts, and of those that are not known `other`'s; a revision stays with the name it is of."""
        merged = {name: fact or getattr(other, name) for name, fact in self.facts().items()}
        for revision, model in _REVISIONS.items():
            if getattr(self, revision) is None and not _begin_alike(merged[model], getattr(other, model)):
                merged[revision] = None
        return Origins(**merged)

    def named_too(self, other: Origins) -> Origins:
        """Return `or_else`, where encoders that both know go by the names of both."""
        merged = self.or_else(other)
        for name in ("text_encoder", "vae"):
            own, theirs = getattr(self, name), getattr(other, name)
            if own is not None and theirs is not None:
                names = tuple(dict.fromkeys([*own.value, *theirs.value]))
                merged = dataclasses.replace(merged, **{name: Fact(value=names, source=own.source)})
        return merged

    def describe(self, *, reads_text: bool = True) -> str:
        """Return a line for people; facts of one source that follow each other name it once."""
        parts = [self._text()] if reads_text else []
        parts += [self._vae(), self._others()]
        missing = [words for name, words in _WORDS.items() if getattr(self, name) is None]
        if not reads_text:
            missing = [words for words in missing if words not in _TEXT_WORDS]
        unknown = f"not known: {', '.join(missing)}" if missing else ""
        return "; ".join(part for part in (*parts, unknown) if part)

    def _text(self) -> str:
        facts = [
            (self.text_encoder, lambda names: f"text by {names[0]}"),
            (self.text_revision, lambda revision: f"revision {revision}"),
            (self.max_tokens, lambda limit: f"{limit} tokens"),
            (self.cleaning, lambda rule: f"cleaned as {rule}"),
        ]
        return _listed(facts)

    def _vae(self) -> str:
        facts = [
            (self.vae, lambda names: f"VAE {names[0]}"),
            (self.vae_revision, lambda revision: f"revision {revision}"),
            (self.vae_scale, lambda scale: f"scale {scale:g}"),
            (self.vae_shift, lambda shift: f"shift {shift:g}" if shift else ""),
        ]
        return _listed(facts)

    def _others(self) -> str:
        facts = [
            (self.positions, lambda at: f"positions of {at.sample_size} latents a side at scale {at.scale:g}"),
            (self.has_size_condition, lambda is_told: "told each image's size" if is_told else ""),
            (self.process, lambda spec: f"process {process_title(spec)}{_distilled(spec)}"),
        ]
        return _listed(facts)

    def to_json(self) -> dict[str, Any]:
        """Return what `ORIGINS_FILE` holds: the values that are known and that the weights themselves do not say."""
        found = {name: fact.value for name, fact in self.facts().items() if fact is not None and name in _KINDS}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _distilled(spec: Mapping[str, Any]) -> str:
    student = student_of(spec)
    return "" if student is None else f", distilled by {student['method']}"


def origins_of_json(content: Mapping[str, Any], *, source: str) -> Origins:
    """Return what an `ORIGINS_FILE` says.

    Raises:
        UserError: a value is of another kind than it must be; names `source` and the key.
    """
    facts: dict[str, Fact[Any]] = {}
    for name, is_sound in _KINDS.items():
        if name not in content:
            continue
        value = content[name]
        if not is_sound(value):
            raise UserError(f"{source}: {name} is {value!r}, which is no value of it")
        facts[name] = Fact(value=tuple(value) if isinstance(value, list) else value, source=source)
    return Origins(**facts)


def _listed(facts: Sequence[tuple[Fact[Any] | None, Callable[[Any], str]]]) -> str:
    """Return facts in words, each source behind the last of those in a row that are from it."""
    said = [(fact.source, text) for fact, words in facts if fact is not None and (text := words(fact.value))]
    sources = [source for source, _ in said[1:]] + [None]
    return ", ".join(
        text if source == following else f"{text} ({source})"
        for (source, text), following in zip(said, sources, strict=False)
    )


def _begin_alike(one: Fact[tuple[str, ...]] | None, other: Fact[tuple[str, ...]] | None) -> bool:
    """Whether both go by one first name."""
    return one is not None and other is not None and one.value[0] == other.value[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)


_REVISIONS = {"text_revision": "text_encoder", "vae_revision": "vae"}
_KINDS: dict[str, Any] = {
    "text_encoder": _is_names,
    "text_revision": lambda value: isinstance(value, str) and bool(value),
    "max_tokens": lambda value: type(value) is int and value > 0,
    "cleaning": lambda value: isinstance(value, str),
    "vae": _is_names,
    "vae_revision": lambda value: isinstance(value, str) and bool(value),
    "vae_scale": _is_number,
    "vae_shift": _is_number,
    "process": is_spec,
}
# What is said to be missing where it is.
_WORDS = {
    "text_encoder": "text encoder",
    "max_tokens": "tokens",
    "cleaning": "cleaning",
    "vae": "VAE",
    "vae_scale": "its scale",
}
_TEXT_WORDS = ("text encoder", "tokens", "cleaning")
