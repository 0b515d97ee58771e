"""Singular forms of English nouns: a few rules for plurals, each of which TextBlob's lexicon must confirm."""

from __future__ import annotations

import warnings

# Plurals that no rule below finds, or that a rule would get wrong.
IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "geese": "goose", "mice": "mouse", "oxen": "ox", "lice": "louse", "leaves": "leaf", "loaves": "loaf",
    "cacti": "cactus", "fungi": "fungus", "criteria": "criterion", "phenomena": "phenomenon", "analyses": "analysis",
    "crises": "crisis", "oases": "oasis",
}  # fmt: skip
# They end like plurals of another word and are none.
UNCHANGED = frozenset(
    ["clothes", "glasses", "goods", "jeans", "means", "pants", "scissors", "series", "shorts", "species", "works"]
)
# What the lexicon may call a word for it to be a plural: a plural noun, a verb that looks like one, or nothing.
PLURAL_TAGS = frozenset([None, "NNS", "NNPS", "VBZ"])
MIN_CHARACTERS = 4  # shorter words ("gas", "his", "us") are hardly ever plurals


class PluralFolder:
    """Folds "dogs" into "dog"; a word that the lexicon does not confirm stays what it is.

    A noun is folded when the lexicon (the one that comes with TextBlob) does not call it a singular and has, as a
    singular noun, what is left without its ending: -s, -es, -ies for -y, -ves for -f or -fe. Where the lexicon itself
    says "plural noun", any word of it will do, and a plain -s needs none. So "glass", "lens" and "christmas" stay, and
    so do plurals that the lexicon has never heard of ("selfies").
    """

    def __init__(self) -> None:
        from textblob.en import lexicon

        with warnings.catch_warnings():
            # TextBlob leaves the file for the garbage collector to close.
            warnings.simplefilter("ignore", ResourceWarning)
            lexicon.load()
        self._tags: dict[str, str] = dict(dict.items(lexicon))

    def __call__(self, noun: str) -> str:
        """The singular of a case-folded noun."""
        if noun in IRREGULAR:
            return IRREGULAR[noun]
        if not noun.endswith("s") or len(noun) < MIN_CHARACTERS or noun in UNCHANGED:
            return noun
        tag = self._tags.get(noun)
        if tag not in PLURAL_TAGS:
            return noun
        forms = _candidates(noun)
        singular = next((form for form in forms if self._tags.get(form) == "NN"), None)
        if singular is None and tag == "NNS" and not noun.endswith("ics"):
            singular = next((form for form in forms if form in self._tags), None if noun.endswith("es") else noun[:-1])
        return singular or noun


def _candidates(noun: str) -> list[str]:
    forms = [noun[:-1]]  # before the others: "cookies" are of "cookie", "horses" of "horse"
    if noun.endswith("ies"):
        forms.append(noun[:-3] + "y")
    if noun.endswith("ves"):
        forms += [noun[:-3] + "f", noun[:-3] + "fe"]
    if noun.endswith("es"):
        forms.append(noun[:-2])
    return forms
