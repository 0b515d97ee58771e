"""Which language a caption is in, from its letters and its most common words: cheap, offline, the same everywhere.

Letters decide where a script belongs to one language (kana, Hangul, Thai, ...), and name the script where it does not.
In Latin script the words decide that every sentence of a language is full of ("the", "der", "les"), by a table below,
and for English, in which alt texts are often bare names of things, the nouns and adjectives of TextBlob's lexicon too.
What has too few of them is `UNDECIDED`: of two or three words, models for language identification name languages at
random, and take a hundred times longer.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numba import njit

from dataset_stats.tagging.chunk_kernels import Tokens

ENGLISH, UNDECIDED, NO_LETTERS = "English", "Latin script, undecided", "no letters"
# The most common words of each language, case-folded, most common first. In groups of ten they weigh 3, 2 and
# 1, and twice as much where they are of one language alone.
COMMON_WORDS = {
    ENGLISH: "the of and a to in is with on for that at by an are as it from this be there which has his their its "
    "was were or not 's n't two you your we my she he they while these into through her one all some can",
    "German": "der die und das in den ein eine mit von ist auf im des dem zu für nicht einer einem einen sich als auch "
    "an es aus bei nach wie oder am zum zur sind hat über vor unter dieser wird eines zwei",
    "French": "de la le et les des un une à du en dans est avec sur pour qui au par il elle ce cette sont plus ne pas "
    "aux ou se son sa ses sous entre d'un d'une deux devant derrière près vers chez",
    "Spanish": "de la el y en a los un una con las que del para por se es al lo su sobre como más está muy este esta "
    "son entre hay sin o dos sus pero también desde cerca",
    "Portuguese": "de a o e do da em um uma com que no na os para se dos por as é ao das mais como sobre foi está são "
    "não à sua seu ou nas nos pelo pela entre também dois duas",
    "Italian": "di e il la a un una che in del con per i le da della dei gli si è sono su al nel alla lo delle come "
    "anche più sulla sul nella dal questo questa ha non ad o due vicino",
    "Dutch": "de het een en van in is op met voor te die dat zijn aan door bij naar uit er om als ook niet over onder "
    "tot wordt deze dit of heeft worden twee",
    "Swedish": "och i att en på är av det som ett med för den till de har från inte under vid om sin sitt mot två över "
    "där detta eller",
    "Danish or Norwegian": "og i at en på er af det som et med til for den de har fra ikke av der om sig under ved sin "
    "mot to over eller dette",
    "Polish": "i w na z do nie jest się o to od za przez dla po jak ze oraz są przy który która które jego pod nad "
    "między dwa lub",
    "Czech": "a v na je se s z do o ve pro že za od po jako které který jsou před při nebo ze u také jeho pod nad mezi "
    "dva",
    "Romanian": "de și în a la cu pe o un din pentru care este sau cel mai sunt prin fi lui al ale unei unui două "
    "peste",
    "Hungarian": "a az és egy hogy nem is van ez meg mint de volt vagy csak egyik két alatt fölött között ami aki",
    "Finnish": "ja on ei että se hän oli joka mutta myös kun tai kuin ovat tämä jossa kanssa niin sen kaksi",
    "Turkish": "ve bir bu da de için ile olarak olan çok daha gibi en o ne kadar sonra üzerinde var iki arasında",
    "Indonesian or Malay": "dan yang di dengan untuk dari ini pada adalah dalam itu tidak oleh ke sebuah atau juga "
    "akan karena dua seperti",
    "Vietnamese": "và của một là có trong cho với các được những không người này trên từ đã khi ở để",
}
LANGUAGES = tuple(COMMON_WORDS)
LEXICON_TAGS = frozenset(["NN", "NNS", "JJ"])
MIN_SCORE = 2  # of the best language; a single noun of the lexicon weighs 1
# First and last code point of the blocks that a script's letters lie in (The Unicode Standard, Blocks.txt), and what
# a caption is said to be in that has most of its letters there; han without kana is Chinese.
LATIN, HAN, KANA, HANGUL = "Latin", "Chinese", "Japanese", "Korean"
BLOCKS: dict[str, tuple[tuple[int, int], ...]] = {
    LATIN: ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A)),
    HAN: ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
    KANA: ((0x3041, 0x30FA), (0x30FC, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9D)),
    HANGUL: ((0x1100, 0x11FF), (0x3131, 0x318E), (0xA960, 0xA97F), (0xAC00, 0xD7FF)),
    "Cyrillic script": ((0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "Greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "Armenian": ((0x530, 0x58F),),
    "Hebrew script": ((0x5D0, 0x5EA), (0xFB1D, 0xFB4F)),
    "Arabic script": ((0x620, 0x64A), (0x66E, 0x6D3), (0x6FA, 0x6FF), (0x750, 0x77F), (0xFB50, 0xFDFF),
                      (0xFE70, 0xFEFE)),
    "Devanagari script": ((0x904, 0x965), (0x970, 0x97F)),
    "Bengali script": ((0x980, 0x9E5), (0x9F0, 0x9FF)),
    "Gurmukhi script": ((0xA00, 0xA65), (0xA70, 0xA7F)),
    "Gujarati": ((0xA80, 0xAE5),),
    "Tamil": ((0xB80, 0xBE5),),
    "Telugu": ((0xC00, 0xC65),),
    "Kannada": ((0xC80, 0xCE5),),
    "Malayalam": ((0xD00, 0xD65),),
    "Sinhala": ((0xD80, 0xDE5),),
    "Thai": ((0xE01, 0xE3A), (0xE40, 0xE4E)),
    "Lao": ((0xE80, 0xECF),),
    "Tibetan script": ((0xF00, 0xF1F), (0xF34, 0xFFF)),
    "Burmese": ((0x1000, 0x103F), (0x1050, 0x108F)),
    "Georgian": ((0x10A0, 0x10FF), (0x1C90, 0x1CBF)),
    "Ethiopic script": ((0x1200, 0x137F),),
    "Khmer": ((0x1780, 0x17DF),),
}  # fmt: skip
NOT_LETTERS = (0xD7, 0xF7)  # the signs of multiplication and division
SCRIPTS = (NO_LETTERS, *BLOCKS)
NUM_CODE_POINTS = 0x110000


class LanguageTable:
    """What words and letters say of languages; words are looked up once each, when a vocabulary learns them."""

    def __init__(self) -> None:
        weights = [dict.fromkeys(LANGUAGES, 0), {**dict.fromkeys(LANGUAGES, 0), ENGLISH: 1}]
        self._rows = dict.fromkeys(_lexicon_words(), 1)
        for language, words in COMMON_WORDS.items():
            for rank, word in enumerate(words.split()):
                if self._rows.get(word, 1) == 1:
                    self._rows[word] = len(weights)
                    weights.append(dict.fromkeys(LANGUAGES, 0))
                weights[self._rows[word]][language] = max(3 - rank // 10, 1)
        for row in weights[2:]:
            if len(found := [language for language, weight in row.items() if weight]) == 1:
                row[found[0]] *= 2
        self.weights = np.array([[row[language] for language in LANGUAGES] for row in weights], dtype=np.int32)
        self._script_of = np.zeros(NUM_CODE_POINTS, dtype=np.uint8)
        for number, blocks in enumerate(BLOCKS.values(), start=1):
            for first, last in blocks:
                self._script_of[first : last + 1] = number
        self._script_of[list(NOT_LETTERS)] = 0

    def rows_of(self, words: Sequence[str]) -> np.ndarray:
        """Row of `weights` of each case-folded word, int16 [num_words]; 0 of a word that says nothing."""
        return np.array([self._rows.get(word, 0) for word in words], dtype=np.int16)

    def languages(self, texts: Sequence[str], scores: np.ndarray) -> list[str]:
        """Name the language or script of each text.

        Args:
            texts: captions.
            scores: int32 [num_texts, num_languages], of `score_languages`.
        """
        best = scores.argmax(axis=1)
        ordered = np.sort(scores, axis=1)
        is_told = (ordered[:, -1] >= MIN_SCORE) & (ordered[:, -1] > ordered[:, -2])
        latin = [LANGUAGES[number] if told else UNDECIDED for number, told in zip(best, is_told, strict=True)]
        return [
            language if script == LATIN else script
            for language, script in zip(latin, self._scripts(texts), strict=True)
        ]

    def _scripts(self, texts: Sequence[str]) -> list[str]:
        scripts = [LATIN if any(map(str.isalpha, text)) else NO_LETTERS for text in texts]
        others = [index for index, text in enumerate(texts) if not text.isascii()]
        if not others:
            return scripts
        lengths = [len(texts[index]) for index in others]
        codes = np.frombuffer("".join(texts[index] for index in others).encode("utf-32-le"), dtype=np.uint32)
        owners = np.repeat(np.arange(len(others)), lengths)
        counts = np.bincount(owners * len(SCRIPTS) + self._script_of[codes], minlength=len(others) * len(SCRIPTS))
        counts = counts.reshape(len(others), len(SCRIPTS))
        kana, han = SCRIPTS.index(KANA), SCRIPTS.index(HAN)
        # Japanese is written in both.
        counts[:, kana] += np.where(counts[:, kana] > 0, counts[:, han], 0)
        counts[:, han] = np.where(counts[:, kana] > 0, 0, counts[:, han])
        counts[:, 0] = 0  # all of them zero: no letters
        for index, script in zip(others, counts.argmax(axis=1), strict=True):
            scripts[index] = SCRIPTS[script]
        return scripts


@njit(cache=True, nogil=True)
def score_languages(tokens: Tokens, rows: np.ndarray, weights: np.ndarray, scores: np.ndarray) -> None:
    """Add to `scores` int32 [num_captions, num_languages] what the captions' words weigh, `rows` by word."""
    begin = 0
    for sentence in range(len(tokens.sentence_ends)):
        end = tokens.sentence_ends[sentence]
        caption = tokens.sentence_captions[sentence]
        for i in range(begin, end):
            row = rows[tokens.words[i]]
            if row:
                for language in range(weights.shape[1]):
                    scores[caption, language] += weights[row, language]
        begin = end


def _lexicon_words() -> list[str]:
    from textblob.en import lexicon

    with warnings.catch_warnings():
        # TextBlob leaves the file for the garbage collector to close.
        warnings.simplefilter("ignore", ResourceWarning)
        lexicon.load()
    return [word for word, tag in dict.items(lexicon) if tag in LEXICON_TAGS and word.isalpha() and word.islower()]
