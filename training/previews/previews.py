"""Previews of a stage as its ranks draw them: when, by whom, and what becomes of them."""

import copy
from collections.abc import Sequence
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from errors import is_out_of_memory, users_message
from pipelines.engine.progress import get_logger
from pipelines.store.previews import Pictures, preview_steps, remove_previews, write_previews
from pixart.dit import DiT
from pixart.model import PixArt
from training.data.survey import Survey
from training.loop.networks import Networks
from training.previews.control import encode_controls
from training.previews.page import write_page
from training.previews.painter import Painter
from training.previews.plan import PreviewPlan, plan_previews
from training.previews.texts import read_embeddings
from training.stages.kinds import Trainee
from training.stages.stage import TrainingJob

log = get_logger("training")


class Previews:
    """Draws what a plan says, with the average of the weights.

    Args:
        job, plan: what is trained and drawn.
        texts: see `Painter`; rank 0 alone has them.
        blank: the network on the meta device.
        last_step: whose previews are there.
    """

    def __init__(
        self,
        job: TrainingJob,
        plan: PreviewPlan,
        texts: Sequence[Tensor],
        *,
        blank: DiT | PixArt,
        last_step: int | None,
    ) -> None:
        self._job, self._plan, self._texts, self._blank, self._last_step = job, plan, texts, blank, last_step
        self._controls: Sequence[Tensor] | None = None  # encoded when they are first wanted

    def is_due(self, step: int) -> bool:
        """Whether previews of this step are wanted and not there."""
        return step != self._last_step and self._plan.is_due(step)

    def draw(self, networks: Networks, *, step: int) -> Pictures:
        """Draw and write the previews of a step, and return them on rank 0; all ranks must call it.

        They change nothing that training goes on with: neither weights nor random numbers. What goes wrong with them
        is a warning, for no training should end for a picture.
        """
        self._last_step = step
        device = networks.model.device
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            networks.model.whole_frozen() as frozen,
        ):
            pictures = self._draw(networks, frozen, step=step)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return pictures

    def _draw(self, networks: Networks, frozen: dict[str, Tensor], *, step: int) -> Pictures:
        average = networks.ema.gather()
        painter, pictures, failures = None, [], Failures(self._job, step)
        if dist.get_rank() == 0:
            with failures:
                painter = self._painter(networks, frozen | average)
        for number in range(len(self._plan.names)):
            if painter is not None and not failures.are_any:
                with failures:
                    painter.draw(number)
            # All wait for one image at a time: for all of them it might take longer than ranks wait.
            dist.barrier()
        if painter is not None and not failures.are_any:
            with failures:
                pictures = list(zip(self._plan.names, painter.decode(), strict=True))
                write_previews(self._job.directory, step, pictures)
                write_page(self._job.directory)
        dist.barrier()
        return pictures

    def _painter(self, networks: Networks, weights: dict[str, Tensor]) -> Painter:
        if self._controls is None:
            self._controls = encode_controls(self._job, self._plan, device=networks.model.device)
        return Painter(
            self._job,
            self._plan,
            self._texts,
            network=copy.deepcopy(self._blank),
            weights=weights,
            device=networks.model.device,
            dtype=networks.model.dtype,
            controls=self._controls,
        )


class Failures:
    """Inside, what a user can mend and memory that is short become a warning, and nothing more is drawn of the step."""

    def __init__(self, job: TrainingJob, step: int) -> None:
        self._job, self._step = job, step
        self.are_any = False

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        message = users_message(error, self._job.directory)
        if is_out_of_memory(error):
            size = self._job.settings.preview_size
            message = f"the memory does not suffice; lower training.preview_size = {size!r}"
        if message is None:
            return False
        self.are_any = True
        log.warning(f"no previews after step {self._step:,}: {message}")
        return True


def open_previews(job: TrainingJob, survey: Survey, *, blank: Trainee) -> Previews | None:
    """Return what draws a stage's previews, None if it draws none; all ranks must call it.

    `blank` is the network that trains, on the meta device.

    Raises:
        UserError: as `plan_previews`, or the prompts have not been encoded.
    """
    plan = plan_previews(job, survey)
    if plan is None:
        return None
    assert isinstance(blank, DiT | PixArt), "a codec draws nothing"
    texts = read_embeddings(job) if dist.get_rank() == 0 and not plan.labels else []
    return Previews(job, plan, texts, blank=blank, last_step=last_previewed(job))


def last_previewed(job: TrainingJob) -> int | None:
    """Remove previews of steps that are to be trained again; returns the step whose previews are there, None if none.

    All ranks must call it.
    """
    found: list[int | None] = [None]
    if dist.get_rank() == 0:
        step = 0 if job.resume is None else job.resume.step
        steps = preview_steps(job.directory)
        for later in (other for other in steps if other > step):
            remove_previews(job.directory, later)
        # A stage that begins anew draws anew what it begins with.
        found = [step if step in steps and job.resume is not None else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]
