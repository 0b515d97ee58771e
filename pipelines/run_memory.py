"""What a run remembers of what was typed for it: `RUN/run.json` has its recipe, its settings and its raw shards."""

import dataclasses
import fcntl
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from errors import MissingFileError
from pipelines.as_typed import typed_flag
from pipelines.engine.progress import get_logger
from pipelines.overrides import Setting
from pipelines.raw.patterns import shard_name
from pipelines.recipe import DataConfig
from pipelines.recipe_files import default_recipe, shipped_recipes
from pipelines.store.files import atomic_write_json, is_remote, remove_temporary_files
from pipelines.store.state_files import form_damage, read_state, state_damage, state_of

MEMORY_NAME = "run.json"
LOCK_NAME = ".run.lock"
# Of runs that were begun before `run.json` had what commands have found.
FORMER_NAME = "shards.json"
# Shards are remembered by name, and need no recipe of their own.
SHARDS_KEY = "data.shards"
SETTINGS_NAMED, MAX_CHARACTERS = 4, 60

Form = TypeVar("Form")

log = get_logger("run")


@dataclass(frozen=True, kw_only=True)
class RunMemory:
    """What has been typed for a run.

    Attributes:
        recipe: absolute path of its recipe, in the file relative to the run that it is in, or the name of a shipped
            one; None where none has been typed.
        settings: by `table.key`, values as they were typed.
        shards: absolute paths or URLs of the raw shards that were typed, by name; of those in the run's own folder, in
            the file relative to it, the path by which the run is called.
        found: those of other raw shards that were captioned, as a recipe named them.
    """

    recipe: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    found: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The recipe and the settings of a command, and what was taken, or left out, of the run's memory.

    Attributes:
        recipe: path, as errors name it.
        settings: remembered ones first, then what is typed, in order.
        is_typed: whether the recipe is, and so is taken as it stands.
        is_default: whether it is that of a run for which none has been typed.
        note: what is said of it, once; None where all of it was typed and nothing is left out.
        replaces: whether the command's settings take the place of those that are remembered.
    """

    recipe: Path
    settings: tuple[Setting, ...]
    note: str | None
    replaces: bool
    is_typed: bool = False
    is_default: bool = False


def read_memory(run: Path) -> RunMemory:
    """Return what a run remembers; nothing where nothing has been typed for it yet.

    Raises:
        UserError: its file is damaged; names it.
    """
    memory = _read(RunMemory, run / MEMORY_NAME) or RunMemory()
    # Keys of before had the quotes that were typed.
    settings = {Setting(text=f"{key}=").key: value for key, value in memory.settings.items()}
    recipe = None if memory.recipe is None else _recalled_recipe(memory.recipe, run)
    found = memory.found or _read(dict[str, str], run / FORMER_NAME) or {}
    shards = {name: _recalled_shard(path, run) for name, path in memory.shards.items()}
    found = {name: _recalled_shard(path, run) for name, path in found.items() if name not in shards}
    return RunMemory(recipe=recipe, settings=settings, shards=shards, found=found)


def _read(form: type[Form], path: Path) -> Form | None:
    """Return what a file of the run's memory holds; None where there is none."""
    if not path.is_file():
        return None
    recipe, shards = typed_flag("recipe"), typed_flag("shards")
    mend = f"remove it, and type {recipe} and {shards} with the next command, as for the first of the run"
    return state_of(form, read_state(path, mend=mend), where=str(path), mend=mend)


def memory_damage(path: Path) -> str | None:
    """Return what is wrong with a `run.json` that no command would take; None if nothing is."""
    return state_damage(path) or form_damage(RunMemory, json.loads(path.read_bytes()))


def recall_shards(run: Path) -> list[str]:
    """Return all raw shards that a run remembers, typed or found, sorted by name."""
    memory = read_memory(run)
    return [path for _, path in sorted((memory.found | memory.shards).items())]


def choose_recipe(run: Path, typed_recipe: Path | None, typed: Sequence[Setting]) -> Chosen:
    """Return the recipe and settings of a command: what is typed, else what the run remembers, else the default.

    A typed recipe is taken with the typed settings alone; without one, typed settings are laid over remembered ones.

    Raises:
        MissingFileError: the remembered recipe is not there any more; names it and the file that remembers it.
    """
    memory, where = read_memory(run), run / MEMORY_NAME
    if typed_recipe is not None:
        is_same = Path(memory.recipe or default_recipe()).resolve() == typed_recipe.resolve()
        left_out = _listed(_uncovered(memory.settings, _keys(typed)))
        note = f"{_some(left_out)} of {where} left out, as a recipe was typed" if left_out else None
        return Chosen(recipe=typed_recipe, settings=tuple(typed), note=note, replaces=not is_same, is_typed=True)
    kept = _uncovered(memory.settings, _keys(typed))
    remembered = [
        Setting(text=f"{key}={value}", origin=str(where), is_kept=False, is_remembered=True)
        for key, value in sorted(kept.items())
    ]
    recipe, note = _untyped_recipe(memory, where, _some(_listed(kept)))
    return Chosen(
        recipe=recipe,
        settings=(*remembered, *typed),
        note=note,
        replaces=False,
        is_default=memory.recipe is None,
    )


