import contextlib
import io
import re
import shutil
import subprocess
import sys

import pytest
from feature_run import extract, write_run
from rich.console import Console

from encoders.kl import PUBLISHED_VAE
from errors import UserError
from features import plan
from features.jobs import bucket_sizes, read_inputs
from features.latents import latent_bytes, latent_job
from features.plan import format_bytes, plan_families
from features.speed import Speed, find_speed
from features.text import text_job
from features.text_settings import text_bytes
from pipelines.command import parse_command
from pipelines.store.summary import read_summary


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("plan"), num_shards=2, samples_per_shard=12)


@pytest.mark.parametrize("vae", ["", "features.vae_model=nobody/vae"], ids=["here", "not-here"])
@pytest.mark.parametrize("plan", [True, False], ids=["plan", "run"])
def test_resolution_must_be_whole_patches(run, plan, vae):
    overrides = [vae] if vae else []
    if vae and not plan:
        # Of a model that is out of reach nothing is assumed.
        message = r"features\.vae_model = 'nobody/vae' .*hf download nobody/vae"
    else:
        message = r"^features\.stage2\.resolution 250 is not a multiple of 16 \(VAE factor 8 times patch size 2\)$"
    with pytest.raises(UserError, match=message):
        extract(run, "features.stage2.resolution=250", *overrides, plan=plan)


def inputs_of(run, *overrides, stage=2):
    arguments = ["--recipe", str(run.parent / "recipe.toml"), "--run", str(run), "--stage", str(stage)]
    arguments += [part for override in overrides for part in ("--set", override)]
    return read_inputs(parse_command("features", "", argv=arguments, has_stages=True))


MIXED = 'features.stage2.captions=[{column="caption", weight=0.9}, {column="alt_text", weight=0.1}]'


@pytest.mark.parametrize(
    ("directory", "overrides"),
    [
        ("text", ()),
        ("text", ("features.text_storage=int8",)),
        ("text-caption+alt_text", (MIXED, "features.text_storage=float8_e4m3")),
    ],
)
def test_estimates_are_near_what_is_written_and_pending_shrinks_to_nothing(run, directory, overrides):
    before = plan_families(inputs_of(run, *overrides))
    extract(run, *overrides)
    for family, name in zip(before, (directory, "latent-32"), strict=True):
        assert family.directory == run / "features" / name
        written = sum((family.directory / f"laion_0000{shard}.tar").stat().st_size for shard in range(2))
        # Small tars are mostly headers and padding, and the end of each takes 1 kB.
        assert written == pytest.approx(family.num_samples * family.bytes_per_sample, rel=0.2)
    after = plan_families(inputs_of(run, *overrides))
    assert [(family.num_samples, family.pending_samples) for family in after] == [(24, 0), (24, 0)]


def planned(run, monkeypatch, *overrides, stage=2, refused: str | None = None) -> str:
    """Return what a plan prints; `refused` is what it says after that of what the run would stop at."""
    output = io.StringIO()
    monkeypatch.setattr(plan, "console", Console(file=output, width=250))
    with contextlib.nullcontext() if refused is None else pytest.raises(UserError, match=refused):
        extract(run, *overrides, stage=stage, plan=True)
    return output.getvalue()


