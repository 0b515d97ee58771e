"""What `make eval` and a judge have found of a checkpoint's pictures, as the card of its export says it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from encoders.weights import identity_of
from pipelines.store.bases import adapter_identity
from pipelines.store.checkpoints import ADAPTER, MODEL
from pipelines.store.files import sha256_text
from pipelines.store.manifest import MANIFEST_NAME, read_manifest
from pipelines.store.state_files import read_state

MEND = "move it away, and the card does without"


def describe_scores(checkpoint: Path | None, stage: str | None) -> Iterator[str]:
    """Yield the card's lines of scores, those of just these weights, with what they were measured on; or that there
    are none.

    Raises:
        UserError: a file of scores is damaged; names it.
    """
    yield from ("", "## Scores", "")
    found: list[str] = []
    if checkpoint is not None and stage is not None:
        run = checkpoint.absolute().parent.parent.parent
        identity = _identity(checkpoint)
        found = [*_evaluation(run, stage, identity), *_judgement(run, stage, identity)]
    yield from found or ["None of these weights: an evaluation and a judge measure them before they are exported."]


def _identity(checkpoint: Path) -> str:
    """Return the end of the identity by which rooms that draw know a checkpoint; with adapters its base comes first."""
    if (checkpoint / MODEL).is_dir():
        return identity_of(checkpoint / MODEL)
    return f"+sha256:{sha256_text(adapter_identity(checkpoint / ADAPTER))}"


def _evaluation(run: Path, stage: str, identity: str) -> Iterator[str]:
    path = run / "evaluation" / stage / "scores.json"
    if not path.is_file():
        return
    for row in read_state(path, mend=MEND, keys=("checkpoints",))["checkpoints"]:
        inputs = row["inputs"]
        if not inputs["checkpoint_fingerprint"].endswith(identity) or inputs.get("adapters"):
            continue
        prompts = f"the prompts of {Path(inputs['prompts']).name}" if inputs["prompts"] else "a prompt"
        yield (
            f"An evaluation of {inputs['num_images']:,} images of {prompts}: {inputs['solver']}, {inputs['num_steps']} "
            f"steps, guidance {inputs['guidance_scale']:g}, seed {inputs['seed']}, size {inputs['size']}."
        )
        yield from ("", "| score | value | better | measured on |", "|---|---|---|---|")
        yield from (_row(number) for number in row["numbers"])
        yield ""


def _row(number: Mapping[str, Any]) -> str:
    against = f" against {number['num_reference']:,} of a reference" if number["num_reference"] else ""
    parts = [f"{number['num_images']:,} images{against}", f"by {number['network']}", number.get("remark")]
    measured_on = ", ".join(part for part in parts if part)
    return f"| {number['metric']} | {number['value']:.4g} | {number['better']} | {measured_on} |"


def _judgement(run: Path, stage: str, identity: str) -> Iterator[str]:
    """Yield the figures of a judge that has looked at samples of these weights."""
    path, samples = run / "judge" / f"{stage}.json", run / "samples" / stage
    if not path.is_file() or not (samples / MANIFEST_NAME).is_file():
        return
    figures, manifest = read_state(path, mend=MEND), read_manifest(samples)
    is_of_them = figures.get("samples_fingerprint") == manifest.fingerprint.digest
    if not is_of_them or not manifest.upstream.get("checkpoint", "").endswith(identity):
        return
    counts = {name: value for name, value in figures.items() if name.startswith("num_") and isinstance(value, int)}
    counted = ", ".join(f"{value:,} {name.removeprefix('num_').replace('_', ' ')}" for name, value in counts.items())
    yield f"Judge {figures.get('judge')}, of samples/{stage}: {counted}."
    yield from ("", "| judged | value |", "|---|---|")
    numbers = {name: value for name, value in figures.items() if isinstance(value, float)}
    numbers |= {axis["name"]: axis["score"] for axis in figures.get("axes", [])}
    yield from (f"| {name} | {value:.4g} |" for name, value in numbers.items())
