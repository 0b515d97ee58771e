"""The command line all rooms share: `python -m <room> --recipe R --run RUN [--stage S] [--set key=value] [--plan]`."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from errors import ProgramFault, UserError, users_message
from pipelines.engine.progress import console
from pipelines.overrides import split_settings
from pipelines.recipe import Recipe, load_recipe
from pipelines.store.files import is_remote

FAULT = (
    "this is a fault of the program, not of what was typed: please report it with the lines above; what is done is kept"
)


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a user asked of a room; `stage` is the name of a stage's tables and folders, None in rooms without."""

    recipe: Recipe
    run: Path
    stage: str | None
    is_plan: bool

    @property
    def stage_name(self) -> str:
        """The stage, in rooms that have some."""
        assert self.stage is not None, "this room has no stages"
        return self.stage


def parse_command(
    room: str, description: str, *, argv: Sequence[str] | None = None, has_stages: bool = False
) -> Command:
    """Parse a room's command line; with `has_stages` it must name one with `--stage`.

    Raises:
        UserError: as `load_recipe`, the run's folder is a URL, or something typed is not UTF-8.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {room}", description=description)
    parser.add_argument("--recipe", type=Path, required=True, help="TOML recipe, see recipes/")
    parser.add_argument("--run", required=True, help="local folder of the run; each room writes one sub-folder")
    if has_stages:
        parser.add_argument("--stage", required=True, help="a named table of the recipe; 2 is short for stage2")
        parser.add_argument("--phase", help="512 with --stage 3 is short for --stage stage3-512")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a recipe key; the value is read as TOML, what is none is taken as text",
    )
    parser.add_argument(
        "--settings",
        dest="overrides",
        action="extend",
        type=split_settings,
        metavar="KEY=VALUE ...",
        help="several of them in one text",
    )
    parser.add_argument(
        "--text",
        dest="texts",
        action="append",
        default=[],
        metavar="KEY=TEXT",
        help="override a recipe key with this text as it is; comes after --set",
    )
    parser.add_argument("--plan", action="store_true", help="print what would be done, with sizes, and stop")
    words = sys.argv[1:] if argv is None else argv
    _require_utf8(words)
    options = parser.parse_args(words)
    stage = full_stage_name(options.stage, options.phase) if has_stages else None
    return Command(
        recipe=load_recipe(options.recipe.expanduser(), options.overrides, texts=options.texts, stage=stage),
        run=run_folder(options.run),
        stage=stage,
        is_plan=options.plan,
    )


def full_stage_name(text: str, phase: str | None = None) -> str:
    """Return the name that `text` is short for: a number N for `stageN`, and with a phase P `stageN-P`."""
    name = f"stage{text}" if text.isdecimal() else text
    return f"{name}-{phase}" if phase else name


def run_folder(text: str) -> Path:
    """Return the folder that a user has typed as RUN, with `~` filled in.

    Raises:
        UserError: it is a URL.
    """
    if is_remote(text):
        raise UserError(
            f"RUN {text} is a URL: outputs need a local or mounted folder, where files can be renamed into place"
        )
    return Path(text).expanduser()


def _require_utf8(words: Sequence[str]) -> None:
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"{word!r} was typed in another encoding than UTF-8") from None


def run_command(room: str, main: Callable[[], None]) -> int:
    """Run a room's `main` and return the exit status.

    What a user can mend ends in one clear message and status 2; `ATELIER_TRACEBACK=1` in the environment shows the
    traceback all the same. Anything else is a fault of the program: its traceback is shown, and the status is 1.
    """
    try:
        main()
    except KeyboardInterrupt:
        console.print(Text.assemble((f"{room}:", "bold"), " interrupted; the same command continues"))
        return 130
    except Exception as error:  # noqa: BLE001 - said in full, and the command ends
        message = users_message(error)
        if message is None:
            _say(room, f"{_traceback(error)}\n{FAULT}")
            return 1
        if os.environ.get("ATELIER_TRACEBACK"):
            traceback.print_exception(error)
        _say(room, message)
        return 2
    sys.stdout.flush()
    return 0


def _traceback(error: Exception) -> str:
    return str(error) if isinstance(error, ProgramFault) else "".join(traceback.format_exception(error)).rstrip()


def _say(room: str, text: str) -> None:
    console.print(Text.assemble((f"{room}:", "bold red"), f" {text}"), soft_wrap=True)
