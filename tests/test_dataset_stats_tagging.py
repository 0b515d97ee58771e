"""Tokens and tags are NLTK's, token for token."""

import json
import os
from collections import Counter
from pathlib import Path

import nltk.data
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.tag.perceptron import PerceptronTagger as NltkTagger
from nltk.tokenize.destructive import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer

from dataset_stats.counting import NounCounter
from dataset_stats.tagging.chunks import ChunkTokenizer, Vocabulary
from dataset_stats.tagging.perceptron import CONTEXT_MARKERS, PerceptronTagger
from dataset_stats.tagging.taggers import NLTK_PARTS, find_tagger, load_tagger, nltk_data_folders, read_nltk_part
from errors import UserError

WORDS = [
    "the",
    "a",
    "red",
    "dog",
    "dogs",
    "runs",
    "run",
    "quickly",
    "over",
    "lazy",
    "house's",
    "1999",
    "42",
    "3-d",
    "x-ray",
    "Café",
    "日本",
    "-",
    "-START-",
    "-END2-",
    ".",
    ",",
    "!",
]
LABELS = ["DT", "JJ", "NN", "NNS", "VBZ", "VB", "RB", "IN", "CD", ".", ","]
PIECES = [
    *WORDS, "Dr.", "e.g.", "U.S.", "A.", "5.", "3.5", "1,000", "cannot", "gonna", "wanna", "'tis", "d'ye", "can't",
    "'s",
    "'", '"', "''", "``", "...", "?", "!!", ":", ";", "(", ")", "[", "]", "}", "<", ">", "--", "—", "…", "“", "”", "’",
    "«", "»", "@", "#", "$", "%", "&", "*", "/", "😀", "img_1.jpg", "http://x.y/z?q=1", "|", "İ", "ß",
]  # fmt: skip
SEPARATORS = [" "] * 12 + ["", "", "  ", "\n", "\n\n", "\t", "\xa0", "\x0b", "\x1c", "\r\n"]


def reference_tokens(caption: str) -> list[list[str]]:
    return [NLTKWordTokenizer().tokenize(sentence) for sentence in PunktSentenceTokenizer().tokenize(caption)]


def our_tokens(tokenizer: ChunkTokenizer, captions: list[str]) -> list[list[list[str]]]:
    _, offsets, data = pa.array(captions, type=pa.large_string()).buffers()
    tokens = tokenizer.tokenize(
        np.frombuffer(data, dtype=np.uint8) if data else np.zeros(0, dtype=np.uint8),
        np.frombuffer(offsets, dtype=np.int64)[: len(captions) + 1],
    )
    words = tokenizer.vocabulary.words
    found: list[list[list[str]]] = [[] for _ in captions]
    begin = 0
    for end, caption in zip(tokens.sentence_ends, tokens.sentence_captions, strict=True):
        found[caption].append([words[word - tokenizer.vocabulary.first_id] for word in tokens.words[begin:end]])
        begin = end
    for caption in tokens.slow_captions:
        sentences = tokenizer.tokenize_with_nltk(captions[caption])
        found[caption] = [[words[word - tokenizer.vocabulary.first_id] for word in sentence] for sentence in sentences]
    return found


@pytest.fixture(scope="module")
def tokenizer() -> ChunkTokenizer:
    return ChunkTokenizer(Vocabulary(len(CONTEXT_MARKERS)))


texts = st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(SEPARATORS)), max_size=14).map(
    lambda pairs: "".join(piece + separator for piece, separator in pairs)
)


@settings(max_examples=300, deadline=None)
@given(captions=st.lists(texts, min_size=1, max_size=8))
def test_tokens_are_nltks(tokenizer, captions):
    assert our_tokens(tokenizer, captions) == [reference_tokens(caption) for caption in captions]


@settings(max_examples=100, deadline=None)
@given(captions=st.lists(st.text(max_size=40), min_size=1, max_size=5))
def test_tokens_of_any_unicode_are_nltks(tokenizer, captions):
    captions = [caption.encode("utf-8", errors="ignore").decode() for caption in captions]
    assert our_tokens(tokenizer, captions) == [reference_tokens(caption) for caption in captions]


