"""Tell whether the end of a video file is missing, for containers that FFmpeg reads up to there without an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: Seconds by which the last frame may end before the duration that the header of its file states.
_TOLERANCE_S = 0.5
#: Id of the header object of an ASF file that has the size of the file.
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
#: Sizes of an MPEG-TS packet, and where its first byte, 0x47, is in it.
_TS_PACKETS = ((188, 0), (192, 4), (204, 0))


def missing_end(file: Path, container: Any, end_s: float | None) -> str | None:
    """Return how one can tell that the end of a video file is missing; None if nothing says so.

    Args:
        file: The file.
        container: PyAV's container of it.
        end_s: Time at which its last frame ends.
    """
    formats = set(container.format.name.split(","))
    if "matroska" in formats:
        return _missing_bytes(file, _matroska_size(file))
    if "asf" in formats:
        return _missing_bytes(file, _asf_size(file))
    if "mpegts" in formats:
        return _cut_packet(file)
    if "flv" in formats and container.duration and end_s is not None:
        whole_s, got_s = container.duration / 1e6, end_s - (container.start_time or 0) / 1e6
        if got_s < whole_s - _TOLERANCE_S:
            return f"{got_s:.1f} of {whole_s:.1f} s"
    return None


def _missing_bytes(file: Path, expected: int | None) -> str | None:
    """Return a reason if a file is smaller than its header says."""
    size = file.stat().st_size
    return f"{size:,} of {expected:,} bytes" if expected is not None and size < expected else None


def _asf_size(file: Path) -> int | None:
    """Return the size that the header of an ASF or WMV file states; None if it states none."""
    with file.open("rb") as opened:
        header = opened.read(65_536)
    start = header.find(_ASF_PROPERTIES)
    size = header[start + 40 : start + 48]
    return int.from_bytes(size, "little") if start >= 0 and len(size) == 8 else None


def _matroska_size(file: Path) -> int | None:
    """Return the size that the header of a Matroska or WebM file states; None if it states none."""
    with file.open("rb") as opened:
        opened.seek(4)  # the id of the first element, which FFmpeg has checked
        header = _element_size(opened)
        if header is None:
            return None
        opened.seek(header, 1)
        if opened.read(4) != b"\x18\x53\x80\x67":  # the segment, which has everything else
            return None
        segment = _element_size(opened)
        return None if segment is None else opened.tell() + segment


def _element_size(opened: Any) -> int | None:
    """Read the size of an EBML element, a number of 1 to 8 bytes; None if it is unknown."""
    first = opened.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + opened.read(length - 1), "big") & (1 << 7 * length) - 1
    return None if value == (1 << 7 * length) - 1 else value


def _cut_packet(file: Path) -> str | None:
    """Return a reason if an MPEG-TS file ends inside a packet."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(3 * 204)
    for length, offset in _TS_PACKETS:
        if all(start[i : i + 1] == b"\x47" for i in range(offset, min(len(start), 3 * length), length)):
            return "the file ends inside a packet" if size % length else None
    return None
