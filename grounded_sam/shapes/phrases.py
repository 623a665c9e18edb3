"""The words for coloured shapes: phrases, what they match, and a small tokenizer that knows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from grounded_sam.shapes.scenes import COLOURS, EXTRA_COLOURS, EXTRA_SHAPES, PAIRS, SHAPES

if TYPE_CHECKING:
    from transformers import BertTokenizerFast

NOUNS = (*SHAPES, "shape", "object")
ARTICLES = ("a", "an", "the")
#: Things that no scene holds; a model asked for them has to stay silent.
OTHERS = ("car", "dog", "person", "wheel", "cup", "tree", "house", "cat", "bird", "chair", "grey")


def plural(noun: str) -> str:
    """`star` -> `stars`, `cross` -> `crosses`."""
    return noun + ("es" if noun.endswith("s") else "s")


def matches(phrase: tuple[str | None, str | None], pair: tuple[str, str]) -> bool:
    """Whether an object is what a phrase (colour or None, shape or None) asks for."""
    return all(asked is None or asked == is_ for asked, is_ in zip(phrase, pair, strict=True))


def wording(rng: np.random.Generator, phrase: tuple[str | None, str | None]) -> str:
    """One of the ways to say a phrase: plain, plural, with an article."""
    colour, shape = phrase
    noun = shape or str(rng.choice(["shape", "object"]))
    start = rng.choice(["", "plural", "article"], p=[0.6, 0.25, 0.15])
    words = [w for w in (colour, plural(noun) if start == "plural" else noun) if w]
    if start == "article":
        vowel = words[0][0] in "aeiou"
        words.insert(0, str(rng.choice(["an" if vowel else "a", "the"])))
    return " ".join(words)


def ask(
    rng: np.random.Generator,
    present: Sequence[tuple[str, str]],
    pairs: Sequence[tuple[str, str]] = PAIRS,
    most: int = 10,
) -> list[tuple[str | None, str | None, str]]:
    """Draw up to `most` phrases (colour, shape, wording) to ask of a scene that holds `present`.

    Mostly phrases that exclude each other (colour-shape pairs, or shapes, or colours), some mixed,
    some that name other things altogether (colour and shape are then `"?"`).
    """
    count = int(rng.integers(1, most + 1))
    kind = rng.choice(["pairs", "shapes", "colours", "mixed"], p=[0.6, 0.18, 0.13, 0.09])
    shapes = [(None, shape) for shape in dict.fromkeys(shape for _, shape in pairs)]
    colours = [(colour, None) for colour in dict.fromkeys(colour for colour, _ in pairs)]
    pool: list[tuple[str | None, str | None]]
    if kind == "pairs":
        here = sorted(set(present))
        kept = [here[i] for i in rng.permutation(len(here))[: int(rng.integers(0, len(here) + 1))]]
        rest = [p for p in pairs if p not in here]
        pool = [*kept, *(rest[i] for i in rng.permutation(len(rest)))][: max(count, len(kept))][:most]
    elif kind == "mixed":
        pool = [*shapes, *colours, *pairs]
    else:
        pool = list(shapes if kind == "shapes" else colours)
    order = rng.permutation(len(pool))[:count]
    phrases = [(*pool[i], wording(rng, pool[i])) for i in order]
    if rng.random() < 0.12:
        for _ in range(int(rng.integers(1, 3))):
            thing = str(rng.choice(OTHERS))
            if rng.random() < 0.3:
                thing = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), int(rng.integers(3, 9))))
            phrases[int(rng.integers(len(phrases)))] = ("?", "?", thing)
    return phrases


def tokenizer() -> BertTokenizerFast:
    """A BERT tokenizer of a few dozen words, with letters as pieces for everything else.

    Grounding DINO finds phrase borders by token id (`SPECIAL_TOKENS` of its modeling file), so
    `[CLS]`, `[SEP]`, `.` and `?` sit where BERT's own vocabulary has them.
    """
    from transformers import BertTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [*COLOURS, *NOUNS, *ARTICLES, *OTHERS, *letters, "##s", "##es"]
    words += [f"##{letter}" for letter in letters if letter != "s"]
    words += ["-", "'", ",", "&", "/", "(", ")", "!", ":", *EXTRA_COLOURS, *EXTRA_SHAPES]
    fixed = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    vocabulary = dict(fixed)
    for i, word in enumerate(dict.fromkeys(words)):
        vocabulary[word] = 200 + i
    taken = set(vocabulary.values())
    vocabulary |= {f"[unused{i}]": i for i in range(max(taken) + 1) if i not in taken}
    return BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=512)
