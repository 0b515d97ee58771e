"""Control maps as families: drawn of the crops that latents are made of, or given, and read beside them by key."""

import json
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from family_run import SHARDS, batches_of, features_of, inputs_of, pixels_of, write_family_run
from feature_run import encoded, extract
from PIL import Image
from test_encoders_control_maps import hed_weights, published_hed
from tiny_depth import save_depth_model

from encoders.depth import DepthMaps
from encoders.hed import HedMaps
from encoders.opening import open_codec
from errors import MissingFileError, UserError
from features.control import DRAWN_MAPS
from features.control_given import GIVEN_MAPS, MISSING, OTHER_SHAPE, require_shape
from features.families import wanted_families
from features.jobs import FeatureJob
from features.plan import plan_families
from pipelines.raw.images import SampleReject, resize_and_crop
from pipelines.store.families import schema_of
from pipelines.store.feature_store import load_index
from pipelines.store.manifest import ShardDirectory, read_manifest
from pipelines.store.verify.run import verify_run
from tests.conftest import REPOSITORY
from tests.raw_shards import write_tar

CANNY = "features.stage3.families={control-canny = {low_threshold = 20, high_threshold = 40}}"
# With one image at a time, what is encoded by hand has the same bytes.
ONE_BY_ONE = "features.vae_batch_size=1"
GEOMETRY = (
    *("key", "bucket", "channels", "height", "width", "original_width", "original_height"),
    *("resized_width", "resized_height", "crop_x", "crop_y", "label", "reject"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 12 images in three aspect buckets, one of them broken, with text, latents and Canny's edges."""
    run = write_family_run(tmp_path_factory.mktemp("control"))
    extract(run, CANNY, ONE_BY_ONE, stage=3)
    return run


@pytest.fixture
def other(run: Path, tmp_path: Path) -> Path:
    """The same run once more, of which a test may do as it likes."""
    shutil.copytree(run, tmp_path / "run")
    shutil.copy(run.parent / "recipe.toml", tmp_path)
    return tmp_path / "run"


def job_of(run: Path, name: str, *overrides: str) -> FeatureJob:
    inputs = inputs_of(run, *overrides)
    return next(family.job(inputs) for family in wanted_families(inputs) if family.name == name)


def stored(directory: Path) -> dict[str, dict[str, np.ndarray]]:
    """Tensors of a directory by key."""
    family = schema_of(read_manifest(directory))
    assert family is not None
    rows = {}
    for shard in SHARDS:
        tar = np.fromfile(directory / f"{shard}.tar", np.uint8)
        for row in load_index(directory, [shard]).to_pylist():
            if row["reject"] is None:
                rows[row["key"]] = family.read(tar, [row])
    return rows


def cropped(key: str, bucket: str) -> np.ndarray:
    height, width = map(int, bucket.split("x"))
    image, _ = resize_and_crop(pixels_of(key), width, height, max_pixels=10**6)
    return np.array(image)


def encode(run: Path, pictures: Sequence[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
    """Mean and deviation of each picture's latent, fp16, encoded by itself."""
    codec = open_codec(str(run.parent / "vae"))
    latents = []
    for pixels in pictures:
        moments = codec.encode(torch.from_numpy(pixels[None]).permute(0, 3, 1, 2))
        latents.append(tuple(moment[0].half().numpy() for moment in moments if moment is not None))
    return latents


def test_every_row_has_the_geometry_of_its_latents_in_every_bucket(run: Path) -> None:
    maps, latents = (load_index(run / "features" / name, SHARDS) for name in ("control-canny-48", "latent-48"))
    assert maps.select(GEOMETRY).equals(latents.select(GEOMETRY))
    assert len(set(maps.column("bucket").to_pylist()) - {None}) == 3
    assert maps.column("crop_x").to_pylist().count(0) < len(maps)
    kept, of_latents = (read_manifest(run / "features" / name) for name in ("control-canny-48", "latent-48"))
    assert (kept.num_kept, kept.rejected) == (23, {"not_an_image": 1}) == (of_latents.num_kept, of_latents.rejected)
    assert kept.extra["vae"] == of_latents.extra["vae"] and kept.extra["buckets"] == of_latents.extra["buckets"]
    settings = {"low_threshold": 20, "high_threshold": 40, "widen_pixels": 0}
    assert kept.extra["control"] == {"kind": "canny", "settings": settings, "identity": None}
    assert kept.extra["settings"] == settings
    assert verify_run(run).problems == []


def test_batches_of_training_hold_the_bytes_of_each_keys_own_map(run: Path) -> None:
    rows = {row["key"]: row for row in load_index(run / "features" / "control-canny-48", SHARDS).to_pylist()}
    seen = set()
    for batch in batches_of(run, CANNY):
        assert batch.tensors.keys() == {"control-canny.mean", "control-canny.std"}
        edges = [cv2.Canny(cropped(key, rows[key]["bucket"]), 20, 40) for key in batch.keys]
        assert all(map(np.any, edges))
        by_hand = encode(run, [np.repeat(lines[..., None], 3, axis=2) for lines in edges])
        for number, name in enumerate(("mean", "std")):
            expected = np.stack([latent[number] for latent in by_hand])
            assert batch.tensors[f"control-canny.{name}"].numpy().tobytes() == expected.tobytes()
        seen |= set(batch.keys)
    assert len(seen) > 15


def test_the_preview_shows_image_map_and_what_the_vae_makes_of_it(run: Path) -> None:
    preview = np.array(Image.open(run / "features" / "control-canny-48" / "preview-stage3.png"))
    leading = np.array(Image.open(run / "features" / "latent-48" / "preview-stage3.png"))
    rows = load_index(run / "features" / "latent-48", SHARDS).to_pylist()[:3]
    x = gap = 4
    cell = max(int(row["bucket"].split("x")[0]) for row in rows) + gap
    assert (preview.shape[0], leading.shape[0]) == (3 * cell + gap, 2 * cell + gap)
    for row in rows:
        image = cropped(row["key"], row["bucket"])
        height, width = image.shape[:2]
        edges = np.repeat(cv2.Canny(image, 20, 40)[..., None], 3, axis=2)
        for y, expected in ((gap, image), (gap + cell, edges)):
            assert np.array_equal(preview[y : y + height, x : x + width], expected)
        assert np.array_equal(leading[gap : gap + height, x : x + width], image)
        x += max(int(each["bucket"].split("x")[1]) for each in rows) + gap


def test_other_settings_are_another_fingerprint_and_training_names_them(run: Path) -> None:
    def digest(settings: str) -> str:
        return job_of(run, "control-canny", f"features.stage3.families.control-canny={settings}").fingerprint.digest

    plain = digest("{}")
    assert plain == digest("{low_threshold = 100, high_threshold = 200, widen_pixels = 0}")
    others = {digest(f"{{{key}}}") for key in ("low_threshold = 99", "high_threshold = 201", "widen_pixels = 1")}
    assert len(others | {plain}) == 4
    assert job_of(run, "control-canny", CANNY).pending() == []
    with pytest.raises(UserError, match=r"families\.control-canny\.high_threshold is 40, but 200 is needed"):
        features_of(run, "features.stage3.families={control-canny = {}}")


@pytest.mark.parametrize(
    ("families", "message"),
    [
        ("{control-pose = {}}", r"families\.control-pose: there is no such family; .*control-canny.*control-given"),
        ("{control-canny = {threshold = 3}}", r"families\.control-canny\.threshold = 3: Extra inputs"),
        ("{control-canny = {low_threshold = 300}}", r"low_threshold 300 is above high_threshold 200"),
        ("{control-given = {}}", r"families\.control-given\.images = .*: Field required"),
        ("{control-given = {images = 'no/such'}}", r"control-given\.images = 'no/such': there is no such folder"),
        ("{control-hed = {model = './no.pth'}}", r"families\.control-hed\.model: \./no\.pth does not exist"),
        ("{control-depth = {model = './no'}}", r"families\.control-depth\.model: model folder \./no does not exist"),
    ],
)
def test_a_wrong_key_is_named(run: Path, families: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_families(inputs_of(run, f"features.stage3.families={families}"))


def test_maps_beside_imported_latents_are_refused_as_those_were_cropped_elsewhere(run: Path, tmp_path: Path) -> None:
    for families in ("{control-canny = {}}", f"{{control-given = {{images = '{tmp_path}'}}}}"):
        inputs = inputs_of(run, f"features.stage3.families={families}", "features.stage3.latents_from='x'")
        (family,) = (family for family in wanted_families(inputs) if family.name.startswith("control"))
        said = rf"families\.{family.name}: maps are cropped as images are here, and those of .*latents_from = 'x' were"
        with pytest.raises(UserError, match=said):
            family.plan(inputs)


def test_missing_weights_are_known_to_a_plan_with_the_line_that_fetches_them(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("encoders.weights.hub_silence", lambda: "it is off")
    line = "hf download lllyasviel/Annotators ControlNetHED.pth"
    for is_plan in (True, False):
        with pytest.raises(MissingFileError, match=rf"features\.stage3\.families\.control-hed\.model: .*`{line}`"):
            extract(run, "features.stage3.families={control-hed = {}}", stage=3, plan=is_plan)
    shown = capsys.readouterr().err
    assert "control-hed" in shown and "hours are not measured" in shown and line in " ".join(shown.split())
    assert not (run / "features" / "control-hed-48").exists()


def test_a_missing_package_is_known_before_any_work(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "cv2" else object())
    canny, inputs = DRAWN_MAPS[0], inputs_of(run, CANNY)
    with pytest.raises(ModuleNotFoundError, match="cv2"):
        canny.check(canny.job(inputs), inputs)


def test_networks_draw_in_batches_from_one_thread_what_they_draw_of_each_image(
    run: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(hed_weights(), tmp_path / "hed.pth")
    save_depth_model(tmp_path / "depth")
    threads, sizes = set(), []
    for maps in (HedMaps, DepthMaps):

        def watch(self, images, grey=maps.grey):
            threads.add(threading.current_thread())
            sizes.append(len(images))
            return grey(self, images)

        monkeypatch.setattr(maps, "grey", watch)
    families = f"{{control-hed = {{model = '{tmp_path}/hed.pth'}}, control-depth = {{model = '{tmp_path}/depth'}}}}"
    override = f"features.stage3.families={families}"
    extract(other, override, stage=3)
    assert threads == {threading.main_thread()} and max(sizes) == 3
    latents = load_index(other / "features" / "latent-48", SHARDS)
    weights = hed_weights()
    for kind in ("hed", "depth"):
        directory = other / "features" / f"control-{kind}-48"
        assert load_index(directory, SHARDS).select(GEOMETRY).equals(latents.select(GEOMETRY))
        control = read_manifest(directory).extra["control"]
        assert control["kind"] == kind and control["identity"].startswith("sha256:")
        model = str(tmp_path / {"hed": "hed.pth", "depth": "depth"}[kind])
        assert control["settings"] == {"model": model, "revision": None}
    kept = stored(other / "features" / "control-hed-48")
    assert len(kept) == 23
    for row in latents.to_pylist()[:6]:
        image = cropped(row["key"], row["bucket"])
        edges = published_hed(weights, torch.from_numpy(image).permute(2, 0, 1)[None])[0]
        grey = (255 * edges).round().byte().numpy()
        ((mean, _),) = encode(run, [np.repeat(grey[..., None], 3, axis=2)])
        np.testing.assert_allclose(kept[row["key"]]["mean"].astype(np.float32), mean, atol=0.02)
    # The same weights elsewhere are the same maps.
    (tmp_path / "hed.pth").rename(tmp_path / "moved.pth")
    assert job_of(other, "control-hed", override.replace("hed.pth", "moved.pth")).pending() == []
    torch.save(hed_weights(1), tmp_path / "hed.pth")
    assert len(job_of(other, "control-hed", override).pending()) == 2


@pytest.mark.parametrize("kind", ["canny", "hed"])
def test_two_runs_write_the_same_bytes(run: Path, tmp_path: Path, kind: str) -> None:
    written = []
    torch.save(hed_weights(), tmp_path / "hed.pth")
    settings = {"canny": "{}", "hed": f"{{model = '{tmp_path}/hed.pth'}}"}[kind]
    for number in range(2):
        copy = tmp_path / str(number) / "run"
        shutil.copytree(run / "raw", copy / "raw")
        shutil.copy(run.parent / "recipe.toml", copy.parent)
        texts = ("features.stage3.text=false", "features.decode_threads=3" if number else "features.decode_threads=1")
        extract(copy, f"features.stage3.families={{control-{kind} = {settings}}}", *texts, stage=3)
        files = sorted((copy / "features" / f"control-{kind}-48").iterdir())
        written.append({path.name: path.read_bytes() for path in files if path.suffix in (".tar", ".parquet", ".png")})
    assert len(written[0]) == 5 and written[0] == written[1]


def map_of(key: str) -> Image.Image:
    """Some picture of the shape of its image that is none of its edges: half as large, and turned upside down."""
    image = pixels_of(key)
    return image.resize((image.width // 2, image.height // 2)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)


def write_given(folder: Path) -> dict[str, bytes]:
    """Write a map for every sample but one, one that is damaged, and one of another shape; returns their bytes."""
    folder.mkdir()
    keys = [f"{shard:03d}{i:05d}" for shard in range(2) for i in range(12)]
    maps = {key: encoded(map_of(key)) for key in keys if key != "00000004"}
    maps["00000005"] = maps["00000005"][:60]
    maps["00000006"] = encoded(Image.new("RGB", (40, 60)))
    for key, data in maps.items():
        (folder / f"{key}.png").write_bytes(data)
    return maps


def given(folder: Path) -> str:
    return f"features.stage3.families={{control-given = {{images = '{folder}'}}}}"


def test_given_maps_are_cut_as_their_images_and_faults_are_rejects(run: Path, other: Path, tmp_path: Path) -> None:
    maps = write_given(tmp_path / "maps")
    extract(other, given(tmp_path / "maps"), ONE_BY_ONE, stage=3)
    directory = other / "features" / "control-given-48"
    manifest = read_manifest(directory)
    assert manifest.rejected == {"not_an_image": 1, MISSING: 1, "map:corrupt_image": 1, OTHER_SHAPE: 1}
    assert manifest.extra["control"] == {"kind": "given", "settings": {}, "identity": None}
    rows = {row["key"]: row for row in load_index(directory, SHARDS).to_pylist()}
    reasons = {key: rows[key]["reject"] for key in ("00000004", "00000005", "00000006")}
    assert reasons == {"00000004": MISSING, "00000005": "map:corrupt_image", "00000006": OTHER_SHAPE}
    latents = {row["key"]: row for row in load_index(other / "features" / "latent-48", SHARDS).to_pylist()}
    kept = stored(directory)
    assert len(kept) == 20
    for key, tensors in kept.items():
        row = rows[key]
        assert [row[name] for name in GEOMETRY] == [latents[key][name] for name in GEOMETRY]
        size = (row["resized_width"], row["resized_height"])
        resized = map_of(key).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
        height, width = map(int, row["bucket"].split("x"))
        x, y = row["crop_x"], row["crop_y"]
        ((mean, std),) = encode(run, [np.array(resized.crop((x, y, x + width, y + height)))])
        assert (tensors["mean"].tobytes(), tensors["std"].tobytes()) == (mean.tobytes(), std.tobytes())
    assert verify_run(other).problems == []
    # Batches are of samples that have all families.
    seen = {key for batch in batches_of(other, given(tmp_path / "maps")) for key in batch.keys}
    assert seen <= kept.keys() and len(seen) > 12
    # A map that changes has its shard encoded again, and no other; where maps lie is all the same.
    (tmp_path / "maps").rename(tmp_path / "moved")
    override = given(tmp_path / "moved")
    assert job_of(other, "control-given", override).pending() == []
    (tmp_path / "moved" / "00100007.png").write_bytes(maps["00100008"] + b"\0")
    assert [source.name for source in job_of(other, "control-given", override).pending()] == [SHARDS[1]]


def test_given_maps_come_from_tars_too(other: Path, tmp_path: Path) -> None:
    maps = write_given(tmp_path / "maps")
    extract(other, given(tmp_path / "maps"), stage=3)
    folder = ShardDirectory(other / "features" / "control-given-48")
    of_files = {name: folder.file(name, ".tar").read_bytes() for name in SHARDS}
    (tmp_path / "tars").mkdir()
    for shard, name in enumerate(SHARDS):
        members = [(f"{key}.png", data) for key, data in maps.items() if key.startswith(f"{shard:03d}")]
        write_tar(tmp_path / "tars" / f"{name}.tar", members)
    extract(other, given(tmp_path / "tars" / "*.tar"), stage=3)
    assert {name: folder.file(name, ".tar").read_bytes() for name in SHARDS} == of_files


def test_shapes_are_the_same_but_for_rounding() -> None:
    for size, original in (((100, 67), (1500, 1000)), ((750, 500), (1500, 1000)), ((3000, 2001), (1500, 1000))):
        require_shape(size, original)
    for size, original in (((100, 100), (1500, 1000)), ((1000, 1500), (1500, 1000)), ((1500, 990), (1500, 1000))):
        with pytest.raises(SampleReject, match=rf"^{OTHER_SHAPE}: {size[0]} x {size[1]} of an image of 1500 x 1000"):
            require_shape(size, original)


def test_none_of_the_maps_is_an_error_that_says_where_it_looked(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"control-given\.images: none of the 24 samples has a file \.png/\.webp/"):
        plan_families(inputs_of(run, given(tmp_path)))


def test_a_plan_has_bytes_and_how_maps_are_drawn_and_writes_nothing(other: Path, capsys: pytest.CaptureFixture) -> None:
    plans = {plan.family: plan for plan in plan_families(inputs_of(other, CANNY))}
    assert plans["control-canny"].bytes_per_sample == plans["latents"].bytes_per_sample
    assert plans["control-canny"].basis.startswith("canny (low_threshold 20, high_threshold 40")
    shutil.rmtree(other / "features")
    extract(other, CANNY, stage=3, plan=True)
    assert "control-canny" in capsys.readouterr().err and not (other / "features").exists()


def test_a_square_crop_is_that_of_its_latents_too(other: Path) -> None:
    extract(other, "features.stage2.families={control-canny = {}}", stage=2)
    maps, latents = (load_index(other / "features" / name, SHARDS) for name in ("control-canny-32", "latent-32"))
    assert maps.select(GEOMETRY).equals(latents.select(GEOMETRY)) and len(maps) == 24
    settings = json.loads((other / "features" / "control-canny-32" / "manifest.json").read_text())["extra"]["settings"]
    assert settings == {"low_threshold": 100, "high_threshold": 200, "widen_pixels": 0}


def test_the_page_has_every_kind_with_its_keys_and_defaults() -> None:
    page = (REPOSITORY / "docs" / "FEATURES.md").read_text()
    lines = page.partition("| kind | what is drawn | key | default |")[2].partition("\n\n")[0].splitlines()[2:]
    told: dict[str, dict[str, str]] = {}
    for line in lines:
        kind, _, key, default = (cell.strip().strip("`") for cell in line.strip("|").split("|"))
        told.setdefault(kind or list(told)[-1], {})[key] = default
    families = (*DRAWN_MAPS, GIVEN_MAPS)
    assert told == {
        family.name: {
            name: "to be written" if field.is_required() else {None: "null"}.get(field.default, str(field.default))
            for name, field in family.settings.model_fields.items()
        }
        for family in families
    }
