"""Pages that are generated while the site is built: the config, from the YAML files and their comments."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
GROUPS = ("source", "detector", "segmenter", "tracker", "sink", "engine", "preset", "sweep", "serve")
LINE = re.compile(r"^(?P<indent> *)(?P<key>[\w.@/]+):(?: +(?P<value>[^#\s].*?))?(?: +# (?P<comment>.*))?$")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add `reference/config.md`."""
    files.append(File.generated(config, "reference/config.md", content=config_page()))
    return files


def config_page() -> str:
    """Return the page with all keys: those of `conf/config.yaml`, and of every choice of every group."""
    parts = [
        "# Config\n\nAll keys with their defaults, as the YAML files in `conf/` have them. Set any of them on the "
        "command line with `key=value`, and choose from a group with `group=choice`. In Python, `load` takes the same "
        "overrides.\n",
        "## Keys\n\n" + _table((ROOT / "conf" / "config.yaml").read_text(encoding="utf-8")),
    ]
    for group in GROUPS:
        parts.append(f"## {group}\n")
        for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
            text = path.read_text(encoding="utf-8")
            leading = [
                line.lstrip("# ") for line in text.splitlines() if line.startswith("# ") and "@package" not in line
            ]
            prefix = "" if "@package _global_" in text else group
            table = _block(text) if group in ("preset", "sweep") else _table(text, prefix)
            parts.append(f"### {group}={path.stem}\n\n{' '.join(leading)}\n\n{table}")
    return "\n".join(parts)


def _block(text: str) -> str:
    return f"```yaml\n{text}```\n"


def _table(text: str, prefix: str = "") -> str:
    """Return a table of the keys of a YAML file, up to its defaults list."""
    rows, path = [], [prefix] if prefix else []
    indents = [-1] if prefix else []
    for line in text.splitlines():
        if line.startswith("hydra:"):
            break
        if line.startswith(("defaults:", "  - ")):
            continue
        match = LINE.match(line)
        if match is None:
            continue
        indent, key, value = len(match["indent"]), match["key"], match["value"]
        while indents and indents[-1] >= indent:
            indents.pop()
            path.pop()
        name = ".".join([*path, key])
        if value is None:
            path.append(key)
            indents.append(indent)
        elif key not in ("_target_", "_recursive_"):
            rows.append(f"| `{name}` | `{value}` | {_escaped(match['comment'] or '')} |")
    if not rows:
        return "No keys.\n"
    return "\n".join(["| key | default | |", "|---|---|---|", *rows]) + "\n"


def _escaped(text: str) -> str:
    escaped = text.replace("|", "\\|").replace("<", "&lt;")
    return re.sub(r"('?\{[^}]*\}'?)", r"`\1`", escaped)  # braces are attributes in the Markdown of the site
