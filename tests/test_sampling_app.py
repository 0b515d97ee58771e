"""`make app` in Chromium: the image of `make sample`, progress, history, errors on the page, and nobody called."""

import errno
import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gradio
import numpy as np
import pyarrow.parquet as pq
import pytest
from app_run import PROMPT, SCREENSHOT, fill, make_studio, opened_page, pixels, served_app, shown_image, wish
from PIL import Image
from playwright.sync_api import expect
from sampling_run import PIXART, PROMPTS, make_run, randomised, save_checkpoint, write_recipe

from errors import UserError
from pixart.model import PixArt
from sampling import app
from sampling.__main__ import main as sample_main
from sampling.app_studio import DrawingStopped, Wish, wish_of


def sampled(run: Path, **table: object) -> Path:
    """The image that `make sample` draws."""
    recipe = write_recipe(run, prompt=PROMPT, seed=11, size="48x32", **table)
    sample_main(["--recipe", str(recipe), "--run", str(run), "--stage", "3"])
    folder = run / "samples" / "stage3-prompt"
    (row,) = pq.read_table(folder / "samples.parquet").to_pylist()
    return folder / row["file"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def address(run):
    with served_app(run, write_recipe(run)) as address:
        yield address


@pytest.fixture
def page(address):
    with opened_page(address) as page:
        yield page


def test_the_page_draws_what_make_sample_draws(page, address, run):
    expected = sampled(run)
    fill(page, prompt=PROMPT, seed=11, size="48x32")
    page.locator("#draw").click()
    expect(page.locator("#said")).to_contain_text("seed 11", timeout=60_000)
    assert np.array_equal(shown_image(page), pixels(expected))
    expect(page.locator("#history img")).to_have_count(1)
    # A second image; then the first one comes back with its settings.
    fill(page, prompt="a star", seed=12)
    page.locator("#draw").click()
    expect(page.locator("#said")).to_contain_text("seed 12", timeout=60_000)
    expect(page.locator("#history img")).to_have_count(2)
    expect(page.locator("#drawn")).to_be_hidden()
    if SCREENSHOT:
        page.screenshot(path=f"{SCREENSHOT}-wide.png", full_page=True)
    page.locator("#history button:has(img)").nth(1).click()
    expect(page.locator("#prompt textarea")).to_have_value(PROMPT)
    expect(page.locator("#said")).to_contain_text("seed 11")
    assert np.array_equal(shown_image(page), pixels(expected))
    assert [url for url in page.requested if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hints_and_buttons_can_be_read(page, scheme):
    """WCAG AA asks for a contrast of 4.5 between text and what it lies on."""
    page.emulate_media(color_scheme=scheme)
    page.reload()
    hint = page.get_by_text("Several lines are several prompts")
    for text, surface in ((hint, page.locator("#prompt")), (page.locator("#draw"), page.locator("#draw"))):
        expect(text).to_be_visible(timeout=30_000)
        colour = text.evaluate("e => getComputedStyle(e).color")
        assert contrast(colour, surface.evaluate("e => getComputedStyle(e).backgroundColor")) >= 4.5, colour


def contrast(*colours: str) -> float:
    """Contrast of two opaque colours written as rgb(r, g, b)."""
    channels = [[float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3]] for colour in colours]
    linear = [[c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts] for parts in channels]
    dark, light = sorted(0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in linear)
    return (light + 0.05) / (dark + 0.05)


def test_the_address_is_said_when_the_page_answers(address, run):
    log = " ".join((run / "app.log").read_text().split())
    assert log.index("images go to") < log.index(address.rstrip("/"))
    assert "Warning" not in log


def test_a_phone_draws_a_batch_from_another_checkpoint_and_keeps_its_files(page, run):
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    button, image = page.locator("#draw").bounding_box(), page.locator("#image").bounding_box()
    assert 0 <= image["y"] - (button["y"] + button["height"]) < 60, "the image stands right below the button"
    assert image["y"] + image["height"] <= 844, "and is seen whole without scrolling"
    if SCREENSHOT:
        page.screenshot(path=f"{SCREENSHOT}-phone.png", full_page=True)
    # An example that the run's prompt file has.
    page.locator("#examples").get_by_text(PROMPTS[1]["prompt"]).click()
    expect(page.locator("#prompt textarea")).to_have_value(PROMPTS[1]["prompt"])
    # Another checkpoint: what it was trained at takes the place of the first one's sizes.
    expect(page.locator("#checkpoint input")).to_have_value(
        re.compile(r"stage 3, step 7 · 32 px, 3 sizes, ddpm, finished")
    )
    page.locator("#checkpoint input").click()
    options = page.locator("[role=option]").all_inner_texts()
    assert len(options) == 2 and not any("stage 1" in option for option in options)
    page.locator("[role=option]", has_text="stage 2").click()
    expect(page.locator("#size input")).to_have_value("32x32")
    fill(page, prompt=f"{PROMPT}\n\n  a star  ", seed=2**32 - 1, count=2)
    page.locator("#draw").click()
    expect(page.locator("#drawn img")).to_have_count(4, timeout=60_000)
    expect(page.locator("#said")).to_contain_text("seed 0 ·")
    expect(page.locator("#history img")).to_have_count(4)
    folder = run / "samples" / "stage2-app"
    wishes = {(drawn.prompt, drawn.seed) for drawn in map(wish_of, folder.glob("*.png"))}
    assert wishes == {(text, seed) for text in (PROMPT, "a star") for seed in (2**32 - 1, 0)}
    # One of them large: its file is downloaded as it was written, settings inside.
    page.locator("#drawn button:has(img)").first.click()
    expect(page.locator("#said")).to_contain_text("seed 4294967295 ·")
    with page.expect_download() as download:
        page.locator("#image [aria-label=Download], #image a[download]").first.click()
    saved = Path(download.value.path())
    assert wish_of(saved) == wish(seed=2**32 - 1, size="32x32")
    assert saved.read_bytes() in [path.read_bytes() for path in folder.glob("*.png")]


def test_progress_is_shown_and_stop_stops(page, run):
    # Large, so that there is time to press the button.
    fill(page, prompt="a slow star", seed=13, size="640x640", steps=250)
    page.locator("#draw").click()
    expect(page.locator("#image").get_by_text(re.compile(r"step \d+ of 250"))).to_be_visible(timeout=60_000)
    page.locator("#stop").click()
    expect(page.locator(".toast-body")).to_contain_text("Nothing was kept", timeout=30_000)
    assert not list((run / "samples" / "stage3-app").glob("a-slow-star*"))


def test_mistakes_are_shown_on_the_page_and_leave_no_image(page, run):
    before = sorted((run / "samples" / "stage3-app").glob("*"))
    page.locator("#draw").click()
    expect(page.locator(".toast-body")).to_contain_text("the prompt is empty", timeout=30_000)
    fill(page, prompt=PROMPT, size="33x32")
    page.locator("#draw").click()
    expect(page.get_by_text("33 is not a positive multiple of 16")).to_be_visible(timeout=30_000)
    assert sorted((run / "samples" / "stage3-app").glob("*")) == before


@pytest.mark.skipif(not Path("/proc/net/tcp").is_file(), reason="/proc/net/tcp, which lists who listens, is Linux's")
def test_only_this_machine_is_served(address):
    port = int(address.rstrip("/").rpartition(":")[2])
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A"]
    assert [local for local in listening if local.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


@pytest.mark.parametrize("solver", ["dpm-solver++", "iddpm", "sa-solver"])
def test_the_studio_draws_what_make_sample_draws(run, solver):
    studio = make_studio(run)
    steps: list[int] = []
    path = studio.draw(wish(solver=solver, negative_prompt="blue"), on_step=steps.append)
    assert steps[:2] == [0, 1] and steps[-1] == 3
    expected = sampled(run, solver=solver, negative_prompt="blue")
    assert np.array_equal(pixels(path), pixels(expected))
    assert wish_of(path) == wish(solver=solver, negative_prompt="blue")
    # Asked again it draws nothing.
    assert studio.draw(wish(solver=solver, negative_prompt="blue"), on_step=steps.append) == path and steps[-1] == 3


def test_a_checkpoint_of_flow_offers_its_own_solvers_and_counts_passes(tmp_path):
    run = make_run(tmp_path)
    assert make_studio(run).solvers() == ["dpm-solver++", "iddpm", "sa-solver", "lcm"]
    save_checkpoint(run, 3, randomised(PixArt(replace(PIXART, out_channels=4))))
    studio = make_studio(run)
    assert studio.solvers() == ["dpm-solver++", "euler", "heun", "lcm"]
    asked = wish(solver="heun", size="32x32")
    said: list[str] = []
    studio.draw(asked, on_step=lambda num_done: said.append(app._progress([asked], 0, num_done)))
    assert said == ["reading the prompt", *(f"pass {number} of 5" for number in range(1, 6))]
    with pytest.raises(UserError, match=r"sampling\.solver = 'iddpm' does not go with stage 3, step 7 \(.* flow: dpm"):
        make_studio(run, solver="iddpm")


def test_settings_of_one_wish_do_not_stay_for_the_next(run, monkeypatch):
    from sampling import text_encoding

    encoded: list[str] = []
    encode = text_encoding.encode_prompts

    def counting(prompts, config, text):
        encoded.extend(prompts)
        return encode(prompts, config, text)

    monkeypatch.setattr(text_encoding, "encode_prompts", counting)
    studio = make_studio(run)
    strong = studio.draw(wish(seed=21, guidance_scale=9.0), on_step=lambda step: None)
    weak = studio.draw(wish(seed=21, guidance_scale=1.0), on_step=lambda step: None)
    alone = make_studio(run).draw(wish(seed=22, guidance_scale=1.0), on_step=lambda step: None)
    again = studio.draw(wish(seed=22, guidance_scale=1.0), on_step=lambda step: None)
    assert not np.array_equal(pixels(strong), pixels(weak)) and again == alone
    # The encoder is loaded for a new prompt, not for another seed or scale.
    assert encoded == ["", PROMPT, "", PROMPT]
    assert studio.history()[0] == again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"size": "big"}, "size: "),
        ({"size": "40x32"}, "40 is not a positive multiple of 16"),
        ({"num_steps": 0}, "num_steps: "),
        ({"guidance_scale": 0.5}, "guidance_scale: "),
        ({"seed": -1}, "seed: "),
    ],
)
def test_a_wish_out_of_bounds_is_refused(run, changes, message):
    with pytest.raises(UserError, match=message):
        make_studio(run).draw(wish(**changes), on_step=lambda step: None)


