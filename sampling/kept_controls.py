"""Copies of the images that have led the app's, so that what is brought back from its history can be drawn again."""

from pathlib import Path

from pipelines.store.files import atomic_write_bytes, sha256_file
from sampling.control_images import open_control_image
from sampling.requests import MAP_FOLDER

# Below a folder of the app's images: what was uploaded, named by its bytes.
GIVEN_FOLDER = f"{MAP_FOLDER}/given"
NAME_LENGTH = 16


def keep_control(path: Path, folder: Path) -> Path:
    """Copy an image that leads what is drawn below the folder of images, unless it is there; returns the copy.

    Raises:
        MissingFileError, UserError: it is not there, or no image.
    """
    control = open_control_image(path)
    kept = folder / GIVEN_FOLDER / f"{_name(control.identity)}{path.suffix.lower()}"
    if not kept.is_file() or f"sha256:{sha256_file(kept)}" != control.identity:
        atomic_write_bytes(kept, path.read_bytes())
    return kept.absolute()


def find_control(folder: Path, identity: str | None) -> str | None:
    """Return the kept image of a hash; None where nothing led, or it is gone."""
    if identity is None:
        return None
    found = sorted((folder / GIVEN_FOLDER).glob(f"{_name(identity)}.*"))
    return str(found[0].absolute()) if found else None


def _name(identity: str) -> str:
    return identity.removeprefix("sha256:")[:NAME_LENGTH]
