"""What a choice makes of training: which samples, how often, with which captions, and what is refused."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from choice_run import write_choice
from columns_run import write_columns
from test_training_features import FIRST, mixed, open_job
from test_training_stage import write_checkpoint
from training_run import make_run, metrics, train, write_text

from errors import MissingFileError, UserError
from pipelines.columns import written_choices
from pipelines.columns.choice_settings import ChoiceSettings
from pipelines.columns.choices import Choice
from pipelines.store.families import latent_directory, text_directory
from pipelines.store.feature_store import serialize_member
from pipelines.store.files import sha256_file
from training.data.assembly import BatchAssembler
from training.data.index import FeatureIndex
from training.data.reader import BatchReader
from training.data.stage_data import stage_plan, survey_stage
from training.data.survey import chosen_digests, make_survey, survey_shards
from training.launch.preflight import inspect_stage, print_plan
from training.loop.validation import open_validation
from training.stages.resume import CHOSEN_SAMPLES
from training.stages.stage import SURVEY, TrainingJob

SHARDS = {"laion_0": 40, "laion_1": 23}
EVEN, BY_NUMBER = 'features.stage2.where="number % 2 == 0"', 'features.stage2.weight="number"'
WHERE, WEIGHT = "number % 2 == 0", "number"
# Every seventh sample has no latents, every eleventh no caption.
COMPLETE = {(name, i) for name, size in SHARDS.items() for i in range(size) if i % 7 != 6 and i % 11 != 10}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def is_even(i: int) -> bool:
    return i % 2 == 0


def drawn(job: TrainingJob, *, num_steps: int) -> Counter[tuple[str, int]]:
    """How often each sample is drawn."""
    plan, index = stage_plan(job, survey := survey_stage(job)), FeatureIndex(job.features.datasets)
    found: Counter[tuple[str, int]] = Counter()
    for step in range(num_steps):
        batch = plan.batch(step)
        for shard, ordinal in zip(batch.shards.tolist(), batch.ordinals, strict=True):
            table = index.table(shard)
            (place,) = table.find(survey.buckets[batch.bucket], np.array([ordinal]))
            name, _, number = str(table.keys[place]).rpartition("_")
            found[name, int(number)] += 1
    return found


def test_only_chosen_samples_are_trained_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_choice(run, SHARDS, chooses=is_even, where=WHERE)
    job = open_job(run, EVEN)
    expected = {sample for sample in COMPLETE if is_even(sample[1])}
    assert drawn(job, num_steps=len(expected)) == Counter(dict.fromkeys(expected, 8)), "8 epochs of 8 a batch"
    print_plan(job, inspect_stage(job, 1))
    said = " ".join(capsys.readouterr().err.split())
    assert f"32 of 63 samples (50.8%), by {run}/choices/stage2: number % 2 == 0" in said
    assert f"{len(expected)} samples in 2 shards" in said


def test_a_table_that_chooses_nothing_reads_no_choice(run: Path) -> None:
    """Its fingerprint, its survey and what it draws are what they were."""
    before, drawn_before = open_job(run), drawn(open_job(run), num_steps=9)
    survey = (before.directory / SURVEY).read_bytes()
    assert b"choices" not in survey
    write_choice(run, SHARDS, chooses=is_even, where=WHERE)
    job = open_job(run)
    assert job.fingerprint == before.fingerprint
    assert drawn(job, num_steps=9) == drawn_before and (job.directory / SURVEY).read_bytes() == survey


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"where": "number > 3"},
            r"was made with where 'number > 3', but it is 'number % 2 == 0' in features\.stage2",
        ),
        ({"where": WHERE, "weight": "number"}, r"with weight 'number', but it is None in features\.stage2"),
        (
            {"where": WHERE, "captions": [{"column": "caption", "weight": "num_tokens"}]},
            r"with caption_weights \{'caption': 'num_tokens'\}, but it is \{\} in features\.stage2",
        ),
    ],
)
def test_a_choice_by_other_expressions_is_refused(run: Path, fields: dict[str, Any], message: str) -> None:
    write_choice(run, SHARDS, **fields)
    with pytest.raises(UserError, match=rf"{message}.*`make features STAGE=stage2 RUN=\S+run` chooses anew"):
        open_job(run, EVEN)


def test_no_choice_yet_and_one_that_lacks_a_shard_are_refused(run: Path) -> None:
    with pytest.raises(MissingFileError, match=r"choices/stage2 has no finished choice.* by where = 'number % 2 == 0'"):
        open_job(run, EVEN)
    write_choice(run, {"laion_0": 40}, where=WHERE)
    with pytest.raises(UserError, match=r"choices/stage2 lacks shard laion_1, .*run `make features STAGE=stage2"):
        open_job(run, EVEN)


def set_rejects(directory: Path, change: Callable[[int, str | None], str | None]) -> None:
    """Set the `reject` of sample i of laion_0 in an index."""
    path = directory / "laion_0.parquet"
    table = pq.read_table(path)
    numbers = [int(key.rpartition("_")[2]) for key in table["key"].to_pylist()]
    pairs = zip(numbers, table["reject"].to_pylist(), strict=True)
    rejects = pa.array([change(i, reject) for i, reject in pairs], pa.string())
    pq.write_table(table.set_column(table.column_names.index("reject"), "reject", rejects), path)


def test_a_chosen_sample_that_was_not_encoded_is_an_error_and_one_that_was_rejected_is_not(run: Path) -> None:
    write_choice(run, SHARDS, chooses=is_even, where=WHERE)
    # As features of a narrower choice have it: of the even ones only those from 20 on.
    set_rejects(text_directory(run), lambda i, reject: "not_chosen" if i < 20 else reject)
    with pytest.raises(UserError) as refused:
        survey_stage(open_job(run, EVEN))
    assert (
        f"{run}/features/text has no features of 10 of the 32 samples that {run}/choices/stage2 chooses, first "
        "laion_0_000: `make features STAGE=stage2"
    ) in str(refused.value)
    set_rejects(text_directory(run), lambda i, reject: "empty" if i < 20 else reject)
    assert drawn(open_job(run, EVEN), num_steps=40).keys() == {
        (name, i) for name, i in COMPLETE if is_even(i) and (i >= 20 or name == "laion_1")
    }
    # A sample that the choice leaves out may have features or not.
    set_rejects(latent_directory(run, 32), lambda i, reject: reject if is_even(i) else "not_chosen")
    assert len(drawn(open_job(run, EVEN), num_steps=40)) > 10


def test_features_of_a_choice_are_refused_for_a_table_that_chooses_nothing(run: Path) -> None:
    path = text_directory(run) / "manifest.json"
    manifest = json.loads(path.read_text())
    # As the features of another table with a where have it, which share the folder.
    manifest["shards"]["laion_1"]["rejected"] |= {"not_chosen": 4}
    manifest["shards"]["laion_1"]["num_read"] += 4
    path.write_text(json.dumps(manifest))
    message = (
        r"features/text has no features of 4 of 67 samples, .* and features\.stage2 has none: `make features STAGE"
    )
    with pytest.raises(UserError, match=message):
        open_job(run)
    write_choice(run, SHARDS, chooses=is_even, where=WHERE)
    open_job(run, EVEN)


def test_samples_are_drawn_by_weight_and_those_of_weight_zero_never(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def weigh(i: int) -> float | None:
        return None if i == 1 else float(i % 4)

    write_choice(run, SHARDS, weigh=weigh, weight=WEIGHT)
    job = open_job(run, BY_NUMBER)
    weights = {(name, i): weigh(i) or 0.0 for name, i in COMPLETE}
    positive = [weight for weight in weights.values() if weight]
    # As many batches as ten epochs need, each as long as there are samples that may be drawn.
    num_steps = len(positive) * 10 // 8
    found = drawn(job, num_steps=num_steps)
    for sample, weight in weights.items():
        assert abs(found[sample] - num_steps * 8 * weight / sum(positive)) < 2
    assert all(found[sample] == 0 for sample, weight in weights.items() if not weight)
    print_plan(job, inspect_stage(job, 1))
    said = " ".join(capsys.readouterr().err.split())
    effective = sum(positive) ** 2 / sum(weight**2 for weight in positive)
    assert f"as uneven as {effective:,.0f} samples drawn alike ({effective / len(positive):.1%})" in said
    assert f"{len(positive)} draws an epoch" in said
    num_zero = sum(not weigh(i) for size in SHARDS.values() for i in range(size))
    assert f"{num_zero} chosen samples have weight 0 and are never drawn" in said


@pytest.mark.parametrize(("value", "shown"), [(-1.0, "-1"), (float("nan"), "nan"), (float("inf"), "inf")])
def test_a_weight_that_is_none_is_refused(run: Path, value: float, shown: str) -> None:
    write_choice(run, SHARDS, weigh=lambda i: value if i == 5 else 1.0, weight=WEIGHT)
    with pytest.raises(UserError, match=rf"laion_0: weight of 1 samples is no .* first that of laion_0_005: {shown};"):
        survey_stage(open_job(run, BY_NUMBER))


def test_nothing_left_to_train_on_is_refused_with_counts(run: Path) -> None:
    write_choice(run, SHARDS, chooses=lambda i: False, where=WHERE)
    with pytest.raises(UserError, match=r"of 63 samples in 2 shards 0 are chosen, 0 of them with weight 0, and no"):
        survey_stage(open_job(run, EVEN))
    write_choice(run, SHARDS, weigh=lambda i: 0.0, weight=WEIGHT)
    with pytest.raises(UserError, match=r"of 63 samples in 2 shards 63 are chosen, 63 of them with weight 0, and no"):
        survey_stage(open_job(run, BY_NUMBER))


def test_a_checkpoint_is_bound_to_its_choice(run: Path) -> None:
    write_choice(run, SHARDS, chooses=is_even, where=WHERE)
    write_checkpoint(open_job(run, EVEN), step=6)
    write_choice(run, SHARDS, chooses=is_even, where=WHERE)
    assert open_job(run, EVEN).resume is not None
    write_choice(run, SHARDS, chooses=lambda i: i % 4 == 0, where=WHERE)
    with pytest.raises(UserError, match=r"trained with choice\.files '\w+', but it is '\w+' now"):
        open_job(run, EVEN)
    write_choice(run, SHARDS, chooses=lambda i: i > 3, where="number > 3")
    with pytest.raises(UserError, match=r"trained with choice\.where 'number % 2 == 0', but it is 'number > 3' now"):
        open_job(run, 'features.stage2.where="number > 3"')
    with pytest.raises(UserError, match=r"trained with choice\.\w+ .*, but it is None now"):
        open_job(run)


def add_sample(directory: Path) -> None:
    """Put a member before those of laion_0, as a wider choice of another table may."""
    files = {suffix: directory / f"laion_0{suffix}" for suffix in (".tar", ".parquet")}
    member, _ = serialize_member("laion_0_000b", {"mean": np.zeros(4, np.float16)})
    files[".tar"].write_bytes(member + files[".tar"].read_bytes())
    table = pq.read_table(files[".parquet"])
    for place, field in enumerate(table.schema):
        if field.name.endswith("offset"):
            shifted = pa.array([each and each + len(member) for each in table[field.name].to_pylist()], field.type)
            table = table.set_column(place, field, shifted)
    pq.write_table(table, files[".parquet"])
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["shards"]["laion_0"]["files"] = {suffix: sha256_file(path) for suffix, path in files.items()}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_features_that_another_choice_has_added_to_end_no_training(run: Path) -> None:
    write_choice(run, SHARDS, chooses=is_even, where=WHERE)
    job = open_job(run, EVEN)
    folder = write_checkpoint(job, step=6)
    trainer = json.loads((folder / "trainer.json").read_text())
    keys = read_keys(job, range(12), num_ranks=1)
    digests = chosen_digests(survey_stage(job))
    add_sample(latent_directory(run, 32))
    with pytest.raises(UserError, match=r"trained with latents\.files '\w+', but it is '\w+' now"):
        open_job(run, EVEN)
    (folder / "trainer.json").write_text(json.dumps(trainer | {CHOSEN_SAMPLES: digests}))
    again = open_job(run, EVEN)
    assert again.resume is not None and again.fingerprint.digest == job.fingerprint.digest
    assert read_keys(again, range(12), num_ranks=1) == keys
    # A chosen sample that is another one now.
    set_rejects(latent_directory(run, 32), lambda i, reject: "overflow" if i == 2 else reject)
    with pytest.raises(UserError, match=r"trained with latents\.files '\w+', but it is '\w+' now"):
        open_job(run, EVEN)


def test_validation_follows_the_choice_and_not_the_weights(run: Path) -> None:
    write_choice(run, SHARDS, chooses=is_even, weigh=lambda i: float(i > 9), where=WHERE, weight=WEIGHT)
    held_out = 'training.validation_shards=["laion_0"]'
    job = open_job(run, EVEN, BY_NUMBER, held_out)
    validation = open_validation(job)
    assert validation is not None
    index = FeatureIndex(job.features.held_out)
    assert index.table(0).weights is None
    expected = {i for name, i in COMPLETE if name == "laion_0" and is_even(i)}
    assert {int(key.rpartition("_")[2]) for key in index.table(0).keys} == expected and min(expected) == 0
    assert {i for _, i in drawn(job, num_steps=30)} == {
        i for name, i in COMPLETE if name == "laion_1" and is_even(i) and i > 9
    }


def test_datasets_are_chosen_each_by_its_own_run(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other")
    write_choice(run, SHARDS, chooses=is_even, where=WHERE)
    write_choice(other, SHARDS, chooses=lambda i: i < 8, where=WHERE)
    job = open_job(run, EVEN, mixed(FIRST, f'run = "{other}", shards = ["laion_1"]'))
    found = drawn(job, num_steps=40)
    assert {i for name, i in found if name == "laion_0"} == {i for n, i in COMPLETE if n == "laion_0" and is_even(i)}
    assert {i for name, i in found if name == "laion_1"} == {i for n, i in COMPLETE if n == "laion_1" and i < 8}
    fields = job.fingerprint.fields
    assert fields["datasets.0.choice.where"] == fields["datasets.1.choice.where"] == WHERE
    assert fields["datasets.0.choice.files"] != fields["datasets.1.choice.files"]


CAPTIONS = 'features.stage2.captions=[{column = "caption", weight = "exp(clip_score / 0.1)"}, {column = "alt_text"}]'


def test_captions_are_drawn_by_the_weights_of_the_choice(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every other sample has both captions, the others the first alone; in the index the first counts three times."""
    write_text(run, SHARDS, columns=("caption", "alt_text"))
    write_choice(
        run,
        SHARDS,
        weigh_captions={"caption": lambda i: None if i == 5 else 0.0 if i in (2, 3) else 9.0},
        captions=[{"column": "caption", "weight": "exp(clip_score / 0.1)"}],
    )
    job = open_job(run, CAPTIONS)
    table = FeatureIndex(job.features.datasets).table(0)
    rows = table.families["text"]
    offsets = dict(zip([int(key.rpartition("_")[2]) for key in table.keys], np.diff(rows.starts), strict=True))
    assert offsets[1] == offsets[5] == 2 and offsets[2] == 1
    for i, expected in ((1, 0.9), (7, 0.9), (3, 0.0), (5, 0.0)):
        place = int(np.flatnonzero(table.keys == f"laion_0_{i:03d}")[0])
        draws = np.linspace(0, 1, 1000, endpoint=False)
        chosen = rows.choose(np.full(1000, place), draws)
        assert np.mean(chosen == rows.starts[place]) == pytest.approx(expected, abs=0.002)
    print_plan(job, inspect_stage(job, 1))
    said = " ".join(capsys.readouterr().err.split())
    # Of sample 2 of both shards the one caption has weight 0; those with two have the other one's.
    assert "63 of 63 samples (100.0%)" in said
    assert "of 2 no caption has a weight above 0: theirs are drawn alike" in said


