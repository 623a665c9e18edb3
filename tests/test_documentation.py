"""README and site: examples run, commands compose, choices are named, links lead somewhere, messages exist."""

from __future__ import annotations

import ast
import html.parser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from grounded_sam.config.compose import compose

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DEMO = ROOT / "grounded_sam" / "shapes" / "examples" / "demo"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NAMES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
RUN = re.compile(r"^<!-- run -->\n```(\w+)\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r'^```\w+ title="(\S+)"\n(.*?)^```$', re.M | re.S)
OUTPUT = re.compile(r"^<!-- output -->\n```\n(.*?)^```$", re.M | re.S)
BLOCK = re.compile(r"^( *)```(?:bash|sh)?\n(.*?)^ *```$", re.M | re.S)


def runnable() -> list[tuple[str, str, str]]:
    """Return page, language and code of the examples that are marked to be run, joined per page and language."""
    found: dict[tuple[str, str], str] = {}
    for name, text in NAMES.items():
        for language, code in RUN.findall(text):
            found[name, language] = found.get((name, language), "") + code
    return [(name, language, code) for (name, language), code in found.items()]


RUNNABLE = runnable()


def test_the_pages_have_examples_that_run():
    assert {"README.md", "docs/guides/python.md", "docs/guides/custom-stages.md"} <= {name for name, _, _ in RUNNABLE}


@pytest.mark.parametrize(("name", "language", "code"), RUNNABLE, ids=[f"{n}-{lang}" for n, lang, _ in RUNNABLE])
def test_examples_run(name, language, code, tmp_path):
    for path, content in FILE.findall(NAMES[name]):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content, encoding="utf-8")
    for path in DEMO.iterdir():
        shutil.copy(path, tmp_path)
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert process.returncode == 0, process.stderr
    for expected in OUTPUT.findall(NAMES[name]):
        assert_contains(process.stdout, expected)
    if name == "README.md":
        assert "green star" in process.stdout and process.stdout.count("blue square") == 6
        assert Image.open(tmp_path / "drawn.png").size == (960, 640)
    if name == "docs/guides/custom-stages.md" and language == "bash":
        assert "Processed 1 image: 1 bright" in process.stdout
        assert len(list((tmp_path / "bright" / "overlay").iterdir())) == 1


def assert_contains(printed: str, expected: str) -> None:
    """Check that expected lines were printed, with numbers that may differ by 2% between machines."""
    number = re.compile(r"\d+(?:\.\d+)?")
    place = [" ".join(number.sub("0", line).split()) for line in printed.splitlines()]
    wanted = [" ".join(number.sub("0", line).split()) for line in expected.splitlines()]
    starts = [i for i in range(len(place)) if place[i : i + len(wanted)] == wanted]
    assert starts, f"{expected!r} is not in {printed!r}"
    lines = "\n".join(printed.splitlines()[starts[0] : starts[0] + len(wanted)])
    assert [float(n) for n in number.findall(lines)] == pytest.approx(
        [float(n) for n in number.findall(expected)], rel=0.02, abs=2
    )


def commands() -> list[str]:
    """Return all calls of `grounded-sam` in the pages, the lines of each joined."""
    found = []
    for text in NAMES.values():
        for _, block in BLOCK.findall(text):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line.strip() for line in lines if line.strip().startswith("grounded-sam ")]
    return sorted(set(found))


COMMANDS = commands()


