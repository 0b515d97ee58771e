"""Going on from a checkpoint: what must be as it was and what to do if not, and what of the rest a resume says."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import UserError
from pipelines.as_typed import typed_command, typed_flag
from pipelines.engine.progress import get_logger
from pipelines.recipe import ModelConfig
from pipelines.store.checkpoints import TRAINER, Checkpoint, open_checkpoint
from pipelines.store.manifest import Fingerprint
from training.config import StageTraining
from training.data.features import StageFeatures
from training.data.index import FeatureIndex
from training.data.survey import chosen_digests, make_survey, survey_shards
from training.loop.schedule import learning_rate_at

# In trainer.json: of each dataset, what tells its chosen samples from any others.
CHOSEN_SAMPLES = "chosen_samples"
START, NETWORK = "training.starts_from", "training.network"
MAX_CHANGES_SHOWN = 4

log = get_logger("training")


def require_same_job(
    fingerprint: Fingerprint, checkpoint: Checkpoint, *, features: StageFeatures, checks_files: bool = True
) -> None:
    """Refuse to go on with other settings, features or starting weights than a checkpoint was trained with.

    Files of features to which another choice has added samples are the same to a choice whose own samples are; that
    is found out with `checks_files` alone, which one of many ranks does.

    Raises:
        UserError: names what differs with both values, how to go on from the weights, and how to go on as it was.
    """
    defaults = {f"model.{name}": value for name, value in ModelConfig.fingerprint_defaults().items()}
    defaults |= {f"training.{name}": value for name, value in StageTraining.fingerprint_defaults().items()}
    # Whether features leave out what is at its default depends on when they were made, now and when this was begun.
    defaults |= checkpoint.trainer.get("feature_defaults", {}) | features.fingerprint_defaults()
    made_with, wanted = defaults | checkpoint.trainer["fingerprint"], defaults | fingerprint.fields

    def place(name: str) -> tuple[bool, bool, str]:
        # Another process or kind is another network, and brings other differences along. A setting says more than the
        # hash of the files it changed.
        return name not in (NETWORK, "training.process"), name.endswith(".files"), name

    names = [name for name in made_with.keys() | wanted.keys() if made_with.get(name) != wanted.get(name)]
    if not names or _are_same_samples(names, checkpoint, features, checks_files=checks_files):
        return
    first, *others = sorted(names, key=place)
    also = [f"{_key(name, checkpoint)} {made_with.get(name)!r} -> {wanted.get(name)!r}" for name in others]
    if also:
        also[MAX_CHANGES_SHOWN:] = [f"{len(also) - MAX_CHANGES_SHOWN} more"] if len(also) > MAX_CHANGES_SHOWN else []
    raise UserError(
        f"{checkpoint.path} was trained with {_key(first, checkpoint)} {made_with.get(first)!r}, "
        f"but it is {wanted.get(first)!r} now{' (also ' + ', '.join(also) + ')' if also else ''}. "
        f"{_ways_on(first, checkpoint, former=made_with.get(first), table_name=features.table_name)}. "
        f"Only to train anew, remove {checkpoint.path.parent} or choose another run"
    )


def _are_same_samples(
    names: Sequence[str], checkpoint: Checkpoint, features: StageFeatures, *, checks_files: bool
) -> bool:
    """Whether all that differs are files that choices share, and all that training reads of them is what it was."""
    kept = checkpoint.trainer.get(CHOSEN_SAMPLES)
    if kept is None or not features.shared_files.issuperset(names):
        return False
    if not checks_files:
        return True
    index = FeatureIndex(features.datasets)
    found = chosen_digests(make_survey(index, survey_shards(index, range(len(index)))))
    if found == kept:
        log.info(f"{', '.join(sorted(names))} are others since, and the samples chosen of them are what they were")
    return found == kept


def weights_identity(checkpoint: Checkpoint) -> str:
    """Return what tells the weights of a checkpoint from all others."""
    return f"{checkpoint.trainer['plan_fingerprint']}@{checkpoint.step}"


def another_table(checkpoint: Checkpoint, table_name: str) -> str:
    """Return the table of the recipe that goes on from a checkpoint's weights, with a new optimizer, as a stage."""
    stage = _stage(checkpoint)
    return (
        f"[training.{stage}-next] with extends = '{stage}', features = '{table_name}' and "
        f"starts_from = '{checkpoint.weights}' ({typed_flag('stage', f'{stage}-next')})"
    )


