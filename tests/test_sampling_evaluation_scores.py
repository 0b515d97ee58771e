"""`make eval`: the table with every input beside the number, resumed and compared; the curve over guidance."""

import csv
import json
import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import pydantic
import pytest
import torch
from feature_run import picture
from former_run import as_formerly, times_of
from PIL import Image
from sampling_run import PIXART, PROMPTS, make_run, randomised, save_checkpoint
from sound_run import require_sound
from tiny_clip import save_clip

from errors import UserError
from pipelines.recipe import Decides
from pipelines.store.manifest import Fingerprint, read_manifest
from pixart.model import PixArt
from sampling import renderer
from sampling.evaluation.__main__ import main
from sampling.evaluation.config import DECIDES_FEATURES, EvaluationConfig
from sampling.evaluation.distances import cmmd
from sampling.evaluation.networks import find_networks, load_network


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = make_run(tmp_path / "one")
    (tmp_path / "reference").mkdir()
    for number in range(6):
        picture(number).save(tmp_path / "reference" / f"{number}.png")
    return run


def write_recipe(run: Path, evaluation: dict, **sampling: object) -> Path:
    table = {"prompts": "{run}/raw/prompts.jsonl", "num_steps": 2, "text_dtype": "float32", "batch_size": 2} | sampling
    tables = {"engine": {"in_process": True, "samples_per_slice": 4}, "sampling": table, "evaluation": evaluation}
    lines = []
    for name, values in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path = run / "recipe.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def evaluate(run: Path, clip_folder: Path | None, *flags: str, task: str = "score", **evaluation: object) -> Path:
    table = {"reference": str(run.parent / "reference")} | evaluation
    if clip_folder is not None:
        table["clip"] = str(clip_folder)
    recipe = write_recipe(run, table)
    main([task, "--recipe", str(recipe), "--run", str(run), "--stage", "2", *flags])
    return run / "evaluation" / "stage2"


