"""Templates of the pages that people open: HTML by jinja."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2


def page_template(path: Path, filters: Mapping[str, Callable[..., Any]]) -> jinja2.Template:
    """Return a template with its filters; a name that it is not given is an error, and text no markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(path.name)
