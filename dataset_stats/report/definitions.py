"""What every number of the report means, for people who have not read the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dataset_stats.measures import SetMeasures


@dataclass(frozen=True)
class Definition:
    """A number's short name, its meaning and its formula, for people who have not read the paper."""

    name: str
    meaning: str
    formula: str


def definitions(
    measures: Mapping[str, SetMeasures], *, valid_threshold: int, limits: Sequence[int], boilerplate: Sequence[str]
) -> list[Definition]:
    """What every number means, with the thresholds that are in force."""
    items = [*_of_nouns(valid_threshold), *_of_captions(limits, boilerplate)]
    if any(measure.folded_distinct_nouns is not None for measure in measures.values()):
        folded = Definition(
            "Plurals folded",
            'DN and VN once more, with plurals counted as their singulars ("dogs" as "dog"), where TextBlob\'s lexicon '
            "confirms the pair. The paper does not fold; the numbers above do not either.",
            "DN and VN of the column `singular` of nouns.parquet",
        )
        items.insert(5, folded)
    if any(measure.estimate for measure in measures.values()):
        items.insert(
            0,
            Definition(
                "±",
                "Standard error of a sample drawn without replacement. Means and shares estimate the whole set. DN, VN "
                "and VN/DN are those of a sample of this size, not of the whole set; ± is their spread over samples.",
                "closed forms with 1 - n/N; DN, VN, VN/DN from random halves and quarters of the sample",
            ),
        )
    return items


def _of_nouns(valid_threshold: int) -> list[Definition]:
    return [
        Definition("Captions", "Samples with a text that was counted.", "samples read - samples rejected"),
        Definition(
            "Noun",
            "A token the tagger gives a tag of the NN family (NN, NNS, NNP, NNPS). Captions are case-folded first, so "
            '"Dog" and "dog" are one noun and re-casing a caption changes nothing. Singular and plural are two nouns.',
            "tag starts with NN",
        ),
        Definition("DN", "Distinct nouns: how many different nouns occur.", "number of different nouns"),
        Definition(
            "VN",
            f"Valid distinct nouns: distinct nouns that occur more than {valid_threshold} times.",
            f"number of nouns with occurrences > {valid_threshold}",
        ),
        Definition(
            "VN/DN",
            "Share of the vocabulary that is seen often enough to be learned. It falls as a set grows.",
            "VN / DN",
        ),
        Definition("Total nouns", "All occurrences of all nouns.", "sum of occurrences"),
        Definition("Nouns per image", "How much a caption says; s.d. is over captions.", "total nouns / captions"),
    ]


def _of_captions(limits: Sequence[int], boilerplate: Sequence[str]) -> list[Definition]:
    shown = ", ".join(f'"{opening}"' for opening in boilerplate)
    lost = " and ".join(str(limit) for limit in limits)
    return [
        Definition(
            "Words",
            "Length of a caption in words as NLTK cuts them; punctuation marks count as words.",
            "NLTK tokens / captions",
        ),
        Definition(
            "Characters",
            "Length in code points, spaces within it included; white space around it is left out.",
            "code points / captions",
        ),
        Definition(
            "T5 tokens",
            "Length in tokens of the text encoder's tokenizer, the end token included.",
            "T5 tokens / captions",
        ),
        Definition(
            "Quantiles",
            "The 25% quantile is the length below which a quarter of the captions lie, the median that of half "
            "of them; s.d. is over captions. All captions are counted, none is rounded.",
            "interpolated between captions, as pandas does",
        ),
        Definition(
            "Duplicates",
            "Captions whose text occurred before in the set: to the letter, and once more with case folded and white "
            "space as single spaces. The most frequent ones are listed by the second rule.",
            "captions - distinct texts",
        ),
        Definition(
            "Languages",
            "The script that most letters are of names the language, or itself where it is that of several. In Latin "
            "script the most common words of 17 languages decide, and plain nouns and adjectives for English; with "
            "fewer than two words' worth of them, or as many for two languages, it is undecided.",
            "such captions / captions",
        ),
        Definition(
            "Boilerplate",
            f"Captions that open with an empty phrase: {shown}. Measured for all sets alike, so captioning's own flag "
            "of this name is not shown beside it.",
            "such captions / captions",
        ),
        Definition(
            "Over the limit",
            f"Captions with more T5 tokens than the model reads ({lost}); the end token counts.",
            "captions with T5 tokens > limit / captions",
        ),
        Definition(
            "Nouns lost",
            "Nouns the text encoder never sees because the caption is cut at the limit; the share is of all nouns.",
            "nouns of the caption - nouns of its part within the limit, summed",
        ),
        Definition(
            "Words unknown to it",
            "Captions with unknown or control tokens, which say nothing to the text encoder. Nothing else: no letter "
            "or digit is left beside them.",
            "such captions / captions",
        ),
        Definition(
            "Flags",
            "What captioning noticed about its own captions (loops, cut-off answers, ...), by its thresholds; alt "
            "texts have none.",
            "captions with the flag / captions",
        ),
        Definition(
            "Rejected",
            "Samples without a usable text, by reason; they are in no other number.",
            "such samples / samples read",
        ),
    ]