def changes_since(checkpoint: Checkpoint, settings: StageTraining, *, num_ranks: int, table_name: str) -> list[str]:
    """Return a line for each setting that is free to change and steers what comes: old value, new one, what it does.

    Checkpoints made before they kept these settings tell of steps and ranks alone.
    """
    stage = _stage(checkpoint)
    former = {"num_steps": checkpoint.trainer["num_steps"], "num_ranks": checkpoint.trainer["num_ranks"]}
    former |= checkpoint.trainer.get("steering", {})
    now = settings.steering | {"num_ranks": num_ranks}
    effects = {
        "num_steps": _rate_change(checkpoint, settings, table_name=table_name),
        "num_validation_samples": "; validation losses before and after are of other samples",
    }
    lines = []
    for name in now:
        if name in former and former[name] != now[name]:
            label = "ranks" if name == "num_ranks" else f"training.{stage}.{name}"
            effect = effects.get(name, "; the same samples, but sums are rounded otherwise")
            lines.append(f"{label}: {former[name]} -> {now[name]}{effect}")
    return lines


def _rate_change(checkpoint: Checkpoint, settings: StageTraining, *, table_name: str) -> str:
    """Say what another number of steps does to the learning rate that falls towards the last of them."""
    num_steps, step = checkpoint.trainer["num_steps"], checkpoint.step
    if settings.decay_fraction == 0:
        return ""
    former = settings.model_copy(update={"num_steps": num_steps})
    # A stage that was at its end had no rate for the next step: its last one says where it was.
    place = min(step, num_steps - 1)
    before, now = learning_rate_at(former, place), learning_rate_at(settings, step)
    why = f"decay_fraction {settings.decay_fraction:g} has it fall from step {_first_decay_step(settings):,} on"
    why += f", not from {_first_decay_step(former):,}"
    if before == now:
        return f"; the learning rate is {now:.3g} at step {step + 1:,} as before, but {why}"
    return (
        f"; the learning rate was {before:.3g} at step {place + 1:,} and is {now:.3g} at step {step + 1:,} now: {why}. "
        f"To leave it as it was, keep num_steps = {num_steps} and train on in {another_table(checkpoint, table_name)}"
    )


def _first_decay_step(settings: StageTraining) -> int:
    """Return the first step, counted from 1, whose rate is below that of the steps between warm-up and end."""
    # 1 - 0.9 is a little less than 0.1.
    return math.floor(round((1 - settings.decay_fraction) * settings.num_steps, 6)) + 1


def _ways_on(name: str, checkpoint: Checkpoint, *, former: Any, table_name: str) -> str:
    """Return how to go on from the weights with what is there now, and how to go on as it was."""
    onward = f"To go on from its weights, train {another_table(checkpoint, table_name)}"
    kind, _, _ = name.partition(".")
    if name == START:
        return f"{onward}; to go on as it was, {_former_start(checkpoint, str(former))}"
    if kind == "model" or name == NETWORK:
        shape = "shape" if kind == "model" else "kind"
        return f"To go on from its weights, set {_key(name, checkpoint)} back: they have that {shape}"
    if kind == "training":
        return f"{onward}; to go on as it was, set {_key(name, checkpoint)} back"
    stage = _stage(checkpoint)
    features = typed_command("features", {"stage": table_name, "run": _run(checkpoint)})
    return (
        f"{onward}; to go on as it was, set the features back and run `{features}`, or read them from a run that still "
        f"has them: training.{stage}.datasets = [{{ run = '…' }}]"
    )


def _former_start(checkpoint: Checkpoint, identity: str) -> str:
    """Return how to name the weights that a stage started from, if they are still there."""
    wanted = checkpoint.trainer.get("starts_from")
    key = _key(START, checkpoint)
    stage = str(wanted).rpartition("/")[2]
    kept = _run(checkpoint) / "training" / stage / f"step-{identity.rpartition('@')[2]}"
    if (kept / TRAINER).is_file() and weights_identity(open_checkpoint(kept)) == identity:
        return f"set {key} = '{kept}'"
    return f"set {key} back to the weights it had ({wanted!r} when it began)"


def _key(name: str, checkpoint: Checkpoint) -> str:
    """Return a field of the fingerprint as the recipe has it, where it has it."""
    kind, _, key = name.partition(".")
    return f"training.{_stage(checkpoint)}.{key}" if kind == "training" else name


def _stage(checkpoint: Checkpoint) -> str:
    return checkpoint.path.parent.name


def _run(checkpoint: Checkpoint) -> Path:
    return checkpoint.path.parents[2]
