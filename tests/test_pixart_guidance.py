"""Guidance around both transformers, in an interval of noise levels, and with blocks that are not computed."""

from dataclasses import replace

import pytest
import torch
from sampling_run import DIT, PIXART, randomised

from pixart.branching import add_branch
from pixart.control import Control
from pixart.dit import DiT
from pixart.drawing.denoise import denoise, draw_noise, make_generators
from pixart.drawing.guidance import GuidedNetwork, network_of_labels, network_of_texts
from pixart.drawing.passes import Pass, num_block_evaluations, plan_passes
from pixart.model import PixArt, PixArtConfig
from pixart.processes.ddpm import DDPM
from pixart.processes.flow import Flow
from pixart.reuse import NUM_FIRST_BLOCKS

LATENTS = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(0))
TEXTS = [torch.randn(length, 32, generator=torch.Generator().manual_seed(length)) for length in (5, 2, 9)]
NULL_TEXT = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
TIMESTEP = torch.tensor(321)
GUIDED, UNGUIDED = Pass(is_guided=True), Pass(is_guided=False)
DEEP = replace(PIXART, num_layers=4)
SOLVERS = [
    (DDPM(), "dpm-solver++"),
    (DDPM(), "iddpm"),
    (DDPM(), "sa-solver"),
    (Flow(), "dpm-solver++"),
    (Flow(), "euler"),
    (Flow(shift=3.0), "heun"),
]


class Counting(torch.nn.Module):
    """Count the rows that a model is asked for."""

    def __init__(self, model: PixArt) -> None:
        super().__init__()
        self.model, self.config, self.final, self.blocks = model, model.config, model.final, model.blocks
        self.num_rows = 0
        self.read_text = model.read_text

    def forward(self, latents, times, *, text, reuse):
        self.num_rows += len(latents)
        return self.model(latents, times, text=text, reuse=reuse)


def of_texts(model, texts=TEXTS, *, scale=3.0, passes=(GUIDED,), min_tokens=0) -> GuidedNetwork:
    return network_of_texts(
        model, texts, NULL_TEXT, passes=passes, guidance_scale=scale, size_pixels=(32, 48), min_tokens=min_tokens
    )


