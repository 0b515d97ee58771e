"""`[toyworld]`: how many scenes of each dataset are written, at which sizes, and which judge scores the samples."""

import pydantic

from pipelines.recipe import TableConfig


class ToyworldConfig(TableConfig):
    """Recipe table `[toyworld]`; the four counts are images written to the raw shards of that dataset."""

    seed: int = pydantic.Field(
        default=0, ge=0, description="Seed of every scene; sample i depends on (seed, dataset, i) only"
    )
    num_laion: int = pydantic.Field(
        default=1500, ge=0, description="LAION-like images: img2dataset tars with short, often wrong alt texts"
    )
    num_sa: int = pydantic.Field(default=1500, ge=0, description="SAM-like images: SA-1B tars with masks and no text")
    num_hq: int = pydantic.Field(
        default=600, ge=0, description="Larger images of several aspect ratios for stage 3, in img2dataset tars"
    )
    num_imagenet: int = pydantic.Field(
        default=1000, ge=0, description="Single-object images with a class label (shape x colour), for stage 1"
    )
    samples_per_shard: int = pydantic.Field(default=500, ge=1, le=10_000, description="Images in one tar")
    min_side_pixels: int = pydantic.Field(default=64, ge=32, description="Shortest side of the square images")
    max_side_pixels: int = pydantic.Field(default=96, ge=32, description="Longest side of the square images")
    hq_min_side_pixels: int = pydantic.Field(
        default=128, ge=32, description="Smallest square root of the area of an hq image"
    )
    hq_max_side_pixels: int = pydantic.Field(
        default=192, ge=32, description="Largest square root of the area of an hq image"
    )
    hq_max_aspect_ratio: float = pydantic.Field(
        default=2.0, ge=1.0, le=4.0, description="hq images have width/height between 1/this and this"
    )
    broken_fraction: float = pydantic.Field(
        default=0.002, ge=0.0, le=0.5, description="Part of the LAION-like images that is cut short, as in the wild"
    )
    num_prompts: int = pydantic.Field(
        default=96, ge=1, description="Unseen scenes in prompts.jsonl to sample and judge"
    )
    num_subject_images: int = pydantic.Field(
        default=8, ge=1, le=64, description="Images of the subject that DreamBooth learns, see toyworld.subject"
    )
    num_subject_prompts: int = pydantic.Field(
        default=120, ge=1, description="Prompts of the subject, each with a place and a background, to score"
    )
    num_other_prompts: int = pydantic.Field(
        default=560, ge=1, description="Unseen scenes without the subject, to score what was lost (two objects each)"
    )
    num_prior_prompts: int = pydantic.Field(
        default=600, ge=1, description="Prompts for images that the model draws before it learns the subject"
    )
    num_edges_images: int = pydantic.Field(
        default=2500, ge=1, description="Images that a control branch learns from, see toyworld.edges"
    )
    num_edges_prompts: int = pydantic.Field(
        default=300, ge=1, description="Edges of unseen scenes, each with a prompt of colours, to draw and score"
    )
    num_spoilt_images: int = pydantic.Field(
        default=4500, ge=3, description="Images that a choice is tried on, some of them spoilt, see toyworld.spoilt"
    )
    spoilt_picture_fraction: float = pydantic.Field(
        default=0.1, ge=0.0, le=0.6, description="Part of these whose picture is spoilt; of one source 1.5 times that"
    )
    spoilt_caption_fraction: float = pydantic.Field(
        default=0.3, ge=0.0, le=0.6, description="Part of these whose caption is spoilt; of one source 1.5 times that"
    )
    judge: str = pydantic.Field(
        default="toyworld/weights/judge", description="Folder of the judge's weights, see toyworld.judge"
    )
    num_report_examples: int = pydantic.Field(
        default=12, ge=1, le=64, description="Captions, and samples per stage, shown in the run's page"
    )

    @pydantic.model_validator(mode="after")
    def _check_sides(self) -> "ToyworldConfig":
        for lower, upper in (("min_side_pixels", "max_side_pixels"), ("hq_min_side_pixels", "hq_max_side_pixels")):
            if getattr(self, lower) > getattr(self, upper):
                raise ValueError(f"{lower} {getattr(self, lower)} is larger than {upper} {getattr(self, upper)}")
        return self
