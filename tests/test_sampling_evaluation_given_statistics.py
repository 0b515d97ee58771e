"""A reference of which there are statistics and no images: `.npz` files in the published layouts."""

import json

import numpy as np
import pytest
import torch
from sampling_run import make_run
from tiny_clip import save_clip

from encoders.inception import InceptionV3
from errors import MissingFileError, UserError
from sampling.evaluation.__main__ import main
from sampling.evaluation.given_statistics import INCEPTION_WIDTH, read_statistics

SHAPE = (INCEPTION_WIDTH, INCEPTION_WIDTH)


def write(path, **arrays):
    given = {"mu": np.full(INCEPTION_WIDTH, 0.5), "sigma": np.eye(*SHAPE, dtype=np.float32)} | arrays
    np.savez(path, **{name: array for name, array in given.items() if array is not None})
    return path


def test_statistics_are_read_as_pytorch_fid_and_adm_write_them(tmp_path):
    # ADM's have images beside them, and statistics of another layer.
    path = write(tmp_path / "adm.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), mu_s=np.zeros(7), sigma_s=np.eye(7))
    found = read_statistics("{run}/adm.npz", run=tmp_path)
    assert found.gaussian.mean.dtype == np.float64 and found.gaussian.covariance.shape == SHAPE
    assert found.identity.startswith("sha256:") and found.name == str(path)
    assert (found.gaussian.mean == 0.5).all() and (found.gaussian.covariance == np.eye(*SHAPE)).all()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"sigma": None}, "has no array 'sigma', but mu"),
        ({"mu": np.zeros(3)}, r"mu is \[3\] and sigma \[2048, 2048\], but those of Inception are \[2048\]"),
        ({"mu": np.full(INCEPTION_WIDTH, np.nan)}, "not finite"),
        ({"sigma": np.triu(np.ones(SHAPE))}, "not symmetric"),
        ({"sigma": -np.eye(*SHAPE)}, "negative variance, -1"),
    ],
)
def test_what_is_no_statistics_of_inception_is_said(tmp_path, arrays, message):
    path = write(tmp_path / "given.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_statistics(str(path), run=tmp_path)


def test_a_file_that_is_cut_or_gone_is_said(tmp_path):
    path = write(tmp_path / "given.npz")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"is no readable \.npz file"):
        read_statistics(str(path), run=tmp_path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))  # one array, whatever the name says
    with pytest.raises(UserError, match=r"is no readable \.npz file"):
        read_statistics(str(path), run=tmp_path)
    with pytest.raises(MissingFileError, match="does not exist"):
        read_statistics("none.npz", run=tmp_path)


def test_a_distance_to_given_statistics_says_so_and_has_their_hash_beside_it(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    weights = {name: value for name, value in InceptionV3().state_dict().items() if "num_batches" not in name}
    torch.save(weights, tmp_path / "inception.pth")
    path = write(tmp_path / "given.npz")
    evaluation = {"reference": str(path), "inception": str(tmp_path / "inception.pth")}
    # A root of 2048 by 2048 takes seconds, and is tested elsewhere.
    monkeypatch.setattr(
        "sampling.evaluation.scores.frechet_distance", lambda own, given: own.num_images + given.mean[0]
    )

    def score(**more):
        lines = [f"{key} = {json.dumps(value)}" for key, value in (evaluation | more).items()]
        sampling = ['prompts = "{run}/raw/prompts.jsonl"', "num_steps = 1", 'text_dtype = "float32"']
        recipe = ["[engine]", "in_process = true", "[sampling]", *sampling, "[evaluation]", *lines]
        (run / "recipe.toml").write_text("\n".join(recipe))
        main(["score", "--recipe", str(run / "recipe.toml"), "--run", str(run), "--stage", "2"])
        return json.loads((run / "evaluation" / "stage2" / "scores.json").read_text())

    value = score()
    (number,) = value["checkpoints"][0]["numbers"]
    assert number["metric"] == "FD-Inception to given statistics" and number["num_reference"] == 0
    given = read_statistics(str(path), run=run)
    assert number["value"] == 3.5
    assert "is not in their file" in number["remark"] and "3 images are few" in number["remark"]
    assert given.identity in (run / "evaluation" / "stage2" / "scores.md").read_text()
    with pytest.raises(UserError, match=r"evaluation\.vision is set, but evaluation\.reference .* statistics of"):
        score(vision="toyworld/weights/llava")
    names = [number["metric"] for number in score(clip=str(save_clip(tmp_path / "clip")))["checkpoints"][0]["numbers"]]
    assert names == ["FD-Inception to given statistics", "CLIP score"]
