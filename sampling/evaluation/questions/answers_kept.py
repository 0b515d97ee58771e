"""Answers about a folder of samples, kept as they come, in `RUN/evaluation/answers/<samples>-<digest>/`."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from errors import UserError
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_file, exclusive, sha256_file, sha256_text
from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport
from pipelines.store.png_files import read_picture
from pipelines.store.tables import MEND_SHARD, read_table
from sampling.evaluation.image_sets import SAMPLES_NAME
from sampling.evaluation.questions.asking import SERVER_FAILED, TABLE, Asker, Mode, Reply
from sampling.evaluation.questions.benchmarks import Benchmark
from sampling.evaluation.questions.config import QuestionsConfig
from sampling.evaluation.questions.layouts import AskedPrompt
from sampling.images import MEND

ANSWERS_VERSION = 1  # raise it when the same answers of a server are read in another way
# Whose answers are kept together: a killed command asks about so many again, at most.
IMAGES_AT_ONCE = 32
# So many questions without one answer are the server's fault, and no image's.
MIN_QUESTIONS = 20

log = get_logger("evaluation")

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("file", "key", "prompt")),
        ("number", pa.int32()),
        *((name, pa.string()) for name in ("question", "answer", "group", "said")),
        *((name, pa.float64()) for name in ("share", "mass")),
        *((name, pa.string()) for name in ("text", "model", "reject")),
    ]
)


@dataclass(frozen=True, kw_only=True)
class AskedImage:
    """A sample and the prompt whose questions are asked about it."""

    path: Path
    sha256: str
    asked: AskedPrompt

    def outline(self) -> list[Any]:
        """Return as JSON values what the answers are about."""
        return [self.path.name, self.sha256, self.asked.prompt, [asdict(q) for q in self.asked.questions]]


@dataclass(frozen=True, kw_only=True)
class KeptAnswers:
    """All answers about a folder of samples: one row for each question, in the order of images and questions."""

    rows: list[dict[str, Any]]
    mode: Mode
    models: list[str]  # what the server has called itself

    def unknown(self) -> dict[str, int]:
        """Return the questions without an answer, by reason."""
        return dict(sorted(Counter(row["reject"] for row in self.rows if row["reject"] is not None).items()))


def find_images(folder: Path, benchmark: Benchmark) -> tuple[list[AskedImage], int]:
    """Return the samples of a folder with their questions, and how many samples have none.

    Raises:
        UserError: none of them has, or a sample is of another prompt than the benchmark's of that key.
    """
    rows = read_table(folder / SAMPLES_NAME, ["key", "prompt", "file"], mend=MEND_SHARD).to_pylist()
    name = "prompt" if benchmark.is_by_prompt else "key"
    known = {getattr(item, name): item for item in benchmark.prompts}
    images: list[AskedImage] = []
    for row in rows:
        asked = known.get(row[name])
        if asked is None:
            continue
        if asked.prompt != row["prompt"]:
            raise UserError(f"{folder / row['file']} shows {row['prompt']!r}, but {benchmark.path} {asked.prompt!r}")
        path = folder / row["file"]
        images.append(AskedImage(path=path, sha256=sha256_file(path), asked=asked))
    if not images:
        raise UserError(f"no prompt of the {len(rows):,} images in {folder} has questions in {benchmark.path}")
    return images, len(rows) - len(images)


def answers_fingerprint(config: QuestionsConfig) -> Fingerprint:
    """Return what decides the answers, beside images and questions."""
    fields = {"version": ANSWERS_VERSION, "model": config.model, "answers": config.answers}
    fields |= config.fingerprint_fields()
    if server := config.server.fingerprint_fields():
        fields["server"] = server
    return Fingerprint.of(fields)


def keep_answers(
    images: Sequence[AskedImage], config: QuestionsConfig, *, output: Path, upstream: Mapping[str, str]
) -> KeptAnswers:
    """Ask what is not answered yet, and return all answers.

    Raises:
        ServerError: the server cannot be used; what is answered stays.
        UserError: too many questions have no answer.
    """
    directory, fingerprint = ShardDirectory(output), answers_fingerprint(config)
    with exclusive(output):
        directory.clear_leftovers(is_held=True)
        chunks = {
            f"images-{number:05d}": list(images[start : start + IMAGES_AT_ONCE])
            for number, start in enumerate(range(0, len(images), IMAGES_AT_ONCE))
        }
        sources = {name: _identity(chunk) for name, chunk in chunks.items()}
        pending = [
            name
            for name in chunks
            if not directory.is_done(name, sources[name], fingerprint) or _failed(directory.any_report(name))
        ]
        done = [name for name in chunks if name not in pending]
        mode: Mode | None = directory.any_report(done[0]).details["answers"] if done else None
        if pending or mode is None:
            asker = Asker(config, api_key=os.environ.get(config.server.api_key_variable, ""))
            mode = asker.settle_mode(mode)
            for place, name in enumerate(pending):
                rows = _ask(asker, chunks[name], mode=mode)
                _require_some(rows, config)
                _write(directory, name, rows, source=sources[name], fingerprint=fingerprint, mode=mode)
                log.info(f"{output.name}: {place + 1:,} of {len(pending):,} parts asked, {len(rows):,} {mode} answers")
        rows = [row for name in chunks for row in _read(directory, name)]
        extra = {"model": config.model, "answers": mode, "wording": config.wording}
        directory.write_manifest(fingerprint, list(chunks), upstream=upstream, extra=extra)
    kept = KeptAnswers(rows=rows, mode=mode, models=sorted({row["model"] for row in rows if row["model"]}))
    _require_answers(kept, config)
    return kept


def _failed(report: ShardReport) -> bool:
    """Whether the server has failed at some of the questions: then it is asked again."""
    return SERVER_FAILED in report.rejected


def _identity(chunk: Sequence[AskedImage]) -> str:
    return "sha256:" + sha256_text(json.dumps([image.outline() for image in chunk], ensure_ascii=False))


def _ask(asker: Asker, chunk: Sequence[AskedImage], *, mode: Mode) -> list[dict[str, Any]]:
    def pictures() -> Iterator[Any]:
        for image in chunk:
            yield read_picture(image.path, mend=MEND), image.asked.questions

    replies = asker.ask(pictures(), mode=mode)
    return [row for image, own in zip(chunk, replies, strict=True) for row in _rows(image, own)]


def _rows(image: AskedImage, replies: Sequence[Reply]) -> Iterator[dict[str, Any]]:
    for number, (question, reply) in enumerate(zip(image.asked.questions, replies, strict=True)):
        yield {
            "file": image.path.name,
            "key": image.asked.key,
            "prompt": image.asked.prompt,
            "number": number,
            "question": question.text,
            "answer": question.answer,
            "group": question.group,
            **asdict(reply),
        }


def _write(
    directory: ShardDirectory,
    name: str,
    rows: list[dict[str, Any]],
    *,
    source: str,
    fingerprint: Fingerprint,
    mode: Mode,
) -> None:
    directory.clear_marker(name)
    path = directory.file(name, ".parquet")
    with atomic_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary, compression="zstd")
    rejected = Counter(row["reject"] for row in rows if row["reject"] is not None)
    report = ShardReport(
        name=name,
        source=source,
        num_read=len(rows),
        num_kept=len(rows) - rejected.total(),
        rejected=dict(rejected),
        files={".parquet": sha256_file(path)},
        details={"answers": mode},
    )
    directory.write_marker(report, fingerprint)


def _read(directory: ShardDirectory, name: str) -> list[dict[str, Any]]:
    return read_table(directory.file(name, ".parquet"), mend=MEND_SHARD).to_pylist()


def _require_some(rows: Sequence[Mapping[str, Any]], config: QuestionsConfig) -> None:
    """Refuse a server of which nothing is understood, before it is asked about all images."""
    if len(rows) >= MIN_QUESTIONS and all(row["reject"] is not None for row in rows):
        raise UserError(
            f"{TABLE}.model {config.model!r} has given no answer to {len(rows)} questions: {_describe(rows)}; "
            f"{TABLE}.wording and its words of yes and no are what it is asked and read by"
        )


def _require_answers(kept: KeptAnswers, config: QuestionsConfig) -> None:
    num_unknown = sum(kept.unknown().values())
    if num_unknown > config.max_unknown_fraction * len(kept.rows):
        raise UserError(
            f"{num_unknown:,} of {len(kept.rows):,} questions have no answer, more than {TABLE}.max_unknown_fraction "
            f"{config.max_unknown_fraction:g}: {_describe(kept.rows)}"
            + (". The same command asks again where the server has failed" if SERVER_FAILED in kept.unknown() else "")
        )


def _describe(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the reasons with their counts, and the first of each."""
    counts = Counter(row["reject"] for row in rows if row["reject"] is not None)
    first = {row["reject"]: row for row in reversed(rows) if row["reject"] is not None}
    return "; ".join(
        f"{reason} {count:,}, such as {first[reason]['question']!r}: {first[reason]['text'][:200]!r}"
        for reason, count in counts.items()
    )
