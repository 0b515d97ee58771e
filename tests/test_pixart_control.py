"""The control branch against diffusers' layers put together as its research code does, and its files."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from errors import UserError
from pixart.belonging import METADATA, read_header
from pixart.branching import add_branch
from pixart.control import Control
from pixart.control_files import FILE_NAMES, original_branch, read_branch, write_branch
from pixart.convert import load_diffusers, original_weights, save_diffusers
from pixart.model import PixArt, PixArtConfig
from pixart.reuse import BlockReuse

CONFIG = PixArtConfig(num_layers=5, num_heads=4, head_dim=8, caption_channels=12, sample_size=8)
NUM_COPIES = 3
BELONGS_TO = {
    "base": {"identity": "sha256:1", "location": "somewhere", "adapters": []},
    "process": {"name": "ddpm"},
    "control": {"kind": "canny", "settings": {}},
}


class ResearchBlock(nn.Module):
    """The names of weights that diffusers' research code has for a copy."""

    def __init__(self, block: nn.Module, width: int, *, is_first: bool) -> None:
        super().__init__()
        if is_first:
            self.before_proj = nn.Linear(width, width)
        self.transformer_block = copy.deepcopy(block)
        self.after_proj = nn.Linear(width, width)


class Research(nn.Module):
    """diffusers' transformer, before whose blocks stand what copies add to the tokens."""

    def __init__(self, folder: Path, width: int, *, num_copies: int = NUM_COPIES) -> None:
        super().__init__()
        self.transformer = PixArtTransformer2DModel.from_pretrained(folder)
        blocks = self.transformer.transformer_blocks
        self.controlnet_blocks = nn.ModuleList(
            ResearchBlock(blocks[number], width, is_first=number == 0) for number in range(num_copies)
        )
        for number in range(1, num_copies + 1):
            blocks[number].register_forward_pre_hook(self._adding(number - 1), with_kwargs=True)
        self._state: Tensor | None = None

    def _adding(self, number: int) -> Any:
        def add(block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
            adapter = self.controlnet_blocks[number]
            hidden, *others = args
            if number == 0:
                self._state = hidden + adapter.before_proj(self._state)
            self._state = adapter.transformer_block(self._state, *others, **kwargs)
            return (hidden + adapter.after_proj(self._state), *others), kwargs

        return add

    def forward(self, latents: Tensor, times: Tensor, text: Tensor, mask: Tensor, control: Tensor) -> Tensor:
        self._state = self.transformer.pos_embed(control)
        return self.transformer(
            latents,
            encoder_hidden_states=text,
            timestep=times,
            encoder_attention_mask=mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample


@pytest.fixture
def network() -> PixArt:
    return led_network(CONFIG)


def led_network(config: PixArtConfig) -> PixArt:
    """A network with a branch, all of whose weights are drawn, so that nothing is zero."""
    network = PixArt(config)
    add_branch(network, NUM_COPIES, key="training.control.num_copies")
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        weight.data.normal_(std=0.2, generator=generator)
    return network.eval()


def inputs(config: PixArtConfig = CONFIG) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, config.in_channels, 8, 12, generator=generator)
    return {
        "latents": latents,
        "times": torch.tensor([0, 600]),
        "text": torch.randn(2, 5, config.caption_channels, generator=generator),
        "mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool(),
        "control": torch.randn(latents.shape, generator=generator),
    }


def run(network: PixArt, given: dict[str, Tensor], *, strength: float | None = 1.0) -> Tensor:
    control = None if strength is None else Control(given["control"], strength)
    with torch.no_grad():
        return network(given["latents"], given["times"], given["text"], given["mask"], control=control)


def branch_of(network: PixArt) -> dict[str, Tensor]:
    return {name: weight for name, weight in network.state_dict().items() if name.startswith("control.")}


def test_output_is_that_of_diffusers_layers_with_the_weights_that_are_written(network: PixArt, tmp_path: Path) -> None:
    save_diffusers(network, tmp_path / "transformer")
    write_branch(tmp_path / "control", branch_of(network), CONFIG, belongs_to=BELONGS_TO)
    reference = Research(tmp_path / "transformer", CONFIG.width).eval()
    weights = load_file(tmp_path / "control" / "diffusion_pytorch_model.safetensors")
    names = {f"controlnet_blocks.{name}" for name in reference.controlnet_blocks.state_dict()}
    assert weights.keys() == names
    reference.load_state_dict(weights, strict=False)
    given = inputs()
    with torch.no_grad():
        expected = reference(**given)
    found = run(network, given)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found - run(network, given, strength=None)).abs().max() > 0.01 * expected.abs().max()


