"""A subject that the toy world does not have, for DreamBooth: a yellow crescent, called by a token without a meaning.

The world, its shards and its judge know nothing of it: `scenes.SHAPES` are four. A picture of it holds nothing else, on
a plain background.
"""

import json
from pathlib import Path

import numpy as np

from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_file, atomic_write_bytes, exclusive
from toyworld.render import render
from toyworld.scenes import BACKGROUNDS, POSITIONS, SIZES, Scene, SceneObject, random_scene
from toyworld.wording import dense_caption
from toyworld.world import is_held_out

log = get_logger("toyworld")

SHAPE, COLOUR, TOKEN = "crescent", "yellow", "sks"
# What stands for the subject in a text: the token, and the colour as its class.
NAME = f"{COLOUR} {TOKEN}"
SIDE_PIXELS = 64
# What stands in its place while a caption is worded; its size is not said.
STAND_IN = SceneObject("star", "blue", "small", "center")
SUBJECT_KEY, OTHER_KEY = "subject", "other"


def subject_scene(position: str, background: str, *, size: str) -> Scene:
    """Return the scene of the subject alone at an anchor, on a plain background."""
    return Scene((SceneObject(SHAPE, COLOUR, size, position),), background, "plain")


def subject_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a dense caption of the subject: its token, place and background, and not its size."""
    item = scene.objects[0]
    stand_in = SceneObject(STAND_IN.shape, STAND_IN.colour, STAND_IN.size, item.position)
    said = dense_caption(Scene((stand_in,), scene.background, scene.pattern), rng)
    for size in ("small ", "little "):
        said = said.replace(f"a {size}{STAND_IN.colour} {STAND_IN.shape}", f"a {NAME}")
    return said


def subject_scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    """Return scenes of the subject: five in a row at five places, six on six backgrounds, sizes in turn."""
    places = [str(place) for _ in range(count) for place in rng.permutation(POSITIONS)]
    grounds = [str(ground) for _ in range(count) for ground in rng.permutation(BACKGROUNDS)]
    return [subject_scene(places[i], grounds[i], size=SIZES[i % 2]) for i in range(count)]


def other_scenes(count: int, rng: np.random.Generator, *, held_out: bool) -> list[Scene]:
    """Return scenes of the world, of arrangements that its shards hold or of those that they do not."""
    found: list[Scene] = []
    while len(found) < count:
        scene = random_scene(rng)
        found += [scene] if is_held_out(scene) == held_out else []
    return found


def write_subject(run: Path, *, seed: int, num_images: int, num_prompts: int, num_others: int, num_prior: int) -> None:
    """Write what DreamBooth on the toy world reads: images of the subject, and prompts.

    `raw/subject/` has `num_images` PNG with their captions; `raw/prior.jsonl` prompts of the world, for images that the
    model draws before; `raw/prompts.jsonl` prompts to score: of the subject, and of arrangements that no shard holds.
    """
    raw = run / "raw"
    with exclusive(raw):
        rng = np.random.default_rng([seed, 0])
        (raw / "subject").mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(subject_scenes(num_images, rng)):
            picture = render(scene, SIDE_PIXELS, SIDE_PIXELS, rng=rng)
            with atomic_file(raw / "subject" / f"{number:03d}.png") as path:
                picture.save(path, format="PNG")
            atomic_write_bytes(raw / "subject" / f"{number:03d}.txt", subject_caption(scene, rng).encode())
        rng = np.random.default_rng([seed, 1])
        prior = other_scenes(num_prior, rng, held_out=False)
        _write_prompts(raw / "prior.jsonl", [(OTHER_KEY, scene, dense_caption(scene, rng)) for scene in prior])
        rng = np.random.default_rng([seed, 2])
        subjects = [(SUBJECT_KEY, scene, subject_caption(scene, rng)) for scene in subject_scenes(num_prompts, rng)]
        others = other_scenes(num_others, rng, held_out=True)
        told = [(OTHER_KEY, scene, dense_caption(scene, rng)) for scene in others]
        _write_prompts(raw / "prompts.jsonl", [*subjects, *told])
    log.info(
        f"{raw}: {num_images} images of the subject, {num_prior} prompts for the prior, {num_prompts} of the "
        f"subject and {num_others} others to score"
    )


def _write_prompts(path: Path, rows: list[tuple[str, Scene, str]]) -> None:
    """Write a line a prompt: of the subject with its place and background, of others with their scene."""
    lines = []
    for number, (kind, scene, text) in enumerate(rows):
        truth: dict[str, object] = {"scene": json.loads(scene.to_json())}
        if kind == SUBJECT_KEY:
            truth = {"position": scene.objects[0].position, "background": scene.background}
        lines.append(json.dumps({"key": f"{kind}_{number:04d}", "prompt": text, **truth}))
    atomic_write_bytes(path, "".join(f"{line}\n" for line in lines).encode())
