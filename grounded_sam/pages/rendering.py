"""Make HTML from templates, which escape what is put into them."""

from __future__ import annotations

from functools import cache
from typing import Any


def make_environment(*folders: tuple[str, str]) -> Any:
    """Return a Jinja environment that escapes all values and refuses those that are missing.

    Args:
        folders: Package and folder of more templates, which may extend `base.html`.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    places = (*folders, ("grounded_sam.pages", "templates"))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, folder) for package, folder in places]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["thousands"] = "{:,}".format
    return environment


@cache
def _environment() -> Any:
    return make_environment()


def render_html(template: str, **values: Any) -> str:
    """Return a page that is opened from disk: one file, with its styles inside.

    Args:
        template: Name of a template of this folder.
        values: What it shows.

    >>> page = render_html("sweep.html", plot="data:,", columns=["job"], rows=[["<0>"]], notes=[])
    >>> "&lt;0&gt;" in page, "<0>" in page
    (True, False)
    """
    return str(_environment().get_template(template).render(values))