def test_gradients_are_those_of_diffusers_layers_and_the_base_gets_none(network: PixArt, tmp_path: Path) -> None:
    save_diffusers(network, tmp_path / "transformer")
    write_branch(tmp_path / "control", branch_of(network), CONFIG, belongs_to=BELONGS_TO)
    reference = Research(tmp_path / "transformer", CONFIG.width).train()
    reference.load_state_dict(load_file(tmp_path / "control" / "diffusion_pytorch_model.safetensors"), strict=False)
    network.requires_grad_(False)
    assert network.control is not None
    network.control.requires_grad_(True)
    given = inputs()
    network(
        given["latents"], given["times"], given["text"], given["mask"], control=Control(given["control"])
    ).square().mean().backward()
    reference(**given).square().mean().backward()
    wanted = {name: weight.grad for name, weight in reference.controlnet_blocks.named_parameters()}
    found = {name: weight.grad for name, weight in network.named_parameters()}
    assert {name for name, gradient in found.items() if gradient is not None} == branch_of(network).keys()
    for ours, theirs in (
        ("control.before.weight", "0.before_proj.weight"),
        ("control.after.2.weight", "2.after_proj.weight"),
        ("control.copies.1.mlp.hidden.weight", "1.transformer_block.ff.net.0.proj.weight"),
        ("control.copies.0.modulation.embedding", "0.transformer_block.scale_shift_table"),
    ):
        difference = (found[ours] - wanted[theirs]).abs().max()
        assert difference < 1e-4 * wanted[theirs].abs().max(), ours


@pytest.mark.parametrize("adaln", ["single", "per-block"])
def test_a_branch_that_begins_changes_nothing(adaln: Any) -> None:
    config = replace(CONFIG, adaln=adaln)
    network, given = led_network(config), inputs()
    network.control = None
    alone = run(network, given, strength=None)
    branch = add_branch(network, NUM_COPIES, key="k")
    assert torch.equal(run(network, given), alone)
    copied, own = branch.get_parameter("copies.2.mlp.out.weight"), network.get_parameter("blocks.2.mlp.out.weight")
    assert torch.equal(copied, own) and copied is not own


def test_strength_goes_from_the_base_to_the_branch_as_it_was_trained(network: PixArt) -> None:
    given = inputs()
    assert torch.equal(run(network, given, strength=0.0), run(network, given, strength=None))
    half, whole = run(network, given, strength=0.5), run(network, given)
    assert not torch.equal(half, whole) and not torch.equal(half, run(network, given, strength=None))


def test_copies_of_blocks_that_compress_compress(tmp_path: Path) -> None:
    config = replace(CONFIG, kv_compressed_blocks=(2, 4))
    network, given = led_network(config), inputs(config)
    write_branch(tmp_path / "control", branch_of(network), config, belongs_to=BELONGS_TO)
    bare = PixArt(config)
    bare.load_state_dict({name: w for name, w in network.state_dict().items() if not name.startswith("control.")})
    read_branch(tmp_path / "control" / FILE_NAMES[0], config).attach(bare)
    assert bare.get_parameter("control.copies.2.attention.compression.norm.weight").any()
    assert torch.equal(run(bare.eval(), given), run(network, given))


def test_texts_that_are_read_once_serve_the_copies_too(network: PixArt) -> None:
    given = inputs()
    with torch.no_grad():
        read = network.read_text(given["text"], given["mask"])
        found = network(given["latents"], given["times"], read, control=Control(given["control"]))
    assert torch.equal(found, run(network, given))


def test_blocks_that_are_left_out_leave_their_copies_out(network: PixArt) -> None:
    given = inputs()
    reuse = BlockReuse(num_blocks=CONFIG.num_layers, num_rows=2)
    counted = []
    assert network.control is not None
    network.control.copies[0].register_forward_hook(lambda *_: counted.append(1))
    with torch.no_grad():
        outputs = []
        for reuse.is_fresh in (True, False):
            outputs.append(
                network(
                    given["latents"],
                    given["times"],
                    given["text"],
                    given["mask"],
                    control=Control(given["control"]),
                    reuse=reuse,
                )
            )
    assert len(counted) == 1
    torch.testing.assert_close(outputs[0], outputs[1])  # of the same latents and times


