"""Where the captions of a run lie: `captions/`, and of each pass `captions@<name>/`."""

from pathlib import Path

from pipelines.columns.columns_folders import CAPTIONS, MAIN_CAPTION


def captions_folder(run: Path, column: str = MAIN_CAPTION) -> Path:
    """Return the folder of the captions themselves, or of those of a pass."""
    return run / (CAPTIONS if column == MAIN_CAPTION else f"{CAPTIONS}@{column}")
