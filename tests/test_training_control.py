"""Stages that train a control branch: on two ranks under each ZeRO stage, resumed, on one rank, and what is on disk."""

import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training_lora import Case, open_job
from test_training_objective import SCALE, SHIFT, make_batch
from test_training_parts import SHAPE, losses, random_network, train_three
from torch import Tensor
from training_run import RECIPE, make_run, write_latents

from encoders.weights import identity_of
from errors import MissingFileError, UserError
from pipelines.store.manifest import manifest_path
from pixart.belonging import METADATA, read_header
from pixart.branching import add_branch
from pixart.control import Control
from pixart.control_files import FILE_NAMES, read_branch, write_branch
from pixart.convert import load_diffusers, save_diffusers
from pixart.guidance_condition import with_guidance_condition
from pixart.model import PixArt
from pixart.processes.ddpm import DDPM
from pixart.processes.specs import lcm_student
from training.convert import main as convert
from training.data.survey import Survey
from training.loop.products import require_products
from training.objectives.choice import choose_objective
from training.objectives.denoise import Denoise
from training.objectives.inputs import NetworkInputs
from training.objectives.objective import Trained
from training.stages.networks import blank_copy, count_weights, network_config
from training.stages.starts import objective_networks, starting_network

CONTROL = {"control_copies": 1, "trains": "control", "learning_rate": 1e-2}
FAMILY = "\n[features.stage2.families.control-canny]\n"
# ZeRO stage, precision.
KINDS = ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16"))


class ControlCase(Case):
    def weights(self, step: int) -> dict[str, Tensor]:
        return load_file(self.step(step) / "control" / "diffusion_pytorch_model.safetensors")


def make_control_run(folder: Path) -> Path:
    """A run whose stage 2 has control images, of other numbers than its latents."""
    run = make_run(folder)
    shards = {"laion_0": 40, "laion_1": 23}
    write_latents(run, 32, shards, buckets=["32x32"], is_bucketed=False, control="canny")
    (folder / "recipe.toml").write_text(RECIPE + FAMILY)
    return run


@dataclass(frozen=True)
class Runs:
    start: Path
    straight: dict[Any, ControlCase]
    resumed: dict[Any, ControlCase]
    moved: dict[Any, ControlCase]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("control")
    features = make_control_run(folder) / "features"
    start = random_network(folder / "start", 1)
    shared = CONTROL | {"starts_from": str(start), "log_every": 1, "checkpoint_every": 100, "keep_checkpoints": 3}

    def case(name: str, kind: tuple[int, str]) -> ControlCase:
        run = folder / f"{name}-{kind[0]}-{kind[1]}"
        run.mkdir()
        (run / "features").symlink_to(features)
        return ControlCase(run, "denoise", shared | {"zero_stage": kind[0], "dtype": kind[1]})

    return Runs(start, *train_three(case, KINDS, folder))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_branch_resumes_exactly_and_on_another_number_of_ranks(runs: Runs, kind: tuple[int, str]) -> None:
    straight, resumed, moved = runs.straight[kind], runs.resumed[kind], runs.moved[kind]
    assert losses(resumed) == losses(straight) and len(set(losses(straight))) == 4
    ours, theirs = resumed.weights(4), straight.weights(4)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert losses(moved) == pytest.approx(losses(straight), rel=1e-3)


