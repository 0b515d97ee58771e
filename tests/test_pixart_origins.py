"""What is known of weights that nothing names, and of encoders at other commits: said, and refused only where sure."""

import json
import shutil
from pathlib import Path

import pytest
import training_run
from huggingface_hub import constants
from published_layouts import write_pipeline, write_transformer
from tiny_encoders import save_text_encoder
from training_run import CHANNELS, D_TEXT, arguments, make_run

from encoders.likeness import is_same_codec, is_same_text_encoder
from encoders.weights import resolve_model
from errors import UserError
from pipelines.command import parse_command
from pixart.differences import Uses, differences
from pixart.evidence import origins_of_folder
from pixart.model import PixArt, PixArtConfig
from pixart.origins import ORIGINS_FILE, Origins, origins_of_json
from pixart.processes.specs import ddpm_spec
from training.stages.stage import TrainingJob, open_stage
from training.stages.trainable import OwnWeights

T5, FLAN, SD_VAE = "DeepFloyd/t5-v1_1-xxl", "google/flan-t5-xxl", "stabilityai/sd-vae-ft-ema"
REPOSITORY = Path(__file__).resolve().parent.parent
ONE, OTHER = "a" * 40, "b" * 40
WRITTEN_ANEW = {"_class_name": "PixArtTransformer2DModel", "interpolation_scale": 1.0}


def found(origins: Origins, uses: Uses) -> list[tuple[str, str, str | None]]:
    differing = differences(origins, uses, is_same_text_encoder=is_same_text_encoder, is_same_codec=is_same_codec)
    return [(one.name, one.trained, one.doubt) for one in differing]


def test_a_copy_of_ones_own_weights_is_not_taken_for_published_ones(tmp_path: Path) -> None:
    """Its config has the published shape, and says nothing of who trained it."""
    settings = WRITTEN_ANEW | {"interpolation_scale": 2.0, "use_additional_conditions": True}
    origins = origins_of_folder(write_transformer(tmp_path / "copy", sample_size=128, **settings))
    source = "known by its config alone, which is like PixArt-alpha/PixArt-XL-2-1024-MS's"
    assert f"text by {T5}, 120 tokens, cleaned as diffusers ({source})" in origins.describe()
    ((name, trained, doubt),) = found(origins, Uses(text_encoder=(FLAN,), vae=(SD_VAE,)))
    assert (name, trained) == ("text_encoder", f"'{T5}' ({source})")
    assert doubt == "whether they are those weights, nothing here tells"


@pytest.mark.parametrize("known", ["as published", "named", "pipeline"])
def test_what_says_that_weights_are_published_is_enough(tmp_path: Path, known: str) -> None:
    settings = {} if known == "as published" else WRITTEN_ANEW
    if known == "pipeline":
        folder = write_pipeline(tmp_path / "mine", "PixArtAlphaPipeline", sample_size=64, **settings) / "transformer"
    else:
        folder = write_transformer(tmp_path / ("PixArt-XL-2-512x512" if known == "named" else "mine"), sample_size=64,
                                   **settings)  # fmt: skip
    origins = origins_of_folder(folder)
    assert "(published as PixArt-alpha/PixArt-XL-2-512x512)" in origins.describe()
    assert [(name, doubt) for name, _, doubt in found(origins, Uses(text_encoder=(FLAN,)))] == [("text_encoder", None)]


def test_a_copy_of_a_checkpoint_s_model_says_what_it_was_trained_with(tmp_path: Path) -> None:
    config = PixArtConfig(num_layers=1, num_heads=2, head_dim=8, caption_channels=D_TEXT, sample_size=4)
    text = {"model": FLAN, "revision": ONE, "max_tokens": 77, "cleaning": "none"}
    vae = {"model": SD_VAE, "revision": None, "scaling_factor": 0.5, "shift_factor": 0.1, "factor": 8}
    trainer = {"text": text, "vae": vae, "process": ddpm_spec(), "resolution": 32, "interpolation_scale": 1.0}
    OwnWeights("all").save(config, PixArt(config).state_dict(), tmp_path / "step-1", trainer=trainer)
    origins = origins_of_folder(shutil.copytree(tmp_path / "step-1" / "model", tmp_path / "copy"))
    assert f"text by {FLAN}, revision {ONE}, 77 tokens, cleaned as none" in origins.describe()
    assert f"VAE {SD_VAE}, scale 0.5, shift 0.1" in origins.describe()


