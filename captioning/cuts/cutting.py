"""One caption cut by rule: the longest run of its first whole sentences that keeps within bounds, at least one."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from pipelines.text.sentences import count_words, keep_spans, sentence_spans

# Raised when the same rule cuts otherwise.
CUT_VERSION = 1
# Why a caption that was cut ends where it does: other sentences followed.
CUT = "cut"
# Of the engines: the model would have gone on, so the last sentence is not whole.
AT_LIMIT = "length"


@dataclass(frozen=True, kw_only=True)
class CutRule:
    """The bounds of a cut; None bounds nothing. `count_tokens` may be None where `max_tokens` is."""

    max_sentences: int | None = None
    max_words: int | None = None
    max_tokens: int | None = None
    count_tokens: Callable[[str], int] | None = None

    def fits(self, text: str, *, num_sentences: int) -> bool:
        """Whether a text keeps within the bounds."""
        if self.max_sentences is not None and num_sentences > self.max_sentences:
            return False
        if self.max_words is not None and count_words(text) > self.max_words:
            return False
        if self.max_tokens is None:
            return True
        assert self.count_tokens is not None, "who bounds tokens can count them"
        return self.count_tokens(text) <= self.max_tokens


@dataclass(frozen=True, kw_only=True)
class CutText:
    """What is left of a caption: its text, of how many sentences, and of how many the caption had."""

    text: str
    num_sentences: int
    num_before: int
    ends_early: bool


def cut_text(text: str, rule: CutRule, *, dropped: Collection[int] = (), is_unfinished: bool = False) -> CutText:
    """Cut a caption.

    Args:
        text: of the caption.
        rule: its bounds.
        dropped: numbers of sentences that are left out first.
        is_unfinished: whether the last sentence is not whole: it stays only where it is the only one.
    """
    spans = sentence_spans(text)
    num_before = len(spans)
    numbers = [number for number in range(num_before) if number not in dropped]
    if is_unfinished and len(numbers) > 1 and numbers[-1] == num_before - 1:
        numbers.pop()
    kept = keep_spans(text, spans, numbers[:1])
    num_kept = len(numbers[:1])
    while num_kept < len(numbers):
        longer = keep_spans(text, spans, numbers[: num_kept + 1])
        if not rule.fits(longer, num_sentences=num_kept + 1):
            break
        kept, num_kept = longer, num_kept + 1
    return CutText(
        text=kept,
        num_sentences=num_kept,
        num_before=num_before,
        ends_early=num_kept > 0 and numbers[num_kept - 1] != num_before - 1,
    )