def test_broken_weights_leave_no_image(tmp_path):
    import torch

    run = make_run(tmp_path)
    model = randomised(PixArt(PIXART))
    torch.nn.init.constant_(model.final.bias, torch.nan)
    save_checkpoint(run, 3, model)
    with pytest.raises(UserError, match="not finite"):
        make_studio(run).draw(wish(size="32x32"), on_step=lambda step: None)
    assert not list(run.glob("samples/**/*.png"))


def test_classes_and_foreign_images_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="stage 1, step 7 knows classes, not text"):
        make_studio(run, stage=1)
    Image.new("RGB", (16, 16)).save(tmp_path / "other.png")
    with pytest.raises(UserError, match=r"other\.png does not say how it was drawn"):
        wish_of(tmp_path / "other.png")


def test_a_picture_cut_short_is_not_shown_and_is_drawn_again(run):
    studio = make_studio(run)
    first = studio.draw(wish(seed=41), on_step=lambda step: None)
    second = studio.draw(wish(seed=42), on_step=lambda step: None)
    whole = first.read_bytes()
    first.write_bytes(whole[:-20])
    assert studio.history()[0] == second and first not in studio.history()
    assert studio.draw(wish(seed=41), on_step=lambda step: None) == first
    assert first.read_bytes() == whole and studio.history()[:2] == [first, second]
    first.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{first.name} does not say how it was drawn: cannot identify image"):
        wish_of(first)