def first_job(override: str) -> str:
    """Return an override with the first of the values that a sweep would take."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    value = next(iter(parsed.sweep_string_iterator())) if parsed.is_choice_sweep() or parsed.is_range_sweep() else "0.5"
    return f"{parsed.get_key_element()}={value}"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_pages_compose(command):
    words = [word for word in shlex.split(command, comments=True)[1:] if word not in ("-m", "--help")]
    if "--config-dir" in words:  # choices of the user's own, which exist only in the example
        place = words.index("--config-dir")
        words = [word for word in words[:place] + words[place + 2 :] if word.startswith(("input", "text", "output"))]
    # Launchers and sweepers are plugins, whose extras may not be installed.
    words = [word for word in words if not word.lstrip("+").startswith(("hydra.", "hydra/"))]
    compose([first_job(word) for word in words if "slurm" not in word])


def test_there_are_many_commands():
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("page", ["README.md", "docs/reference/stages.md"])
def test_every_choice_is_named(page):
    for group in ("detector", "segmenter", "verify", "tracker", "source", "sink", "preset", "sweep"):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert f"`{path.stem}`" in NAMES[page], f"{group}={path.stem}"


def test_messages_of_the_troubleshooting_page_exist():
    """A message on the page is one of the package, with three dots in place of names and values."""
    strings = []
    for path in (ROOT / "grounded_sam").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr | ast.Constant) and not isinstance(getattr(node, "value", ""), bytes):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                strings.append("…".join(str(p.value) if isinstance(p, ast.Constant) else "" for p in parts))
    messages = re.findall(r"^\| `([^`]+)` \|", NAMES["docs/troubleshooting.md"], re.M)
    assert len(messages) > 35
    for message in messages:
        fragments = [part.strip(" :()") for part in message.split("...") if part.strip(" :()")]
        assert any(all(part in text for part in fragments) for text in strings), message


def anchors_of(text: str) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and MkDocs make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_files_outside_of_the_site_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith("https://"):
            continue
        assert (ROOT / (path or name)).is_file(), target
        assert not anchor or anchor in anchors_of((ROOT / (path or name)).read_text(encoding="utf-8")), target


def test_the_readme_renders_and_is_short():
    from readme_renderer.markdown import render

    page = render(NAMES["README.md"])
    assert page is not None and "<table>" in page and page.count("<img") == 3
    assert len(NAMES["README.md"].splitlines()) <= 160


def test_pictures_are_small_and_all_are_shown():
    pictures = list((DOCS / "images").iterdir())
    shown = "".join(NAMES.values())
    assert {path.name for path in pictures} == set(re.findall(r"images/([\w.-]+)", shown))
    assert all(path.stat().st_size < 600_000 for path in pictures)
    assert sum(path.stat().st_size for path in pictures) < 2_000_000


def test_what_users_process_is_an_image_in_all_texts():
    """A picture is a name in the API alone."""
    texts = {name: re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S) for name, text in NAMES.items()}
    for path in [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "grounded_sam" / "serve" / "page").rglob("*.html")]:
        texts[str(path)] = re.sub(r"data-part=\S+|class=\S+", "", path.read_text(encoding="utf-8"))
    for path in (ROOT / "grounded_sam").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        strings = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        texts[str(path)] = "\n".join(string for string in strings if " " in string)
    for path in (ROOT / "grounded_sam" / "serve" / "page").rglob("*.js"):
        strings = re.findall(r'"[^"\n]*"', path.read_text(encoding="utf-8"))
        texts[str(path)] = "\n".join(string for string in strings if " " in string)
    for name, given in texts.items():
        text = re.sub(r"`[^`]*`|/v1/\S*", "", given)
        found = re.search(r"(?<![\w/-])pictures?(?![\w.])", text, re.I)
        assert not found, f"{name}: {text[max(0, found.start() - 40) : found.end() + 40]!r}"


class _Page(html.parser.HTMLParser):
    """Collect what a browser would load with a page, where its links lead, and the places in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.resources: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.add(values.get("id") or "")
        if tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.resources.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.resources.append(values["href"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])


def test_the_site_builds_and_needs_no_network(tmp_path):
    """Links, anchors and references are checked while it is built: warnings are errors."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    # A server returns 404.html at any address, so that its links are absolute.
    pages = {path.resolve(): _Page(path) for path in tmp_path.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 25
    for path, page in pages.items():
        for url in page.resources:
            assert not url.startswith(("http:", "https:", "//")), f"{path.name} loads {url}"
            assert (path.parent / url.split("?")[0].split("#")[0]).is_file(), f"{path.name} loads {url}"
        for url in page.links:
            if url.startswith(("http:", "https:")):
                continue
            target, _, anchor = urllib.parse.unquote(url).partition("#")
            other = (path.parent / target).resolve() if target else path
            assert other.is_file(), f"{path.name} links to {url}"
            assert not anchor or other not in pages or anchor in pages[other].ids, f"{path.name} links to {url}"
    config = (tmp_path / "reference" / "config.html").read_text(encoding="utf-8")
    for key in ("select.max_ios", "tracker.prompt", "sink.overlay.opacity", "track.max_lost_frames"):
        assert f"<code>{key}</code>" in config
    assert (
        "with_nms" not in (tmp_path / "reference" / "api.html").read_text(encoding="utf-8").split("ImageDetections")[0]
    )


def test_examples_of_files_have_the_keys_of_the_files(tmp_path):
    blocks = re.findall(r"^```json\n(.*?)^```$", NAMES["docs/reference/sinks.md"], re.M | re.S)
    line, annotation = (json.loads(block) for block in blocks)
    options = ["preset=demo", f"input={DEMO / 'scene-3.png'}", "sink=[jsonl,coco,yolo,masks]", f"output={tmp_path}"]
    subprocess.run([sys.executable, "-m", "grounded_sam.cli.main", *options], check=True, capture_output=True)
    written = json.loads((tmp_path / "results.jsonl").read_text())
    assert {*written} == {*line} and {*written["objects"][0]} == {*line["objects"][0]}
    assert {*json.loads((tmp_path / "annotations.json").read_text())["annotations"][0]} == {*annotation}
    assert (tmp_path / "masks" / "scene-3.png" / "001_blue square.png").exists()
    assert "\n1 0." in (tmp_path / "yolo" / "labels" / "train" / "scene-3.txt").read_text()