def test_control_leads_both_halves_of_guidance_and_images_are_led_by_their_own():
    model = PixArt(DEEP)
    add_branch(model, 2, key="k")
    randomised(model)
    latents = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(5))
    control = Control(latents, 0.7)
    network = network_of_texts(
        model, TEXTS, NULL_TEXT, passes=[GUIDED, UNGUIDED], guidance_scale=3.0, size_pixels=(32, 48), control=control
    )
    with torch.no_grad():
        guided, unguided = network(LATENTS, TIMESTEP, 0), network(LATENTS, TIMESTEP, 1)
        for i, text in enumerate(TEXTS):
            own = Control(latents[i : i + 1], 0.7)
            led = model(LATENTS[i : i + 1], TIMESTEP.expand(1), text[None], control=own)
            null = model(LATENTS[i : i + 1], TIMESTEP.expand(1), NULL_TEXT[None], control=own)
            expected = torch.cat([null[:, :4] + 3 * (led - null)[:, :4], led[:, 4:]], dim=1)[0]
            torch.testing.assert_close(guided[i], expected, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(unguided[i], led[0], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(guided, of_texts(model)(LATENTS, TIMESTEP, 0), atol=0.01)


def count_blocks(model) -> list[int]:
    """Record the rows that each block is asked for from now on."""
    rows: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, output: rows.append(len(output)))
    return rows


def draw(model, process, solver, *, seeds=(0, 1, 2), num_steps=8, scale=3.0, interval=None, refresh=1) -> torch.Tensor:
    """Draw an image of each text; the network's output is cut to what the process takes."""
    scheduler, generators = process.scheduler(solver, num_steps), make_generators(seeds)
    times = [float(timestep) / process.num_times for timestep in scheduler.timesteps]
    passes = plan_passes(times, guidance_scale=scale, guidance_interval=interval, num_passes_per_refresh=refresh)
    network = of_texts(model, [TEXTS[seed] for seed in seeds], scale=scale, passes=passes)
    return denoise(network, draw_noise(generators, (4, 4, 6)), scheduler, generators=generators)[0]


def test_guidance_extrapolates_noise_and_keeps_the_conditional_variance():
    model = randomised(PixArt(PIXART))
    guided = of_texts(model)(LATENTS, TIMESTEP, 0)
    times = TIMESTEP.expand(1)
    for i, text in enumerate(TEXTS):
        with_text = model(LATENTS[i : i + 1], times, text[None])
        without = model(LATENTS[i : i + 1], times, NULL_TEXT[None])
        expected = without[:, :4] + 3 * (with_text[:, :4] - without[:, :4])
        torch.testing.assert_close(guided[i : i + 1, :4], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(guided[i : i + 1, 4:], with_text[:, 4:], rtol=1e-4, atol=1e-5)


def test_a_pass_without_guidance_halves_the_work_and_is_the_conditional_prediction():
    model = Counting(randomised(PixArt(PIXART)))
    network = of_texts(model, passes=(UNGUIDED, GUIDED))
    plain = network(LATENTS, TIMESTEP, 0)
    assert model.num_rows == 3
    network(LATENTS, TIMESTEP, 1)
    assert model.num_rows == 9
    assert torch.equal(plain, of_texts(model, scale=1.0, passes=(UNGUIDED,))(LATENTS, TIMESTEP, 0))
    torch.testing.assert_close(plain[1:2], model.model(LATENTS[1:2], TIMESTEP.expand(1), TEXTS[1][None]))


def test_texts_padded_further_say_the_same():
    model = randomised(PixArt(PIXART))
    padded = of_texts(model, min_tokens=40)(LATENTS, TIMESTEP, 0)
    torch.testing.assert_close(padded, of_texts(model)(LATENTS, TIMESTEP, 0), rtol=1e-4, atol=1e-5)


def test_labels_are_guided_away_from_the_null_class():
    model = randomised(DiT(DIT))
    guided = network_of_labels(model, [0, 4, 4], passes=[GUIDED], guidance_scale=2.0)(LATENTS, TIMESTEP, 0)
    times = TIMESTEP.expand(3)
    with_label = model(LATENTS, times, torch.tensor([0, 4, 4]))
    without = model(LATENTS, times, torch.tensor([5, 5, 5]))
    torch.testing.assert_close(guided[:, :4], 2 * with_label[:, :4] - without[:, :4], rtol=1e-4, atol=1e-5)


def test_size_condition_gets_the_size_in_pixels():
    config = PixArtConfig(num_layers=1, num_heads=2, head_dim=12, caption_channels=32, has_size_condition=True)
    model = randomised(PixArt(config))
    actual = of_texts(model, scale=1.0, passes=(UNGUIDED,))(LATENTS, TIMESTEP, 0)
    size = torch.tensor([[32.0, 48.0, 32 / 48]])
    expected = model(LATENTS[:1], TIMESTEP.expand(1), TEXTS[0][None], size=size)
    torch.testing.assert_close(actual[:1], expected, rtol=1e-4, atol=1e-5)


def test_bf16_weights_keep_latents_in_fp32():
    model = randomised(PixArt(PIXART)).bfloat16()
    assert of_texts(model)(LATENTS, TIMESTEP, 0).dtype == torch.float32


@pytest.mark.parametrize(("process", "solver"), SOLVERS)
def test_guidance_in_the_whole_interval_is_plain_guidance_and_in_none_of_it_no_guidance(process, solver):
    model = randomised(PixArt(replace(PIXART, out_channels=process.out_channels(4))))
    plain, unguided = draw(model, process, solver), draw(model, process, solver, scale=1.0)
    assert torch.equal(draw(model, process, solver, interval=(0.0, 1.0)), plain)
    between = (1e-9, 2e-9)  # no solver asks there
    assert torch.equal(draw(model, process, solver, interval=between), unguided)
    half = draw(model, process, solver, interval=(0.3, 0.8))
    assert half.isfinite().all() and not torch.equal(half, plain) and not torch.equal(half, unguided)


@pytest.mark.parametrize(("process", "solver"), SOLVERS)
def test_a_pass_computes_the_blocks_that_its_plan_says_and_no_more(process, solver):
    model = randomised(PixArt(replace(DEEP, out_channels=process.out_channels(4))))
    rows = count_blocks(model)
    latents = draw(model, process, solver, interval=(0.3, 0.8), refresh=3)
    assert latents.isfinite().all()
    times = [float(timestep) / process.num_times for timestep in process.scheduler(solver, 8).timesteps]
    passes = plan_passes(times, guidance_scale=3.0, guidance_interval=(0.3, 0.8), num_passes_per_refresh=3)
    assert {item.is_guided for item in passes} == {item.is_fresh for item in passes} == {True, False}
    assert sum(rows) == 3 * num_block_evaluations(passes, num_blocks=4, num_first_blocks=NUM_FIRST_BLOCKS)
    rows.clear()
    draw(model, process, solver)
    assert sum(rows) == 3 * 2 * 4 * len(times)


@torch.inference_mode()
def test_blocks_left_out_add_what_they_added_last():
    model = randomised(PixArt(DEEP))
    passes = [GUIDED, Pass(is_guided=True, is_fresh=False), Pass(is_guided=False, is_fresh=False)]
    network = of_texts(model, passes=passes)
    first = network(LATENTS, TIMESTEP, 0)
    torch.testing.assert_close(network(LATENTS, TIMESTEP, 1), first, rtol=1e-5, atol=1e-5)
    expected = of_texts(model, scale=1.0, passes=(UNGUIDED,))(LATENTS, TIMESTEP, 0)
    torch.testing.assert_close(network(LATENTS, TIMESTEP, 2), expected, rtol=1e-4, atol=1e-5)
    # other latents, and what the last blocks added to the former ones
    outputs = []
    model.blocks[0].register_forward_hook(lambda module, arguments, output: outputs.append(output))
    model.blocks[-1].register_forward_hook(lambda module, arguments, output: outputs.append(output))
    network(LATENTS, TIMESTEP, 0)
    seen: list[torch.Tensor] = []
    handle = model.final.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    network(LATENTS + 1, TIMESTEP, 1)
    handle.remove()
    before, after, now = outputs
    expected = torch.nn.functional.layer_norm(now + (after - before), now.shape[-1:], eps=1e-6)
    shift, scale = (model.final_modulation.embedding + model.timestep_embed(TIMESTEP.expand(1))[:, None]).chunk(
        2, dim=1
    )
    torch.testing.assert_close(seen[0], expected * (1 + scale) + shift, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interval", [None, (0.2, 0.7)])
def test_an_image_with_blocks_left_out_does_not_depend_on_its_batch(interval):
    model = randomised(PixArt(DEEP))
    together = draw(model, DDPM(), "dpm-solver++", interval=interval, refresh=2)
    for i in range(3):
        alone = draw(model, DDPM(), "dpm-solver++", seeds=(i,), interval=interval, refresh=2)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_labels_reuse_blocks_as_texts_do():
    model = randomised(DiT(replace(DIT, num_layers=3)))
    rows = count_blocks(model)
    passes = [GUIDED, Pass(is_guided=True, is_fresh=False)]
    network = network_of_labels(model, [0, 4, 4], passes=passes, guidance_scale=2.0)
    first = network(LATENTS, TIMESTEP, 0)
    torch.testing.assert_close(network(LATENTS, TIMESTEP, 1), first, rtol=1e-5, atol=1e-5)
    assert rows == [6, 6, 6, 6]