@pytest.mark.slow
def test_sharding_changes_the_branch_by_rounding_alone(runs: Runs) -> None:
    whole, sharded = runs.straight[(0, "fp32")].weights(4), runs.straight[(2, "fp32")].weights(4)
    for name, weight in whole.items():
        torch.testing.assert_close(sharded[name], weight, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_checkpoint_holds_the_branch_alone_and_says_what_it_belongs_to(runs: Runs, kind: tuple[int, str]) -> None:
    folder = runs.straight[kind].step(4)
    assert not (folder / "model").exists() and not (folder / "adapter").exists()
    weights = runs.straight[kind].weights(4)
    started = load_file(runs.start / "diffusion_pytorch_model.safetensors")
    copied = "transformer_blocks.0.ff.net.0.proj.weight"
    trained = weights["controlnet_blocks.0.transformer_block.ff.net.0.proj.weight"]
    assert weights["controlnet_blocks.0.after_proj.weight"].any() and not torch.equal(trained, started[copied])
    # DeepSpeed's records of names and settings take the same for any number of weights.
    num_weights = sum(value.numel() for value in weights.values())
    state = sum(path.stat().st_size for path in (folder / "deepspeed").iterdir())
    assert state < 16 * num_weights + 200_000
    trainer = json.loads((folder / "trainer.json").read_text())
    assert trainer["base"]["identity"] == identity_of(runs.start)
    assert trainer["control"] == {"family": "control-canny", "kind": "canny", "settings": {}, "num_copies": 1}
    header = read_header(folder / "control" / "diffusion_pytorch_model.safetensors")
    belongs_to = json.loads(header[METADATA])
    assert belongs_to["base"] == trainer["base"] and belongs_to["control"] == trainer["control"]


@pytest.mark.slow
def test_a_stage_goes_on_from_a_branch_and_takes_none_for_whole_weights(runs: Runs, tmp_path: Path) -> None:
    case = runs.straight[(0, "fp32")]
    settings = case.settings | {"control_starts_from": str(case.step(4))}
    shutil.copytree(case.run / "features", tmp_path / "run" / "features")
    shutil.copy(case.run.parent / "recipe.toml", tmp_path / "recipe.toml")
    job = open_job(tmp_path / "run", **settings)
    assert job.fingerprint.fields["training.control_starts_from"].startswith("sha256:")
    network = starting_network(job, SHAPE)
    assert isinstance(network, PixArt)
    expected = read_branch(case.step(4) / "control" / FILE_NAMES[0], SHAPE).weights
    assert all(torch.equal(network.state_dict()[name], weight) for name, weight in expected.items())
    with pytest.raises(UserError, match=r"starts_from = .* is a checkpoint of a control branch .*say trains = 'cont"):
        open_job(tmp_path / "run", **case.settings | {"starts_from": str(case.step(4))})
    half = tmp_path / "half"
    shutil.copytree(case.step(4), half / "step-4")
    (half / "latest").write_text("step-4")
    trainer = json.loads((half / "step-4" / "trainer.json").read_text())
    (half / "step-4" / "trainer.json").write_text(json.dumps(trainer | {"num_steps": 9}))
    with pytest.raises(UserError, match=r"half has done 4 of 9 steps; .*control_starts_from = '.*step-4/control' to"):
        open_job(tmp_path / "run", **settings | {"control_starts_from": str(half)})
    open_job(tmp_path / "run", **settings | {"control_starts_from": str(half / "step-4" / "control")})
    more = job.settings.model_copy(update={"control_copies": 2})
    with pytest.raises(UserError, match=r"control_copies = 2, but the branch of control_starts_from .* has 1 copies"):
        starting_network(replace(job, settings=more), SHAPE)


@pytest.mark.slow
def test_a_branch_goes_to_pixart_delta_s_file_with_its_base_and_back(runs: Runs, tmp_path: Path) -> None:
    case = runs.straight[(0, "fp32")]
    expected = case.weights(4)
    convert([str(case.run / "training" / "stage2"), str(tmp_path / "branch.pth")])
    stored = torch.load(tmp_path / "branch.pth", weights_only=True)["state_dict"]
    base = load_diffusers(runs.start)
    assert torch.equal(stored["base_model.final_layer.linear.weight"], base.state_dict()["final.weight"])
    assert all(name.startswith(("base_model.", "controlnet.")) for name in stored)
    convert([str(tmp_path / "branch.pth"), str(tmp_path / "folder")])
    found = load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], w) for name, w in expected.items())
    assert "FILL IN" in (tmp_path / "folder" / "README.md").read_text()
    # from the checkpoint what it belongs to is known, and goes along
    convert([str(case.step(4) / "control"), str(tmp_path / "named")])
    belongs_to = json.loads(read_header(tmp_path / "named" / "diffusion_pytorch_model.safetensors")[METADATA])
    assert (
        belongs_to["control"]["kind"] == "canny" and "led by: canny" in (tmp_path / "named" / "README.md").read_text()
    )
    convert([str(tmp_path / "named"), str(tmp_path / "alone.safetensors")])
    alone = load_file(tmp_path / "alone.safetensors")
    assert alone.keys() == {name for name in stored if name.startswith("controlnet.")}
    assert read_branch(tmp_path / "alone.safetensors", SHAPE).belongs_to == belongs_to
    with pytest.raises(UserError, match="is a control branch, and LORA is for whole networks"):
        convert([str(case.step(4)), str(tmp_path / "x"), "--lora", "some"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_control_run(tmp_path_factory.mktemp("job"))


@pytest.fixture
def job(run: Path, tmp_path: Path) -> Any:
    return open_job(run, **CONTROL, starts_from=str(random_network(tmp_path / "start", 1)), dtype="bf16")


def test_only_the_branch_trains_and_step_0_says_what_the_base_says(job: Any) -> None:
    survey = Survey(buckets=[], counts=[], channels=4, downsample=8, max_label=-1, num_without_size=0)
    network = starting_network(job, network_config(job, survey))
    networks = objective_networks(job, {"network": Trained()}, network)
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert trained == {name for name in network.state_dict() if name.startswith("control.")}
    assert {weight.dtype for weight in network.parameters() if weight.requires_grad} == {torch.float32}
    assert {weight.dtype for weight in network.parameters() if not weight.requires_grad} == {torch.bfloat16}
    blank = blank_copy(network)
    assert {name for name, weight in blank.named_parameters() if weight.requires_grad} == trained
    assert count_weights({"network": Trained()}, networks).trained == sum(
        weight.numel() for weight in network.parameters() if weight.requires_grad
    )
    base = load_diffusers(job.start.path)
    assert isinstance(base, PixArt)
    network.float()
    latents, text = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 16)
    with torch.no_grad():
        led = network(latents, torch.tensor([3, 900]), text, control=Control(torch.randn(2, 4, 4, 4)))
        base.load_state_dict({name: w.bfloat16().float() for name, w in base.state_dict().items()})
        torch.testing.assert_close(led, base(latents, torch.tensor([3, 900]), text))


def test_the_network_gets_the_scaled_mean_of_its_own_sample(job: Any) -> None:
    batch = make_batch(has_text=True)
    assert batch.text is not None
    shape = replace(SHAPE, caption_channels=batch.text.values.shape[1])
    maps = torch.randn(batch.mean.shape).half()
    batch.tensors["control-canny.mean"] = maps
    inputs = NetworkInputs(
        scaling_factor=SCALE, shift_factor=SHIFT, null_label=None, dtype=torch.float32, control="control-canny"
    )
    assert inputs.families == ("latents", "text", "control-canny")
    network = PixArt(shape)
    add_branch(network, 1, key="k")
    seen: list[Any] = []
    network.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs.get("control")), with_kwargs=True)
    Denoise(process=DDPM(), inputs=inputs).loss({"network": network}, batch)
    assert torch.equal(seen[0].latents, (maps.float() - SHIFT) * SCALE) and seen[0].strength == 1.0
    # a teacher beside it has no branch, and is not led
    bare = PixArt(shape)
    bare.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs.get("control")), with_kwargs=True)
    Denoise(process=DDPM(), inputs=inputs).loss({"network": bare}, batch)
    assert seen[1] is None


