"""Benchmarks' files in their published layouts, and the questions that become of them."""

import csv
import json

import pytest

from errors import MissingFileError, UserError
from sampling.evaluation.config import EvaluationConfig
from sampling.evaluation.prompt_sets import write_prompt_set
from sampling.evaluation.questions.benchmarks import open_benchmark
from sampling.evaluation.questions.layouts import read_dpg, read_geneval, read_geneval2
from sampling.evaluation.questions.wording import compbench_questions, plural

# Lines as published, one of each tag, and what an `exclude` of its own would be.
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "scissors", "count": 1}], "prompt": "a photo of a scissors"},
    {
        "tag": "counting",
        "include": [{"class": "bus", "count": 3}],
        "exclude": [{"class": "bus", "count": 4}],
        "prompt": "a photo of three buses",
    },
    {
        "tag": "position",
        "include": [
            {"class": "teddy bear", "count": 1},
            {"class": "orange", "count": 1, "position": ["right of", 0]},
        ],
        "prompt": "a photo of an orange right of a teddy bear",
    },
    {
        "tag": "color_attr",
        "include": [
            {"class": "wine glass", "count": 1, "color": "purple"},
            {"class": "knife", "count": 2, "color": "black"},
        ],
        "exclude": [{"class": "dog", "count": 1}],
        "prompt": "a photo of a purple wine glass and two black knives",
    },
]
GENEVAL2 = {
    "prompt": "two metal toys",
    "atom_count": 3,
    "vqa_list": [["How many toys are in the image?", "two"], ["Are the toys metal?", "Yes"]],
    "skills": ["count", "attribute"],
}
DPG = """item_id,text,keywords,proposition_id,dependency,category_broad,tuple,question_natural_language
a7,"A red dog, near a tree.",,1,0,entity,entity - whole (dog),Is there a dog?
a7,"A red dog, near a tree.",,2,1,attribute,"attribute - color (dog, red)",Is the dog red?
a7,"A red dog, near a tree.",,3,0,entity,entity - whole (tree),Is there a tree?
a7,"A red dog, near a tree.",,4,"1, 3",relation,"relation - spatial (dog, tree, near)",Is the dog near the tree?
b,Snow.,,1,0,global,global - (snow),Is it snowing?
"""


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def said(prompt):
    return [(question.text, question.answer, question.group) for question in prompt.questions]


def test_geneval_becomes_questions_by_include_and_exclude(tmp_path):
    path = write_lines(tmp_path / "evaluation_metadata.jsonl", GENEVAL)
    prompts = read_geneval(path, key="evaluation.prompts")
    assert [(item.key, item.group) for item in prompts] == [
        ("00000", "single_object"),
        ("00001", "counting"),
        ("00002", "position"),
        ("00003", "color_attr"),
    ]
    assert [said(item) for item in prompts] == [
        [("Are there any scissors in the image?", "yes", "object")],
        [("How many buses are in the image?", "three", "count")],
        [
            ("Is there a teddy bear in the image?", "yes", "object"),
            ("Is there an orange in the image?", "yes", "object"),
            ("Is the orange to the right of the teddy bear?", "yes", "position"),
        ],
        [
            ("Is there a wine glass in the image?", "yes", "object"),
            ("Is the wine glass purple?", "yes", "attribute"),
            ("Are there 2 or more knives in the image?", "yes", "count"),
            ("Are the knives black?", "yes", "attribute"),
            ("Is there a dog in the image?", "no", "object"),
        ],
    ]
    more = write_lines(tmp_path / "more.jsonl", [*GENEVAL, GENEVAL[0], GENEVAL[1]])
    assert [item.key for item in read_geneval(more, key="k", num_per_tag=1)] == ["00000", "00001", "00002", "00003"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"include": []}, r"line 2 is not in the layout of GenEval's .*: include: "),
        ({"include": [{"class": "cat", "count": 1, "position": ["over", 0]}]}, "placed by object 0, which is none"),
        ({"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["over", 0]}]}, "'over'"),
        ({"include": [{"class": "cat", "count": 11}], "exclude": [{"class": "cat", "count": 12}]}, "11 cats .* to 10"),
        ({"include": [{"class": "cat"}]}, r"include.0.count: "),
    ],
)
def test_a_line_that_is_none_of_genevals_is_named(tmp_path, change, message):
    path = write_lines(tmp_path / "g.jsonl", [GENEVAL[0], GENEVAL[0] | change])
    with pytest.raises(UserError, match=message) as refused:
        read_geneval(path, key="evaluation.prompts")
    assert f"evaluation.prompts {path}, line 2" in str(refused.value)
    path.write_text("\n\n" + path.read_text())  # empty lines are passed over and counted
    with pytest.raises(UserError, match=r"line 4"):
        read_geneval(path, key="evaluation.prompts")


