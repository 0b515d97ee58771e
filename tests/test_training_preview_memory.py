"""Memory of previews: what is reckoned by shapes is what a CPU takes, and a plan says it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_previews import PROMPTS, make_drawing_run, settings
from training_run import D_TEXT, arguments, finish
from warm_python import WarmProcess

from encoders.living_bytes import LivingBytes
from encoders.opening import open_codec
from pipelines.command import parse_command
from pixart.adapter_layers import AdapterShape
from pixart.adapters import add_adapters
from pixart.model import PixArt, PixArtConfig
from training.data.stage_data import survey_stage
from training.previews import painter as painting
from training.previews.footprint import decoding_bytes, drawing_bytes, preview_parts
from training.previews.painter import Painter
from training.previews.plan import plan_previews
from training.stages.networks import blank_copy
from training.stages.stage import open_stage

CPU = torch.device("cpu")
SHAPE = PixArtConfig(num_layers=3, num_heads=4, head_dim=32, caption_channels=D_TEXT, sample_size=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_drawing_run(tmp_path_factory.mktemp("previews"))


@pytest.mark.parametrize(
    ("size", "guidance", "dtype", "is_adapter"),
    [
        ("128x128", 4.5, torch.float32, False),
        ("192x192", 4.5, torch.bfloat16, False),
        ("128x256", 1.0, torch.float32, True),
    ],
)
def test_what_is_reckoned_is_what_a_cpu_takes(run, size, guidance, dtype, is_adapter, monkeypatch) -> None:
    drawn = settings(preview_size=size, preview_guidance_scale=guidance, preview_num_steps=5)
    job = open_stage(parse_command("training", "", argv=arguments(run, 2, **drawn), has_stages=True))
    plan = plan_previews(job, survey_stage(job))
    assert plan is not None
    network = PixArt(SHAPE)
    if is_adapter:
        add_adapters(network, AdapterShape(rank=2, alpha=2.0, targets=("attention",)), key="")
    weights = {name: weight.detach() for name, weight in network.named_parameters()}
    texts = [torch.randn(12, D_TEXT)] * (1 + len(PROMPTS))
    codec: Any = open_codec(job.features.vae["model"], key="VAE")
    monkeypatch.setattr(painting, "open_codec", lambda *_, **__: codec)
    meter = LivingBytes(device="cpu")
    with meter.watching(ignored=[*weights.values(), *texts, *codec.model.parameters()]):
        painter = Painter(job, plan, texts, network=blank_copy(network), weights=weights, device=CPU, dtype=dtype)
        copied = sum(weight.numel() for weight in weights.values()) * dtype.itemsize * (dtype != torch.float32)
        painter.draw(0)
        drawing = meter.restart()
        painter.decode()
    blank = blank_copy(network)
    assert copied + drawing_bytes(job, plan, blank, dtype=dtype) == pytest.approx(drawing, rel=0.1)
    reckoned = decoding_bytes(job, plan, channels=4, is_host=True)[1]
    assert reckoned == pytest.approx(meter.peak_bytes, rel=0.1)
    parts = preview_parts(job, plan, blank, dtype=dtype, is_host=True)
    trained = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    assert parts["whole average"] == 4 * trained


def test_a_plan_says_what_previews_take_and_where_they_may_not_fit(run: Path) -> None:
    def planned(gigabytes: float, **changed: object) -> str:
        changed |= {"device_gigabytes": gigabytes, "num_processes": 1, "dtype": "bf16"}
        flags = arguments(run, 2, **settings(**changed))
        return finish(WarmProcess("training", [*flags, "--plan"]))

    said = planned(12)
    assert "while previews are drawn: weights" in said and "VAE" in said and "may not fit" not in said
    said = planned(0.0011, preview_size="512x512")
    assert "micro-batches x 8" in said and "previews may not fit, and then there are none: they need" in said
