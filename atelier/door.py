"""What a sub-command gives its room of what was typed, and the room itself."""

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

from atelier.commands import SUBCOMMANDS, Subcommand
from atelier.settings import check_settings
from errors import UserError
from pipelines.as_typed import did_you_mean, enter_by, flag_of, typed_flag, variable
from pipelines.command import run_command

FROM_MAKE = "--from-make"


def main(words: Sequence[str]) -> int:
    """Run a sub-command and return its exit status."""
    if not words or words[0] in ("-h", "--help"):
        print_help()
        return 0 if words else 2
    return run_command("atelier", lambda: _open_room(words))


def _open_room(words: Sequence[str]) -> None:
    module, *sys.argv[1:] = require_sound_settings(words)
    # Ends with the status of the room, by SystemExit.
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def require_sound_settings(words: Sequence[str]) -> list[str]:
    """Return what `room_words` does, where all rooms would take the settings in it; raises as `check_settings` does."""
    module, *typed = room_words(words)
    flags = SUBCOMMANDS[words[0]].flags
    if {"recipe", "set"} <= set(flags):
        check_settings(typed, has_stages="stage" in flags)
    return [module, *typed]


def print_help() -> None:
    """Print every sub-command with one line."""
    lines = ["usage: atelier SUB-COMMAND [--flags]", ""]
    lines += [f"  {name:<11} {of.summary.partition(' (')[0]}" for name, of in SUBCOMMANDS.items()]
    lines += [
        "",
        "`atelier SUB-COMMAND --help` lists its flags; of make they are variables, --from-scratch FROM_SCRATCH=1.",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def room_words(words: Sequence[str]) -> list[str]:
    """Return the module that is meant and what it is given.

    Raises:
        UserError: there is no such sub-command or flag, or one that it needs is missing.
    """
    name, *rest = words
    if name not in SUBCOMMANDS:
        raise UserError(f"there is no {name!r}{did_you_mean(name, SUBCOMMANDS)}; `atelier --help` lists what there is")
    subcommand = SUBCOMMANDS[name]
    enter_by(make=rest[:1] == [FROM_MAKE])
    if rest[:1] == [FROM_MAKE]:
        rest = flags_of_make(subcommand, rest[1].split())
    if subcommand.passes_on and not subcommand.flags:
        return [subcommand.module, *subcommand.words, *rest]
    options, others = _parser(name, subcommand).parse_known_args(rest)
    if others and not subcommand.passes_on:
        # Of who knows the variables of make.
        word = f"--{flag}" if (flag := flag_of(others[0].partition("=")[0])) in subcommand.flags else others[0]
        near = did_you_mean(word, [f"--{flag}" for flag in subcommand.flags])
        raise UserError(f"{name} takes no {others[0]}{near}")
    for flag, example in subcommand.required:
        if getattr(options, _attribute(flag)) is None:
            raise UserError(f"{name} needs {typed_flag(flag)}, for example {typed_flag(flag, example)}")
    return [subcommand.module, *_translate(subcommand, options), *others]


def flags_of_make(subcommand: Subcommand, names: Sequence[str]) -> list[str]:
    """Return the flags that stand for variables of make, whose values are in the environment as they were typed."""
    words = []
    for flag in subcommand.flags:
        if variable(flag) not in names:
            continue
        value = os.environ[variable(flag)]
        if subcommand.flag(flag).is_switch:
            words += [f"--{flag}"] if value not in ("", "0") else []
        else:
            words.append(f"--{'settings' if flag == 'set' else flag}={value}")
    return words


class _Once(argparse.Action):
    """Takes a value that may be typed once: of two, the first would be lost."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        former = getattr(namespace, self.dest)
        if former not in (None, values):
            raise UserError(f"{option_string} is typed twice, as {former} and as {values}: leave one out")
        setattr(namespace, self.dest, values)


def _parser(name: str, subcommand: Subcommand) -> argparse.ArgumentParser:
    further = f"Further options: python -m {subcommand.module} --help" if subcommand.passes_on else None
    parser = argparse.ArgumentParser(
        prog=f"atelier {name}", description=subcommand.summary.partition(" (")[0], epilog=further, allow_abbrev=False
    )
    for flag_name in subcommand.flags:
        flag, option = subcommand.flag(flag_name), f"--{flag_name}"
        meaning = flag.meaning.replace("%", "%%")
        if flag.is_switch:
            parser.add_argument(option, dest=_attribute(flag_name), action="store_true", help=meaning)
        elif flag_name == "set":
            parser.add_argument(option, dest="set_", action="append", default=[], metavar=flag.value, help=meaning)
            parser.add_argument("--settings", dest="settings", help=argparse.SUPPRESS)
        else:
            parser.add_argument(option, dest=_attribute(flag_name), action=_Once, metavar=flag.value, help=meaning)
    return parser


def _attribute(flag: str) -> str:
    return f"{flag.replace('-', '_')}_"


def _translate(subcommand: Subcommand, options: argparse.Namespace) -> list[str]:
    """Return what the room is given: words, its own options, then settings, of which the later ones win."""
    words, own, settings = list(subcommand.words), [], []
    defaults = dict(subcommand.defaults)
    for name in subcommand.flags:
        value = getattr(options, _attribute(name))
        if name == "set":
            own += [word for text in value for word in ("--set", text)]
            own += ["--settings", options.settings] if options.settings is not None else []
            continue
        value = value if value is not None else defaults.get(name)
        flag = subcommand.flag(name)
        if value is None or value is False:
            continue
        if isinstance(value, str) and not value.strip():
            raise UserError(f"{typed_flag(name)} is empty: type a value, or leave it out")
        if flag.gives == "word":
            words.append(value)
        elif flag.gives == "switch":
            own.append(f"--{name}")
        elif flag.gives == "option":
            own.append(f"--{name}={value}")
        elif flag.gives == "on":
            settings += ["--once", f"{variable(name)}:{flag.key}"]
        else:
            setting = f"{variable(name)}:{flag.key}={value}"
            settings += ["--text" if flag.gives == "text" else "--once", setting]
    return [*words, *own, *settings]
