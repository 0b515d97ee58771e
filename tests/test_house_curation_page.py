"""docs/CURATION.md: its recipes are sound, and what they choose by are columns that there will be."""

import itertools
import re
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from captioning.config import CaptioningConfig
from curation.choosing import chosen_scores
from curation.config import ColumnsConfig
from features.config import feature_table
from pipelines.columns.choice_settings import ChoiceSettings
from pipelines.recipe import DataConfig, load_recipe
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "CURATION.md").read_text()
TITLE = re.compile(r"    # (\w+)\.toml\n")
OF_CAPTIONS = {"num_tokens": pa.int32(), "caption": pa.string(), "alt_text": pa.string()}


def printed_recipe(name: str) -> str:
    """A recipe that is printed whole, by the name of its file."""
    (start,) = [match.start() for match in TITLE.finditer(PAGE) if match[1] == name]
    lines = itertools.takewhile(
        lambda line: not line or (line.startswith("    ") and not line.startswith("    make ")),
        PAGE[start:].splitlines(),
    )
    return textwrap.dedent("\n".join(lines))


def columns_of(recipe: dict[str, Any], run: Path) -> pa.Schema:
    """The columns that its commands make, by the names they have in a `where`."""
    table = recipe["columns"]
    given = {name: pa.float64() for each in table.pop("tables", {}).values() for name in each["files"].split(",")[1:]}
    config = ColumnsConfig.model_validate(table)
    found = given | OF_CAPTIONS | {"flags.loop": pa.bool_(), "flags.truncated": pa.bool_(), "flags.refusal": pa.bool_()}
    for score in chosen_scores(config, run):
        _, _, caption = score.name.partition("@")
        prefix = f"{caption}." if caption else ""
        if score.name != "clip":  # the width of its embeddings is the model's, which is not here
            found |= {f"{prefix}{column.name}": column.type for column in score.columns}
    if "claims" in recipe["captioning"]:
        found |= {"unsupported_share": pa.float32(), "num_unknown": pa.int32()}
    return pa.schema(found)


@pytest.mark.parametrize("name", ["sam", "laion", "archive"])
def test_a_printed_recipe_is_sound(tmp_path, name) -> None:
    path = tmp_path / f"{name}.toml"
    path.write_text(printed_recipe(name))
    loaded, recipe = load_recipe(path), tomllib.loads(path.read_text())
    loaded.table("data", DataConfig)
    loaded.table("captioning", CaptioningConfig)
    (stage,) = [name for name, table in recipe["features"].items() if isinstance(table, dict)]
    feature_table(loaded, stage)
    settings = ChoiceSettings.of(stage, recipe["features"][stage])
    assert settings is not None and settings.where_expression is not None
    schema = columns_of(recipe, tmp_path)
    settings.where_expression.check(schema, "bool")
    if settings.weight_expression is not None:
        settings.weight_expression.check(schema, "number")
    for expression in settings.caption_expressions.values():
        expression.check(schema, "number")
