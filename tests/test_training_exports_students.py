"""Exports of weights distilled to few steps: one guidance inside, LCM's scheduler beside, diffusers draws the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from sampling_run import MAX_TOKENS, make_run, save_adapter
from test_sampling_students import RANGE, drawn, save_student

from encoders.weights import identity_of
from errors import UserError
from pipelines.store.bases import describe_base
from pixart.convert import load_diffusers
from pixart.guidance_condition import fold_guidance
from pixart.processes.specs import ddpm_spec, lcm_student
from sampling.config import EncoderConfig, SamplingConfig
from sampling.foreign_weights import open_trained_model
from sampling.students import follow_weights
from training.convert import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def by_pipeline(folder: Path, *, num_steps: int = 4, times: list[int] | None = None) -> np.ndarray:
    pipeline = PixArtAlphaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, LCMScheduler)
    image = pipeline(
        "a star",
        num_inference_steps=num_steps,
        timesteps=times,
        guidance_scale=1.0,
        width=32,
        height=32,
        generator=[torch.Generator().manual_seed(5)],
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=MAX_TOKENS,
    ).images[0]
    return np.asarray(image).astype(int)


def converted(run: Path, target: str, *flags: str) -> Path:
    main([str(run / "training" / "stage2"), str(run / target), *flags])
    return run / target


@pytest.mark.parametrize(
    ("guidance", "flags", "table", "num_steps"),
    [
        (RANGE, (), {}, 4),
        (RANGE, ("--cfg", "9"), {"guidance_scale": 9.0, "num_steps": 2}, 2),
        (5.5, (), {"num_steps": 1}, 1),
        (None, (), {"num_steps": 4}, 4),
        (5.5, (), {"times": [899, 499]}, 2),
    ],
)
def test_diffusers_draws_the_same_from_an_export(
    run: Path, guidance: Any, flags: Any, table: Any, num_steps: int
) -> None:
    save_student(run, guidance)
    ours, _ = drawn(run, seed=5, **table)
    folder = converted(run, "export", "--pipeline", *flags)
    theirs = by_pipeline(folder, num_steps=num_steps, times=table.get("times"))
    assert ours.std() > 1
    assert np.abs(ours - theirs).max() <= 2


def test_diffusers_draws_the_same_with_an_adapter_of_few_steps_merged(run: Path, tmp_path: Path) -> None:
    weights = run / "training" / "stage2" / "step-7" / "model"
    belongs = describe_base(weights, (), run=run, identity=identity_of(weights), shape={})
    process = ddpm_spec(student=lcm_student(guidance=5.5))
    adapter = save_adapter(tmp_path / "lcm", base=belongs, process=process)
    ours, settings = drawn(run, seed=5, lora=[str(adapter)])
    assert settings["guidance_scale"] == 5.5
    folder = converted(run, "export", "--pipeline", "--lora", str(adapter))
    assert np.abs(ours - by_pipeline(folder)).max() <= 2
    plain = converted(run, "plain", "--lora", str(adapter), "--weights", "0")
    assert "DPMSolver" in (plain / "scheduler" / "scheduler_config.json").read_text()


def test_an_export_says_what_is_inside_and_keeps_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = save_student(run, RANGE)
    folder = converted(run, "export", "--cfg", "9")
    assert "distilled by lcm: guidance 9 is inside; 1 to 8 steps draw it" in " ".join(capsys.readouterr().err.split())
    assert "guidance_scale=1.0" in (folder / "README.md").read_text()
    loaded, expected = load_diffusers(folder / "transformer"), fold_guidance(network, 9.0)
    assert loaded.config == expected.config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in expected.state_dict().items())
    encoders = EncoderConfig(text_model=str(run / "t5"), vae_model=str(run / "vae"), max_tokens=MAX_TOKENS)
    trained = open_trained_model(str(folder), encoders)
    assert trained.process == ddpm_spec(student=lcm_student(guidance=9.0))
    config, _ = follow_weights(SamplingConfig(), trained)
    assert (config.solver, config.num_steps, config.guidance_scale) == ("lcm", 4, 9.0)
    converted(run, "far", "--cfg", "2")
    said = " ".join(capsys.readouterr().err.split())
    assert "guidance 2 is inside, which is outside of the 4 to 16 that it was trained with" in said
    main([str(folder), str(run / "again")])
    assert trained.process == open_trained_model(str(run / "again"), encoders).process


def test_a_guidance_that_cannot_be_chosen_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match=r"CFG is 7, but SOURCE .* is not told its guidance: it is chosen in drawing"):
        converted(run, "export", "--cfg", "7")
    save_student(run, 5.5)
    with pytest.raises(UserError, match=r"CFG is 7, but .* not told its guidance: what is inside is there to stay"):
        converted(run, "export", "--cfg", "7")
    converted(run, "export", "--cfg", "5.5")


@pytest.mark.parametrize(("typed", "said"), [("0.5", "0.5"), ("-3", "-3"), ("nan", "nan"), ("inf", "inf")])
def test_a_guidance_that_is_none_is_refused(run: Path, typed: str, said: str) -> None:
    save_student(run, RANGE)
    with pytest.raises(UserError, match=rf"CFG is {said}, not a guidance of 1, for none, or more"):
        converted(run, "export", f"--cfg={typed}")


def test_an_export_of_a_student_with_times_of_its_own_says_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its scheduler cannot: in steps from 999 on pipelines would draw at times that it was not trained at."""
    save_student(run, 1.5, times=[[599], [899, 499]])
    ours, settings = drawn(run, seed=5)
    assert settings["times"] == [899, 499]
    folder = converted(run, "export", "--pipeline")
    said = "1 step at 599 or 2 steps at 899, 499 draw it, as timesteps=[899, 499], without guidance"
    assert said in " ".join(capsys.readouterr().err.split())
    card = (folder / "README.md").read_text()
    assert said in card and "max_sequence_length=40, timesteps=[899, 499], guidance_scale=1.0" in card
    assert "num_inference_steps" not in card
    assert np.abs(ours - by_pipeline(folder, num_steps=2, times=[899, 499])).max() <= 2
