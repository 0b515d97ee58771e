import io
import subprocess
import sys

import pytest
from feature_run import extract, write_run
from rich.console import Console

from features import plan
from features.jobs import read_inputs
from features.plan import format_bytes, latent_bytes, plan_families, text_bytes
from pipelines.command import parse_command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("plan"), num_shards=2, samples_per_shard=12)


def inputs_of(run, *overrides, stage=2):
    arguments = ["--recipe", str(run.parent / "recipe.toml"), "--run", str(run), "--stage", str(stage)]
    arguments += [part for override in overrides for part in ("--set", override)]
    return read_inputs(parse_command("features", "", argv=arguments, stages=(1, 2, 3)))


def test_estimates_are_near_what_is_written_and_pending_shrinks_to_nothing(run):
    before = plan_families(inputs_of(run))
    assert [family.pending_samples for family in before] == [24, 24]
    extract(run)
    for family, directory in zip(before, ("text", "latent-32"), strict=True):
        assert family.directory == run / "features" / directory
        written = sum((family.directory / f"laion_0000{shard}.tar").stat().st_size for shard in range(2))
        # Small tars are mostly headers and padding, and the end of each takes 1 kB.
        assert written == pytest.approx(family.pending_bytes, rel=0.2)
    after = plan_families(inputs_of(run))
    assert [(family.num_samples, family.pending_samples) for family in after] == [(24, 0), (24, 0)]


def test_plan_is_printed_with_sizes_and_writes_nothing(run, monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(plan, "console", Console(file=output, width=250))
    extract(run, stage=3, plan=True)
    text = output.getvalue()
    assert "latent-48" in text
    assert "24" in text
    assert "mean of 23 captions" in text
    assert "free on this disk" in text
    assert not (run / "features" / "latent-48").exists()


def test_plan_without_captions_or_models_uses_the_upper_bound_and_published_widths(tmp_path):
    run = write_run(tmp_path, num_shards=1, samples_per_shard=4)
    (run / "captions" / "manifest.json").unlink()
    models = ("features.text_model=google/flan-t5-xxl", "features.vae_model=stabilityai/sd-vae-ft-ema")
    text, latents = plan_families(inputs_of(run, *models, "features.max_tokens=120"))
    assert text.bytes_per_sample == text_bytes(120, 4096)
    assert text.basis == "no captions yet: at most 120 tokens x 4096 bf16"
    assert latents.bytes_per_sample == latent_bytes(32 * 32)


def test_bytes_per_sample_of_the_paper():
    # 120 tokens x 4096 x 2 bytes = 983,040; 256 px: mean and std, 4 x 32 x 32 x 2 bytes each = 16,384.
    assert 983_040 < text_bytes(120, 4096) < 985_000
    assert 16_384 < latent_bytes(256**2) < 17_700


def test_format_bytes():
    assert [format_bytes(size) for size in (999, 1500, 2.5e6, 3e9, 9.8e12)] == [
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "3.0 GB",
        "9.8 TB",
    ]


def test_a_plan_of_local_models_needs_no_torch(run):
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
    assert done.stderr.startswith("features: ")
    assert "overflow" in done.stderr
    assert "Traceback" not in done.stderr
