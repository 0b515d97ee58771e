"""What make cannot see: `python -m atelier.typed PID TARGETS…` says what is wrong with the command line of a make.

Of `SHARDS=/d/sa_0.tar /d/sa_1.tar`, into which a shell has turned a range, make takes the second word for a target that
is up to date; of two SHARDS it keeps the last; and a `shards=` it does not know at all. Needs nothing but Python, as it
runs before there is an environment, and each time that make starts.
"""

import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from atelier.commands import FLAGS, SUBCOMMANDS
from pipelines.as_typed import did_you_mean, variable

# Options of make whose value is the next word, where it is not written in the same one; a number may follow others.
WITH_VALUE = re.compile(
    r"-[^-CEfIoWjl]*[CEfIoW]|--(directory|file|makefile|include-dir|(old|new)-file|assume-(old|new)|what-if|eval)"
)
WITH_NUMBER = re.compile(r"-[^-CEfIoWjl]*[jl]|--(jobs|load-average|max-load)")
NUMBER = re.compile(r"\d+(\.\d*)?")
SEEDS = re.compile(r"[1-9]|10")
MAY_BE_EMPTY = {"SET", *(variable(name) for name, flag in FLAGS.items() if flag.is_switch), "TINY"}
OF_MAKE = {"PYTHON"}
# What they do depends on no recipe: one that is typed for every step of a run is no mistake there.
WITHOUT_RECIPE = ("verify", "convert")
DEMO_HAS = ("RECIPE", "RUN", "STAGE", "PHASE")
OF_PAPER = ("SEEDS", "PART")
STEPS_OF_DEMO = ("world", "caption", "stats", "features", "train", "sample", "judge", "eval", "report")
STEPS_OF = {
    "demo": STEPS_OF_DEMO,
    "demo-paper": STEPS_OF_DEMO,
    "demo-raw": STEPS_OF_DEMO,
    "demo-dreambooth": ("subject", "caption", "features", "train", "detect"),
    "demo-control": ("edges", "caption", "features", "train", "sample", "follow"),
    "demo-vae": ("world", "caption", "features", "train", "sample", "judge"),
    "demo-lcm": ("world", "caption", "features", "train", "sample", "judge"),
    "paper": STEPS_OF_DEMO,
    "demo-curation": ("spoil", "caption", "columns", "features", "train", "sample", "judge"),
}


VARIABLES = """\
  Variables: RUN=runs/name RECIPE=recipes/x.toml STAGE=2|3|<name> PHASE=512|1024 PLAN=1 SET='table.key=value …'
             SHARDS='…' SETS='…' SAMPLE=n PROMPT='…' PROMPTS=file N=… STEPS=… CFG=… SEED=… SIZE=WxH LORA=a,b
             WEIGHTS=0.8,0.5 STYLES=a,b CONTROL=image PHOTO=1 CONTROL_KIND=canny|hed|depth STRENGTH=… BRANCH=…
             GPUS=n HOSTFILE=file REMOTE_SHELL='ssh …' FROM_SCRATCH=1 RETRY=1
             TASK=score|curve|questions|preference|winrates
             REFERENCE='…' CLIP=… INCEPTION=… PORT=n TABLE=… FROM=… TO=… REPARAMETERIZE=1 PIPELINE=1 PARTS=a,b TINY=1
             PASSES=a,b EMA=0.1 SEEDS=n PART=name
  Each but PARTS, TINY, SEEDS and PART is a flag of `atelier`: FROM_SCRATCH=1 is --from-scratch.
  They count when they are typed, behind the target, and reach the command as typed: with spaces, quotes, $ and #.
  SET holds any number of table.key=value: numbers, true, [lists] and "strings" as in the recipe, other text as it is.
  The demos have a RECIPE, a RUN and stages of their own; the rest, SET too, counts in each of their steps.
"""


@dataclass(frozen=True)
class Word:
    """A word behind make that is no option: of a variable its name, operator and value, of a target its name alone."""

    name: str
    operator: str = ""
    value: str = ""


def variables_of(target: str) -> set[str]:
    """Return the names of the variables that a target takes."""
    if target in SUBCOMMANDS:
        return {variable(flag) for flag in SUBCOMMANDS[target].flags}
    if target in STEPS_OF:
        of_steps = set().union(*map(variables_of, STEPS_OF[target])).difference(DEMO_HAS)
        return of_steps | set(OF_PAPER) if target == "paper" else of_steps
    return {"bench-cache": {"RUN"}, "bench-gpu": {"PARTS", "TINY"}, "bench-quality": {"SEEDS"}}.get(target, set())


