"""The pages' templates, and how they write figures: filters."""

import re
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from pipelines.page_templates import page_template


def percent(fraction: float) -> str:
    """Return a share in percent, with one decimal."""
    return f"{100 * fraction:.1f}%"


def number(value: float) -> str:
    """Return a number with commas, and two decimals where it is no whole one."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def reason(text: str) -> str:
    """Return why samples were rejected, in words; `caption:loop` is a reject of captioning that features repeat."""
    room, _, reason = text.rpartition(":")
    words = reason.replace("_", " ")
    return f"{words} (not captioned)" if room == "caption" else words


def duration(seconds: float) -> str:
    """Return a time in minutes and seconds."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def with_code(text: str) -> Markup:
    """Return a text with what stands between backticks as code."""
    # Of a plain string, as Markup would escape what is put into it.
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


FILTERS = {"percent": percent, "duration": duration, "number": number, "reason": reason, "with_code": with_code}


def toy_template(name: str) -> jinja2.Template:
    """Return a template of `toyworld/templates`, with these filters."""
    return page_template(Path(__file__).parent / "templates" / name, FILTERS)
