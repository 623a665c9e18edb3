"""Errors that a user can fix, and counts in messages.

The command prints the message of an error as one line and exits with code 1.
"""


class GroundedSamError(Exception):
    """Base class of the errors of this package; the message says what was expected and what was given."""


class ConfigError(GroundedSamError):
    """Raised for a config key, a value or a combination of settings that cannot work."""


class VocabularyError(GroundedSamError, ValueError):
    """Raised for text that names no class, or one class twice."""


class ImageError(GroundedSamError):
    """Raised for a file or an array that cannot be used as an image."""


class CheckpointError(GroundedSamError):
    """Raised for weights that are missing, damaged or those of another model."""


def count_of(count: int, noun: str, plural: str = "") -> str:
    """Write a count with its noun.

    Args:
        count: The count.
        noun: Singular form.
        plural: Plural form; empty for the noun with an "s".

    >>> count_of(1, "image"), count_of(2000, "image"), count_of(0, "class", "classes")
    ('1 image', '2,000 images', '0 classes')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {plural or noun + 's'}"
