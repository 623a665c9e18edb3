"""Text for colored shapes: phrases, what they match, and a small tokenizer for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from grounded_sam.shapes.scenes import COLORS, EXTRA_COLORS, EXTRA_SHAPES, PAIRS, SHAPES, Pair

if TYPE_CHECKING:
    from transformers import BertTokenizerFast

NOUNS = (*SHAPES, "shape", "object")
ARTICLES = ("a", "an", "the")
#: Words for things that no scene contains; a model must detect nothing for them.
DISTRACTORS = ("car", "dog", "person", "wheel", "cup", "tree", "house", "cat", "bird", "chair", "grey")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Phrase:
    """A phrase to prompt a detector with.

    Attributes:
        color: Color that it names; None for any, `"?"` for one that matches nothing.
        shape: Shape that it names; None for any, `"?"` for one that matches nothing.
        text: Its text, such as `the red circles`.

    >>> Phrase("red", None, "red shapes").matches(("red", "star"))
    True
    """

    color: str | None
    shape: str | None
    text: str

    def matches(self, pair: Pair) -> bool:
        """Return whether the phrase refers to objects of a color and shape."""
        color, shape = pair
        return self.color in (None, color) and self.shape in (None, shape)


def pluralize(noun: str) -> str:
    """Return the plural of a noun.

    >>> pluralize("star"), pluralize("cross")
    ('stars', 'crosses')
    """
    return noun + ("es" if noun.endswith("s") else "s")


def sample_text(rng: np.random.Generator, color: str | None, shape: str | None) -> str:
    """Sample a way to write a phrase: plain, plural, or with an article.

    Args:
        rng: Source of randomness.
        color: Color to name, if any.
        shape: Shape to name; None for `shape` or `object`.

    >>> sample_text(np.random.default_rng(0), "orange", "star")
    'orange stars'
    """
    noun = shape or str(rng.choice(["shape", "object"]))
    form = rng.choice(["", "plural", "article"], p=[0.6, 0.25, 0.15])
    words = [word for word in (color, pluralize(noun) if form == "plural" else noun) if word]
    if form == "article":
        starts_with_vowel = words[0][0] in "aeiou"
        words.insert(0, str(rng.choice(["an" if starts_with_vowel else "a", "the"])))
    return " ".join(words)


def sample_phrases(
    rng: np.random.Generator, present: Sequence[Pair], pairs: Sequence[Pair] = PAIRS, maximum: int = 20
) -> list[Phrase]:
    """Sample the phrases to prompt with for a scene.

    Most prompts consist of phrases that exclude each other (pairs, or shapes, or colors); some mix these, and some
    contain distractors. Prompts of pairs name some of the present ones, look-alikes that share a color or a shape with
    these, and others.

    Args:
        rng: Source of randomness.
        present: Color and shape of the objects in the scene.
        pairs: Color and shape pairs that phrases may name.
        maximum: Largest number of phrases.

    Returns:
        From 1 to `maximum` phrases.

    >>> [phrase.text for phrase in sample_phrases(np.random.default_rng(3), [("red", "star")], maximum=2)]
    ['blue star']
    """
    # Log-uniform: with few phrases beside it, "blue cross" was found on blue stars until short prompts were frequent.
    count = int(np.exp(rng.uniform(0, np.log(maximum + 1))))
    kind = rng.choice(["pairs", "shapes", "colors", "mixed"], p=[0.66, 0.14, 0.11, 0.09])
    shapes = [(None, shape) for shape in dict.fromkeys(shape for _, shape in pairs)]
    colors = [(color, None) for color in dict.fromkeys(color for color, _ in pairs)]
    pool: list[tuple[str | None, str | None]]
    if kind == "pairs":
        pool = list(_sample_pairs(rng, present, pairs, count))
    elif kind == "mixed":
        pool = [*shapes, *colors, *pairs]
    else:
        pool = list(shapes if kind == "shapes" else colors)
    order = rng.permutation(len(pool))[:count]
    phrases = []
    for color, shape in (pool[i] for i in order):
        phrases.append(Phrase(color, shape, sample_text(rng, color, shape)))
    if rng.random() < 0.12:
        for _ in range(int(rng.integers(1, 3))):
            text = str(rng.choice(DISTRACTORS))
            if rng.random() < 0.3:
                text = "".join(rng.choice(list(_LETTERS), int(rng.integers(3, 9))))
            phrases[int(rng.integers(len(phrases)))] = Phrase("?", "?", text)
    return phrases


def _sample_pairs(rng: np.random.Generator, present: Sequence[Pair], pairs: Sequence[Pair], count: int) -> list[Pair]:
    """Sample `count` pairs: a random number of present ones and of look-alikes, then other absent ones."""
    visible = sorted(set(present))
    named = [visible[i] for i in rng.permutation(len(visible))[: int(rng.integers(0, len(visible) + 1))]][:count]
    absent = [pair for pair in pairs if pair not in visible]
    shared = {attribute for pair in visible for attribute in pair}
    alike = [pair for pair in dict.fromkeys(absent) if shared & set(pair)]
    num_alike = int(rng.integers(0, count - len(named) + 1))
    chosen = dict.fromkeys([*named, *(alike[i] for i in rng.permutation(len(alike))[:num_alike])])
    for i in rng.permutation(len(absent)):
        if len(chosen) >= count:
            break
        chosen[absent[i]] = None
    return list(chosen)


def build_tokenizer() -> BertTokenizerFast:
    """Build a BERT tokenizer of a few dozen words that splits all other words into letters.

    Grounding DINO finds the ends of phrases by token id (`SPECIAL_TOKENS` of its modeling file), so `[CLS]`, `[SEP]`,
    `.` and `?` have the ids that they have in BERT's own vocabulary.

    >>> build_tokenizer().tokenize("red circles . zoo")
    ['red', 'circle', '##s', '.', 'z', '##o', '##o']
    """
    from transformers import BertTokenizerFast

    characters = f"{_LETTERS}0123456789"
    words = [*COLORS, *NOUNS, *ARTICLES, *DISTRACTORS, *characters, "##s", "##es"]
    words += [f"##{character}" for character in characters if character != "s"]
    words += ["-", "'", ",", "&", "/", "(", ")", "!", ":", *EXTRA_COLORS, *EXTRA_SHAPES]
    vocabulary = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    for i, word in enumerate(dict.fromkeys(words)):
        vocabulary[word] = 200 + i
    taken = set(vocabulary.values())
    vocabulary |= {f"[unused{i}]": i for i in range(max(taken) + 1) if i not in taken}
    return BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=512)
