"""Errors that a user can fix. The command prints their message as one line and exits with code 1."""


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
