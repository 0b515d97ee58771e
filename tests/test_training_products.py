"""`training.products = "fp8"`: what is converted, its numbers on a CPU, and what is refused."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torchao.float8.float8_linear import Float8Linear
from training_run import make_run, metrics, train

from errors import UserError
from pixart.convert import load_diffusers
from pixart.model import PixArt, PixArtConfig
from training.config import StageTraining
from training.loop.memory import keep_activations
from training.loop.products import choose_products, require_products, use_fp8

CPU = torch.device("cpu")
CONFIG = PixArtConfig(num_layers=2, num_heads=2, head_dim=16, caption_channels=24, sample_size=8)


def network(config=CONFIG) -> PixArt:
    torch.manual_seed(0)
    built = PixArt(config)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5)
    return built.to(torch.bfloat16)


def gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(3, 4, 8, 8, generator=generator).bfloat16()
    text = torch.randn(3, 5, 24, generator=generator).bfloat16()
    times = torch.tensor([3, 500, 900])
    output = model(latents, times, text, torch.ones(3, 5, dtype=torch.bool))
    output.float().square().mean().backward()
    return output.detach().float(), {name: weight.grad.float() for name, weight in model.named_parameters()}


def error(value, reference) -> float:
    return float((value - reference).norm() / reference.norm())


def test_every_layer_that_reads_image_tokens_multiplies_in_fp8_and_no_other():
    model = network()
    use_fp8(model, device=CPU)
    converted = [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]
    layers = ["attention.query", "attention.key", "attention.value", "attention.out"]
    layers += ["cross_attention.query", "cross_attention.out", "mlp.hidden", "mlp.out"]
    assert converted == [f"blocks.{block}.{layer}" for block in range(2) for layer in layers]
    called = []
    for name in converted:
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output, name=name: called.append(name))
    gradients(model)
    # A network that reads their weights past the layers would multiply in bf16, and nobody would know.
    assert sorted(called) == sorted(converted)


def test_numbers_are_those_of_bf16_within_8_bits():
    plain = network()
    fp8 = copy.deepcopy(plain)
    use_fp8(fp8, device=CPU)
    expected, expected_gradients = gradients(plain)
    found, found_gradients = gradients(fp8)
    assert 1e-3 < error(found, expected) < 0.06
    for name, gradient in expected_gradients.items():
        if name.endswith("attention.key.bias"):  # 0 but for rounding: a softmax does not see it
            continue
        assert error(found_gradients[name], gradient) < 0.2, name


def test_weights_and_their_names_stay_as_they_are():
    plain = network()
    weights = dict(plain.named_parameters())
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    choose_products(plain, StageTraining(network="pixart", products="fp8"), device=CPU)
    assert all(weight is weights[name] for name, weight in plain.named_parameters())
    assert list(plain.state_dict()) == list(state)
    PixArt(CONFIG).load_state_dict(plain.state_dict())
    untouched = network()
    choose_products(untouched, StageTraining(network="pixart"), device=CPU)
    assert not any(isinstance(module, Float8Linear) for module in untouched.modules())


@pytest.mark.parametrize("kept", ["products", "inputs"])
def test_blocks_that_keep_less_have_the_same_gradients(kept):
    all_kept, less_kept = network(), network()
    for model in (all_kept, less_kept):
        use_fp8(model, device=CPU)
    keep_activations(less_kept, kept)
    expected, found = gradients(all_kept)[1], gradients(less_kept)[1]
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"'fp8' needs training\.dtype = 'bf16', and it is 'fp32'"):
        require_products(StageTraining(network="pixart", products="fp8", dtype="fp32"))
    with pytest.raises(UserError, match=r"does not go with training\.zero_stage = 3"):
        require_products(StageTraining(network="pixart", products="fp8", zero_stage=3))
    require_products(StageTraining(network="pixart", dtype="fp32", zero_stage=3))
    with pytest.raises(UserError, match=r"multiples of 16, and blocks\.0\.attention\.query has 24"):
        use_fp8(network(PixArtConfig(num_layers=1, num_heads=2, head_dim=12, caption_channels=24)), device=CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match=r"capability 8\.9 or more, and NVIDIA A100 has 8\.0"):
        use_fp8(network(), device=torch.device("cuda"))


@pytest.mark.slow
def test_two_ranks_train_resume_exactly_and_export_plain_weights(tmp_path):
    """By emulation; ZeRO 2 with bf16 weights and fp32 masters, as on GPUs."""
    straight, resumed, plain = (make_run(tmp_path / name) for name in ("straight", "resumed", "plain"))
    settings = {"starts_from": "scratch", "dtype": "bf16", "zero_stage": 2, "log_every": 1}
    for run, products, num_steps in (
        (straight, "fp8", 6),
        (resumed, "fp8", 3),
        (resumed, "fp8", 6),
        (plain, "dtype", 6),
    ):
        train(run, 2, products=products, num_steps=num_steps, **settings)
    losses = [[line["loss"] for line in metrics(run, 2)] for run in (straight, resumed, plain)]
    assert len(losses[0]) == 6 and losses[1] == losses[0]
    assert losses[0] != losses[2] and losses[0] == pytest.approx(losses[2], rel=0.02)
    folders = [run / "training" / "stage2" / "step-6" / "model" for run in (straight, resumed, plain)]
    assert len({(folder / "config.json").read_bytes() for folder in folders}) == 1
    weights = [load_file(folder / "diffusion_pytorch_model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert {name: value.dtype for name, value in weights[0].items()} == dict.fromkeys(weights[2], torch.float32)
    assert isinstance(load_diffusers(folders[0]), PixArt)