def read_keys(job: TrainingJob, steps: range, *, num_ranks: int) -> list[list[str]]:
    """The keys of each step's batch, of all ranks one after the other."""
    survey, datasets = survey_stage(job), job.features.datasets
    keys: list[list[str]] = [[] for _ in steps]
    for rank in range(num_ranks):
        assembler = BatchAssembler(datasets[0], buckets=survey.buckets, seed=0, stream=2, caption_dropout=0.1)
        reader = BatchReader(
            stage_plan(job, survey), FeatureIndex(datasets), assembler, steps=steps, rank=rank, num_ranks=num_ranks
        )
        with reader:
            for own, packed in zip(keys, reader, strict=True):
                own += packed.keys
    return keys


def test_ranks_share_weighted_batches_and_go_on_inside_an_epoch(run: Path) -> None:
    write_choice(run, SHARDS, chooses=is_even, weigh=lambda i: i + 1.0, where=WHERE, weight=WEIGHT)
    job = open_job(run, EVEN, BY_NUMBER, "training.global_batch_size=6")
    whole = read_keys(job, range(20), num_ranks=1)
    assert Counter(key for keys in whole for key in keys).most_common(1)[0][1] > 5
    assert read_keys(job, range(20), num_ranks=2) == read_keys(job, range(20), num_ranks=3) == whole
    assert (
        read_keys(open_job(run, EVEN, BY_NUMBER, "training.global_batch_size=6"), range(7, 20), num_ranks=2)
        == whole[7:]
    )


