"""Images that are encoded once, for any number of clicks."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import supervision as sv

from grounded_sam.errors import ConfigError
from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.segmenters.session import SegmentSession
from grounded_sam.serve.memory import ByteLimited
from grounded_sam.serve.predictions import picture_frame
from grounded_sam.serve.problems import RequestError
from grounded_sam.serve.uploads import Upload
from grounded_sam.structures.masks import pack_masks
from grounded_sam.structures.protocols import PromptableSegmenter


@dataclass(eq=False)
class OpenSession:
    """A session and the image that it is of.

    Attributes:
        session: The session, whose pixels are no longer in memory.
        image: Id of the image.
        size_hw: Its height and width in pixels.
        id: Id of the session.
    """

    session: SegmentSession
    picture: str
    size_hw: tuple[int, int]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def num_bytes(self) -> int:
        """Size in memory, on the device or beside it."""
        return 10_000 + self.session.num_bytes


class OpenSessions:
    """The sessions; those used least recently are closed when there are too many.

    Args:
        pipeline: The models.
        max_bytes: Largest memory of all sessions.
        max_pixels: Largest image.
    """

    def __init__(self, pipeline: Pipeline, max_bytes: int, max_pixels: int) -> None:
        self.pipeline, self.max_pixels = pipeline, max_pixels
        self._open: ByteLimited[OpenSession] = ByteLimited(
            max_bytes, lambda item: item.num_bytes, lambda item: item.session.close()
        )

    def __len__(self) -> int:
        return len(self._open)

    @property
    def num_bytes(self) -> int:
        """Memory of all sessions."""
        return self._open.num_bytes

    def open(self, uploads: Sequence[Upload]) -> list[OpenSession]:
        """Encode images; called on the thread of the worker.

        Raises:
            ConfigError: If the segmenter takes no prompts.
            ImageError: If an image cannot be read.
        """
        segmenter = self.pipeline.segmenter
        if not isinstance(segmenter, PromptableSegmenter):
            raise ConfigError("a session needs a segmenter that takes prompts, e.g. segmenter=sam2")
        opened = []
        for upload in uploads:
            frame = picture_frame(upload, self.max_pixels)
            session = SegmentSession(segmenter, frame)
            session.frame = picture_frame(upload, self.max_pixels)  # without the pixels, which are not needed any more
            item = OpenSession(session, upload.id, frame.size_hw)
            self._open.put(item.id, item)
            opened.append(item)
        return opened

    def get(self, session_id: str) -> OpenSession:
        """Return a session.

        Raises:
            RequestError: If there is none (404).
        """
        item = self._open.get(session_id)
        if item is None:
            raise RequestError(
                404, f"no session {session_id[:40]!r}: it was closed, or made room for newer ones; open it again"
            )
        return item

    def segment(self, asked: Sequence[tuple[OpenSession, Sequence[Mapping[str, Any]]]]) -> list[sv.Detections]:
        """Segment the prompts of sessions; called on the thread of the worker.

        Args:
            asked: Sessions, each with entries as `structures.clicks.Clicks` takes them.

        Returns:
            For each session as many detections as entries, with masks as RLE.

        Raises:
            ConfigError: If an entry is malformed.
            ImageError: If a prompt lies outside the image.
            RequestError: If a session was closed in the meantime (404).
        """
        segmented = []
        for item, entries in asked:
            self.get(item.id)
            segmented.append(pack_masks(item.session.segment(entries)))
            self._open.put(item.id, item)  # it may have grown
        return segmented

    def close(self, session_id: str) -> None:
        """Close a session.

        Raises:
            RequestError: If there is none (404).
        """
        if not self._open.remove(session_id):
            self.get(session_id)

    def close_all(self) -> None:
        """Close all sessions."""
        self._open.clear()
