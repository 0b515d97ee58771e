"""`[evaluation]`: against which images and with which networks checkpoints are scored."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from pipelines.as_typed import typed_path
from pipelines.recipe import Decides, TableConfig
from sampling.evaluation.questions.config import QuestionsConfig

DECIDES_FEATURES = "decides what a network sees of an image"


class EvaluationConfig(TableConfig):
    """Recipe table `[evaluation]`; a network that is not named is a number that is not computed."""

    reference: str | None = pydantic.Field(
        default=None,
        description="Images to compare with: a folder, or raw shards as in data.shards; or .npz statistics of "
        "Inception; `{run}` stands for the run's folder; null = no distances",
    )
    inception: str | None = pydantic.Field(
        default=None, description="File pt_inception-2015-12-05-6726825d.pth, for FID; a path, never downloaded"
    )
    clip: str | None = pydantic.Field(
        default=None, description="CLIP folder or hub id, for CLIP score, CMMD and CLIP-FD"
    )
    clip_revision: str | None = pydantic.Field(default=None, description="Hub revision of `clip`")
    vision: str | None = pydantic.Field(
        default=None,
        description="Folder or hub id of any transformers vision model (DINOv2, a LLaVA's tower), for FD-<its name>",
    )
    vision_revision: str | None = pydantic.Field(default=None, description="Hub revision of `vision`")
    prompt_set: Literal["sampling", "t2i-compbench", "coco", "geneval", "geneval2", "dpg-bench"] = pydantic.Field(
        default="sampling",
        description="What the images show: the recipe's sampling.prompts, or a benchmark's files in `prompts`",
    )
    prompts: str | None = pydantic.Field(
        default=None,
        description="T2I-CompBench: folder of <category>_val.txt; COCO: captions_val2014.json; GenEval: "
        "evaluation_metadata.jsonl; GenEval 2: geneval2_data.jsonl; DPG-Bench: dpg_bench.csv",
    )
    num_prompts: int | None = pydantic.Field(
        default=None,
        ge=1,
        description="Prompts of a benchmark (T2I-CompBench: of each category, GenEval: of each tag); null = all, of "
        "COCO 30,000. For the recipe's own prompts sampling.max_prompts decides",
    )
    questions: QuestionsConfig = pydantic.Field(
        default=QuestionsConfig(), description="Who is asked about the images, and how"
    )
    compare: list[str] = pydantic.Field(
        default_factory=list,
        description="Further checkpoints in the same table: <run folder>:<stage>, or what sampling.checkpoint takes",
    )
    judgements: str = pydantic.Field(
        default="{run}/judge/{samples}.json",
        description="JSON of a judge's results for a folder of samples, see docs/EVALUATION.md; `{run}` stands for the "
        "run's folder, `{samples}` for the name of the samples' folder",
    )
    guidance_scales: list[float] = pydantic.Field(
        default=[1.5, 2.0, 3.0, 4.0, 5.0, 6.0], min_length=2, description="Points of the curve; the paper's Figure 20"
    )
    cache: str = pydantic.Field(
        default="{run}/evaluation/cache", description="Folder of features and statistics; may be shared between runs"
    )
    batch_size: int = pydantic.Field(default=32, ge=1, description="Images a network sees at once")
    device: Literal["auto", "cpu", "cuda"] = pydantic.Field(
        default="auto", description="Where networks run; auto = the GPU where torch sees one"
    )
    decode_threads: int = pydantic.Field(default=2, ge=1, description="Threads that decode and resize images")
    max_images_in_process: int = pydantic.Field(
        default=512, ge=0, description="So many images are seen without starting workers; larger sets go through Ray"
    )
    max_pixels: Decides[Annotated[int, DECIDES_FEATURES]] = pydantic.Field(
        default=89_478_485, ge=1, description="Largest image that is decoded, in pixels"
    )
    max_reject_fraction: Decides[float] = pydantic.Field(
        default=0.01, ge=0, le=1, description="Fraction of unusable images of a set above which the command fails"
    )
    preference_questions: list[str] = pydantic.Field(
        default=["quality", "alignment"], min_length=1, description="What raters are asked of each pair; Figure 5"
    )
    preference_pixels: int = pydantic.Field(
        default=512, ge=32, description="Longest side of the images in the preference page"
    )
    preference_seed: int = pydantic.Field(default=0, ge=0, description="Seed of order and sides in the page")

    @pydantic.field_validator("guidance_scales")
    @classmethod
    def _check_scales(cls, value: list[float]) -> list[float]:
        if min(value) < 1 or len(set(value)) < len(value):
            raise ValueError("guidance scales are distinct and at least 1")
        return value

    @pydantic.model_validator(mode="after")
    def _check_prompts(self) -> "EvaluationConfig":
        if self.prompt_set != "sampling" and self.prompts is None:
            raise ValueError(f"prompt_set {self.prompt_set!r} needs evaluation.prompts")
        return self

    def folder(self, text: str, run: Path) -> Path:
        """Return a configured path with `{run}` filled in."""
        return typed_path(text.replace("{run}", str(run)))


def written_out_defaults() -> dict[str, Any]:
    """Return the settings that fingerprints held before defaults were left out; keys that came later have no place."""
    defaults = EvaluationConfig.fingerprint_defaults()
    return {name: defaults[name] for name in ("max_pixels", "max_reject_fraction")}
