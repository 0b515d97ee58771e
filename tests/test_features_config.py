from pathlib import Path

import pytest

from features.config import FeaturesConfig
from pipelines.recipe import Recipe

STAGE = {"shards": ["laion_*"], "resolution": 64}


def table(**changes):
    content = {"text_model": "t5", "vae_model": "vae", "stage2": STAGE} | changes
    return Recipe(Path("r.toml"), {"features": content}).table("features", FeaturesConfig)


def test_float16_text_names_key_and_reason():
    with pytest.raises(ValueError, match=r"features\.text_dtype = 'float16'.*bfloat16.*overflow"):
        table(text_dtype="float16")


def test_float16_vae_is_refused():
    with pytest.raises(ValueError, match=r"features\.vae_dtype = 'float16'"):
        table(vae_dtype="float16")


def test_resolution_must_be_whole_patches():
    with pytest.raises(ValueError, match=r"features\.stage2\.resolution.*250 is not a multiple of 16"):
        table(stage2=STAGE | {"resolution": 250})


def test_a_string_is_no_boolean():
    with pytest.raises(ValueError, match=r"features\.stage2\.buckets = 'False'"):
        table(stage2=STAGE | {"buckets": "False"})


def test_unknown_key_is_named():
    with pytest.raises(ValueError, match=r"features\.stage2\.bucket is not a known key"):
        table(stage2=STAGE | {"bucket": True})


def test_stages_of_one_resolution_must_agree_on_buckets():
    with pytest.raises(ValueError, match=r"stage3\.buckets True differs from stage2\.buckets False.*64"):
        table(stage3=STAGE | {"buckets": True})
    table(stage3={"shards": ["hq_*"], "resolution": 128, "buckets": True})


def test_a_stage_without_a_table_is_named():
    with pytest.raises(ValueError, match=r"features\.stage1 is missing"):
        table().stage(1)
    assert table().stage(2).caption_columns == ["caption"]


def test_captions_of_one_column_set_share_a_folder_and_must_agree_on_weights():
    mixed = [{"column": "caption", "weight": 0.9}, {"column": "alt_text", "weight": 0.1}]
    stage = STAGE | {"captions": mixed}
    assert table(stage2=stage, stage3=stage).stage(3).caption_columns == ["caption", "alt_text"]
    other = STAGE | {"captions": [mixed[0], {"column": "alt_text", "weight": 0.5}]}
    with pytest.raises(
        ValueError, match=r"stage3\.captions has weights \[0\.9, 0\.5\], but stage2\.captions \[0\.9, 0\.1\]"
    ):
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
    with pytest.raises(ValueError, match=message):
        table(stage2=STAGE | {"captions": captions})


def test_an_unknown_storage_is_refused():
    with pytest.raises(ValueError, match=r"features\.text_storage = 'int4'"):
        table(text_storage="int4")
