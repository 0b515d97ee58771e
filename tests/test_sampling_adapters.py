"""`sampling.lora`: what is drawn with adapters, when it is drawn anew, and which adapters are refused."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sampling_run import FLOW, PIXART, make_run, save_adapter, save_adapter_checkpoint, write_recipe

from errors import MissingFileError, UserError
from pixart.adapter_files import read_adapter
from pixart.adapters import merge
from pixart.convert import load_diffusers, save_diffusers
from pixart.processes.specs import ddpm_spec
from sampling.__main__ import main
from sampling.adapters import add_adapters
from sampling.trained_model import open_run_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def drawn(run: Path, **table: object) -> tuple[np.ndarray, str]:
    """The picture that `make sample` leaves of a prompt, and the checkpoint that it names."""
    settings = {"prompt": "a star", "max_images_in_process": 8, **table}
    main(["--recipe", str(write_recipe(run, **settings)), "--run", str(run), "--stage", "2"])
    (path,) = (path for path in (run / "samples" / "stage2-prompt").glob("*.png") if path.name != "grid.png")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int), image.info["checkpoint"]


def test_images_are_drawn_anew_when_an_adapters_file_or_weight_changes(run: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "style")
    plain, checkpoint = drawn(run)
    whole, identity = drawn(run, lora=[str(adapter)])
    assert identity.startswith(f"{checkpoint}+sha256:") and not np.array_equal(whole, plain)
    half, of_half = drawn(run, lora=[str(adapter)], lora_weights=[0.5])
    assert of_half != identity and not np.array_equal(half, whole)
    none, _ = drawn(run, lora=[str(adapter)], lora_weights=[0.0])
    assert np.array_equal(none, plain)
    again, same = drawn(run, lora=[str(adapter)], lora_weights=[1.0])
    assert same == identity and np.array_equal(again, whole)
    save_adapter(tmp_path / "style", seed=4)
    other, of_other = drawn(run, lora=[str(adapter)])
    assert of_other != identity and not np.array_equal(other, whole)


def test_a_stage_of_adapters_is_added_as_its_merged_weights_are(run: Path, tmp_path: Path) -> None:
    step = save_adapter_checkpoint(run, "cat")
    network = load_diffusers(run / "training" / "stage2" / "step-7" / "model")
    merge(network, [(read_adapter(step / "adapter", PIXART), 0.7)])
    save_diffusers(network, tmp_path / "merged" / "transformer")
    added, _ = drawn(run, lora=["{run}/training/cat"], lora_weights=[0.7])
    assert np.array_equal(added, drawn(run, lora=[str(step / "adapter")], lora_weights=[0.7])[0])
    trained = add_adapters(open_run_model(run, "stage2"), ["{run}/training/cat"], [0.7], run=run)
    expected = load_diffusers(tmp_path / "merged" / "transformer").state_dict()
    assert all(np.array_equal(weight, expected[name]) for name, weight in trained.load().state_dict().items())
    assert trained.name == "stage 2, step 7 + cat, step-7 0.7"


def test_a_stages_own_adapter_is_weighed_and_not_added_twice(run: Path, tmp_path: Path) -> None:
    cat = save_adapter_checkpoint(run, "cat")
    plain = open_run_model(run, "cat")
    copied = tmp_path / "mine.safetensors"
    copied.write_bytes((cat / "adapter" / "adapter_model.safetensors").read_bytes())

    def weights_of(wanted: list[str], weights: list[float] | None) -> dict[str, torch.Tensor]:
        return add_adapters(plain, wanted, weights, run=run).load().state_dict()

    def expected(weight: float) -> dict[str, torch.Tensor]:
        return add_adapters(open_run_model(run, "stage2"), [str(cat)], [weight], run=run).load().state_dict()

    for wanted, weights in (([str(cat)], [0.6]), ([], [0.6]), (["{run}/training/cat"], [0.6]), ([str(copied)], [0.6])):
        torch.testing.assert_close(weights_of(wanted, weights), expected(0.6), atol=1e-6, rtol=0)
    torch.testing.assert_close(weights_of([str(cat)], None), plain.load().state_dict(), atol=1e-6, rtol=0)
    weighed = add_adapters(plain, [], [0.6], run=run)
    assert weighed.name == "cat, step 7 at 0.6" and weighed.identity != plain.identity
    assert weighed.adapters[0].location == "{run}/training/cat/step-7"
    style = save_adapter(tmp_path / "style", seed=8)
    both = add_adapters(plain, [str(style)], [0.5], run=run)
    assert both.name == "cat, step 7 + style 0.5" and len(both.own_adapters) == 1
    with pytest.raises(UserError, match="2 weights for 0 adapters"):
        add_adapters(plain, [], [0.6, 0.4], run=run)
    with pytest.raises(UserError, match="1 weights for 0 adapters"):
        add_adapters(open_run_model(run, "stage2"), [], [0.6], run=run)


def test_as_many_weights_as_adapters_are_typed(run: Path, tmp_path: Path) -> None:
    adapter = str(save_adapter(tmp_path / "style"))
    with pytest.raises(UserError, match=r"sampling\.lora_weights has 2 weights for 1 adapters of sampling\.lora"):
        drawn(run, lora=[adapter], lora_weights=[0.8, 0.5])
    with pytest.raises(UserError, match=r"sampling\.lora_weights has 1 weights for 0 adapters"):
        drawn(run, lora_weights=[0.8])
    with pytest.raises(MissingFileError, match=r"sampling\.lora: adapter .*gone\.safetensors does not exist"):
        drawn(run, lora=[str(tmp_path / "gone.safetensors")])


def test_an_encoder_that_is_gone_is_named_with_the_file_that_says_it(run: Path, tmp_path: Path) -> None:
    (run / "t5").rename(run / "moved")
    said = r"text encoder of stage 2, step 7: model folder .*t5 does not exist, which .*step-7/trainer\.json names: put"
    with pytest.raises(MissingFileError, match=said):
        drawn(run)


def test_an_adapter_of_another_process_model_or_whole_weights_is_refused(run: Path, tmp_path: Path) -> None:
    trained = open_run_model(run, "stage2")
    base = {"identity": trained.identity, "location": "/weights", "adapters": []}
    of_flow = save_adapter(tmp_path / "flow", base=base, process=FLOW, text=None, vae=None)
    with pytest.raises(UserError, match=r"flow/adapter_model\.safetensors was trained with process flow, but stage 2"):
        add_adapters(trained, [str(of_flow)], None, run=run)
    wide = save_adapter(tmp_path / "wide", config=dataclasses.replace(PIXART, head_dim=16))
    with pytest.raises(UserError, match=r"wide/adapter_model\.safetensors is an adapter of another model"):
        add_adapters(trained, [str(wide)], None, run=run)
    with pytest.raises(UserError, match=r"training/stage3 is a checkpoint of a whole network, and no adapter"):
        add_adapters(trained, ["{run}/training/stage3"], None, run=run)
    with pytest.raises(UserError, match="adapters are for a PixArt"):
        add_adapters(open_run_model(run, "stage1"), [str(of_flow)], None, run=run)


def test_an_adapter_of_other_weights_encoder_or_of_more_adapters_is_told(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("sampling"), "propagate", True)
    caplog.set_level("INFO")
    trained = open_run_model(run, "stage2")
    assert trained.text is not None
    known = {"process": ddpm_spec(), "text": {**trained.text, "model": "/other/t5"}, "vae": trained.vae}

    def said(name: str, base: dict) -> str:
        caplog.clear()
        add_adapters(trained, [str(save_adapter(tmp_path / name, base=base, **known))], None, run=run)
        return " ".join(caplog.text.split())

    other = said("other", {"identity": "sha256:1", "location": "/its/weights", "adapters": []})
    assert "was trained on the weights of /its/weights, and is added to others" in other
    assert "was trained with text '/other/t5', and is drawn with" in other and "with vae" not in other
    beside = {"identity": trained.identity, "location": "/weights", "adapters": [{"location": "/first"}]}
    assert "was trained on its base with /first: add that, too" in said("second", beside)
    alone = said("alone", beside | {"adapters": []})
    assert "others" not in alone and "add that" not in alone
