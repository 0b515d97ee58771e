"""What an answer says, from the likelihoods of its first token or from its text: yes, no, or a number, in any spelling.

Numbers are the words of zero to ten and their digits; a vocabulary that writes ten as two digits says one first.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# What tokenizers put in front of a word.
BLANKS = " \t\r\n▁Ġ"
# The last digits of a likelihood depend on what it was computed beside.
NUM_DECIMALS = 4
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The answers that a question may have, each with the words that say it, in whatever case."""

    words: Mapping[str, tuple[str, ...]]

    def begun_by(self, token: str) -> str | None:
        """Return the choice that a first token says or begins; None where it begins none, or one of several.

        "Yes", " yes" and "YES" are alike, and so is the "Y" of a vocabulary that has no more of the word.
        """
        said = token.strip(BLANKS).casefold()
        if not said:
            return None
        begun = [choice for choice, words in self.words.items() if any(_fold(w).startswith(said) for w in words)]
        whole = [choice for choice in begun if said in map(_fold, self.words[choice])]
        found = whole or begun
        return found[0] if len(found) == 1 else None

    def likelihoods(self, tokens: Iterable[tuple[str, float]]) -> dict[str, float]:
        """Return how likely each choice is, of first tokens with their log-probabilities; left-out ones count as 0."""
        sums = dict.fromkeys(self.words, 0.0)
        for token, log_probability in tokens:
            if (choice := self.begun_by(token)) is not None:
                sums[choice] += math.exp(log_probability)
        return sums

    def said_in(self, text: str) -> str | None:
        """Return the choice that a text begins with, or else the only one that it has; None where there is none."""
        words = re.findall(r"[^\W_]+", text.casefold())
        said = [choice for word in words for choice, known in self.words.items() if word in map(_fold, known)]
        if said and words[0] in map(_fold, self.words[said[0]]):
            return said[0]
        return said[0] if len(set(said)) == 1 else None


def _fold(word: str) -> str:
    return word.casefold()


NUMBER_CHOICES = Choices(
    words={word: (word, str(number)) + (("none", "no") if number == 0 else ()) for number, word in enumerate(NUMBERS)}
)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The words of yes and of no, and how likely one of them must be."""

    yes: tuple[str, ...]
    no: tuple[str, ...]
    min_probability: float

    @property
    def choices(self) -> Choices:
        """Yes and no as choices of those names."""
        return Choices(words={"yes": self.yes, "no": self.no})

    def is_yes(self, token: str) -> bool | None:
        """Whether a first token begins a word of yes; None where it begins none, or one of either."""
        choice = self.choices.begun_by(token)
        return None if choice is None else choice == "yes"

    def support(self, *, yes: float, no: float) -> float | None:
        """Return the share of yes, of probabilities of yes and no, rounded; None where the answer is neither."""
        if not math.isfinite(yes + no) or yes + no < self.min_probability:
            return None
        return round(yes / (yes + no), NUM_DECIMALS)

    def support_of(self, tokens: Iterable[tuple[str, float]]) -> float | None:
        """Return the support that first tokens with their log-probabilities give; of a few likeliest, those count."""
        sums = self.choices.likelihoods(tokens)
        return self.support(yes=sums["yes"], no=sums["no"])
