"""Questions about the scenes of prompts, for a vision-language model, and whether its answers agree with the judge.

`RUN/judge/questions.jsonl` is in the layout of GenEval 2: each object of a scene is asked for as it is, and with
another colour, shape or place, of which the right answer is mostly no. Sizes are left out: the judge sees none. The
embedded LLaVA knows one form of question alone, and is right most often where the place comes first.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from encoders.weights import resolve_model
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_write_bytes, atomic_write_json, sha256_text
from pipelines.store.manifest import MANIFEST_NAME, read_manifest
from pipelines.store.png_files import read_picture
from pipelines.store.summary import update_summary
from pipelines.store.tables import MEND_SHARD, read_table
from toyworld.config import ToyworldConfig
from toyworld.mending import mend_sample
from toyworld.scenes import COLOURS, POSITIONS, SHAPES, Scene, SceneObject
from toyworld.scoring import read_prompt_scenes, sample_folders
from toyworld.wording import PLACES, parse_caption

QUESTIONS_NAME = "questions.jsonl"
QUESTION = 'Is the following true of the image? "{}" Answer yes or no.'
CLAIM = re.compile(r'"([^"]*)"')
OTHERS: dict[str, tuple[str, ...]] = {"colour": COLOURS, "shape": SHAPES, "position": POSITIONS}

log = get_logger("toyworld")


def write_questions(run: Path) -> None:
    """Write what is asked about the samples of the run's prompts; the same prompts give the same questions."""
    # Equal prompts are of scenes that differ in nothing that is asked.
    scenes = {prompt: scene for (_, prompt), scene in read_prompt_scenes(run).items()}
    lines = [_line(prompt, scene) for prompt, scene in scenes.items()]
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines).encode()
    path = run / "judge" / QUESTIONS_NAME
    if not path.is_file() or path.read_bytes() != text:
        atomic_write_bytes(path, text)


def _line(prompt: str, scene: Scene) -> dict[str, Any]:
    rng = np.random.default_rng(int(sha256_text(f"questions {prompt}")[:16], 16))
    questions: list[tuple[str, str]] = []
    skills: list[str] = []
    for item in scene.objects:
        questions.append((_question(item), "Yes"))
        skills.append("object")
        for name, words in OTHERS.items():
            others = [word for word in words if word != getattr(item, name)]
            other = replace(item, **{name: others[int(rng.integers(len(others)))]})
            is_there = any(_is_like(other, real) for real in scene.objects)
            questions.append((_question(other), "Yes" if is_there else "No"))
            skills.append(f"other {name}")
    return {"prompt": prompt, "vqa_list": questions, "skills": skills, "atom_count": len(scene.objects)}


def _question(item: SceneObject) -> str:
    place = PLACES[item.position][0]
    article = "an" if item.colour == "orange" else "a"
    return QUESTION.format(f"{place[0].upper()}{place[1:]}, there is {article} {item.colour} {item.shape}.")


def _is_like(first: SceneObject, second: SceneObject) -> bool:
    """Whether two are the same but for their sizes."""
    return replace(first, size="") == replace(second, size="")


def score_agreement(config: ToyworldConfig, run: Path) -> None:
    """Compare the answers that `make eval TASK=questions` has kept with what the judge sees in the same images.

    Writes `judge/<answers>.json` for each folder of answers, and `agreement.<answers>` of the summary.
    """
    for folder in sample_folders(run):
        for answers in sorted((run / "evaluation" / "answers").glob(f"{folder.name}-*")):
            if answers.name[len(folder.name) + 1 :].isalnum() and (answers / MANIFEST_NAME).is_file():
                figures = _agreement(config, folder, answers)
                if figures is not None:
                    atomic_write_json(run / "judge" / f"{answers.name}.json", figures)
                    update_summary(run, f"agreement.{answers.name}", figures["agreement"])


def _agreement(config: ToyworldConfig, folder: Path, answers: Path) -> dict[str, Any] | None:
    from toyworld.judge import Judge

    manifest = read_manifest(answers)
    tables = [read_table(answers / f"{name}.parquet", mend=MEND_SHARD) for name in manifest.shards]
    rows = [row for table in tables for row in table.to_pylist() if QUESTION.partition("{")[0] in row["question"]]
    if not rows:
        return None
    files = list(dict.fromkeys(row["file"] for row in rows))
    judge = Judge.load(resolve_model(config.judge).location)
    looks = judge.look([read_picture(folder / file, mend=mend_sample()) for file in files])
    seen = dict(zip(files, looks, strict=True))
    agreed: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row["said"] is not None:
            agreed[row["group"]].append((row["said"] == "yes") == _is_seen(row["question"], seen[row["file"]]))
    of_all = [agree for group in agreed.values() for agree in group]
    if not of_all:
        return None
    by_skill = {skill: {"agreement": float(np.mean(own)), "num": len(own)} for skill, own in agreed.items()}
    said = ", ".join(f"{skill} {own['agreement']:.1%} of {own['num']}" for skill, own in by_skill.items())
    log.info(f"{answers.name}: answers and judge agree on {np.mean(of_all):.1%} of {len(of_all)} questions ({said})")
    return {
        "agreement": float(np.mean(of_all)),
        "num_questions": len(of_all),
        "num_images": len(files),
        "by_skill": by_skill,
        "unknown": dict(Counter(row["reject"] for row in rows if row["reject"] is not None)),
        "asked_of": manifest.extra["model"],
        "answers": manifest.extra["answers"],
        "judge_fingerprint": resolve_model(config.judge).identity,
    }


def _is_seen(question: str, seen: Mapping[str, tuple[str, str]]) -> bool:
    """Whether the judge sees what a question asks for, at its place."""
    claim = CLAIM.search(question)
    assert claim is not None
    (said,) = parse_caption(claim.group(1))
    assert said.position is not None
    return seen.get(said.position) == (said.shape, said.colour)
