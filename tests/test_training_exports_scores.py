"""The card of an export has the scores of just its weights, with what they were measured on, or says there are none."""

import json
import shutil
from pathlib import Path

import pytest

from encoders.weights import identity_of
from errors import UserError
from pipelines.store.bases import adapter_identity
from pipelines.store.files import sha256_text
from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport
from training.exports.scores import describe_scores

NONE = ["", "## Scores", "", "None of these weights: an evaluation and a judge measure them before they are exported."]
FID = {"metric": "FID", "value": 31.25, "better": "lower", "num_images": 2048, "num_reference": 5000}
CLIP = {"metric": "CLIP score", "value": 0.29871, "better": "higher", "num_images": 2048, "num_reference": 0}
JUDGE = {"judge": "toyworld/weights/judge", "all": 0.9125, "extra": 0.5, "num_images": 300, "num_objects": 574}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "training" / "tune" / "step-5"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    return folder


def evaluate(run: Path, identity: str, **inputs: object) -> None:
    drawn = {"num_images": 2048, "solver": "dpm-solver++", "num_steps": 20, "guidance_scale": 4.5, "seed": 0}
    drawn |= {"size": "as trained", "prompts": "/data/coco.jsonl", "checkpoint_fingerprint": identity} | inputs
    numbers = [FID | {"network": "inception", "remark": "2,048 images are few"}, CLIP | {"network": "openai/clip"}]
    path = run / "evaluation" / "tune" / "scores.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"checkpoints": [{"title": "tune, step 5", "inputs": drawn, "numbers": numbers}]}))


def judge(run: Path, identity: str, *, samples: str | None = None) -> None:
    fingerprint = Fingerprint.of({"checkpoint": identity})
    directory = ShardDirectory(run / "samples" / "tune")
    directory.path.mkdir(parents=True)
    directory.write_marker(ShardReport(name="samples", source="s", num_read=1, num_kept=1), fingerprint)
    directory.write_manifest(fingerprint, ["samples"], upstream={"checkpoint": identity}, extra={})
    (run / "judge").mkdir()
    axes = [{"name": "count", "score": 0.5, "num_images": 300}]
    content = JUDGE | {"axes": axes, "samples_fingerprint": samples or fingerprint.digest}
    (run / "judge" / "tune.json").write_text(json.dumps(content))


def test_scores_are_told_with_what_they_were_measured_on(checkpoint: Path) -> None:
    run, identity = checkpoint.parent.parent.parent, identity_of(checkpoint / "model")
    evaluate(run, identity)
    judge(run, identity)
    said = "\n".join(describe_scores(checkpoint, "tune"))
    assert "of 2,048 images of the prompts of coco.jsonl: dpm-solver++, 20 steps, guidance 4.5, seed 0" in said
    assert (
        "| FID | 31.25 | lower | 2,048 images against 5,000 of a reference, by inception, 2,048 images are few |"
        in said
    )
    assert "| CLIP score | 0.2987 | higher | 2,048 images, by openai/clip |" in said
    assert "Judge toyworld/weights/judge, of samples/tune: 300 images, 574 objects." in said
    assert "| all | 0.9125 |" in said and "| count | 0.5 |" in said


def test_scores_of_other_weights_are_none_of_these(checkpoint: Path) -> None:
    run = checkpoint.parent.parent.parent
    assert list(describe_scores(checkpoint, "tune")) == NONE == list(describe_scores(None, None))
    evaluate(run, "sha256:another")
    judge(run, "sha256:another")
    assert list(describe_scores(checkpoint, "tune")) == NONE
    evaluate(run, identity_of(checkpoint / "model"), adapters=["style"])
    assert list(describe_scores(checkpoint, "tune")) == NONE


def test_a_judge_of_former_samples_is_not_heard(checkpoint: Path) -> None:
    judge(checkpoint.parent.parent.parent, identity_of(checkpoint / "model"), samples="of before")
    assert list(describe_scores(checkpoint, "tune")) == NONE


def test_adapters_have_the_scores_of_their_checkpoint(checkpoint: Path) -> None:
    shutil.move(checkpoint / "model", checkpoint / "adapter")
    (checkpoint / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    drawn_from = f"sha256:base+sha256:{sha256_text(adapter_identity(checkpoint / 'adapter'))}"
    evaluate(checkpoint.parent.parent.parent, drawn_from)
    assert "| FID | 31.25 |" in "\n".join(describe_scores(checkpoint, "tune"))


def test_damaged_scores_are_named(checkpoint: Path) -> None:
    evaluate(checkpoint.parent.parent.parent, "x")
    path = checkpoint.parent.parent.parent / "evaluation" / "tune" / "scores.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match=r"scores\.json .*move it away, and the card does without"):
        list(describe_scores(checkpoint, "tune"))
