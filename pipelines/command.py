"""The command line all rooms share: `python -m <room> --recipe R --run RUN [--stage S] [--set key=value] [--plan]`."""

import argparse
import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from errors import ProgramFault, UserError, users_message
from pipelines.as_typed import typed_flag, typed_path
from pipelines.engine.progress import console, get_logger
from pipelines.overrides import Setting, named_setting, split_settings
from pipelines.recipe import DataConfig, Recipe, load_recipe, only_name
from pipelines.recipe_files import find_recipe
from pipelines.run_memory import SHARDS_KEY, Chosen, choose_recipe, remember, run_shards, typed_shards
from pipelines.store.files import is_remote

# Before a whole command, of which a process does a part: it takes what is typed, and neither remembers nor recalls.
EXACTLY = "--exactly"
FAULT = (
    "this is a fault of the program, not of what was typed: please report it with the lines above; what is done is kept"
)
log = get_logger("run")


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a user asked of a room.

    Attributes:
        recipe: with all settings of the command.
        run: folder of the run.
        stage: name of a stage's tables and folders, None in rooms without.
        is_plan: whether nothing is to be done.
        chosen: recipe and settings as they were typed or remembered; None for a part of a command, such as a rank.
    """

    recipe: Recipe
    run: Path
    stage: str | None
    is_plan: bool
    chosen: Chosen | None = None

    @property
    def stage_name(self) -> str:
        """The stage, in rooms that have some."""
        assert self.stage is not None, "this room has no stages"
        return self.stage

    @functools.cached_property
    def raw_shards(self) -> list[str]:
        """The run's raw shards, sorted by name: typed, else of a typed recipe, remembered, or the recipe's.

        Raises:
            MissingFileError, UserError: there are none, `[data]` is wrong, or a pattern matches nothing.
        """
        data = self.recipe.table("data", DataConfig)
        if self._has_typed_shards:
            return typed_shards(self.run, data)
        return run_shards(self.run, data, is_recipe_typed=self.chosen is None or self.chosen.is_typed)

    @property
    def _has_typed_shards(self) -> bool:
        return self.chosen is not None and any(setting.key == SHARDS_KEY for setting in self.chosen.settings)

    def require_typed_shards(self) -> None:
        """Refuse SHARDS that are not there, in a room that reads none but remembers them; raises as `raw_shards`."""
        if self._has_typed_shards:
            _ = self.raw_shards

    def require_one_of(self, *keys: str) -> None:
        """Refuse several of some keys that are typed for one command, of which it could take only one.

        Raises:
            UserError: names what they were typed in.
        """
        settings = () if self.chosen is None else self.chosen.settings
        typed = {setting.key: setting for setting in settings if setting.key in keys and not setting.is_remembered}
        if len(typed) > 1:
            named = [f"{key} ({typed[key].origin})" for key in keys if key in typed]
            raise UserError(f"{' and '.join(named)} are both typed, and only one can be drawn: leave one out")

    def remember(self) -> None:
        """Note for later commands of the run what was typed for this one; called when nothing is left to refuse."""
        if self.chosen is not None:
            keys = {self._whole_key(setting): setting for setting in self.chosen.settings}
            remember(self.run, self.chosen, keys=keys, shards=self.raw_shards if self._has_typed_shards else ())

    def _whole_key(self, setting: Setting) -> str:
        return setting.key_of_stage(self.stage)

    @property
    def words(self) -> list[str]:
        """The whole command, for the processes that do a part of it: they look into no memory of the run."""
        assert self.chosen is not None, "a part of a command has no parts"
        words = [EXACTLY, "--recipe", str(self.chosen.recipe), "--run", str(self.run)]
        words += [] if self.stage is None else ["--stage", self.stage]
        for setting in self.chosen.settings:
            words += ["--text" if setting.is_text else "--set", f"{self._whole_key(setting)}={setting.value}"]
        return words


def parse_command(
    room: str,
    description: str,
    *,
    argv: Sequence[str] | None = None,
    has_stages: bool = False,
    stage_table: str = "training",
    is_stage_optional: bool = False,
    is_silent: bool = False,
) -> Command:
    """Parse a room's command line, and say in one line what is taken from the run's memory.

    Args:
        room: how the command is called.
        description: what it does.
        argv: words typed; None = the process's own.
        has_stages: whether it is about a stage: `--stage`, or the only one there is.
        stage_table: the table whose named tables its stages are.
        is_stage_optional: whether none that is named means no one of them, but all.
        is_silent: whether nothing is said, as another process does.

    Raises:
        UserError: as `load_recipe`, the run's folder is a URL, something typed is not UTF-8, a key is typed twice, or
            no stage is named and there are several.
    """
    options = read_options(room, description, sys.argv[1:] if argv is None else argv, has_stages=has_stages)
    chosen = choose(options)
    if chosen.note is not None and not is_silent:
        log.info(chosen.note)
    stage = None
    if has_stages and (options.stage or options.phase or not is_stage_optional):
        name = options.stage or only_name(chosen.recipe, stage_table, chosen.settings)
        stage = full_stage_name(name, options.phase)
    if not options.is_exact:
        _require_once(options.settings, stage)
    return Command(
        recipe=load_recipe(chosen.recipe, chosen.settings, stage=stage),
        run=run_folder(options.run),
        stage=stage,
        is_plan=options.plan,
        chosen=None if options.is_exact else chosen,
    )


def _require_once(settings: Sequence[Setting], stage: str | None) -> None:
    seen: dict[str, Setting] = {}
    for setting in settings:
        former = seen.setdefault(setting.key_of_stage(stage), setting)
        if former.value.strip() != setting.value.strip():
            raise UserError(
                f"{setting.origin}: {setting.key} is typed twice, as {former.value.strip()} and as "
                f"{setting.value.strip()}: leave one out"
            )


def read_options(room: str, description: str, words: Sequence[str], *, has_stages: bool) -> argparse.Namespace:
    """Return the options of a room's command line.

    Raises:
        UserError: something typed is not UTF-8.
    """
    _require_utf8(words)
    return _parser(room, description, has_stages=has_stages).parse_args(words)


def choose(options: argparse.Namespace) -> Chosen:
    """Return the recipe and the settings that such options mean.

    Raises:
        UserError: as `find_recipe`, `run_folder` and `choose_recipe` do.
    """
    run = run_folder(options.run)
    recipe = None if options.recipe is None else find_recipe(options.recipe)
    typed = [*options.settings, *options.once]
    if not options.is_exact:
        return choose_recipe(run, recipe, typed)
    assert recipe is not None, "a whole command names its recipe"
    return Chosen(recipe=recipe, settings=tuple(typed), note=None, replaces=False)


def _parser(room: str, description: str, *, has_stages: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {room}", description=description, allow_abbrev=False)
    parser.add_argument(
        "--recipe",
        help="TOML recipe, a file or the name of a shipped one; else what the run remembers, else pixart-alpha",
    )
    parser.add_argument("--run", required=True, help="local folder of the run; each room writes one sub-folder")
    if has_stages:
        parser.add_argument("--stage", help="a named table of the recipe, 2 is short for stage2; else the only one")
        parser.add_argument("--phase", help="512 with --stage 3 is short for --stage stage3-512")
    _add_settings(parser)
    parser.add_argument(EXACTLY, dest="is_exact", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true", help="print what would be done, with sizes, and stop")
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        type=lambda text: Setting(text=text),
        metavar="KEY=VALUE",
        help="override a recipe key, for the rest of the run; the value is read as TOML, what is none is taken as text",
    )
    parser.add_argument(
        "--settings",
        dest="settings",
        action="extend",
        type=lambda text: [Setting(text=setting, origin="SET") for setting in split_settings(text)],
        metavar="KEY=VALUE ...",
        help="several of them in one text",
    )
    parser.add_argument(
        "--once",
        dest="once",
        action="append",
        default=[],
        type=named_setting,
        metavar="[NAME:]KEY=VALUE",
        help="override a recipe key for this command alone, after --set; NAME is what errors blame for it",
    )
    parser.add_argument(
        "--text",
        dest="once",
        action="append",
        type=functools.partial(named_setting, is_text=True),
        metavar="[NAME:]KEY=TEXT",
        help="the same with this text as it is",
    )


def full_stage_name(text: str, phase: str | None = None) -> str:
    """Return the name that `text` is short for: a number N for `stageN`, and with a phase P `stageN-P`."""
    name = f"stage{text}" if text.isdecimal() else text
    return f"{name}-{phase}" if phase else name


def run_folder(text: str) -> Path:
    """Return the folder that a user has typed as RUN, with `~` filled in.

    Raises:
        UserError: it is a URL, nothing, or a file.
    """
    if not text.strip():
        raise UserError(f"{typed_flag('run')} is empty: type a value, or leave it out")
    if is_remote(text):
        raise UserError(
            f"{typed_flag('run')} {text} is a URL: outputs need a local or mounted folder, where files can be renamed "
            "into place"
        )
    path = typed_path(text)
    if path.exists() and not path.is_dir():
        raise UserError(f"{typed_flag('run')} {text} is a file: a run is a folder")
    return path


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
