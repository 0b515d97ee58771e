"""Scores where truth is known: captions against their scenes, samples against the scenes of their prompts."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from encoders.weights import resolve_model
from errors import MissingFileError
from pipelines.as_typed import typed_command
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_file, atomic_write_json, exclusive, sha256_file, sha256_text, take_away
from pipelines.store.manifest import MANIFEST_NAME, Fingerprint, ShardDirectory, ShardReport, read_manifest
from pipelines.store.png_files import read_picture
from pipelines.store.state_files import read_records
from pipelines.store.summary import update_summary
from pipelines.store.tables import MEND_SHARD, read_table
from toyworld.config import ToyworldConfig
from toyworld.mending import mend_sample, mend_world
from toyworld.scenes import NUM_CLASSES, POSITIONS, Scene, SceneObject, class_name
from toyworld.wording import caption_hits, parse_caption

if TYPE_CHECKING:
    from toyworld.judge import Verdict

log = get_logger("toyworld")

SCORING_VERSION = 3  # raise it when what the numbers mean changes
CAPTIONS_NAME = "captions"
SAMPLES_TABLE = "samples.parquet"
# What the demo promises of its samples, shown beside the scores.
TARGETS = {"position": 0.95, "colour": 0.90, "shape": 0.80}
CAPTION_HITS_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("dataset", pa.string()),
        ("hits", pa.list_(pa.bool_())),
        ("num_invented", pa.int32()),
        ("num_named_in_alt_text", pa.int32()),
        ("num_named_in_caption", pa.int32()),
    ]
)
VERDICT_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("file", pa.string()),
        ("prompt", pa.string()),
        (
            "objects",
            pa.list_(
                pa.struct(
                    [
                        *((name, pa.string()) for name in ("shape", "colour", "size", "position")),
                        *((name, pa.bool_()) for name in ("has_position", "has_colour", "has_shape")),
                    ]
                )
            ),
        ),
        ("num_extra", pa.int32()),
        ("is_right", pa.bool_()),
    ]
)


def score_run(config: ToyworldConfig, run: Path) -> None:
    """Score the captions and every folder of samples of a run, as far as they exist; see `runs/<name>/judge/`.

    Raises:
        MissingFileError: the run has no raw truth, so that there is nothing to score against.
    """
    truth, prompts = run / "raw" / "truth.parquet", run / "raw" / "prompts.jsonl"
    if not truth.is_file() or not prompts.is_file():
        raise MissingFileError(
            f"{truth.parent} holds no toy world: only captions and samples of known scenes have scores"
        )
    with exclusive(run / "judge"):
        ShardDirectory(run / "judge").clear_leftovers(is_held=True)
        score_captions(run)
        for folder in sample_folders(run):
            judge_samples(config, run, folder)


def sample_folders(run: Path) -> list[Path]:
    """Return the folders of finished samples, such as `samples/stage2`, and those that evaluation had drawn."""
    parents = (run / "samples", run / "evaluation" / "samples")
    return [path.parent for parent in parents for path in sorted(parent.glob(f"*/{SAMPLES_TABLE}"))]


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a folder's table of samples, in the order of its prompts."""
    return read_table(folder / SAMPLES_TABLE, mend=MEND_SHARD).to_pylist()


# Captions


