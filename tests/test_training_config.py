"""`[training]` as it stands in recipes: whose keys count for a stage, and one line for each mistake."""

from pathlib import Path

import pytest
from training_run import arguments, make_run

from errors import UserError
from pipelines.command import parse_command
from pipelines.recipe import KEYS_THAT_ARE_TABLES, load_recipe
from pipelines.wrong_keys import table_of
from training.config import StageTraining, stage_training
from training.stages.stage import TrainingJob, open_stage

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("features"))


@pytest.fixture
def run(features: Path, tmp_path: Path) -> Path:
    """A run of its own, with the features of all."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "features").symlink_to(features / "features")
    (tmp_path / "recipe.toml").write_text((features.parent / "recipe.toml").read_text())
    return tmp_path / "run"


def job_with(run: Path, *overrides: str, stage: int | str = 2) -> TrainingJob:
    argv = arguments(run, stage, starts_from="scratch")
    argv += [word for override in overrides for word in ("--set", override)]
    return open_stage(parse_command("training", "", argv=argv, has_stages=True))


def test_keys_of_the_other_process_do_not_count_where_all_stages_share_them(run: Path) -> None:
    shared = ["training.flow_shift=3.0", "training.flow_logit_std=2.0", "training.min_snr_gamma=5.0"]
    ddpm, flow = job_with(run, *shared), job_with(run, *shared, "training.stage2.process=flow")
    assert ddpm.fingerprint == job_with(run, shared[2]).fingerprint
    assert flow.fingerprint == job_with(run, *shared[:2], "training.stage2.process=flow").fingerprint
    assert ddpm.fingerprint.fields["training.min_snr_gamma"] == 5.0
    assert flow.fingerprint.fields["training.flow_shift"] == 3.0
    assert (ddpm.settings.process_spec["min_snr_gamma"], flow.settings.process_spec["schedule"]["shift"]) == (5.0, 3.0)


@pytest.mark.parametrize(
    ("process", "override", "message"),
    [
        ("flow", "min_snr_gamma=5.0", r"training\.stage2\.min_snr_gamma = 5\.0 is for process ddpm, but the .* 'flow'"),
        ("ddpm", "flow_shift=3.0", r"training\.stage2\.flow_shift = 3\.0 is for process flow, but the .* 'ddpm'"),
        (
            "ddpm",
            "muon_learning_rate=0.1",
            r"training\.stage2\.muon_learning_rate = 0\.1 is for optimizer muon, .*'adamw'",
        ),
        ("ddpm", "ddpm_logit_mean=2.0", r"training\.stage2\.ddpm_logit_mean = 2\.0 is for a stage with ddpm_logit_std"),
    ],
)
def test_a_key_of_the_other_process_is_refused_in_a_stages_own_table(run, process, override, message) -> None:
    with pytest.raises(UserError, match=rf"recipe\.toml: {message}"):
        job_with(run, f"training.process={process}", f"training.stage2.{override}")


@pytest.mark.parametrize(
    ("process", "objective", "override"),
    [
        ("ddpm", "consistency", "min_snr_gamma=5.0"),
        ("flow", "consistency", "flow_logit_mean=1.0"),
        ("ddpm", "distribution_matching", "min_snr_gamma=5.0"),
    ],
)
def test_a_key_of_a_process_own_loss_is_refused_where_another_is_minimised(run, process, objective, override) -> None:
    name, value = override.split("=")
    said = (
        rf"recipe\.toml: training\.stage2\.{name} = {value} is for the loss of process {process}, but .*'{objective}'"
    )
    settings = (f"training.stage2.process={process}", f"training.stage2.objective={objective}")
    with pytest.raises(UserError, match=said):
        job_with(run, *settings, f"training.stage2.{override}")


def test_keys_that_say_nothing_of_a_stage_decide_nothing_of_it(run: Path) -> None:
    shared = ("training.muon_learning_rate=0.1", "training.ddpm_logit_mean=2.0")
    assert job_with(run, *shared).fingerprint == job_with(run).fingerprint
    assert "training.muon_learning_rate" in job_with(run, *shared, "training.optimizer=muon").fingerprint.fields
    density = ("training.ddpm_logit_std=0.8", "training.min_snr_gamma=5.0")
    plain, matched = (load_recipe(REPOSITORY / "recipes/pixart-lcm.toml", typed) for typed in ((), density))
    assert stage_training(matched, "dmd").process_spec == stage_training(plain, "dmd").process_spec
    ours, theirs = (stage_training(recipe, "dmd").fingerprint_fields() for recipe in (matched, plain))
    assert ours == theirs


def test_keys_of_the_other_process_may_be_inherited(run: Path) -> None:
    recipe = run.parent / "recipe.toml"
    table = '\n[training.straight]\nextends = "stage2"\nfeatures = "stage2"\nprocess = "flow"\n'
    recipe.write_text(recipe.read_text() + table)
    inherited = job_with(run, "training.stage2.min_snr_gamma=5.0", stage="straight")
    assert inherited.fingerprint == job_with(run, stage="straight").fingerprint


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trains='blocks.*'", "trains = 'blocks.*': Input should be 'all', 'lora' or 'control' or a valid list"),
        ("ema_lengths=[0.1]", "ema_lengths.1 is missing"),
        ("adam_betas=[0.9]", "adam_betas.1 is missing"),
        ("trains=[1]", "trains.0 = 1: Input should be a valid string"),
        ("compile='yes'", "compile = 'yes': Input should be 'auto' or true or false"),
        ("validation_shards='a'", "validation_shards = 'a': Input should be a valid list"),
        ("timestep_shift=2", "timestep_shift = 2: Input should be 0 or 1"),
        ("checkpoint_activations=true", "checkpoint_activations is called keep_activations (true: 'inputs', "),
    ],
)
def test_a_wrong_value_is_one_line_with_the_key_of_the_recipe(run: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        job_with(run, f"training.stage2.{override}")
    assert f"training.stage2.{message}" in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_without_networks_is_told_what_an_unnamed_start_was(run: Path) -> None:
    recipe = run.parent / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('network = "pixart"\nstarts_from = "stage1"', ""))
    with pytest.raises(UserError, match=r"training\.stage2\.network is missing: .* starts_from = 'stage1' in stage 2"):
        job_with(run)


@pytest.mark.parametrize("stage", ["cache", "stage2"])
def test_a_stage_called_like_the_folder_of_the_cache_is_refused(run: Path, stage: str) -> None:
    recipe = run.parent / "recipe.toml"
    recipe.write_text(recipe.read_text() + '\n[training.cache]\nextends = "stage2"\nfeatures = "stage2"\n')
    with pytest.raises(UserError, match=r"\[training\.cache\] has the folder of training\.cache_dir = '\{run\}/trai"):
        job_with(run, stage=stage)
    job_with(run, "training.cache_dir='{run}/copies'", stage=stage)


def test_rooms_that_do_not_own_the_table_know_its_keys_that_are_tables() -> None:
    fields = StageTraining.model_fields.items()
    tables = {name for name, field in fields if str(field.annotation).startswith("dict") or table_of(field.annotation)}
    assert tables - {"datasets"} == set(KEYS_THAT_ARE_TABLES), "datasets are a list of tables"


def test_a_stage_called_like_a_key_is_refused(run: Path) -> None:
    recipe = run.parent / "recipe.toml"
    recipe.write_text(recipe.read_text() + "\n[training.lora]\nrank = 4\n")
    with pytest.raises(UserError, match="no stage can be called lora, which is a key of"):
        job_with(run, stage="lora")
