"""`TASK=questions`: a table of checkpoints and their scores by questions: `RUN/evaluation/<stage>-questions/`."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from pipelines.command import Command
from pipelines.engine.progress import console, get_logger
from pipelines.store.files import sha256_file, sha256_text
from pipelines.store.manifest import MANIFEST_NAME, Fingerprint, ShardDirectory, read_manifest
from pipelines.store.summary import update_summary
from sampling.evaluation.config import EvaluationConfig
from sampling.evaluation.contestants import Contestant, check_samples, draw_samples, find_contestants
from sampling.evaluation.questions.answers_kept import (
    AskedImage,
    KeptAnswers,
    answers_fingerprint,
    find_images,
    keep_answers,
)
from sampling.evaluation.questions.asking import SERVER_FAILED, TABLE
from sampling.evaluation.questions.benchmarks import NAMES, Benchmark, open_benchmark
from sampling.evaluation.questions.scoring import SCORING_VERSION, answered_images, score
from sampling.evaluation.questions.wording import WORDING_VERSION
from sampling.evaluation.scores import write_report
from sampling.evaluation.tables import table_line

REPORT_NAME = "questions"

log = get_logger("evaluation")


@dataclass(frozen=True, kw_only=True)
class AskedContestant:
    """A checkpoint and the images that are asked about; `num_without` of its samples have no questions."""

    contestant: Contestant
    images: list[AskedImage]
    num_without: int


def score_questions(command: Command) -> None:
    """Draw what is missing, ask what is not answered, and write the table; a finished one is printed again.

    Raises:
        MissingFileError, UserError: see `open_benchmark`, `find_contestants` and `keep_answers`.
    """
    contestants, benchmark, config = _open(command)
    start_seconds = time.monotonic()
    draw_samples(contestants, run=command.run)
    asked = [_asked(item, benchmark) for item in contestants]
    directory = ShardDirectory(command.run / "evaluation" / f"{command.stage_name}-questions")
    fingerprint = _fingerprint(config, benchmark)
    identity = _identity(asked)
    is_done = directory.is_done(REPORT_NAME, identity, fingerprint) and (directory.path / MANIFEST_NAME).is_file()
    if is_done and not _has_failed(directory):
        log.info(f"nothing to do: {directory.file(REPORT_NAME, '.md')} is up to date")
    else:
        rows = [_row(item, benchmark, config, run=command.run) for item in asked]
        write_report(
            directory,
            REPORT_NAME,
            {"benchmark": benchmark.set_name, "checkpoints": rows},
            {".md": render(rows, title=NAMES[benchmark.set_name])},
            fingerprint=fingerprint,
            identity=identity,
        )
        seconds = round(time.monotonic() - start_seconds, 1)
        update_summary(command.run, f"seconds.questions_{command.stage_name}", seconds)
        figures = {number["metric"]: number["value"] for number in rows[0]["scores"]}
        update_summary(command.run, f"questions.{command.stage_name}", figures)
    log.info(f"written to {directory.path}")
    console.print(directory.file(REPORT_NAME, ".md").read_text(encoding="utf-8"), soft_wrap=True)


def describe_questions(command: Command) -> list[str]:
    """Return what `score_questions` would do, line by line."""
    contestants, benchmark, config = _open(command)
    check_samples(contestants)
    num_questions = sum(len(item.questions) for item in benchmark.prompts)
    lines = [
        f"{NAMES[benchmark.set_name]}: {len(benchmark.prompts):,} prompts and {num_questions:,} questions of "
        f"{benchmark.path}; asks {config.questions.model} at {config.questions.server.base_url}"
    ]
    for item in contestants:
        pending = len(item.job.pending())
        lines.append(f"{item.title}: would draw {pending:,} of {len(item.job.requests):,} images into {item.folder}")
    return lines


def _open(command: Command) -> tuple[list[Contestant], Benchmark, EvaluationConfig]:
    config = command.recipe.table("evaluation", EvaluationConfig)
    if config.questions.model is None:
        raise UserError(f"{TABLE}.model is not set: name the vision-language model that is asked, as its server does")
    benchmark = open_benchmark(config, run=command.run)
    contestants = find_contestants(command, config)
    classes = [item.title for item in contestants if item.trained.kind != "pixart"]
    if classes:
        raise UserError(f"{classes[0]} draws classes, and questions are about what prompts say")
    return contestants, benchmark, config


def _asked(contestant: Contestant, benchmark: Benchmark) -> AskedContestant:
    images, num_without = find_images(contestant.folder, benchmark)
    if num_without:
        log.warning(f"{contestant.title}: {num_without:,} of its images have no questions in {benchmark.path}")
    return AskedContestant(contestant=contestant, images=images, num_without=num_without)


def _has_failed(directory: ShardDirectory) -> bool:
    """Whether the server has failed at questions of the report that is there, which are asked again."""
    rows = json.loads(directory.file(REPORT_NAME, ".json").read_text(encoding="utf-8"))["checkpoints"]
    return any(SERVER_FAILED in row["asked"]["unknown"] for row in rows)


def _fingerprint(config: EvaluationConfig, benchmark: Benchmark) -> Fingerprint:
    return Fingerprint.of(
        {
            "version": SCORING_VERSION,
            "wording_version": WORDING_VERSION,
            "prompt_set": benchmark.set_name,
            "file": benchmark.sha256,
            "asked": answers_fingerprint(config.questions).fields,
            "max_unknown_fraction": config.questions.max_unknown_fraction,
        }
    )


def _identity(asked: Sequence[AskedContestant]) -> str:
    manifests = [sha256_file(item.contestant.folder / MANIFEST_NAME) for item in asked]
    inputs = [
        [item.contestant.title, item.contestant.inputs(), manifest, [image.outline() for image in item.images]]
        for item, manifest in zip(asked, manifests, strict=True)
    ]
    return "sha256:" + sha256_text(json.dumps(inputs, sort_keys=True))


def answers_folder(run: Path, samples: Path, config: EvaluationConfig) -> Path:
    """Return where the answers about a folder of samples lie."""
    return run / "evaluation" / "answers" / f"{samples.name}-{answers_fingerprint(config.questions).digest[:12]}"


def _row(asked: AskedContestant, benchmark: Benchmark, config: EvaluationConfig, *, run: Path) -> dict[str, Any]:
    """Ask about a checkpoint's images; return its scores and every input of them."""
    folder = asked.contestant.folder
    output = answers_folder(run, folder, config)
    upstream = {str(folder): read_manifest(folder).fingerprint.digest}
    kept = keep_answers(asked.images, config.questions, output=output, upstream=upstream)
    answered = answered_images(
        kept.rows,
        [image.asked for image in asked.images],
        mode=kept.mode,
        is_absolute=benchmark.set_name == "geneval2",
    )
    scores = score(answered, set_name=benchmark.set_name, mode=kept.mode)
    return {
        "title": asked.contestant.title,
        "inputs": asked.contestant.inputs(),
        "asked": _inputs(asked, benchmark, config, kept) | {"answers_folder": str(output)},
        "scores": [asdict(item) for item in scores],
    }


