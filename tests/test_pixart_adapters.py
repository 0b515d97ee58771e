"""Adapters: merged as peft computes them beside, opened by peft on diffusers' transformer, read from others' files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from errors import MissingFileError, UserError
from pixart.adapter_files import read_adapter, read_trained, write_adapter
from pixart.adapter_layers import AdapterShape, layer_names
from pixart.adapters import add_adapters, merge, require_fit, unmerge
from pixart.convert import load_diffusers, save_diffusers
from pixart.model import PixArt, PixArtConfig

CONFIG = PixArtConfig(num_layers=2, num_heads=2, head_dim=8, caption_channels=8, sample_size=4)
BASE = {"base": {"identity": "sha256:1", "location": "/weights", "adapters": []}, "process": {"name": "ddpm"}}
WORDS = ("attention", "cross_attention", "mlp", "embeddings")
SHAPES = {
    "lora": AdapterShape(rank=3, alpha=5.0, targets=WORDS),
    "rslora": AdapterShape(rank=4, alpha=3.0, targets=WORDS, rslora=True),
    "dora": AdapterShape(rank=2, alpha=4.0, targets=WORDS, dora=True),
    "part": AdapterShape(rank=2, alpha=1.0, targets=("blocks.1.mlp.*", "attention"), dora=True, rslora=True),
}
KEY = "training.x.lora.targets"


def random_network(seed: int = 1, config: PixArtConfig = CONFIG) -> PixArt:
    torch.manual_seed(seed)
    network = PixArt(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def with_adapters(shape: AdapterShape, seed: int = 2) -> PixArt:
    """The network of `random_network` with adapters beside it, as if they had been trained."""
    network = random_network()
    add_adapters(network, shape, key=KEY)
    torch.manual_seed(seed)
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, mean=1.0 if "magnitude" in name else 0.0, std=0.2)
    return network


def trained(network: PixArt) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in network.named_parameters() if weight.requires_grad}


def written(folder: Path, shape: AdapterShape, seed: int = 2) -> Path:
    write_adapter(folder, trained(with_adapters(shape, seed)), CONFIG, shape=shape, belongs_to=BASE)
    return folder


def output(network: PixArt) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 5, 8, generator=generator)
    with torch.no_grad():
        return network(latents, torch.tensor([3, 700]), text)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", SHAPES)
def test_merged_weights_say_what_peft_says_with_adapters_beside_them(name: str, tmp_path: Path) -> None:
    beside, network = with_adapters(SHAPES[name]), random_network()
    plain = output(network)
    adapter = read_adapter(written(tmp_path, SHAPES[name]), CONFIG)
    require_fit(adapter, network)
    former = merge(network, [(adapter, 1.0)])
    assert distance(output(network), output(beside)) < 1e-6 < 0.01 < distance(output(beside), plain)
    unmerge(network, former)
    assert torch.equal(output(network), plain)


@pytest.mark.parametrize("name", SHAPES)
def test_peft_opens_what_is_written_on_diffusers_transformer(name: str, tmp_path: Path) -> None:
    save_diffusers(random_network(), tmp_path / "transformer")
    written(tmp_path / "adapter", SHAPES[name])
    transformer = PixArtTransformer2DModel.from_pretrained(tmp_path / "transformer")
    opened = PeftModel.from_pretrained(transformer, tmp_path / "adapter").eval()
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 5, 8, generator=generator)
    with torch.no_grad():
        sizes = {"resolution": None, "aspect_ratio": None}
        said = opened(latents, text, timestep=torch.tensor([3, 700]), added_cond_kwargs=sizes).sample
    assert distance(output(with_adapters(SHAPES[name])), said) < 1e-5


@pytest.mark.parametrize("name", SHAPES)
def test_new_adapters_change_nothing_and_come_back_from_disk_bit_for_bit(name: str, tmp_path: Path) -> None:
    network = random_network()
    add_adapters(network, SHAPES[name], key=KEY)
    assert distance(output(network), output(random_network())) < 1e-6
    weights = trained(with_adapters(SHAPES[name]))
    back = read_trained(written(tmp_path, SHAPES[name]), CONFIG)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    first = (tmp_path / "adapter_config.json").read_bytes()
    assert (written(tmp_path / "again", SHAPES[name]) / "adapter_config.json").read_bytes() == first


@pytest.mark.parametrize("name", SHAPES)
def test_the_file_alone_says_what_its_change_is_multiplied_by(name: str, tmp_path: Path) -> None:
    whole = read_adapter(written(tmp_path, SHAPES[name]), CONFIG)
    alone = (tmp_path / "adapter_model.safetensors").rename(tmp_path / "style.safetensors")
    adapter = read_adapter(alone, CONFIG)
    assert not adapter.notes
    assert {layer.scale for layer in adapter.layers.values()} == {SHAPES[name].scale}
    assert adapter.layers.keys() == whole.layers.keys()


def test_several_adapters_add_their_changes_each_times_its_weight(tmp_path: Path) -> None:
    shapes = {"lora": 0.8, "dora": 0.5, "rslora": -0.3}
    adapters = [
        (read_adapter(written(tmp_path / name, SHAPES[name], seed), CONFIG), weight)
        for seed, (name, weight) in enumerate(shapes.items())
    ]
    network, wanted = random_network(), {}
    for adapter, weight in adapters:
        alone = random_network()
        former = merge(alone, [(adapter, 1.0)])
        for name, value in former.items():
            wanted[name] = wanted.get(name, value) + weight * (alone.get_parameter(name).detach() - value)
    merge(network, adapters)
    for name, value in wanted.items():
        assert distance(network.get_parameter(name).detach(), value) < 1e-6
    backward = random_network()
    merge(backward, adapters[::-1])
    assert distance(output(backward), output(network)) < 1e-5
    unchanged = random_network()
    merge(unchanged, [(adapter, 0.0) for adapter, _ in adapters])
    assert torch.equal(output(unchanged), output(random_network()))


def script_adapter(tmp_path: Path, **settings: Any) -> tuple[PeftModel, Path]:
    """Train nothing on diffusers' transformer, as PixArt's own script would something: adapters of random numbers."""
    save_diffusers(random_network(), tmp_path / "transformer")
    transformer = PixArtTransformer2DModel.from_pretrained(tmp_path / "transformer")
    targets = ["to_k", "to_q", "to_v", "to_out.0", "proj_out", "ff.net.0.proj", "ff.net.2", "proj", "linear"]
    model = get_peft_model(transformer, LoraConfig(target_modules=[*targets, "linear_1", "linear_2"], **settings))
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, mean=1.0 if "magnitude" in name else 0.0, std=0.2)
    return model, tmp_path / "theirs"


@pytest.mark.parametrize("settings", [{"r": 4}, {"r": 4, "use_dora": True}, {"r": 2, "use_rslora": True}], ids=str)
def test_adapters_of_pixarts_own_script_are_read(settings: dict[str, Any], tmp_path: Path) -> None:
    model, folder = script_adapter(tmp_path, **settings)
    model.save_pretrained(folder)
    network = random_network()
    merge(network, [(read_adapter(folder, CONFIG), 1.0)])
    expected = load_diffusers_of(model, tmp_path)
    assert distance(output(network), output(expected)) < 1e-6


def load_diffusers_of(model: PeftModel, tmp_path: Path) -> PixArt:
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    network = load_diffusers(tmp_path / "merged")
    assert isinstance(network, PixArt)
    return network


def kohya(key: str) -> str:
    return key.removeprefix("base_model.model.").replace("lora_A", "lora_down").replace("lora_B", "lora_up")


def one_trainer(key: str) -> str:
    layer, part, _ = kohya(key).rsplit(".", 2)
    return f"lora_transformer_{layer.replace('.', '_')}.{part}.weight"


RENAMES = (
    lambda key: f"unet.{key}",
    kohya,
    lambda key: f"transformer.{key[17:]}",
    one_trainer,
    lambda key: key.replace(".weight", ".my-style.weight"),
)


@pytest.mark.parametrize("rename", RENAMES)
def test_files_without_settings_take_the_rank_for_alpha_and_say_so(
    rename: Callable[[str], str], tmp_path: Path
) -> None:
    model, _ = script_adapter(tmp_path, r=4, lora_alpha=4)
    weights = {rename(key): value.contiguous() for key, value in get_peft_model_state_dict(model).items()}
    save_file(weights, tmp_path / "style.safetensors")
    adapter = read_adapter(tmp_path / "style.safetensors", CONFIG)
    assert len(adapter.notes) == 1 and "does not say its alpha: its rank is taken" in adapter.notes[0]
    network = random_network()
    merge(network, [(adapter, 1.0)])
    assert distance(output(network), output(load_diffusers_of(model, tmp_path))) < 1e-6


def test_alpha_of_diffusers_header_and_of_kohyas_tensors_counts(tmp_path: Path) -> None:
    model, _ = script_adapter(tmp_path, r=4)
    plain = {key: value.contiguous() for key, value in get_peft_model_state_dict(model).items()}
    noted = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})}
    save_file(plain, tmp_path / "noted.safetensors", metadata=noted)
    tensors = {kohya(key): value for key, value in plain.items()}
    tensors |= {f"{key.partition('.lora_down')[0]}.alpha": torch.tensor(8.0) for key in tensors if "lora_down" in key}
    save_file(tensors, tmp_path / "kohya.safetensors")
    for name in ("noted", "kohya"):
        adapter = read_adapter(tmp_path / f"{name}.safetensors", CONFIG)
        assert {layer.scale for layer in adapter.layers.values()} == {2.0} and not adapter.notes


def broken(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    written(folder, SHAPES["lora"])
    weights = load_file(folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    change(weights, settings)
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


QUERY = "base_model.model.transformer_blocks.0.attn1.to_q"
BREAKS: dict[str, tuple[Callable[[dict, dict], Any], str]] = {
    "half": (lambda w, s: w.pop(f"{QUERY}.lora_B.weight"), "is damaged: blocks.0.attention.query has no lora_B"),
    "rank": (lambda w, s: s.update(r=8), "has rank 3, but the settings beside it say 8"),
    "shape": (
        lambda w, s: w.update({f"{QUERY}.lora_B.weight": torch.ones(16, 2)}),
        r"damaged: of transformer_blocks.0.attn1.to_q lora_A is \(3, 16\) and lora_B \(16, 2\)",
    ),
    "layer": (
        lambda w, s: w.update({"base_model.model.down_blocks.0.to_q.lora_A.weight": torch.ones(3, 16)}),
        "is an adapter of another model: 1 of its layers, such as 'down_blocks.0.to_q', are none of this PixArt",
    ),
    "nan": (lambda w, s: w[f"{QUERY}.lora_A.weight"].fill_(torch.nan), "48 of the 48 numbers of .* are not finite"),
    "bias": (
        lambda w, s: w.update({f"{QUERY}.lora_B.bias": torch.ones(16)}),
        r"to_q.lora_B.bias' is no low-rank change of a layer",
    ),
    "kind": (lambda w, s: s.update(peft_type="LOHA"), "peft's kind LOHA, but LoRA alone"),
    "alpha": (
        lambda w, s: s.update(lora_alpha=float("nan")),
        "settings say lora_alpha = nan, which is no finite number",
    ),
    "word": (lambda w, s: s.update(lora_alpha="five"), "settings say lora_alpha = 'five', which is no finite number"),
    "list": (
        lambda w, s: s.update(rank_pattern=["to_q"]),
        r"rank_pattern is \['to_q'\], not an object of patterns and",
    ),
    "regex": (lambda w, s: s.update(alpha_pattern={"(": 2}), r"alpha_pattern has '\(', which is no pattern"),
    "lengths": (
        lambda w, s: s.update(use_dora=True),
        "damaged: its settings say use_dora, but .* has no lora_magnitude",
    ),
    "none": (
        lambda w, s: w.update(
            {f"{QUERY}.lora_A.weight": torch.ones(0, 16), f"{QUERY}.lora_B.weight": torch.ones(16, 0)}
        ),
        r"damaged: of transformer_blocks.0.attn1.to_q lora_A is \(0, 16\) and lora_B \(16, 0\)",
    ),
    "alphas": (lambda w, s: w.update({f"{QUERY}.alpha": torch.ones(2)}), r"to_q alpha is \(2,\), and not one number"),
    "twice": (
        lambda w, s: w.update({"unet.transformer_blocks.0.attn1.to_q.lora_down.weight": torch.ones(3, 16)}),
        "has lora_A of transformer_blocks.0.attn1.to_q twice, one of them as",
    ),
    "int8": (lambda w, s: w.update({f"{QUERY}.lora_A.weight": torch.ones(3, 16).char()}), "is int8: .* quantised"),
    "start": (lambda w, s: s.update(init_lora_weights="pissa_niter_4"), "'pissa_niter_4', which changes the weights"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_cannot_be_merged_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    change, message = BREAKS[name]
    with pytest.raises(UserError, match=message) as refused:
        read_adapter(broken(tmp_path / "adapter", change), CONFIG)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_adapters_of_other_widths_and_files_of_other_things_are_refused(tmp_path: Path) -> None:
    wide = PixArtConfig(num_layers=2, num_heads=4, head_dim=8, caption_channels=8, sample_size=4)
    adapter = read_adapter(written(tmp_path / "adapter", SHAPES["lora"]), wide)
    with pytest.raises(
        UserError, match=r"another model: its change of .* is of 256 to 16 .* the model's layer is of 256"
    ):
        require_fit(adapter, random_network(config=wide))
    save_diffusers(random_network(), tmp_path / "model")
    with pytest.raises(UserError, match=r"is no adapter: it holds no lora_A and lora_B, but .* name whole weights as"):
        read_adapter(tmp_path / "model" / "diffusion_pytorch_model.safetensors", CONFIG)
    with pytest.raises(MissingFileError, match=r"is no adapter: the folder holds none of adapter_model.safetensors"):
        read_adapter(tmp_path / "model", CONFIG)
    with pytest.raises(MissingFileError, match="adapter nowhere does not exist"):
        read_adapter(Path("nowhere"), CONFIG)
    cut = tmp_path / "adapter" / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-7])
    with pytest.raises(UserError, match="cannot be read, it may have been cut short"):
        read_adapter(tmp_path / "adapter", CONFIG)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("blocks.*.modulation", "means blocks.0.modulation, a AdaLNSingle: adapters go on linear layers alone"),
        ("blocks.*.attn", "fits none of the 27 layers, such as .*; words are attention, cross_attention, mlp, embedd"),
    ],
)
def test_targets_that_mean_no_layer_are_refused(target: str, message: str) -> None:
    shape = AdapterShape(rank=2, alpha=2.0, targets=("mlp", target))
    with pytest.raises(UserError, match=rf"training\.x\.lora\.targets: '.*' {message}"):
        add_adapters(random_network(), shape, key=KEY)


def test_targets_are_named_as_peft_names_them_on_diffusers_transformer() -> None:
    typed = ("to_q", "attn2.to_out.0", "ff.net.0.proj", "transformer_blocks.1.attn1.to_k", "*.attn2.to_v", "proj_out")
    network = random_network()
    add_adapters(network, AdapterShape(rank=2, alpha=2.0, targets=typed), key=KEY)
    blocks = {
        f"blocks.{block}.{layer}"
        for block in (0, 1)
        for layer in ("attention.query", "cross_attention.query", "cross_attention.out", "mlp.hidden")
    }
    values = {f"blocks.{block}.cross_attention.value" for block in (0, 1)}
    names = {name.partition(".lora_")[0] for name in trained(network)}
    assert names == blocks | values | {"blocks.1.attention.key", "final"}


def test_dora_is_refused_on_rows_of_zeros() -> None:
    with pytest.raises(UserError, match=r"training\.x\.lora\.dora .* final has rows of zeros"):
        add_adapters(PixArt(CONFIG), SHAPES["dora"], key=KEY)


def test_all_words_mean_all_linear_layers() -> None:
    linear = [n for n, layer in PixArt(CONFIG).named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    assert sorted(layer_names(CONFIG).values()) == sorted(linear)
    names = {name.partition(".lora_")[0] for name in trained(with_adapters(SHAPES["lora"]))}
    assert names == set(linear)
