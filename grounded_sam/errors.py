"""The errors a user can mend. The command prints their message as one line and exits with 1."""


class GroundedSamError(Exception):
    """Base of everything this package raises on purpose; says what was expected and what came."""


class ConfigError(GroundedSamError):
    """A key, a choice or a combination of choices that cannot work."""


class VocabularyError(GroundedSamError, ValueError):
    """Text that names no class, or names one in two ways."""


class ImageError(GroundedSamError):
    """A file or array that is no usable picture."""


class CheckpointError(GroundedSamError):
    """Weights that are missing, damaged, or of another model."""
