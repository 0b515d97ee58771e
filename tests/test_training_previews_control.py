"""Previews of a stage that trains a control branch: led by images of the user's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_training_lora import open_job
from test_training_parts import SHAPE, random_network
from test_training_previews import PROMPTS, make_drawing_run
from training_run import write_latents

from errors import MissingFileError, UserError
from pipelines.store.manifest import manifest_path
from pixart.branching import add_branch
from pixart.model import PixArt
from training.data.stage_data import survey_stage
from training.launch.preflight import inspect_stage
from training.previews.control import encode_controls
from training.previews.painter import Painter
from training.previews.plan import plan_previews
from training.stages.networks import blank_copy

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = make_drawing_run(tmp_path)

    write_latents(run, 32, {"laion_0": 40, "laion_1": 23}, buckets=["32x32"], is_bucketed=False, control="canny")
    path = manifest_path(run / "features" / "control-canny-32")

    path.write_text(path.read_text().replace('"toy/vae"', f'"{tmp_path / "vae"}"'))
    (tmp_path / "recipe.toml").write_text(
        (tmp_path / "recipe.toml").read_text() + "\n[features.stage2.families.control-canny]\n"
    )
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (40 + 8 * number, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return run


def opened(run: Path, **changed: object) -> Any:
    folder = run.parent
    settings: dict[str, object] = {
        "starts_from": str(folder / "start" if (folder / "start").exists() else random_network(folder / "start", 1)),
        "trains": "control",
        "control_copies": 1,
        "preview_prompts": PROMPTS,
        "preview_num_steps": 2,
        "preview_controls": [str(folder / "0.png"), str(folder / "1.png")],
    }
    return open_job(run, **settings | changed)


def test_each_preview_is_led_by_its_own_image(run: Path) -> None:
    job = opened(run)
    plan = plan_previews(job, survey_stage(job))
    assert plan is not None
    controls = encode_controls(job, plan, device=CPU)
    assert [tuple(latents.shape) for latents in controls] == [(1, 4, 4, 4)] * 2
    assert not torch.equal(controls[0], controls[1])
    torch.manual_seed(0)
    network = PixArt(SHAPE)
    add_branch(network, 1, key="k")
    for weight in network.parameters():
        weight.data.normal_(std=0.2)
    texts = [torch.randn(3, 16) for _ in range(3)]

    def drawn(used: Any) -> list[torch.Tensor]:
        painter = Painter(
            job,
            plan,
            [texts[0], texts[1], texts[1]],
            network=blank_copy(network),
            weights=network.state_dict(),
            device=CPU,
            dtype=torch.float32,
            controls=used,
        )
        return [painter.denoise(number)[0] for number in range(2)]

    led, alone = drawn(controls), drawn([])
    assert torch.equal(alone[0], alone[1]), "of one text and one noise"
    assert not torch.equal(led[0], led[1]) and not torch.equal(led[0], alone[0])
    assert torch.equal(drawn(controls[::-1])[1], led[0])


def test_images_that_cannot_lead_previews_are_refused(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, key = run.parent, r"training\.stage2\.preview_controls"
    with pytest.raises(UserError, match=rf"{key} has 1 images for 2 preview_prompts: give as many"):
        inspect_stage(opened(run, preview_controls=[str(folder / "0.png")]), 1)
    with pytest.raises(MissingFileError, match=rf"{key} .*gone.png does not exist"):
        inspect_stage(opened(run, preview_controls=[str(folder / "0.png"), str(folder / "gone.png")]), 1)
    (folder / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=rf"{key} .*bad.png cannot lead a preview: not_an_image"):
        inspect_stage(opened(run, preview_controls=[str(folder / "0.png"), str(folder / "bad.png")]), 1)
    with pytest.raises(UserError, match=rf"{key} leads the previews of a stage that trains = 'control'"):
        inspect_stage(opened(run, trains="all"), 1)
    assert inspect_stage(opened(run), 1).previews is not None
    inspect_stage(opened(run, preview_controls=[]), 1)
    assert "previews are drawn without control, and show nothing of the branch" in caplog.text