def score_captions(run: Path) -> None:
    """Compare every caption with its scene; write `judge/captions.parquet` and `captioning.accuracy` of the summary.

    An object counts as right when the caption names it with its shape, colour and position. Rejected samples and
    samples without a known scene are counted as rejects, not as misses.
    """
    captions = ShardDirectory(run / "captions")
    sources = sorted(captions.file(name, ".parquet") for name in captions.finished())
    if not sources:
        log.info("captions: none yet")
        return
    directory = ShardDirectory(run / "judge")
    fingerprint = Fingerprint.of({"version": SCORING_VERSION})
    identity = _files_identity([*sources, run / "raw" / "truth.parquet"])
    if directory.is_done(CAPTIONS_NAME, identity, fingerprint):
        log.info("captions: nothing to do, their scores are up to date")
        return
    start_seconds = time.monotonic()
    directory.clear_marker(CAPTIONS_NAME)
    scenes = _read_truth(run / "raw" / "truth.parquet")
    rows: list[dict[str, Any]] = []
    rejected = {"rejected_upstream": 0, "no_scene": 0}
    for row in _caption_rows(sources):
        scene = scenes.get((row["shard"], row["key"]))
        if row["reject"] is not None or row["caption"] is None:
            rejected["rejected_upstream"] += 1
        elif scene is None:
            rejected["no_scene"] += 1
        else:
            rows.append(_caption_score(row, *scene))
    _write_rows(directory.file(CAPTIONS_NAME, ".parquet"), rows, CAPTION_HITS_SCHEMA)
    _write_report(directory, CAPTIONS_NAME, identity, fingerprint, num_kept=len(rows), rejected=rejected)
    _summarize_captions(run, rows, rejected)
    update_summary(run, "seconds.judge_captions", round(time.monotonic() - start_seconds, 1))


def _read_truth(path: Path) -> dict[tuple[str, str], tuple[str, Scene]]:
    """Dataset and scene by (shard, key)."""
    return {
        (row["shard"], row["key"]): (row["dataset"], Scene.from_json(row["scene"]))
        for row in read_table(path, mend=mend_world()).to_pylist()
    }


