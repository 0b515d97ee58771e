"""The app with an image that leads: images of `make sample`, what is kept and brought back, the page."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from app_run import PROMPT, SCREENSHOT, fill, opened_page, pixels, served_app, shown_image, wish
from playwright.sync_api import expect
from sampling_run import make_run, save_control_checkpoint, save_edges, write_recipe

from errors import MissingFileError, UserError
from pipelines.engine.run import EngineConfig
from sampling.__main__ import main as sample_main
from sampling.app import _describe
from sampling.app_choices import adapter_choices, checkpoint_choices
from sampling.app_control import MapPreviews
from sampling.app_studio import Studio, wish_of
from sampling.config import SamplingConfig
from sampling.trained_model import open_run_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("run"))
    save_control_checkpoint(run, "edges")
    save_edges(run / "edges.png")
    save_edges(run / "tall.png", size=(40, 64), seed=4)
    return run


def ignore(num_done: int) -> None:
    pass


def studio_of(run: Path, stage: str = "edges", **table: object) -> Studio:
    config = SamplingConfig.model_validate({"num_steps": 3, "text_dtype": "float32", **table})
    trained, engine = open_run_model(run, stage), EngineConfig(in_process=True)
    return Studio(config, trained, run=run, name=f"{stage}-app", engine=engine)


def sampled(run: Path, stage: str = "edges", **table: object) -> np.ndarray:
    """The image that `make sample` draws."""
    settings = {"prompt": PROMPT, "seed": 11, "size": "48x32", **table}
    sample_main(["--recipe", str(write_recipe(run, **settings)), "--run", str(run), "--stage", stage])
    folder = run / "samples" / (f"stage{stage}-prompt" if stage.isdigit() else f"{stage}-prompt")
    (path,) = (path for path in folder.glob("*.png") if path.name != "grid.png")
    return pixels(path)


def test_an_image_leads_as_it_does_for_make_sample_and_is_brought_back(run: Path, tmp_path: Path) -> None:
    studio = studio_of(run)
    upload = tmp_path / "upload.PNG"
    shutil.copy(run / "edges.png", upload)
    led = studio.draw(wish(control=str(upload), control_strength=0.8), on_step=ignore)
    expected = sampled(run, control=str(run / "edges.png"), control_strength=0.8)
    assert np.array_equal(pixels(led), expected)
    plain = studio.draw(wish(), on_step=ignore)
    assert np.array_equal(pixels(plain), sampled(run))
    other = studio.draw(wish(control=str(run / "tall.png"), control_strength=0.8), on_step=ignore)
    assert len({led, plain, other}) == 3 and len(studio.history()) == 3
    upload.unlink()
    again = wish_of(led)
    assert again.control is not None and again.control_strength == 0.8 and wish_of(plain).control is None
    assert Path(again.control).read_bytes() == (run / "edges.png").read_bytes()
    assert studio.draw(again, on_step=ignore) == led
    assert "the image that led it" not in _describe(studio, again, led)
    photo = studio.draw(wish(control=str(run / "edges.png"), control_is="photo"), on_step=ignore)
    assert wish_of(photo).control_is == "photo"
    assert np.array_equal(pixels(photo), sampled(run, control=str(run / "edges.png"), control_is="photo"))
    Path(again.control).unlink()
    assert wish_of(led).control is None
    assert _describe(studio, wish_of(led), led).endswith("the image that led it is gone")
    with pytest.raises(UserError, match="cannot lead what is drawn: not_an_image"):
        studio.draw(wish(control=str(run / "recipe.toml")), on_step=ignore)


def test_the_map_that_would_lead_is_shown_at_the_nearest_size(run: Path) -> None:
    studio = studio_of(run)
    maps = MapPreviews(studio)
    picture, size = maps.of(studio.checkpoint, wish(control=str(run / "tall.png"), size=""))
    assert size == "32x48" and picture.size == (32, 48)
    picture, size = maps.of(studio.checkpoint, wish(control=str(run / "tall.png"), control_is="photo", size="32x32"))
    assert size == "32x32" and set(np.unique(np.asarray(picture))) <= {0, 255}


def test_branches_are_among_the_checkpoints_and_a_named_one_leads_all_others(run: Path) -> None:
    assert any(label.startswith("edges, step 7") for label, _ in checkpoint_choices(run))
    assert adapter_choices(run, []) == []
    studio = studio_of(run, "stage3", control_branch="{run}/training/edges")
    with pytest.raises(UserError, match="has no control branch"):
        studio_of(run, "stage3").draw(wish(control=str(run / "edges.png")), on_step=ignore)
    trained = studio.look_at(str(run / "training" / "stage2" / "step-7"))
    assert trained.branch is not None and trained.name.endswith("+ edges, step-7")
    assert studio.look_at(str(run / "training" / "edges" / "step-7")).name == "edges, step 7"


def test_what_leads_the_first_wish_is_looked_at_before_the_page(run: Path) -> None:
    with pytest.raises(MissingFileError, match=r"sampling\.control .*gone\.png does not exist"):
        studio_of(run, control="{run}/gone.png")
    with pytest.raises(UserError, match=r"sampling\.control is set, but stage 3, step 7 has no control branch: name"):
        studio_of(run, "stage3", control="{run}/edges.png")
    save_control_checkpoint(run, "elsewhere", kind="given")
    with pytest.raises(UserError, match=r"control_is = 'photo', but .* says that its maps were made elsewhere"):
        studio_of(run, "elsewhere", control="{run}/edges.png", control_is="photo")
    first = studio_of(run, control="{run}/edges.png", control_strength=0.5).first_wish()
    assert (first.control, first.control_strength) == (str(run / "edges.png"), 0.5)
    shutil.rmtree(run / "training" / "elsewhere")


@pytest.mark.parametrize("kind", ["wide", "phone"])
def test_the_page_is_led_by_an_upload(run: Path, tmp_path: Path, kind: str) -> None:
    expected = sampled(run, control=str(run / "edges.png"), control_strength=0.8)
    (tmp_path / "broken.png").write_text("no image")
    recipe = write_recipe(run)
    width = 390 if kind == "phone" else 1400
    with served_app(run, recipe, stage="edges") as address, opened_page(address) as page:
        page.set_viewport_size({"width": width, "height": 980 if kind == "wide" else 844})
        upload = page.locator("#control-file input[type=file]")
        expect(page.locator("#control")).to_be_visible(timeout=30_000)
        expect(page.locator("#control-map")).to_be_hidden()
        upload.set_input_files(str(run / "edges.png"))
        expect(page.locator("#control-map img")).to_be_visible(timeout=30_000)
        expect(page.locator("#size input")).to_have_value("48x32")
        fill(page, prompt=PROMPT, seed=11, strength=0.8)
        page.locator("#draw").click()
        expect(page.locator("#said")).to_contain_text("control at 0.8", timeout=60_000)
        assert np.array_equal(shown_image(page), expected)
        if SCREENSHOT:
            page.screenshot(path=f"{SCREENSHOT}-control-{kind}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # A photo gives another map, and another image.
        first = page.locator("#said code").inner_text()
        page.locator("#control-kind label", has_text="a photo").click()
        page.locator("#draw").click()
        expect(page.locator("#said code")).not_to_have_text(first, timeout=60_000)
        # The first one is brought back, with its image and strength.
        page.locator("#history button:has(img)").nth(1).click()
        expect(page.locator("#control-kind label", has_text="a map").locator("input")).to_be_checked(timeout=30_000)
        expect(page.locator("#strength input[type=number]")).to_have_value("0.8")
        # Another checkpoint has no branch: nothing leads what it draws.
        page.locator("#checkpoint input").click()
        page.locator("[role=option]", has_text="stage 3, step 7").click()
        expect(page.locator("#control")).to_be_hidden(timeout=30_000)
        fill(page, size="48x32")
        page.locator("#draw").click()
        expect(page.locator("#said")).to_contain_text("seed 11", timeout=60_000)
        expect(page.locator("#said")).not_to_contain_text("control at", timeout=60_000)
        assert np.array_equal(shown_image(page), sampled(run, "3"))
        page.locator("#checkpoint input").click()
        page.locator("[role=option]", has_text="edges, step 7").click()
        expect(page.locator("#control")).to_be_visible(timeout=30_000)
        page.locator(
            "#control-file button[aria-label*='emove'], #control-file button[aria-label*='lear']"
        ).first.click()
        expect(page.locator("#control-map")).to_be_hidden(timeout=30_000)
        page.locator("#control-file input[type=file]").set_input_files(str(tmp_path / "broken.png"))
        expect(page.locator(".toast-body").first).to_contain_text("cannot lead what is drawn", timeout=30_000)
