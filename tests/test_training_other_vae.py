"""A stage that goes on with another VAE: outer layers that are fitted to the latents of both."""

import dataclasses
from pathlib import Path

import pytest
import torch
import training_run
from test_training_networks import open_job, saved
from training_run import D_TEXT, make_run, write_latents

from errors import UserError
from pixart.model import PixArt, PixArtConfig
from training.stages.networks import network_config
from training.stages.other_vae import bridged, fit_bridge, read_pairs
from training.stages.starts import starting_network

PATCH = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("other_vae"))


@pytest.fixture(scope="module")
def former_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of 8 channels of one shard that `run` has, too, and of one it has not."""
    run = tmp_path_factory.mktemp("former") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "CHANNELS", 8)
        write_latents(run, 32, {"laion_0": 40, "laion_9": 40}, buckets=["32x32"], is_bucketed=False)
    return run


def random_pixart(*, channels: int, width: int = 16) -> PixArt:
    torch.manual_seed(3)
    config = PixArtConfig(num_layers=2, num_heads=2, head_dim=width // 2, sample_size=4, in_channels=channels)
    network = PixArt(dataclasses.replace(config, out_channels=2 * channels, caption_channels=D_TEXT))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def patches(latents: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.unfold(latents, PATCH, stride=PATCH).transpose(1, 2)


def images(found: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.fold(found.transpose(1, 2), (4, 4), PATCH, stride=PATCH)


def test_latents_that_are_turned_and_moved_are_found_and_the_network_says_the_same() -> None:
    """New latents of 8 channels that hold the former 4 in other directions: nothing is lost, and nothing changes."""
    network = random_pixart(channels=4, width=32)
    turn = torch.linalg.qr(torch.randn(32, 16))[0]  # [K*P*P, C*P*P]
    former = torch.randn(500, 4, 4, 4)
    moved = torch.randn(16)
    new = patches(former) @ turn.T
    bridge = fit_bridge((patches(former) + moved).flatten(0, 1), new.flatten(0, 1))
    torch.testing.assert_close(bridge.weight, turn.T, rtol=0, atol=1e-4)
    assert bridge.explains > 0.999
    with torch.no_grad():
        times, text = torch.tensor([10, 900]), torch.randn(2, 3, D_TEXT)
        said = bridged(network, bridge)(images(new[:2]), times, text)
        expected = network(images(patches(former[:2]) + moved), times, text)
    noise, variance = said.chunk(2, dim=1)
    torch.testing.assert_close(patches(noise), patches(expected[:, :4]) @ turn.T, rtol=0, atol=1e-4)
    assert not variance.any()


@pytest.mark.parametrize(("former", "new"), [(4, 8), (4, 4), (8, 4)])
def test_noise_stays_noise_and_all_of_it_is_seen(former: int, new: int) -> None:
    """Whatever the latents have in common, what the bridge makes of white noise is white, or part of it is."""
    torch.manual_seed(0)
    network = random_pixart(channels=former, width=64)
    bridge = fit_bridge(torch.randn(900, 4 * former), torch.randn(900, 4 * new))
    assert bridge.explains < 0.2
    product = bridge.weight @ bridge.weight.T if former <= new else bridge.weight.T @ bridge.weight
    torch.testing.assert_close(product, torch.eye(len(product)), rtol=0, atol=1e-5)
    embed = bridged(network, bridge).patch_embed.projection.weight.detach().flatten(1)
    assert torch.linalg.matrix_rank(embed) == 4 * new


def test_a_stage_reads_the_pictures_that_both_have(run: Path, former_run: Path, tmp_path: Path) -> None:
    former = random_pixart(channels=8)
    settings = {
        "starts_from": saved(former, tmp_path / "eight"),
        "former_latents": str(former_run / "features" / "latent-32"),
    }
    job, survey = open_job(run, 2, departs_in=["vae"], **settings)
    pairs = read_pairs(settings["former_latents"], job.features.datasets[0], patch_size=PATCH, key="key")
    assert [tuple(side.shape) for side in pairs] == [(35 * 4, 32), (35 * 4, 16)]  # of 40 five are rejects
    network, again = (starting_network(job, network_config(job, survey)) for _ in range(2))
    assert network.config == network_config(job, survey) and network.config.in_channels == 4
    expected = bridged(former, fit_bridge(*pairs))
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), "every rank finds the same"
        assert torch.equal(weight, expected.state_dict()[name])
        if not name.startswith(("patch_embed.", "final.")):
            assert torch.equal(weight, former.state_dict()[name])
    assert network.final.weight.any()
    # another process begins the output layer anew all the same
    job, survey = open_job(run, 2, departs_in=["vae"], process="flow", **settings)
    flow = starting_network(job, network_config(job, survey))
    assert not flow.final.weight.any() and torch.equal(
        flow.patch_embed.projection.weight, again.patch_embed.projection.weight
    )


def test_latents_of_others_are_refused(run: Path, former_run: Path, tmp_path: Path) -> None:
    start = saved(random_pixart(channels=8), tmp_path / "eight")
    latents = former_run / "features" / "latent-32"
    with pytest.raises(UserError, match=r"former_latents = .* is for another VAE .*departs_in = \['vae'\]"):
        open_job(run, 2, starts_from=start, former_latents=str(latents))
    own = run / "features" / "latent-32"
    job, survey = open_job(run, 2, starts_from=start, departs_in=["vae"], former_latents=str(own))
    with pytest.raises(UserError, match=r"stage2\.former_latents .* 4 channels, but the weights were trained with 8"):
        starting_network(job, network_config(job, survey))
    with pytest.raises(UserError, match=r"key = .* has none of the pictures of"):
        read_pairs(str(run / "features" / "latent-64"), job.features.datasets[0], patch_size=PATCH, key="key")
    with pytest.raises(UserError, match="one is behind a URL"):
        read_pairs("https://here/latent-32", job.features.datasets[0], patch_size=PATCH, key="key")
