"""What a stage must implement, and what it may add.

A class of your own needs no base class: having the methods is enough. A source must be a `Source`, a detector a
`Detector`, a segmenter a `Segmenter`, a verifier a `Verifier`, a sink a `Sink`, and a tracker one of `Tracker` (whose
sessions are `TrackSession`s), `EndToEndTracker` and `TextTracker`. All other protocols are optional, and the pipeline
tests for them with `isinstance`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.output.paths import OutputPath
from grounded_sam.remote import Location
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.items import FileContent, SourceItem
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.weights.hub import HubFile

if TYPE_CHECKING:
    import torch


class Lookup(Protocol):
    """A function that looks up stored results."""

    def __call__(
        self, name: str, files: Sequence[Path | Location], content: FileContent | None = None, *, may_read: bool = True
    ) -> Iterable[FrameResult] | None:
        """Return the stored results of an image or of a whole video, if its files have not changed.

        Args:
            name: Name of the image or video.
            files: Its files.
            content: What was read from the file of an image; None if it is not read yet.
            may_read: Whether files whose size, times and tags do not say so may be read to find out. False answers None
                for them: ask again with `content`.

        Returns:
            The results; None where nothing is stored.
        """


# Sources


@runtime_checkable
class Source(Protocol):
    """Where frames come from, decoded one at a time.

    Files that cannot be used are added to `skipped` and passed over. `len()` is the largest number of frames that may
    come; it raises a TypeError where that is unknown.
    """

    skipped: list[Skipped]

    def __iter__(self) -> Iterator[Frame | FrameResult]: ...
    def __len__(self) -> int: ...


@runtime_checkable
class Resumable(Protocol):
    """A source that asks for stored results before it decodes a file."""

    def resume(self, lookup: Lookup) -> Iterator[Frame | FrameResult]:
        """Iterate as `__iter__` does, but yield the results of `lookup` instead of the frames that have some."""


@runtime_checkable
class ListsItems(Protocol):
    """A source of images that lists them without reading them, so that other threads or machines can.

    `Source.skipped` gets what the listing passes over, and what `decode` has not read of an image.
    """

    def items(self) -> Iterator[SourceItem]:
        """Yield the images, as they are found.

        Raises:
            ConfigError: If the input cannot be listed; `RemoteError` for an address.
        """

    def without_listing(self) -> ListsItems:
        """Return a source that can `fetch` and `decode`, but lists nothing: it is small, and can be pickled."""

    def fetch(self, item: SourceItem) -> bytes:
        """Read the encoded bytes of an image; transient errors are tried again. Any thread or process may call it.

        Raises:
            ImageError: If it is missing, or must not be read.
        """

    def decode(self, item: SourceItem, data: bytes) -> Frame:
        """Decode an image. Any thread or process may call it.

        Returns:
            Its frame, with `content`; `index` is 0.

        Raises:
            ImageError: If it is no image, damaged, or too large.
        """


@runtime_checkable
class Sharded(Protocol):
    """A source that takes one of `num_shards` parts of its input."""

    num_shards: int


@runtime_checkable
class HasVocabulary(Protocol):
    """A source or detector with classes of its own, so that `text` may be left out."""

    vocabulary: Vocabulary | None


# Detectors


@runtime_checkable
class Detector(Protocol):
    """Frames and text to boxes."""

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Detect the classes of a vocabulary.

        Returns:
            One `Detections` per frame: `xyxy (n, 4)` in pixels, `confidence (n,)` from 0 to 1, `class_id (n,)` into
            `vocabulary.classes`. Thresholds are left to `select`. With `mask (n, H, W) bool` no segmenter is run.
        """


@runtime_checkable
class BatchDetector(Protocol):
    """A detector that takes `batch_size` frames per call; others get one."""

    batch_size: int


@runtime_checkable
class GroupsBySize(Protocol):
    """A detector that runs frames of different sizes separately."""

    def batch_key(self, size_hw: tuple[int, int]) -> Hashable:
        """Return what is equal for frames that share a forward pass, from their height and width in pixels."""


