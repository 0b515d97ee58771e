"""Passes: more captions of each image, each by its own keys laid over those of `[captioning]`."""

from collections.abc import Mapping, Sequence
from typing import Any

from captioning.config import CaptioningConfig
from captioning.cuts.config import CutConfig
from captioning.given.addresses import MAIN_COLUMN
from captioning.prompts import DEFAULT
from errors import UserError
from pipelines.as_typed import ANY, did_you_mean, typed_flag
from pipelines.recipe import Recipe

TABLE = "captioning"
# Tables whose keys are laid over one by one.
TABLES_WITHIN = ("loop_retry", "server", "vllm", "quality")
# Of no use to a pass: `only` is, to tell whether all are made.
OF_OTHERS = ("passes", "claims")
CUT_ENGINE = "cut"
OF_OWN_TEXTS = "img2dataset"


def pass_config(recipe: Recipe, name: str) -> CaptioningConfig:
    """Return `[captioning]` with the keys of a pass laid over it.

    Raises:
        UserError: a key of the pass is wrong; names it.
    """
    whole = recipe.tables[TABLE]
    engine = str(whole["passes"][name].get("engine", ""))
    if meant := did_you_mean(engine, (CUT_ENGINE,)):
        place = recipe.blame(TABLE, "passes", name, "engine")
        raise UserError(f"{place}: captioning.passes.{name}.engine = {engine!r} is no engine{meant}")
    config = recipe.laid(f"{TABLE}.passes.{name}", lay_over(whole, whole["passes"][name]), CaptioningConfig)
    if isinstance(config.table, dict):
        raise UserError(
            f"{recipe.blame(TABLE, 'passes', name)}: captioning.passes.{name} is given, and is one column: set its "
            'table to one address, "files#key,text"'
        )
    return config


def is_cut(own: Mapping[str, Any]) -> bool:
    """Whether a pass is cut of other captions."""
    return own.get("engine") == CUT_ENGINE


def cut_config(recipe: Recipe, name: str) -> CutConfig:
    """Return the keys of a pass that is cut, with the flags' thresholds of `[captioning]` below its own.

    Raises:
        UserError: a key is wrong; names it.
    """
    whole = recipe.tables[TABLE]
    own = whole["passes"][name]
    quality = whole.get("quality", {}) | own.get("quality", {})
    return recipe.laid(f"{TABLE}.passes.{name}", dict(own) | {"quality": quality}, CutConfig)


def lay_over(whole: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a table `[captioning]` with those of a pass laid over them.

    What belongs to a key that the pass changes is not taken over: the commit of another model, the table of captions
    that were given. Where it writes prompts, nothing else is asked: one for `default` goes for images with a text, too.
    """
    shared = {key: value for key, value in whole.items() if key not in OF_OTHERS}
    if "model" in own:
        shared.pop("revision", None)
    if own.get("engine", "given") != "given":
        shared.pop("table", None)
    laid = shared | dict(own)
    laid |= {key: shared[key] | own[key] for key in TABLES_WITHIN if key in shared and key in own}
    if "prompts" in own:
        written = own["prompts"]
        former = {OF_OWN_TEXTS: written[DEFAULT]} if DEFAULT in written else dict(shared.get("prompts", {}))
        laid["prompts"] = former | written
    return laid


def chosen_columns(config: CaptioningConfig) -> Sequence[str]:
    """Return the columns to be made now, of the captions themselves (`caption`) and the passes.

    Raises:
        UserError: `only` names another.
    """
    columns = (MAIN_COLUMN, *config.passes)
    named = [name.strip() for name in config.only.split(",") if name.strip()]
    for name in named:
        if name not in columns:
            raise UserError(
                f"captioning.only ({typed_flag('passes', ANY)}) names {name!r}; the columns of captions are "
                f"{', '.join(columns)}{did_you_mean(name, columns)}"
            )
    return named or columns
