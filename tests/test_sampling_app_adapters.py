"""The app with adapters and 8-bit weights: images of `make sample`, what is read again, history, errors, the page."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from app_run import PROMPT, SCREENSHOT, fill, make_studio, opened_page, pixels, served_app, shown_image, wish
from PIL import Image
from playwright.sync_api import expect
from sampling_run import make_run, save_adapter, save_adapter_checkpoint, write_recipe

from errors import MissingFileError, UserError
from pipelines.engine.run import EngineConfig
from sampling import renderer, text_encoding
from sampling.__main__ import main as sample_main
from sampling.app_choices import adapter_choices
from sampling.app_fields import values_of
from sampling.app_studio import Studio, Wish, adapter_titles, wish_of
from sampling.config import SamplingConfig
from sampling.trained_model import TrainedModel, open_run_model

CAT = "{run}/training/cat/step-7"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("run"))
    save_adapter_checkpoint(run, "cat")
    save_adapter(run / "style", seed=4)
    return run


def sampled(run: Path, **table: object) -> Path:
    """The image that `make sample` draws."""
    recipe = write_recipe(run, prompt=PROMPT, seed=11, size="32x32", **table)
    sample_main(["--recipe", str(recipe), "--run", str(run), "--stage", "2"])
    (path,) = (path for path in (run / "samples" / "stage2-prompt").glob("*.png") if path.name != "grid.png")
    return path


def asked(**changes: object) -> Wish:
    return wish(**{"size": "32x32", **changes})


def ignore(num_done: int) -> None:
    pass


def test_adapters_and_8_bits_draw_what_make_sample_draws_and_are_brought_back(run: Path) -> None:
    studio = make_studio(run, stage=2)
    lora = (CAT, str(run / "style"))
    plain = studio.draw(asked(), on_step=ignore)
    wanted = asked(lora=lora, lora_weights=(0.8, -0.5))
    path = studio.draw(wanted, on_step=ignore)
    expected = sampled(run, lora=list(lora), lora_weights=[0.8, -0.5])
    assert np.array_equal(pixels(path), pixels(expected)) and not np.array_equal(pixels(path), pixels(plain))
    assert wish_of(path) == wish_of(expected) == wanted and studio.is_of_chosen(path)
    assert adapter_titles(path) == ["cat, step-7 0.8", "style -0.5"] and adapter_titles(plain) == []
    with Image.open(path) as ours, Image.open(plain) as theirs:
        assert [item["location"] for item in json.loads(ours.info["adapters"])] == list(lora)
        assert "adapters" not in theirs.info
    small = asked(lora=(CAT,), lora_weights=(1.0,), weight_dtype="int8")
    path = studio.draw(small, on_step=ignore)
    assert np.array_equal(pixels(path), pixels(sampled(run, lora=[CAT], weight_dtype="int8")))
    assert wish_of(path) == small
    # Back to the plain weights: nothing of what was merged has stayed.
    plain.unlink()
    assert np.array_equal(pixels(studio.draw(asked(), on_step=ignore)), pixels(sampled(run)))


def test_only_the_transformer_is_read_again_and_only_for_other_weights(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def counted(owner: object, name: str, said: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **named: done.append(said) or original(*args, **named))

    counted(TrainedModel, "load", "transformer")
    counted(renderer, "open_codec", "vae")
    counted(text_encoding, "encode_prompts", "text")
    studio = make_studio(run, stage=2)
    studio.draw(asked(seed=61), on_step=ignore)
    assert sorted(done) == ["text", "transformer", "vae"]
    done.clear()
    adapted = {"lora": (CAT,), "lora_weights": (0.4,)}
    studio.draw(asked(seed=61, **adapted), on_step=ignore)
    studio.draw(asked(seed=62, **adapted), on_step=ignore)
    assert done == ["transformer"]
    studio.draw(asked(seed=62, weight_dtype="int8", **adapted), on_step=ignore)
    studio.draw(asked(seed=62, weight_dtype="int8", lora=(CAT,), lora_weights=(0.5,)), on_step=ignore)
    assert done == ["transformer"] * 3
    # What is kept needs nothing.
    studio.draw(asked(seed=61), on_step=ignore)
    assert len(done) == 3


def test_a_file_that_changes_is_read_again_and_one_that_goes_is_named(run: Path, tmp_path: Path) -> None:
    studio = make_studio(run, stage=2)
    wanted = asked(lora=(str(save_adapter(tmp_path / "mine")),), lora_weights=(1.0,))
    first = studio.draw(wanted, on_step=ignore)
    assert studio.changed_adapters(first) == []
    save_adapter(tmp_path / "mine", seed=5)
    second = studio.draw(wanted, on_step=ignore)
    assert second != first and not np.array_equal(pixels(first), pixels(second))
    assert studio.changed_adapters(first) == ["mine"] and studio.changed_adapters(second) == []
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(MissingFileError, match=r"sampling\.lora: adapter .*mine does not exist"):
        studio.draw(wanted, on_step=ignore)
    assert studio.changed_adapters(second) == ["mine"] and studio.is_of_chosen(second)
    with pytest.raises(UserError, match=r"lora_weights\.0: .*less than or equal to 10"):
        studio.draw(asked(lora=(CAT,), lora_weights=(11.0,)), on_step=ignore)
    with pytest.raises(UserError, match="drawn with 2 adapters, and the page has room for 1"):
        values_of(asked(lora=("a", "b"), lora_weights=(1.0, 1.0)), num_adapters=1)


def test_adapters_of_the_run_and_those_named_are_offered(run: Path) -> None:
    assert adapter_choices(run, ["style.safetensors", CAT]) == [
        ("style.safetensors", "style.safetensors"),
        ("cat, step 7 · 32 px, ddpm, finished, latest", CAT),
    ]
    assert adapter_choices(run, []) == [("cat, step 7 · 32 px, ddpm, finished, latest", CAT)]


@pytest.mark.parametrize("kind", ["wide", "phone"])
def test_the_page_adds_adapters_with_their_weights(run: Path, kind: str) -> None:
    expected = pixels(sampled(run, lora=[CAT, str(run / "style")], lora_weights=[0.8, 0.5]))
    recipe = write_recipe(run, lora=[str(run / "style")], lora_weights=[0.5])
    with served_app(run, recipe, stage="2") as address, opened_page(address) as page:
        if kind == "phone":
            page.set_viewport_size({"width": 390, "height": 844})
        # The recipe's is chosen; another is added, and its weight set.
        expect(page.locator("#weight-0 input[type=number]")).to_have_value("0.5", timeout=30_000)
        expect(page.locator("#weight-1")).to_be_hidden()
        page.locator("#adapters input").click()
        page.locator("[role=option]", has_text="cat, step 7").click()
        page.keyboard.press("Escape")
        expect(page.locator("#weight-1")).to_contain_text("Weight of cat/step-7")
        fill(page, prompt=PROMPT, seed=11, size="32x32", **{"weight-1": 0.8})
        page.locator("#draw").click()
        expect(page.locator("#said")).to_contain_text("style 0.5 · cat, step-7 0.8", timeout=60_000)
        assert np.array_equal(shown_image(page), expected)
        assert page.evaluate("document.documentElement.scrollWidth") <= (390 if kind == "phone" else 1240)
        if SCREENSHOT:
            page.screenshot(path=f"{SCREENSHOT}-adapters-{kind}.png", full_page=True)
        # The first one is taken away: the other keeps its weight. In 8 bits it is another image.
        page.locator("#adapters .token-remove").first.click()
        expect(page.locator("#weight-0")).to_contain_text("Weight of cat/step-7")
        expect(page.locator("#weight-0 input[type=number]")).to_have_value("0.8")
        page.locator("#eight-bits input").check()
        page.locator("#draw").click()
        expect(page.locator("#said")).to_contain_text("weights in int8 · cat, step-7 0.8", timeout=60_000)
        # A path is typed that nobody has.
        path = page.locator("#adapter-path input, #adapter-path textarea").first
        path.fill("/no/such/adapter")
        path.press("Enter")
        expect(page.locator("#weight-1")).to_contain_text("Weight of /no/such/adapter")
        page.locator("#draw").click()
        said = "sampling.lora: adapter /no/such/adapter does not exist"
        expect(page.locator(".toast-body")).to_contain_text(said, timeout=30_000)
        page.locator(".toast-close").first.click()
        # An old image brings its adapters and weights back.
        page.locator("#history button:has(img)").nth(1).click()
        expect(page.locator("#weight-1 input[type=number]")).to_have_value("0.8")
        expect(page.locator("#weight-0 input[type=number]")).to_have_value("0.5")
        expect(page.locator("#eight-bits input")).not_to_be_checked()
        assert np.array_equal(shown_image(page), expected)
        # Opened anew, the page has what was drawn and trained since the app has started.
        dog = save_adapter_checkpoint(run, f"dog-{kind}").parent
        page.reload()
        expect(page.locator("#history button:has(img)").nth(1)).to_be_visible(timeout=30_000)
        page.locator("#adapters input").click()
        expect(page.locator("[role=option]", has_text=dog.name)).to_be_visible()


def test_a_checkpoints_own_adapter_has_the_weight_that_is_chosen(run: Path) -> None:
    config = SamplingConfig(num_steps=3, text_dtype="float32", lora_weights=[0.5])
    trained, engine = open_run_model(run, "cat"), EngineConfig(in_process=True)
    studio = Studio(config, trained, run=run, name="cat-app", engine=engine)
    assert (studio.first_wish().lora, studio.first_wish().lora_weights) == ((CAT,), (0.5,))
    half = studio.draw(asked(lora=(CAT,), lora_weights=(0.5,)), on_step=ignore)
    assert np.array_equal(pixels(half), pixels(sampled(run, lora=[CAT], lora_weights=[0.5])))
    assert studio.is_of_chosen(half) and adapter_titles(half) == ["cat, step-7 0.5"]
    none = studio.draw(asked(lora=(CAT,), lora_weights=(0.0,)), on_step=ignore)
    assert np.array_equal(pixels(none), pixels(sampled(run)))
