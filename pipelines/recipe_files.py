"""The recipe that is meant: a file of the user's, or one that is shipped, by its name."""

from collections.abc import Sequence
from pathlib import Path

from errors import MissingFileError, UserError
from pipelines.as_typed import typed_flag, typed_path

HOUSE = Path(__file__).resolve().parent.parent
# Of a clone, and of an installed package.
SHIPPED = (HOUSE / "recipes", HOUSE / "atelier" / "shipped")


def find_recipe(text: str) -> Path:
    """Return the file of a recipe: as typed if there is one, else the shipped one of that name.

    `pixart-alpha`, `pixart-alpha.toml` and `recipes/pixart-alpha.toml` name the same one.

    Raises:
        MissingFileError: there is neither; names those that are shipped.
        UserError: nothing is typed.
    """
    if not text.strip():
        raise UserError(f"{typed_flag('recipe')} is empty: type a value, or leave it out")
    typed = typed_path(text)
    if typed.is_file():
        return typed
    for path in shipped_recipes():
        if text in (path.stem, path.name, f"recipes/{path.name}"):
            return path
    if typed.exists():
        return typed
    names = ", ".join(path.stem for path in shipped_recipes())
    raise MissingFileError(f"recipe {text} does not exist; the shipped ones are {names}")


def default_recipe() -> Path:
    """Return the recipe of a run for which none has been named: the paper's."""
    return find_recipe("pixart-alpha")


def shipped_recipes() -> Sequence[Path]:
    """Return the files of the recipes that came with the program."""
    return sorted(path for folder in SHIPPED for path in folder.glob("*.toml"))