def test_a_text_may_hold_what_ends_lines_elsewhere(tmp_path):
    path = tmp_path / "g.jsonl"
    path.write_text(json.dumps(GENEVAL[0] | {"prompt": "a dog\u2028and\x85a cat"}, ensure_ascii=False), "utf-8")
    assert read_geneval(path, key="k")[0].prompt == "a dog\u2028and\x85a cat"


def test_geneval2_has_its_own_questions(tmp_path):
    (item,) = read_geneval2(write_lines(tmp_path / "g.jsonl", [GENEVAL2]), key="k")
    assert said(item) == [
        ("How many toys are in the image?", "two", "count"),
        ("Are the toys metal?", "yes", "attribute"),
    ]
    assert item.num_atoms == 3
    for change, message in (
        ({"skills": ["count"]}, "2 questions in vqa_list, but 1 skills"),
        ({"vqa_list": [["What is it?", "a toy"]], "skills": ["object"]}, "the answer 'a toy', which is not one of"),
        ({"vqa_list": [], "skills": []}, "vqa_list: "),
    ):
        path = write_lines(tmp_path / "g.jsonl", [GENEVAL2 | change])
        with pytest.raises(UserError, match=message):
            read_geneval2(path, key="k")
    with pytest.raises(UserError, match="'two metal toys' twice"):
        read_geneval2(write_lines(tmp_path / "g.jsonl", [GENEVAL2, GENEVAL2]), key="k")


@pytest.fixture
def usual_csv_limit():
    """Python's own limit of a field: scipy, where something imported it before, has lifted it for the process."""
    limit = csv.field_size_limit(131_072)
    yield
    csv.field_size_limit(limit)


def test_dpg_bench_has_parents_and_categories(tmp_path, usual_csv_limit):
    path = tmp_path / "dpg_bench.csv"
    path.write_text(DPG)
    first, second = read_dpg(path, key="k")
    assert (first.key, first.prompt, second.key) == ("a7", "A red dog, near a tree.", "b")
    assert [question.parents for question in first.questions] == [(), (0,), (), (0, 2)]
    groups = [question.group for item in (first, second) for question in item.questions]
    assert groups == ["entity", "attribute", "entity", "relation", "global"]
    for old, new, message in (
        ("proposition_id", "id", "no column proposition_id"),
        ('a7,"A red dog, near a tree.",,3', 'a7,"A red dog, near a tree.",,2', "proposition 2 twice"),
        (",2,1,attribute", ",2,one,attribute", "line 3: proposition_id and dependency are whole numbers"),
        ("Is the dog red?", "", "proposition 2 has no question"),
        ("Snow.", "", "item b has no text"),
        (",3,0,entity", ',3,0,"' + 200_000 * "x", r"line \d+ is no row of a CSV: field larger"),
    ):
        path.write_text(DPG.replace(old, new))
        with pytest.raises(UserError, match=message):
            read_dpg(path, key="k")


