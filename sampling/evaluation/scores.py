"""A table of checkpoints and their numbers, every input beside them: `RUN/evaluation/<stage>/scores.{json,md}`."""

import importlib.metadata
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from encoders.devices import require_device
from errors import UserError
from pipelines.as_typed import typed_command
from pipelines.command import Command
from pipelines.engine.progress import console, get_logger
from pipelines.engine.run import EngineConfig
from pipelines.store.files import (
    atomic_write_bytes,
    atomic_write_json,
    one_at_a_time,
    sha256_file,
    sha256_text,
)
from pipelines.store.manifest import (
    MANIFEST_NAME,
    Fingerprint,
    ShardDirectory,
    ShardReport,
    read_manifest,
)
from pipelines.store.summary import update_summary
from sampling.evaluation.config import EvaluationConfig, written_out_defaults
from sampling.evaluation.contestants import Contestant, check_samples, draw_samples, find_contestants
from sampling.evaluation.distances import cmmd, frechet_distance
from sampling.evaluation.features import FEATURES_VERSION, Features, compute_features
from sampling.evaluation.given_statistics import (
    REMARK,
    GivenStatistics,
    is_statistics,
    read_statistics,
    require_reference,
)
from sampling.evaluation.image_sets import ImageSet, open_reference, open_samples
from sampling.evaluation.judgement import judgement_file, read_judgement
from sampling.evaluation.networks import NetworkSource, count_cut_prompts, find_networks
from sampling.evaluation.tables import render_scores

SCORES_VERSION = 1  # raise it when what the numbers mean changes
REPORT_NAME = "scores"
FEW_IMAGES = 2048  # below it a covariance of Inception's 2048 channels has no full rank
NOT_INPUTS = ("source", "resized_to", "cropped")  # of a network: the first is written out, the others the resizer says
PACKAGES = ("torch", "transformers", "diffusers", "numpy", "pillow")

log = get_logger("evaluation")


@dataclass(frozen=True, kw_only=True)
class Number:
    """One number and what it was taken of and with.

    Attributes:
        better: "lower" or "higher".
        num_images: samples that it is over, num_reference: images they are compared with, 0 where there are none.
        rejected: unusable images of both, by reason; rejected_samples and rejected_reference: of each.
        sizes: of "samples" and "reference", how many were resized or cropped, from which sizes and to what, as
            `SetSizes.as_json` has it; a set whose sizes were not written down is left out.
        prompts: of a CLIP score, how much of the prompts CLIP does not read, as `TextCut` has it.
        remark: what must be known beside the value, in words.
        network_key: of the recipe, empty of a judge's number.
    """

    metric: str
    value: float
    better: str
    num_images: int
    num_reference: int
    network: str
    network_fingerprint: str
    resizer: str
    rejected: dict[str, int]
    rejected_samples: dict[str, int] = field(default_factory=dict)
    rejected_reference: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    prompts: dict[str, int] | None = None
    remark: str = ""
    network_key: str = ""