def test_the_objective_is_led_by_the_family_of_the_features(job: Any) -> None:
    objective = choose_objective(job, torch.device("cpu"))
    assert objective.families == ("latents", "text", "control-canny")
    assert job.features.channels_beside == {"control-canny": 4}


def test_features_without_control_images_are_refused(tmp_path: Path) -> None:
    start = str(random_network(tmp_path / "start", 1))
    run = make_control_run(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    with pytest.raises(UserError, match=r"trains = 'control' reads control images .*\[features.stage2\] has none: add"):
        open_job(run, **CONTROL, starts_from=start)
    (tmp_path / "recipe.toml").write_text(RECIPE + FAMILY)
    with pytest.raises(UserError, match=r"control_family = 'control-hed'\).* has control-canny: add \[features.stage2"):
        open_job(run, **CONTROL, starts_from=start, control_family="control-hed")
    write_latents(run, 32, {"laion_0": 40, "laion_1": 23}, buckets=["32x32"], is_bucketed=False, control="depth")
    (tmp_path / "recipe.toml").write_text(RECIPE + FAMILY + FAMILY.replace("canny", "depth"))
    with pytest.raises(
        UserError, match=r"has control-canny, control-depth: say which leads in training.stage2.control"
    ):
        open_job(run, **CONTROL, starts_from=start)
    assert open_job(run, **CONTROL, starts_from=start, control_family="control-depth").features.control is not None


def say_of_maps(run: Path, **control: Any) -> None:
    """Change what the manifest of the control images says of how they were drawn."""
    path = run / "features" / "control-canny-32" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["extra"]["control"] |= control
    path.write_text(json.dumps(manifest))


def test_maps_of_another_model_than_the_recipe_s_are_refused(tmp_path: Path) -> None:
    run = make_control_run(tmp_path)
    start = str(random_network(tmp_path / "start", 1))
    say_of_maps(run, settings={"model": "a/hed.pth", "revision": None})
    open_job(run, **CONTROL, starts_from=start)
    (tmp_path / "recipe.toml").write_text(RECIPE + FAMILY + 'model = "b/hed.pth"\n')
    with pytest.raises(
        UserError,
        match=r"families\.control-canny\.model is 'a/hed\.pth', but 'b/hed\.pth' is needed; .*set features\.stage2",
    ):
        open_job(run, **CONTROL, starts_from=start)


def test_datasets_that_are_mixed_have_the_same_control_images(tmp_path: Path) -> None:
    start, run = str(random_network(tmp_path / "start", 1)), make_control_run(tmp_path)
    other = tmp_path / "other" / "run"
    shutil.copytree(run, other)
    recipe = tmp_path / "recipe.toml"
    table = recipe.read_text()
    mixed = f"\n[[training.stage2.datasets]]\n[[training.stage2.datasets]]\nrun = '{other}'\nshards = ['laion_1']\n"
    apart = mixed.replace("datasets]]\n[[", "datasets]]\nshards = ['laion_0']\n[[")
    recipe.write_text(table + apart)
    assert len(open_job(run, **CONTROL, starts_from=start).features.datasets) == 2
    alone = "\n[features.alone]\nresolution = 32\nshards = ['laion_*']\n"
    recipe.write_text(table + alone + apart + "features = 'alone'\n")
    with pytest.raises(UserError, match=r"families is \['latents', 'text'\], but .*'control-canny'\] is needed"):
        open_job(run, **CONTROL, starts_from=start)
    path = manifest_path(other / "features" / "control-canny-32")
    manifest = json.loads(path.read_text())
    manifest["extra"] |= {"settings": {"low_threshold": 50}}
    path.write_text(json.dumps(manifest))
    edges = "[features.alone.families.control-canny]\nlow_threshold = 50\n"
    recipe.write_text(table + alone + edges + apart + "features = 'alone'\n")
    with pytest.raises(UserError, match=r"control-canny\.settings is \{'low_threshold': 50\}, but None is needed"):
        open_job(run, **CONTROL, starts_from=start)


def test_a_branch_without_weights_to_stay_beside_is_refused(run: Path, tmp_path: Path) -> None:
    start = str(random_network(tmp_path / "start", 1))
    with pytest.raises(UserError, match=r"trains beside weights, .*starts_from names none \('scratch'\): name a stage"):
        open_job(run, **CONTROL, starts_from="scratch")
    with pytest.raises(UserError, match=r"'control' keeps the weights' own output layer, .*process ddpm, and .*'flow'"):
        open_job(run, **CONTROL, starts_from=start, process="flow")
    with pytest.raises(UserError, match=r"training\.stage1\.trains = 'control' is for a PixArt, .*network is 'dit'"):
        open_job(run, stage="stage1", **CONTROL, starts_from="scratch")
    with pytest.raises(UserError, match="'fp8' does not go with trains = 'control'"):
        require_products(open_job(run, **CONTROL, starts_from=start, dtype="bf16", products="fp8").settings)
    job = open_job(run, **CONTROL | {"control_copies": 2}, starts_from=start)
    with pytest.raises(UserError, match=r"stage2\.control_copies = 2: copies feed .* network of 2 blocks has 1"):
        starting_network(job, SHAPE)


def test_a_branch_is_not_put_beside_weights_that_are_told_their_guidance(run: Path, tmp_path: Path) -> None:
    """Folding one into them would change what has to stay as it is, and drawing could not find it again."""
    network = load_diffusers(random_network(tmp_path / "start", 1))
    assert isinstance(network, PixArt)
    save_diffusers(with_guidance_condition(network), tmp_path / "told")
    job = open_job(run, **CONTROL, starts_from=str(tmp_path / "told"))
    with pytest.raises(
        UserError, match=r"told\) is told its guidance, and .*trains = 'control' leaves weights as they are"
    ):
        starting_network(job, SHAPE)


def test_what_a_branch_starts_from_is_one(run: Path, tmp_path: Path) -> None:
    start = str(random_network(tmp_path / "start", 1))
    with pytest.raises(MissingFileError, match=r"training.stage2.control_starts_from: model folder .*gone does not"):
        open_job(run, **CONTROL, starts_from=start, control_starts_from=str(tmp_path / "gone"))
    job = open_job(run, **CONTROL, starts_from=start, control_starts_from=start)
    with pytest.raises(UserError, match=r"control_starts_from: .*\.safetensors is no control branch: it has no"):
        starting_network(job, SHAPE)
    network = PixArt(SHAPE)
    add_branch(network, 1, key="k")
    weights = {name: weight for name, weight in network.state_dict().items() if name.startswith("control.")}
    write_branch(tmp_path / "branch", weights, SHAPE, belongs_to={})
    open_job(run, **CONTROL, starts_from=start, control_starts_from=str(tmp_path / "branch"))


def test_a_branch_that_has_learnt_beside_others_or_by_other_maps_is_said(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("training"), "propagate", True)
    start = random_network(tmp_path / "start", 1)
    own = {"identity": identity_of(start), "location": "/own", "adapters": []}
    maps = {"kind": "canny", "settings": {}}

    def said(**changed: Any) -> str:
        network = PixArt(SHAPE)
        add_branch(network, 1, key="k")
        weights = {name: weight for name, weight in network.state_dict().items() if name.startswith("control.")}
        known = {"base": own, "process": {"name": "ddpm"}, "control": maps} | changed
        write_branch(tmp_path / "branch", weights, SHAPE, belongs_to=known)
        caplog.clear()
        job = open_job(run, **CONTROL, starts_from=str(start), control_starts_from=str(tmp_path / "branch"))
        starting_network(job, SHAPE)
        return " ".join(caplog.text.split())

    assert said() == ""
    assert "was trained on the weights of /first, and is added to others" in said(
        base=own | {"identity": "sha256:1", "location": "/first"}
    )
    depth = {"kind": "depth", "settings": {"model": "here"}, "identity": "sha256:2"}
    assert "was trained with depth maps, and these are canny maps" in said(control=depth)
    assert "was trained with canny maps of widen_pixels 1, and these have 0" in said(
        control=maps | {"settings": {"widen_pixels": 1}}
    )
    with pytest.raises(UserError, match=r"was trained with process flow, but .*start with ddpm"):
        said(process={"name": "flow"})


def test_a_branch_is_not_trained_beside_weights_of_few_steps(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student" / "transformer"
    save_diffusers(PixArt(SHAPE), folder)
    scheduler = folder.parent / "scheduler"
    scheduler.mkdir()
    config = DDPM(student=lcm_student(guidance=(4.0, 16.0))).scheduler_config()
    (scheduler / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"starts_from = .*student' was distilled by lcm to few: train it beside"):
        open_job(run, **CONTROL, starts_from=str(folder.parent))