def test_a_stage_trains_by_weight_and_says_so(run: Path) -> None:
    write_choice(run, SHARDS, chooses=is_even, weigh=lambda i: i + 1.0, where=WHERE, weight=WEIGHT)
    recipe = run.parent / "recipe.toml"
    table = f'[features.stage2]\nwhere = "{WHERE}"\nweight = "{WEIGHT}"'
    recipe.write_text(recipe.read_text().replace("[features.stage2]", table))
    said = train(run, 2, starts_from="scratch", num_processes=1, num_steps=2)
    assert "32 of 63 samples (50.8%)" in said and "draws an epoch" in said
    assert len(metrics(run, 2)) == 1
    trainer = json.loads((run / "training" / "stage2" / "step-2" / "trainer.json").read_text())
    assert [len(digest) for digest in trainer[CHOSEN_SAMPLES]] == [64]


def test_a_survey_knows_its_choice(run: Path) -> None:
    write_choice(run, SHARDS, chooses=is_even, weigh=lambda i: 1.0 + i, where=WHERE, weight=WEIGHT)
    job = open_job(run, EVEN, BY_NUMBER)
    survey, index = survey_stage(job), FeatureIndex(job.features.datasets)
    assert survey == survey_stage(job) == make_survey(index, survey_shards(index, range(2)))
    content = json.loads((job.directory / SURVEY).read_text())
    assert content["identity"] == job.fingerprint.digest
    (choice,) = content["choices"]
    assert choice["num_samples"] == 63 and choice["num_chosen"] == 32
    assert np.sum(choice["weights"]) == sum(1.0 + i for _, i in COMPLETE if is_even(i))