def read_words(command: Sequence[str]) -> Iterator[Word]:
    """Yield what stands behind `make`, without its options and their values."""
    option = ""
    for word in command:
        if WITH_VALUE.fullmatch(option) or (WITH_NUMBER.fullmatch(option) and NUMBER.fullmatch(word)):
            option = ""
        elif word.startswith("-"):
            option = word
        else:
            option = ""
            name, equals, value = word.partition("=")
            bare = name.rstrip(":+?!")
            is_variable = bool(equals) and not re.search(r"\s", bare)
            yield Word(bare, name[len(bare) :] + equals, value) if is_variable else Word(word)


def find_wrong(words: Sequence[Word], targets: Collection[str]) -> str | None:
    """Return what would be lost of the words behind make and what to type instead, or None."""
    goals = [word.name for word in words if not word.operator] or ["help"]
    before = None
    seen: set[str] = set()
    for word in words:
        if not word.operator:
            if word.name not in targets:
                return _wrong_target(word.name, before, targets)
            continue
        wrong = _wrong_variable(word, goals, is_second=word.name in seen)
        if wrong:
            return wrong
        seen.add(word.name)
        before = word
    return None


def _wrong_target(name: str, before: Word | None, targets: Collection[str]) -> str:
    if variable(name.lower()) in _known():
        return f"{name} is a variable: type {name.upper()}=value, without spaces around ="
    near = did_you_mean(name, targets)
    if before is None:
        return f"there is no target {name}{near}; make help lists what there is"
    return (
        f"{name} is no target{near}. If it belongs to {before.name}={before.value}, the shell has split the value: "
        f"type it in quotes, {before.name}='…', with all its spaces, {{ranges}} and *"
    )


def _wrong_variable(word: Word, goals: Sequence[str], *, is_second: bool) -> str | None:
    name = word.name
    if name in OF_MAKE:
        return None
    if name not in _known():
        return _unknown_variable(name, goals)
    if is_second:
        both = "put both into one" if name == "SET" else "if the shell has made them of one {range}, type it in quotes"
        return f"{name} is typed twice, and make would keep the last alone: {both}, {name}='…'"
    if word.operator != "=":
        return f"{name}{word.operator} is not how values are given: type {name}='…'"
    if not word.value.strip() and name not in MAY_BE_EMPTY:
        return f"{name} is empty: type a value, or leave {name}= out"
    if word.value != word.value.lstrip() and word.value.strip() and name != "SET":
        return f"{name} begins with a space, which make takes away: leave it out"
    if any(name in variables_of(goal) for goal in goals):
        return "SEEDS is a number from 1 to 10" if name == "SEEDS" and not SEEDS.fullmatch(word.value) else None
    if name in DEMO_HAS and set(goals) & STEPS_OF.keys():
        return f"the demo has a RECIPE, a RUN and stages of its own: leave {name}= out"
    if name == "RECIPE" and set(goals) & set(WITHOUT_RECIPE):
        return None
    takers = [
        target
        for target in (*SUBCOMMANDS, "paper", "bench-cache", "bench-quality", "bench-gpu")
        if name in variables_of(target)
    ]
    return f"{' '.join(goals)} would ignore {name}: it belongs to {', '.join(takers)}; leave {name}= out"


def _unknown_variable(name: str, goals: Sequence[str]) -> str:
    if "." in name:
        return f"{name} is a key of the recipe: type SET='{name}=…'"
    taken = sorted(set().union(*map(variables_of, goals)))
    near = did_you_mean(name.upper(), taken) or did_you_mean(name.upper(), _known())
    takes = f"{' '.join(goals)} takes {', '.join(taken) or 'none'}"
    of_others = "" if near else "; what commands are to find in their environment is typed in front of make"
    return f"there is no variable {name}{near}: {takes}{of_others}"


def _known() -> list[str]:
    return [*(variable(flag) for flag in FLAGS), "PARTS", "TINY", *OF_PAPER]


def show_help(makefile: Path) -> None:
    """Print the list of `make help`: the doors, and the targets of the Makefile that say there what they do."""
    others = dict(re.findall(r"^([a-z-]+):.*?## (.*)$", makefile.read_text(encoding="utf-8"), re.MULTILINE))
    doors = {name: of.summary for name, of in SUBCOMMANDS.items()}
    first = {name: others.pop(name) for name in ("help", *STEPS_OF)}
    listed = first | doors | others
    width = max(map(len, listed))
    lines = "".join(f"  make {name:<{width}} {summary}\n" for name, summary in listed.items())
    sys.stdout.write(f"{lines}\n{VARIABLES}")


def main() -> None:
    """Print what is wrong with the command line of the process PID, on one line; nothing if all is well."""
    first, *targets = sys.argv[1:]
    if first == "--help":
        show_help(Path(targets[0]))
        return
    try:
        command = Path(f"/proc/{first}/cmdline").read_bytes().split(b"\0")[1:-1]
    except OSError:  # no Linux
        return
    wrong = find_wrong(list(read_words([os.fsdecode(word) for word in command])), targets)
    if wrong:
        sys.stdout.write(wrong.encode("utf-8", "backslashreplace").decode())


if __name__ == "__main__":
    main()