def test_plan_serves_nothing_and_a_taken_port_is_named(run, capsys):
    flags = ["--recipe", str(write_recipe(run)), "--run", str(run), "--stage", "2", "--set", "app.port=7999"]
    app.main([*flags, "--plan"])
    assert "http://127.0.0.1:7999" in "".join(capsys.readouterr().err.split())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        flags[-1] = f"app.port={port}"
        with pytest.raises(UserError, match=rf"app\.port {port} of 127\.0\.0\.1 cannot be used"):
            app.main(flags)


def test_a_full_disk_is_said_on_the_page_with_what_to_do():
    def studio_failing_with(number: int) -> SimpleNamespace:
        def draw_all(wishes: list[Wish], *, on_step: object) -> Path:
            raise OSError(number, os.strerror(number), "a.png")

        return SimpleNamespace(draw_all=draw_all, choose=lambda checkpoint: None)

    for number, said in ((errno.ENOSPC, "a.png: the disk is full"), (errno.EACCES, "a.png: you may not read or write")):
        with pytest.raises(gradio.Error, match=said):
            next(app._draw(studio_failing_with(number), "step-7", [wish()], on_step=lambda step: None))
    with pytest.raises(OSError, match="Bad file descriptor"):  # a fault of the program
        next(app._draw(studio_failing_with(errno.EBADF), "step-7", [wish()], on_step=lambda step: None))


def test_a_stopped_drawing_is_not_kept_and_the_next_one_is_whole(run):
    studio = make_studio(run)

    def stop_at(step: int) -> None:
        if step == 2:
            studio.stop()

    with pytest.raises(DrawingStopped):
        studio.draw(wish(seed=31), on_step=stop_at)
    assert not list(studio.folder.glob("*-31-*.png"))
    assert studio.draw(wish(seed=31), on_step=lambda step: None).is_file()