def test_a_choice_by_columns_that_have_changed_since_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The choice is one that is written by columns, as `make features` does."""

    def write_sides(limit: int) -> None:
        tables = {
            name: {"key": [f"{name}_{i:03d}" for i in range(size)], "min_side": [i % limit for i in range(size)]}
            for name, size in SHARDS.items()
        }
        write_columns(run / "columns" / "pixels", tables)

    write_sides(8)
    settings = ChoiceSettings.of("stage2", {"where": "min_side >= 4", "weight": "min_side", "weight_temperature": 2.0})
    assert settings is not None
    written_choices.write_choice(Choice(run, settings), list(SHARDS))
    where, weight = 'features.stage2.where="min_side >= 4"', 'features.stage2.weight="min_side"'
    job = open_job(run, where, weight, "features.stage2.weight_temperature=2.0")
    found = drawn(job, num_steps=200)
    assert found.keys() == {sample for sample in COMPLETE if sample[1] % 8 >= 4}
    assert found["laion_0", 7] / found["laion_0", 5] == pytest.approx(math.e, rel=0.1)
    print_plan(job, inspect_stage(job, 1))
    assert "other columns" not in capsys.readouterr().err
    write_sides(9)
    print_plan(job, inspect_stage(job, 1))
    said = " ".join(capsys.readouterr().err.split())
    assert f"{run}/choices/stage2 was chosen by other columns than {run} has now; it is trained on as it is" in said
    # A run that was copied without its columns.
    shutil.rmtree(run / "columns")
    print_plan(job, inspect_stage(job, 1))
    assert "other columns" not in capsys.readouterr().err