def _caption_rows(sources: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for path in sources:
        columns = ["key", "shard", "alt_text", "caption", "reject"]
        yield from read_table(path, columns, mend=MEND_SHARD).to_pylist()


def _caption_score(row: Mapping[str, Any], dataset: str, scene: Scene) -> dict[str, Any]:
    caption = row["caption"]
    known = {(item.shape, item.colour, item.position) for item in scene.objects}
    said = {(mention.shape, mention.colour, mention.position) for mention in parse_caption(caption)}
    return {
        "key": row["key"],
        "shard": row["shard"],
        "dataset": dataset,
        "hits": caption_hits(scene, caption),
        "num_invented": len(said - known),
        "num_named_in_alt_text": _num_named(scene, row["alt_text"]) if row["alt_text"] else None,
        "num_named_in_caption": _num_named(scene, caption),
    }


def _num_named(scene: Scene, text: str) -> int:
    """Objects whose shape and colour the text names, wherever it puts them: alt texts hardly say where."""
    said = {(mention.shape, mention.colour) for mention in parse_caption(text)}
    return sum((item.shape, item.colour) in said for item in scene.objects)


def _summarize_captions(run: Path, rows: Sequence[Mapping[str, Any]], rejected: Mapping[str, int]) -> None:
    if not rows:
        log.warning("captions: none of them belongs to a known scene")
        return
    total: dict[str, Any] = _caption_figures(rows)
    names = sorted({row["dataset"] for row in rows})
    by_dataset = {name: _caption_figures([row for row in rows if row["dataset"] == name]) for name in names}
    for key, value in {**total, "by_dataset": by_dataset, "not_scored": dict(rejected)}.items():
        if value is not None:
            update_summary(run, f"captioning.{key}", value)
    log.info(
        f"captions: {total['right']:,} of {total['objects']:,} objects right ({total['accuracy']:.1%}), in "
        f"{len(rows):,} captions; not scored: {sum(rejected.values()):,}"
    )


def _caption_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    num_objects = sum(len(row["hits"]) for row in rows)
    with_alt_text = [row for row in rows if row["num_named_in_alt_text"] is not None]
    num_alt_objects = sum(len(row["hits"]) for row in with_alt_text)
    num_alt_named = sum(row["num_named_in_alt_text"] for row in with_alt_text)
    num_right = sum(sum(row["hits"]) for row in rows)
    return {
        "captions": len(rows),
        "objects": num_objects,
        "right": num_right,
        "accuracy": num_right / num_objects,
        "invented_per_caption": sum(row["num_invented"] for row in rows) / len(rows),
        "named_in_alt_text": num_alt_named / num_alt_objects if with_alt_text else None,
        "named_in_caption": sum(row["num_named_in_caption"] for row in rows) / num_objects,
    }


# Samples


def judge_samples(config: ToyworldConfig, run: Path, folder: Path) -> None:
    """Judge the samples in `folder` against the scenes of their prompts.

    Writes `judge/<folder>.parquet`, one row a sample, and `judge/<folder>.json`, the scores as docs/EVALUATION.md
    wants a judge's results.

    A sample counts only if `prompts.jsonl` has its key with the same prompt: a prompt of the user's own has no scene.
    A class-conditional sample ("class 7") should show one object of that shape and colour, wherever it likes.
    """
    name = folder.name
    directory = ShardDirectory(run / "judge")
    samples = read_samples(folder)
    fingerprint, identity = _judging_inputs(config, run, folder)
    if directory.is_done(name, identity, fingerprint):
        log.info(f"{name}: nothing to do, its scores are up to date")
        return
    start_seconds = time.monotonic()
    directory.clear_marker(name)
    scenes = read_prompt_scenes(run)
    wanted = [scenes.get((row["key"], row["prompt"]), class_of(row["prompt"])) for row in samples]
    known = [row for row, target in zip(samples, wanted, strict=True) if target is not None]
    judge_folder = Path(resolve_model(config.judge).location)
    targets = [target for target in wanted if target is not None]
    verdicts = _judge_files([folder / row["file"] for row in known], targets, judge_folder)
    rows = [_verdict_row(row, verdict) for row, verdict in zip(known, verdicts, strict=True)]
    _write_rows(directory.file(name, ".parquet"), rows, VERDICT_SCHEMA)
    rejected = {"no_scene": len(samples) - len(known)}
    if verdicts:
        figures = _figures(verdicts) | {"num_not_judged": rejected["no_scene"]}
        _write_figures(directory.file(name, ".json"), figures, config, folder)
        _log_figures(name, figures)
        if folder.parent == run / "samples":
            update_summary(run, f"judge.{name}", figures)
    else:
        log.info(f"{name}: none of its samples belongs to a known scene")
        take_away(directory.file(name, ".json"))
    _write_report(directory, name, identity, fingerprint, num_kept=len(rows), rejected=rejected)
    update_summary(run, f"seconds.judge_{name}", round(time.monotonic() - start_seconds, 1))


def read_verdicts(config: ToyworldConfig, run: Path, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of `judge/<folder>.parquet`; none where the judge has not seen just these samples."""
    directory = ShardDirectory(run / "judge")
    fingerprint, identity = _judging_inputs(config, run, folder)
    if not directory.is_done(folder.name, identity, fingerprint):
        return []
    return read_table(directory.file(folder.name, ".parquet"), mend=MEND_SHARD).to_pylist()


def _judging_inputs(config: ToyworldConfig, run: Path, folder: Path) -> tuple[Fingerprint, str]:
    """What scores of a folder's samples depend on: the judge, and the identity of samples and prompts."""
    fingerprint = Fingerprint.of({"version": SCORING_VERSION, "judge": resolve_model(config.judge).identity})
    images = [folder / row["file"] for row in read_samples(folder)]
    if missing := [path for path in images if not path.is_file()]:
        raise MissingFileError(
            f"{missing[0]} does not exist, though samples.parquet has it; `{typed_command('sample')}` draws it anew"
        )
    prompts = run / "raw" / "prompts.jsonl"
    return fingerprint, _files_identity([prompts, folder / SAMPLES_TABLE, *images])


def read_prompt_scenes(run: Path) -> dict[tuple[str, str], Scene]:
    """Return the scene of each (key, prompt) in the run's `prompts.jsonl`."""
    rows = read_records(run / "raw" / "prompts.jsonl", mend=mend_world(), keys=("key", "prompt", "scene"))
    return {(row["key"], row["prompt"]): Scene.from_json(json.dumps(row["scene"])) for row in rows}


def class_of(prompt: str) -> int | None:
    """Return the toy class that a class-conditional sample's prompt names ("class 7"), or None."""
    match = re.fullmatch(r"class (\d+)", prompt)
    label = int(match.group(1)) if match else NUM_CLASSES
    return label if label < NUM_CLASSES else None


def _judge_files(files: Sequence[Path], targets: Sequence[Scene | int], judge_folder: Path) -> "list[Verdict]":
    if not files:
        return []
    from toyworld.judge import Judge

    images = [read_picture(path, mend=mend_sample()) for path in files]
    judge = Judge.load(judge_folder)
    scenes = [
        target if isinstance(target, Scene) else _class_scene(target, judge.look([image])[0])
        for image, target in zip(images, targets, strict=True)
    ]
    return judge.score_batch(images, scenes)


def _class_scene(label: int, seen: Mapping[str, tuple[str, str]]) -> Scene:
    """The scene of one object of a class, placed where the picture shows what is most like it."""
    colour, shape = class_name(label).split()

    def likeness(position: str) -> int:
        seen_shape, seen_colour = seen[position]
        return (seen_shape == shape) + (seen_colour == colour)

    position = max(seen, key=likeness, default=POSITIONS[0])
    return Scene((SceneObject(shape, colour, size="", position=position),), background="", pattern="")


def _verdict_row(sample: Mapping[str, Any], verdict: "Verdict") -> dict[str, Any]:
    objects = [
        {
            **asdict(hit.item),
            "has_position": hit.has_position,
            "has_colour": hit.has_colour,
            "has_shape": hit.has_shape,
        }
        for hit in verdict.hits
    ]
    return {
        "key": sample["key"],
        "file": sample["file"],
        "prompt": sample["prompt"],
        "objects": objects,
        "num_extra": verdict.num_extra,
        "is_right": verdict.is_right,
    }


def _figures(verdicts: "Sequence[Verdict]") -> dict[str, Any]:
    from toyworld.axes import score_axes
    from toyworld.judge import Score

    num_objects = sum(len(verdict.hits) for verdict in verdicts)
    axes = {name: asdict(axis) for name, axis in score_axes(verdicts).items()}
    return {**asdict(Score.of(verdicts)), "num_objects": num_objects, "num_images": len(verdicts), "axes": axes}


def _write_figures(path: Path, figures: Mapping[str, Any], config: ToyworldConfig, folder: Path) -> None:
    samples: dict[str, Any] = {"samples_fingerprint": None, "samples_source": None}
    if (folder / MANIFEST_NAME).is_file():
        manifest = read_manifest(folder)
        (report,) = manifest.shards.values()
        samples = {"samples_fingerprint": manifest.fingerprint.digest, "samples_source": report.source}
    judge = {
        "judge": config.judge,
        "judge_fingerprint": resolve_model(config.judge).identity,
        "method": "crops around the anchors",
        "axes": [{"name": name, **axis} for name, axis in figures["axes"].items()],
    }
    atomic_write_json(path, {**figures, **judge, **samples})


def _log_figures(name: str, figures: Mapping[str, Any]) -> None:
    parts = ", ".join(f"{axis} {figures[axis]:.1%}" for axis in ("position", "colour", "shape", "all"))
    counts = f"{figures['num_objects']} objects, {figures['num_images']} images"
    if figures["num_not_judged"]:
        counts += f"; {figures['num_not_judged']} more belong to no known scene"
    log.info(f"{name}: {parts}, {figures['extra']:.2f} extra per image ({counts})")
    axes = {axis: score for axis, score in figures["axes"].items() if score["num_images"]}
    log.info(
        f"{name}: "
        + ", ".join(f"{axis} {score['score']:.1%} of {score['num_images']} images" for axis, score in axes.items())
    )


def _files_identity(paths: Sequence[Path]) -> str:
    return sha256_text("\n".join(f"{path.name} {sha256_file(path)}" for path in paths))


def _write_rows(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    with atomic_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)


def _write_report(
    directory: ShardDirectory,
    name: str,
    identity: str,
    fingerprint: Fingerprint,
    *,
    num_kept: int,
    rejected: Mapping[str, int],
) -> None:
    directory.write_marker(
        ShardReport(
            name=name,
            source=identity,
            num_read=num_kept + sum(rejected.values()),
            num_kept=num_kept,
            rejected={reason: count for reason, count in rejected.items() if count},
            files={
                suffix: sha256_file(directory.file(name, suffix))
                for suffix in (".parquet", ".json")
                if directory.file(name, suffix).is_file()
            },
        ),
        fingerprint,
    )
