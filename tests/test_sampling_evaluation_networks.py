"""Feature networks: Inception's layout and its odd pools, antialiased resizing, names that promise no more."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import save_clip
from tiny_models import save_llava
from torch.nn import functional
from transformers import CLIPModel, CLIPProcessor

from encoders import inception
from encoders.inception import BlockA, BlockE, InceptionV3
from errors import UserError
from sampling.evaluation.config import EvaluationConfig
from sampling.evaluation.networks import find_networks, load_network


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in the published layout: classifier included, batch counters missing."""
    torch.manual_seed(0)
    weights = {name: value for name, value in InceptionV3().state_dict().items() if "num_batches" not in name}
    weights |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


def source_of(**networks):
    (source,) = find_networks(EvaluationConfig(**networks))
    return source


def test_inception_has_the_published_layout():
    network = InceptionV3()
    # torchvision's Inception-v3 without auxiliary head and classifier
    assert sum(parameter.numel() for parameter in network.parameters()) == 21_785_568
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert sum(name.endswith("conv.weight") for name in shapes) == 94
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_5b.branch_pool.conv.weight"] == (32, 192, 1, 1)
    assert shapes["Mixed_6a.branch3x3dbl_3.bn.running_var"] == (96,)
    assert shapes["Mixed_6c.branch7x7dbl_2.conv.weight"] == (160, 160, 7, 1)
    assert shapes["Mixed_7a.branch7x7x3_4.conv.weight"] == (192, 192, 3, 3)
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)


def test_inceptions_pools_are_tensorflows():
    torch.manual_seed(0)
    x = torch.rand(1, 192, 5, 5) + 1
    block = BlockA(192, 32).eval()
    # The corner's mean is over the four pixels inside the image, not over nine.
    corner = x[:, :, :2, :2].mean(dim=(2, 3), keepdim=True)
    expected = block.branch_pool(corner)
    torch.testing.assert_close(block(x)[:, -32:, :1, :1], expected)
    x = torch.rand(1, 1280, 4, 4)
    for is_last, corner in ((False, x[:, :, :2, :2].mean(dim=(2, 3))), (True, x[:, :, :2, :2].amax(dim=(2, 3)))):
        block = BlockE(1280, is_last=is_last).eval()
        torch.testing.assert_close(block(x)[:, -192:, 0, 0], block.branch_pool(corner[:, :, None, None])[:, :, 0, 0])


def test_inception_weights_load_and_see(inception_file):
    source = source_of(inception=str(inception_file))
    # Random weights are not the ones that FID is defined by.
    assert (source.key, source.distance) == ("inception", "FD-Inception")
    network = load_network(source, device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    features = network.features(torch.from_numpy(network.prepare(image))[None])
    assert features.shape == (1, 2048) and features.isfinite().all() and features.std() > 0


def test_only_the_published_file_gives_fid(inception_file, monkeypatch):
    from pipelines.store.files import sha256_file

    monkeypatch.setattr(inception, "PUBLISHED_SHA256", sha256_file(inception_file)[:8])
    assert source_of(inception=str(inception_file)).distance == "FID"


def test_other_weights_are_refused(inception_file, tmp_path):
    weights = torch.load(inception_file, weights_only=True)
    weights["Mixed_7c.branch_pool.conv.weight"] = torch.zeros(2, 2)
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"1 weights differ .*Mixed_7c\.branch_pool\.conv\.weight"):
        load_network(source_of(inception=str(tmp_path / "other.pth")), device="cpu")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match=r"evaluation\.inception .*text\.pth"):
        load_network(source_of(inception=str(tmp_path / "text.pth")), device="cpu")


def test_inceptions_resizing_has_antialiasing_and_does_not_round(inception_file):
    network = load_network(source_of(inception=str(inception_file)), device="cpu")
    stripes = np.zeros((897, 897, 3), dtype=np.uint8)
    stripes[:, ::3] = 255
    shrunk = network.prepare(Image.fromarray(stripes))  # three columns to one
    assert shrunk.shape == (3, 299, 299) and shrunk.dtype == np.float32
    # Without antialiasing a column would be black or white; with it, a third of white, and no whole number.
    assert np.abs(shrunk[:, :, 5:-5] - 85).max() < 2
    assert not np.allclose(shrunk, shrunk.round())
    # PyTorch's antialiased bicubic is another implementation of the same filter.
    picture = np.random.default_rng(0).integers(0, 256, (500, 640, 3), dtype=np.uint8)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    expected = functional.interpolate(tensor, (299, 299), mode="bicubic", antialias=True, align_corners=False)[0]
    assert np.abs(network.prepare(Image.fromarray(picture)) - expected.numpy()).max() < 0.01


def test_clip_is_what_transformers_computes(tmp_path):
    folder = save_clip(tmp_path / "clip")
    source = source_of(clip=str(folder))
    assert (source.distance, source.mmd) == ("CLIP-FD", "CLIP-MMD")  # CMMD is defined with ViT-L/14 at 336 pixels
    assert source.resizer == "PIL bicubic with antialiasing to shortest side 16, centre crop 16x16"
    network = load_network(source, device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    text = "a red star"
    features = network.features(torch.from_numpy(network.prepare(image))[None])
    cosine = float((features * network.text_features([text])).sum())
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder, use_fast=False)
    with torch.inference_mode():
        expected = model(**processor(text=[text], images=image, return_tensors="pt"))
    scale = model.logit_scale.exp().item()
    assert cosine == pytest.approx(expected.logits_per_image.item() / scale, abs=1e-5)
    assert float(features.norm()) == pytest.approx(1)


def test_cmmd_is_called_so_only_with_its_own_clip(tmp_path):
    folder = save_clip(tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= {"hidden_size": 1024, "patch_size": 14, "image_size": 336}
    (folder / "config.json").write_text(json.dumps(config))
    assert source_of(clip=str(folder)).mmd == "CMMD"


def test_a_llavas_tower_is_seen_through_the_layer_it_reads(tmp_path):
    source = source_of(vision=str(save_llava(tmp_path / "llava")))
    assert source.distance == "FD-LLaVA"
    network = load_network(source, device="cpu")
    images = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    features = network.features(torch.stack([torch.from_numpy(network.prepare(image)) for image in images]))
    assert features.shape == (2, 16)
    assert not torch.allclose(features[0], features[1])


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        ({"inception": "no/inception.pth"}, r"evaluation\.inception no/inception\.pth does not exist: fetch"),
        ({"clip": "nobody/clip"}, r"evaluation\.clip = 'nobody/clip' .*hf download nobody/clip"),
        ({"vision": "nobody/dino"}, r"evaluation\.vision = 'nobody/dino' .*hf download nobody/dino"),
        ({"clip": "./no/such/folder"}, r"model folder \./no/such/folder does not exist"),
        ({"clip": "toyworld/weights/llava"}, "is a llava, not a CLIP"),
        ({"vision": "toyworld/weights/judge"}, r"evaluation\.vision .*has no config\.json"),
    ],
)
def test_a_missing_network_names_key_and_way_out(networks, message):
    with pytest.raises(UserError, match=message):
        find_networks(EvaluationConfig(**networks))
