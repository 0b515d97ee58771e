"""Where people watch a stage beside `metrics.jsonl`: TensorBoard, and Weights & Biases where a project is named."""

import contextlib
import importlib.util
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_write_json, remove_temporary_files
from pipelines.store.previews import Pictures
from pipelines.store.state_files import read_state
from training.stages.stage import TrainingJob

log = get_logger("training")

WANDB_RUN = "wandb.json"
# Until W&B's servers have to answer; without an answer the stage is trained without them.
WANDB_SECONDS = 30.0


class Board(Protocol):
    """A place that shows numbers and pictures of steps."""

    def add_scalars(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Show numbers by name."""
        ...

    def add_pictures(self, pictures: Pictures, *, step: int) -> None:
        """Show previews."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class TensorBoard:
    """Event files in `tensorboard/`; what an earlier run wrote after `step` counts no more."""

    def __init__(self, directory: Path, *, step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def add_scalars(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Show numbers by name."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def add_pictures(self, pictures: Pictures, *, step: int) -> None:
        """Show previews by number, their prompts among the texts."""
        for number, (prompt, image) in enumerate(pictures):
            self._writer.add_image(_tag(number), np.asarray(image), step, dataformats="HWC")
            self._writer.add_text(_tag(number), prompt, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a resume goes on with: its id is in `wandb.json` of the stage.

    What goes wrong there is said once, and the stage is trained on without it.
    """

    def __init__(self, directory: Path, *, project: str, name: str, config: Mapping[str, Any]) -> None:
        self._run: Any = None
        with self._going_on_without():
            import wandb

            settings = wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                init_timeout=WANDB_SECONDS,
                finish_timeout=WANDB_SECONDS,
                finish_timeout_raises=False,
            )
            self._run = wandb.init(
                project=project,
                id=_run_id(directory, project),
                resume="allow",
                name=name,
                config=dict(config),
                dir=str(directory),
                settings=settings,
            )
            log.info(f"Weights & Biases: {self._run.url or f'offline, in {Path(self._run.dir).parent}'}")

    def add_scalars(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Show numbers by name; steps that are trained again after a resume have the numbers that they had."""
        if self._run is not None:
            with self._going_on_without():
                self._run.log(dict(scalars), step=step)

    def add_pictures(self, pictures: Pictures, *, step: int) -> None:
        """Show previews by number, with their prompts."""
        if self._run is not None and pictures:
            with self._going_on_without():
                import wandb

                images = {
                    _tag(number): wandb.Image(image, caption=prompt) for number, (prompt, image) in enumerate(pictures)
                }
                self._run.log(images, step=step)

    def close(self) -> None:
        """Send what is left, for a while."""
        if self._run is not None:
            with self._going_on_without():
                self._run.finish()

    @contextlib.contextmanager
    def _going_on_without(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - of its library, or of the network: no training ends for it
            self._run = None
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            log.warning(
                f"Weights & Biases gets nothing more of this stage: {reason}; WANDB_MODE=offline keeps it, to be sent "
                "later"
            )


def open_boards(job: TrainingJob, *, step: int, description: Mapping[str, Any]) -> list[Board]:
    """Return where a stage that goes on after `step` is shown; `description` is what `trainer.json` says of it."""
    boards: list[Board] = [TensorBoard(job.directory, step=step)]
    project = job.settings.wandb_project
    if project is not None and has_wandb():
        name = f"{job.command.run.resolve().name}/{job.command.stage_name}"
        config = {**description, "settings": job.settings.model_dump(mode="json")}
        boards.append(WeightsAndBiases(job.directory, project=project, name=name, config=config))
    return boards


def has_wandb() -> bool:
    """Whether the package of Weights & Biases is installed."""
    return importlib.util.find_spec("wandb") is not None


def _tag(number: int) -> str:
    return f"preview/{number:02d}"


def _run_id(directory: Path, project: str) -> str:
    """Return the id of the stage's run in a project, a new one where it has none."""
    path = directory / WANDB_RUN
    if path.is_file():
        kept = read_state(path, mend="remove it, and a new run of W&B begins", keys=("project", "id"))
        if kept["project"] == project:
            return str(kept["id"])
    new = {"project": project, "id": secrets.token_hex(8)}
    remove_temporary_files(directory, WANDB_RUN)
    atomic_write_json(path, new)
    return new["id"]
