"""What a stage's features will take: bytes per sample and in total, hours, and whether the disk has room for them."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from errors import UserError
from features.families import wanted_families
from features.jobs import FamilyPlan, FeatureInputs
from features.speed import find_speed
from pipelines.as_typed import typed_command
from pipelines.columns.choice_counts import describe_counts
from pipelines.columns.choices import require_some
from pipelines.engine.progress import console


def plan_families(inputs: FeatureInputs) -> list[FamilyPlan]:
    """Return the plan of each family, also of one whose inputs, such as captions, are not there yet."""
    return [_with_wanted(family.plan(inputs), inputs) for family in wanted_families(inputs)]


def _with_wanted(plan: FamilyPlan, inputs: FeatureInputs) -> FamilyPlan:
    """Return a plan of the samples that are wanted alone."""
    if plan.job is not None:
        return replace(plan, num_samples=plan.job.wanted.count(), pending_samples=plan.job.wanted.count_left())
    if inputs.choice is None:
        return plan
    num_chosen = sum(int(inputs.choice.chosen(source.name).sum()) for source in inputs.raw)
    return replace(plan, num_samples=num_chosen, pending_samples=num_chosen)


def print_plan(inputs: FeatureInputs) -> list[FamilyPlan]:
    """Print what the stage would write, with sizes, and how long it would take where that can be measured."""
    table = Table(title=f"features, {inputs.stage_name}: {', '.join(inputs.features.shards)}", title_justify="left")
    table.add_column("family")
    for heading in ("samples", "to do", "bytes/sample", "to write", "total", "hours"):
        table.add_column(heading, justify="right")
    families = plan_families(inputs)
    notes: list[str] = []
    for family in families:
        hours, speed = _hours(family, inputs)
        total = format_bytes(family.num_samples * family.bytes_per_sample)
        counts = (f"{family.num_samples:,}", f"{family.pending_samples:,}", f"{family.bytes_per_sample:,}")
        table.add_row(family.family, *counts, format_bytes(family.pending_bytes), total, hours)
        notes += [f"{family.family}: {family.model} -> {family.directory}; {family.basis}", f"{family.family}: {speed}"]
        for change in family.job.changed_settings() if family.job else []:
            notes.append(f"{family.directory} was made with other settings and would be computed anew: {change}")
    console.print(table)
    if inputs.choice is not None:
        counts = inputs.choice.count([source.name for source in inputs.raw])
        notes += describe_counts(require_some(counts.values(), inputs.choice))
    for note in notes:
        console.print(note, soft_wrap=True)
    console.print(f"free on this disk: {format_bytes(_free_bytes(inputs.run))}")
    return families


def _hours(family: FamilyPlan, inputs: FeatureInputs) -> tuple[str, str]:
    """Return the hours of a family as the table shows them, and what they rest on."""
    if not family.pending_samples:
        return "0", "nothing to do"
    if family.job is None:
        return "?", f"hours are not measured: captions are not there yet; run `{typed_command('caption')}` first"
    speed = find_speed(family.job, inputs)
    if isinstance(speed, str):
        return "?", f"hours are {speed}"
    workers = "1 worker" if speed.num_workers == 1 else f"{speed.num_workers} workers"
    text = f"{speed.samples_per_second:,.1f} samples/s a worker, {speed.basis}; {workers}"
    hours = speed.hours(family.pending_samples)
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}", text


def require_space(plans: Sequence[FamilyPlan], *, run: Path, stage_name: str) -> None:
    """Check that what is pending fits on the disk.

    Raises:
        UserError: it does not; names the run, what is needed and what is free.
    """
    needed, free = sum(family.pending_bytes for family in plans), _free_bytes(run)
    if needed > free:
        raise UserError(
            f"{run}: features of {stage_name} need about {format_bytes(needed)}, but only "
            f"{format_bytes(free)} are free on this disk"
        )


def _free_bytes(path: Path) -> int:
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def format_bytes(num_bytes: float) -> str:
    """Return a size in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"
