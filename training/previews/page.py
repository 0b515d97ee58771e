"""The page of a stage's previews: a row of pictures for each prompt, a column for each step; a file beside them."""

import html
from pathlib import Path

from pipelines.store.files import atomic_write_bytes, remove_temporary_files
from pipelines.store.previews import FOLDER, preview_steps, read_previews

PAGE = "index.html"
STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --ink: #1d1c1a; --soft: #6b6862; --rule: #e4e1db; }
@media (prefers-color-scheme: dark) { :root { --paper: #161618; --ink: #eceae6; --soft: #a09d97; --rule: #34343a; } }
body { margin: 0; padding: 32px 24px; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { margin: 0 0 4px; font-size: 26px; letter-spacing: -.015em; }
p { margin: 0 0 24px; color: var(--soft); }
.table { overflow-x: auto; }
table { border-collapse: collapse; }
th { color: var(--soft); font-size: 13px; font-weight: 400; text-align: left;
  vertical-align: bottom; padding: 0 6px 6px; }
tbody th { position: sticky; left: 0; min-width: 170px; max-width: 240px; background: var(--paper); color: var(--ink);
  vertical-align: middle; padding: 6px 16px 6px 0; border-top: 1px solid var(--rule); overflow-wrap: anywhere; }
tbody td { padding: 6px; border-top: 1px solid var(--rule); }
img { display: block; width: 160px; height: 160px; object-fit: contain; border-radius: 6px; }
@media (max-width: 600px) { body { padding: 24px 14px; } tbody th { min-width: 96px; max-width: 120px; } }
"""


def write_page(stage_directory: Path) -> Path:
    """Write the page of all previews that a stage has by now, and return its path."""
    steps = preview_steps(stage_directory)
    pictures: dict[tuple[str, int], dict[int, Path]] = {}  # by row and step
    for step in steps:
        for preview in read_previews(stage_directory, step):
            pictures.setdefault(preview.row, {})[step] = preview.path
    folder = stage_directory / FOLDER
    name = html.escape(stage_directory.resolve().name)
    heads = "".join(f'<th scope="col">{"start" if step == 0 else f"step {step:,}"}</th>' for step in steps)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(prompt)}</th>'
        f"{''.join(_cell(prompt, by_step.get(step), folder=folder, step=step) for step in steps)}</tr>\n"
        for (prompt, _), by_step in pictures.items()
    )
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name} · previews</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>Previews of {name}</h1>\n"
        "<p>The average of the weights, drawn from the same noise each time.</p>\n"
        f'<div class="table" tabindex="0"><table>\n<thead><tr><td></td>{heads}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody>\n</table></div>\n</body>\n</html>\n"
    )
    remove_temporary_files(folder, PAGE)
    path = folder / PAGE
    atomic_write_bytes(path, page.encode())
    return path


def _cell(prompt: str, path: Path | None, *, folder: Path, step: int) -> str:
    if path is None:
        return "<td></td>"
    place = path.relative_to(folder).as_posix()
    alt = html.escape(f"{prompt}, after {step:,} steps", quote=True)
    return f'<td><a href="{place}"><img src="{place}" alt="{alt}" loading="lazy"></a></td>'