class Meter:
    """Networks and reference of one evaluation; takes the numbers of any folder of samples.

    Raises:
        MissingFileError, UserError: networks or reference are not there; names the recipe's key.
    """

    def __init__(self, command: Command) -> None:
        self._config = command.recipe.table("evaluation", EvaluationConfig)
        self._engine = command.recipe.table("engine", EngineConfig)
        self._run = command.run
        self._cache = self._config.folder(self._config.cache, command.run)
        require_device(self._config.device, key="evaluation.device")
        self.networks = find_networks(self._config)
        self.reference: ImageSet | None = None
        self.statistics: GivenStatistics | None = None
        if self._config.reference is not None and is_statistics(self._config.reference):
            self.statistics = read_statistics(self._config.reference, run=command.run)
        elif self._config.reference is not None:
            with TemporaryDirectory() as scratch:
                # The list of its images is kept for the workers; a plan writes nothing.
                cache = Path(scratch) if command.is_plan else self._cache
                self.reference = open_reference(self._config.reference, run=command.run, cache=cache)
        if self.reference is None:
            require_reference([network.key for network in self.networks], self.statistics)

    def require_numbers(self, contestants: Sequence[Contestant]) -> None:
        """Refuse to draw or look at images of which there would be no number.

        Raises:
            UserError: there is no network that measures any of them, and no judge has seen them; says what to set.
        """
        has_statistics = self.statistics is not None and any(network.key == "inception" for network in self.networks)
        if has_statistics or (self.networks and self.reference is not None):
            return
        # Without a reference there is CLIP alone, and its score is of prompts.
        if self.networks and any(item.trained.kind == "pixart" for item in contestants):
            return
        if any(self.judged(item) for item in contestants):
            return
        if self.networks:
            raise UserError(
                "nothing to measure: a CLIP score is of prompts, and these checkpoints know classes; set "
                "evaluation.reference for distances"
            )
        raise UserError(
            "nothing to measure: set evaluation.inception, evaluation.clip or evaluation.vision (with "
            f"evaluation.reference), or let a judge look at what `{typed_command('sample')}` has drawn and write "
            f"{judgement_file(contestants[0], self._config, self._run)}, see docs/EVALUATION.md"
        )

    def measure(self, contestant: Contestant) -> list[Number]:
        """Return the numbers of a contestant whose samples are drawn, and a judge's where it has seen them."""
        images = open_samples(contestant.folder, cache=self._cache, has_prompts=contestant.trained.kind == "pixart")
        numbers: list[Number] = []
        for network in self.networks:
            samples = self._features(images, network)
            if self.reference is not None:
                numbers += _distances(samples, self._features(self.reference, network))
            elif self.statistics is not None and network.key == "inception":
                numbers.append(_distance_to(samples, self.statistics))
            score = samples.clip_score() if network.key == "clip" else None
            if score is not None:
                numbers.append(_clip_score(score, samples, title=contestant.title))
        return numbers + self.judged(contestant)

    def judged(self, contestant: Contestant) -> list[Number]:
        """Return a judge's numbers of these very samples; none where it has not seen them."""
        judgement = read_judgement(contestant, self._config, self._run)
        if judgement is None:
            return []
        return [
            Number(
                metric=f"judge {axis.name.replace('_', ' ')}",
                value=axis.score,
                better=axis.better,
                num_images=axis.num_images,
                num_reference=0,
                network=judgement.judge,
                network_fingerprint=judgement.judge_fingerprint,
                resizer=judgement.method,
                rejected={},
            )
            for axis in judgement.axes
            if axis.num_images
        ]

    def _features(self, images: ImageSet, network: NetworkSource) -> Features:
        return compute_features(images, network, cache=self._cache, config=self._config, engine=self._engine)

    def settings(self) -> dict[str, Any]:
        """Return what else decides the numbers: which images are usable, and how features are computed."""
        return {"features_version": FEATURES_VERSION, **self._config.fingerprint_fields()}

    def described_inputs(self) -> dict[str, Any]:
        """Return `inputs`, and what is beside the reference's images and not among them."""
        inputs = self.inputs()
        if self.reference is not None:
            inputs["reference"] |= {"left_out": dict(self.reference.left_out)}
        return inputs

    def inputs(self) -> dict[str, Any]:
        """Return what decides the numbers: reference, networks and package versions."""
        reference = None
        if self.reference is not None:
            reference = {
                "images": self.reference.name,
                "fingerprint": self.reference.identity,
                "num_images": self.reference.num_images,
            }
        if self.statistics is not None:
            reference = {"statistics": self.statistics.name, "fingerprint": self.statistics.identity}
        return {
            "reference": reference,
            # Source beside the rest, as in scores made before.
            "networks": [
                {name: value for name, value in asdict(network).items() if name not in NOT_INPUTS}
                | asdict(network.source)
                for network in self.networks
            ],
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        }


