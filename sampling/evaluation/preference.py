"""A page on which people compare checkpoints blindly, as in the paper's user study (Figure 5).

The page holds pictures and opaque codes and nothing else; which checkpoint a code stands for is in a key file that
stays behind in the run.
"""

import base64
import hashlib
import html
import io
import itertools
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from errors import MissingFileError, UserError
from pipelines.as_typed import typed_command
from pipelines.command import Command
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_write_bytes, atomic_write_json, one_at_a_time
from pipelines.store.manifest import Fingerprint
from pipelines.store.png_files import read_picture
from pipelines.store.state_files import read_state, state_of
from pipelines.store.tables import MEND_SHARD, read_table
from sampling.evaluation.config import EvaluationConfig
from sampling.evaluation.contestants import Contestant, check_samples, draw_samples, find_contestants
from sampling.images import MEND

TEMPLATE = Path(__file__).parent / "templates" / "preference.html"
PAGE_NAME = "preference.html"
KEY_NAME = "preference-key.json"
JPEG_QUALITY = 92

log = get_logger("evaluation")


def write_page(command: Command) -> Path:
    """Draw what is missing, then write the page and its key below `RUN/evaluation/<stage>-preference/`.

    Raises:
        UserError: there are fewer than two checkpoints, or they have no prompt in common.
    """
    contestants = _contestants(command)
    draw_samples(contestants, run=command.run)
    config = command.recipe.table("evaluation", EvaluationConfig)
    pictures = {item.title: _read_samples(item.folder) for item in contestants}
    pairs, key = make_pairs(pictures, seed=config.preference_seed)
    shown = {code: path for pair, paths in pairs for code, path in zip(pair["codes"], paths, strict=True)}
    # Votes are on these very pictures: other weights or settings make another study.
    names = ("checkpoint_fingerprint", "samples_fingerprint", "requests")
    drawn = {item.title: [item.inputs()[name] for name in names] for item in contestants}
    identity = Fingerprint.of({"key": key, "questions": config.preference_questions, "drawn": drawn})
    study = {
        "study": identity.digest[:16],
        "questions": config.preference_questions,
        "pairs": [pair for pair, _ in pairs],
        "images": {code: _embed(path, config.preference_pixels) for code, path in shown.items()},
    }
    folder = preference_folder(command)
    page = TEMPLATE.read_text(encoding="utf-8")
    # Inside a script element only `<` means something to HTML.
    data = json.dumps(study, ensure_ascii=False).replace("<", "\\u003c")
    page = page.replace("{{title}}", html.escape("Which image?")).replace("{{study}}", data)
    content = {
        "study": study["study"],
        "seed": config.preference_seed,
        "questions": config.preference_questions,
        "checkpoints": {item.title: item.inputs() for item in contestants},
        "codes": key,
        "files": {code: path.name for code, path in shown.items()},
    }
    with one_at_a_time(folder):
        atomic_write_json(folder / KEY_NAME, content)
        atomic_write_bytes(folder / PAGE_NAME, page.encode())
    num_votes = len(pairs) * len(config.preference_questions)
    log.info(
        f"{folder / PAGE_NAME}: {len(pairs):,} pairs, {num_votes:,} votes; send the page alone, keep {KEY_NAME}, put "
        f"the CSV files that come back into {folder}"
    )
    return folder / PAGE_NAME


def describe_page(command: Command) -> list[str]:
    """Return what `write_page` would do, line by line."""
    contestants = _contestants(command)
    check_samples(contestants)
    lines = [f"{item.title}: would draw {len(item.job.pending()):,} images into {item.folder}" for item in contestants]
    return [*lines, f"would write {preference_folder(command) / PAGE_NAME}"]


def preference_folder(command: Command) -> Path:
    """Return the folder of page, key and votes."""
    return command.run / "evaluation" / f"{command.stage_name}-preference"


def _contestants(command: Command) -> list[Contestant]:
    config = command.recipe.table("evaluation", EvaluationConfig)
    contestants = find_contestants(command, config)
    if len(contestants) < 2:
        raise UserError("a comparison needs two checkpoints: name others in evaluation.compare")
    return contestants


def _read_samples(folder: Path) -> dict[tuple[str, int], tuple[str, Path]]:
    """Return prompt and file by key and number of the image among its prompt's."""
    found: dict[tuple[str, int], tuple[str, Path]] = {}
    num_seen: Counter[str] = Counter()
    for row in read_table(folder / "samples.parquet", ["key", "prompt", "file"], mend=MEND_SHARD).to_pylist():
        found[row["key"], num_seen[row["key"]]] = (row["prompt"], folder / row["file"])
        num_seen[row["key"]] += 1
    return found


def make_pairs(
    pictures: Mapping[str, Mapping[tuple[str, int], tuple[str, Path]]], *, seed: int
) -> tuple[list[tuple[dict[str, Any], tuple[Path, Path]]], dict[str, str]]:
    """Return the pairs in the order of the page, left picture first, and the key from code to checkpoint.

    Every two checkpoints meet once for each picture that both have. Order and sides are shuffled by `seed`; a code
    belongs to one picture of one pair, so that nobody can learn what a checkpoint's codes look like.

    Raises:
        UserError: two checkpoints have no prompt in common.
    """
    generator = random.Random(seed)
    pairs: list[tuple[dict[str, Any], tuple[Path, Path]]] = []
    key: dict[str, str] = {}
    for first, second in itertools.combinations(pictures, 2):
        common = [
            item for item in pictures[first] if pictures[second].get(item, ("", None))[0] == pictures[first][item][0]
        ]
        if not common:
            raise UserError(f"{first} and {second} have no prompt in common")
        for item in common:
            sides = [first, second]
            generator.shuffle(sides)
            codes = [_code(seed, item, first, second, side) for side in sides]
            key |= dict(zip(codes, sides, strict=True))
            prompt = pictures[first][item][0]
            left, right = (pictures[side][item][1] for side in sides)
            pairs.append(({"prompt": prompt, "codes": codes}, (left, right)))
    generator.shuffle(pairs)
    return pairs, key


def _code(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _embed(path: Path, longest_side_pixels: int) -> str:
    # Decoded and encoded again, so that no text chunk with the checkpoint's name comes along.
    picture = read_picture(path, mend=MEND)
    scale = longest_side_pixels / max(picture.size)
    if scale < 1:
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


@dataclass(frozen=True, kw_only=True)
class StudyKey:
    """What stands in `KEY_NAME`: which checkpoint, and file of it, a code of the page stands for; what was asked."""

    study: str
    seed: int
    questions: list[str]
    checkpoints: dict[str, dict[str, Any]]
    codes: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)  # none in those of before


def read_key(folder: Path) -> dict[str, Any]:
    """Return the key of a page.

    Raises:
        MissingFileError: there is none; names the command.
        UserError: it is damaged; names it.
    """
    path, command = folder / KEY_NAME, typed_command("eval", {"task": "preference"})
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist: `{command}` writes it with the page")
    mend = f"type `{command}` again: that writes it anew, and the same one if nothing has changed since"
    content = read_state(path, mend=mend)
    return asdict(state_of(StudyKey, content, where=str(path), mend=mend))
