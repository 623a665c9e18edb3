"""Label Studio: tasks with what was found as predictions, and the labelling config that fits."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError
from grounded_sam.files import atomic_write
from grounded_sam.sinks.dataset_images import DatasetImages, Handling
from grounded_sam.sinks.splits import Splits
from grounded_sam.structures.masks import join_loops, mask_outlines
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

#: Bits of the four sizes of runs in Label Studio's RLE.
SIZES = (3, 4, 8, 16)


def brush_rle(mask: NDArray[np.bool_]) -> list[int]:
    """A mask `(H, W) bool` as Label Studio's brush, bytes.

    The format is thi.ng's rle-pack over RGBA bytes: number of bytes, size of a word, four sizes of runs, then
    runs. As `label_studio_sdk.converter.brush.mask2rle`, which takes seconds for a photo, byte by byte.
    """
    flat = mask.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = 4 * np.diff(np.concatenate([[0], edges, [len(flat)]]))
    bits = [f"{4 * len(flat):032b}{7:05b}", *(f"{size - 1:04b}" for size in SIZES)]
    value = bool(flat[0])
    for length in lengths.tolist():
        rest = length
        while rest:
            run = min(rest, 1 << SIZES[-1])
            size = next(i for i, width in enumerate(SIZES) if run <= 1 << width)
            bits.append(f"1{size:02b}{run - 1:0{SIZES[size]}b}{255 if value else 0:08b}")
            rest -= run
        value = not value
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return [int(byte) for byte in np.packbits(np.frombuffer(text.encode(), np.uint8) - ord("0"))]


class LabelStudioSink:
    """Under `label_studio/` a `tasks.json` to import, `config.xml` for the project, and `images/`.

    To serve the pictures from disk, start Label Studio with `LOCAL_FILES_SERVING_ENABLED=true` and
    `LOCAL_FILES_DOCUMENT_ROOT` at `label_studio/images`; elsewhere set `url`. Regions carry the score, a
    prediction the mean of its regions and `model_version`. Polygons go along the edges of pixels, parts and
    holes tied in by lines there and back, so that there is one region an object.

    Args:
        output: folder of the run.
        vocabulary: of the run.
        split: parts by share, see `Splits`; noted as `data.split`.
        seed: of the split.
        images: `link`, `copy` or `none`; see `Pictures`.
        regions: `polygon`, `brush` (exact, but Label Studio's own converter leaves it out of COCO and
            YOLO), or `both`. Without masks regions are rectangles.
        url: of a picture, with `{name}` for its place under `images/`.
        model_version: that predictions are marked with; None for the package and its version.
    """

    def __init__(
        self,
        output: Path,
        vocabulary: Vocabulary,
        split: dict[str, float] | None = None,
        seed: int = 0,
        images: Handling = "copy",
        regions: Literal["polygon", "brush", "both"] = "polygon",
        url: str = "/data/local-files/?d={name}",
        model_version: str | None = None,
    ) -> None:
        if regions not in ("polygon", "brush", "both"):
            raise ConfigError(f"sink.label_studio.regions must be polygon, brush or both, got {regions!r}")
        if "{name}" not in url:
            raise ConfigError(f"sink.label_studio.url must have {{name}} in it, got {url!r}")
        from grounded_sam import __version__

        self.folder, self.vocabulary = Path(output) / "label_studio", vocabulary
        self.split, self.pictures = Splits(split, seed), DatasetImages(images, "sink.label_studio.images")
        self.regions, self.url = regions, url
        self.model_version = model_version or f"grounded_sam {__version__}"
        self.images = self.objects = 0
        self._kinds: set[str] = set()
        self._tasks: IO[str] | None = None

    def __enter__(self) -> LabelStudioSink:
        return self

    def write(self, result: FrameResult) -> None:
        frame, found = result.frame, result.detections
        name = self.pictures.put(frame, self.folder / "images", self.pictures.stem(frame))
        regions = [region for i in range(len(found)) for region in self._object(found, i, frame.size_hw)]
        data = {"image": self.url.replace("{name}", quote(name)), "file": frame.name}
        if (part := self.split(frame)) is not None:
            data["split"] = part
        score = float(found.confidence.mean()) if len(found) and found.confidence is not None else 0.0
        prediction = {"model_version": self.model_version, "score": round(score, 6), "result": regions}
        if self._tasks is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tasks = (self.folder / ".tasks.json.part").open("w", encoding="utf-8")
        self._tasks.write("[\n" if not self.images else ",\n")
        self._tasks.write(json.dumps({"data": data, "predictions": [prediction]}, ensure_ascii=False))
        self.images += 1
        self.objects += len(found)

    def _object(self, found: Any, i: int, size_hw: tuple[int, int]) -> list[dict[str, Any]]:
        height, width = size_hw
        label, scale = str(found.data["class_name"][i]), np.array([100 / width, 100 / height])
        values: dict[str, dict[str, Any]] = {}
        if found.mask is None:
            (x1, y1), (x2, y2) = np.minimum(found.xyxy[i].reshape(2, 2) * scale, 100).tolist()
            values["rectangle"] = {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1, "rotation": 0}
        else:
            mask = np.asarray(found.mask[i], bool)
            if self.regions != "brush" and mask.any():
                points = np.minimum(join_loops(mask_outlines(mask, "edges")) * scale, 100).tolist()
                values["polygon"] = {"points": points, "closed": True}
            if self.regions != "polygon" and mask.any():
                values["brush"] = {"format": "rle", "rle": brush_rle(mask)}
        self._kinds |= set(values)
        meta = {} if found.tracker_id is None else {"meta": {"text": [f"track {int(found.tracker_id[i])}"]}}
        return [
            {
                "id": f"{i}-{kind}",
                "type": f"{kind}labels",
                "from_name": kind,
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "score": round(float(found.confidence[i]), 6),
                "value": {**value, f"{kind}labels": [label]},
                **meta,
            }
            for kind, value in values.items()
        ]

    def _config(self) -> str:
        lines = ["<View>", '  <Image name="image" value="$image" zoom="true"/>']
        asked = {"both": ["polygon", "brush"]}.get(self.regions, [self.regions])
        for kind in [k for k in ("rectangle", "polygon", "brush") if k in (self._kinds or asked)]:
            tag = f"{kind.capitalize()}Labels"
            lines.append(f'  <{tag} name="{kind}" toName="image">')
            for name, colour in zip(self.vocabulary.classes, self.vocabulary.palette(), strict=True):
                lines.append(f'    <Label value={quoteattr(name)} background="{colour}"/>')
            lines.append(f"  </{tag}>")
        return "\n".join([*lines, "</View>"]) + "\n"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tasks is None:
            return
        self._tasks.write("\n]\n")
        self._tasks.close()
        Path(self._tasks.name).replace(self.folder / "tasks.json")
        with atomic_write(self.folder / "config.xml") as beside:
            beside.write_text(self._config(), encoding="utf-8")

    def summary(self) -> str:
        return f"{self.images} tasks with {self.objects} objects for Label Studio in {self.folder / 'tasks.json'}"
