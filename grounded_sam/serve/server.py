"""Everything that the routes share: settings, uploads, the worker with its models, and what is kept."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grounded_sam.config.build import build, build_node, to_plain
from grounded_sam.config.weights import required_weights
from grounded_sam.errors import ConfigError, GroundedSamError
from grounded_sam.formats.store_runs import class_name, fingerprint, package_version
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.serve.predictions import Predictor
from grounded_sam.serve.problems import RequestError, public_message
from grounded_sam.serve.roots import Roots, example_names
from grounded_sam.serve.sessions import OpenSessions
from grounded_sam.serve.settings import ServeSettings, with_token_of_environment
from grounded_sam.serve.stores import Stores
from grounded_sam.serve.sweeps import Sweeps
from grounded_sam.serve.tracking import TrackJobs
from grounded_sam.serve.uploads import Uploads
from grounded_sam.serve.videos import FrameReader
from grounded_sam.serve.worker import Worker
from grounded_sam.structures.protocols import PromptableSegmenter
from grounded_sam.structures.vocabulary import NAMED_COLORS, Vocabulary, default_colors
from grounded_sam.weights.hub import known_models
from grounded_sam.weights.loading import BUILTIN_DIR

if TYPE_CHECKING:
    from omegaconf import DictConfig

#: Threads that read uploads and encode answers at the same time; each may hold a decoded image.
MAX_THREADS = 2
#: Groups of the config whose choices are stages.
STAGES = ("detector", "segmenter", "verify", "tracker")
#: Sections of the config that a client may see.
SECTIONS = ("select", "refine", "tiles", "track")


class Server:
    """What the routes share.

    Args:
        cfg: The config, with the group `serve`.
        overrides: Its overrides, to find out which weights are loaded.
        load: Builds the pipeline; None to build that of the config.

    Attributes:
        settings: The group `serve`.
        max_pixels: Largest image or frame.
        roots: What requests may name.
        uploads: Images and videos.
        jobs: Videos that are tracked.
        frames: Single frames of videos.
        stores: Stores to browse.
        sweeps: Sweeps to compare.
        worker: The thread of the models.
        threads: Limits how many files are read, and answers encoded, at the same time.
        on_failure: Called on the thread of the worker with the error that loading ended with.
        on_ready: Called on the thread of the worker when the models are loaded.

    Raises:
        ConfigError: If a setting is out of range, or a folder is missing.
    """

    def __init__(
        self, cfg: DictConfig, overrides: Sequence[str] = (), load: Callable[[], Pipeline] | None = None
    ) -> None:
        self.cfg, self._overrides = cfg, overrides
        plain = to_plain(cfg)
        plain["serve"] = with_token_of_environment(plain["serve"])
        self.settings = serve_settings(cfg, plain["serve"])
        self._plain: dict[str, Any] = plain
        self.max_pixels = int(plain["source"].get("max_pixels") or MAX_PIXELS)
        self.roots = Roots(self.settings.roots)
        self.stores = Stores(self.settings.stores or {}, self.roots, self.max_pixels)
        self.sweeps = Sweeps(self.settings.sweeps or {}, self.roots, self.max_pixels)
        self.folder = tempfile.TemporaryDirectory(prefix="grounded_sam-serve-")
        max_bytes = int(self.settings.upload_gb * 1e9)
        self.uploads = Uploads(Path(self.folder.name) / "uploads", max_bytes)
        self.jobs = TrackJobs(Path(self.folder.name) / "jobs", self.uploads, self.settings.idle_s, max_bytes)
        self.frames = FrameReader(self.uploads, self.max_pixels)
        self.worker = Worker(load or (lambda: build(cfg)), self.settings.queue, self._loaded)
        self.on_failure: Callable[[BaseException | None], None] = lambda error: None
        self.on_ready: Callable[[], None] = lambda: None
        self.threads = asyncio.Semaphore(MAX_THREADS)
        self._licenses: list[dict[str, Any]] = []
        self._predictor: Predictor | None = None
        self._sessions: OpenSessions | None = None

    def digest_of(self, keys: Iterable[str]) -> str:
        """Return a fingerprint of sections of the config, and of the weights of the package if they are in it."""
        return fingerprint({key: self._plain[key] for key in keys}, Vocabulary.parse(["thing"]))

    def _loaded(self, pipeline: Pipeline | None, error: BaseException | None) -> None:
        """Make what needs the models; called on the thread of the worker."""
        if pipeline is None:
            self.on_failure(error)
            return
        keys = ("detector", "segmenter", "tiles", "refine", "verify")
        digest = self.digest_of(keys)
        self._predictor = Predictor(pipeline, digest, int(self.settings.prediction_mb * 1e6), self.max_pixels)
        self._sessions = OpenSessions(pipeline, int(self.settings.session_gb * 1e9), self.max_pixels)
        self._licenses = self._find_licenses()
        self.on_ready()

    @property
    def pipeline(self) -> Pipeline:
        """The models.

        Raises:
            RequestError: While they are being loaded (503).
        """
        if self.worker.pipeline is None:
            raise RequestError(503, "the models are being loaded; /ready tells when they are", {"Retry-After": "2"})
        return self.worker.pipeline

    @property
    def predictor(self) -> Predictor:
        """Predictions of images.

        Raises:
            RequestError: While the models are being loaded (503).
        """
        assert self.pipeline is not None and self._predictor is not None
        return self._predictor

    @property
    def sessions(self) -> OpenSessions:
        """The sessions.

        Raises:
            RequestError: While the models are being loaded (503).
        """
        assert self.pipeline is not None and self._sessions is not None
        return self._sessions

    @property
    def public_folders(self) -> list[Path]:
        """Folders whose files messages name relative to them; of others, they have the name alone."""
        return self.roots.folders

    def _find_licenses(self) -> list[dict[str, Any]]:
        """Return stage, checkpoint and license of the weights; None where the package does not know it."""
        try:
            specs, _ = required_weights(self._overrides)
        except GroundedSamError:
            return []
        known, found = known_models(), []
        for spec in specs:
            is_own = spec.path is not None and spec.path.is_relative_to(BUILTIN_DIR)
            name = spec.repo or (spec.checkpoint if is_own else Path(spec.checkpoint).name)
            license_name = "apache-2.0" if is_own else known.get(spec.repo or "", {}).get("license")
            found.append({"stage": spec.stage, "checkpoint": name, "license": license_name})
        return found

    def about(self) -> dict[str, Any]:
        """Return what a client may know of the server."""
        stages = {
            key: None if self._plain[key] is None else class_name(str(self._plain[key]["_target_"])) for key in STAGES
        }
        pipeline = self.worker.pipeline
        vocabulary = None if pipeline is None else pipeline.vocabulary
        return {
            "version": package_version("grounded_sam"),
            "ready": self.worker.is_ready,
            "stages": stages,
            "classes": [] if vocabulary is None else list(vocabulary.classes),
            "colors": [] if vocabulary is None else vocabulary.palette(),
            "palette": {"named": NAMED_COLORS, "default": default_colors()},
            "overrides": [public_message(ConfigError(word)) for word in self._overrides if _is_of_models(word)],
            "sessions": pipeline is not None and isinstance(pipeline.segmenter, PromptableSegmenter),
            "device": self._plain["device"] if pipeline is None else device_of(pipeline),
            "precision": self._plain["precision"],
            "settings": {key: _public(self._plain[key]) for key in SECTIONS},
            "licenses": self._licenses,
            "examples": example_names(),
            "stores": sorted(self.stores.folders),
            "sweeps": sorted(self.sweeps.folders),
            "limits": {
                "max_pixels": self.max_pixels,
                "max_body_bytes": int(self.settings.max_body_mb * 1e6),
                "queue": self.settings.queue,
                "upload_bytes": self.uploads.max_bytes,
                "session_bytes": int(self.settings.session_gb * 1e9),
            },
        }

    def close(self) -> None:
        """End the worker, and delete all uploads; nothing happens the second time."""
        self.worker.stop()
        if self._sessions is not None:
            self._sessions.close_all()
        self.frames.close()
        self.folder.cleanup()


def serve_settings(cfg: DictConfig, values: Mapping[str, Any]) -> ServeSettings:
    """Return the settings of the group `serve`.

    Args:
        cfg: The config.
        values: Its group, with the token of the environment.

    Raises:
        ConfigError: If one is unknown, or out of range.
    """
    settings = build_node(cfg, "serve", token=values["token"])
    if not isinstance(settings, ServeSettings):
        raise ConfigError("serve._target_ must be grounded_sam.serve.settings.ServeSettings")
    return settings


def device_of(pipeline: Pipeline) -> str:
    """Return the device of the models, such as `cpu` or `cuda:0`."""
    import torch

    from grounded_sam.structures.protocols import RunsModel

    for stage in (pipeline.segmenter, pipeline.detector):
        if isinstance(stage, RunsModel) and isinstance(stage.model, torch.nn.Module):
            return str(next(stage.model.parameters()).device)
    return "cpu"


def _is_of_models(override: str) -> bool:
    """Return whether an override is about models and their settings, and not about the server or one request.

    >>> [_is_of_models(word) for word in ("preset=shapes", "+serve=local", "serve.port=0", "text=[car]")]
    [True, False, False, False]
    """
    group = override.lstrip("+~").partition("=")[0].partition(".")[0]
    return group not in ("serve", "hydra", "text", "negative", "input", "output")


def _public(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section of the config without classes and files."""
    return {key: value for key, value in section.items() if key not in ("_target_", "clicks")}
