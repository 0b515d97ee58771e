"""What is drawn while a stage trains, how large and when; what cannot be drawn is refused before it starts."""

from collections.abc import Sequence
from dataclasses import dataclass

from encoders.text import DEFAULT_CLEANING
from encoders.tokens import find_lost_words
from encoders.weights import require_model, resolve_model
from errors import UserError
from pipelines.engine.preflight import require_packages
from pipelines.engine.progress import get_logger
from pixart.processes.specs import MOST_STUDENT_STEPS, clamped_guidance, own_times, student_of, usual_steps
from training.codec_keys import CODEC
from training.config import StageTraining
from training.data.survey import Survey
from training.loop.schedule import is_due
from training.previews.texts import is_encoded
from training.stages.stage import TrainingJob

log = get_logger("training")

MAX_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class PreviewPlan:
    """What a stage draws while it trains.

    Attributes:
        names: of the images: their prompts or, of a DiT, "class 7".
        labels: class labels of a DiT, one an image; empty where prompts are drawn.
        height, width: in pixels, of which a latent has `downsample` each way.
        every: steps between previews.
        num_steps: of the stage, after which they are drawn, too.
    """

    names: Sequence[str]
    labels: Sequence[int]
    height: int
    width: int
    downsample: int
    every: int
    num_steps: int

    def is_due(self, step: int) -> bool:
        """Whether there are to be previews after so many steps."""
        return is_due(step, every=self.every, last=self.num_steps)


@dataclass(frozen=True, kw_only=True)
class PreviewDrawing:
    """How previews are drawn: with guidance by passes, and of a student that is told its guidance the one it is told.

    A student is drawn as one: in few steps, with the guidance that is inside.
    """

    solver: str
    num_steps: int
    guidance_scale: float
    told_guidance: float | None = None
    times: Sequence[int] | None = None


def preview_drawing(settings: StageTraining) -> PreviewDrawing:
    """Return how the previews of a stage are drawn."""
    steps, scale = settings.preview_num_steps, settings.preview_guidance_scale
    student = student_of(settings.process_spec)
    if student is None:
        return PreviewDrawing(solver="dpm-solver++", num_steps=steps, guidance_scale=scale)
    steps = steps if steps <= min(MOST_STUDENT_STEPS, student["num_teacher_steps"]) else usual_steps(student)
    return PreviewDrawing(
        solver=student["method"],
        num_steps=steps,
        times=own_times(student, steps),
        guidance_scale=1.0,
        told_guidance=clamped_guidance(student, scale) if settings.is_told_guidance else None,
    )


def plan_previews(job: TrainingJob, survey: Survey) -> PreviewPlan | None:
    """Return what a stage draws while it trains, None if it draws nothing.

    Raises:
        UserError: a class has no embedding, or the size is no whole number of patches; names the key.
    """
    settings, key = job.settings, f"training.{job.command.stage_name}"
    labels = settings.preview_classes if settings.network == "dit" else []
    names = [f"class {label}" for label in labels] if settings.network == "dit" else settings.preview_prompts
    if not names or settings.network == CODEC:
        return None
    for label in labels:
        if label >= job.model.num_classes:
            raise UserError(f"{key}.preview_classes {label}: model.num_classes is {job.model.num_classes}")
    size = settings.preview_size or f"{job.features.resolution}x{job.features.resolution}"
    width, height = (int(side) for side in size.split("x"))
    multiple = survey.downsample * job.model.patch_size
    for side in (width, height):
        if side % multiple:
            raise UserError(f"{key}.preview_size {size}: {side} is not a multiple of {multiple}")
    return PreviewPlan(
        names=names,
        labels=labels,
        height=height,
        width=width,
        downsample=survey.downsample,
        every=settings.preview_every or settings.checkpoint_every,
        num_steps=settings.num_steps,
    )


def require_previews(job: TrainingJob, survey: Survey) -> PreviewPlan | None:
    """Return `plan_previews`, when all that its images need is there; says what of prompts is too long to be read.

    Raises:
        UserError: as `plan_previews`; or the VAE, or the text encoder of prompts that have not been encoded yet, is
            neither in a folder nor in the hub's cache and cannot be downloaded.
    """
    plan = plan_previews(job, survey)
    if plan is None:
        return None
    name = job.command.stage_name
    key = f"training.{name}.preview_classes" if plan.labels else f"training.{name}.preview_prompts"
    require_packages("transformers")
    vae = job.features.vae
    require_model(resolve_model(vae["model"], vae["revision"]), key=f"{key}: VAE of the features")
    if not plan.labels and not is_encoded(job):
        text = job.features.text_encoder
        assert text is not None, "the features of a PixArt have text"
        source = resolve_model(text["model"], text["revision"])
        require_model(source, key=f"{key}: text encoder of the features")
        lost = find_lost_words(
            plan.names,
            source,
            max_tokens=text["max_tokens"],
            cleaning=text.get("cleaning", DEFAULT_CLEANING),
            tokenizer=text.get("tokenizer"),
        )
        for prompt, words in lost.items():
            log.warning(
                f"{key}: the model reads {text['max_tokens']} tokens; of {_cut(prompt)!r} these words are lost: "
                f"{_cut(words)}"
            )
    size = (plan.height, plan.width)
    buckets = {tuple(map(int, bucket.split("x"))) for bucket in survey.buckets}
    if size not in buckets and job.settings.preview_size is not None:
        log.warning(
            f"training.{name}.preview_size {job.settings.preview_size} is none of the "
            f"{len(buckets)} sizes that are trained on"
        )
    return plan


def describe_previews(job: TrainingJob, plan: PreviewPlan) -> str:
    """Return what is drawn when, and what it takes beside training, which it waits for."""
    settings = job.settings
    drawing, num_images = preview_drawing(settings), len(plan.names)
    num_passes = drawing.num_steps * (1 + (drawing.guidance_scale != 1))
    kind = "classes" if plan.labels else "prompts"
    # A sample of training is a pass forward and two back.
    samples = num_images * num_passes / 3
    num_times = plan.num_steps // plan.every + 1 + (plan.num_steps % plan.every != 0)
    return (
        f"{num_images:,} {kind} at {plan.width}x{plan.height}, every {plan.every:,} steps, {num_times:,} times; "
        f"on one rank each about as long as {samples:,.0f} samples of training, and the VAE"
    )


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} …"
