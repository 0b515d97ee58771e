"""What is decided before ranks start: settings, features, starting point, and refusals that name the field."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_checkpoint
from training_run import REPOSITORY, arguments, make_run, write_text

from errors import UserError
from pipelines.command import parse_command
from pipelines.recipe import ModelConfig, load_recipe
from pipelines.store.families import text_directory
from pixart.processes.specs import flow_spec
from training.config import StageTraining, random_stream, stage_training
from training.loop.schedule import learning_rate_at
from training.stages.resume import changes_since
from training.stages.stage import TrainingJob, open_stage


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def job_of(run: Path, stage: int | str, **settings: object) -> TrainingJob:
    return open_stage(parse_command("training", "", argv=arguments(run, stage, **settings), has_stages=True))


def job_with(run: Path, override: str) -> TrainingJob:
    argv = [*arguments(run, 2, starts_from="scratch"), "--set", override]
    return open_stage(parse_command("training", "", argv=argv, has_stages=True))


def write_checkpoint(job: TrainingJob, *, step: int, num_steps: int = 12) -> Path:
    trainer = {
        "num_steps": num_steps,
        "starts_from": job.settings.starts_from,
        "plan_fingerprint": job.fingerprint.digest,
        "fingerprint": job.fingerprint.fields,
    }
    folder = tiny_checkpoint.write_checkpoint(job.directory, step, trainer=trainer)
    (job.directory / "latest").write_text(f"step-{step}\n")
    return folder


def test_a_stage_overrides_the_shared_table() -> None:
    rates = ["training.learning_rate=3e-3", "training.stage1.learning_rate=1e-3"]
    recipe = load_recipe(REPOSITORY / "recipes" / "toyworld.toml", rates)
    assert [stage_training(recipe, stage).learning_rate for stage in ("stage1", "stage2")] == [1e-3, 3e-3]
    assert stage_training(recipe, "stage2").starts_from == "stage1"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stage2.learning_rat=1", r"training\.stage2\.learning_rat is not a known key"),
        ("training.stage3.zero_stage=4", r"training\.stage3\.zero_stage = 4"),
        ("training.dtype='fp16'", r"training\.dtype = 'fp16'"),
        ("training.num_steps='100'", r"training\.num_steps = '100'"),
    ],
)
def test_a_wrong_key_is_named_with_its_table(override: str, message: str) -> None:
    recipe = load_recipe(REPOSITORY / "recipes" / "toyworld.toml", [override])
    with pytest.raises(UserError, match=message):
        stage_training(recipe, "stage2")


def test_features_must_exist_and_be_what_the_recipe_says(run: Path) -> None:
    with pytest.raises(UserError, match="max_tokens is 12, but 20 is needed"):
        job_with(run, "features.max_tokens=20")
    with pytest.raises(UserError, match="vae_model is 'toy/vae', but 'other/vae' is needed"):
        job_with(run, "features.vae_model=other/vae")
    with pytest.raises(FileNotFoundError, match=r"latent-512 does not exist.*run `make features STAGE=stage2 RUN="):
        job_with(run, "features.stage2.resolution=512")
    with pytest.raises(UserError, match=r"features\.stage2\.shards: pattern 'sa_\*' matches none"):
        job_with(run, 'features.stage2.shards=["sa_*"]')
    shutil.rmtree(text_directory(run))
    write_text(run, {"laion_0": 40})
    with pytest.raises(UserError, match="lacks shard laion_1"):
        job_of(run, 2, starts_from="scratch")


def test_stale_features_are_refused_naming_the_field(run: Path) -> None:
    job = job_of(run, 2, starts_from="scratch")
    write_checkpoint(job, step=6)
    assert job_of(run, 2, starts_from="scratch", num_steps=50, log_every=7).resume is not None, "these may change"
    with pytest.raises(UserError, match=r"trained with training\.stage2\.learning_rate 0\.001, but it is 0\.5 now"):
        job_of(run, 2, starts_from="scratch", learning_rate=0.5)
    shutil.rmtree(text_directory(run))
    write_text(run, {"laion_0": 40, "laion_1": 23, "hq_0": 60}, max_tokens=11)
    recipe = (run.parent / "recipe.toml").read_text()
    (run.parent / "recipe.toml").write_text(recipe.replace("max_tokens = 12", "max_tokens = 11"))
    with pytest.raises(UserError, match=r"trained with text\.max_tokens 12, but it is 11 now"):
        job_of(run, 2, starts_from="scratch")


def test_a_refused_resume_says_how_to_go_on_first_and_the_table_it_names_starts(run: Path) -> None:
    folder = write_checkpoint(job_of(run, 2, starts_from="scratch"), step=6)
    with pytest.raises(UserError) as refusal:
        job_of(run, 2, starts_from="scratch", learning_rate=0.5, seed=7)
    said = str(refusal.value)
    assert "also training.stage2.seed 0 -> 7" in said
    assert said.index(f"starts_from = '{folder}/model'") < said.index("set training.stage2.learning_rate back")
    assert said.index("learning_rate back") < said.index(f"Only to train anew, remove {folder.parent}")
    table = {"extends": "stage2", "features": "stage2", "starts_from": f"{folder}/model"}
    assert all(f"{name} = '{value}'" in said for name, value in table.items()) and "[training.stage2-next]" in said
    recipe = run.parent / "recipe.toml"
    lines = [f'{name} = "{value}"' for name, value in table.items()]
    recipe.write_text("\n".join([recipe.read_text(), "[training.stage2-next]", *lines]))
    onward = job_of(run, "stage2-next", learning_rate=0.5, seed=7)
    assert onward.start.path == folder / "model" and onward.resume is None


def test_a_resume_refused_for_its_shape_its_start_or_its_features_says_what_to_set_back(run: Path) -> None:
    first = write_checkpoint(job_of(run, 1), step=12)
    folder = write_checkpoint(job_of(run, 2), step=6)
    recipe = run.parent / "recipe.toml"
    was = recipe.read_text()
    recipe.write_text(was.replace("num_layers = 2", "num_layers = 3"))
    with pytest.raises(
        UserError, match=r"with model\.num_layers 2, but it is 3 now.* set model\.num_layers back"
    ) as said:
        job_of(run, 2)
    recipe.write_text(was)
    assert "stage2-next" not in str(said.value), "weights of another shape do not start it"
    recipe.write_text(was.replace('network = "pixart"', 'network = "dit"'))
    with pytest.raises(
        UserError, match=r"training\.stage2\.network 'pixart', but it is .*\.network back: they"
    ) as said:
        job_of(run, 2)
    recipe.write_text(was)
    assert "stage2-next" not in str(said.value), "a PixArt does not start a DiT"
    longer = write_checkpoint(job_of(run, 1, num_steps=24), step=24, num_steps=24)
    with pytest.raises(UserError, match=rf"to go on as it was, set training\.stage2\.starts_from = '{first}'"):
        job_of(run, 2)
    assert job_of(run, 2, starts_from=str(first)).resume is not None
    shutil.rmtree(first)
    with pytest.raises(UserError, match=r"starts_from back to the weights it had \('stage1' when it began\)"):
        job_of(run, 2)
    shutil.rmtree(longer)

    former = run.rename(run.parent / "former")
    folder = former / folder.relative_to(run)
    run = make_run(run.parent)
    shutil.copytree(folder.parent, run / "training" / "stage2")
    shutil.rmtree(text_directory(run))
    write_text(run, {"laion_0": 40, "laion_1": 23, "hq_0": 60}, seed=1)
    with pytest.raises(UserError, match=r"text\.files .* or read them from a run .* training\.stage2\.datasets = \["):
        job_of(run, 2)
    shutil.rmtree(run / "features")
    datasets = f"[training.stage2]\ndatasets = [{{ run = '{former}' }}]"
    recipe.write_text(was.replace("[training.stage2]", datasets))
    assert job_of(run, 2).resume is not None


@pytest.mark.parametrize(
    ("step", "num_steps", "shape", "said"),
    [
        (20, 40, "linear", "rate was 0.000143 at step 20 and is 0.001 at step 21 now"),
        (15, 18, "linear", "rate was 0.000714 at step 16 and is 0.000469 at step 16 now"),
        (15, 18, "cosine", "rate was 0.000812 at step 16 and is 0.000451 at step 16 now"),
        (15, 18, "sqrt", "rate was 0.000465 at step 16 and is 0.000271 at step 16 now"),
        (5, 40, "sqrt", "rate is 0.001 at step 6 as before, but decay_fraction 0.3 has it fall from step 29 on, not"),
    ],
)
def test_a_resume_says_what_other_steps_do_to_the_learning_rate(
    run: Path, step: int, num_steps: int, shape: str, said: str
) -> None:
    decay = {"starts_from": "scratch", "decay_fraction": 0.3, "decay_shape": shape}
    write_checkpoint(job_of(run, 2, **decay, num_steps=20), step=step, num_steps=20)
    (change,) = changes_of(job_of(run, 2, **decay, num_steps=num_steps))
    assert change.startswith(f"training.stage2.num_steps: 20 -> {num_steps}; the learning {said}")
    assert ("keep num_steps = 20 and train on in [training.stage2-next]" in change) == (step != 5)
    assert changes_of(job_of(run, 2, **decay, num_steps=20)) == []


@pytest.mark.parametrize(
    ("fraction", "num_steps", "first"), [(0.9, 100, 11), (0.3, 20, 15), (0.3, 18, 13), (0.7, 9, 3)]
)
def test_the_step_from_which_the_rate_is_said_to_fall_is_the_first_below_it(
    run: Path, fraction: float, num_steps: int, first: int
) -> None:
    decay = {"starts_from": "scratch", "decay_fraction": fraction, "warmup_steps": 0}
    settings = job_of(run, 2, **decay, num_steps=num_steps).settings
    assert learning_rate_at(settings, first - 1) < learning_rate_at(settings, first - 2)
    assert learning_rate_at(settings, first - 2) == pytest.approx(settings.learning_rate)
    write_checkpoint(job_of(run, 2, **decay, num_steps=num_steps), step=1, num_steps=num_steps)
    (change,) = changes_of(job_of(run, 2, **decay, num_steps=num_steps * 3))
    assert change.endswith(f"not from {first}")


def test_a_resume_says_each_setting_that_may_change_and_steers_what_comes(run: Path) -> None:
    job = job_of(run, 2, starts_from="scratch", gradient_accumulation_steps=1)
    folder = write_checkpoint(job, step=6)
    other = {"num_steps": 24, "gradient_accumulation_steps": 2, "num_validation_samples": 8, "log_every": 3}
    resumed = job_of(run, 2, starts_from="scratch", **other)
    assert changes_of(resumed) == ["training.stage2.num_steps: 12 -> 24"], "all that an old checkpoint tells"
    trainer = json.loads((folder / "trainer.json").read_text()) | {"steering": job.settings.steering}
    (folder / "trainer.json").write_text(json.dumps(trainer))
    assert changes_of(job_of(run, 2, starts_from="scratch", **other), num_ranks=2) == [
        "training.stage2.num_steps: 12 -> 24",
        "training.stage2.gradient_accumulation_steps: 1 -> 2; the same samples, but sums are rounded otherwise",
        "training.stage2.num_validation_samples: 2048 -> 8; validation losses before and after are of other samples",
        "ranks: 1 -> 2; the same samples, but sums are rounded otherwise",
    ]
    assert changes_of(job_of(run, 2, starts_from="scratch", gradient_accumulation_steps=1)) == []


def changes_of(job: TrainingJob, *, num_ranks: int = 1) -> list[str]:
    assert job.resume is not None
    return changes_since(job.resume, job.settings, num_ranks=num_ranks, table_name=job.features.table_name)


def test_stages_start_from_the_former_one(run: Path) -> None:
    assert job_of(run, 1).start.path is None
    with pytest.raises(FileNotFoundError, match=r"stage1 has no checkpoint.*run `make train STAGE=stage1"):
        job_of(run, 2)
    first = write_checkpoint(job_of(run, 1), step=6)
    with pytest.raises(UserError, match=r"stage1 has done 6 of 12 steps; finish that stage first"):
        job_of(run, 2)
    shutil.rmtree(first)
    folder = write_checkpoint(job_of(run, 1), step=12)
    assert job_of(run, 2).start.path == folder / "model"
    assert job_of(run, 2, starts_from=str(folder)).start == job_of(run, 2).start
    with pytest.raises(UserError, match="is this stage's own folder; resuming is automatic"):
        job_of(run, 1, starts_from="{run}/training/stage1")
    with pytest.raises(FileNotFoundError, match="model folder /nowhere/at/all does not exist"):
        job_of(run, 2, starts_from="/nowhere/at/all")


def test_a_stage_that_has_begun_needs_its_start_no_more(run: Path) -> None:
    start = write_checkpoint(job_of(run, 1), step=12)
    begun = job_of(run, 2)
    (start / "model" / "config.json").write_bytes(b"")
    with pytest.raises(UserError, match=r"stage1/step-12 is damaged: model/config\.json is empty; no intact"):
        job_of(run, 2)
    write_checkpoint(begun, step=6)
    assert job_of(run, 2).fingerprint == begun.fingerprint
    shutil.rmtree(run / "training" / "stage1")
    job = job_of(run, 2)
    assert job.start.path is None
    assert job.fingerprint == begun.fingerprint
    assert job.resume is not None and job.resume.step == 6
    with pytest.raises(FileNotFoundError, match="/nowhere/at/all does not exist"):  # is another start, and not gone
        job_of(run, 2, starts_from="/nowhere/at/all")


def test_a_longer_former_stage_does_not_hold_up_one_that_has_begun(run: Path) -> None:
    write_checkpoint(job_of(run, 1), step=12, num_steps=12)
    begun = job_of(run, 2)
    recipe = run.parent / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("num_steps = 12", "num_steps = 24"))
    assert job_of(run, 2).start == begun.start, "the former stage is at the end it was given"
    write_checkpoint(begun, step=6, num_steps=24)
    assert job_of(run, 2).resume is not None


def test_random_numbers_of_a_stage_are_those_it_always_had() -> None:
    names = ["stage1", "stage2", "stage3", "stage3-512", "dreambooth", "lora"]
    streams = [random_stream(name) for name in names]
    assert streams[:4] == [1, 2, 3, 3]
    assert streams[4] != streams[5] and min(streams[4:]) > 1000
    assert max(streams) < 2**63


def test_a_stage_of_any_name_reads_and_starts_from_what_its_table_says(run: Path) -> None:
    folder = write_checkpoint(job_of(run, 2, starts_from="scratch"), step=12)
    recipe = run.parent / "recipe.toml"
    recipe.write_text(
        recipe.read_text()
        + '\n[training.faces]\nextends = "stage3"\nfeatures = "stage2"\nstarts_from = "stage2"\nnum_steps = 3\n'
    )
    job = job_of(run, "faces")
    assert (job.settings.num_steps, job.settings.interpolation_scale) == (3, 2.0)
    assert job.directory == run / "training" / "faces"
    assert job.start.path == folder / "model"
    assert job.features.table_name == "stage2" and job.features.datasets[0].shards == ["laion_0", "laion_1"]
    same = job_of(run, "faces", starts_from="{run}/training/stage2")
    assert same.fingerprint == job.fingerprint


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("faces", "", r"no \[training\.faces\]; the tables of \[training\] are: stage1, stage2, stage3$"),
        (2, "features=faces", r"training\.stage2 reads \[features\.faces\], which is missing.*stage1, stage2, stage3$"),
        (2, "features=stage1", r"training\.stage2\.network = 'pixart' reads text, but features\.stage1\.text = false"),
        (2, "starts_from=stage9", r"starts_from = 'stage9' is no stage of .* \(stage1, stage2, stage3\), and no file"),
        (2, "starts_from=stage2", "is this stage's own folder"),
        (2, "extends=stage2", "training.stage2.extends = 'stage2' goes in a circle"),
        (2, "extends=stage9", "training.stage2.extends = 'stage9' names no table"),
        (2, "objective=guess", r"training\.stage2\.objective = 'guess': Input should be 'denoise'"),
        (2, "network=unet", r"training\.stage2\.network = 'unet': Input should be 'dit', 'pixart' or 'vae'"),
        (2, "init_from=scratch", r"training\.stage2\.init_from is called starts_from now"),
    ],
)
def test_what_a_stage_cannot_be_is_one_line(run: Path, stage: int | str, override: str, message: str) -> None:
    argv = arguments(run, stage)
    argv += ["--set", f"training.{{stage}}.{override}"] if override else []
    with pytest.raises(UserError, match=message) as error:
        open_stage(parse_command("training", "", argv=argv, has_stages=True))
    assert "\n" not in str(error.value)


def test_a_stage_without_a_network_is_told_what_one_is(run: Path) -> None:
    recipe = run.parent / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('network = "dit"', ""))
    with pytest.raises(
        UserError, match=r"training\.stage1\.network is missing: What is trained: dit reads class labels"
    ):
        job_of(run, 1)


def test_another_process_than_the_checkpoints_is_refused(run: Path) -> None:
    write_checkpoint(job_of(run, 2, starts_from="scratch"), step=6)
    with pytest.raises(UserError, match=r"trained with training\.stage2\.process 'ddpm', but it is 'flow' now"):
        job_of(run, 2, starts_from="scratch", process="flow")


def as_formerly(folder: Path, *, number: int, init_from: str | None) -> None:
    """Rewrite `trainer.json` as it was before stages had names: every field written out, under its old name."""
    path = folder / "trainer.json"
    trainer = json.loads(path.read_text())
    fields = {f"model.{name}": value for name, value in ModelConfig.fingerprint_defaults().items() if name != "adaln"}
    fields |= {f"training.{name}": value for name, value in StageTraining.fingerprint_defaults().items()}
    fields |= trainer["fingerprint"] | {"stage": number}
    for name in ("random_stream", "training.network", "training.process", "training.objective"):
        fields.pop(name)
    fields["training.init_from"] = fields.pop("training.starts_from")
    del trainer["starts_from"]
    former = {"stage": number, "stage_name": folder.parent.name, "kind": "pixart", "init_from": init_from}
    path.write_text(json.dumps(trainer | former | {"fingerprint": fields, "plan_fingerprint": "0" * 64}))


def test_a_checkpoint_of_before_stages_had_names_is_continued(run: Path) -> None:
    first = write_checkpoint(job_of(run, 1), step=12)
    begun = job_of(run, 2)
    as_formerly(write_checkpoint(begun, step=6), number=2, init_from=None)
    job = job_of(run, 2)
    assert job.resume is not None and job.resume.trainer["starts_from"] == "stage1"
    assert job.fingerprint.fields == begun.fingerprint.fields
    assert job.fingerprint.digest == "0" * 64, "what later stages and the survey know it by"
    with pytest.raises(UserError, match=r"trained with training\.stage2\.ema_decay 0\.9, but it is 0\.5 now"):
        job_of(run, 2, ema_decay=0.5)
    shutil.rmtree(first.parent)
    assert job_of(run, 2).start.identity == begun.start.identity, "the start is gone, and was stage1"


def test_a_checkpoint_of_before_there_was_a_choice_of_adaln_is_continued(run: Path) -> None:
    job = job_of(run, 2, starts_from="scratch")
    assert "model.adaln" not in job.fingerprint.fields
    write_checkpoint(job, step=6)
    with pytest.raises(UserError, match=r"trained with model\.adaln 'single', but it is 'per-block' now"):
        job_with(run, 'model.adaln="per-block"')


def test_a_resume_with_another_process_is_refused_with_both(run: Path) -> None:
    job = job_of(run, 2, starts_from="scratch")
    assert not any("process" in name or "flow" in name for name in job.fingerprint.fields)
    folder = write_checkpoint(job, step=6)
    with pytest.raises(
        UserError, match=r"step-6 was trained with training\.stage2\.process 'ddpm', but it is 'flow' now"
    ):
        job_of(run, 2, starts_from="scratch", process="flow")
    trainer = json.loads((folder / "trainer.json").read_text()) | {"process": flow_spec(shift=2.0)}
    flow = job_of(run, 3, starts_from="scratch", process="flow", flow_shift=2.0)
    trainer["fingerprint"] = flow.fingerprint.fields
    (folder / "trainer.json").write_text(json.dumps(trainer))
    with pytest.raises(
        UserError, match=r"step-6 was trained with training\.stage2\.process 'flow', but it is 'ddpm' now"
    ):
        job_of(run, 2, starts_from="scratch")
    assert flow.fingerprint.fields["training.flow_shift"] == 2.0


def test_a_stage_is_finished_when_it_has_done_what_the_recipe_says_now(run: Path) -> None:
    """Stopped at step 6 of 12: enough once `num_steps` is lowered to that."""
    folder = write_checkpoint(job_of(run, 1), step=6)
    with pytest.raises(UserError, match="stage1 has done 6 of 12 steps"):
        job_of(run, 2)
    assert job_of(run, 2, num_steps=6).start.path == folder / "model"


@pytest.mark.parametrize("flags", [[], ["--plan"]])
def test_a_finished_stage_does_nothing_and_loads_no_torch(run: Path, flags: list[str]) -> None:
    write_checkpoint(job_of(run, 1), step=12)
    code = (
        "import sys; from training.__main__ import main; main()\n"
        "assert not {'torch', 'deepspeed', 'diffusers'} & set(sys.modules)"
    )
    words = [sys.executable, "-c", code, *arguments(run, 1), *flags]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "nothing to do: stage1 has done its 12 steps" in said
    assert "to go on, raise training.stage1.num_steps = 12" in said and "split" not in said