def test_plan_is_printed_with_sizes_and_measured_hours_and_writes_nothing(run, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    text = planned(run, monkeypatch, "features.max_tokens=30", stage=3)
    assert "latent-48" in text
    assert "mean of 23 captions" in text
    assert "free on this disk" in text
    for family in ("text", "latents"):
        assert re.search(
            rf"{family}: [\d,.]+ samples/s a worker, measured now on 12 samples of laion_0000\d; 1 worker", text
        )
    row = next(line for line in text.splitlines() if line.startswith("│ latents"))
    hours = float(row.split("│")[-2])
    assert 0 < hours < 0.1
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_a_run_is_remembered_and_its_speed_is_used_for_the_same_settings_only(tmp_path, monkeypatch):
    run = write_run(tmp_path, num_shards=1, samples_per_shard=4)
    extract(run)
    # Ten minutes are a measure, a second of starting up is none.
    assert "speed" not in read_summary(run).get("features", {})
    shutil.rmtree(run / "features")
    monkeypatch.setattr("features.speed.MIN_REMEMBERED_SECONDS", 0.0)
    extract(run)
    for path in (run / "features").glob("*/.done/laion_00000.json"):
        path.unlink()
    monkeypatch.setattr("features.speed._measure", lambda *arguments, **options: pytest.fail("it was known"))
    inputs = inputs_of(run)
    for job in (text_job(inputs), latent_job(inputs)):
        speed = find_speed(job, inputs)
        assert isinstance(speed, Speed)
        assert (speed.basis, speed.num_workers) == ("as in the last run", 1)
        assert 0 < speed.samples_per_second < 10_000
    measured = []
    monkeypatch.setattr("features.speed._measure", lambda job, inputs, *, num_workers: measured.append(job.family.name))
    other = inputs_of(run, "features.max_tokens=5")
    find_speed(text_job(other), other)
    assert measured == ["text"]


def test_hours_are_samples_over_all_workers():
    assert Speed(samples_per_second=10, num_workers=8, basis="").hours(28_800_000) == 100


def test_what_is_missing_for_the_hours_is_said_and_no_number_made_up(tmp_path, monkeypatch):
    run = write_run(tmp_path, num_shards=1, samples_per_shard=4)
    models = ("features.text_model=google/flan-t5-xxl", "features.vae_model=stabilityai/sd-vae-ft-ema")
    text = planned(run, monkeypatch, *models, refused=r"features\.text_model = 'google/flan-t5-xxl' .*hf download")
    assert "text: hours are not measured: google/flan-t5-xxl is not here; `hf download google/flan-t5-xxl`" in text
    assert "latents: hours are not measured: stabilityai/sd-vae-ft-ema is not here" in text
    assert [line.split("│")[-2].strip() for line in text.splitlines() if line.startswith(("│ text", "│ latents"))] == [
        "?",
        "?",
    ]
    monkeypatch.setattr("features.speed._count_gpus", lambda: 0)
    # In the process no worker is asked for a GPU.
    text = planned(run, monkeypatch, "engine.gpus_per_worker=1.0")
    assert text.count("engine.gpus_per_worker = 1, and there is no GPU here") == 2
    (run / "captions" / ".manifest.json").unlink()
    assert "text: hours are not measured: captions are not there yet" in planned(run, monkeypatch)


def test_a_plan_says_which_setting_would_throw_features_away(run, monkeypatch):
    extract(run)
    text = planned(run, monkeypatch, "features.max_tokens=20")
    assert "features/text was made with other settings and would be computed anew: max_tokens: 40 -> 20" in text


def test_plan_without_captions_or_models_uses_the_upper_bound_and_published_widths(tmp_path):
    run = write_run(tmp_path, num_shards=1, samples_per_shard=4)
    (run / "captions" / ".manifest.json").unlink()
    models = ("features.text_model=google/flan-t5-xxl", "features.vae_model=stabilityai/sd-vae-ft-ema")
    text, latents = plan_families(inputs_of(run, *models, "features.max_tokens=120"))
    assert text.bytes_per_sample == text_bytes(120, 4096)
    assert text.basis == "no captions yet: at most 120 tokens x 4096 bfloat16"
    assert latents.bytes_per_sample == latent_bytes(32 * 32, PUBLISHED_VAE)


def test_8_bits_take_half_and_a_scale():
    assert text_bytes(120, 4096, storage="int8") == pytest.approx(120 * (4096 + 4), abs=1200)
    assert text_bytes(120, 4096, storage="float8_e4m3") == text_bytes(120, 4096, storage="int8")


def test_bytes_per_sample_of_the_paper():
    # 120 tokens x 4096 x 2 bytes = 983,040; 256 px: mean and std, 4 x 32 x 32 x 2 bytes each = 16,384.
    assert 983_040 < text_bytes(120, 4096) < 985_000
    assert 16_384 < latent_bytes(256**2, PUBLISHED_VAE) < 17_700


def test_format_bytes():
    assert [format_bytes(size) for size in (999, 1500, 2.5e6, 3e9, 9.8e12)] == [
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "3.0 GB",
        "9.8 TB",
    ]


def test_a_plan_with_nothing_to_do_needs_no_torch(run):
    extract(run)
    code = (
        "import sys, features.__main__ as room\n"
        f"sys.argv = ['features', '--recipe', {str(run.parent / 'recipe.toml')!r}, '--run', {str(run)!r},"
        " '--stage', '2', '--plan']\n"
        "room.main()\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'diffusers', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_mistakes_are_one_line_and_exit_status_2(run):
    arguments = ["--recipe", str(run.parent / "recipe.toml"), "--run", str(run), "--stage", "2"]
    command = [sys.executable, "-m", "features", *arguments, "--set", "features.text_dtype=float16"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("features: ")]
    assert "overflow" in done.stderr
    assert "Traceback" not in done.stderr


def test_buckets_are_whole_patches_of_the_recipes_model(run):
    """Another patch size changes where images are cut, and so what latents are known by; a square crop it does not."""
    buckets = ["features.stage2.buckets=true", "features.stage2.resolution=256"]
    small, large = (inputs_of(run, *buckets, f"model.patch_size={size}") for size in (2, 4))
    assert {side % 32 for size in bucket_sizes(large, PUBLISHED_VAE) for side in size} == {0}
    assert {side % 32 for size in bucket_sizes(small, PUBLISHED_VAE) for side in size} == {0, 16}
    assert latent_job(small).fingerprint == latent_job(inputs_of(run, *buckets)).fingerprint
    assert latent_job(small).fingerprint != latent_job(large).fingerprint
    square = latent_job(inputs_of(run)), latent_job(inputs_of(run, "model.patch_size=4"))
    assert square[0].fingerprint == square[1].fingerprint
    with pytest.raises(UserError, match=r"stage2\.resolution 80 is not a multiple of 32 .* times patch size 4\)"):
        extract(run, "features.stage2.resolution=80", "model.patch_size=4", plan=True)