@runtime_checkable
class RefusesAnswers(Protocol):
    """A detector that may not use all of what it is asked, or of what its model says.

    These are parts of answers that cannot be read, and phrases that the model does not know.
    """

    def take_refused(self) -> list[Skipped]:
        """Return what was refused since the last call, at most one entry per frame, and forget it."""


@runtime_checkable
class EmbedsCrops(Protocol):
    """A model that embeds crops of objects, to compare them."""

    def embed_crops(self, crops: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Return the normalized embeddings `(n, d)` of crops `(h, w, 3) uint8`."""


@dataclass(frozen=True)
class DetectorTraits:
    """What a detector does besides boxes, known from its settings before weights are loaded.

    Attributes:
        masks: Its detections have masks, so a segmenter has nothing to do.
        replaces_segmenter: It uses the segmenter itself, or makes one unnecessary: none is built.
        clicks: Its detections are manual prompts, from which a tracker can start without masks.
        image_prompts: It holds boxes drawn in whole images, so images cannot be tiled.
    """

    masks: bool = False
    replaces_segmenter: bool = False
    clicks: bool = False
    image_prompts: bool = False


@runtime_checkable
class DeclaresTraits(Protocol):
    """A detector class that declares what it does besides boxes."""

    @classmethod
    def traits(cls, settings: Mapping[str, Any]) -> DetectorTraits:
        """Return the traits for some settings, as the config has them."""


# Models


@runtime_checkable
class RunsModel(Protocol):
    """A stage whose network is a PyTorch module."""

    model: torch.nn.Module


@runtime_checkable
class LoadsOneFile(Protocol):
    """A class of any stage that loads a single file of weights, instead of a transformers checkpoint."""

    @classmethod
    def hub_file(cls, settings: Mapping[str, Any]) -> HubFile:
        """Return the file on the hub that some settings name, as the config has them."""


@runtime_checkable
class TakesOptions(Protocol):
    """A class of any stage that takes the fields of a dataclass as further keyword arguments.

    Attributes:
        OPTIONS: The dataclass.
    """

    OPTIONS: type


# Segmenters


@runtime_checkable
class Segmenter(Protocol):
    """Boxes to masks."""

    def segment(self, image: NDArray[np.uint8], detections: sv.Detections) -> sv.Detections:
        """Segment each detection of an image `(H, W, 3) uint8`.

        Returns:
            As many detections in the same order, with `mask (n, H, W) bool` and `data["mask_score"] (n,) float32`.
        """


@runtime_checkable
class BatchSegmenter(Protocol):
    """A segmenter that takes `batch_size` images per call; others get one."""

    batch_size: int

    def segment_batch(
        self, images: Sequence[NDArray[np.uint8]], detections: Sequence[sv.Detections]
    ) -> list[sv.Detections]:
        """Segment the detections of images `(H, W, 3) uint8`, whose sizes may differ.

        Returns:
            For each image what `Segmenter.segment` returns for it alone.
        """


@runtime_checkable
class PromptableSegmenter(Protocol):
    """A segmenter that encodes an image once for any number of prompts."""

    def encode_image(self, image: NDArray[np.uint8]) -> dict[str, Any]:
        """Compute the features of an image."""

    def segment_encoded(
        self, size_hw: tuple[int, int], detections: sv.Detections, features: Mapping[str, Any]
    ) -> sv.Detections:
        """Segment detections of an encoded image, as `segment` does."""


@runtime_checkable
class CachesFeatures(Protocol):
    """A segmenter that can keep image features on disk."""

    def use_feature_cache(self, cache: Any) -> None:
        """Read features from a `segmenters.feature_cache.FeatureCache` and write new ones to it."""


@runtime_checkable
class GeneratesMasks(Protocol):
    """A segmenter with an automatic mask generator.

    Attributes:
        mask_generator_settings: Settings that suit the weights; see `detectors.everything.DEFAULTS`.
    """

    mask_generator_settings: Mapping[str, Any]

    def mask_generator(self, **settings: Any) -> Any:
        """Return an object whose `generate(image)` returns the records of `SamAutomaticMaskGenerator`."""


# Verifiers


@runtime_checkable
class Verifier(Protocol):
    """Judges on crops whether detections are what their phrases say.

    Attributes:
        min_score: Detections whose confidence is lower are dropped instead of judged, 0 to 1.
    """

    min_score: float

    def verify(
        self, images: Sequence[NDArray[np.uint8]], detections: Sequence[sv.Detections], vocabulary: Vocabulary
    ) -> list[sv.Detections]:
        """Judge the detections of images `(H, W, 3) uint8`.

        Returns:
            As many detections in the same order, with `data["verify_score"]` and `data["calibrated_score"]`, both
            `(n,) float32` from 0 to 1: whether the crop shows what the phrase says, and whether the detection is right,
            given all scores. `metadata["presence"]` has the probability of each class that was detected to be in the
            image at all, by name.
        """


# Trackers


@runtime_checkable
class TrackSession(Protocol):
    """One video on its way through a tracker. Ids are given by the caller.

    Detections that a session returns have `mask (n, H, W) bool`, `xyxy`, `tracker_id`, `confidence` (that the object is
    present) and `data["mask_score"]`, and no class. Memory does not grow with the number of frames.
    """

    def step(self, image: NDArray[np.uint8]) -> sv.Detections:
        """Advance to the next frame and return the objects that are visible in it."""

    def prompt(self, detections: sv.Detections) -> sv.Detections:
        """Add or correct the objects `detections.tracker_id` on the current frame and return them.

        Prompts are masks, boxes or clicks; other objects are not affected.
        """

    def remove(self, tracker_id: int) -> None:
        """Remove an object and free its memory."""

    def close(self) -> None:
        """Free everything."""


@runtime_checkable
class PredictsLost(Protocol):
    """A session that can predict masks for objects it considers absent, so that detections can match lost tracks."""

    def predict_lost(self, ids: Sequence[int]) -> sv.Detections:
        """Return the masks of lost or hidden tracks on the current frame, as if their objects were present."""


@runtime_checkable
class ResetsMemory(Protocol):
    """A session that can forget what an object left in memory after its prompts."""

    def reset_memory(self, tracker_id: int) -> None:
        """Drop the memory of an object whose track was hidden, since it is probably on another object."""


@runtime_checkable
class EncodesAhead(Protocol):
    """A session that can encode the next frame while the results of the current one are on their way."""

    def encode_ahead(self, image: NDArray[np.uint8]) -> None:
        """Announce the frame after the one that the next `step` takes, before that `step`.

        It has no effect on results, and none at all where nothing would be gained. A frame that is announced and does
        not come is forgotten.
        """


@runtime_checkable
class SharesFeatures(Protocol):
    """A session with a segmenter that reuses the image features of the current frame; None to use the pipeline's."""

    segmenter: Segmenter | None


@runtime_checkable
class Tracker(Protocol):
    """Propagates masks from frame to frame. Its constructor receives the pipeline's `segmenter`, to share its model."""

    def open(self, size_hw: tuple[int, int]) -> TrackSession:
        """Open a session for a video of frames of one size."""


@runtime_checkable
class NeedsMasks(Protocol):
    """A tracker class that declares whether it has to be prompted with masks."""

    @classmethod
    def needs_masks(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether these settings, as the config has them, take mask prompts only."""


@runtime_checkable
class EndToEndTracker(Protocol):
    """A tracker that associates the detections of every frame by itself."""

    def track(
        self, frames: Iterator[Frame], vocabulary: Vocabulary, detect: Callable[[Frame], sv.Detections]
    ) -> Iterator[tuple[Frame, sv.Detections]]:
        """Yield every frame with its objects: `class_id`, `confidence` and a `tracker_id` of the tracker's own.

        Args:
            frames: Frames of one video.
            vocabulary: Classes to look for.
            detect: Returns the selected detections of a frame, with masks if there is a segmenter.
        """


@runtime_checkable
class TextTracker(Protocol):
    """A tracker that finds the classes itself, without a detector; `select` is applied to what it returns."""

    def track_text(self, frames: Iterator[Frame], vocabulary: Vocabulary) -> Iterator[tuple[Frame, sv.Detections]]:
        """Yield every frame with its objects, as `EndToEndTracker.track` does."""


# Sinks


@runtime_checkable
class Sink(AbstractContextManager[Any], Protocol):
    """Where results go. Its constructor receives `output` (a folder) and `vocabulary`, beside its own settings.

    Files are opened at the first `write` and renamed into place when they are complete. What was written before an
    interruption stays usable.
    """

    def write(self, result: FrameResult) -> None:
        """Write one result."""

    def summary(self) -> str:
        """Return one line for the end of the run: what was written, and where."""


@runtime_checkable
class TakesAddress(Protocol):
    """A sink class that can write to an address such as `s3://bucket/labels`; `output` may be a `RemotePath` then.

    Attributes:
        takes_address: True.
    """

    takes_address: bool


@runtime_checkable
class NumbersClasses(Protocol):
    """A sink whose files have numbers of classes or list all classes.

    Its `vocabulary` also has the classes of earlier runs into the same output, first, and results that are written to
    it have their numbers: see `formats.output_classes.OutputClasses`.
    """

    def numbered_classes(self) -> Sequence[str]:
        """Return the classes in the order of their numbers."""


@runtime_checkable
class PreparesResults(Protocol):
    """A sink that draws or encodes each result without regard to others, so that several threads can do it."""

    def prepare(self, result: FrameResult) -> Any:
        """Do the work on a result that needs no order; called on any thread."""

    def write_prepared(self, result: FrameResult, prepared: Any) -> None:
        """Write what `prepare` returned; called in the order of the results, instead of `write`."""


@runtime_checkable
class RecordsSkipped(Protocol):
    """A sink that records files that could not be used."""

    def skip(self, skipped: Skipped) -> None:
        """Record one file."""


@runtime_checkable
class ListsSkipped(Protocol):
    """A sink that lists what it was asked for and could not write, such as sound or a part of a split."""

    skipped: list[Skipped]


@runtime_checkable
class ResultStore(Protocol):
    """A sink that reads back what earlier runs wrote, so that a run can resume."""

    def lookup(
        self,
        name: str,
        files: Sequence[Path | Location],
        content: FileContent | None = None,
        *,
        may_read: bool = True,
        replay: bool = True,
    ) -> Iterable[FrameResult] | None:
        """Return the stored results of an image or of a whole video, if its files have not changed; see `Lookup`.

        Args:
            name: Name of the image or video.
            files: Its files.
            content: As of `Lookup`.
            may_read: As of `Lookup`.
            replay: Whether the results are wanted; False returns an empty iterable for what is stored.
        """

    def named(self, frame: Frame) -> Frame:
        """Return a frame under a name that no other file of the store has."""

    def reviewed(self, result: FrameResult) -> FrameResult:
        """Return a new result with ids of its objects, and with what people decided about them.

        Its frame has a name that no other file of the store has. What the store gets is `result.predicted`, if there
        is one.
        """

    def output_classes(self) -> Vocabulary:
        """Return the classes of the run, followed by those stored before."""

    def files_resumed(self) -> int:
        """Return how many files `lookup` has found so far."""

    def leave_incomplete(self, video: str) -> None:
        """Take back that a video, whose last frame is written, will be complete, because it stopped."""

    def notes(self) -> list[Skipped]:
        """Return the problems that were recorded for files that `lookup` has found."""

    def not_searched(self) -> list[Skipped]:
        """Return which classes of the run were not looked for in the files that `lookup` has found."""


@runtime_checkable
class OwnsFolder(Protocol):
    """A sink with a folder of its own, from which files that only an earlier run wrote are removed."""

    def own_folder(self) -> OutputPath:
        """Return the folder, which no other sink writes to."""


@runtime_checkable
class Measures(Protocol):
    """A sink that measures the run."""

    def value(self) -> float:
        """Return the number that a sweep maximizes.

        Raises:
            ConfigError: If the chosen metric does not exist.
        """
