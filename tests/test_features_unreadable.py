"""Captions that a vocabulary lacks: counted, shown, and rejects where nothing of them is left."""

import string
import zlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from feature_run import encoded, extract, picture, write_captions, write_raw, write_recipe
from tiny_encoders import text_config
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import T5EncoderModel

from encoders.opening import open_text_encoder
from encoders.token_kinds import token_kinds
from errors import UserError
from pipelines.store.feature_store import load_index
from pipelines.store.files import sha256_file
from pipelines.store.manifest import ShardDirectory, read_manifest
from pipelines.store.verify.run import verify_run
from sampling.text_encoding import _warn_of_unread

REPOSITORY = Path(__file__).resolve().parent.parent
SHARD = "laion_00000"
TEXTS = {
    "plain": "a red dog, on bench 7",
    "mixed": "a red 狗",
    "chinese": "一只红色的狗，在长凳上。",
    "emoji": "🐕🐕",
    "marks": "!!!",
    "control": "</s> <pad>",
    "space": "\u200b \u00ad",
}


def unigram() -> Tokenizer:
    """A vocabulary as T5's is built, of English alone."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    english = [f"a red dog on bench number {number}, the cat's bone" for number in range(100)]
    english.append(" ".join(string.ascii_letters + string.digits + string.punctuation))
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(english, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a red dog grüner 日"], trainer)
    return tokenizer


def test_what_is_read_of_texts() -> None:
    tokenizer = unigram()
    kinds = token_kinds(tokenizer)
    found = {name: tokenizer.encode(text).ids for name, text in TEXTS.items()}
    unread = {name for name, ids in found.items() if kinds.num_unread(ids)}
    assert unread == {"mixed", "chinese", "emoji", "control", "space"}
    nothing = {name for name, ids in found.items() if kinds.is_unreadable(ids)}
    assert nothing == {"chinese", "emoji", "control", "space"}, "marks alone are read where nothing else was lost"
    assert kinds.is_unreadable(tokenizer.encode("").ids) and not kinds.num_unread(tokenizer.encode("").ids)


def test_what_is_spelled_in_bytes_alone_is_not_read() -> None:
    """A vocabulary of bytes has no unknown token: what it has learned nothing of are two single bytes and more."""
    tokenizer = byte_level()
    kinds = token_kinds(tokenizer)
    found = {}
    for name, text in (TEXTS | {"learned": "grüner 日", "next": "a 日本 dog"}).items():
        ids = tokenizer.encode(text).ids
        found[name] = (kinds.num_unread(ids), kinds.is_unreadable(ids))
    assert found == {
        "plain": (0, False),
        "mixed": (3, False),
        "chinese": (36, True),
        "emoji": (8, True),
        "marks": (0, False),
        "control": (0, False),
        "space": (5, True),
        "learned": (0, False),
        "next": (3, False),
    }


def test_bytes_that_a_vocabulary_falls_back_on_are_not_read() -> None:
    vocabulary = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), ("▁", -2.0), ("dog", -1.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    kinds = token_kinds(tokenizer)
    for text, expected in (("dog", (0, False)), ("日本", (6, True)), ("dog 日", (3, False))):
        ids = tokenizer.encode(text).ids
        assert (kinds.num_unread(ids), kinds.is_unreadable(ids)) == expected


def test_the_embedded_encoder_reads_what_it_was_trained_on() -> None:
    tokenizer = Tokenizer.from_file(str(REPOSITORY / "toyworld/weights/t5/tokenizer.json"))
    kinds = token_kinds(tokenizer)
    for text, num_unread, is_unreadable in (
        *(("a red circle", 0, False), ("ein grüner Kreis, é å", 0, False), ("日本", 6, True), ("😀", 4, True)),
        *(("\u200b", 3, True), ("… ▓", 6, True), ("a red circle 日本", 6, False), ("<unk> </s>", 2, True)),
    ):
        ids = tokenizer.encode(text).ids
        assert (kinds.num_unread(ids), kinds.is_unreadable(ids)) == (num_unread, is_unreadable), text


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with a caption per text of `TEXTS`; its encoder's vocabulary is `unigram`."""
    run = tmp_path / "run"
    samples = [{"key": key, "png": encoded(picture(number)), "txt": "t"} for number, key in enumerate(TEXTS)]
    write_raw(run / "raw" / f"{SHARD}.tar", samples)
    write_captions(run, [run / "raw" / f"{SHARD}.tar"], rejects={})
    path = run / "captions" / f"{SHARD}.parquet"
    table = pq.read_table(path)
    columns = table.to_pydict() | {"caption": list(TEXTS.values()), "alt_text": ["a dog", *[None] * (len(TEXTS) - 1)]}
    pq.write_table(table.from_pydict(columns, schema=table.schema), path)
    directory = ShardDirectory(run / "captions")
    manifest = read_manifest(directory.path)
    report = manifest.shards[SHARD]
    report.files[".parquet"] = sha256_file(path)
    directory.write_marker(report, manifest.fingerprint)
    directory.write_manifest(manifest.fingerprint, [SHARD], upstream={}, extra={})
    write_recipe(tmp_path)
    tokenizer = unigram()
    T5EncoderModel(text_config(tokenizer.get_vocab_size())).save_pretrained(tmp_path / "t5")
    tokenizer.save(str(tmp_path / "t5" / "tokenizer.json"))
    return run


