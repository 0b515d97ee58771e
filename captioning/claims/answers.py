"""From the likelihoods of a first token to how far a claim is supported: yes against no, whatever their spelling."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

# What tokenizers put in front of a word.
BLANKS = " \t\r\n▁Ġ"
# The last digits of a likelihood depend on what it was computed beside.
NUM_DECIMALS = 4


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The words of yes and of no, and how likely one of them must be."""

    yes: tuple[str, ...]
    no: tuple[str, ...]
    min_probability: float

    def is_yes(self, token: str) -> bool | None:
        """Whether a first token begins a word of yes; None where it begins none, or one of either.

        "Yes", " yes" and "YES" are alike, and so is the "Y" of a vocabulary that has no more of the word.
        """
        said = token.strip(BLANKS).casefold()
        is_yes, is_no = (any(word.casefold().startswith(said) for word in words) for words in (self.yes, self.no))
        return is_yes if said and is_yes != is_no else None

    def support(self, *, yes: float, no: float) -> float | None:
        """Return the share of yes, of probabilities of yes and no, rounded; None where the answer is neither."""
        if not math.isfinite(yes + no) or yes + no < self.min_probability:
            return None
        return round(yes / (yes + no), NUM_DECIMALS)

    def support_of(self, tokens: Iterable[tuple[str, float]]) -> float | None:
        """Return the support that first tokens with their log-probabilities give; of a few likeliest, those count."""
        sums = {True: 0.0, False: 0.0}
        for token, log_probability in tokens:
            if (side := self.is_yes(token)) is not None:
                sums[side] += math.exp(log_probability)
        return self.support(yes=sums[True], no=sums[False])
