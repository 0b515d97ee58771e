"""Heads over CLIP's embeddings in the layouts that are published, against the modules that their makers wrote."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from encoders.clip_heads import load_head
from errors import UserError

WIDTH = 12


class NsfwHead(nn.Module):
    """LAION's NSFW head for ViT-B/32 (three linear layers) or ViT-L/14 (four), as ported from Keras."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.norm = nn.Module()
        self.norm.register_buffer("mean", torch.randn(widths[0]) * 0.1)
        self.norm.register_buffer("variance", torch.rand(widths[0]) + 0.1)
        self.num_layers = len(widths) - 1
        for number in range(1, len(widths)):
            setattr(self, f"linear_{number}", nn.Linear(widths[number - 1], widths[number]))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        norm = self.get_submodule("norm")
        states = (embeddings - norm.get_buffer("mean")) / (norm.get_buffer("variance").sqrt() + 1e-10)
        for number in range(1, self.num_layers):
            states = functional.relu(self.get_submodule(f"linear_{number}")(states))
        return torch.sigmoid(self.get_submodule(f"linear_{self.num_layers}")(states))


def layered(*layers: nn.Module) -> nn.Module:
    module = nn.Module()
    module.layers = nn.Sequential(*layers)
    module.forward = module.layers.forward
    return module


def dense(widths: list[int], *between: type[nn.Module], num_with: int | None = None) -> nn.Module:
    """Linear layers, after each of the first `num_with` of which, or all but the last, stand `between`."""
    layers: list[nn.Module] = []
    for place in range(len(widths) - 1):
        layers.append(nn.Linear(widths[place], widths[place + 1]))
        if place < (len(widths) - 2 if num_with is None else num_with):
            layers += [kind() for kind in between]
    return layered(*layers)


def aesthetic_2_relu() -> nn.Module:
    steps = [nn.Linear(WIDTH, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 7), nn.ReLU(), nn.Dropout(0.2)]
    steps += [nn.Linear(7, 6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1)]
    return layered(*steps)


HEADS: dict[str, Callable[[], nn.Module]] = {
    "aesthetic predictor 1": lambda: nn.Linear(WIDTH, 1),
    "aesthetic predictor 2, linear": lambda: dense([WIDTH, 8, 7, 6, 5, 1], nn.Dropout, num_with=3),
    "aesthetic predictor 2, ReLU": aesthetic_2_relu,
    "NSFW head for ViT-H/14": lambda: dense([WIDTH, 8, 9, 8, 7, 6, 5, 1], nn.ReLU, nn.Dropout, num_with=5),
    "NSFW head": lambda: NsfwHead([WIDTH, 6, 9, 7, 1]),
    "NSFW head, short": lambda: NsfwHead([WIDTH, 6, 6, 1]),
}


def save(module: nn.Module, path: Path) -> Path:
    weights = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(OrderedDict(weights), path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", HEADS)
def test_a_published_layout_scores_as_its_makers_module_does(name: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = HEADS[name]().eval()
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(3)  # so that a wrong activation cannot hide
    head = load_head(save(module, tmp_path / f"head{suffix}"), key="columns.heads.aesthetic.file")
    embeddings = functional.normalize(torch.randn(50, WIDTH), dim=1)
    with torch.no_grad():
        wanted = module(embeddings)[:, 0].numpy()
    assert head.layout == name.removesuffix(", short") and head.width == WIDTH
    scores = head.scores(embeddings.numpy())
    assert scores.dtype == np.float32
    assert scores == pytest.approx(wanted, abs=1e-5)
    assert head.is_probability == name.startswith("NSFW head") * (name != "NSFW head for ViT-H/14")
    # Half the bits, another length and another batch give the same.
    halves = (2 * embeddings).numpy().astype(np.float16)
    assert head.scores(halves) == pytest.approx(wanted, abs=2e-2)
    assert np.array_equal(np.concatenate([head.scores(halves[:7]), head.scores(halves[7:])]), head.scores(halves))


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_head(path, key="columns.heads.nsfw.file")
    assert str(error.value).startswith(f"columns.heads.nsfw.file = '{path}' ")
    return str(error.value)


def test_what_is_no_head_is_refused_by_name_and_shape(tmp_path: Path) -> None:
    other = save(dense([WIDTH, 8, 1], nn.ReLU), tmp_path / "other.pth")  # layers.0 and layers.2: of nobody's
    said = refused(other)
    assert "holds layers.0.bias [8], layers.0.weight [8, 12], layers.2.bias [1], layers.2.weight [1, 8], which" in said
    assert "known are weight and bias (aesthetic predictor 1), layers.<n>.weight and .bias with n = 0-2-4-6-7" in said
    many = save(nn.Linear(WIDTH, 3), tmp_path / "many.safetensors")
    assert "do not fit together: weight [3, 12], bias [3] of the last layer, which gives 1 number" in refused(many)
    broken = HEADS["NSFW head"]().state_dict()
    torch.save(broken | {"linear_2.weight": torch.zeros(9, 5), "linear_1.weight": torch.zeros(6, WIDTH)}, other)
    assert "linear_1.weight [6, 12], linear_1.bias [6] of one before a layer that reads 5" in refused(other)
    torch.save(broken | {"norm.mean": torch.zeros(5)}, other)
    assert "norm.mean [5], norm.variance [12], linear_1.weight [., 12]" in refused(other)
    del broken["norm.mean"]
    torch.save(broken, other)
    assert "and 5 more, which is no known layout" in refused(other)


def test_a_file_that_holds_more_than_weights_or_was_not_fetched_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    torch.save(nn.Linear(WIDTH, 1), path)  # a whole module: to open it would run what its file says
    assert "is no file of weights alone" in refused(path)
    torch.save({"state_dict": nn.Linear(WIDTH, 1).state_dict(), "epoch": 3}, path)
    assert "is no file of weights by name: it should be a head's" in refused(path)
    path.write_text("<!DOCTYPE html><html>GitHub</html>")
    assert "is a web page that was saved under this name" in refused(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is a pointer of git-lfs" in refused(path)
