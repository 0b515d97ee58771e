"""Edges of scenes that lead a control branch: pictures to learn from, and edges with prompts that say colours alone.

A text names the objects in reading order, each by its colour and none by shape, size or place, and the background. So
shape and place of what is drawn come from the edges or from nowhere.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from encoders.control_kinds import open_control_maps
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_file, atomic_write_bytes, exclusive
from toyworld.render import render
from toyworld.scenes import Scene, random_scene
from toyworld.shards import Picture, write_img2dataset_shard
from toyworld.world import is_held_out

log = get_logger("toyworld")

SIDE_PIXELS = 64
SAMPLES_PER_SHARD = 500
# Settings of `control-canny` in recipes/toyworld-control.toml: the toy VAE keeps more of lines three pixels wide.
CANNY = {"widen_pixels": 1}
SHARDS, EDGES, LED, ALONE = "scenes", "edges", "prompts.jsonl", "prompts-alone.jsonl"
_COUNTS = {1: "a", 2: "two", 3: "three"}


def edges_scene(rng: np.random.Generator, *, held_out: bool) -> Scene:
    """Return a scene whose objects share a colour, on a plain background, of which edges would be all there is else.

    Its arrangement is one that shards of the world hold or, `held_out`, one that they do not.
    """
    while True:
        drawn = random_scene(rng)
        objects = tuple(replace(item, colour=drawn.objects[0].colour) for item in drawn.objects)
        scene = Scene(objects, drawn.background, "plain")
        if is_held_out(scene) == held_out:
            return scene


def colours_caption(scene: Scene) -> str:
    """Return what is said of a scene: how many objects there are, their colour, and the background."""
    number = len(scene.objects)
    objects = f"{_COUNTS[number]} {scene.objects[0].colour} shape{'' if number == 1 else 's'}"
    return f"The image features {objects}. The background is {scene.pattern} {scene.background}."


def write_edges(run: Path, *, seed: int, num_images: int, num_prompts: int) -> None:
    """Write what the demo of control reads.

    `raw/scenes/` has shards of pictures, each with its `colours_caption`; `raw/edges/` the edges of scenes of
    arrangements that no shard holds; `raw/prompts.jsonl` a line for each of these with its `control`, the colours and
    the scene; `raw/prompts-alone.jsonl` the same without `control`.

    Args:
        run: folder of the run.
        seed: of the scenes.
        num_images: to learn from.
        num_prompts: to draw.
    """
    raw = run / "raw"
    with exclusive(raw):
        for start in range(0, num_images, SAMPLES_PER_SHARD):
            stop = min(start + SAMPLES_PER_SHARD, num_images)
            stem = raw / SHARDS / f"scenes_{start // SAMPLES_PER_SHARD:05d}"
            stem.parent.mkdir(parents=True, exist_ok=True)
            write_img2dataset_shard(stem, _pictures(seed, start, stop))
        _write_prompts(raw, seed=seed, num_prompts=num_prompts)
    log.info(f"{raw}: {num_images:,} pictures of scenes, and edges of {num_prompts} others to draw by")


def _pictures(seed: int, start: int, stop: int) -> Iterator[Picture]:
    for index in range(start, stop):
        rng = np.random.default_rng([seed, 0, index])
        scene = edges_scene(rng, held_out=False)
        yield Picture(
            key=f"{index // SAMPLES_PER_SHARD:05d}{index % SAMPLES_PER_SHARD:04d}",
            scene=scene,
            image=render(scene, SIDE_PIXELS, SIDE_PIXELS, rng=rng),
            alt_text=colours_caption(scene),
            is_broken=False,
            rng=rng,
        )


def _write_prompts(raw: Path, *, seed: int, num_prompts: int) -> None:
    (raw / EDGES).mkdir(parents=True, exist_ok=True)
    maps = open_control_maps("canny", CANNY, device=torch.device("cpu"))
    rng = np.random.default_rng([seed, 1])
    rows: list[dict[str, Any]] = []
    for number in range(num_prompts):
        scene = edges_scene(rng, held_out=True)
        picture = np.asarray(render(scene, SIDE_PIXELS, SIDE_PIXELS, rng=rng))
        file = f"{EDGES}/{number:04d}.png"
        with atomic_file(raw / file) as path:
            Image.fromarray(maps.draw(picture)).save(path, format="PNG")
        row = {"key": f"edges_{number:04d}", "prompt": colours_caption(scene), "scene": json.loads(scene.to_json())}
        rows.append({**row, "control": file})
    alone = [{name: value for name, value in row.items() if name != "control"} for row in rows]
    for name, lines in ((LED, rows), (ALONE, alone)):
        atomic_write_bytes(raw / name, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
