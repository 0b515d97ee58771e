"""Previews of a training stage on disk: `previews/step-<k>/<number>.png`, each with its prompt in it, and a page."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, PngImagePlugin

from pipelines.store.files import atomic_folder, discard_folder, own_files, remove_temporary_files
from pipelines.store.png_files import DAMAGE

FOLDER = "previews"
STEP = re.compile(r"step-(0|[1-9][0-9]*)")
FILE = re.compile(r"[0-9]{2}\.png")
PROMPT = "prompt"

Pictures = Sequence[tuple[str, Image.Image]]  # each with its prompt


@dataclass(frozen=True)
class Preview:
    """A preview on disk, what it was drawn of, and how many of its step before it were drawn of the same."""

    path: Path
    prompt: str
    copy: int = 0

    @property
    def row(self) -> tuple[str, int]:
        """What the previews of one place in a recipe's list share over all steps."""
        return self.prompt, self.copy


def preview_folder(stage_directory: Path, step: int) -> Path:
    """Return where the previews of a step are."""
    return stage_directory / FOLDER / f"step-{step}"


def preview_steps(stage_directory: Path) -> list[int]:
    """Return the steps that a stage has previews of, in order."""
    folder = stage_directory / FOLDER
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(found[1]) for name in names if (found := STEP.fullmatch(name)))


def read_previews(stage_directory: Path, step: int) -> list[Preview]:
    """Return the previews of a step, in the order of their numbers; what cannot be read as one of ours is left out."""
    found, copies = [], Counter[str]()
    for path in own_files(preview_folder(stage_directory, step), FILE):
        try:
            with Image.open(path, formats=["PNG"]) as image:
                prompt = image.info.get(PROMPT)
        except DAMAGE:  # which `make verify` tells
            continue
        if isinstance(prompt, str):
            found.append(Preview(path, prompt, copies[prompt]))
            copies[prompt] += 1
    return found


def write_previews(stage_directory: Path, step: int, pictures: Pictures) -> None:
    """Write the previews of a step at once; former ones of that step make room.

    Raises:
        UserError: something else is in their place.
        OSError: the disk is full or may not be written.
    """
    remove_previews(stage_directory, step)
    with atomic_folder(preview_folder(stage_directory, step)) as temporary:
        for number, (prompt, image) in enumerate(pictures):
            chunks = PngImagePlugin.PngInfo()
            chunks.add_itxt(PROMPT, prompt)
            image.save(temporary / f"{number:02d}.png", format="PNG", pnginfo=chunks)


def remove_previews(stage_directory: Path, step: int) -> None:
    """Remove the previews of a step; what somebody has put beside them keeps its folder."""
    folder = preview_folder(stage_directory, step)
    if folder.is_dir():
        remove_temporary_files(folder)
        for path in own_files(folder, FILE):
            path.unlink()
        discard_folder(folder)