def count_draws(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    drawn: list[str] = []
    draw = renderer.Renderer.draw

    def recording(self, requests, *args, **kwargs):
        drawn.extend(request.file for request in requests)
        return draw(self, requests, *args, **kwargs)

    monkeypatch.setattr(renderer.Renderer, "draw", recording)
    return drawn


def embeddings_of(files, clip_folder):
    import torch

    from sampling.evaluation.config import EvaluationConfig

    (source,) = find_networks(EvaluationConfig(clip=str(clip_folder)))
    network = load_network(source, device="cpu")
    pixels = []
    for path in files:
        with Image.open(path) as image:
            pixels.append(torch.from_numpy(network.prepare(image.convert("RGB"))))
    return network.features(torch.stack(pixels)).double().numpy()


def test_the_table_has_every_input_beside_the_number(run, clip_folder):
    folder = evaluate(run, clip_folder)
    require_sound(run)
    value = json.loads((folder / "scores.json").read_text())
    (row,) = value["checkpoints"]
    numbers = {number["metric"]: number for number in row["numbers"]}
    assert list(numbers) == ["CLIP-MMD", "CLIP-FD", "CLIP score"]
    samples = [run / "samples" / "stage2" / f"{prompt['key']}.png" for prompt in PROMPTS]
    reference = sorted((run.parent / "reference").glob("*.png"))
    expected = cmmd(embeddings_of(samples, clip_folder), embeddings_of(reference, clip_folder))
    assert numbers["CLIP-MMD"]["value"] == pytest.approx(expected, rel=1e-3)
    for number in numbers.values():
        assert number["num_images"] == 3 and number["network"] == str(clip_folder)
        assert number["network_fingerprint"].startswith("sha256:") and "bicubic" in number["resizer"]
    assert numbers["CLIP-FD"]["num_reference"] == 6 and "few" in numbers["CLIP-FD"]["remark"]
    assert row["inputs"]["weights"] == "ema" and row["inputs"]["seed"] == 0 and row["inputs"]["num_steps"] == 2
    assert value["inputs"]["packages"].keys() >= {"torch", "transformers", "pillow"}
    text = (folder / "scores.md").read_text()
    for shown in (
        row["inputs"]["checkpoint_fingerprint"],
        value["inputs"]["reference"]["fingerprint"],
        value["inputs"]["packages"]["torch"],
        "shortest side 16, centre crop 16x16",
        "prompts.jsonl",
        "below 2,048",
    ):
        assert shown in text
    manifest = read_manifest(folder)
    assert manifest.num_read == manifest.num_kept == 1
    assert json.loads((run / "summary.json").read_text())["evaluation"]["stage2"].keys() == numbers.keys()


def test_a_second_run_draws_and_measures_nothing(run, clip_folder, monkeypatch, capsys):
    folder = evaluate(run, clip_folder)
    before = (folder / "scores.json").stat().st_mtime_ns
    drawn = count_draws(monkeypatch)
    monkeypatch.setattr("sampling.evaluation.features.load_network", None)
    evaluate(run, clip_folder)
    assert (folder / "scores.json").stat().st_mtime_ns == before and drawn == []
    assert "nothing to do" in capsys.readouterr().err
    monkeypatch.undo()
    # So are another bound of what is usable, and another checkpoint.
    evaluate(run, clip_folder, max_pixels=100_000)
    assert (folder / "scores.json").stat().st_mtime_ns > before
    before = (folder / "scores.json").stat().st_mtime_ns
    save_checkpoint(run, 2, randomised(PixArt(PIXART), seed=1), step=8)
    evaluate(run, clip_folder)
    assert (folder / "scores.json").stat().st_mtime_ns > before


class LaterEvaluation(EvaluationConfig):
    """`[evaluation]` with keys that there are not yet."""

    sharpened: Decides[Annotated[bool, DECIDES_FEATURES]] = pydantic.Field(default=False, description="decides scores")
    patience: int = pydantic.Field(default=3, description="decides nothing")


@pytest.mark.parametrize("is_former", [False, True], ids=["now", "formerly"])
def test_a_new_key_measures_nothing_again(run, clip_folder, monkeypatch, is_former):
    folder = evaluate(run, clip_folder)
    cache = folder.parent / "cache"
    assert not {"max_pixels", "max_reject_fraction"} & read_manifest(folder).fingerprint.fields.keys()
    if is_former:
        as_formerly(folder, EvaluationConfig.fingerprint_defaults())
        for features in list(cache.glob("clip-*")):
            digest = as_formerly(features, EvaluationConfig.fingerprint_defaults(DECIDES_FEATURES))
            features.rename(cache / f"clip-{digest[:16]}")
    before, num_sets = times_of(folder), len(list(cache.glob("clip-*")))
    for module in ("scores", "features", "contestants"):
        monkeypatch.setattr(f"sampling.evaluation.{module}.EvaluationConfig", LaterEvaluation)
    evaluate(run, clip_folder, patience=9)
    assert times_of(folder) == before and len(list(cache.glob("clip-*"))) == num_sets
    # Features of images are kept when only the report is lost, and are others under another setting.
    (folder / "manifest.json").unlink()
    evaluate(run, clip_folder)
    assert len(list(cache.glob("clip-*"))) == num_sets
    evaluate(run, clip_folder, sharpened=True)
    assert len(list(cache.glob("clip-*"))) == 2 * num_sets


def test_checkpoints_are_compared_in_one_table(run, clip_folder, tmp_path):
    other = make_run(tmp_path / "two")
    save_checkpoint(other, 2, randomised(PixArt(PIXART), seed=5), step=9)
    folder = evaluate(run, clip_folder, compare=[f"{other}:stage2"])
    rows = json.loads((folder / "scores.json").read_text())["checkpoints"]
    assert [row["title"] for row in rows] == ["stage 2, step 7", "stage 2, step 9"]
    assert rows[0]["inputs"]["samples"] == str(run / "samples" / "stage2")
    assert Path(rows[1]["inputs"]["samples"]).parent == run / "evaluation" / "samples"
    assert rows[0]["inputs"]["prompts"] == rows[1]["inputs"]["prompts"]
    first, second = ({number["metric"]: number["value"] for number in row["numbers"]} for row in rows)
    assert first != second and first.keys() == second.keys()
    assert not (other / "samples").exists()
    with pytest.raises(UserError, match=r"evaluation\.compare: .* are the same weights"):
        evaluate(run, clip_folder, compare=[f"{run}:stage2"])


def test_an_interrupted_evaluation_continues(run, clip_folder, monkeypatch):
    from sampling.evaluation import features

    with monkeypatch.context() as patch:
        patch.setattr(features, "load_network", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, clip_folder)
    assert not (run / "evaluation" / "stage2" / "scores.json").exists()
    drawn = count_draws(monkeypatch)
    assert (evaluate(run, clip_folder) / "scores.json").is_file()
    assert drawn == []


def test_benchmark_prompts_are_drawn_into_a_folder_of_their_own(run, clip_folder, monkeypatch):
    (run.parent / "dataset").mkdir()
    (run.parent / "dataset" / "color_val.txt").write_text("a green bench and a blue bowl\na red car\n")
    table = {"prompt_set": "t2i-compbench", "prompts": str(run.parent / "dataset")}
    # The recipe's own prompts are in another column.
    n = ("--set", "sampling.images_per_prompt=2", "--set", "sampling.prompt_column=caption")
    drawn = count_draws(monkeypatch)
    folder = evaluate(run, clip_folder, *n, **table)
    expected = ["color-0000-1.png", "color-0000.png", "color-0001-1.png", "color-0001.png"]
    assert sorted(drawn) == expected
    samples = run / "evaluation" / "samples" / "stage2-t2i-compbench"
    assert sorted(path.name for path in samples.glob("color*.png")) == expected
    (samples / "color-0001.png").unlink()
    drawn.clear()
    evaluate(run, clip_folder, *n, **table)
    # Nothing but the batch that the missing image belongs to.
    assert "color-0001.png" in drawn and len(drawn) <= 2
    assert json.loads((folder / "scores.json").read_text())["checkpoints"][0]["inputs"]["num_images"] == 4
    assert not (run / "samples").exists()


def of_the_samples(run: Path) -> dict[str, str]:
    """What says that a judgement is of just these samples."""
    manifest = read_manifest(run / "samples" / "stage2")
    return {
        "samples_fingerprint": manifest.fingerprint.digest,
        "samples_source": manifest.shards["samples"].source,
    }


def test_a_judges_axes_stand_in_the_table_where_it_saw_these_samples(run, clip_folder, capsys):
    folder = evaluate(run, clip_folder)
    axes = [{"name": name, "score": 0.75, "num_images": 4} for name in ("shape_binding", "spatial")]
    axes += [{"name": "artefacts", "score": 0.5, "num_images": 3, "better": "lower"}]
    axes += [{"name": "count", "score": 0.0, "num_images": 0}]
    judged = {"judge": "someone/judge", "judge_fingerprint": "sha256:1", "axes": axes, "mine": [1]}
    # as it was written before axes had an order
    by_name = {"axes": {axis["name"]: {"score": axis["score"], "num_images": axis["num_images"]} for axis in axes}}
    (run / "judge").mkdir()
    of_these = of_the_samples(run)
    for seen, is_shown in (
        ({}, True),
        ({"samples_fingerprint": "a"}, False),
        ({"samples_source": "other"}, False),
        (by_name, True),
    ):
        (run / "judge" / "stage2.json").write_text(json.dumps(judged | of_these | seen))
        evaluate(run, clip_folder)
        numbers = json.loads((folder / "scores.json").read_text())["checkpoints"][0]["numbers"]
        names = [number["metric"] for number in numbers if number["metric"].startswith("judge")]
        assert names == (["judge shape binding", "judge spatial", "judge artefacts"] if is_shown else [])
        if is_shown:
            assert numbers[-1]["better"] == ("lower" if "axes" not in seen else "higher")
            assert (numbers[-1]["network"], numbers[-1]["num_images"]) == ("someone/judge", 3)
    assert "is of other samples" in capsys.readouterr().err


def as_before_methods(folder: Path) -> dict[Path, bytes]:
    """Rewrite finished scores' fingerprint as it was when a judge's numbers stood in it whole; returns all bytes."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    rows = json.loads((folder / "scores.json").read_text())["checkpoints"]
    # The table's order of that time, and a method that the judge's file did not hold.
    judged = [
        {**number, "resizer": "crops"}
        for number in reversed(rows[0]["numbers"])
        if number["metric"].startswith("judge")
    ]
    former = Fingerprint.of(manifest["fingerprint"]["fields"] | {"judged": {"stage2": judged}})
    path.write_text(json.dumps(manifest | {"fingerprint": {"fields": former.fields, "digest": former.digest}}))
    marker = folder / ".done" / "scores.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"fingerprint": former.digest}))
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_scores_of_before_judges_said_their_method_stay_done(run, clip_folder):
    folder = evaluate(run, clip_folder)
    (run / "judge").mkdir()
    axes = {name: {"score": 0.75, "num_images": 4} for name in ("colour_binding", "complex", "spatial")}
    judged = {"judge": "someone/judge", "judge_fingerprint": "sha256:1", **of_the_samples(run)}
    (run / "judge" / "stage2.json").write_text(json.dumps(judged | {"axes": axes}))
    evaluate(run, clip_folder)
    before = as_before_methods(folder)
    evaluate(run, clip_folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    (run / "judge" / "stage2.json").write_text(json.dumps(judged | {"axes": axes, "judge_fingerprint": "sha256:2"}))
    evaluate(run, clip_folder)
    numbers = json.loads((folder / "scores.json").read_text())["checkpoints"][0]["numbers"]
    assert numbers[-1]["network_fingerprint"] == "sha256:2", "another judge"


def test_judgements_may_lie_anywhere_and_a_bad_one_is_named(run, clip_folder, tmp_path, capsys):
    axis = {"name": "spatial", "score": 0.75, "num_images": 4}
    evaluate(run, clip_folder, judgements=str(tmp_path / "votes-{samples}.json"))
    assert f"evaluation.judgements: {tmp_path / 'votes-stage2.json'} does not exist" in capsys.readouterr().err.replace(
        "\n", ""
    )
    path = tmp_path / "votes-stage2.json"
    judged = {"judge": "votes", "judge_fingerprint": "1", **of_the_samples(run)}
    path.write_text(json.dumps(judged | {"axes": [axis]}))
    evaluate(run, None, judgements=str(tmp_path / "votes-{samples}.json"))
    numbers = json.loads((run / "evaluation" / "stage2" / "scores.json").read_text())["checkpoints"][0]["numbers"]
    assert [number["metric"] for number in numbers] == ["judge spatial"]
    for text, message in (
        (
            json.dumps(judged | {"axes": [axis | {"score": "high"}]}),
            r"stage2\.json: axes\.0\.score: Input should",
        ),
        (json.dumps(judged), r"votes-stage2\.json: axes: Field required"),
        ("[", r"evaluation\.judgements .*votes-stage2\.json: Invalid JSON"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            evaluate(run, clip_folder, judgements=str(path))


def test_the_curve_has_a_point_per_guidance_scale(run, clip_folder, monkeypatch):
    drawn = count_draws(monkeypatch)
    evaluate(run, clip_folder, task="curve", guidance_scales=[1.0, 4.0])
    assert len(drawn) == 6
    folder = run / "evaluation" / "stage2-curve"
    with (folder / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["guidance_scale"] for row in rows] == ["1", "4"]
    assert all(np.isfinite(float(row[name])) for row in rows for name in ("CLIP-MMD", "CLIP-FD", "CLIP score"))
    assert rows[0]["CLIP-FD"] != rows[1]["CLIP-FD"]
    page = (folder / "curve.html").read_text()
    assert "CLIP-FD over CLIP score" in page and "<script src" not in page and "<link" not in page
    drawn.clear()
    evaluate(run, clip_folder, task="curve", guidance_scales=[1.0, 4.0])
    assert drawn == []


def test_plan_writes_nothing(run, clip_folder, capsys):
    evaluate(run, clip_folder, "--plan")
    evaluate(run, clip_folder, "--plan", task="curve", guidance_scales=[1.0, 4.0])
    printed = " ".join(capsys.readouterr().err.split())
    assert "would draw 3 of 3 images" in printed and "guidance 4: would draw 3 of 3" in printed
    assert not (run / "samples").exists() and not (run / "evaluation").exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"reference": "no/such"}, r"evaluation\.reference no/such is no folder"),
        ({"clip": "nobody/clip"}, r"evaluation\.clip = 'nobody/clip'"),
        ({"compare": ["no/run:stage2"]}, r"make train RUN=no/run STAGE=stage2"),
        ({"guidance_scales": [0.5, 2.0]}, "at least 1"),
        ({"prompt_set": "coco", "prompts": "none.json"}, r"captions_val2014\.json"),
        ({"colour": 1}, r"evaluation\.colour is not a known key"),
    ],
)
def test_mistakes_get_one_clear_line_and_draw_nothing(run, clip_folder, table, message):
    with pytest.raises(UserError, match=message):
        evaluate(run, None, **({"clip": str(clip_folder)} | table))
    assert not (run / "samples").exists()


def test_without_a_reference_there_is_a_clip_score_and_no_distance(run, clip_folder):
    recipe = write_recipe(run, {"clip": str(clip_folder)})
    flags = ["--recipe", str(recipe), "--run", str(run), "--stage", "2"]
    main(["score", *flags])
    value = json.loads((run / "evaluation" / "stage2" / "scores.json").read_text())
    assert [number["metric"] for number in value["checkpoints"][0]["numbers"]] == ["CLIP score"]
    assert value["inputs"]["reference"] is None
    with pytest.raises(UserError, match=r"evaluation\.vision is set, but evaluation\.reference is not"):
        main(["score", *flags, "--set", "evaluation.vision=toyworld/weights/llava"])


@pytest.mark.parametrize("flags", [[], ["--plan"]])
def test_nothing_to_measure_is_said_before_anything_is_drawn(run, flags):
    with pytest.raises(UserError, match=r"evaluation\.inception.*let a judge look.*write .*judge/stage2\.json"):
        evaluate(run, None, *flags)
    with pytest.raises(UserError, match=r"a curve needs evaluation\.inception, evaluation\.clip or evaluation\.vision"):
        evaluate(run, None, *flags, task="curve")
    with pytest.raises(UserError, match=r"preference-key\.json does not exist"):
        evaluate(run, None, *flags, task="winrates")
    assert not (run / "samples").exists() and not (run / "evaluation" / "samples").exists()


@pytest.mark.parametrize("flags", [[], ["--plan"]])
def test_networks_that_cannot_be_loaded_are_named_before_anything_is_drawn(run, clip_folder, tmp_path, flags):
    bare = tmp_path / "bare"
    shutil.copytree(clip_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=r"evaluation\.clip '.*bare' cannot be loaded: the folder holds no weights"):
        evaluate(run, bare, *flags)
    (bare / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=r"evaluation\.clip .*model\.safetensors is a pointer of git-lfs"):
        evaluate(run, bare, *flags)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"evaluation\.inception .*other\.pth"):
        evaluate(run, None, *flags, inception=str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match=r"evaluation\.device is cuda, but torch .* sees no GPU: set evaluation"):
        evaluate(run, clip_folder, *flags, device="cuda")
    assert not (run / "samples").exists()
