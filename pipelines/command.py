"""The command line all rooms share: `python -m <room> --recipe R --run RUN [--stage N] [--set key=value] [--plan]`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.engine.progress import console
from pipelines.recipe import Recipe, load_recipe
from pipelines.store.files import is_remote


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a user asked of a room; `stage` is None for rooms without stages, `phase` for a stage's own values."""

    recipe: Recipe
    run: Path
    stage: int | None
    phase: str | None
    is_plan: bool

    @property
    def stage_name(self) -> str:
        """Name of the stage's folders: `stage2`, or `stage3-512` for a phase of it."""
        assert self.stage is not None, "this room has no stages"
        return f"stage{self.stage}" + (f"-{self.phase}" if self.phase else "")


def parse_command(
    room: str, description: str, *, argv: Sequence[str] | None = None, stages: Sequence[int] = ()
) -> Command:
    """Parse a room's command line; `stages` lists the values `--stage` may take, and is empty if there is no choice."""
    parser = argparse.ArgumentParser(prog=f"python -m {room}", description=description)
    parser.add_argument("--recipe", type=Path, required=True, help="TOML recipe, see recipes/")
    parser.add_argument("--run", required=True, help="local folder of the run; each stage writes one sub-folder")
    if stages:
        parser.add_argument("--stage", type=int, choices=stages, required=True, help="training stage of the paper")
        parser.add_argument("--phase", help="phase of the stage, such as 512 of stage 3 (Table 4); default: its first")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a recipe key",
    )
    parser.add_argument("--plan", action="store_true", help="print what would be done, with sizes, and stop")
    options = parser.parse_args(argv)
    phase = options.phase if stages else None
    return Command(
        recipe=load_recipe(options.recipe, options.overrides, stage=options.stage if stages else None, phase=phase),
        run=_run_folder(options.run),
        stage=options.stage if stages else None,
        phase=phase,
        is_plan=options.plan,
    )


def _run_folder(text: str) -> Path:
    if is_remote(text):
        raise ValueError(
            f"RUN {text} is a URL: outputs need a local or mounted folder, where files can be renamed into place"
        )
    return Path(text)


def run_command(room: str, main: Callable[[], None]) -> int:
    """Run a room's `main`; a mistake of the user's ends in one clear message and exit status 2, not in a traceback.

    `ATELIER_TRACEBACK=1` in the environment shows the traceback all the same.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if isinstance(error, UnicodeError) or os.environ.get("ATELIER_TRACEBACK"):
            raise
        console.print(f"[bold red]{room}:[/] ", end="")
        console.print(str(error), markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print(f"[bold]{room}:[/] interrupted; the same command continues")
        return 130
    sys.stdout.flush()
    return 0
