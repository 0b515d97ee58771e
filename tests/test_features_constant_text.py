"""One text for all images of a table, and the rare token in it: what is written, and what is refused."""

import shutil
from pathlib import Path

import feature_run
import pyarrow.parquet as pq
import pytest
from feature_run import caption_of, extract, write_captions, write_run
from tiny_encoders import save_pieces, save_text_encoder

from errors import UserError
from pipelines.store.families import NULL_CAPTION_FILE

TOY_T5 = Path(__file__).resolve().parent.parent / "toyworld" / "weights" / "t5"
TOKEN = "features.stage2.token=sks"


def constant(text: str, *, column: str = "subject") -> str:
    return f'features.stage2.captions=[{{column = "{column}", text = "{text}"}}]'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("constant"), num_shards=1, samples_per_shard=5)
    shutil.rmtree(run / "captions")
    return run


def test_a_photo_folder_needs_no_captions(run: Path) -> None:
    extract(run, constant("a small red circle"))
    folder = run / "features" / "text-subject"
    rows = pq.read_table(folder / "laion_00000.parquet").to_pylist()
    assert [row["key"] for row in rows] == [f"{index:08d}" for index in range(5)]
    assert len({row["crc32"] for row in rows}) == 1, "all have the same embedding"
    assert (folder / NULL_CAPTION_FILE).is_file()


def test_the_text_is_encoded_as_a_caption_is(run: Path, tmp_path: Path) -> None:
    extract(run, constant("a small red circle"))
    captioned = write_run(tmp_path, num_shards=1, samples_per_shard=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_run, "caption_of", lambda index: "a small red circle")
        write_captions(captioned, [captioned / "raw" / "laion_00000.tar"], rejects={})
    extract(captioned)
    expected = (captioned / "features" / "text" / "laion_00000.tar").read_bytes()
    assert (run / "features" / "text-subject" / "laion_00000.tar").read_bytes() == expected


def test_another_text_is_encoded_anew_and_the_same_is_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extract(run, constant("a green square"))
    tar = run / "features" / "text-subject" / "laion_00000.tar"
    first = tar.stat().st_mtime_ns
    extract(run, constant("a green square"))
    assert tar.stat().st_mtime_ns == first
    extract(run, constant("a green star"))
    assert tar.stat().st_mtime_ns != first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((constant("a red star", column="caption"),), "one text for all images has a name other than caption"),
        ((constant("  "),), r"captions\.0\.text"),
        (('features.stage2.captions=[{column="x", text="a"}, {column="y"}]',), "no other captions beside it"),
        ((constant("a small star"), TOKEN), r"features\.stage2\.token = 'sks' is not in the text .* 'a small star'"),
    ],
)
def test_what_cannot_be_one_text_is_refused(run: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        extract(run, *settings)


def test_a_common_word_is_no_rare_token(run: Path) -> None:
    model = f"features.text_model={TOY_T5}"
    extract(run, model, constant("a yellow sks"), TOKEN)
    with pytest.raises(
        UserError, match=r"token = 'star' is a common word: it is one piece, number \d+, of .*t5.* 5,000"
    ):
        extract(run, model, constant("a yellow star"), "features.stage2.token=star")


def test_a_common_word_is_known_to_a_tokenizer_as_it_was_published(run: Path, tmp_path: Path) -> None:
    """Of SentencePiece's file alone, which is all that the released models' T5 has."""
    folder = save_text_encoder(tmp_path / "t5")
    (folder / "tokenizer.json").unlink()
    save_pieces(folder, [f"a {colour} star" for colour in ("yellow", "red", "blue", "green", "sad", "dark")] * 20)
    model = f"features.text_model={folder}"
    with pytest.raises(UserError, match=r"token = 'star' is a common word: it is one piece, number \d+, of .*t5"):
        extract(run, model, constant("a yellow star"), "features.stage2.token=star")
    extract(run, model, constant("a yellow rks"), "features.stage2.token=rks")


def test_captions_of_files_are_looked_through_for_the_token(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_shards=1, samples_per_shard=5)
    with pytest.raises(UserError, match=r"token = 'zwx' is not in the 4 captions of .*captions, such as"):
        extract(run, "features.stage2.token=zwx")
    words = caption_of(1).split()
    extract(run, f"features.stage2.token={max(words, key=len)}")  # spelled letter by letter here
