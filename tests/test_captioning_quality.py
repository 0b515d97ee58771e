"""Flags from the text alone, and prompts from the recipe."""

import re

import pytest

from captioning.config import DESCRIBE, CaptioningConfig, QualityConfig
from captioning.loops import repeated_ngram_ratio
from captioning.prompts import fill_prompt, template_for
from captioning.quality import alt_text_overlap, judge, strip_boilerplate
from errors import UserError
from pipelines.recipe import Recipe

QUALITY = QualityConfig()
PROSE = (
    "The image features a close-up of a cup of tea with a saucer on a wooden table. The scene is set in a dimly lit "
    "room, with a potted plant in the background adding a touch of nature."
)
LOOP = "A man is standing on the left. " + "There is a chair in the room. " * 12


def as_row(caption_raw: str, finish_reason: str, alt_text: str | None, first_caption: str | None = None) -> dict:
    return {
        "caption_raw": caption_raw,
        "finish_reason": finish_reason,
        "alt_text": alt_text,
        "first_caption": first_caption,
        "prompt": None,
    }


def flags(text: str, *, finish_reason: str = "stop", alt_text: str | None = None, **thresholds) -> list[str]:
    quality = QualityConfig.model_validate(thresholds)
    return judge(as_row(text, finish_reason, alt_text), quality)["flags"]


def test_each_flag_has_its_text() -> None:
    assert flags("A cup of tea on a wooden table.") == []
    assert flags(PROSE) == ["boilerplate"]
    assert flags("") == ["empty"] and flags("  \n ") == ["empty"]
    assert flags("A cup of tea on a", finish_reason="length") == ["truncated"]
    assert flags(LOOP, finish_reason="length") == ["truncated", "loop"]
    assert flags("A dog waits for someone who is out of Frame.") == ["off_frame"]
    assert flags("A red kite.", alt_text="Kawasaki Jet Ski", min_alt_text_overlap=0.1) == ["off_alt_text"]
    assert flags("A red kite.", alt_text="Kawasaki Jet Ski") == []
    assert flags("A red kite.", alt_text=None, min_alt_text_overlap=0.9) == []


def test_thresholds_decide() -> None:
    ratio = repeated_ngram_ratio(LOOP, 4)
    assert 0.7 < ratio < 0.9
    assert "loop" not in flags(LOOP, max_repeated_ngram_ratio=0.95, max_same_sentence=12)
    assert repeated_ngram_ratio(PROSE, 4) < 0.1
    assert repeated_ngram_ratio("too short", 4) == 0.0
    assert repeated_ngram_ratio("la " * 50, 1) == pytest.approx(0.98)


LOOPS = {
    "Chinese": ("一个男人站在左边。旁边有一把椅子" + "和一把椅子" * 15, 0.7),
    "Japanese": ("部屋には椅子があります" + "椅子と机と" * 12, 0.7),
    "Thai": ("มีเก้าอี้ในห้อง" + "และเก้าอี้อีกตัว" * 10, 0.7),
    "a letter": ("一只猫" + "喵" * 40, 0.7),
    "an emoji": ("A cat " + "😀" * 16, 0.0),
    "a syllable": ("A clown laughs: ha" + "ha" * 20, 0.0),
    "a rule": ("A cat" + "-" * 30, 0.0),
    "list items": ("The room contains:\n1. A chair\n2. A chair\n3. A chair\n4. A table", 0.0),
    "lines": ("A red chair\nA lamp\nA red chair\nA table\nA red chair", 0.0),
    "a sentence": ("There is a cat. A red lamp is on. There is a cat. A man reads. There is a cat.", 0.0),
    "a Chinese sentence": ("一张桌子。有一把椅子。一个人在看书。有一把椅子。窗外有树。有一把椅子。", 0.1),
}
PROSE_OF_OTHERS = {
    "Chinese": "一位穿着红色连衣裙的年轻女子背对镜头站在沙滩上，海风吹起她的长发。远处的天空被夕阳染成橙红色，"
    "云层呈现出柔和的渐变色彩。海面上有几艘小渔船，船身在逆光中形成深色的剪影。前景是湿润的沙地，倒映着天空的颜色，右侧散落着几块黑色的礁石。",
    "Japanese": "夕暮れの海辺に、赤いワンピースを着た若い女性が立っています。長い髪が風になびいています。"
    "空は夕日でオレンジ色に染まっていて、雲が柔らかな色を見せています。海の上には小さな漁船が浮かんでいて、逆光でシルエットになっています。",
    "Thai": "หญิงสาวสวมชุดเดรสสีแดงยืนหันหลังให้กล้องอยู่บนชายหาด ลมทะเลพัดผมยาวของเธอปลิวไสว ท้องฟ้าถูกย้อมเป็นสีส้มแดงจากแสงอาทิตย์ "
    "เมฆมีสีไล่ระดับอย่างนุ่มนวล บนผิวน้ำมีเรือประมงขนาดเล็กหลายลำ",
    "Hindi": "समुद्र तट पर लाल पोशाक पहने एक युवा महिला खड़ी है। हवा में उसके लंबे बाल उड़ रहे हैं। समुद्र पर कुछ छोटी नावें हैं। सामने रेत है।",
    "Korean": "바닷가에 빨간 원피스를 입은 젊은 여성이 서 있습니다. "
    "긴 머리카락이 바람에 흩날리고 있습니다. 하늘은 주황색으로 물들어 있습니다.",
}


