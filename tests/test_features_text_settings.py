"""What encodes texts is one record: captions, one text for all and imported embeddings take all of it."""

from dataclasses import asdict
from pathlib import Path

import pytest
from feature_run import extract, write_run
from tiny_encoders import save_text_encoder

from features.families import wanted_families
from features.jobs import FeatureInputs, read_inputs
from features.text_settings import TextSettings
from pipelines.command import parse_command
from pipelines.store.manifest import read_manifest

CONSTANT = 'features.stage2.captions=[{column = "subject", text = "a small star"}]'
SETTINGS = (
    "features.text_revision=abc",
    "features.text_dtype=bfloat16",
    "features.text_weight_dtype=int8",
    "features.text_storage=int8",
    "features.max_tokens=31",
    "features.text_cleaning=none",
    "features.text_batch_tokens=77",
    "features.device=cuda",
    "engine.cpus_per_worker=3",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("settings"), num_shards=1, samples_per_shard=4)


def inputs_of(run: Path, *overrides: str) -> FeatureInputs:
    arguments = ["--recipe", str(run.parent / "recipe.toml"), "--run", str(run), "--stage", "2"]
    arguments += [part for override in overrides for part in ("--set", override)]
    return read_inputs(parse_command("features", "", argv=arguments, has_stages=True))


@pytest.mark.parametrize("kind", ["captions", "one text", "imported"])
def test_each_job_of_texts_takes_every_setting(kind: str, run: Path, tmp_path: Path) -> None:
    for key in ("00000000", "00000001", "00000002", "00000003"):
        (tmp_path / f"{key}.npz").write_bytes(b"")
    chosen = {"captions": (), "one text": (CONSTANT,), "imported": (f"features.text_from={tmp_path}",)}[kind]
    other = save_text_encoder(tmp_path / "t5")
    inputs = inputs_of(run, *chosen, *SETTINGS, f"features.text_model={other}")
    job = wanted_families(inputs)[0].job(inputs)
    settings = TextSettings.of(inputs)
    assert job.worker_config.text == settings
    plain = asdict(TextSettings.of(inputs_of(run, *chosen)))
    assert not [name for name, value in asdict(settings).items() if value == plain[name]]
    decide = {"text_weight_dtype", "text_storage", "max_tokens", "text_cleaning", "text_model"}
    assert decide <= job.fingerprint.fields.keys()


def test_manifests_say_the_same_of_the_encoder(run: Path) -> None:
    extract(run)
    extract(run, CONSTANT)
    folders = [run / "features" / name for name in ("text", "text-subject")]
    facts = [read_manifest(folder).extra["text"] for folder in folders]
    assert facts[0] == facts[1]
    assert {"model", "revision", "dtype", "storage", "max_tokens", "cleaning", "d_text"} == facts[0].keys()
