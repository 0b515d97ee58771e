"""Which features a stage reads: datasets of a recipe, what of them is refused, and what a plan says of them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_training_stage import write_checkpoint
from training_run import arguments, make_run, write_latents, write_text

from errors import UserError
from pipelines.command import parse_command
from pipelines.store.families import latent_directory, text_directory
from pipelines.store.manifest import MANIFEST_NAME, Fingerprint, ShardDirectory
from training.launch.preflight import inspect_stage, print_plan
from training.stages.stage import TrainingJob, open_stage

SHARDS = {"laion_0": 40, "laion_1": 23}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def open_job(run: Path, *overrides: str) -> TrainingJob:
    flags = [flag for override in overrides for flag in ("--set", override)]
    argv = [*arguments(run, 2, starts_from="scratch", num_processes=1), *flags]
    return open_stage(parse_command("training", "", argv=argv, has_stages=True))


def mixed(*datasets: str) -> str:
    return f"training.stage2.datasets=[{', '.join('{' + dataset + '}' for dataset in datasets)}]"


FIRST, SECOND = 'shards = ["laion_0"], weight = 3', 'shards = ["laion_1"], weight = 1'


def test_a_plan_says_how_datasets_are_mixed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_run(tmp_path / "other")
    job = open_job(run, mixed(FIRST, f'run = "{other}", shards = ["laion_*"]'))
    print_plan(job, inspect_stage(job, 1))
    said = " ".join(capsys.readouterr().err.split())
    # 12 steps of 8 samples: three quarters of 96 from 32 samples, one quarter from 50.
    assert "75.00% of every batch, 32 samples in 1 shards, 2.25 epochs" in said
    assert "25.00% of every batch, 50 samples in 2 shards, 0.48 epochs" in said
    assert f"{other}/features/latent-32 and {other}/features/text" in said
    assert "not read 1 shards of features.stage2: laion_1" in said


def test_one_dataset_named_is_the_same_as_none_named(run: Path) -> None:
    assert open_job(run, mixed("weight = 0.2")).fingerprint == open_job(run).fingerprint
    assert open_job(run, mixed(f'run = "{run}"')).fingerprint == open_job(run).fingerprint


def test_a_checkpoint_is_bound_to_its_mixture(run: Path) -> None:
    write_checkpoint(open_job(run, mixed(FIRST, SECOND)), step=6)
    assert open_job(run, mixed(FIRST, SECOND)).resume is not None
    with pytest.raises(UserError, match=r"trained with datasets\.1\.weight 1\.0, but it is 2\.0 now"):
        open_job(run, mixed(FIRST, SECOND.replace("weight = 1", "weight = 2")))
    with pytest.raises(UserError, match=r"trained with datasets\.0\.latents\.files '\w+', but it is '\w+' now"):
        open_job(run, mixed(SECOND.replace("weight = 1", "weight = 3"), FIRST.replace("weight = 3", "weight = 1")))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ('shards = ["sa_*"]', r"training\.stage2\.datasets\.1\.shards: pattern 'sa_\*' matches none of the 3 shards"),
        ("weight = 0", r"training\.stage2\.datasets\.1\.weight = 0"),
        ('weight = "much"', r"training\.stage2\.datasets\.1\.weight = 'much'"),
        ("wait = 1", r"training\.stage2\.datasets\.1\.wait is not a known key"),
        ("shards = []", r"training\.stage2\.datasets\.1\.shards = \[\]"),
        ('shards = ["laion_*"]', r"datasets\.0 and training\.stage2\.datasets\.1 both read shard laion_0 of"),
        ('run = "/nowhere"', r"/nowhere/features/latent-32 does not exist.*RUN=/nowhere"),
    ],
)
def test_a_wrong_dataset_is_named_by_its_key(run: Path, dataset: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_job(run, mixed(FIRST, dataset))


def test_datasets_of_other_encoders_are_refused(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other")
    path = latent_directory(other, 32) / "manifest.json"
    path.write_text(path.read_text().replace('"scaling_factor": 0.5', '"scaling_factor": 0.6'))
    with pytest.raises(UserError, match=r"other/run/features/latent-32: vae\.scaling_factor is 0\.6, but 0\.5 is"):
        open_job(run, mixed(FIRST, f'run = "{other}", shards = ["laion_1"]'))
    shutil.rmtree(text_directory(other))
    write_text(other, SHARDS, storage="int8")
    with pytest.raises(UserError, match=r"text: text_storage is 'int8', but 'bfloat16' is needed"):
        open_job(run, mixed(FIRST, f'run = "{other}", shards = ["laion_1"]'))


def test_features_made_anew_with_other_settings_end_a_training_by_name(run: Path) -> None:
    """The recipe and the features agree with each other, but no longer with the checkpoint that is to be resumed."""
    write_checkpoint(open_job(run), step=6)
    write_latents(run, 48, SHARDS, buckets=["48x48"], is_bucketed=False)
    with pytest.raises(UserError, match=r"trained with latents\.resolution 32, but it is 48 now"):
        open_job(run, "features.stage2.resolution=48")
    write_text(run, SHARDS, columns=("alt_text",))
    with pytest.raises(
        UserError, match=r"trained with text\.caption_columns \['caption'\], but it is \['alt_text'\] now"
    ):
        open_job(run, 'features.stage2.captions=[{column = "alt_text"}]')
    for field, setting in (("max_tokens", 10), ("revision", "abc"), ("storage", "int8")):
        shutil.rmtree(text_directory(run))
        write_text(run, SHARDS, **{field: setting})
        key = {"max_tokens": "max_tokens", "revision": "text_revision", "storage": "text_storage"}[field]
        value = f"'{setting}'" if isinstance(setting, str) else setting
        with pytest.raises(UserError, match=rf"trained with text\.{field} .*, but it is {value} now"):
            open_job(run, f"features.{key}={setting}")


def test_text_of_other_captions_is_refused_and_of_captions_with_a_new_score_is_not(run: Path) -> None:
    path = text_directory(run) / MANIFEST_NAME
    plain, scored = Fingerprint.of({"clip_model": None}), Fingerprint.of({"clip_model": "clip"})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"upstream": {"captions": plain.digest}}))
    captions = ShardDirectory(run / "captions")
    for fingerprint, extra in ((plain, {}), (scored, {"texts": plain.digest})):
        captions.write_manifest(fingerprint, [], upstream={}, extra=extra)
        open_job(run)
    captions.write_manifest(scored, [], upstream={}, extra={"texts": "another"})
    with pytest.raises(UserError, match=rf"captions is '{plain.digest}', but 'another' is needed"):
        open_job(run)


def test_a_changed_setting_without_new_features_is_refused_by_name(run: Path) -> None:
    for override, message in (
        ("features.stage2.resolution=48", "latent-48 does not exist"),
        ("features.max_tokens=20", "max_tokens is 12, but 20 is needed"),
        ("features.text_revision=abc", "text_revision is None, but 'abc' is needed"),
        ("features.vae_revision=abc", "vae_revision is None, but 'abc' is needed"),
        ("features.text_storage=int8", "text_storage is 'bfloat16', but 'int8' is needed"),
        ('features.stage2.captions=[{column = "alt_text"}]', "text-alt_text does not exist"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            open_job(run, override)
        # What it says first opens what is there, beside the same override.
        advised = re.search(r"to read what is there, set (\S+) = (\S+);", str(refused.value))
        if advised is not None:
            open_job(run, override, f"{advised[1]}={advised[2]}")
        elif "is needed" in message:
            assert re.search(
                rf"to read what is there, leave {override.split('=')[0].replace('features', 'features.stage2')} out",
                str(refused.value),
            )


def known_by(directory: Path, *, fields: dict[str, object], left_out: tuple[str, ...], says_defaults: bool) -> None:
    """Rewrite a manifest: its fingerprint with `fields` but for those left out, and maybe what they are by default."""
    path = directory / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    kept = {name: value for name, value in fields.items() if name not in left_out}
    found = Fingerprint.of({**manifest["fingerprint"]["fields"], **kept})
    for name in left_out:
        found.fields.pop(name, None)
    manifest["fingerprint"] = {"fields": found.fields, "digest": Fingerprint.of(found.fields).digest}
    manifest["extra"]["defaults"] = {name: fields[name] for name in left_out} if says_defaults else {}
    path.write_text(json.dumps(manifest))


LATENT_SETTINGS: dict[str, object] = {"buckets": False, "vae_dtype": "float32"}
WRITTEN_OUT: dict[str, object] = {"left_out": (), "says_defaults": False}
LEFT_OUT: dict[str, object] = {"left_out": tuple(LATENT_SETTINGS), "says_defaults": True}


@pytest.mark.parametrize(("first", "then"), [(WRITTEN_OUT, LEFT_OUT), (LEFT_OUT, WRITTEN_OUT), (LEFT_OUT, LEFT_OUT)])
@pytest.mark.parametrize("datasets", [(), (mixed(FIRST, SECOND),)], ids=["one", "mixed"])
def test_features_made_again_end_no_training_whether_defaults_are_written_out_or_not(
    run: Path, first: dict[str, Any], then: dict[str, Any], datasets: tuple[str, ...]
) -> None:
    latents = latent_directory(run, 32)
    known_by(latents, fields=LATENT_SETTINGS, **first)
    job = open_job(run, *datasets)
    folder = write_checkpoint(job, step=6)
    trainer = json.loads((folder / "trainer.json").read_text())
    trainer["feature_defaults"] = job.features.fingerprint_defaults()
    (folder / "trainer.json").write_text(json.dumps(trainer))
    known_by(latents, fields=LATENT_SETTINGS, **then)
    again = open_job(run, *datasets)
    assert again.resume is not None and again.fingerprint.digest == job.fingerprint.digest
    # By a key that there was not when it was begun.
    known_by(latents, fields=LATENT_SETTINGS | {"tiling": True}, **then)
    path = latents / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["extra"]["defaults"]["tiling"] = False
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"latents\.tiling False, but it is True now"):
        open_job(run, *datasets)
