"""Students of process flow: they are drawn, exported and drawn by diffusers' pipelines as those of ddpm are."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from sampling_run import MAX_TOKENS, PIXART, make_run, randomised, save_checkpoint
from test_sampling_students import RANGE, drawn, followed
from torch import Generator

from pixart.convert import load_diffusers, save_diffusers
from pixart.guidance_condition import with_guidance_condition
from pixart.model import PixArt
from pixart.processes.make import process_of
from pixart.processes.specs import flow_spec, flow_student
from sampling.config import EncoderConfig, SamplingConfig
from sampling.foreign_weights import open_trained_model
from sampling.students import follow_weights
from training.convert import main

SHAPE = replace(PIXART, out_channels=4)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def save_student(run: Path, guidance: Any) -> None:
    network = randomised(with_guidance_condition(PixArt(SHAPE)) if isinstance(guidance, tuple) else PixArt(SHAPE))
    folder = save_checkpoint(run, 2, network)
    trainer = json.loads((folder / "trainer.json").read_text())
    trainer["process"]["student"] = flow_student(guidance=guidance)
    (folder / "trainer.json").write_text(json.dumps(trainer))


def by_pipeline(folder: Path, *, num_steps: int, kind: Any = PixArtAlphaPipeline) -> np.ndarray:
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    image = pipeline(
        "a star",
        num_inference_steps=num_steps,
        guidance_scale=1.0,
        width=32,
        height=32,
        generator=[Generator().manual_seed(5)],
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=MAX_TOKENS,
    ).images[0]
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(("guidance", "cfg", "num_steps"), [(RANGE, 9.0, 4), (5.5, None, 2)])
def test_diffusers_draws_the_same_from_an_export(run: Path, guidance: Any, cfg: float | None, num_steps: int) -> None:
    save_student(run, guidance)
    config, _, odd = followed(run)
    assert (config.solver, config.num_steps, odd) == ("lcm", 4, [])
    ours, settings = drawn(run, seed=5, num_steps=num_steps, **({} if cfg is None else {"guidance_scale": cfg}))
    assert settings["student"] == {"num_teacher_steps": 50, "guidance": cfg or guidance}
    main([str(run / "training/stage2"), str(run / "export"), "--pipeline", *([] if cfg is None else ["--cfg", "9"])])
    assert ours.std() > 1
    assert np.abs(ours - by_pipeline(run / "export", num_steps=num_steps)).max() <= 2
    encoders = EncoderConfig(text_model=str(run / "t5"), vae_model=str(run / "vae"), max_tokens=MAX_TOKENS)
    kept = open_trained_model(str(run / "export"), encoders).process
    assert kept["student"] == flow_student(guidance=cfg or guidance), "an export keeps what is inside"


def test_one_step_is_for_the_pipeline_of_sigma(run: Path) -> None:
    """Alpha's takes of a single step a second result, which LCM's scheduler alone gives."""
    save_student(run, 5.5)
    ours, _ = drawn(run, seed=5, num_steps=1)
    main([str(run / "training/stage2"), str(run / "export"), "--pipeline"])
    theirs = by_pipeline(run / "export", num_steps=1, kind=PixArtSigmaPipeline)
    assert ours.std() > 1 and np.abs(ours - theirs).max() <= 2
    with pytest.raises(IndexError):
        by_pipeline(run / "export", num_steps=1)


def test_a_pipeline_whose_scheduler_adds_as_much_noise_is_a_student(run: Path) -> None:
    network = load_diffusers(save_checkpoint(run, 2, randomised(PixArt(SHAPE))) / "model")
    save_diffusers(network, run / "theirs" / "transformer")
    config = process_of(flow_spec(shift=2.0, student=flow_student(guidance=4.5))).scheduler_config()
    DPMSolverMultistepScheduler.from_config(config).save_pretrained(run / "theirs" / "scheduler")
    encoders = EncoderConfig(text_model=str(run / "t5"), vae_model=str(run / "vae"), max_tokens=MAX_TOKENS)
    trained = open_trained_model(str(run / "theirs"), encoders)
    assert trained.process == flow_spec(shift=2.0, student=flow_student(guidance=None))
    settings, _ = follow_weights(SamplingConfig(), trained)
    assert (settings.solver, settings.num_steps, settings.guidance_scale) == ("lcm", 4, 1.0)


def test_others_of_flow_may_be_drawn_with_lcm(run: Path) -> None:
    save_checkpoint(run, 2, randomised(PixArt(SHAPE)))
    config, trained, odd = followed(run, solver="lcm")
    assert (config.num_steps, config.guidance_scale, trained.inner_guidance) == (4, 1.0, None)
    assert len(odd) == 1 and "nothing says that stage 2, step 7 was distilled to few steps" in odd[0]
    one, _ = drawn(run, solver="lcm", times=[600])
    other, _ = drawn(run, solver="lcm", num_steps=1)
    assert not np.array_equal(one, other)