def _distances(samples: Features, reference: Features) -> list[Number]:
    distance = frechet_distance(samples.gaussian(), reference.gaussian())
    few = _few(min(samples.num_images, reference.num_images))
    numbers = [_number(samples.network.distance, distance, samples, reference=reference, remark=few)]
    if samples.network.mmd is not None:
        discrepancy = cmmd(samples.embeddings(), reference.embeddings())
        numbers.insert(0, _number(samples.network.mmd, discrepancy, samples, reference=reference))
    return numbers


def _distance_to(samples: Features, statistics: GivenStatistics) -> Number:
    """Return the distance to given statistics, whose name says that they are given."""
    distance = frechet_distance(samples.gaussian(), statistics.gaussian)
    remark = "; ".join(filter(None, (_few(samples.num_images), REMARK)))
    return _number(f"{samples.network.distance} to given statistics", distance, samples, remark=remark)


def _few(num_images: int) -> str:
    said = f"{num_images:,} images are few: below {FEW_IMAGES:,} a Fréchet distance is mostly bias"
    return said if num_images < FEW_IMAGES else ""


def _clip_score(score: float, samples: Features, *, title: str) -> Number:
    """Return the CLIP score, and say what of the prompts it is not about."""
    cut = count_cut_prompts(samples.images.prompts(), samples.network)
    remark = cut.describe(noun="prompts", model="this CLIP")
    if cut.num_cut:
        log.warning(f"CLIP score of {title}: {remark}")
    return replace(_number("CLIP score", score, samples, better="higher", remark=remark), prompts=asdict(cut))


def _number(
    metric: str,
    value: float,
    samples: Features,
    *,
    reference: Features | None = None,
    better: str = "lower",
    remark: str = "",
) -> Number:
    sets = {"samples": samples} | ({"reference": reference} if reference is not None else {})
    sizes = {name: found.as_json() for name, images in sets.items() if (found := images.sizes()) is not None}
    return Number(
        metric=metric,
        value=value,
        better=better,
        num_images=samples.num_images,
        num_reference=reference.num_images if reference else 0,
        network=samples.network.source.location,
        network_fingerprint=samples.network.source.identity,
        resizer=samples.network.resizer,
        rejected=dict(sum((Counter(images.rejected) for images in sets.values()), Counter())),
        rejected_samples=dict(samples.rejected),
        rejected_reference=dict(reference.rejected) if reference is not None else {},
        sizes=sizes,
        remark=remark,
        network_key=samples.network.key,
    )


def score(command: Command) -> None:
    """Draw what is missing, score every checkpoint, and write the table; a finished one is printed again.

    Raises:
        MissingFileError, UserError: see `Meter` and `find_contestants`.
    """
    contestants, meter = _open(command)
    directory = ShardDirectory(command.run / "evaluation" / command.stage_name)
    start_seconds = time.monotonic()
    draw_samples(contestants, run=command.run)
    fingerprint, identity = _score_inputs(meter, contestants)
    fingerprint = directory.known_as(fingerprint, defaults=written_out_defaults())
    fingerprint = as_outlined(directory, fingerprint)
    is_done = directory.is_done(REPORT_NAME, identity, fingerprint) and (directory.path / MANIFEST_NAME).is_file()
    if is_done:
        log.info(f"nothing to do: {directory.file(REPORT_NAME, '.md')} is up to date")
    else:
        rows = [
            {
                "title": item.title,
                "inputs": item.inputs(),
                "numbers": [asdict(number) for number in meter.measure(item)],
            }
            for item in contestants
        ]
        write_report(
            directory,
            REPORT_NAME,
            {"inputs": meter.described_inputs(), "checkpoints": rows},
            {".md": render_scores(rows, meter.described_inputs())},
            fingerprint=fingerprint,
            identity=identity,
        )
        update_summary(
            command.run, f"seconds.evaluation_{command.stage_name}", round(time.monotonic() - start_seconds, 1)
        )
        figures = {number["metric"]: number["value"] for number in rows[0]["numbers"]}
        update_summary(command.run, f"evaluation.{command.stage_name}", figures)
        counts = {number["metric"]: _counts(number) for number in rows[0]["numbers"]}
        update_summary(command.run, f"evaluation_counts.{command.stage_name}", counts)
    log.info(f"written to {directory.path}")
    console.print(directory.file(REPORT_NAME, ".md").read_text(encoding="utf-8"), soft_wrap=True)