MARKS = ["", *"([{<\"'“«,;:.?!-_/&%$#@*", "'s", "''", "...", "--", "n't"]
STEMS = [
    "a",
    "I",
    "dog",
    "Dog",
    "cannot",
    "Gonna",
    "wanna",
    "x",
    "5",
    "1984",
    "3rd",
    "img_12",
    "e",
    "ß",
    "日本",
    "gimme",
]
chunks = st.lists(st.sampled_from(MARKS + STEMS * 2), min_size=1, max_size=5).map("".join)


@settings(max_examples=150, deadline=None)
@given(words=st.lists(chunks, min_size=1, max_size=6))
def test_plain_chunks_are_what_nltk_makes_of_them(words):
    """Chunks that NLTK is not asked about, beside chunks that look much like them, at every place of a sentence."""
    caption = " ".join(words)
    for text in (caption, caption.casefold(), f"the {caption} dog.", f"{caption}. And a dog"):
        assert our_tokens(ChunkTokenizer(Vocabulary(len(CONTEXT_MARKERS))), [text]) == [reference_tokens(text)]


def test_ordinary_captions_need_no_help_from_nltk(tokenizer):
    captions = [
        'A red dog sits on a bench (left). It isn\'t happy; the sign says "Sale!" and more...',
        "The image features a woman's hat.\n\nIn the background, there are 3-4 people, e.g. a man.",
    ]
    _, offsets, data = pa.array(captions, type=pa.large_string()).buffers()
    tokens = tokenizer.tokenize(np.frombuffer(data, dtype=np.uint8), np.frombuffer(offsets, dtype=np.int64))
    assert len(tokens.slow_captions) == 0


@st.composite
def trained_tagger(draw) -> NltkTagger:
    sentences = draw(
        st.lists(
            st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(LABELS)), min_size=1, max_size=7),
            min_size=2,
            max_size=12,
        )
    )
    repeated = [[("the", "DT"), ("dog", "NN")]] * draw(st.sampled_from([0, 25]))  # 20 and more fill the tag dictionary
    tagger = NltkTagger(load=False)
    tagger.train([*sentences, *repeated], nr_iter=draw(st.integers(1, 3)))
    return tagger


def tag_with_kernel(tagger: PerceptronTagger, sentences: list[list[str]]) -> list[list[str]]:
    tagger.clear()
    vocabulary = Vocabulary(len(CONTEXT_MARKERS))
    ids = [vocabulary.ids(sentence) for sentence in sentences]
    tagger.add_words(vocabulary.words)
    ends = np.cumsum([len(sentence) for sentence in ids])
    words = np.array([word for sentence in ids for word in sentence], dtype=np.int32)
    tags = [tagger.labels[tag] for tag in tagger.tag(words, ends)]
    return [tags[end - len(sentence) : end] for end, sentence in zip(ends, ids, strict=True)]


@settings(max_examples=150, deadline=None)
@given(
    tagger=trained_tagger(), sentences=st.lists(st.lists(st.sampled_from(WORDS), max_size=9), min_size=1, max_size=6)
)
def test_tags_equal_a_trained_perceptrons(tagger, sentences):
    ours = PerceptronTagger(tagger.model.weights, tagger.tagdict, tagger.classes)
    expected = [[tag for _, tag in tagger.tag(sentence)] for sentence in sentences]
    assert tag_with_kernel(ours, sentences) == expected


@settings(max_examples=60, deadline=None)
@given(
    classes=st.sets(st.sampled_from(LABELS), min_size=2),
    weights=st.dictionaries(
        st.sampled_from(["bias", "i word the", "i suffix the", "i pref1 t", "i-1 tag -START-", "i+1 word -END-"]),
        st.dictionaries(st.sampled_from(LABELS), st.sampled_from([0.1, 0.2, 0.3, -0.3, 0.7]), min_size=1),
    ),
)
def test_ties_break_by_nltks_rounding(classes, weights):
    weights = {feature: {k: v for k, v in row.items() if k in classes} for feature, row in weights.items()}
    reference = NltkTagger(load=False)
    reference.model.weights, reference.tagdict = weights, {}
    reference.classes = reference.model.classes = classes
    expected = [tag for _, tag in reference.tag(["the", "dog", "the"])]
    assert tag_with_kernel(PerceptronTagger(weights, {}, classes), [["the", "dog", "the"]]) == [expected]


