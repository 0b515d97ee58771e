"""Which scores there are, by the columns they give: so that a name which is only not made yet is answered by a command.

Scores themselves live a floor above, in curation/ and captioning/; a test holds each against what is said here.
"""

from collections.abc import Mapping

from pipelines.as_typed import ANY, typed_command, typed_settings

KNOWN_SCORES: Mapping[str, tuple[str, ...]] = {
    "pixels": (
        *("width", "height", "min_side", "max_side", "aspect", "megapixels", "file_bytes", "format"),
        *("sharpness", "entropy", "brightness", "contrast", "colourfulness", "border_fraction", "letterbox"),
    ),
    "hashes": ("exact_hash", "perceptual_hash", "thumbnail"),
    "clip": ("clip_embedding",),
    "clip_score": ("clip_score", "clip_tokens", "clip_tokens_cut"),
    "duplicates": ("duplicate", "duplicate_of", "duplicate_kind", "duplicate_group"),
    "claims": (
        *("num_claims", "num_unknown", "unsupported_share", "min_support"),
        *("unsupported_sentences", "claim_sentences", "claim_supports"),
    ),
}
# Of scores that `make columns` does not make.
OWN_COMMANDS: Mapping[str, str] = {"claims": "claims"}
# Of scores of captions: the key that names the columns of captions which they are about.
CAPTION_KEYS: Mapping[str, str] = {"clip_score": "columns.caption_columns", "claims": "captioning.claims.of"}


def score_command(score: str, run: object, *, caption: str | None = None) -> str:
    """Return the command that makes a score, as it is typed, and what its recipe needs.

    Args:
        score: its name.
        run: folder.
        caption: the column of captions that it is to be about, of a score of captions.
    """
    of_caption = f"{caption} in {CAPTION_KEYS[score]}" if caption and score in CAPTION_KEYS else ""
    if score in OWN_COMMANDS:
        return f"`{typed_command(OWN_COMMANDS[score], {'run': run})}`{of_caption and f', with {of_caption},'}"
    named = typed_settings({"columns.scores": f'["{ANY}","{score}"]'})
    return (
        f"`{typed_command('columns', {'run': run})}`, with {score} in columns.scores ({named})"
        f"{of_caption and f' and {of_caption}'}"
    )


def score_of_column(name: str) -> str | None:
    """Return the score that gives a column, written bare, as `<score>.<column>` or `<caption column>.<column>`."""
    *parents, column = name.split(".")
    if parents and column in KNOWN_SCORES.get(parents[-1], ()):
        return parents[-1]
    # What is behind a caption column is of that caption.
    scores = CAPTION_KEYS if parents else KNOWN_SCORES
    return next((score for score in scores if column in KNOWN_SCORES[score]), None)