def test_a_network_without_a_branch_refuses_control() -> None:
    given = inputs()
    with pytest.raises(ValueError, match="without a control branch"):
        run(PixArt(CONFIG), given)


@pytest.mark.parametrize("number", [0, 5, 28])
def test_copies_feed_the_blocks_behind_the_first(number: int) -> None:
    with pytest.raises(UserError, match=rf"training.x.control.num_copies = {number}: copies feed .* has 4;"):
        add_branch(PixArt(CONFIG), number, key="training.x.control.num_copies")


def test_a_folder_gives_back_what_was_written(network: PixArt, tmp_path: Path) -> None:
    weights = branch_of(network)
    write_branch(tmp_path / "control", weights, CONFIG, belongs_to=BELONGS_TO)
    found = read_branch(tmp_path / "control" / FILE_NAMES[0], CONFIG)
    assert found.num_copies == NUM_COPIES and found.belongs_to == BELONGS_TO
    assert found.weights.keys() == weights.keys()
    assert all(torch.equal(found.weights[name], weights[name]) for name in weights)
    said = json.loads((tmp_path / "control" / "config.json").read_text())
    assert said["_class_name"] == "PixArtControlNetAdapterModel" and said["num_layers"] == NUM_COPIES
    assert json.loads(read_header(found.path)[METADATA]) == BELONGS_TO


@pytest.mark.parametrize("wrapper", ["state_dict", None, "module"])
def test_the_published_file_of_pixart_delta_is_read(network: PixArt, tmp_path: Path, wrapper: str | None) -> None:
    # its base beside it, and the wrappers that training code leaves
    theirs = original_branch(branch_of(network), CONFIG)
    qkv = theirs["controlnet.1.copied_block.attn.qkv.weight"]
    ours = [network.state_dict()[f"control.copies.1.attention.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(qkv, torch.cat(ours))
    assert {"controlnet.0.before_proj.weight", "controlnet.2.after_proj.bias"} <= theirs.keys()
    assert "controlnet.1.copied_block.cross_attn.kv_linear.weight" in theirs
    whole = theirs | {f"base_model.{name}": value for name, value in original_weights(network).items()}
    if wrapper == "module":
        whole = {f"module.{name}": value for name, value in whole.items()}
    torch.save({wrapper: whole} if wrapper == "state_dict" else whole, tmp_path / "control.pth")
    found = read_branch(tmp_path / "control.pth", CONFIG)
    assert found.belongs_to == {}
    assert all(torch.equal(found.weights[name], weight) for name, weight in branch_of(network).items())


def test_what_is_no_branch_of_this_base_is_refused(network: PixArt, tmp_path: Path) -> None:
    folder = tmp_path / "control"
    write_branch(folder, branch_of(network), CONFIG, belongs_to=BELONGS_TO)
    wider = replace(CONFIG, num_heads=6)
    with pytest.raises(UserError, match=r"controlnet_blocks.0.before_proj.weight is \(32, 32\), .* needs \(48, 48\)"):
        read_branch(folder / FILE_NAMES[0], wider)
    with pytest.raises(UserError, match=r"of 3 copies, of another base: .* has 3 blocks"):
        read_branch(folder / FILE_NAMES[0], replace(CONFIG, num_layers=3))
    save_diffusers(network, tmp_path / "transformer")
    with pytest.raises(UserError, match="no control branch"):
        read_branch(tmp_path / "transformer" / FILE_NAMES[0], CONFIG)
    (folder / "config.json").write_text(json.dumps({"_class_name": "PixArtControlNetAdapterModel", "num_layers": 4}))
    with pytest.raises(UserError, match=r"says num_layers 4, but .* has 3 copies"):
        read_branch(folder / FILE_NAMES[0], CONFIG)


def test_the_base_is_saved_without_the_branch(network: PixArt, tmp_path: Path) -> None:
    save_diffusers(network, tmp_path / "model")
    again = load_diffusers(tmp_path / "model")
    assert again.control is None
    assert again.state_dict().keys() == network.state_dict().keys() - branch_of(network).keys()
