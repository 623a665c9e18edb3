"""Keep secrets in URLs out of what is written: environment variables hold them instead."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from grounded_sam.errors import URL, split_url

#: Environment variables that hold secrets, with a number. Processes that this one starts inherit them.
VARIABLE = "GROUNDED_SAM_SECRET_"
#: A URL in an override without quotes, where a backslash escapes and a comma separates.
_UNQUOTED_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<rest>(?:\\.|[^\s\\,'\"\[\]{}()])+)")


def hide_secrets(value: Any) -> Any:
    """Replace user names, passwords and queries in all URLs of a config by interpolations of environment variables.

    Args:
        value: A text, or nested dicts and lists of texts and other values.

    >>> hide_secrets({"input": "rtsp://admin:1234@camera/live"})
    {'input': 'rtsp://${oc.env:GROUNDED_SAM_SECRET_1}@camera/live'}
    """
    if isinstance(value, dict):
        return {key: hide_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_secrets(item) for item in value]
    return URL.sub(_hide, value) if isinstance(value, str) else value


def hide_in_overrides(words: Sequence[str]) -> list[str]:
    """Replace the secrets in the arguments of a command, before they are parsed; see `hide_secrets`.

    >>> hide_in_overrides(["input=rtsp://admin:1234@camera/live", "--multirun"])
    ['input=rtsp://${oc.env:GROUNDED_SAM_SECRET_1}@camera/live', '--multirun']
    """
    hidden = []
    for word in words:
        key, equals, value = word.partition("=")
        if value[:1] in ("'", '"') and value[-1:] == value[:1]:
            value = value[0] + hide_secrets(value[1:-1]) + value[0]
        else:
            value = _UNQUOTED_URL.sub(partial(_hide, escaped=True), value)
        hidden.append(key + equals + value)
    return hidden


def _hide(url: re.Match[str], escaped: bool = False) -> str:
    """Hide the secrets of a URL, whose special characters may be escaped."""
    user, public, query = split_url(url["rest"])
    sign, query = query[:1], query[1:]
    if escaped:
        user, query = (re.sub(r"\\(.)", r"\1", secret) for secret in (user, query))
    user = f"{_interpolation(user)}@" if user else ""
    return url["scheme"] + user + public + sign + (_interpolation(query) if query else "")


def _interpolation(secret: str) -> str:
    """Put a secret into an environment variable, unless one holds it, and return the interpolation of that."""
    if "${" in secret:  # hidden already, or by the user
        return secret
    number = 1
    while os.environ.setdefault(f"{VARIABLE}{number}", secret) != secret:
        number += 1
    return f"${{oc.env:{VARIABLE}{number}}}"
