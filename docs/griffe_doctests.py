"""Show the doctests of docstrings as code on the API pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

BLOCK = re.compile(r"^( *)>>> .*(?:\n\1\S.*)*", re.M)


class Doctests(griffe.Extension):
    """Put doctests into fenced code blocks."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = BLOCK.sub(_fenced, obj.docstring.value)


def _fenced(match: re.Match[str]) -> str:
    indent = match[1]
    code = re.sub(r" *# doctest: \+\w+$", "", match[0], flags=re.M)
    return f"{indent}```pycon\n{code}\n{indent}```"
