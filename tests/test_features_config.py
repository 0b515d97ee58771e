from pathlib import Path

import pytest

from errors import UserError
from features.config import feature_table, table_of_stage
from pipelines.recipe import Recipe

STAGE = {"shards": ["laion_*"], "resolution": 64}


def table(name="stage2", **changes):
    content = {"text_model": "t5", "vae_model": "vae", "stage2": STAGE} | changes
    return feature_table(Recipe(Path("r.toml"), {"features": content}), name)


def test_float16_text_names_key_and_reason():
    with pytest.raises(UserError, match=r"features\.text_dtype = 'float16'.*bfloat16.*overflow"):
        table(text_dtype="float16")


def test_float16_vae_is_refused():
    with pytest.raises(UserError, match=r"features\.vae_dtype = 'float16'"):
        table(vae_dtype="float16")


def test_a_string_is_no_boolean():
    with pytest.raises(UserError, match=r"features\.stage2\.buckets = 'False'"):
        table(stage2=STAGE | {"buckets": "False"})


def test_unknown_key_is_named():
    with pytest.raises(UserError, match=r"features\.stage2\.bucket is not a known key"):
        table(stage2=STAGE | {"bucket": True})


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [("buckets", True, False), ("vae_model", "other", "vae"), ("text_storage", "int8", "bfloat16")],
)
def test_tables_that_share_a_folder_must_agree(key, value, found):
    said = rf"features\.faces\.{key} = {value}, but features\.stage2\.{key} = {found}; .* would share one folder"
    with pytest.raises(UserError, match=said):
        table(faces=STAGE | {key: value})
    other = {"shards": ["hq_*"], "resolution": 128, "text": False, key: value}
    assert getattr(table("faces", faces=other), key) == value, "other folders"


def test_tables_of_other_variants_lie_side_by_side():
    other = STAGE | {"vae_model": "other", "image_variant": "other"}
    assert table("faces", faces=other).vae_model == "other"
    with pytest.raises(UserError, match=r"would share one folder of latents at resolution .*: image_variant of one"):
        table(faces=STAGE | {"vae_model": "other", "text_variant": "other"})
    longer = STAGE | {"max_tokens": 300, "text_variant": "long"}
    assert table("faces", faces=longer).max_tokens == 300
    with pytest.raises(UserError, match=r"would share one folder of text .*: text_variant of one of them gives it its"):
        table(faces=STAGE | {"max_tokens": 300, "image_variant": "other"})
    with pytest.raises(UserError, match=r"features\.faces\.text_variant = '\.\./x'"):
        table(faces=STAGE | {"text_variant": "../x"})


def test_a_table_extends_another():
    faces = {"extends": "stage2", "resolution": 128, "buckets": True}
    assert (table("faces", faces=faces).shards, table("faces", faces=faces).resolution) == (["laion_*"], 128)


def test_a_stage_without_a_table_of_its_own_means_the_one_that_its_training_reads():
    training = {"cat": {"features": "stage2"}, "small": {"extends": "cat"}, "stage2": {"features": "other"}, "odd": {}}
    recipe = Recipe(Path("r.toml"), {"features": {"stage2": STAGE}, "training": training})
    found = [table_of_stage(recipe, name) for name in ("cat", "small", "stage2", "odd", "unknown")]
    assert found == ["stage2", "stage2", "stage2", "odd", "unknown"]


def test_a_name_without_a_table_is_one_line_with_the_known_ones():
    with pytest.raises(UserError, match=r"no \[features.stage1\]; the tables of \[features\] are: stage2"):
        table("stage1")
    with pytest.raises(UserError, match=r"features\.stage3\.resolution is missing: Base resolution"):
        table(stage3={"shards": ["hq_*"]})


def test_captions_of_one_column_set_share_a_folder_and_must_agree_on_weights():
    mixed = [{"column": "caption", "weight": 0.9}, {"column": "alt_text", "weight": 0.1}]
    stage = STAGE | {"captions": mixed}
    assert table("stage3", stage2=stage, stage3=stage).caption_columns == ["caption", "alt_text"]
    other = STAGE | {"captions": [mixed[0], {"column": "alt_text", "weight": 0.5}]}
    said = (
        r"stage3\.captions = {'caption': 0\.9, 'alt_text': 0\.5}, but features\.stage2\.captions = .*'alt_text': 0\.1}"
    )
    with pytest.raises(UserError, match=said):
        table(stage2=stage, stage3=other)
    table(stage2=stage, stage3=STAGE)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([], "at least 1 item"),
        ([{"column": "caption"}, {"column": "caption"}], "a column is named twice"),
        ([{"column": "caption", "weight": 0.0}], "greater than 0"),
        ([{"column": "../text"}], "match pattern"),
    ],
)
def test_wrong_caption_sets_are_refused(captions, message):
    with pytest.raises(UserError, match=message):
        table(stage2=STAGE | {"captions": captions})


def test_an_unknown_storage_is_refused():
    with pytest.raises(UserError, match=r"features\.text_storage = 'int4'"):
        table(text_storage="int4")
