"""`atelier init` writes a recipe that runs as it is, and `atelier recipe` lists every key there is."""

import io
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from atelier import init, keys
from captioning.config import CaptioningConfig
from captioning.pass_jobs import read_pass_jobs
from errors import UserError
from features.jobs import read_inputs
from pipelines.command import parse_command
from pipelines.recipe import TABLES, DataConfig, load_recipe
from pipelines.run_memory import read_memory
from training.config import stage_training

REPOSITORY = Path(__file__).resolve().parent.parent


def write_shard(path: Path, sizes: list[tuple[int, int]], *, has_texts: bool) -> None:
    with tarfile.open(path, "w") as tar:
        for number, size in enumerate(sizes):
            file = io.BytesIO()
            Image.new("RGB", size, (200, number, 0)).save(file, "JPEG")
            members = {"jpg": file.getvalue()} | ({"txt": b"a red thing"} if has_texts else {})
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def run_init(monkeypatch: pytest.MonkeyPatch, *typed: str) -> None:
    monkeypatch.setattr(sys, "argv", ["init", *typed])
    init.main()


TOY = (
    *("--set", "captioning.model=toyworld/weights/llava", "--set", "features.text_model=toyworld/weights/t5"),
    *("--set", "features.vae_model=toyworld/weights/vae"),
)


def test_the_recipe_fits_the_data_and_every_room_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "a.tar", [(96, 300)] * 20 + [(300, 90)] * 20, has_texts=True)
    run = tmp_path / "run"
    run_init(monkeypatch, "--run", str(run), "--shards", str(tmp_path / "a.tar"), *TOY)
    written = tomllib.loads((run / "recipe.toml").read_text())
    assert written["features"]["finetune"] == {"resolution": 64, "buckets": True} and "model" not in written
    assert written["training"]["finetune"]["global_batch_size"] == 8
    assert all("  # " in line for line in (run / "recipe.toml").read_text().splitlines() if " = " in line)
    memory = read_memory(run)
    assert memory.recipe == str(run / "recipe.toml") and list(memory.shards) == ["a"]
    command = parse_command("features", "", argv=["--run", str(run)], has_stages=True, stage_table="features")
    assert command.stage == "finetune" and read_inputs(command).raw[0].num_samples == 40
    assert read_pass_jobs(command).captions[0].sources[0].num_samples == 40
    assert stage_training(command.recipe, "finetune").network == "pixart"


def test_typed_settings_are_written_as_toml_and_refused_before_they_are(tmp_path: Path, monkeypatch, capsys) -> None:
    write_shard(tmp_path / "a.tar", [(96, 300)] * 4, has_texts=True)
    run = tmp_path / "my run"
    typed = ("--run", str(run), "--shards", str(tmp_path / "a.tar"), *TOY)
    for wrong, message in (
        ("foo.bar=1", r"^--set: unknown table \[foo\]"),
        ("captioning.modle=x", r"^--set: captioning\.modle is not a known key \(did you mean captioning\.model"),
        ("training.finetune.num_steps=0", r"^--set: training\.finetune\.num_steps = 0: "),
        ("data.dialect=x", r"^--set: data\.dialect = 'x': "),
        ("data.max_pixels=100", r"of 4 samples that were looked at no image could be read \(too_many_pixels\)"),
    ):
        with pytest.raises(UserError, match=message):
            run_init(monkeypatch, *typed, "--set", wrong)
    assert not (run / "recipe.toml").exists()
    settings = [
        'captioning.prompts={default = "Say \\"x\\" \\u007f", "sa_*" = "What?"}',
        *("captioning.prompts.'hq_*'=é", "training.finetune={num_steps = 1}", "training.{stage}.num_steps=7"),
        *("training.finetune.network=pixart", "training.datasets=[{weight = 2.0}]", "features.'max_tokens'=77"),
    ]
    run_init(monkeypatch, *typed, *(word for setting in settings for word in ("--set", setting)))
    said = "".join(capsys.readouterr().err.split())
    assert f"maketrainRUN='{run}'".replace(" ", "") in said
    written = tomllib.loads((run / "recipe.toml").read_text())
    assert written["captioning"]["prompts"] == {"default": 'Say "x" \x7f', "sa_*": "What?", "hq_*": "é"}
    assert written["training"]["finetune"] == {"num_steps": 7, "network": "pixart"}
    assert written["training"]["datasets"] == [{"weight": 2.0}] and written["features"]["max_tokens"] == 77
    assert load_recipe(run / "recipe.toml").table("captioning", CaptioningConfig).prompts["hq_*"] == "é"


def test_a_recipe_that_is_there_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.toml").write_text("# mine\n")
    with pytest.raises(UserError, match=r"recipe\.toml exists and is left as it is"):
        run_init(monkeypatch, "--run", str(tmp_path), "--shards", str(tmp_path / "a.tar"))
    with pytest.raises(UserError, match="say which data"):
        run_init(monkeypatch, "--run", str(tmp_path / "other"))
    assert (tmp_path / "recipe.toml").read_text() == "# mine\n"


def test_a_text_that_cannot_be_read_is_no_reason_to_pass_over_an_image(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [(64, 48)] * 3, has_texts=True)
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes().replace(b"a red thing", b"a r\xe9d thing"))
    data = init.look_at([str(tmp_path / "a.tar")], tmp_path / "run", DataConfig())
    assert (data.sizes, data.num_seen, data.num_with_text) == ([(64, 48)] * 3, 3, 0)


def test_images_of_a_released_size_start_from_its_weights() -> None:
    data = init.Data(kinds=("tar",), num_shards=1, num_samples=10_000, sizes=[(600, 600)], num_seen=1, num_with_text=0)
    lines = {(line.table, line.key): line.value for line in init.write_lines(data, [80, 80])}
    assert lines["features.finetune", "resolution"] == 512
    assert lines["training.finetune", "starts_from"] == "PixArt-alpha/PixArt-XL-2-512x512"
    released = tomllib.loads((REPOSITORY / "recipes/finetune.toml").read_text())
    assert lines["features", "text_model"] == released["features"]["text_model"] == "DeepFloyd/t5-v1_1-xxl"
    assert lines["features", "text_cleaning"] == released["features"]["text_cleaning"] == "diffusers"
    assert (lines["engine", "gpus_per_worker"], lines["training", "dtype"]) == (1.0, "bf16")


def test_every_key_is_listed_with_its_meaning(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["recipe"])
    keys.main()
    said = capsys.readouterr().out
    assert [table.name for table in keys.TABLES] == list(TABLES)
    assert max(map(len, said.splitlines())) <= 100
    for table in keys.TABLES:
        listed = list(keys.keys_of(table.model))
        assert {key.name.partition(".")[0].removesuffix("[]") for key in listed} == set(table.model.model_fields)
        assert all(f"\n  {key.name}" in said and key.meaning != "None" for key in listed)
    assert "captions[].weight = 1.0" in said and "sets.<name>.layout" in said and "quality.ngram_words = 4" in said
    monkeypatch.setattr(sys, "argv", ["recipe", "captionning"])
    with pytest.raises(UserError, match="did you mean captioning"):
        keys.main()


@pytest.mark.parametrize("text", ["[training.stage2]", "training"])
def test_one_table_is_listed_by_its_name(capsys, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", text])
    keys.main()
    said = capsys.readouterr().out
    assert said.startswith("[training.<name>] or [training]  read by train") and "[captioning]" not in said
