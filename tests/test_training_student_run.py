"""A stage of few steps from its features to pictures: previews, `make sample` and diffusers draw one student alike."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from PIL import Image
from test_training_networks import saved
from test_training_previews import PROMPTS, features, run, shown  # noqa: F401 - fixtures
from torch import nn
from training_run import D_TEXT, MAX_TOKENS, train

from pixart.model import PixArt, PixArtConfig
from pixart.processes.make import process_of
from pixart.processes.specs import ddpm_spec, flow_spec
from sampling.adapters import add_adapters
from sampling.config import EncoderConfig, SamplingConfig
from sampling.foreign_weights import open_trained_model
from sampling.renderer import Renderer
from sampling.requests import ImageRequest
from sampling.students import describe_oddities, follow_weights
from sampling.text_encoding import load_texts
from sampling.trained_model import TrainedModel, open_run_model
from training.convert import main

SHAPE = PixArtConfig(num_layers=2, num_heads=2, head_dim=8, caption_channels=D_TEXT, sample_size=4)
SEED = 7


def settings(folder: Path, *, process: str = "ddpm", **others: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    network = PixArt(replace(SHAPE, out_channels=4) if process == "flow" else SHAPE)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.15)
    teacher = saved(network, folder / "model")
    (folder / "scheduler").mkdir()
    scheduler = process_of(flow_spec() if process == "flow" else ddpm_spec()).scheduler_config()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return {
        "starts_from": teacher,
        "networks.teacher": teacher,
        "objective": "consistency",
        "process": process,
        "num_processes": 1,
        "num_steps": 3,
        "checkpoint_every": 3,
        "learning_rate": 1e-2,
        "preview_prompts": PROMPTS,
        "preview_seed": SEED,
        "preview_guidance_scale": 6.0,
        **others,
    }


def drawn(trained: TrainedModel, **typed: Any) -> list[Image.Image]:
    config, trained = follow_weights(SamplingConfig(text_dtype="bfloat16", num_threads=1, **typed), trained)
    assert (config.solver, config.num_steps) == ("lcm", 4)
    assert list(describe_oddities(config, trained)) == [] and trained.pass_guidance(config.guidance_scale) == 1
    shape = {"number": 0, "label": None, "seed": SEED, "width": 32, "height": 32}
    requests = [ImageRequest(key=prompt, prompt=prompt, file=f"{prompt}.png", **shape) for prompt in PROMPTS]
    assert trained.text is not None
    return Renderer(config, trained).draw(requests, load_texts(requests, config, trained.text)).images()


def by_pipeline(folder: Path) -> list[np.ndarray]:
    pipeline = PixArtAlphaPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPTS,
        num_inference_steps=4,
        guidance_scale=1.0,
        width=32,
        height=32,
        generator=[torch.Generator().manual_seed(SEED) for _ in PROMPTS],
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=MAX_TOKENS,
    ).images
    return [np.asarray(image).astype(int) for image in images]


def require_alike(images: list[Image.Image], others: list[np.ndarray]) -> None:
    for image, other in zip(images, others, strict=True):
        assert np.abs(np.asarray(image).astype(int) - other).max() <= 2


def require_shown(images: list[Image.Image], run: Path) -> None:  # noqa: F811
    """Previews draw a student as one; a guidance that is folded is added in another order than one that is told."""
    for image, other in zip(images, shown(run, 3).values(), strict=True):
        difference = np.asarray(image).astype(int).ravel() - np.frombuffer(other, dtype=np.uint8)
        assert np.abs(difference).max() <= 1


@pytest.mark.slow
def test_a_student_that_is_told_its_guidance(run: Path, tmp_path: Path) -> None:  # noqa: F811
    train(run, 2, **settings(tmp_path / "teacher"))
    trained = open_run_model(run, "stage2")
    images = drawn(trained, guidance_scale=6.0)
    require_shown(images, run)
    other = drawn(trained, guidance_scale=15.0)
    assert other[0].tobytes() != images[0].tobytes(), "it has learnt what it is told"
    main([str(run / "training/stage2"), str(tmp_path / "export"), "--pipeline", "--cfg", "6"])
    require_alike(drawn(trained, guidance_scale=6.0, text_encoder="device"), by_pipeline(tmp_path / "export"))


@pytest.mark.slow
def test_a_student_of_flow(run: Path, tmp_path: Path) -> None:  # noqa: F811
    train(run, 2, **settings(tmp_path / "teacher", process="flow", flow_shift=2.0))
    trained = open_run_model(run, "stage2")
    images = drawn(trained, guidance_scale=6.0)
    require_shown(images, run)
    other = drawn(trained, guidance_scale=15.0)
    assert other[0].tobytes() != images[0].tobytes(), "it has learnt what it is told"


@pytest.mark.slow
def test_adapters_of_few_steps(run: Path, tmp_path: Path) -> None:  # noqa: F811
    lora = {"trains": "lora", "lora.rank": 4, "consistency.guidance_range": [5.5, 5.5], "ema_decay": 0.0}
    train(run, 2, **settings(tmp_path / "teacher", **lora))
    trained = open_run_model(run, "stage2")
    images = drawn(trained)
    require_shown(images, run)
    main([str(run / "training/stage2"), str(tmp_path / "export"), "--pipeline"])
    require_alike(images, by_pipeline(tmp_path / "export"))
    assert trained.text is not None
    encoders = EncoderConfig(text_model=trained.text["model"], vae_model=trained.vae["model"], max_tokens=MAX_TOKENS)
    base = open_trained_model(str(tmp_path / "teacher" / "model"), encoders)
    both = add_adapters(base, ["{run}/training/stage2"], None, run=run)
    require_alike(drawn(both), [np.asarray(image).astype(int) for image in images])
