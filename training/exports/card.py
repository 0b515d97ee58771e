"""The card of a model, `README.md`: what it was made of, with which settings, how it scored, and how it is opened."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encoders.weights import hub_repository
from pipelines.store.checkpoints import AVERAGE_LENGTH, TRAINER
from pipelines.store.state_files import read_state
from pixart.origins import Origins
from pixart.processes.specs import student_of
from training.exports.pipeline import Parts
from training.exports.scores import describe_scores
from training.exports.students import describe_one_guidance, typed_steps

CARD = "README.md"
LICENCE = "FILL IN"
OWN_SETTINGS = ("objective", "num_steps", "dtype", "seed", AVERAGE_LENGTH)  # of trainer.json itself
# Of a stage's settings, what people ask for first; the rest stands in trainer.json.
SETTINGS = (
    *(
        "objective",
        "process",
        "flow_prediction",
        "trains",
        "num_steps",
        "global_batch_size",
        "learning_rate",
        "warmup_steps",
    ),
    *("weight_decay", "gradient_clip", "ema_decay", AVERAGE_LENGTH, "caption_dropout", "dtype", "seed"),
)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the card of weights tells of them.

    Attributes:
        checkpoint: folder of the one of ours that they are of; None of others' weights.
        title: of the card.
        origins: what they were trained with.
        merged: adapters that were merged into them since, in words, and how much of each.
        average_length: of the power average that they are, where it is not the checkpoint's own.
    """

    checkpoint: Path | None
    title: str
    origins: Origins
    merged: Mapping[str, float] = field(default_factory=dict)
    average_length: float | None = None

    def write(self, folder: Path, *, class_name: str, parts: Parts | None) -> None:
        """Write it beside the weights; `parts` are those of a pipeline, `class_name` is what opens it."""
        trainer = {} if self.checkpoint is None else read_state(self.checkpoint / TRAINER, mend="name other weights")
        if self.average_length is not None:
            trainer[AVERAGE_LENGTH] = self.average_length
        lines = [
            *_front(trainer, self.origins),
            f"# {self.title}",
            "",
            self.origins.describe() + ".",
            *_data(trainer),
            *_settings(trainer),
            *self._adapters(),
            # with adapters merged into them they are others
            *describe_scores(None if self.merged else self.checkpoint, trainer.get("stage")),
            *_few_steps(self.origins),
            *_use(class_name, self.origins, parts),
        ]
        (folder / CARD).write_text(_without_home("\n".join(lines)) + "\n", encoding="utf-8")

    def _adapters(self) -> Iterator[str]:
        if self.merged:
            yield from ("", "## Adapters", "", "Merged into the weights, each times a number:", "")
            yield from (f"- {name}: {weight:g}" for name, weight in self.merged.items())


def _without_home(text: str) -> str:
    """Return a text for strangers to read: paths are told from the working folder or from the home of who made it."""
    return text.replace(f"{Path.cwd()}/", "").replace(f"{Path.home()}/", "~/")


def _front(trainer: Mapping[str, Any], origins: Origins) -> Iterator[str]:
    """Yield what the hub reads: the licence is the user's to say, and depends on that of the base and of the data."""
    yield from ("---", "library_name: diffusers", "pipeline_tag: text-to-image", f'license: "{LICENCE}"')
    if (base := base_model(trainer, origins)) is not None:
        yield f"base_model: {json.dumps(base)}"
    yield from ("---", "")


def base_model(trainer: Mapping[str, Any], origins: Origins) -> str | None:
    """Return the hub id of the weights that a training started from, or as which weights are published; else None."""
    if (named := hub_repository(trainer.get("starts_from") or "")) is not None:
        return named
    sources = [fact.source for fact in origins.facts().values() if fact is not None]
    published = [match[1] for source in sources if (match := re.fullmatch(r"published as (\S+)", source))]
    return published[0] if published else None


def _data(trainer: Mapping[str, Any]) -> Iterator[str]:
    if not trainer:
        return
    fields = trainer.get("fingerprint", {})
    start, identity = trainer.get("starts_from") or "scratch", fields.get("training.starts_from", "unknown")
    yield from ("", "## Training", "")
    yield f"- Stage `{trainer['stage']}`, {trainer['step']:,} steps, {trainer.get('num_samples_seen', 0):,} samples"
    yield f"- Started from `{start}` ({identity})"
    yield f"- Images of {trainer['resolution']} pixels in {len(trainer.get('buckets', []))} sizes"
    files = sorted(name for name in fields if name.endswith(".files"))
    yield from (f"- Features `{name.removesuffix('.files')}`: {fields[name]}" for name in files)


def _settings(trainer: Mapping[str, Any]) -> Iterator[str]:
    fields = trainer.get("fingerprint", {}) | {
        f"training.{name}": trainer[name] for name in OWN_SETTINGS if name in trainer
    }
    found = {name: fields[f"training.{name}"] for name in SETTINGS if f"training.{name}" in fields}
    if found:
        yield from ("", "| setting | value |", "|---|---|")
        yield from (f"| `{name}` | {value} |" for name, value in found.items())


def _few_steps(origins: Origins) -> Iterator[str]:
    """Yield how weights are drawn that were distilled to few steps, and which guidance is inside."""
    process = {} if origins.process is None else origins.process.value
    for line in describe_one_guidance(process, process):
        yield from ("", "## Few steps", "", f"{line[0].upper()}{line[1:]}.")


def _use(class_name: str, origins: Origins, parts: Parts | None) -> Iterator[str]:
    """Yield code that draws; what is not in the folder it opens by name."""
    yield from ("", "## Use", "", "```python", f"from diffusers import {class_name}")
    if parts is None:
        yield from (f'network = {class_name}.from_pretrained("…", subfolder="transformer")', "```")
        return
    passed = []
    if parts.vae is None:
        yield "from diffusers import AutoencoderKL"
        passed.append(f', vae=AutoencoderKL.from_pretrained("{parts.vae_name or "…"}")')
    if parts.text_encoder is None:
        yield "from transformers import T5EncoderModel, T5Tokenizer"
        passed.append(f', text_encoder=T5EncoderModel.from_pretrained("{parts.text_name or "…"}")')
        passed.append(f', tokenizer=T5Tokenizer.from_pretrained("{parts.text_name or "…"}")')
    yield f'pipeline = {class_name}.from_pretrained("…"{"".join(passed)})'
    called = ""
    if origins.max_tokens is not None:
        called += f", max_sequence_length={origins.max_tokens.value}"
    if origins.process is not None and (student := student_of(origins.process.value)) is not None:
        called += f", {typed_steps(student)}, guidance_scale=1.0"
    if origins.cleaning is not None:
        called += f", clean_caption={origins.cleaning.value == 'diffusers'}"
    yield from (f'image = pipeline("a small cactus with a happy face"{called}).images[0]', "```")