def test_unreadable_captions_are_rejects_and_said(run, caplog, capsys) -> None:
    with pytest.raises(UserError, match="unreadable_text 4"):
        extract(run, "features.max_reject_fraction=0.5")
    said = " ".join(caplog.text.split())
    assert "5 captions (71.4%) have words that features.text_model" in said
    assert "cannot read, such as 'a red 狗'; '一只红色的狗，在长凳上。'; '🐕🐕': " in said
    assert "of 4 nothing else is left, which are left out (unreadable_text)" in said
    capsys.readouterr()
    extract(run, plan=True)
    planned = " ".join(capsys.readouterr().err.split())
    assert "mean of 7 captions (5 are not read whole, 4 not at all: 'a red 狗'; '一只" in planned
    extract(run, "features.max_reject_fraction=0.6")
    rows = load_index(run / "features" / "text", [SHARD]).to_pylist()
    rejects = {row["key"]: row["reject"] for row in rows}
    nothing = ("chinese", "emoji", "control", "space")
    assert rejects == {key: "unreadable_text" if key in nothing else None for key in TEXTS}
    texts = {row["key"]: row["crc32"] for row in rows if row["reject"]}
    assert texts == {key: zlib.crc32(TEXTS[key].encode()) for key in nothing}, "a rejected text can be found again"
    details = read_manifest(run / "features" / "text").shards[SHARD].details
    assert (details["num_captions_not_read_whole"], details["num_unreadable_captions"]) == (5, 4)
    assert details["num_captions"] == 3 and details["num_unknown_tokens"] >= 5
    assert not verify_run(run).problems


def test_a_sample_with_another_caption_is_kept(run) -> None:
    extract(
        run, 'features.stage2.captions=[{column="caption"}, {column="alt_text"}]', "features.max_reject_fraction=0.6"
    )
    manifest = read_manifest(run / "features" / "text-caption+alt_text")
    assert manifest.rejected == {"unreadable_text": 4}
    index = load_index(run / "features" / "text-caption+alt_text", [SHARD]).to_pylist()
    assert [row["reject"] for row in index if row["key"] == "plain"] == [None, None]


def test_words_of_prompts_that_are_not_read_are_named(run, caplog) -> None:
    encoder = open_text_encoder(str(run.parent / "t5"), max_tokens=40, dtype="float32")
    _warn_of_unread(["", "a red dog", "a red 狗", "红色的狗"], encoder, "toy")
    assert [record.getMessage() for record in caplog.records] == [
        "text encoder toy cannot read '狗' of the prompt 'a red 狗'",
        "text encoder toy cannot read '红色的狗' of the prompt '红色的狗', and nothing else is left of the prompt",
    ]