def _open(command: Command) -> tuple[list[Contestant], Meter]:
    """Open what is scored and what it is scored with, and refuse what would give no number."""
    contestants = find_contestants(command, command.recipe.table("evaluation", EvaluationConfig))
    meter = Meter(command)
    meter.require_numbers(contestants)
    return contestants, meter


def _counts(number: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a number is over, and what was left out or cut to get it."""
    counts = {name: number[name] for name in ("num_images", "num_reference", "rejected")}
    return counts if number["prompts"] is None else {**counts, "prompts": number["prompts"]}


def describe_score(command: Command) -> list[str]:
    """Return what `score` would do, line by line."""
    contestants, meter = _open(command)
    check_samples(contestants)
    networks = ", ".join(network.source.location for network in meter.networks) or "none"
    reference = meter.reference or meter.statistics
    lines = [f"networks: {networks}; reference: {'none' if reference is None else reference.name}"]
    for item in contestants:
        pending = len(item.job.pending())
        lines.append(f"{item.title}: would draw {pending:,} of {len(item.job.requests):,} images into {item.folder}")
    return lines


def judged_outline(numbers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return of a judge's numbers what decides a table, whatever their order and how the judge describes itself."""
    kept = ("value", "num_images", "better", "network_fingerprint")
    return {number["metric"]: {name: number[name] for name in kept} for number in numbers}


def as_outlined(directory: ShardDirectory, fingerprint: Fingerprint) -> Fingerprint:
    """Return the fingerprint of what is in `directory`, if it differs only in that it holds a judge's numbers whole.

    It was made before there were outlines of them, and stays done.
    """
    if not (directory.path / MANIFEST_NAME).is_file():
        return fingerprint
    found = read_manifest(directory.path).fingerprint
    outlines = {
        name: judged_outline(numbers) if isinstance(numbers, list) else numbers
        for name, numbers in found.fields.get("judged", {}).items()
    }
    return found if {**found.fields, "judged": outlines} == fingerprint.fields else fingerprint


def _score_inputs(meter: Meter, contestants: Sequence[Contestant]) -> tuple[Fingerprint, str]:
    judged = {item.folder.name: judged_outline([asdict(n) for n in meter.judged(item)]) for item in contestants}
    fingerprint = Fingerprint.of({"version": SCORES_VERSION, **meter.inputs(), **meter.settings(), "judged": judged})
    manifests = {item.title: sha256_file(item.folder / MANIFEST_NAME) for item in contestants}
    inputs = [[item.title, item.inputs(), manifests[item.title]] for item in contestants]
    return fingerprint, "sha256:" + sha256_text(json.dumps(inputs, sort_keys=True))


def write_report(
    directory: ShardDirectory,
    name: str,
    value: Mapping[str, Any],
    texts: Mapping[str, str],
    *,
    fingerprint: Fingerprint,
    identity: str,
) -> None:
    """Write `<name>.json` and further files (suffix to text), their marker and the directory's manifest."""
    with one_at_a_time(directory.path):
        directory.clear_leftovers(is_held=True)
        directory.clear_marker(name)
        atomic_write_json(directory.file(name, ".json"), value)
        for suffix, text in texts.items():
            atomic_write_bytes(directory.file(name, suffix), text.encode())
        num_rows = len(value["checkpoints"])
        files = {suffix: sha256_file(directory.file(name, suffix)) for suffix in (".json", *texts)}
        report = ShardReport(name=name, source=identity, num_read=num_rows, num_kept=num_rows, files=files)
        directory.write_marker(report, fingerprint)
        upstream = {
            row["inputs"]["samples"]: read_manifest(Path(row["inputs"]["samples"])).fingerprint.digest
            for row in value["checkpoints"]
        }
        directory.write_manifest(fingerprint, [name], upstream=upstream, extra={})