def _untyped_recipe(memory: RunMemory, where: Path, settings: str) -> tuple[Path, str]:
    """Return the remembered recipe, else the default, and what is said of it and of remembered settings."""
    if memory.recipe is None:
        default = _shown(default_recipe())
        also = f", and {settings} as remembered in {where}" if settings else ""
        return default, f"recipe {default}, the default; {typed_flag('recipe')} names another{also}"
    recipe = _shown(Path(memory.recipe))
    if not recipe.is_file():
        flag = typed_flag("recipe")
        raise MissingFileError(
            f"{where} remembers recipe {recipe}, which does not exist; put it back, or type {flag} once more"
        )
    return recipe, f"recipe {recipe}{f' and {settings}' if settings else ''} as remembered in {where}"


def remember(run: Path, chosen: Chosen, *, keys: Mapping[str, Setting], shards: Iterable[str]) -> None:
    """Note a command's recipe and kept settings, by their whole `keys`, and the raw shards that were typed for it.

    What other commands have noted since stays, but for what was typed anew, and shards that are gone where some are.
    """
    kept = {key: setting for key, setting in keys.items() if setting.is_kept and key != SHARDS_KEY}
    typed = _by_name(shards, run)
    _update(run, lambda memory: _with(memory, chosen, kept=kept, typed=typed))


def remember_found(run: Path, paths: Iterable[str]) -> None:
    """Note where raw shards are that a command has read, whether they were typed or a recipe names them."""
    found = _by_name(paths, run)
    _update(run, lambda memory: _with_found(memory, found))


def _with_found(memory: RunMemory, found: Mapping[str, str]) -> RunMemory:
    others = {name: path for name, path in found.items() if name not in memory.shards}
    return dataclasses.replace(memory, found=memory.found | others)


def _by_name(paths: Iterable[str], run: Path) -> dict[str, str]:
    return {shard_name(path): _recalled_shard(_noted_shard(path, run), run) for path in paths}


def _update(run: Path, change: Callable[[RunMemory], RunMemory]) -> None:
    # A finished run may lie on a disk that is read-only.
    if (memory := read_memory(run)) == change(memory):
        return
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Under its lock, what is left of a killed writer is nobody's.
        remove_temporary_files(run, MEMORY_NAME, is_held=True)
        memory = read_memory(run)
        if (new := change(memory)) != memory:
            recipe = new.recipe and _noted_recipe(new.recipe, run.resolve())
            shards, found = (
                {name: _noted_shard(path, run) for name, path in paths.items()} for paths in (new.shards, new.found)
            )
            noted = RunMemory(recipe=recipe, settings=new.settings, shards=shards, found=found)
            atomic_write_json(run / MEMORY_NAME, dataclasses.asdict(noted))


def _with(memory: RunMemory, chosen: Chosen, *, kept: Mapping[str, Setting], typed: Mapping[str, str]) -> RunMemory:
    recipe = memory.recipe if chosen.is_default else str(chosen.recipe.resolve())
    before = {} if chosen.replaces and memory.recipe != recipe else memory.settings
    settings = _uncovered(before, kept) | {key: setting.value for key, setting in kept.items()}
    shards, found = (
        {name: path for name, path in former.items() if name not in typed and not (typed and _is_gone(path))}
        for former in (memory.shards, memory.found)
    )
    return RunMemory(recipe=recipe, settings=settings, shards=shards | dict(typed), found=found)


def run_shards(run: Path, data: DataConfig, *, is_recipe_typed: bool) -> list[str]:
    """Return the raw shards of a run where none are typed, sorted by name.

    They are those that were typed for it before, else those of the recipe, else those that earlier commands have found.
    A recipe that is typed is taken as it stands: what it names, where that is there, comes before what is remembered.

    Raises:
        MissingFileError, UserError: there are none, a remembered one is gone, or as `expand_shards` does.
    """
    memory = read_memory(run)
    remembered, found = ([path for _, path in sorted(paths.items())] for paths in (memory.shards, memory.found))
    if is_recipe_typed or not remembered:
        try:
            return data.paths(run)
        except MissingFileError:
            remembered = remembered or found
            if not remembered:
                raise
    require_shards(remembered, run / MEMORY_NAME)
    log.info(f"{_count(len(remembered))} as remembered in {run / MEMORY_NAME}")
    return remembered


