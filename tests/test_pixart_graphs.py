"""Captured passes: without CUDA the memory they share is the same, and the network itself stands for the graphs."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import torch
from sampling_run import PIXART, randomised

from pixart.branching import add_branch
from pixart.control import Control
from pixart.drawing.denoise import denoise, draw_noise, make_generators
from pixart.drawing.graphs import MAX_SHAPES, PassGraphs, _CapturedPasses, pays_to_capture
from pixart.drawing.guidance import network_of_texts
from pixart.drawing.passes import plan_passes
from pixart.model import PixArt
from pixart.processes.ddpm import DDPM

MODEL = randomised(PixArt(replace(PIXART, num_layers=4)))
LED = PixArt(replace(PIXART, num_layers=4))
add_branch(LED, 2, key="k")
randomised(LED)
NULL_TEXT = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))


def draw(graphs: PassGraphs | None, seeds, *, refresh=1, interval=None, size=4, strength=None) -> torch.Tensor:
    assert isinstance(MODEL, PixArt)
    model, control = MODEL, None
    if strength is not None:
        image = torch.randn(len(seeds), 4, size, 4, generator=torch.Generator().manual_seed(seeds[0] + 9))
        model, control = LED, Control(image, strength)
    scheduler, generators = DDPM().scheduler("dpm-solver++", 6), make_generators(seeds)
    passes = plan_passes(
        [float(timestep) / 1000 for timestep in scheduler.timesteps],
        guidance_scale=3.0,
        guidance_interval=interval,
        num_passes_per_refresh=refresh,
    )
    texts = [torch.randn(2 + seed % 5, 32, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    with torch.inference_mode():
        network = network_of_texts(
            model,
            texts,
            NULL_TEXT,
            passes=passes,
            guidance_scale=3.0,
            size_pixels=(32, 32),
            min_tokens=8,
            control=control,
        )
        noise = draw_noise(generators, (4, size, 4))
        predict = network if graphs is None else graphs.capture(network, noise)
        return denoise(predict, noise, scheduler, generators=generators)[0]


def test_captured_passes_give_the_bits_of_the_network_batch_after_batch():
    graphs = PassGraphs()
    settings = ({}, {"refresh": 2}, {"refresh": 2, "interval": (0.2, 0.8)}, {"interval": (0.4, 1.0)}, {"size": 6})
    for _ in range(2):  # the second time in memory of other batches
        for seeds in ((0, 1), (7, 3), (5,)):
            for setting in settings:
                assert torch.equal(draw(graphs, seeds, **setting), draw(None, seeds, **setting))
    assert graphs.failure is None


def test_passes_are_led_by_the_image_and_strength_of_their_batch():
    graphs = PassGraphs()
    for _ in range(2):  # the second time in memory of other images and strengths
        for seeds in ((0, 1), (7, 3)):
            for strength in (1.0, 0.5, 0.0):
                for refresh in (1, 2):
                    expected = draw(None, seeds, strength=strength, refresh=refresh)
                    assert torch.equal(draw(graphs, seeds, strength=strength, refresh=refresh), expected)
    assert not torch.equal(draw(graphs, (0, 1), strength=1.0), draw(graphs, (0, 1), strength=0.5))


def test_batches_of_one_shape_share_their_memory_and_few_shapes_keep_theirs():
    graphs = PassGraphs()
    for seeds in ((0, 1), (2, 3), (4, 5)):
        draw(graphs, seeds)
    assert len(graphs._captured) == 1
    for num_images in range(1, MAX_SHAPES + 3):
        draw(graphs, tuple(range(num_images)))
    assert len(graphs._captured) == MAX_SHAPES


def test_a_long_pass_is_computed_as_it_is_and_keeps_no_memory(monkeypatch):
    assert [pays_to_capture(2, 64, 64), pays_to_capture(3, 64, 64), pays_to_capture(1, 128, 128)] == [
        True,
        False,
        False,
    ]
    monkeypatch.setattr("pixart.drawing.graphs.MAX_PLACES", 2 * 4 * 4)
    graphs = PassGraphs()
    for seeds, num_captured in (((0, 1, 2), 0), ((0, 1), 1)):
        assert torch.equal(draw(graphs, seeds), draw(None, seeds))
        assert len(graphs._captured) == num_captured


def test_what_cannot_be_captured_is_computed():
    graphs = PassGraphs()
    expected = draw(graphs, (0, 1))
    graphs._fail("out of memory")
    assert torch.equal(draw(graphs, (0, 1)), expected)
    assert not graphs._captured


def test_a_capture_that_fails_leaves_the_stream_as_it_was_and_says_why(monkeypatch):
    """As torch's does: its end raises before the stream is given back, and hides what ended it early."""
    entered, streams, failures = [], ["current"], []

    class Capture:
        def __init__(self, _, **options):
            self.pool = options["pool"]

        def __enter__(self):
            entered.append(self.pool)
            streams[-1] = "capture"

        def __exit__(self, *_):
            raise RuntimeError("capture invalidated")

    @contextmanager
    def stream(new):
        before, streams[-1] = streams[-1], new
        try:
            yield
        finally:
            streams[-1] = before

    def compute(*_):
        if entered:
            raise RuntimeError("not permitted in a capture")

    side = SimpleNamespace(wait_stream=lambda _: None)
    current = SimpleNamespace(wait_stream=lambda _: None)
    for name, value in {
        "graph": Capture,
        "stream": stream,
        "Stream": lambda _: side,
        "current_stream": lambda _: current,
        "CUDAGraph": object,
        "graph_pool_handle": lambda: "pool",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    noise = torch.zeros(1)
    passes = _CapturedPasses(SimpleNamespace(), noise, on_failure=failures.append)
    passes._network, passes._time = compute, noise
    monkeypatch.setattr(passes, "_latents", SimpleNamespace(is_cuda=True, device="cuda"))
    passes._capture(0)
    assert failures == ["not permitted in a capture"]
    assert streams == ["current"]