@pytest.mark.parametrize(
    ("used", "trained", "is_refused"),
    [
        ((T5, OTHER), (T5, ONE), True),
        ((T5, ONE), (T5, ONE), False),
        ((T5, ONE[:8]), (T5, ONE), False),  # cut
        ((T5, None), (T5, ONE), False),
        ((T5, "main"), (T5, ONE), False),  # whatever that was then
        (("google/t5-v1_1-xxl", OTHER), (T5, ONE), False),  # another repository of the same weights
    ],
)
def test_commits_of_one_model_are_compared(
    used: tuple[str, str | None], trained: tuple[str, str], is_refused: bool
) -> None:
    record = {"text_encoder": [trained[0]], "text_revision": trained[1]}
    origins = origins_of_json(record, source="origins.json")
    assert origins_of_json(origins.to_json(), source="origins.json") == origins
    differing = found(origins, Uses(text_encoder=(used[0],), text_revision=used[1]))
    expected = [("text_encoder", f"revision {ONE} (origins.json)", None)]
    assert differing == (expected if is_refused else [])


def test_commits_with_the_same_weights_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for revision, seed in ((ONE, 0), (OTHER, 0), ("c" * 40, 5)):
        save_text_encoder(tmp_path / "models--toy--t5" / "snapshots" / revision, seed=seed)
    names = [(f"toy/t5@{revision}",) for revision in (ONE, OTHER, "c" * 40)]
    assert is_same_text_encoder(names[0], names[1]) is True
    assert is_same_text_encoder(names[0], names[2]) is False


def test_a_revision_stays_with_the_encoder_that_it_is_of() -> None:
    own = origins_of_json({"text_encoder": ["mine/t5"]}, source="own")
    other = origins_of_json({"text_encoder": [T5], "text_revision": ONE}, source="other")
    assert own.or_else(other).text_revision is None
    merged = Origins().or_else(other)
    assert merged.text_revision is not None and merged.text_revision.value == ONE


def job_of(run: Path, start: Path, **settings: object) -> TrainingJob:
    argv = arguments(run, 2, starts_from=str(start), **settings)
    return open_stage(parse_command("training", "", argv=argv, has_stages=True))


def test_a_stage_refuses_another_commit_unless_it_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = training_run.write_text.__kwdefaults__ or {}
    monkeypatch.setattr(training_run.write_text, "__kwdefaults__", defaults | {"revision": OTHER})
    typed = f'text_model = "toy/t5"\ntext_revision = "{OTHER}"'
    monkeypatch.setattr(training_run, "RECIPE", training_run.RECIPE.replace('text_model = "toy/t5"', typed))
    run = make_run(tmp_path)
    shape = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "caption_channels": D_TEXT}
    start = write_transformer(tmp_path / "start", sample_size=4, **shape | {"in_channels": CHANNELS, "out_channels": 8})
    (start / ORIGINS_FILE).write_text(json.dumps({"text_encoder": ["toy/t5"], "text_revision": ONE}))
    said = rf"features\.text_model is 'toy/t5' at revision {OTHER}, but .* were trained with revision {ONE} \(.*origins"
    with pytest.raises(UserError, match=said):
        job_of(run, start)
    job = job_of(run, start, departs_in=["text_encoder"])
    assert any("as training.stage2.departs_in says" in line for line in job.departures)
    assert f"revision {ONE}" in job.origins.describe()


def test_the_toy_release_says_what_it_was_trained_with_and_that_is_still_there() -> None:
    origins = origins_of_folder(REPOSITORY / "toyworld" / "released" / "pixart")
    assert origins.text_encoder is not None and origins.vae is not None
    for name, identity in (origins.text_encoder.value, origins.vae.value):
        assert resolve_model(name).identity == identity
    assert "120 tokens, cleaned as lower" in origins.describe()