def require_shards(paths: Sequence[str], memory: Path) -> None:
    """Refuse remembered shards of which some are gone; of URLs the first read tells.

    Raises:
        MissingFileError: names the file that remembers them, some of them, and what to type.
    """
    if gone := [path for path in paths if _is_gone(path)]:
        raise MissingFileError(
            f"{memory} remembers {_count(len(gone))} of {len(paths):,} that {'is' if len(gone) == 1 else 'are'} not "
            f"there any more: {_some(gone)}; put back what has moved, or type {typed_flag('shards')} with where it is "
            "now, which takes the place of what is gone"
        )


def typed_shards(run: Path, data: DataConfig) -> list[str]:
    """Return the raw shards that are typed for a command, and say which others the run remembers, and which are gone.

    Raises:
        MissingFileError, UserError: as `expand_shards` does.
    """
    paths = data.paths(run)
    names, known = {shard_name(path) for path in paths}, read_memory(run).shards
    gone = {name: path for name, path in known.items() if _is_gone(path)}
    if gone:
        some = _some([gone[name] for name in sorted(gone)])
        log.info(f"what is typed takes the place of {some} of {run / MEMORY_NAME}, not there any more")
    if others := sorted(known.keys() - names - gone.keys()):
        log.info(f"{_count(len(paths))} as typed; without {_some(others)} of {run / MEMORY_NAME}")
    return paths


def _noted_recipe(recipe: str, run: Path) -> str:
    """Return a recipe's path relative to the run that it is in, which may be moved, or the name of a shipped one.

    A shipped one lies in an environment that may be made anew elsewhere.
    """
    if Path(recipe) in shipped_recipes():
        return Path(recipe).stem
    return str(Path(recipe).relative_to(run)) if Path(recipe).is_relative_to(run) else recipe


def _recalled_recipe(noted: str, run: Path) -> str:
    """Return the absolute path of a recipe that `_noted_recipe` has noted."""
    path = run / noted
    shipped = [recipe for recipe in shipped_recipes() if recipe.stem == noted]
    return str(shipped[0] if shipped and not path.exists() else path.resolve())


def _noted_shard(path: str, run: Path) -> str:
    """Return a URL as it is, and a path as absolute, or relative to the run that it is in, which may be moved."""
    if is_remote(path):
        return path
    place = Path(path).absolute()
    return str(place.relative_to(run.absolute()) if place.is_relative_to(run.absolute()) else place)


def _recalled_shard(noted: str, run: Path) -> str:
    """Return a shard as `_noted_shard` has noted it, one in the run from where the run is called from.

    Absolute paths into the run are of runs of before.
    """
    if is_remote(noted):
        return noted
    place = run / noted
    return str(run / place.relative_to(run.absolute()) if place.is_relative_to(run.absolute()) else place)


def _is_gone(path: str) -> bool:
    """Whether a local shard is not there; one that may not be looked at is, as reading it will tell."""
    if is_remote(path):
        return False
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _uncovered(settings: Mapping[str, str], typed: Iterable[str]) -> dict[str, str]:
    """Return the settings of which neither the key nor a table it is in is typed anew."""
    others = set(typed)
    return {
        key: value
        for key, value in settings.items()
        if not any(key == other or key.startswith(f"{other}.") for other in others)
    }


def _keys(settings: Iterable[Setting]) -> list[str]:
    return [setting.key for setting in settings]


def _listed(settings: Mapping[str, str]) -> list[str]:
    cut = {
        key: f"{value[:MAX_CHARACTERS]}…" if len(value) > MAX_CHARACTERS else value for key, value in settings.items()
    }
    return [f"{key} = {cut[key]}" for key in sorted(cut)]


def _some(items: Sequence[str]) -> str:
    more = [f"{len(items) - SETTINGS_NAMED} more"] if len(items) > SETTINGS_NAMED else []
    return ", ".join([*items[:SETTINGS_NAMED], *more])


def _count(number: int) -> str:
    return f"{number:,} raw shard{'' if number == 1 else 's'}"


def _shown(path: Path) -> Path:
    """Return a path as it is typed from the working folder, where it is inside it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
