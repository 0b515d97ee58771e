"""The blind page in Chromium: keys, shuffled sides, no names, the CSV; and what is counted from it."""

import csv
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from sampling_run import PIXART, PROMPTS, make_run, randomised, save_checkpoint
from sound_run import require_sound

from errors import UserError
from pixart.model import PixArt
from sampling.evaluation.__main__ import main
from sampling.evaluation.preference import make_pairs
from sampling.evaluation.win_rates import read_votes, win_rates

NAMES = ["stage 2, step 7", "stage 2, step 9"]


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A page over three prompts and two checkpoints; returns its folder."""
    root = tmp_path_factory.mktemp("study")
    run, other = make_run(root / "one"), make_run(root / "two")
    save_checkpoint(other, 2, randomised(PixArt(PIXART), seed=5), step=9)
    recipe = run / "recipe.toml"
    recipe.write_text(
        '[sampling]\nprompts = "{run}/raw/prompts.jsonl"\nnum_steps = 2\ntext_dtype = "float32"\n'
        f'[evaluation]\ncompare = ["{other}:stage2"]\npreference_pixels = 32\npreference_seed = 3\n'
    )
    main(["preference", "--recipe", str(recipe), "--run", str(run), "--stage", "2"])
    return run / "evaluation" / "stage2-preference"


def count(study: Path) -> dict:
    run = study.parents[1]
    main(["winrates", "--recipe", str(run / "recipe.toml"), "--run", str(run), "--stage", "2"])
    return json.loads((study / "win-rates.json").read_text())


def test_the_page_names_nobody_and_needs_no_network(study):
    require_sound(study.parents[1])
    text = (study / "preference.html").read_text()
    key = json.loads((study / "preference-key.json").read_text())
    assert list(key["checkpoints"]) == NAMES
    identities = [inputs["checkpoint_fingerprint"].removeprefix("sha256:") for inputs in key["checkpoints"].values()]
    for secret in [*NAMES, "step 7", "step-9", "stage2", str(study.parents[2]), *identities]:
        assert secret not in text
    assert not re.search(r"https?://", text)
    # A code belongs to one picture of one pair, so none repeats.
    codes = [code for pair in json.loads(page_data(text))["pairs"] for code in pair["codes"]]
    assert len(codes) == len(set(codes)) == 2 * len(PROMPTS) and set(codes) == set(key["codes"])
    assert key["files"].keys() == key["codes"].keys()
    assert all((study.parents[1] / "samples" / "stage2" / name).is_file() for name in key["files"].values())


def page_data(text: str) -> str:
    match = re.search(r'<script type="application/json" id="study">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    return match.group(1)


def test_order_and_sides_are_shuffled_by_the_seed(tmp_path):
    keys = [(f"key{number}", 0) for number in range(40)]
    pictures = {name: {item: (f"prompt {item[0]}", tmp_path / name) for item in keys} for name in ("a", "b", "c")}
    pairs, key = make_pairs(pictures, seed=1)
    assert len(pairs) == 3 * 40 and len(key) == 2 * 3 * 40
    left = [key[pair["codes"][0]] for pair, _ in pairs if {key[code] for code in pair["codes"]} == {"a", "b"}]
    assert 8 < left.count("a") < 32
    prompts = [pair["prompt"] for pair, _ in pairs]
    assert prompts != sorted(prompts) and make_pairs(pictures, seed=1) == (pairs, key)
    assert [pair for pair, _ in make_pairs(pictures, seed=2)[0]] != [pair for pair, _ in pairs]
    # The codes lie on the sides where their pictures are.
    assert all(paths[0] == tmp_path / key[pair["codes"][0]] for pair, paths in pairs)
    with pytest.raises(UserError, match="no prompt in common"):
        make_pairs({"a": {("x", 0): ("one", tmp_path)}, "b": {("x", 0): ("two", tmp_path)}}, seed=0)


def test_keys_vote_and_the_csv_says_what_was_chosen(study, browser):
    always = NAMES[1]  # the rater prefers this checkpoint whenever it is on a side, and has no preference once
    key = json.loads((study / "preference-key.json").read_text())
    data = json.loads(page_data((study / "preference.html").read_text()))
    expected = []
    page = browser.new_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto((study / "preference.html").as_uri())
    page.fill("#rater", 'Ada, "L"')
    page.keyboard.press("Enter")
    steps = [(question, pair) for question in data["questions"] for pair in data["pairs"]]
    for number, (question, pair) in enumerate(steps):
        assert page.inner_text("#prompt") == pair["prompt"]
        assert page.inner_text("#count") == f"{number + 1} of {len(steps)}"
        assert page.get_attribute("#left-image", "src") == data["images"][pair["codes"][0]]
        assert page.evaluate("document.getElementById('right-image').naturalWidth") == 32
        assert not any(name in page.content() for name in NAMES)
        choice = "left" if key["codes"][pair["codes"][0]] == always else "right"
        if number == 1:  # a slip, taken back
            page.keyboard.press("ArrowLeft" if choice == "right" else "ArrowRight")
            page.keyboard.press("Backspace")
        if number == 2:
            choice = "tie"
        if number == 4:  # the page is closed and opened again
            page.reload()
            page.fill("#rater", 'Ada, "L"')
            page.keyboard.press("Enter")
        page.keyboard.press({"left": "ArrowLeft", "right": "ArrowRight", "tie": "ArrowDown"}[choice])
        expected.append([data["study"], 'Ada, "L"', question, *pair["codes"], choice])
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(study / "ada.csv")
    assert not any(name in page.content() for name in NAMES)
    page.close()
    assert not faults and all(url.startswith(("file:", "data:")) for url in requests)
    with (study / "ada.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["study", "rater", "question", "left", "right", "choice"], *expected]
    value = count(study)
    assert value["num_votes"] == 6 and value["rejected"] == {}
    quality, alignment = value["rates"]
    assert (quality["question"], quality["num_first"], quality["num_second"], quality["num_ties"]) == (
        "quality",
        0,
        2,
        1,
    )
    assert (alignment["num_second"], alignment["rate"], alignment["num_raters"]) == (3, 0.0, 1)
    (study / "ada.csv").unlink()


def make_key() -> dict:
    codes = {"a1": "A", "b1": "B", "a2": "A", "b2": "B"}
    return {"study": "s", "questions": ["quality"], "checkpoints": {"A": {}, "B": {}}, "codes": codes}


def write_votes(path: Path, *rows: str, head: str = "study,rater,question,left,right,choice") -> Path:
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def test_votes_are_counted_once_and_for_the_right_checkpoint(tmp_path):
    one = write_votes(tmp_path / "1.csv", "s,x,quality,a1,b1,left", "s,x,quality,b2,a2,right", "s,x,quality,b2,a2,left")
    two = write_votes(tmp_path / "2.csv", "s,y,quality,a1,b1,right", "s,y,quality,b2,a2,tie", "old,y,quality,b2,a2,tie")
    votes, rejected = read_votes([one, two], make_key())
    assert (len(votes), rejected) == (4, {"repeated": 1, "other_study": 1})
    (rate,) = win_rates(votes, make_key())
    assert (rate.num_first, rate.num_second, rate.num_ties, rate.num_raters) == (2, 1, 1, 2)
    assert rate.rate == pytest.approx(2 / 3) and rate.low < 2 / 3 < rate.high
    (empty,) = win_rates([], make_key())
    assert empty.rate is None and (empty.low, empty.high) == (0, 1)


@pytest.mark.parametrize(
    ("row", "head", "message"),
    [
        ("s,x,quality,a1,zz,left", None, r"v\.csv:2 is no vote of this page"),
        ("s,x,quality,a1,b1,both", None, r"v\.csv:2 is no vote of this page"),
        ("s,x,beauty,a1,b1,left", None, r"v\.csv:2 is no vote of this page"),
        ("s,x,quality", None, r"v\.csv:2 has not 6 cells"),
        ("s,x", "study,rater", r"v\.csv:1 should be study,rater,question"),
    ],
)
def test_a_file_that_holds_no_votes_is_named(tmp_path, row, head, message):
    path = write_votes(tmp_path / "v.csv", row, **({"head": head} if head else {}))
    with pytest.raises(UserError, match=message):
        read_votes([path], make_key())


def test_missing_pieces_name_the_command(study, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no CSV of votes"):
        count(study)
    run = study.parents[1]
    flags = ["--recipe", str(run / "recipe.toml"), "--run", str(tmp_path), "--stage", "2"]
    with pytest.raises(FileNotFoundError, match=r"make eval TASK=preference"):
        main(["winrates", *flags])
    flags[3] = str(run)
    with pytest.raises(UserError, match=r"name others in evaluation\.compare"):
        main(["preference", *flags, "--set", "evaluation.compare=[]"])


def test_pictures_carry_no_text_from_their_files(study):
    import base64
    import io

    data = json.loads(page_data((study / "preference.html").read_text()))
    for source in data["images"].values():
        with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as image:
            assert image.format == "JPEG" and not {"prompt", "settings", "checkpoint"} & image.info.keys()
