"""Control maps: edges and depth of images as published networks and OpenCV draw them, white on black."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_depth import save_depth_model
from torch.nn import functional

from encoders.canny import CannyMaps, CannySettings
from encoders.control_kinds import MAP_CLASSES, describe_other_maps, open_control_maps
from encoders.depth import DepthMaps, DepthSettings
from encoders.hed import HedMaps, HedSettings
from encoders.hed_network import hed_of
from errors import MissingFileError, UserError

CPU = torch.device("cpu")
# Width in and out of the convolutions of each block, as the published file has them.
PUBLISHED_BLOCKS = (
    ((3, 64), (64, 64)),
    ((64, 128), (128, 128)),
    ((128, 256), (256, 256), (256, 256)),
    ((256, 512), (512, 512), (512, 512)),
    ((512, 512), (512, 512), (512, 512)),
)


def hed_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names of the published file, of the size at which edges are neither black nor white."""
    generator = torch.Generator().manual_seed(seed)
    weights = {"norm": torch.full((1, 3, 1, 1), 117.0)}
    for block, layers in enumerate(PUBLISHED_BLOCKS, start=1):
        for layer, (num_in, num_out) in enumerate(layers):
            scale = (2 / (9 * num_in)) ** 0.5
            kernel = scale * torch.randn(num_out, num_in, 3, 3, generator=generator)
            weights[f"block{block}.convs.{layer}.weight"] = kernel
            weights[f"block{block}.convs.{layer}.bias"] = 0.1 * torch.randn(num_out, generator=generator)
        width = layers[-1][1]
        projection = torch.randn(1, width, 1, 1, generator=generator)
        weights[f"block{block}.projection.weight"] = 0.05 * projection / width**0.5
        weights[f"block{block}.projection.bias"] = 0.1 * torch.randn(1, generator=generator)
    return weights


def published_hed(weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The network as its paper and ControlNet's annotator tell it, by functions alone: [B, 3, H, W] to [B, H, W]."""
    x, scales = images.float() - weights["norm"], []
    for block, layers in enumerate(PUBLISHED_BLOCKS, start=1):
        if block > 1:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(4, 5))
        for layer in range(len(layers)):
            name = f"block{block}.convs.{layer}"
            x = functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1).clamp(min=0)
        projection = (x * weights[f"block{block}.projection.weight"].view(1, -1, 1, 1)).sum(1, keepdim=True)
        scales.append(projection + weights[f"block{block}.projection.bias"])
    size = images.shape[2:]
    logits = [functional.interpolate(scale, size, mode="bilinear", antialias=True) for scale in scales]
    return 1 / (1 + torch.exp(-torch.cat(logits, 1).mean(1)))


def picture(seed: int, *, height: int = 48, width: int = 40) -> np.ndarray:
    coarse = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    smooth = functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return (255 * smooth).to(torch.uint8).permute(1, 2, 0).numpy()


def square(inside: tuple[int, int, int], outside: tuple[int, int, int]) -> np.ndarray:
    image = np.empty((64, 64, 3), np.uint8)
    image[:] = outside
    image[20:40, 16:48] = inside
    return image


def test_canny_draws_a_line_around_a_shape_also_where_colours_are_equally_bright() -> None:
    red, teal = (200, 30, 30), (20, 107, 97)
    assert abs(np.dot(np.subtract(red, teal), (0.299, 0.587, 0.114))) < 1.5
    edges = CannyMaps(CannySettings()).draw(square(red, teal))
    assert edges.dtype == np.uint8 and edges.shape == (64, 64, 3)
    assert np.array_equal(edges[..., 0], edges[..., 1]) and np.array_equal(edges[..., 0], edges[..., 2])
    assert set(np.unique(edges)) == {0, 255}
    rows, columns = np.nonzero(edges[..., 0])
    # Nothing far from the outline, and in every row and column of the shape its two sides.
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (19, 39, 15, 47)
    assert all(np.count_nonzero(edges[row, :, 0]) == 2 for row in range(23, 38))
    assert all(np.count_nonzero(edges[:, column, 0]) == 2 for column in range(19, 46))


def test_canny_has_controlnets_thresholds_and_widens_lines_if_asked() -> None:
    faint = square((120, 120, 120), (100, 100, 100))  # a gradient of 80
    assert not CannyMaps(CannySettings()).draw(faint).any()
    assert CannyMaps(CannySettings(low_threshold=20, high_threshold=60)).draw(faint).any()
    image = square((255, 255, 255), (0, 0, 0))
    thin, wide = (CannyMaps(CannySettings(widen_pixels=pixels)).draw(image)[..., 0] for pixels in (0, 1))
    assert np.count_nonzero(thin[30]) == 2 and np.count_nonzero(wide[30]) == 6
    assert wide[thin > 0].all()


