"""What a person looks at before trusting labels: one HTML page, and a list of what to review."""

from __future__ import annotations

import base64
import csv
import heapq
import html
import io
import itertools
import random
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.files import atomic_write
from grounded_sam.media.draw import draw_detections
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary

#: Bins of the score histograms.
BINS = 20
#: Longer side of a picture on the page, in pixels.
SIDE = 240


@dataclass
class _Class:
    """What is kept of a class: numbers, and a sample of its objects."""

    objects: int = 0
    images: int = 0
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    sheet: list[tuple[str, str]] = field(default_factory=list)  # picture, caption


class ReportSink:
    """`report.html`, a page in one file, and `review.csv`.

    The page has counts, a histogram of scores and a contact sheet per class (a random sample of its objects),
    the least certain objects, the most crowded images, images without objects, pictures that look alike, and
    files that were skipped. `review.csv` lists the same by file and reason, all empty, skipped and alike
    ones included. What is held does not depend on how many masks there are.

    Args:
        output: folder of the run.
        vocabulary: of the run.
        samples: objects of a contact sheet, and entries of each other list.
        review: the least certain objects in `review.csv`.
        duplicates: compare pictures with each other. Those of one difference hash (of 64 bits, up to 4 of
            them apart), whose 16x16 gray thumbnails differ by 4 of 255 levels at most, look alike.
    """

    def __init__(
        self, output: Path, vocabulary: Vocabulary, samples: int = 24, review: int = 200, duplicates: bool = True
    ) -> None:
        for key, value in (("samples", samples), ("review", review)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"sink.report.{key} must be a whole number from 0, got {value!r}")
        self.folder, self.vocabulary, self.samples, self.review = Path(output), vocabulary, samples, review
        self.duplicates, self.palette = duplicates, vocabulary.palette()
        self.classes = [_Class() for _ in vocabulary.classes]
        self.images = self.empty = self.frames = 0
        self.skipped: list[Skipped] = []
        self.per_image: Counter[int] = Counter()
        self._random = random.Random(0)
        self._count = itertools.count()  # breaks ties in the heaps
        self._unsure: list[tuple[float, int, dict[str, Any], str]] = []  # least certain, by -score
        self._crowded: list[tuple[int, int, str, str]] = []
        self._empty: list[tuple[str, str]] = []
        self._names: list[str] = []
        self._hashes: list[int] = []
        self._thumbs: list[NDArray[np.uint8]] = []
        self._csv: IO[str] | None = None

    def __enter__(self) -> ReportSink:
        return self

    def _row(self, file: str, reason: str, **more: Any) -> None:
        if self._csv is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._csv = (self.folder / ".review.csv.part").open("w", newline="", encoding="utf-8")
            self._out = csv.DictWriter(
                self._csv, ["file", "reason", "object", "class", "score", "mask_score", "detail"]
            )
            self._out.writeheader()
        self._out.writerow({"file": file, "reason": reason, **more})

    def write(self, result: FrameResult) -> None:
        frame, found = result.frame, result.detections
        self.images += 1
        self.frames += frame.video is not None
        self.per_image[len(found)] += 1
        if self.duplicates and frame.video is None:
            with suppress(ImageError):  # of an earlier run, and gone
                self._look(frame.name, frame.image)
        if not len(found):
            self.empty += 1
            self._row(frame.name, "empty")
            self._sample(self._empty, self.empty, lambda: (self._whole(result), frame.name))
            return
        assert found.class_id is not None and found.confidence is not None
        for class_id in set(found.class_id.tolist()):
            self.classes[class_id].images += 1
        for i, (class_id, score) in enumerate(zip(found.class_id.tolist(), found.confidence.tolist(), strict=True)):
            one = self.classes[class_id]
            one.objects += 1
            one.histogram[min(int(score * BINS), BINS - 1)] += 1
            caption = f"{frame.name} · {score:.2f}"
            self._sample(one.sheet, one.objects, lambda i=i, caption=caption: (self._crop(result, i), caption))
            if self.review and (len(self._unsure) < self.review or -score > self._unsure[0][0]):
                about = {"file": frame.name, "object": i, "class": self.vocabulary.classes[class_id]}
                about["score"] = round(score, 4)
                if "mask_score" in found.data:
                    about["mask_score"] = round(float(found.data["mask_score"][i]), 4)
                place = heapq.heappush if len(self._unsure) < self.review else heapq.heapreplace
                picture = self._crop(result, i) if self._among_first(score) else ""
                place(self._unsure, (-score, -next(self._count), about, picture))
        if self.samples and (len(self._crowded) < self.samples or len(found) > self._crowded[0][0]):
            place = heapq.heappush if len(self._crowded) < self.samples else heapq.heapreplace
            place(self._crowded, (len(found), -next(self._count), frame.name, self._whole(result)))

    def skip(self, skipped: Skipped) -> None:
        self.skipped.append(skipped)
        self._row(skipped.file, "skipped", detail=skipped.reason)

    def _among_first(self, score: float) -> bool:
        """Whether an object is among the least certain that the page shows."""
        if not self.samples:
            return False
        least = heapq.nlargest(self.samples, self._unsure)
        return len(least) < self.samples or -score > least[-1][0]

    def _sample(self, kept: list[tuple[str, str]], seen: int, make: Any) -> None:
        """Keep a random sample of all that is offered, drawing only what is kept (Vitter's algorithm R)."""
        if len(kept) < self.samples:
            kept.append(make())
        elif self.samples and (place := self._random.randrange(seen)) < self.samples:
            kept[place] = make()

    def _crop(self, result: FrameResult, i: int) -> str:
        """An object with its surroundings, drawn, as a data URL."""
        height, width = result.frame.size_hw
        x1, y1, x2, y2 = result.detections.xyxy[i].tolist()
        margin = 0.3 * max(x2 - x1, y2 - y1) + 8
        left, top = max(0, int(x1 - margin)), max(0, int(y1 - margin))
        right, bottom = min(width, int(x2 + margin) + 1), min(height, int(y2 + margin) + 1)
        return self._picture(result, select_rows(result.detections, [i]), (left, top, right, bottom))

    def _whole(self, result: FrameResult) -> str:
        height, width = result.frame.size_hw
        return self._picture(result, result.detections, (0, 0, width, height))

    def _picture(self, result: FrameResult, found: sv.Detections, area: tuple[int, int, int, int]) -> str:
        import cv2
        from PIL import Image

        left, top, right, bottom = area
        try:
            image = result.frame.image[top:bottom, left:right]
        except ImageError:  # of an earlier run, and gone
            return ""
        scale = min(1.0, SIDE / max(image.shape[:2]))
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        masks = None
        if found.mask is not None and len(found):
            parts = (np.asarray(mask[top:bottom, left:right], np.uint8) for mask in found.mask)
            masks = np.array([cv2.resize(part, size, interpolation=cv2.INTER_NEAREST) for part in parts], bool)
        corners = (found.xyxy - (left, top, left, top)) * scale
        limit = np.array([size[0], size[1], size[0], size[1]])
        shown = sv.Detections(
            xyxy=np.clip(corners, 0, limit).astype(np.float32),
            mask=masks,
            confidence=found.confidence,
            class_id=found.class_id,
            data={"class_name": found.data.get("class_name", np.empty(0, str))},
        )
        drawn = draw_detections(image, shown, labels=False, colour_by="class", palette=self.palette)
        out = io.BytesIO()
        Image.fromarray(drawn).save(out, format="JPEG", quality=80)
        return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"

    def _look(self, name: str, image: NDArray[np.uint8]) -> None:
        """Note what a picture looks like: difference hash (Krawetz 2013) and thumbnail."""
        import cv2

        small = cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA)
        gray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
        nine = cv2.resize(gray, (9, 8), interpolation=cv2.INTER_AREA)
        bits = (nine[:, 1:] > nine[:, :-1]).reshape(-1)
        self._names.append(name)
        self._hashes.append(int.from_bytes(np.packbits(bits).tobytes(), "big"))
        self._thumbs.append(gray)

    def _alike(self) -> list[list[str]]:
        """Groups of pictures that look alike.

        Hashes at most 4 bits apart agree in at least one of five bands, so only such are compared.
        """
        bands = (13, 13, 13, 13, 12)
        parent = list(range(len(self._names)))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        shift = 0
        for band in bands:
            buckets: dict[int, list[int]] = defaultdict(list)
            for i, code in enumerate(self._hashes):
                buckets[(code >> shift) & ((1 << band) - 1)].append(i)
            shift += band
            for members in buckets.values():
                codes = np.array([self._hashes[i] for i in members], np.uint64)
                thumbs = np.array([self._thumbs[i] for i in members], np.int16)
                left = np.ones(len(members), bool)  # one of a group speaks for all of it
                for k, i in enumerate(members):
                    if not left[k]:
                        continue
                    near = np.flatnonzero(left & (np.bitwise_count(codes ^ codes[k]) <= 4))
                    near = near[np.abs(thumbs[near] - thumbs[k]).mean((1, 2)) <= 4]
                    left[near] = False
                    for j in near:
                        parent[root(members[j])] = root(i)
        groups: dict[int, list[str]] = defaultdict(list)
        for i, name in enumerate(self._names):
            groups[root(i)].append(name)
        return [group for group in groups.values() if len(group) > 1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.images and not self.skipped:
            return
        alike = self._alike()
        for number, group in enumerate(alike, 1):
            for name in group:
                self._row(name, "alike", detail=f"group {number}")
        for count, _, name, _ in sorted(self._crowded, reverse=True):
            self._row(name, "crowded", detail=f"{count} objects")
        for _, _, about, _ in sorted(self._unsure, reverse=True):
            self._row(about["file"], "uncertain", **{k: v for k, v in about.items() if k != "file"})
        if self._csv is None:
            self._row("", "")
        assert self._csv is not None
        self._csv.close()
        Path(self._csv.name).replace(self.folder / "review.csv")
        with atomic_write(self.folder / "report.html") as beside:
            beside.write_text(self._page(alike), encoding="utf-8")

    def _page(self, alike: list[list[str]]) -> str:
        objects = sum(one.objects for one in self.classes)
        parts = [
            "<!doctype html><meta charset='utf-8'><title>Labels</title>",
            "<style>body{font:14px/1.4 system-ui,sans-serif;margin:2em auto;max-width:1400px;padding:0 1em;color:#222}"
            "h2{margin-top:2em;border-bottom:1px solid #ccc}table{border-collapse:collapse}"
            "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #eee}td.n{text-align:right}"
            ".sheet{display:flex;flex-wrap:wrap;gap:8px}figure{margin:0;width:150px}"
            "figure img{width:150px;height:150px;object-fit:contain;background:#f4f4f4}"
            "figcaption{font-size:11px;color:#555;overflow-wrap:anywhere}"
            ".dot{display:inline-block;width:.8em;height:.8em;border-radius:50%;margin-right:.4em}"
            "ul{columns:2}svg{vertical-align:middle}</style>",
            f"<h1>Labels</h1><p>{objects:,} objects of {len(self.classes)} classes in {self.images:,} images"
            f"{f' ({self.frames:,} of them frames of videos)' if self.frames else ''}; {self.empty:,} images without "
            f"objects, {len(self.skipped):,} files skipped, {len(alike):,} groups of pictures that look alike. "
            "All files to review: <code>review.csv</code>.</p>",
            "<h2>Classes</h2><table><tr><th>class<th>id<th>objects<th>images<th>scores from 0 to 1</tr>",
        ]
        for class_id, one in enumerate(self.classes):
            name, colour = html.escape(self.vocabulary.classes[class_id]), self.palette[class_id]
            parts.append(
                f"<tr><td><span class='dot' style='background:{colour}'></span>{name}"
                f"<td class='n'>{self.vocabulary.category_ids[class_id]}<td class='n'>{one.objects:,}"
                f"<td class='n'>{one.images:,}<td>{_bars(one.histogram, colour)}</tr>"
            )
        parts.append("</table><h2>Objects per image</h2>")
        most = max(self.per_image, default=0)
        per_image = np.array([self.per_image[n] for n in range(min(most, 59) + 1)], np.int64)
        parts.append(_bars(per_image, "#888", 8))
        parts.append(f"<p>from 0 to {most}</p>")
        for class_id, one in enumerate(self.classes):
            parts.append(f"<h2>{html.escape(self.vocabulary.classes[class_id])}</h2>{_sheet(one.sheet)}")
        unsure = [
            (picture, f"{a['file']} · {a['class']} · {a['score']:.2f}")
            for *_, a, picture in sorted(self._unsure, reverse=True)
        ]
        parts.append(f"<h2>Least certain</h2>{_sheet([u for u in unsure[: self.samples] if u[0]])}")
        crowded = [(picture, f"{name} · {n} objects") for n, _, name, picture in sorted(self._crowded, reverse=True)]
        parts.append(f"<h2>Most crowded</h2>{_sheet(crowded)}")
        parts.append(f"<h2>Without objects ({self.empty:,})</h2>{_sheet(self._empty)}")
        if alike:
            items = "".join(f"<li>{html.escape(', '.join(group))}</li>" for group in alike[:500])
            parts.append(f"<h2>Look alike ({len(alike):,} groups)</h2><ul>{items}</ul>")
        if self.skipped:
            rows = (f"<tr><td>{html.escape(s.file)}<td>{html.escape(s.reason)}</tr>" for s in self.skipped[:2000])
            parts.append(f"<h2>Skipped ({len(self.skipped):,})</h2><table>{''.join(rows)}</table>")
        return "\n".join(parts) + "\n"

    def summary(self) -> str:
        return (
            f"a page to look at: {self.folder / 'report.html'}, and a list to go through: {self.folder / 'review.csv'}"
        )


def _bars(counts: NDArray[np.int64], colour: str, width: int = 12) -> str:
    """A histogram as SVG."""
    top = max(int(counts.max(initial=0)), 1)
    bars = "".join(
        f"<rect x='{i * width}' y='{40 - 40 * n / top:.1f}' width='{width - 1}' height='{40 * n / top:.1f}' "
        f"fill='{colour}'><title>{n}</title></rect>"
        for i, n in enumerate(counts.tolist())
    )
    across = len(counts) * width
    return f"<svg width='{across}' height='41'><path d='M0 40.5H{across}' stroke='#ccc'/>{bars}</svg>"


def _sheet(pictures: list[tuple[str, str]]) -> str:
    if not pictures:
        return "<p>none</p>"
    figures = (
        f"<figure><img src='{url}' loading='lazy' alt=''><figcaption>{html.escape(text)}</figcaption></figure>"
        for url, text in pictures
    )
    return f"<div class='sheet'>{''.join(figures)}</div>"
