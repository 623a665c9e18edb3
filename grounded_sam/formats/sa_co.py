"""Read the JSON of SA-Co Gold and Silver: pairs of an image and a phrase, with all objects that the phrase names.

Each entry of `images` is such a pair, so an image has as many entries as phrases that people were asked for. They
become one image with a class for each phrase, whose pairs without an object are in `neg_category_ids`, and those that
are not labeled completely in `not_exhaustive_category_ids`, as in LVIS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grounded_sam.errors import shorten
from grounded_sam.formats.segmentations import is_number
from grounded_sam.structures.documents import is_text
from grounded_sam.structures.results import Skipped

#: Boxes whose numbers are at most this are parts of the image, others pixels.
_MAX_NORMALIZED = 1.01


def is_sa_co(content: Mapping[str, Any]) -> bool:
    """Return whether the images of a COCO file are pairs of an image and a phrase."""
    images = content["images"]
    return isinstance(images[0], Mapping) and "text_input" in images[0]


def read_sa_co(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Skipped]]:
    """Convert pairs to images with a class for each phrase.

    Args:
        content: A file of SA-Co, or its images and categories with a list of results, whose `image_id` is that of a
            pair. Boxes may be in pixels or, as in SA-Co, parts of the image; those of annotations with masks are
            ignored.

    Returns:
        The content of a COCO file, and which pairs were left out: those without a phrase, id or name of a file, and
        those that occurred before.

    >>> pair = {"id": 7, "file_name": "a.jpg", "width": 4, "height": 3, "text_input": "a dog"}
    >>> content, _ = read_sa_co({"images": [pair], "annotations": [], "categories": []})
    >>> content["categories"], content["images"][0]["neg_category_ids"]
    ([{'id': 1, 'name': 'a dog'}], [1])
    """
    images: dict[str, dict[str, Any]] = {}  # by file name
    phrases: dict[str, int] = {}
    pairs: dict[Any, tuple[dict[str, Any], int]] = {}  # by id, image and number of the phrase
    notes: list[Skipped] = []
    for entry in content["images"]:
        reason = _pair_problem(entry, pairs)
        if reason is None:
            name, phrase = entry["file_name"], " ".join(entry["text_input"].split())
            image = images.setdefault(name, _new_image(entry, len(images) + 1))
            number = phrases.setdefault(phrase, len(phrases) + 1)
            if number in image["pairs"]:
                reason = f"another pair has the same image and phrase {phrase!r}"
            elif (entry.get("width"), entry.get("height")) != (image.get("width"), image.get("height")):
                reason = f"another pair of {name} has another size"
        if reason is not None:
            notes.append(Skipped(f"pair {shorten(entry.get('id') if isinstance(entry, Mapping) else entry)}", reason))
            continue
        image["pairs"][number] = bool(entry.get("is_instance_exhaustive", 1))
        pairs[entry["id"]] = image, number
    annotations, labeled = _to_annotations(content["annotations"], pairs)
    for image in images.values():
        asked = image.pop("pairs")
        image["neg_category_ids"] = [n for n, complete in asked.items() if complete and (image["id"], n) not in labeled]
        image["not_exhaustive_category_ids"] = [n for n, complete in asked.items() if not complete]
    categories = [{"id": number, "name": phrase} for phrase, number in phrases.items()]
    rest = {key: value for key, value in content.items() if key not in ("images", "annotations", "categories")}
    return {**rest, "images": list(images.values()), "annotations": annotations, "categories": categories}, notes


def _pair_problem(entry: Any, pairs: Mapping[Any, Any]) -> str | None:
    """Return why a pair cannot be used; None if it can."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("id"), int | str):
        return "a pair needs id, file_name, text_input, width and height"
    for key in ("file_name", "text_input"):
        if not (is_text(entry.get(key)) and entry[key].strip()):
            return f"{key} must be text, got {shorten(entry.get(key))}"
    return "another pair has the same id" if entry["id"] in pairs else None


def _new_image(entry: Mapping[str, Any], number: int) -> dict[str, Any]:
    keys = ("file_name", "width", "height", "license")
    return {"id": number, **{key: entry[key] for key in keys if key in entry}, "pairs": {}}


def _to_annotations(
    annotations: list[Any], pairs: Mapping[Any, tuple[dict[str, Any], int]]
) -> tuple[list[Any], set[tuple[int, int]]]:
    """Convert annotations of pairs; return them, and which image and phrase have one."""
    converted: list[Any] = []
    labeled: set[tuple[int, int]] = set()
    boxes = [a["bbox"] for a in annotations if isinstance(a, Mapping) and isinstance(a.get("bbox"), list)]
    normalized = all(is_number(value, -_MAX_NORMALIZED, _MAX_NORMALIZED) for box in boxes for value in box)
    for annotation in annotations:
        if not isinstance(annotation, Mapping):
            converted.append(annotation)
            continue
        pair_id = annotation.get("image_id")
        pair = pairs.get(pair_id) if isinstance(pair_id, int | str) else None
        if pair is None:  # named when annotations are checked; the number could be that of an image
            converted.append({**annotation, "image_id": f"pair {shorten(pair_id)}"})
            continue
        image, number = pair
        labeled.add((image["id"], number))
        without = {"bbox", "area"} if annotation.get("segmentation") else set()
        entry = {key: value for key, value in annotation.items() if key not in without}
        if normalized and isinstance(entry.get("bbox"), list) and len(entry["bbox"]) == 4:
            sides = (image.get("width"), image.get("height")) * 2
            if all(is_number(side, 1) for side in sides):
                entry["bbox"] = [value * side for value, side in zip(entry["bbox"], sides, strict=True)]
                entry.pop("area", None)
        converted.append({**entry, "image_id": image["id"], "category_id": number})
    return converted, labeled
