"""States of training from when query, key and value were one layer: what they become is what would be saved today."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.store.checkpoints import Checkpoint
from pixart.model import PixArt, PixArtConfig
from training.loop.conversions import needs_universal
from training.loop.former_layout import LAYOUT, LAYOUT_KEY, has_former_layout, separate_model_state, separate_state

CONFIG = PixArtConfig(num_layers=2, num_heads=2, head_dim=8, caption_channels=8, sample_size=4)
FUSED = {
    "attention.query": "attention.qkv",
    "attention.key": "attention.qkv",
    "attention.value": "attention.qkv",
    "cross_attention.key": "cross_attention.key_value",
    "cross_attention.value": "cross_attention.key_value",
}


def former_name(name: str) -> str:
    """Name of the weight that held this one's values: blocks.0.attention.key.bias -> blocks.0.attention.qkv.bias."""
    layer, _, part = name.rpartition(".")
    block, attention, projection = (
        layer.rpartition("cross_attention") if "cross_" in layer else layer.rpartition("attention")
    )
    return f"{block}{FUSED.get(attention + projection, attention + projection)}.{part}"


def fused(values: dict[str, Tensor]) -> "OrderedDict[str, Tensor]":
    parts: dict[str, list[Tensor]] = {}
    for name, value in values.items():
        parts.setdefault(former_name(name), []).append(value)
    return OrderedDict((name, torch.cat(each) if len(each) > 1 else each[0]) for name, each in parts.items())


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights by name and the state of their AdamW, after two steps."""
    torch.manual_seed(0)
    model = PixArt(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return dict(model.state_dict()), optimizer.state_dict()


def former_adam(weights: dict[str, Tensor], adam: dict[str, Any]) -> dict[str, Any]:
    moments = {
        moment: fused({name: adam["state"][i][moment] for i, name in enumerate(weights)})
        for moment in ("exp_avg", "exp_avg_sq")
    }
    names = list(fused(weights))
    state = {
        i: {"step": torch.tensor(2.0), **{key: moments[key][name] for key in moments}} for i, name in enumerate(names)
    }
    return {"state": state, "param_groups": [adam["param_groups"][0] | {"params": list(range(len(names)))}]}


def assert_same(ours: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(ours, expected)
    elif isinstance(expected, dict):
        assert list(ours) == list(expected)
        for key in expected:
            assert_same(ours[key], expected[key])
    elif isinstance(expected, list):
        assert len(ours) == len(expected)
        for one, other in zip(ours, expected, strict=True):
            assert_same(one, other)
    else:
        assert ours == expected


def test_former_names_are_those_of_the_former_code():
    names = {former_name(name) for name in PixArt(CONFIG).state_dict() if name.startswith("blocks.1.")}
    attentions = [name for name in names if "attention" in name and name.endswith("weight")]
    assert sorted(name.removeprefix("blocks.1.") for name in attentions) == [
        "attention.out.weight",
        "attention.qkv.weight",
        "cross_attention.key_value.weight",
        "cross_attention.out.weight",
        "cross_attention.query.weight",
    ]


@pytest.mark.parametrize("has_masters", [False, True], ids=["fp32", "bf16"])
def test_weights_and_moments_without_zero(trained, has_masters):
    weights, adam = trained
    former = former_adam(weights, adam)
    masters = {"optimizer_state_dict": former, "fp32_groups": [list(fused(weights).values())]}
    state = {"module": fused(weights), "param_shapes": None, "optimizer": masters if has_masters else former}
    separate_model_state(state)
    assert_same(dict(state["module"]), weights)
    found = state["optimizer"]["optimizer_state_dict"] if has_masters else state["optimizer"]
    assert_same(found, adam)
    if has_masters:
        assert_same(state["optimizer"]["fp32_groups"], [list(weights.values())])
    # Fused AdamW counts in place: a count that two weights shared would count twice.
    assert len({each["step"].data_ptr() for each in found["state"].values()}) == len(weights)


@pytest.mark.parametrize("is_flat", [False, True], ids=["zero 1 and 2", "zero 3"])
def test_the_universal_form(trained, tmp_path: Path, is_flat: bool):
    weights, _ = trained
    former = fused(weights)
    source = tmp_path / "universal"
    for name, value in former.items():
        (source / "zero" / name).mkdir(parents=True)
        content = value.flatten() if is_flat else {"cat_dim": 0, "param": value}
        torch.save(content, source / "zero" / name / "fp32.pt")
        torch.save(torch.tensor(2.0), source / "zero" / name / "step.pt")
    torch.save({"lr": 1.0}, source / "zero" / "optimizer_state.pt")
    module = OrderedDict((name, value[:0] if is_flat else value) for name, value in former.items())
    shapes = [OrderedDict((name, value.shape) for name, value in former.items())]
    state = {"module": module, "param_shapes": shapes, "optimizer": None}
    torch.save(state, source / "mp_rank_00_model_states.pt")

    separate_state(source, tmp_path / "separate")
    folders = [path for path in (tmp_path / "separate" / "zero").iterdir() if path.is_dir()]
    assert {path.name for path in folders} == weights.keys()
    for path in folders:
        content = torch.load(path / "fp32.pt")
        whole = content if is_flat else content["param"]
        assert torch.equal(whole, weights[path.name].flatten() if is_flat else weights[path.name])
        assert torch.load(path / "step.pt") == 2
    state = torch.load(tmp_path / "separate" / "mp_rank_00_model_states.pt")
    assert list(state["module"]) == list(weights)
    assert {name: shape for shapes in state["param_shapes"] for name, shape in shapes.items()} == {
        name: value.shape for name, value in weights.items()
    }
    assert len(list((source / "zero").iterdir())) == len(former) + 1, "what was saved is left as it was"


def test_only_states_of_the_former_layout_are_taken_apart(tmp_path: Path):
    former = Checkpoint(tmp_path, {"zero_stage": 2, "num_ranks": 2, "fingerprint": {}})
    today = Checkpoint(tmp_path, {**former.trainer, LAYOUT_KEY: LAYOUT})
    assert has_former_layout(former) and not has_former_layout(today)
    assert needs_universal(former, 2) and not needs_universal(today, 2) and needs_universal(today, 3)
    assert not needs_universal(Checkpoint(tmp_path, {"zero_stage": 0, "num_ranks": 2}), 3)
