"""What the model is asked about an image: the recipe's prompt for its shard, with the alt text filled in."""

import fnmatch
from collections.abc import Mapping

WITH_TEXT, DEFAULT = "img2dataset", "default"


def template_for(shard: str, prompts: Mapping[str, str]) -> str:
    """Return the prompt template of a shard's images: by a pattern that fits its name, else that with the alt text.

    Of several patterns that fit, the longest one counts, and of equally long ones the first in the alphabet: the order
    of `prompts` is in no fingerprint.
    """
    fitting = [name for name in prompts if name not in (DEFAULT, WITH_TEXT) and fnmatch.fnmatchcase(shard, name)]
    return prompts[min(fitting, key=lambda name: (-len(name), name), default=WITH_TEXT)]


def fill_prompt(template: str, alt_text: str | None, *, default: str, max_alt_text_chars: int) -> str:
    """Return the prompt of one image; `default` where the template wants an alt text and the image has none.

    White space inside the alt text becomes single spaces and its length is bounded, so that no page of text that
    somebody put into an `alt` attribute crowds out the question.
    """
    if "{alt_text}" not in template:
        return template
    words = " ".join((alt_text or "").split())[:max_alt_text_chars].strip()
    return template.replace("{alt_text}", words) if words else default
