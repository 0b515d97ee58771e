"""Every room in a folder where a user keeps files, too, of names like the house's: his stay, its own are cleared."""

from pathlib import Path

import pytest
from feature_run import extract, write_run
from sampling_run import make_run as make_sampling_run
from sampling_run import write_recipe as write_sampling_recipe
from stats_run import caption_rows, run_stage, write_caption_shards
from test_captioning_earlier import make_run as make_caption_run
from tiny_models import save_llava
from users_files import NOISE, require_kept, scatter

from captioning.__main__ import main as caption
from errors import UserError
from pipelines.store.manifest import read_manifest
from pipelines.store.summary import read_summary, update_summary
from sampling.__main__ import main as sample
from toyworld.config import ToyworldConfig
from toyworld.world import write_world


def remove(*paths: Path) -> None:
    for path in paths:
        path.unlink()


def world_of(num_laion: int) -> ToyworldConfig:
    return ToyworldConfig(
        num_laion=num_laion, num_sa=6, num_hq=4, num_imagenet=4, samples_per_shard=10, num_prompts=4, broken_fraction=0
    )


def test_world(tmp_path) -> None:
    raw = tmp_path / "raw"
    write_world(world_of(24), tmp_path)
    require_kept(
        raw,
        lambda: write_world(world_of(24), tmp_path),
        redo=lambda: remove(raw / "manifest.json", raw / ".done" / "laion" / "laion_00001.json"),
    )


def test_a_smaller_world_removes_its_own_shards_alone(tmp_path) -> None:
    write_world(world_of(24), tmp_path)
    users = scatter(tmp_path / "raw")
    changed = tmp_path / "raw" / "laion" / "laion_00002.parquet"
    users[changed] = b"columns of mine"
    changed.write_bytes(users[changed])
    write_world(world_of(10), tmp_path)
    assert {path: path.read_bytes() for path in users} == users
    assert not (changed.parent / "laion_00001.tar").exists() and not (changed.parent / "laion_00002.tar").exists()
    assert (changed.parent / "laion_00000.tar").is_file()


def test_a_world_is_not_drawn_over_somebodys_tars(tmp_path) -> None:
    tar = tmp_path / "raw" / "sa" / "sa_000000.tar"
    tar.parent.mkdir(parents=True)
    tar.write_bytes(NOISE)
    with pytest.raises(UserError, match=r"sa_000000\.tar is there, and not of the toy world"):
        write_world(world_of(10), tmp_path)
    assert tar.read_bytes() == NOISE


def test_captions(tmp_path, monkeypatch) -> None:
    run = make_caption_run(tmp_path / "run", save_llava(tmp_path / "llava"))
    monkeypatch.setattr("sys.argv", ["captioning", "--recipe", str(run / "recipe.toml"), "--run", str(run)])
    monkeypatch.setattr("captioning.worker.check_engine", lambda *_: None)
    caption()
    done = run / "captions" / ".done" / "laion_00001.json"
    require_kept(run / "captions", caption, redo=lambda: remove(run / "captions" / ".manifest.json", done))
    assert set(read_manifest(run / "captions").shards) == {"laion_00000", "laion_00001"}


def test_features(tmp_path) -> None:
    run = write_run(tmp_path)
    extract(run)
    scatter(run / "captions")
    folders = [run / "features" / name for name in ("text", "latent-32")]
    undone = [folder / name for folder in folders for name in ("manifest.json", ".done/laion_00001.json")]
    require_kept(run / "features", lambda: extract(run), redo=lambda: remove(*undone))
    assert set(read_manifest(folders[0]).shards) == {"laion_00000", "laion_00001"}


def test_statistics(tmp_path) -> None:
    run = tmp_path / "run"
    texts: list[str | None] = [f"a red dog and {number} cats on a table" for number in range(12)]
    write_caption_shards(run, {"s0": caption_rows("s0", texts, texts), "s1": caption_rows("s1", texts, texts)})
    run_stage(run)
    scatter(run / "captions")
    stats = run / "stats"
    undone = (
        stats / "manifest.json",
        stats / "counts" / "manifest.json",
    )
    require_kept(stats, lambda: run_stage(run), redo=lambda: remove(*undone))


def test_samples(tmp_path) -> None:
    run = make_sampling_run(tmp_path)
    line = ["--recipe", str(write_sampling_recipe(run)), "--run", str(run), "--stage", "2"]
    line += ["--set", "engine.in_process=true"]
    sample(line)
    folder = run / "samples" / "stage2"
    require_kept(run / "samples", lambda: sample(line), redo=lambda: remove(folder / "wide.png"))
    (folder / "tall.png").write_bytes(NOISE)
    with pytest.raises(UserError, match=r"tall\.png is in the way: it is no image that this command has drawn"):
        sample(line)
    assert (folder / "tall.png").read_bytes() == NOISE


def test_a_damaged_summary_is_put_aside_and_not_lost(tmp_path) -> None:
    (tmp_path / "summary.json").write_bytes(b'{"seconds": {"wor')
    with pytest.raises(UserError, match=r"summary\.json is damaged .*put a copy of it back, or move it away"):
        read_summary(tmp_path)
    update_summary(tmp_path, "seconds.world", 1.5)
    assert read_summary(tmp_path) == {"seconds": {"world": 1.5}}
    (aside,) = tmp_path.glob("summary-damaged-*.json")
    assert aside.read_bytes() == b'{"seconds": {"wor'
