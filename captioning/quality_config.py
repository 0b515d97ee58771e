"""The recipe table `[captioning.quality]`."""

import re
from collections.abc import Mapping, Sequence

from pydantic import Field, field_validator

from captioning.phrases import PHRASES
from pipelines.as_typed import did_you_mean
from pipelines.recipe import TableConfig

OFF_FRAME_PHRASES = (
    "out of frame",
    "outside the frame",
    "outside of the frame",
    "beyond the frame",
    "off-camera",
    "off camera",
    "not visible in the image",
    "not shown in the image",
    "cannot be seen in the image",
)


class QualityConfig(TableConfig):
    """`[captioning.quality]`: what is flagged. Changing it rewrites flags and never captions an image again."""

    ngram_words: int = Field(
        default=4,
        ge=1,
        le=20,
        description="Length of the n-grams counted for loops, in words; in scripts without spaces, in letters",
    )
    max_repeated_ngram_ratio: float = Field(
        default=0.3, ge=0, le=1, description="Captions with a larger share of repeated n-grams get the flag `loop`"
    )
    max_same_sentence: int = Field(
        default=2, ge=1, description="Captions that say a sentence, line or list item more often get `loop`"
    )
    max_characters_on_end: int = Field(
        default=12, ge=2, description="Captions with up to 8 characters said more often on end, `ha ha ha`, get `loop`"
    )
    max_other_script: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Captions with a larger share of letters of scripts that the prompt has none of get `other_script`",
    )
    min_alt_text_overlap: float = Field(
        default=0.0, ge=0, le=1, description="Captions with a smaller share of the alt text's words get `off_alt_text`"
    )
    off_frame_phrases: Sequence[str] = Field(
        default=OFF_FRAME_PHRASES, description="Phrases about what is not in the picture, case-folded: `off_frame`"
    )
    phrases: dict[str, dict[str, Sequence[str]]] = Field(
        default={},
        description="By flag and language, regular expressions that replace those of captioning/phrases.py; of other "
        "names they are added: refusal.en = [], refusal.mine = ['i cannot']",
    )
    strip_boilerplate: bool = Field(
        default=False,
        description="Whether `caption` loses an opening like 'The image features', which `caption_raw` keeps",
    )

    @field_validator("phrases")
    @classmethod
    def _check_phrases(cls, phrases: dict[str, dict[str, Sequence[str]]]) -> dict[str, dict[str, Sequence[str]]]:
        for flag, lists in phrases.items():
            if flag not in PHRASES:
                near = did_you_mean(flag, PHRASES)
                raise ValueError(f"{flag!r} is no flag of phrases{near}: those are {', '.join(PHRASES)}")
            for language, patterns in lists.items():
                for pattern in patterns:
                    _check_pattern(pattern, name=f"{flag}.{language}")
        return phrases

    def phrases_of(self, flag: str) -> tuple[str, ...]:
        """Return the regular expressions of a flag, those of the recipe in the place of those that are built in."""
        lists: Mapping[str, Sequence[str]] = {**PHRASES[flag], **self.phrases.get(flag, {})}
        return tuple(pattern for patterns in lists.values() for pattern in patterns)


def _check_pattern(pattern: str, *, name: str) -> None:
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from None
    if found.match(""):
        raise ValueError(f"{name}: {pattern!r} is found in every caption, as it fits nothing at all")
    if re.sub(r"\\.", "", pattern) != re.sub(r"\\.", "", pattern).lower():
        raise ValueError(f"{name}: {pattern!r} has capitals: captions are compared in small letters")
    if found.groups:
        raise ValueError(f"{name}: {pattern!r} keeps groups: write (?:…) for (…)")