@pytest.mark.parametrize(
    ("category", "prompt", "wanted"),
    [
        (
            "color",
            "a green unicorn and an hourglass",
            ["Is there a green unicorn in the image?", "Is there an hourglass in the image?"],
        ),
        (
            "color",
            "the orange bowl and a unicorn",
            ["Is there an orange bowl in the image?", "Is there a unicorn in the image?"],
        ),
        (
            "texture",
            "rubber sole shoes and fluffy clouds",
            ["Are there rubber sole shoes in the image?", "Are there fluffy clouds in the image?"],
        ),
        # An article inside of what is none at its beginning.
        ("color", "A zebra in a zoo.", ['Does this image show "A zebra in a zoo."?']),
        ("color", "A bathroom with white tile.", ['Does this image show "A bathroom with white tile."?']),
        (
            "spatial",
            "a woman on the top of a frog",
            [
                "Is there a woman in the image?",
                "Is there a frog in the image?",
                "Is the woman on top of the frog?",
            ],
        ),
        (
            "3d_spatial",
            "a car hidden by an egg",
            ["Is there a car in the image?", "Is there an egg in the image?", "Is the car hidden by the egg?"],
        ),
        (
            "numeracy",
            "three mice, one mouse, a pen, and two fish",
            [
                "How many mice are in the image? three",
                "How many mice are in the image? one",
                "How many pens are in the image? one",
                "How many fish are in the image? two",
            ],
        ),
        ("color", "A red apple and the Dog", ["Is there a red apple in the image?", "Is there a Dog in the image?"]),
        ("numeracy", "four cats slept on the sofa", ['Does this image show "four cats slept on the sofa"?']),
        ("complex", "The red hat was on top.", ['Does this image show "The red hat was on top."?']),
    ],
)
def test_compbench_prompts_that_are_lists_become_questions(category, prompt, wanted):
    asked = compbench_questions(category, prompt)
    assert [q.text if q.answer == "yes" else f"{q.text} {q.answer}" for q in asked] == wanted


def test_plurals_follow_the_rules_of_english():
    nouns = ("dog", "bench", "hot dog", "knife", "toy", "butterfly", "person", "computer mouse", "bus", "sheep", "skis")
    assert [plural(noun) for noun in nouns] == [
        *("dogs", "benches", "hot dogs", "knives", "toys", "butterflies", "people", "computer mice", "buses"),
        *("sheep", "skis"),
    ]


def test_every_benchmark_is_drawn_from_the_file_that_its_questions_are_in(tmp_path):
    (tmp_path / "dpg.csv").write_text(DPG)
    write_lines(tmp_path / "g.jsonl", GENEVAL)
    write_lines(tmp_path / "g2.jsonl", [GENEVAL2])
    for name, file, keys in (
        ("geneval", "g.jsonl", ["00000", "00001", "00002", "00003"]),
        ("geneval2", "g2.jsonl", ["00000"]),
        ("dpg-bench", "dpg.csv", ["a7", "b"]),
    ):
        config = EvaluationConfig(prompt_set=name, prompts=f"{{run}}/{file}")
        rows = [json.loads(line) for line in write_prompt_set(config, run=tmp_path).read_text().splitlines()]
        benchmark = open_benchmark(config, run=tmp_path)
        assert [row["key"] for row in rows] == keys == [item.key for item in benchmark.prompts]
        assert [row["prompt"] for row in rows] == [item.prompt for item in benchmark.prompts]
    with pytest.raises(UserError, match=r"evaluation.prompt_set 'coco' has no questions: .*'dpg-bench'"):
        open_benchmark(EvaluationConfig(prompt_set="coco", prompts="x"), run=tmp_path)
    with pytest.raises(UserError, match=r"evaluation\.questions\.file is not set"):
        open_benchmark(EvaluationConfig(), run=tmp_path)
    with pytest.raises(MissingFileError, match="is no file"):
        open_benchmark(EvaluationConfig(prompt_set="geneval", prompts="{run}/none.jsonl"), run=tmp_path)