@pytest.mark.parametrize("kind", LOOPS)
def test_loops_of_any_script_and_of_what_no_word_is(kind: str) -> None:
    text, least_ratio = LOOPS[kind]
    assert repeated_ngram_ratio(text, 4, by_script=True) >= least_ratio
    assert "loop" in flags(text)


@pytest.mark.parametrize("language", PROSE_OF_OTHERS)
def test_prose_of_other_scripts_is_far_from_a_loop(language: str) -> None:
    text = PROSE_OF_OTHERS[language]
    assert repeated_ngram_ratio(text, 4, by_script=True) < 0.1 and flags(text) == []


@pytest.mark.parametrize("text", [PROSE, LOOP, "Un café à l’ombre, où l’on boit un café à l’ombre.", "Кот и кот и кот"])
def test_scripts_with_spaces_have_the_ratio_they_always_had(text: str) -> None:
    words = re.findall(r"\w+", text.casefold())
    ngrams = list(zip(*(words[start:] for start in range(4)), strict=False))
    former = 1.0 - len(set(ngrams)) / len(ngrams)
    assert repeated_ngram_ratio(text, 4, by_script=True) == repeated_ngram_ratio(text, 4) == former


def test_what_is_said_twice_is_no_loop_yet() -> None:
    twice = "There is a cat. A red lamp is on. There is a cat."
    assert flags(twice) == [] and flags(twice, max_same_sentence=1) == ["loop"]
    assert flags("Ha" * 12 + "!") == [] and flags("Ha" * 12 + "!", max_characters_on_end=11) == ["loop"]
    assert flags("A shelf with the numbers 1,000,000,000 and 10000000 on it.") == []


def test_alt_text_overlap_counts_distinct_words() -> None:
    assert alt_text_overlap("A red car and a red house", "RED car, car, for sale") == pytest.approx(2 / 4)
    assert alt_text_overlap("A mountain", "富士山と桜 写真素材") == 0.0
    assert alt_text_overlap("A mountain", "a b") is None
    assert alt_text_overlap("A mountain", None) is None


def test_boilerplate_is_stripped_beside_the_raw_caption() -> None:
    assert strip_boilerplate("This photo shows ", QUALITY) == "This photo shows "
    assert strip_boilerplate("The image captures élan.", QUALITY) == "Élan."
    assert strip_boilerplate("The imagery features birds.", QUALITY) == "The imagery features birds."
    for strip in (False, True):
        judged = judge(as_row(PROSE, "stop", None), QualityConfig(strip_boilerplate=strip))
        assert judged["flags"] == ["boilerplate"]
        assert judged["caption"] == (PROSE.replace("The image features a", "A") if strip else PROSE)


def test_a_prompt_is_found_by_shard_name_else_it_is_that_with_the_text() -> None:
    prompts = {"default": "d", "img2dataset": "i {alt_text}", "hq_*": "h"}
    assert template_for("hq_00000", prompts) == "h"
    # Of images without a text it is `default`, whatever their shard holds.
    assert template_for("laion_00000", prompts) == template_for("sa_000000", prompts) == "i {alt_text}"


def test_of_several_prompts_that_fit_the_longest_pattern_counts_in_any_order() -> None:
    """The order of a recipe's prompts is in no digest, and so must not decide."""
    prompts = {
        "default": "d",
        "img2dataset": "i",
        "*": "all",
        "hq_*": "h",
        "*_00001": "one",
        "hq_?0*": "b",
        "hq_*1": "c",
    }
    for ordered in (prompts, dict(reversed(prompts.items()))):
        found = [template_for(name, ordered) for name in ("hq_x", "hq_00000", "hq_00001", "sa_000000")]
        assert found == ["h", "b", "one", "all"]
        assert template_for("hq_x1", ordered) == "c"
    assert template_for("ab", {"default": "d", "?b": "last", "a?": "two", "*b": "first"}) == "first"


def test_alt_texts_go_into_the_prompt_whole_but_bounded() -> None:
    def fill(alt_text: str | None) -> str:
        return fill_prompt('about "{alt_text}"', alt_text, default="plain", max_alt_text_chars=20)

    assert fill("Crème  brûlée\n{key} ") == 'about "Crème brûlée {key}"'
    assert fill("x" * 500) == f'about "{"x" * 20}"'
    assert fill("") == fill(None) == fill(" \t") == "plain"
    assert fill_prompt("no field", "text", default="plain", max_alt_text_chars=20) == "no field"


def test_the_papers_prompts_are_the_defaults_and_a_recipe_adds_to_them(tmp_path) -> None:
    assert CaptioningConfig().prompts["default"] == DESCRIBE
    table = {"prompts": {"sa_*": "What is this?"}}
    config = Recipe(tmp_path / "r.toml", {"captioning": table}).table("captioning", CaptioningConfig)
    assert config.prompts.keys() == {"default", "img2dataset", "sa_*"}
    assert config.prompts_sha256 != CaptioningConfig().prompts_sha256


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"prompts": {"sa_*": "What is {caption}?"}}, "captioning.prompts.*no other placeholder"),
        ({"prompts": {"default": "<image> describe"}}, "captioning.prompts.*nor <image>"),
        ({"prompts": {"default": "{alt_text}"}}, "captioning.prompts.*images without one"),
        ({"temprature": 0.2}, "captioning.temprature is not a known key"),
        ({"dtype": "int8"}, "captioning.dtype = 'int8'"),
        ({"quality": {"ngram_words": 0}}, "captioning.quality.ngram_words = 0"),
    ],
)
def test_mistakes_in_the_table_are_named(tmp_path, table: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe(tmp_path / "r.toml", {"captioning": table}).table("captioning", CaptioningConfig)
