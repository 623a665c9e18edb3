"""Label Studio: tasks with the detections as predictions, and the labeling config that goes with them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.checks import check_choice
from grounded_sam.errors import ConfigError
from grounded_sam.files import PendingFile, atomic_write_text, encode_controls
from grounded_sam.formats.store_runs import package_version
from grounded_sam.sinks.base import DatasetSink
from grounded_sam.sinks.dataset_images import ImageMode
from grounded_sam.structures.masks import join_loops, mask_outlines
from grounded_sam.structures.results import FrameResult

#: URL of an image in a storage of local files.
LOCAL_URL = "/data/local-files/?d=images/{name}"
#: Bits of the four run lengths in Label Studio's RLE.
RUN_BITS = (3, 4, 8, 16)


def encode_brush(mask: NDArray[np.bool_]) -> list[int]:
    """Encode a mask as a brush of Label Studio.

    The format is thi.ng's rle-pack over RGBA bytes: the number of bytes, the bits of a value, the bits of four run
    lengths, then the runs. The result equals that of `label_studio_sdk.converter.brush.mask2rle`, which encodes byte
    by byte and takes seconds for a photo.

    Args:
        mask: `(H, W) bool`.

    Returns:
        Bytes of the code, 0 to 255.

    >>> encode_brush(np.ones((1, 1), bool))
    [0, 0, 0, 4, 57, 27, 252, 127, 224]
    """
    flat = mask.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = 4 * np.diff(np.concatenate([[0], edges, [len(flat)]]))
    bits = [f"{4 * len(flat):032b}{7:05b}", *(f"{size - 1:04b}" for size in RUN_BITS)]
    value = bool(flat[0])
    for length in lengths.tolist():
        remaining = length
        while remaining:
            run = min(remaining, 1 << RUN_BITS[-1])
            size = next(i for i, width in enumerate(RUN_BITS) if run <= 1 << width)
            bits.append(f"1{size:02b}{run - 1:0{RUN_BITS[size]}b}{255 if value else 0:08b}")
            remaining -= run
        value = not value
    code = "".join(bits)
    code += "0" * (-len(code) % 8)
    return [int(byte) for byte in np.packbits(np.frombuffer(code.encode(), np.uint8) - ord("0"))]


@dataclass(eq=False)
class LabelStudioSink(DatasetSink):
    """Write `tasks.json` to import, `config.xml` for the project, and `images/` under `label_studio/`.

    Label Studio serves images from disk only below its document root, and only if the project has a storage of local
    files there: `README.txt` in the folder has the command that starts it, and the path of the storage. For images on
    a server, set `url`. Regions have the score of their detection, predictions the mean of their regions and
    `model_version`. Polygons run along the edges of pixels; zero-width bridges connect separate parts and holes, so
    that there is one region per object.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
        split: Share of each split, see `splits.Splits`; written as `data.split`.
        seed: Seed of the split.
        images: `link`, `copy` or `none`; see `dataset_images.DatasetImages`.
        regions: `polygon`, `brush` (exact, but Label Studio's own converter omits it from COCO and YOLO), or `both`.
            Without masks regions are rectangles.
        tolerance: Largest distance in pixels of simplified polygons from the outline; 0 for exact ones.
        url: URL of an image, where `{name}` is its path under `images/`.
        model_version: Version that predictions are marked with; None for this package and its version.

    Raises:
        ConfigError: If `regions` is none of its choices, or `url` lacks `{name}`.
    """

    name: ClassVar[str] = "label_studio"

    images: ImageMode = "copy"
    regions: Literal["polygon", "brush", "both"] = "polygon"
    tolerance: float = 0.0
    url: str = LOCAL_URL
    model_version: str | None = None
    _control_kinds: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("sink.label_studio.regions", self.regions, ("polygon", "brush", "both"))
        if "{name}" not in self.url:
            raise ConfigError(f"sink.label_studio.url must contain {{name}}, got {self.url!r}")
        super().__post_init__()
        self.model_version = self.model_version or f"grounded_sam {package_version('grounded_sam')}"

    def _open(self) -> None:
        self._tasks = PendingFile(self.folder / "tasks.json")

    def _write(self, result: FrameResult) -> int:
        frame, detections = result.frame, result.detections
        name = self._image_files.save(frame, self.folder / "images", self._image_files.unique_stem(frame))
        regions = [region for i in range(len(detections)) for region in self._regions(detections, i, frame.size_hw)]
        data = {"image": self.url.replace("{name}", quote(name)), "file": frame.name}
        if (split := self._splits(frame)) is not None:
            data["split"] = split
        score = float(detections.confidence.mean()) if detections.confidence is not None and len(detections) else 0.0
        prediction = {"model_version": self.model_version, "score": round(score, 6), "result": regions}
        task = json.dumps({"data": data, "predictions": [prediction]}, ensure_ascii=False)
        self._tasks.text.write((",\n" if self.num_images else "[\n") + task)
        return len(detections)

    def _regions(self, detections: sv.Detections, i: int, size_hw: tuple[int, int]) -> list[dict[str, Any]]:
        """Return the regions of one detection, in percent of width and height."""
        assert detections.confidence is not None
        height, width = size_hw
        label, scale = encode_controls(str(detections.data["class_name"][i])), np.array([100 / width, 100 / height])
        values: dict[str, dict[str, Any]] = {}
        if detections.mask is None:
            (x1, y1), (x2, y2) = np.minimum(detections.xyxy[i].reshape(2, 2) * scale, 100).tolist()
            values["rectangle"] = {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1, "rotation": 0}
        else:
            mask = np.asarray(detections.mask[i], bool)
            if self.regions != "brush" and mask.any():
                points = np.minimum(join_loops(mask_outlines(mask, "edges", self.tolerance)) * scale, 100).tolist()
                values["polygon"] = {"points": points, "closed": True}
            if self.regions != "polygon" and mask.any():
                values["brush"] = {"format": "rle", "rle": encode_brush(mask)}
        self._control_kinds |= set(values)
        track_id = None if detections.tracker_id is None else int(detections.tracker_id[i])
        meta = {} if track_id is None else {"meta": {"text": [f"track {track_id}"]}}
        return [
            {
                "id": f"{i}-{kind}",
                "type": f"{kind}labels",
                "from_name": kind,
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "score": round(float(detections.confidence[i]), 6),
                "value": {**value, f"{kind}labels": [label]},
                **meta,
            }
            for kind, value in values.items()
        ]

    def _labeling_config(self) -> str:
        """Return the XML of the project: a control for each kind of region."""
        lines = ["<View>", '  <Image name="image" value="$image" zoom="true"/>']
        kinds = self._control_kinds or {"both": {"polygon", "brush"}}.get(self.regions, {self.regions})
        for kind in [kind for kind in ("rectangle", "polygon", "brush") if kind in kinds]:
            tag = f"{kind.capitalize()}Labels"
            lines.append(f'  <{tag} name="{kind}" toName="image">')
            for name, color in zip(self.vocabulary.classes, self.vocabulary.palette(), strict=True):
                lines.append(f"    <Label value={quoteattr(encode_controls(name))} background={quoteattr(color)}/>")
            lines.append(f"  </{tag}>")
        return "\n".join([*lines, "</View>"]) + "\n"

    def _close(self) -> None:
        self._tasks.text.write("\n]\n")
        self._tasks.commit()
        atomic_write_text(self.folder / "config.xml", self._labeling_config())
        if self.url == LOCAL_URL:
            atomic_write_text(self.folder / "README.txt", self._instructions())

    def _instructions(self) -> str:
        """Return how to open the tasks in Label Studio."""
        folder = self.folder.resolve()
        root = shlex.quote(str(folder))
        return (
            "1. Start Label Studio so that it may serve this folder:\n\n"
            f"   LOCAL_FILES_SERVING_ENABLED=true LOCAL_FILES_DOCUMENT_ROOT={root} label-studio start\n\n"
            "2. In the project: Settings, Labeling Interface, Code: paste config.xml.\n"
            "3. Settings, Cloud Storage, Add Source Storage, Local Files, with this absolute local path; save it\n"
            f"   without synchronizing, which would add every image a second time:\n\n   {folder / 'images'}\n\n"
            "4. Import tasks.json.\n"
        )

    def _last_files(self) -> Sequence[Path]:
        return (self.folder / "tasks.json", self.folder / "config.xml")

    def own_folder(self) -> Path:
        """Return the folder of the dataset, whose one list of labels has the images of the last run only."""
        return self.folder

    def summary(self) -> str:
        """Return the counts and the path of `tasks.json`."""
        storage = f"; it needs a Local Files storage, see {self.folder / 'README.txt'}" if self.url == LOCAL_URL else ""
        return f"{self._counts()} for Label Studio: {self.folder / 'tasks.json'}{storage}"
