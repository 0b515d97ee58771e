"""The two taggers: NLTK's averaged perceptron where its data is installed, TextBlob's lexicon where it is not."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from errors import MissingFileError
from pipelines.as_typed import typed_command

TaggerName = Literal["auto", "nltk", "textblob"]
NLTK_TAGGER = "averaged_perceptron_tagger_eng"
NLTK_PARTS = ("weights", "tagdict", "classes")


class Tagger(Protocol):
    """Tags word ids; ids are given in the order of `add_words`, after the reserved ones."""

    @property
    def labels(self) -> Sequence[str]:
        """All labels; a tag is an index into them."""
        ...

    def clear(self) -> None:
        """Forget all words."""
        ...

    def add_words(self, words: Sequence[str]) -> None:
        """Give the next word ids to `words`."""
        ...

    def tag(self, words: np.ndarray, sentence_ends: np.ndarray) -> np.ndarray:
        """Tags of a run of sentences as indices into `labels`."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaggerSource:
    """Which tagger a run uses and where its data is; small enough to send to every worker.

    Attributes:
        name: "nltk" or "textblob".
        folder: folder or zip file that holds NLTK's weights; empty for TextBlob.
        identity: what the fingerprint of the counts says about the tagger.
        title: what the report says about it.
    """

    name: Literal["nltk", "textblob"]
    folder: str
    identity: str
    title: str


def nltk_data_folders() -> list[Path]:
    """Folders that NLTK searches for its data, in its order; `NLTK_DATA` first."""
    named = [Path(folder) for folder in os.environ.get("NLTK_DATA", "").split(os.pathsep) if folder]
    home = [Path.home() / "nltk_data"]
    prefix = [Path(sys.prefix, *parts) for parts in (("nltk_data",), ("share", "nltk_data"), ("lib", "nltk_data"))]
    system = [Path(root, "nltk_data") for root in ("/usr/share", "/usr/local/share", "/usr/lib", "/usr/local/lib")]
    return named + home + prefix + system


def how_to_install() -> str:
    """Return the command that installs NLTK's tagger."""
    return typed_command("nltk-data")


def find_tagger(name: TaggerName) -> TaggerSource:
    """Tagger to use: for "auto", NLTK's perceptron when its data is installed, else TextBlob's lexicon.

    Raises:
        MissingFileError: `name` is "nltk" and the data is in none of NLTK's folders.
    """
    if name != "textblob":
        for folder in nltk_data_folders():
            for place in (folder / "taggers" / NLTK_TAGGER, folder / "taggers" / f"{NLTK_TAGGER}.zip"):
                if place.exists():
                    return _nltk_source(place)
        if name == "nltk":
            raise MissingFileError(
                f'dataset_stats.tagger is "nltk", but {NLTK_TAGGER} is not installed; run: {how_to_install()}'
            )
    return TaggerSource(
        name="textblob",
        folder="",
        identity=f"textblob-lexicon@{version('textblob')}",
        title=f"TextBlob {version('textblob')} lexicon tagger",
    )


def load_tagger(source: TaggerSource) -> Tagger:
    """Load the tagger that `source` names; reads files, never the network."""
    if source.name == "textblob":
        return LexiconTagger()
    from dataset_stats.tagging.perceptron import PerceptronTagger

    weights, tag_dictionary, classes = (json.loads(read_nltk_part(Path(source.folder), part)) for part in NLTK_PARTS)
    return PerceptronTagger(weights, tag_dictionary, classes)


def read_nltk_part(place: Path, part: str) -> bytes:
    """One of the tagger's three JSON files, from its folder or from the zip file as downloaded."""
    member = f"{NLTK_TAGGER}.{part}.json"
    if place.suffix == ".zip":
        with zipfile.ZipFile(place) as archive:
            return archive.read(f"{NLTK_TAGGER}/{member}")
    return (place / member).read_bytes()


def _nltk_source(place: Path) -> TaggerSource:
    digest = hashlib.sha256(b"".join(read_nltk_part(place, part) for part in NLTK_PARTS)).hexdigest()
    return TaggerSource(
        name="nltk",
        folder=str(place),
        identity=f"nltk-{NLTK_TAGGER}@{digest[:16]}",
        title="NLTK averaged perceptron (averaged_perceptron_tagger_eng)",
    )


class LexiconTagger:
    """TextBlob's lexicon tagger; without context rules a word always gets the same tag, so it is asked once per word.

    Captions are case-folded before, so TextBlob's rules about capital letters have no effect.
    """

    def __init__(self) -> None:
        from textblob.en import parser

        self._parser = parser
        with warnings.catch_warnings():
            # TextBlob reads its lexicon at the first word and leaves the file for the garbage collector to close.
            warnings.simplefilter("ignore", ResourceWarning)
            self._parser.find_tags(["a"])
        self.labels: list[str] = []
        self._label_ids: dict[str, int] = {}
        self._tag_of_word: list[int] = []

    def clear(self) -> None:
        """Forget all words."""
        self._tag_of_word.clear()

    def add_words(self, words: Sequence[str]) -> None:
        """Give the next word ids, from 4 on, to `words`."""
        for word, label in self._parser.find_tags(list(words)):
            if label.startswith("NN") and not any(character.isalnum() for character in word):
                label = "SYM"  # the lexicon takes every unknown mark for a noun
            number = self._label_ids.setdefault(label, len(self.labels))
            if number == len(self.labels):
                self.labels.append(label)
            self._tag_of_word.append(number)

    def tag(self, words: np.ndarray, sentence_ends: np.ndarray) -> np.ndarray:
        """Tags of a run of sentences, int16 [num_tokens], indices into `labels`."""
        from dataset_stats.tagging.perceptron import CONTEXT_MARKERS

        return np.array(self._tag_of_word, dtype=np.int16)[words - len(CONTEXT_MARKERS)]
