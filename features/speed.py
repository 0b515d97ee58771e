"""How fast a job's encoder is: as an earlier run found it, or measured now by the job's own worker on a few samples."""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders.weights import is_model_here
from errors import MissingFileError, UserError
from features.jobs import FeatureInputs, FeatureJob
from pipelines.engine.pieces import Piece
from pipelines.engine.progress import get_logger
from pipelines.store.summary import read_summary, update_summary

SUMMARY_KEY = "features.speed"
# Enough samples to fill a batch once; then as many as take about this long.
NUM_WARM_UP_SAMPLES = 16
MEASURED_SECONDS = 3.0
MAX_MEASURED_SAMPLES = 4096
# In a shorter run, starting workers and loading the model is too large a part.
MIN_REMEMBERED_SECONDS = 600.0

log = get_logger("features")


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Samples per second of one worker, how many there will be, and where the figure comes from."""

    samples_per_second: float
    num_workers: int
    basis: str

    def hours(self, num_samples: int) -> float:
        """Return how long `num_samples` take."""
        return num_samples / (self.samples_per_second * self.num_workers) / 3600


def find_speed(job: FeatureJob, inputs: FeatureInputs) -> Speed | str:
    """Return how fast a job with pending samples will be, or what is missing to know it."""
    num_pending = sum(source.num_samples for source in job.pending())
    num_workers = count_workers(inputs, num_pending)
    rate = _recall_speed(job, inputs)
    if rate is not None:
        return Speed(samples_per_second=rate, num_workers=num_workers, basis="as in the last run")
    if job.family.encodes and inputs.engine.gpus_per_worker and not _count_gpus():
        return f"not measured: engine.gpus_per_worker = {inputs.engine.gpus_per_worker:g}, and there is no GPU here"
    if job.family.encodes and not is_model_here(job.encoder):
        return f"not measured: {job.encoder.location} is not here; `hf download {job.encoder.location}` fetches it"
    try:
        return _measure(job, inputs, num_workers=num_workers)
    except MissingFileError as missing:  # a model of a family's own
        return f"not measured: {missing}"


def _recall_speed(job: FeatureJob, inputs: FeatureInputs) -> float | None:
    """Return the samples per second of a worker that a former run has noted of this very job."""
    try:
        node: Any = read_summary(inputs.run)
    except UserError as error:
        log.warning(str(error))
        return None
    for name in ("features", "speed", job.output.path.name):
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict) or node.get("fingerprint") != job.fingerprint.digest:
        return None
    rate = node.get("samples_per_second_of_a_worker")
    return rate if isinstance(rate, int | float) and rate > 0 else None


def remember_speed(job: FeatureJob, inputs: FeatureInputs, *, num_samples: int, seconds: float) -> None:
    """Keep what a long run of the job has found, loading of the model included, for the plans of later ones."""
    if seconds < MIN_REMEMBERED_SECONDS:
        return
    content = {
        "fingerprint": job.fingerprint.digest,
        "samples_per_second_of_a_worker": round(num_samples / seconds / count_workers(inputs, num_samples), 4),
    }
    update_summary(inputs.run, f"{SUMMARY_KEY}.{job.output.path.name}", content)


def count_workers(inputs: FeatureInputs, num_samples: int) -> int:
    """Return how many workers this machine will run for so much; a cluster of `RAY_ADDRESS` may have more."""
    engine = inputs.engine
    if engine.is_in_process(num_samples, inputs.few_samples):
        return 1
    if engine.num_workers:
        return engine.num_workers
    if engine.gpus_per_worker:
        return max(1, int(_count_gpus() / engine.gpus_per_worker))
    return max(1, int((os.cpu_count() or 1) / engine.cpus_per_worker))


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _measure(job: FeatureJob, inputs: FeatureInputs, *, num_workers: int) -> Speed:
    """Run the job's own worker on the first samples that are pending, in a folder that is then removed."""
    source = max(job.pending(), key=lambda source: source.num_samples)
    with tempfile.TemporaryDirectory(prefix="features-plan-") as folder:
        worker = job.worker_class(job.family.probe(job.worker_config, Path(folder)))

        def run(num_samples: int) -> float:
            piece = Piece(
                source=source,
                start=0,
                stop=min(num_samples, source.num_samples),
                folder=Path(folder),
                samples_per_slice=inputs.engine.samples_per_slice,
            )
            start_seconds = time.perf_counter()
            worker(piece)
            return (time.perf_counter() - start_seconds) / piece.stop

        seconds_per_sample = run(NUM_WARM_UP_SAMPLES)
        num_samples = int(MEASURED_SECONDS / seconds_per_sample)
        num_samples = min(source.num_samples, MAX_MEASURED_SAMPLES, max(NUM_WARM_UP_SAMPLES, num_samples))
        seconds_per_sample = run(num_samples)
    return Speed(
        samples_per_second=1 / seconds_per_sample,
        num_workers=num_workers,
        basis=f"measured now on {num_samples} samples of {source.name}",
    )
