"""Translate what older versions wrote into the run files of stores, so that their stores can still be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Classes of this package that were renamed, old name to new name.
CLASSES = {
    "Clicks": "ClickDetector",
    "Ensemble": "EnsembleDetector",
    "Everything": "EverythingDetector",
    "Stored": "StoredDetector",
    "Boxes": "BoxTracker",
    "Tracking": "TrackSettings",
}
#: Config keys that were renamed, by config group.
GROUP_KEYS = {
    "select": {"nms_across": "class_agnostic", "nested": "max_ios"},
    "track": {
        "match_across": "class_agnostic",
        "lost_patience": "max_lost_frames",
        "reach": "max_center_distance",
        "jump": "min_step_iou",
    },
}
#: Config keys that were renamed in the stages of this package: detectors, segmenters and trackers. A
#: user-defined class may still have a key of the old name.
STAGE_KEYS = {
    "floor": "min_score",
    "exports": "export_dir",
    "drop_specks": "min_region_area",
    "fill_holes": "max_hole_area",
    "patience": "max_lost_frames",
}
_STAGES = ("detector", "segmenter", "tracker")


def migrate_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the settings of a run file to the names of the current version.

    Version 0.1.0 stored classes with their module path, which tells classes of this package from others: classes
    of a user keep the keys that they have. Settings that have the current names already stay as they are.

    Args:
        settings: Settings as stored, by config group.

    Returns:
        Settings with current config keys, and classes without their module path.

    >>> migrate_settings({"select": {"nested": 0.9}, "detector": {"_target_": "mine.Boxes", "floor": 1}})
    {'select': {'max_ios': 0.9}, 'detector': {'_target_': 'Boxes', 'floor': 1}}
    """
    return {group: _migrate(value, group) for group, value in settings.items()}


def migrate_vocabulary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the vocabulary of a run file to the columns of the current version.

    Version 0.1.0 also stored whether a detector was queried with it, which is no property of the results.
    """
    return {key: value for key, value in record.items() if key != "asked"}


def class_name(target: str) -> str:
    """Return the name of the class that a `_target_` names, without its module.

    >>> class_name("grounded_sam.detectors.clicks.ClickDetector")
    'ClickDetector'
    """
    return target.rpartition(".")[2]


def _migrate(value: Any, group: str | None) -> Any:
    """Translate one value; `group` is its config group, or None deeper inside."""
    if isinstance(value, list):
        return [_migrate(item, group if group in GROUP_KEYS else None) for item in value]
    if not isinstance(value, Mapping):
        return value
    target = str(value.get("_target_", ""))
    is_ours = target.startswith("grounded_sam.")
    renamed: Mapping[str, str] = {}
    if group in GROUP_KEYS:
        renamed = GROUP_KEYS[group]
    elif is_ours or (not target and group in _STAGES):
        renamed = STAGE_KEYS
    migrated = {renamed.get(key, key): _migrate(item, None) for key, item in value.items()}
    if target:
        name = class_name(target)
        migrated["_target_"] = CLASSES.get(name, name) if is_ours else name
    return migrated