def _inputs(
    asked: AskedContestant, benchmark: Benchmark, config: EvaluationConfig, kept: KeptAnswers
) -> dict[str, Any]:
    not_told = sum(row["share"] == 0 for row in kept.rows)
    return {
        "model": config.questions.model,
        "server_calls_it": kept.models,
        "answers": kept.mode,
        "file": str(benchmark.path),
        "file_sha256": benchmark.sha256,
        "num_prompts": len({image.asked.key for image in asked.images}),
        "num_prompts_wanted": "all" if config.num_prompts is None else config.num_prompts,
        "images_per_prompt": asked.contestant.job.config.images_per_prompt,
        "num_images_without_questions": asked.num_without,
        "num_questions": len(kept.rows),
        "unknown": kept.unknown(),
        # Likelihoods below those that a server tells count as 0, which geometric means and products feel.
        **({"num_right_answers_not_told": not_told} if kept.mode == "soft" else {}),
        "wording": config.questions.wording,
        "wording_version": WORDING_VERSION,
        "scoring_version": SCORING_VERSION,
    }


def render(rows: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """Return the table of checkpoints, and below it every input of every score."""
    names = list(dict.fromkeys(number["metric"] for row in rows for number in row["scores"]))
    lines = [f"# {title}, by questions", "", table_line(["score ↑", *(row["title"] for row in rows)])]
    lines.append(table_line(["---", *("---:" for _ in rows)]))
    values = [{number["metric"]: number["value"] for number in row["scores"]} for row in rows]
    for name in names:
        lines.append(table_line([name, *(f"{own[name]:.4f}" if name in own else "–" for own in values)]))
    heads = ["checkpoint", "score", "value", "images", "prompts", "questions", "answers", "asked of", "what it is"]
    lines += ["", "## What each score was taken of", "", table_line(heads)]
    lines.append(table_line(["---", "---", *("---:" for _ in range(4)), "---", "---", "---"]))
    lines += [table_line(_cells(row, number)) for row in rows for number in row["scores"]]
    lines += ["", "## Questions and samples", ""]
    for row in rows:
        inputs = {**row["asked"], **row["inputs"]}
        lines += [f"**{row['title']}**", "", *(f"- {name}: {_said(value)}" for name, value in inputs.items()), ""]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any], number: Mapping[str, Any]) -> list[str]:
    counts = [f"{number[name]:,}" for name in ("num_images", "num_prompts", "num_questions")]
    asked = row["asked"]
    value = f"{number['value']:.4f}"
    return [row["title"], number["metric"], value, *counts, asked["answers"], asked["model"], number["meaning"]]


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {count:,}" for name, count in value.items()) or "0"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
