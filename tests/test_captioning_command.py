"""`python -m captioning` as typed: what it writes and says, and no work twice."""

import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from atelier.door import room_words
from atelier.typed import find_wrong, read_words
from captioning.__main__ import main
from errors import UserError
from pipelines.command import parse_command
from pipelines.engine.progress import console
from pipelines.store.manifest import read_manifest
from pipelines.store.summary import read_summary
from tests.raw_shards import encode, laion_members, photo, write_laion, write_sa1b, write_tar
from tests.sound_run import require_sound
from tests.tiny_models import save_llava

RECIPE = """
[data]
shards = "{{run}}/raw/*.tar"

[engine]
samples_per_slice = 8
in_process = true

[captioning]
model = "{model}"
max_new_tokens = 24
batch_size = 4
max_reject_fraction = 0.2
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


def make_run(folder: Path, model: Path) -> Path:
    """A run folder with three LAION shards and one of SA-1B, and a recipe."""
    for number in range(3):
        write_laion(folder / "raw" / f"laion_{number:05d}.tar", 20, first=100 * number)
    write_sa1b(folder / "raw" / "sa_000000.tar", 20)
    (folder / "recipe.toml").write_text(RECIPE.format(model=model))
    return folder


def arguments(run: Path, *options: str) -> list[str]:
    return ["captioning", "--recipe", str(run / "recipe.toml"), "--run", str(run), *options]


def command(run: Path, *options: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", arguments(run, *options))
    main()


def contents(run: Path) -> dict[str, bytes]:
    """The bytes of every file of captions/, but not of the folders of markers and parts."""
    return {path.name: path.read_bytes() for path in (run / "captions").iterdir() if path.is_file()}


def captions(run: Path) -> dict[str, str]:
    tables = [pq.read_table(path).to_pylist() for path in sorted((run / "captions").glob("*.parquet"))]
    return {f"{row['shard']}/{row['key']}": row["caption"] for rows in tables for row in rows}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model) -> Path:
    run = make_run(tmp_path_factory.mktemp("finished"), model)
    with pytest.MonkeyPatch.context() as monkeypatch:
        command(run, monkeypatch=monkeypatch)
    require_sound(run)
    return run


def test_every_sample_is_in_the_summary_and_the_manifest(finished, model) -> None:
    manifest = read_manifest(finished / "captions")
    assert (manifest.num_read, manifest.num_kept) == (80, 80)
    assert manifest.extra["prompts"]["default"] == "Describe this image and its style in a very detailed manner"
    assert len(manifest.extra["prompts_sha256"]) == 64 and manifest.extra["model"] == str(model)
    summary = read_summary(finished)
    assert summary["counts"]["captioning"] == {"read": 80, "kept": 80, "rejected": {}}
    assert summary["seconds"]["captioning"] > 0


@pytest.mark.parametrize("option", [[], ["--plan"]])
def test_a_finished_run_and_a_plan_start_without_the_heavy_libraries(finished, option: list[str]) -> None:
    before = contents(finished)
    script = (
        "import sys; from captioning.__main__ import main; main()\n"
        "heavy = {'torch', 'ray', 'transformers'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments(finished, *option)[1:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert ("captions of 4 shards" if option else "nothing to do: all 4 shards") in said.replace("Captions", "captions")
    assert contents(finished) == before


def test_a_changed_prompt_captions_again_what_it_concerns(tmp_path, model, finished, monkeypatch) -> None:
    run = make_run(tmp_path, model)
    command(run, monkeypatch=monkeypatch)
    assert contents(run) == contents(finished)
    command(run, "--set", 'captioning.prompts={"sa_*" = "What is this?"}', monkeypatch=monkeypatch)
    before, after = captions(finished), captions(run)
    assert [before[key] for key in before if key.startswith("laion")] == [
        after[key] for key in after if key.startswith("laion")
    ]
    changed = [key for key in before if before[key] != after[key]]
    assert len(changed) > 10 and all(key.startswith("sa_") for key in changed)
    # A new tar under an old name is noticed too.
    write_laion(run / "raw" / "laion_00001.tar", 20, first=900)
    command(run, "--set", 'captioning.prompts={"sa_*" = "What is this?"}', monkeypatch=monkeypatch)
    assert "laion_00001/000000900" in captions(run) and "laion_00001/000000100" not in captions(run)


def test_other_thresholds_rewrite_flags_and_load_no_model(tmp_path, model, finished, monkeypatch) -> None:
    run = make_run(tmp_path, model)
    command(run, monkeypatch=monkeypatch)
    strict = ["--set", "captioning.quality.min_alt_text_overlap=0.5"]
    with monkeypatch.context() as patch:
        patch.setattr("captioning.engines.transformers_engine.TransformersEngine", None)
        command(run, *strict, monkeypatch=patch)
    assert captions(run) == captions(finished)
    rows = pq.read_table(run / "captions" / "laion_00000.parquet").to_pylist()
    num_flagged = sum("off_alt_text" in row["flags"] for row in rows)
    manifest = read_manifest(run / "captions")
    assert num_flagged > 5 and manifest.shards["laion_00000"].details["flag_off_alt_text"] == num_flagged
    assert manifest.fingerprint == read_manifest(finished / "captions").fingerprint
    # Back to the first thresholds: the same bytes as if nothing had happened.
    command(run, monkeypatch=monkeypatch)
    assert contents(run) == contents(finished)


def test_too_many_rejects_fail_by_name_and_a_higher_ceiling_needs_no_second_run(tmp_path, model, monkeypatch) -> None:
    good = encode(photo(0))
    members = [member for number in range(6) for member in laion_members(f"{number:09d}", good, "alt")]
    members += [member for number in range(6, 9) for member in laion_members(f"{number:09d}", b"", "alt")]
    run = make_run(tmp_path, model)
    for path in (run / "raw").iterdir():
        path.unlink()
    write_tar(run / "raw" / "laion_00000.tar", members)
    with pytest.raises(UserError, match=r"3 of 9 samples rejected \(33.3%\).*empty_image 3"):
        command(run, monkeypatch=monkeypatch)
    monkeypatch.setattr("captioning.engines.transformers_engine.TransformersEngine", None)
    command(run, "--set", "captioning.max_reject_fraction=0.5", monkeypatch=monkeypatch)
    assert read_summary(run)["counts"]["captioning"] == {"read": 9, "kept": 6, "rejected": {"empty_image": 3}}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("captioning.model=nobody/nothing", "captioning.model = 'nobody/nothing'"),
        ("captioning.model=./nowhere", "model folder ./nowhere does not exist"),
        ("captioning.shards=['laoin_*']", "--set: captioning.shards: pattern 'laoin_*' matches none of the 4 shards"),
        ("data.shards=/no/such/sa_{000000..000003}.tar", "data.shards: no shard matches /no/such/sa_000000.tar"),
    ],
)
def test_what_is_missing_is_said_in_one_line(finished, option: str, message: str) -> None:
    line = [sys.executable, "-m", *arguments(finished, "--set", option)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_recipe_for_several_datasets_captions_one_of_them(finished) -> None:
    """`make caption SHARDS='/data/sa_*.tar'` with a recipe that names other datasets too."""
    sa = str(finished / "raw" / "sa_*.tar")
    options = ["--set", f"data.shards={sa}", "--set", "captioning.shards=['sa_*', 'hq_*']", "--plan"]
    line = [sys.executable, "-m", *arguments(finished, *options)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    said = " ".join(done.stderr.split())
    assert done.returncode == 0 and "Captions of 1 shards" in said
    assert "captioning.shards: 'hq_*' fits none of the 1 shards" in said


def test_the_recipes_of_the_house_parse() -> None:
    from captioning.config import CaptioningConfig
    from pipelines.recipe import load_recipe

    for path in sorted(Path("recipes").glob("*.toml")):
        captioning = load_recipe(path).table("captioning", CaptioningConfig)
        # The toy world's run has shards that are not to be captioned; of others, whatever SHARDS names is.
        assert captioning.shards == ("*",) or path.stem.startswith("toyworld"), path
    models = [
        load_recipe(path).tables.get("captioning", {}).get("model")
        for path in sorted(Path("recipes").glob("pixart*.toml"))
    ]
    assert "llava-hf/llava-1.5-7b-hf" in models


def test_what_looks_like_markup_and_patterns_is_text(tmp_path, model, monkeypatch, capsys) -> None:
    """`[INST]` in a prompt, and a run and a shard whose names hold brackets, braces and commas."""
    run = make_run(tmp_path / "[bold]x, {a,b} $1", model)
    (run / "raw" / "sa_000000.tar").rename(run / "raw" / "sa_[red].tar")
    prompt = "[INST] What is [/bold] this? :cat:"
    monkeypatch.setattr(console, "width", 400)
    command(run, "--plan", "--text", f"captioning.prompts.sa_*={prompt}", monkeypatch=monkeypatch)
    said = capsys.readouterr().err
    assert prompt in said and str(run) in said
    command(run, "--settings", 'captioning.shards=["sa_[[]red]"]', monkeypatch=monkeypatch)
    assert [path.name for path in (run / "captions").glob("*.parquet")] == ["sa_[red].parquet"]


def documented_commands() -> list[str]:
    lines = [line.strip() for line in Path("docs/CAPTIONING.md").read_text().splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.startswith("make caption")]


@pytest.mark.parametrize("line", documented_commands())
def test_commands_of_the_docs_page_are_real(line: str, monkeypatch) -> None:
    """Each is what make takes and turns into a command whose every key the recipe's tables take."""
    from captioning.config import CaptioningConfig
    from pipelines.engine.run import EngineConfig
    from pipelines.recipe import DataConfig

    typed = shlex.split(line)
    assert find_wrong(list(read_words(typed[1:])), ["caption"]) is None
    variables = dict(word.split("=", 1) for word in typed[2:])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    recipe = parse_command(
        "captioning", "", argv=room_words(["caption", "--from-make", " ".join(variables)])[1:]
    ).recipe
    config = recipe.table("captioning", CaptioningConfig)
    engine, data = recipe.table("engine", EngineConfig), recipe.table("data", DataConfig)
    assert data.shards == variables["SHARDS"] and config.retry_rejects == ("RETRY" in variables)
    assert (config.engine == "openai") == (engine.gpus_per_worker == 0)
