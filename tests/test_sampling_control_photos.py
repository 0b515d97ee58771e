"""`sampling.control_is = "photo"`: which map is drawn of a photo, and what says so."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from led_drawing import drawn, listening, pixels, sample, save_noise, words
from PIL import Image
from sampling_run import make_run, save_branch, save_control_checkpoint, write_recipe
from test_encoders_control_maps import hed_weights

from encoders.control_kinds import open_control_maps
from errors import MissingFileError, UserError
from pipelines.command import parse_command
from pipelines.store.files import sha256_file
from sampling.control_kind import maps_of
from sampling.evaluation.config import EvaluationConfig
from sampling.evaluation.contestants import find_contestants


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = make_run(tmp_path / "run")
    save_control_checkpoint(run, "edges")
    return run


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    return listening(caplog, monkeypatch)


def test_of_a_photo_the_map_of_the_branchs_kind_is_drawn(
    run: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    photo = save_noise(tmp_path / "photo.png")
    led = drawn(run, control=str(photo), control_is="photo", size="48x32")
    (map_file,) = (run / "samples" / "edges-prompt" / "control").glob("*.png")
    with Image.open(photo) as image:
        cut = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC, reducing_gap=3.0))
    edges = open_control_maps("canny", {}, device=torch.device("cpu")).draw(cut)
    assert np.array_equal(pixels(map_file), edges) and set(np.unique(edges)) <= {0, 255}
    Image.fromarray(edges).save(tmp_path / "map.png")
    assert np.array_equal(drawn(run, control=str(tmp_path / "map.png"), size="48x32"), led)
    assert not np.array_equal(drawn(run, control=str(photo), size="48x32"), led), "the photo itself is another map"
    assert not np.array_equal(pixels(map_file), edges)
    said.clear()
    sample(run, "edges", "--plan", prompt="a star", control=str(photo), control_is="photo")
    assert "photo.png, a photo of which a map is drawn (canny): 60x40, resized to 48x32" in words(said)


def test_a_photo_s_map_by_other_weights_than_the_branch_was_trained_with_is_said(
    run: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    torch.save(hed_weights(), tmp_path / "hed.pth")
    step = save_control_checkpoint(run, "soft", kind="hed")
    trainer = json.loads((step / "trainer.json").read_text())
    trainer["control"] |= {"settings": {"model": str(tmp_path / "gone.pth")}, "identity": f"sha256:{'1' * 64}"}
    (step / "trainer.json").write_text(json.dumps(trainer))
    photo = {"control": str(save_noise(tmp_path / "photo.png")), "control_is": "photo"}
    with pytest.raises(MissingFileError, match=r"sampling\.control_settings\.model: .*gone\.pth does not exist"):
        drawn(run, "soft", **photo)
    drawn(run, "soft", **photo, **{"control_settings.model": str(tmp_path / "hed.pth")})
    assert "gone.pth (sha256:111111111111), and these are drawn by" in words(said)
    said.clear()
    trainer["control"]["identity"] = f"sha256:{sha256_file(tmp_path / 'hed.pth')}"
    (step / "trainer.json").write_text(json.dumps(trainer))
    drawn(run, "soft", **photo, **{"control_settings.model": str(tmp_path / "hed.pth")})
    assert "was trained with" not in words(said)


def test_of_a_photo_no_map_is_drawn_where_nothing_says_its_kind(run: Path, tmp_path: Path) -> None:
    photo = {"control": str(save_noise(tmp_path / "photo.png")), "control_is": "photo"}
    foreign = str(save_branch(tmp_path / "foreign"))
    with pytest.raises(
        UserError, match=r"control_is = 'photo', but .*foreign.* does not say which maps .*CONTROL_KIND=…"
    ):
        drawn(run, "3", control_branch=foreign, **photo)
    save_control_checkpoint(run, "given", kind="given")
    with pytest.raises(UserError, match=r"control_is = 'photo', but .*given.* says that its maps were made elsewhere"):
        drawn(run, "given", **photo)
    foreigner = {"control_branch": foreign, "size": "48x32", **photo}
    expected = drawn(run, "edges", **photo | {"size": "48x32"})
    assert drawn(run, "3", **foreigner, control_kind="canny").shape == expected.shape
    map_file = next((run / "samples" / "stage3-prompt" / "control").glob("*.png"))
    canny = pixels(map_file)
    assert np.array_equal(canny, pixels(next((run / "samples" / "edges-prompt" / "control").glob("*.png"))))
    drawn(
        run,
        "3",
        **foreigner,
        control_kind="canny",
        **{"control_settings.widen_pixels": 1},
    )
    assert (pixels(map_file) > 0).mean() > (canny > 0).mean(), "what decides the map draws it anew"
    assert drawn(run, "given", control_kind="canny", **photo).shape == (32, 48, 3)
    for wrong, match in {
        "sketch": r"sampling\.control_kind = 'sketch': .* of kind 'sketch' are not drawn here; there are canny",
        "hed": r"sampling\.control_kind = 'hed', but .*edges.* says that it was trained with canny maps: leave it out",
    }.items():
        with pytest.raises(UserError, match=match):
            drawn(run, "edges", control_kind=wrong, **photo)
    with pytest.raises(UserError, match=r"sampling\.control_kind is 'canny', but nothing leads what is drawn"):
        drawn(run, "edges", control_kind="canny")
    with pytest.raises(UserError, match=r"sampling\.control_settings\.widen = 1: .* of kind canny"):
        drawn(run, "edges", **{"control_settings.widen": 1}, **photo)
    with pytest.raises(MissingFileError, match=r"sampling\.control_settings\.model: gone\.pth does not exist"):
        drawn(run, "3", **foreigner, control_kind="hed", **{"control_settings.model": "gone.pth"})
    save_control_checkpoint(run, "sketch", kind="sketch")
    with pytest.raises(UserError, match=r"control maps of kind 'sketch' are not drawn here; there are canny"):
        drawn(run, "sketch", **photo)
    assert drawn(run, "3", control_branch=foreign, control=photo["control"]).shape == (32, 48, 3)


def test_the_kind_is_that_of_branches_that_are_compared_too(run: Path, tmp_path: Path) -> None:
    save_control_checkpoint(run, "given", kind="given")
    row = {"key": "0", "prompt": "a star", "control": str(save_noise(tmp_path / "photo.png"))}
    (run / "led.jsonl").write_text(json.dumps(row) + "\n")
    recipe = write_recipe(run, prompts="{run}/led.jsonl", control_is="photo", control_kind="canny")
    argv = ["--recipe", str(recipe), "--run", str(run), "--stage", "edges"]
    command = parse_command("sampling.evaluation", "", argv=argv, has_stages=True)
    found = find_contestants(command, EvaluationConfig(compare=[f"{run}:given"]))
    assert [maps_of(each.trained)[0] for each in found] == ["canny", "canny"]
