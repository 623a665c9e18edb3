"""Columns of the part files of a store, and the statuses of objects."""

from __future__ import annotations

import pyarrow as pa

from grounded_sam.formats.store_runs import VERSION

#: What is known of an object: nobody has looked at it yet, or what somebody decided.
STATUSES = ("predicted", "accepted", "rejected", "edited", "added")
#: Columns of the part files.
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("kind", "file", "path", "digest", "fingerprint", "video", "take")),
        ("frame", pa.int64()),
        ("time_s", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("objects", pa.int32()),
        ("reason", pa.string()),
        ("class_id", pa.int32()),
        ("class", pa.string()),
        ("score", pa.float32()),
        ("mask_score", pa.float32()),
        ("verify_score", pa.float32()),
        ("presence", pa.string()),
        *((name, pa.float32()) for name in ("x1", "y1", "x2", "y2")),
        ("area", pa.int64()),
        ("counts", pa.string()),
        ("tracker_id", pa.int64()),
        ("record", pa.string()),
        ("bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        *((name, pa.string()) for name in ("object_id", "status", "author", "edited_at", "predicted_class")),
        ("detector_scores", pa.string()),
        ("etag", pa.string()),
    ],
    metadata={"grounded_sam.schema": str(VERSION)},
)
