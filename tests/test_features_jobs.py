"""What features are known by: settings at their default are left out, and features made before that go on."""

import pydantic
import pytest
from feature_run import extract, write_run
from former_run import as_formerly, times_of

from features.config import DECIDES_IMAGES, DECIDES_TEXT, FeaturesConfig, OfImages, OfText
from pipelines.recipe import DataConfig, Decides
from pipelines.store.manifest import read_manifest

IMAGE_DEFAULTS = FeaturesConfig.fingerprint_defaults(DECIDES_IMAGES) | DataConfig.fingerprint_defaults()
TEXT_DEFAULTS = FeaturesConfig.fingerprint_defaults(DECIDES_TEXT)


class LaterFeatures(FeaturesConfig):
    """`[features.<name>]` with keys that there are not yet."""

    tiling: OfImages[bool] = pydantic.Field(default=False, description="decides latents")
    padding: OfText[str] = pydantic.Field(default="none", description="decides text features")
    patience: int = pydantic.Field(default=3, description="decides nothing")


class LaterData(DataConfig):
    """`[data]` with a key that there is not yet."""

    turned: Decides[bool] = pydantic.Field(default=True, description="decides latents")


def with_later_keys(monkeypatch):
    monkeypatch.setattr("features.config.FeaturesConfig", LaterFeatures)
    for module in ("features.jobs", "pipelines.command"):
        monkeypatch.setattr(f"{module}.DataConfig", LaterData)


@pytest.fixture
def run(tmp_path):
    run = write_run(tmp_path, num_shards=1, samples_per_shard=6)
    extract(run)
    return run


def test_fields_at_their_default_are_left_out_and_said_beside(run):
    latents, text = (read_manifest(run / "features" / name) for name in ("latent-32", "text"))
    assert latents.fingerprint.fields.keys() == {"family", "code_version", "vae_model", "resolution"}
    assert "text_storage" not in text.fingerprint.fields and text.fingerprint.fields["max_tokens"] == 40
    assert latents.extra["defaults"] == IMAGE_DEFAULTS | {"model.patch_size": 2}
    assert latents.extra["defaults"].items() >= {"buckets": False, "dialect": "auto", "vae_dtype": "float32"}.items()
    assert text.extra["defaults"] == TEXT_DEFAULTS and text.extra["defaults"]["text_cleaning"] == "lower"


def test_a_new_key_recomputes_nothing(run, monkeypatch):
    before = times_of(run / "features")
    with_later_keys(monkeypatch)
    extract(run, "features.patience=9")
    assert times_of(run / "features") == before


@pytest.mark.parametrize(
    ("override", "directory", "said"),
    [
        ("features.tiling=true", "latent-32", "tiling: False -> True"),
        ("data.turned=false", "latent-32", "turned: True -> False"),
        ("features.padding=max", "text", "padding: none -> max"),
        ("features.text_storage=int8", "text", "text_storage: bfloat16 -> int8"),
    ],
)
def test_a_setting_that_decides_is_said_with_both_values_and_computes_its_family_anew(
    run, monkeypatch, capsys, override, directory, said
):
    with_later_keys(monkeypatch)
    before = {name: times_of(run / "features" / name) for name in ("latent-32", "text")}
    extract(run, override)
    assert said in " ".join(capsys.readouterr().err.split())
    changed = {name for name in before if times_of(run / "features" / name) != before[name]}
    assert changed == {directory}


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "interrupted"])
def test_features_with_every_field_written_out_go_on(run, monkeypatch, is_finished, capsys):
    former = {
        "latent-32": as_formerly(
            run / "features" / "latent-32",
            {name: value for name, value in IMAGE_DEFAULTS.items() if name not in ("image_column", "max_upscale")},
        ),
        "text": as_formerly(
            run / "features" / "text",
            {
                name: value
                for name, value in TEXT_DEFAULTS.items()
                if name not in ("text_cleaning", "text_weight_dtype")
            },
        ),
    }
    if not is_finished:
        for name in former:
            (run / "features" / name / "manifest.json").unlink()
    before = times_of(run / "features")
    extract(run)
    after = times_of(run / "features")
    changed = {path.name for path in after if before.get(path) != after[path]}
    assert changed == (set() if is_finished else {"manifest.json"})
    assert {name: read_manifest(run / "features" / name).fingerprint.digest for name in former} == former
    with_later_keys(monkeypatch)
    extract(run)
    assert times_of(run / "features") == after
    capsys.readouterr()
    extract(run, "features.vae_dtype=bfloat16")
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("anew") == 1 and "other settings (vae_dtype: float32 -> bfloat16) and are made anew" in said
