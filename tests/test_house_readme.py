"""The README's commands, in its order, on small data, with the embedded models in place of the large ones."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from atelier.commands import SUBCOMMANDS
from atelier.door import flags_of_make, room_words
from tests.conftest import REPOSITORY
from tests.raw_shards import encode, write_tar
from tests.warm_python import run_module
from toyworld.render import render
from toyworld.scenes import Scene, random_scene
from toyworld.wording import dense_caption

README = (REPOSITORY / "README.md").read_text()
# Typed behind the first command, and remembered: the embedded models, and a few small steps.
SMALL = """
    engine.gpus_per_worker=0 engine.in_process=true captioning.model=toyworld/weights/llava
    features.text_model=toyworld/weights/t5 features.text_dtype=float32 features.vae_model=toyworld/weights/vae
    features.vae_dtype=float32 features.stage2.resolution=64 model.num_layers=5 model.num_heads=4 model.head_dim=32
    model.num_classes=24 training.dtype=fp32 training.zero_stage=0 training.threads_per_process=1
    training.stage2.num_steps=4 training.stage2.global_batch_size=8 training.stage2.validation_shards=[]
    training.checkpoint_every=4 sampling.num_steps=3 sampling.num_threads=1 sampling.size=64x64
"""
SMALL_FINETUNE = "training.finetune.num_steps=4 training.finetune.global_batch_size=8 sampling.num_steps=3"
# What a reader has in other places, or less of.
ELSEWHERE = {
    "facebook/DiT-XL-2-256": "toyworld/weights/dit",
    "recipes/finetune.toml": "recipes/toyworld-finetune.toml",
    "GPUS=8": "GPUS=1",
}


def commands_of(title: str) -> list[str]:
    """The lines of the code block below a title."""
    block = re.search(rf"^## {title}\n\n```bash\n(.*?)```", README, re.DOTALL | re.MULTILINE)
    assert block is not None
    return block[1].splitlines()


def run_line(line: str, *, settings: str = "") -> str:
    """Do what a shell, make and atelier do with a line; returns what the command says."""
    for there, here in ELSEWHERE.items():
        line = line.replace(there, here)
    make, target, *assignments = shlex.split(line, comments=True)
    values = dict(assignment.split("=", 1) for assignment in assignments)
    if settings:
        values["SET"] = " ".join([*settings.split(), values.get("SET", "")]).strip()
    assert make == "make"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        module, *words = room_words([target, *flags_of_make(SUBCOMMANDS[target], list(values))])
    done = run_module(module, words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def scenes(count: int) -> list[tuple[Scene, bytes]]:
    rng = np.random.default_rng(0)
    found = [random_scene(rng) for _ in range(count)]
    return [(scene, encode(render(scene, 80, 64, rng=rng), quality=92)) for scene in found]


def test_four_commands_lead_from_a_folder_of_photos_to_samples(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    rng = np.random.default_rng(1)
    for number, (scene, picture) in enumerate(scenes(12)):
        (tmp_path / "photos" / "2026").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "2026" / f"IMG {number:04d}.JPG").write_bytes(picture)
        (tmp_path / "photos" / "2026" / f"IMG {number:04d}.txt").write_text(dense_caption(scene, rng))
    lines = [line.replace("runs/mine", str(tmp_path / "mine")) for line in commands_of("Your own images")]
    assert len(lines) == 4
    for number, line in enumerate(lines):
        said = run_line(line, settings="" if number else SMALL_FINETUNE)
        assert ("as remembered in" in said) == bool(number)
    assert len(list((tmp_path / "mine" / "samples").rglob("*.png"))) >= 1


def test_the_commands_of_the_paper_run_in_their_order_on_sa_1b(tmp_path) -> None:
    pictures = scenes(16)
    for shard in range(2):
        part = pictures[8 * shard : 8 * shard + 8]
        members = [(f"./sa_{8 * shard + number}.jpg", data) for number, (_, data) in enumerate(part)]
        members += [(f"./sa_{8 * shard + number}.json", b'{"annotations": []}') for number in reversed(range(8))]
        (tmp_path / "data").mkdir(exist_ok=True)
        write_tar(tmp_path / "data" / f"sa_{shard:06d}.tar", members)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    done = []
    for line in commands_of("The paper"):
        target = line.split()[1]
        if target in ("app", "help"):  # a page that stays, and a list
            continue
        for there, here in {"/data/coco/val2014": "data/sa_*.tar", "/data/": "data/", "000999": "000001",
                            "runs/": "", "prompts.txt": "prompts.txt"}.items():  # fmt: skip
            line = line.replace(there, here)
        line = re.sub(r"(SHARDS='|RUN=|PROMPTS=|REFERENCE=)(?!/)", rf"\g<1>{tmp_path}/", line)
        line = re.sub(r" CLIP=\S+", " SET=evaluation.vision=toyworld/weights/llava", line)
        run_line(line, settings="" if done else SMALL)
        done.append(target)
    assert done == ["caption", "stats", "columns", "choose", "features", "buckets", "train", "sample", "eval", "verify"]
    assert (tmp_path / "sam" / "stats" / "report.html").stat().st_size > 10_000
    assert Path(tmp_path / "sam" / "evaluation").is_dir()