def test_words_met_later_share_what_is_known_of_earlier_ones():
    """Words are added in batches; a batch that brings no new profile, and one after `clear`, must tag alike."""
    tagger = NltkTagger(load=False)
    tagger.train(
        [[("the", "DT"), ("dog", "NN"), ("runs", "VBZ")], [("a", "DT"), ("red", "JJ"), ("cat", "NN")]], nr_iter=3
    )
    ours = PerceptronTagger(tagger.model.weights, tagger.tagdict, tagger.classes)
    sentence = ["the", "zzdog", "runs", "a", "yydog", "the", "zzdog"]
    expected = [tag for _, tag in tagger.tag(sentence)]
    for _ in range(2):
        ours.clear()
        vocabulary = Vocabulary(len(CONTEXT_MARKERS))
        for batch in (["the", "zzdog"], ["runs", "a"], ["yydog", "zdog"]):
            vocabulary.ids(batch)
            ours.add_words(batch)
        words = np.array(vocabulary.ids(sentence), dtype=np.int32)
        tags = ours.tag(words, np.array([len(sentence)], dtype=np.int64))
        assert [ours.labels[tag] for tag in tags] == expected


def test_weights_that_are_not_averaged_are_refused():
    with pytest.raises(UserError, match=r"0\.001"):
        PerceptronTagger({"bias": {"NN": 0.12345}}, {}, ["NN", "VB"])


needs_nltk_data = pytest.mark.skipif(
    find_tagger("auto").name != "nltk", reason="averaged_perceptron_tagger_eng is not installed: make nltk-data"
)


@pytest.fixture(scope="module")
def installed() -> tuple[PerceptronTagger, NltkTagger]:
    source = find_tagger("nltk")
    reference = NltkTagger(load=False)
    reference.decode_json_params([json.loads(read_nltk_part(Path(source.folder), part)) for part in NLTK_PARTS])
    ours = load_tagger(source)
    assert isinstance(ours, PerceptronTagger)
    return ours, reference


@needs_nltk_data
@settings(max_examples=150, deadline=None)
@given(sentences=st.lists(st.lists(st.sampled_from(PIECES), max_size=12), min_size=1, max_size=6))
def test_tags_equal_nltks_with_its_real_weights(installed, sentences):
    ours, reference = installed
    expected = [[tag for _, tag in reference.tag(sentence)] for sentence in sentences]
    assert tag_with_kernel(ours, sentences) == expected


@needs_nltk_data
def test_noun_counts_equal_nltks_on_prose(installed):
    ours, reference = installed
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    captions = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    expected: Counter[str] = Counter()
    for caption in captions:
        for sentence in reference_tokens(caption.casefold()):
            expected.update(word for word, tag in reference.tag(sentence) if tag.startswith("NN"))
    counter = NounCounter(ours)
    counter.count(captions)
    nouns = counter.take()
    assert dict(zip(nouns["noun"].to_pylist(), nouns["count"].to_pylist(), strict=True)) == dict(expected)


def test_data_is_searched_where_nltk_searches(monkeypatch, tmp_path):
    monkeypatch.setenv("NLTK_DATA", os.pathsep.join([str(tmp_path / "one"), str(tmp_path / "two")]))
    folders = [str(folder) for folder in nltk_data_folders()]
    assert folders[:2] == [str(tmp_path / "one"), str(tmp_path / "two")]
    # nltk.data.path was made when nltk was imported, under the environment of then.
    assert [str(Path(folder)) for folder in nltk.data.path][-len(folders[2:]) :] == folders[2:]


def test_without_data_the_lexicon_serves_and_nltk_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("dataset_stats.tagging.taggers.nltk_data_folders", lambda: [tmp_path])
    source = find_tagger("auto")
    assert source.name == "textblob"
    with pytest.raises(FileNotFoundError, match="make nltk-data"):
        find_tagger("nltk")
    tags = NounCounter(load_tagger(source)).tags("Two dogs quickly eat a zzglyph.")
    assert [word for word, tag in tags[0] if tag.startswith("NN")] == ["dogs", "zzglyph"]
