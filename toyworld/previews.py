"""Previews on the run's page: what a stage's prompts gave while it trained, some of the steps of each."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.store.png_files import read_picture
from pipelines.store.previews import preview_steps, read_previews
from toyworld.gallery import embed_picture, spread

MAX_STEPS_SHOWN = 8


@dataclass(frozen=True)
class PreviewRow:
    """A prompt, and what it gave after some steps: each step and its picture."""

    prompt: str
    pictures: list[tuple[int, str]]


def preview_rows(run: Path, stage: str) -> list[PreviewRow]:
    """Return the prompts of a stage's last previews, with their pictures of some steps, first and last among them."""
    directory = run / "training" / stage
    steps = preview_steps(directory)
    if not steps:
        return []
    chosen = [*spread(steps[:-1], MAX_STEPS_SHOWN - 1), steps[-1]]
    last = read_previews(directory, steps[-1])
    pictures: dict[tuple[str, int], list[tuple[int, str]]] = {each.row: [] for each in last}
    for step in chosen:
        for each in read_previews(directory, step):
            if each.row in pictures:
                picture = embed_picture(read_picture(each.path, mend="delete it: it is only for people to look at"))
                pictures[each.row].append((step, picture))
    return [PreviewRow(prompt, found) for (prompt, _), found in pictures.items()]
