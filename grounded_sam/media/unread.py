"""Which files are images or videos that cannot be read, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

#: Suffixes of formats that need a plugin of Pillow, by the plugin's name of the format.
_PLUGINS = {
    "HEIF": (".heic", ".heics", ".heif", ".heifs", ".hif"),
    "JXL": (".jxl",),
    "AVIF": (".avif", ".avifs"),
}
_RAW = (
    ".3fr .ari .arw .cap .cr2 .cr3 .crw .dcr .dng .erf .fff .gpr .iiq .k25 .kdc .mdc .mef .mos .mrw .nef .nrw .orf "
    ".pef .ptx .raf .raw .rw2 .rwl .sr2 .srf .srw .x3f"
)
#: Suffixes, and what to do with such a file. Some are TIFF inside, whose first image is a thumbnail.
_REMEDIES = (
    (_RAW, "a camera RAW file, which is not read; develop it to JPEG, PNG or TIFF"),
    (".braw .crm .r3d", "a camera RAW video, which is not read; convert it to MP4"),
    (".svg .svgz .eps .ps .ai .pdf .wmf .emf .djvu", "a document or drawing, which is not read; export it as PNG"),
    (
        ".dcm .dicom .nii .fits .fit .fts .czi .lif .nd2 .svs",
        "a scientific format, which is not read; export it as PNG or TIFF",
    ),
    (
        ".exr .hdr .jxr .wdp .hdp .bpg .flif .psb .xcf .kra .clip",
        "an image format that is not read; save it as PNG or TIFF",
    ),
)
_REASONS = {suffix: reason for suffixes, reason in _REMEDIES for suffix in suffixes.split()}


def unread_reason(path: Path, formats: Sequence[str]) -> str | None:
    """Return why an image or video cannot be read, with the way out; None if its suffix says no such thing.

    Args:
        path: The file; only its suffix is looked at.
        formats: Formats that Pillow can read now.

    >>> unread_reason(Path("IMG_1.NEF"), ["JPEG"])
    'a camera RAW file, which is not read; develop it to JPEG, PNG or TIFF'
    >>> unread_reason(Path("IMG_1.jpg"), ["JPEG"]) is None
    True
    """
    suffix = path.suffix.lower()
    name = next((name for name, suffixes in _PLUGINS.items() if suffix in suffixes), None)
    if name == "AVIF" and name not in formats:
        return "AVIF, which this build of Pillow does not read: pip install --upgrade pillow"
    if name is not None and name not in formats:
        title = "JPEG XL" if name == "JXL" else "HEIC"
        return f"{title}, which needs an extra: pip install 'grounded_sam[formats]'"
    return _REASONS.get(suffix)
