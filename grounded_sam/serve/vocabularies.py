"""Classes in requests: read like `text` of the command, but never from a file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.serve.problems import RequestError
from grounded_sam.structures.class_files import parse_class_yaml
from grounded_sam.structures.documents import check_depth
from grounded_sam.structures.ontology import FILE_SUFFIXES, parse_inline
from grounded_sam.structures.vocabulary import Vocabulary

#: A key of YAML at the beginning of a line.
_KEY = re.compile(r"^\s*[^\s:][^:]*:(\s|$)", re.MULTILINE)
#: Largest number of classes, phrases and negatives, and letters of one.
MAX_PHRASES, MAX_LETTERS = 1000, 500


def read_vocabulary(
    pipeline: Pipeline, text: Any, negatives: Sequence[str] | None = None, prompt_template: str | None = None
) -> Vocabulary:
    """Return the classes of a request; without `text` those that the server was started with.

    Args:
        pipeline: The models, with the settings of the server.
        text: A string, a list of classes, a mapping from class to phrases, or an ontology.
        negatives: Phrases of look-alikes; None for those of the server.
        prompt_template: Template of each phrase; None for that of the server.

    Raises:
        RequestError: If there are too many words, one is too long, or one is the name of a file (422).
        VocabularyError: If there are no classes, or one comes twice.
        ConfigError: If neither the request nor the server has classes.
    """
    if text is None and negatives is None and prompt_template is None:
        return pipeline.parse_text()
    if text is None:
        raise RequestError(422, "negatives and prompt_template need text: name the classes to look for")
    content = _read_text(text) if isinstance(text, str) else text
    check_depth(content, "text")
    words = [*_words(content), *(negatives or ())]
    if len(words) > MAX_PHRASES:
        raise RequestError(422, f"text has {len(words):,} words, more than the {MAX_PHRASES:,} allowed")
    for word in words:
        if len(word) > MAX_LETTERS:
            raise RequestError(422, f"a phrase has {len(word):,} letters, more than the {MAX_LETTERS} allowed")
        if os.path.splitext(word.strip())[1].lower() in FILE_SUFFIXES:
            raise RequestError(422, f"{word[:80]!r} is the name of a file; send the classes that are in it")
    template = pipeline.prompt_template if prompt_template is None else prompt_template
    vocabulary = Vocabulary.parse(content, list(pipeline.negatives if negatives is None else negatives))
    return vocabulary.with_prompt_template(template)


def _read_text(text: str) -> Any:
    """Return the classes of a string: several lines with a key are the content of a YAML file, all else is a list.

    >>> _read_text("classes:\\n  car: {score: 0.5}")
    {'classes': {'car': {'score': '0.5'}}}
    """
    is_yaml = "\n" in text.strip() and _KEY.search(text) is not None
    return parse_class_yaml(text, "text") if is_yaml else parse_inline(text)


def _words(content: Any) -> Iterator[str]:
    """Yield all texts in nested lists and mappings, keys too."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield str(key)
            yield from _words(value)
    elif isinstance(content, list | tuple):
        for item in content:
            yield from _words(item)