def test_hed_is_the_published_network_for_its_own_names_of_weights() -> None:
    weights = hed_weights()
    images = torch.from_numpy(np.stack([picture(seed, height=50, width=37) for seed in range(2)])).permute(0, 3, 1, 2)
    network = hed_of(weights, origin="x.pth")
    assert list(network.state_dict()) == list(weights)
    assert sum(value.numel() for value in weights.values()) == 14_716_168  # about 29 MB in the published float16
    with torch.inference_mode():
        ours, theirs = network(images.float()), published_hed(weights, images)
    assert theirs.std() > 0.1 and 0.2 < theirs.mean() < 0.8
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("is_half", [False, True])
def test_hed_is_drawn_of_an_image_as_of_a_batch_from_a_file(tmp_path: Path, is_half: bool) -> None:
    path, weights = tmp_path / "hed.pth", hed_weights()
    torch.save({name: value.half() if is_half else value for name, value in weights.items()}, path)
    maps = open_control_maps("hed", {"model": str(path), "revision": None}, device=CPU)
    assert isinstance(maps, HedMaps)
    images = [picture(seed) for seed in range(3)]
    drawn = [maps.draw(image) for image in images]
    batch = maps.draw_batch(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    for image, one, other in zip(images, drawn, batch, strict=True):
        assert one.dtype == np.uint8 and one.shape == image.shape and one.std() > 5
        assert np.abs(one.astype(int) - other.numpy()).max() <= 1
        expected = 255 * published_hed(weights, torch.from_numpy(image).permute(2, 0, 1)[None])[0].numpy()
        assert np.abs(one[..., 1] - expected).max() < (4.0 if is_half else 0.51)


def test_hed_refuses_weights_of_another_network_by_key_and_shape(tmp_path: Path) -> None:
    weights = hed_weights()
    del weights["norm"]
    weights["block2.convs.0.weight"] = weights["block2.convs.0.weight"][:, :3].clone()
    weights["classifier.bias"] = torch.zeros(10)
    path = tmp_path / "vgg.pth"
    torch.save(weights, path)
    with pytest.raises(UserError) as caught:
        HedMaps.require(HedSettings(model=str(path)), key="families.control-hed")
    said = str(caught.value)
    assert said.startswith(f"families.control-hed.model {path} is not ControlNet's HED: ")
    assert "norm is missing, not [1, 3, 1, 1]" in said
    assert "block2.convs.0.weight is [128, 3, 3, 3], not [128, 64, 3, 3]" in said
    assert "classifier.bias is [10], not missing" in said and "\n" not in said


class Program:
    def __reduce__(self):
        return (print, ("run",))


def test_hed_runs_no_code_of_a_file_and_names_damaged_ones(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, settings = tmp_path / "hed.pth", HedSettings(model=str(tmp_path / "hed.pth"))
    torch.save({"norm": Program()}, path)
    with pytest.raises(UserError, match=r"x\.model .*hed\.pth is no file of weights alone"):
        HedMaps.require(settings, key="x")
    assert "run" not in capsys.readouterr().out
    torch.save(hed_weights(), path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(UserError, match="has been cut short"):
        HedMaps.require(settings, key="x")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"x\.model .*hed\.pth "):
        HedMaps.require(settings, key="x")
    torch.save([torch.zeros(3)], path)
    with pytest.raises(UserError, match="no file of weights by name"):
        HedMaps.require(settings, key="x")
    torch.save(hed_weights() | {"norm": torch.full((1, 3, 1, 1), torch.nan)}, path)
    with pytest.raises(UserError, match=r"weights that are not finite \(norm\)"):
        HedMaps.require(settings, key="x")


def test_a_model_that_is_not_here_is_named_with_the_line_that_fetches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("encoders.weights.hub_silence", lambda: "it is off")
    with pytest.raises(MissingFileError, match=r"k\.model: .*`hf download lllyasviel/Annotators ControlNetHED.pth`"):
        HedMaps.require(HedSettings(), key="k")
    assert HedMaps.identity(HedSettings(), key="k") == "lllyasviel/Annotators/ControlNetHED.pth@main"
    with pytest.raises(MissingFileError, match=r"k\.model: \./no\.pth does not exist"):
        HedMaps.identity(HedSettings(model="./no.pth"), key="k")
    with pytest.raises(UserError, match=r"k\.model.*`hf download depth-anything/Depth-Anything-V2-Small-hf`"):
        DepthMaps.require(DepthSettings(), key="k")
    with pytest.raises(MissingFileError, match=r"k\.model: model folder \./no does not exist"):
        DepthMaps.identity(DepthSettings(model="./no"), key="k")


def test_what_tells_a_model_is_its_bytes_and_not_its_place(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("c", 1)):
        torch.save(hed_weights(seed), tmp_path / f"{name}.pth")
        save_depth_model(tmp_path / name, seed=seed)
    shutil.copy(tmp_path / "a.pth", tmp_path / "b.pth")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for maps, settings, end in ((HedMaps, HedSettings, ".pth"), (DepthMaps, DepthSettings, "")):
        a, b, c = (maps.identity(settings(model=str(tmp_path / f"{name}{end}")), key="k") for name in "abc")
        assert a is not None and a.startswith("sha256:") and a == b != c


def test_depth_is_near_in_white_and_each_image_fills_the_range(tmp_path: Path) -> None:
    folder = save_depth_model(tmp_path / "depth")
    maps = open_control_maps("depth", {"model": str(folder)}, device=CPU)
    assert isinstance(maps, DepthMaps)
    image = picture(3, height=60, width=96)
    near = maps.draw(image)
    assert near.shape == image.shape and (near.min(), near.max()) == (0, 255)
    expected = nearness_by_hand(folder, image)
    assert np.abs(near[..., 0] - expected).max() < 1.01
    # A metric model of the same weights gives distances.
    save_depth_model(folder, depth_estimation_type="metric")
    far = open_control_maps("depth", {"model": str(folder)}, device=CPU).draw(image)
    assert np.corrcoef(near[..., 0].ravel(), far[..., 0].ravel())[0, 1] < -0.5


def nearness_by_hand(folder: Path, image: np.ndarray) -> np.ndarray:
    """Depth Anything's own preparation of an image, by Pillow and numpy alone, and its normalisation."""
    from PIL import Image
    from transformers import DepthAnythingForDepthEstimation

    height, width = image.shape[:2]
    scale = 70 / height if abs(1 - 70 / height) <= abs(1 - 70 / width) else 70 / width
    size = [14 * round(side * scale / 14) for side in (width, height)]
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) / 255
    pixels = (resized - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    model = DepthAnythingForDepthEstimation.from_pretrained(folder).eval()
    with torch.inference_mode():
        depth = model(torch.from_numpy(pixels).permute(2, 0, 1)[None].float()).predicted_depth
        depth = functional.interpolate(depth[None], (height, width), mode="bicubic")[0, 0]
    return (255 * (depth - depth.min()) / (depth.max() - depth.min())).numpy()


def test_depth_of_one_value_is_black_and_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    folder = save_depth_model(tmp_path / "depth", is_flat=True)
    assert not open_control_maps("depth", {"model": str(folder)}, device=CPU).draw(picture(0)).any()
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "depth_anything"', '"model_type": "clip"'))
    with pytest.raises(UserError, match=r"k\.model .* is a clip, not one of depth_anything, dpt"):
        DepthMaps.require(DepthSettings(model=str(folder)), key="k")


def test_kinds_and_settings_are_those_that_there_are() -> None:
    assert [maps.kind for maps in MAP_CLASSES] == ["canny", "hed", "depth"]
    with pytest.raises(UserError, match="kind 'pose' are not drawn here; there are canny, hed, depth"):
        open_control_maps("pose", {}, device=CPU)
    with pytest.raises(UserError, match=r"control\.low_threshold = 0: .*greater than or equal to 1"):
        open_control_maps("canny", {"low_threshold": 0}, device=CPU)
    with pytest.raises(UserError, match="low_threshold 300 is above high_threshold 200"):
        open_control_maps("canny", {"low_threshold": 300}, device=CPU)
    with pytest.raises(UserError, match=r"control\.width = 3: Extra inputs"):
        open_control_maps("canny", {"width": 3}, device=CPU)


@pytest.mark.parametrize(
    ("trained", "used", "said"),
    [
        ({"identity": "sha256:1"}, {"identity": "sha256:1", "settings": {"model": "elsewhere.pth"}}, None),
        ({"identity": None}, {"identity": "sha256:1"}, None),
        (
            {"identity": f"sha256:{'1' * 64}", "settings": {"model": "a.pth"}},
            {"identity": "org/name/b.pth@main"},
            f"was trained with hed maps drawn by a.pth (sha256:{'1' * 12}), and these are drawn by org/name/b.pth@main",
        ),
        ({"kind": "given"}, {"kind": "given", "settings": {"images": "maps"}}, None),
        ({"kind": "given"}, {}, "was trained with given maps, and these are hed maps"),
    ],
)
def test_maps_are_the_same_by_kind_settings_and_weights(
    trained: dict[str, Any], used: dict[str, Any], said: str | None
) -> None:
    assert describe_other_maps({"kind": "hed"} | trained, {"kind": "hed"} | used) == said
