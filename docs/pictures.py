"""Make the pictures of the README and the site: `python docs/pictures.py [NAME ...]`.

All of them come from the models and images that are part of the package. `report`, `notebook` and `page` are
screenshots, for which chromium must be installed.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from grounded_sam import load
from grounded_sam.shapes.scenes import Scene, make_scene
from grounded_sam.structures.masks import encode_rle

FOLDER = Path(__file__).parent / "images"
DEMO = Path(__file__).parents[1] / "grounded_sam" / "shapes" / "examples" / "demo"
#: The masks of the small models have stray pixels.
CLEAN = ["segmenter.min_region_area=400", "segmenter.max_hole_area=400"]
TEXT = ["red circle", "blue square", "green star", "yellow triangle", "orange ring", "purple cross"]


@functools.cache
def model(*overrides: str) -> Any:
    """Return the small models."""
    return load("select.score=0.5", *CLEAN, *overrides, preset="shapes")


def run(*arguments: str, cwd: Path) -> None:
    """Run `grounded-sam`."""
    command = [str(Path(sys.executable).with_name("grounded-sam")), *arguments]
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def save(image: NDArray[np.uint8], name: str, width: int | None = None) -> None:
    """Write an image, reduced to a width."""
    picture = Image.fromarray(image)
    if width is not None and width < picture.width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    picture.save(FOLDER / name, optimize=True, quality=90)


def mosaic(rows: Sequence[Sequence[NDArray[np.uint8]]], gap: int = 16) -> NDArray[np.uint8]:
    """Put images of one size into a grid with white gaps."""
    height, width = rows[0][0].shape[:2]
    size = (len(rows) * (height + gap) - gap, len(rows[0]) * (width + gap) - gap, 3)
    canvas = np.full(size, 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            y, x = i * (height + gap), j * (width + gap)
            canvas[y : y + height, x : x + width] = image
    return canvas


def hero(_: Path) -> None:
    """Draw the four images of the demo."""
    drawn = [model().segment(DEMO / f"scene-{number}.png", TEXT).plot(boxes=False) for number in (1, 2, 3, 4)]
    save(mosaic([drawn[:2], drawn[2:]]), "hero.webp", 1280)


def demo(_: Path) -> None:
    """Draw the first image of the demo."""
    save(model().segment(DEMO / "scene-1.png", TEXT).plot(), "demo.webp", 720)


def clip(_: Path) -> None:
    """Draw every second frame of the clip of the demo."""
    frames = []
    for result in model().track(str(DEMO / "clip.mp4"), TEXT):
        if result.frame.index % 2 == 0:
            drawn = Image.fromarray(result.detections.plot(boxes=False))
            frames.append(drawn.resize((540, 360), Image.Resampling.LANCZOS))
    options: dict[str, Any] = {"duration": 83, "loop": 0, "quality": 80, "method": 6}
    frames[0].save(FOLDER / "clip.webp", save_all=True, append_images=frames[1:], **options)


def tiles(_: Path) -> None:
    """Search an image of small objects as a whole and in tiles."""
    pairs = [("red", "circle"), ("blue", "square"), ("yellow", "star"), ("orange", "triangle")]
    scene = make_scene(np.random.default_rng(14), pairs, count=30, size_hw=(800, 1000), diameter=(0.045, 0.07))
    options, names = {"boxes": False, "labels": False, "opacity": 0.7}, [" ".join(pair) for pair in pairs]
    drawn = [
        model("segmenter.min_region_area=0", "segmenter.max_hole_area=0", *size).segment(scene.image, names)
        for size in ((), ("tiles.size=300",))
    ]
    print("tiles:", *(f"{len(found)} of {len(scene.pairs)}" for found in drawn))
    save(mosaic([[found.plot(**options) for found in drawn]]), "tiles.png", 1280)


def report(folder: Path) -> None:
    """Take a screenshot of the report of the demo's images."""
    for path in DEMO.glob("*.png"):
        shutil.copy(path, folder)
    run("preset=[demo,label]", "input=*.png", *CLEAN, "output=labels", cwd=folder)
    screenshot(folder / "labels" / "report.html", "report.png", (1200, 900))


def sweep(folder: Path) -> None:
    """Plot a sweep over score thresholds."""
    names = write_labeled_scenes(folder, 24)
    values = "select.score=0.05,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8"
    settings = ["preset=shapes", f"text=[{','.join(names)}]", "truth=truth.json", "sink=metrics", values]
    run("-m", *settings, "input=scenes", "metric=at_threshold.f1", "output=sweep", cwd=folder)
    save(np.asarray(Image.open(folder / "sweep" / "sweep.png").convert("RGB")), "sweep.png", 1000)


def mistakes(folder: Path) -> None:
    """Draw the image with the most mistakes of the demo, with thresholds that are wrong on purpose."""
    thresholds = ["select.score=0.05", "select.nms=0.9", "select.class_score={red circle: 0.99, blue square: 0.9}"]
    settings = ["preset=demo", "source=images", "truth=builtin:demo", "sink=metrics", "sink.metrics.errors=1"]
    run(*settings, *CLEAN, *thresholds, "output=metrics", cwd=folder)
    path = next((folder / "metrics" / "errors").iterdir())
    save(np.asarray(Image.open(path)), "mistakes.jpg", 640)


def notebook(folder: Path) -> None:
    """Take a screenshot of a notebook with a result."""
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter

    shutil.copy(DEMO / "scene-1.png", folder)
    lines = [
        "from grounded_sam import load\n",
        'model = load(preset="shapes")',
        'model.segment("scene-1.png", ["red circle", "green star"])',
    ]
    cells = [nbformat.v4.new_code_cell("\n".join(lines))]
    executed = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(executed, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in executed.cells:  # warnings name folders of this machine
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    html, _ = HTMLExporter(template_name="lab", embed_images=True).from_notebook_node(executed)
    (folder / "notebook.html").write_text(html, encoding="utf-8")
    screenshot(folder / "notebook.html", "notebook.png", (1100, 860))


def page(folder: Path) -> None:
    """Take screenshots of the four views of the server's page."""
    from playwright.sync_api import sync_playwright

    names = write_labeled_scenes(folder, 24)
    settings = ["preset=shapes", "input=scenes", f"text=[{','.join(names)}]", *CLEAN]
    run(*settings, "select.score=0.2", "sink=store", "output=labels", cwd=folder)
    run("-m", *settings, "sink=coco", "output=sweep", "select.score=0.3,0.75", cwd=folder)
    options = ["serve.port=0", "serve.roots=[.]", "serve.stores={scenes: labels}", "serve.sweeps={scores: sweep}"]
    command = [sys.executable, "-m", "grounded_sam.cli.serve", "preset=shapes", *CLEAN, *options]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    url = ""
    try:
        with sync_playwright() as playwright:
            path = find_browser()
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            shown = browser.new_page(viewport={"width": 1280, "height": 800})
            shown.set_default_timeout(600_000)
            assert server.stdout is not None
            for line in server.stdout:
                url = found[0] if (found := re.search(r"http://[\d.:]+", line)) else url
                if line.startswith("Ready"):
                    break
            shown.goto(url)
            for view in (show_try, show_video, show_browse, show_compare):
                view(shown)
                shown.wait_for_timeout(500)
                target = folder / "view.png"
                shown.screenshot(path=target)
                save(np.asarray(Image.open(target).convert("RGB")), f"{view.__name__.replace('show_', 'page-')}.webp")
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


def show_try(shown: Any) -> None:
    """Show what is found in the first example, with one object chosen."""
    shown.locator(".objects li").nth(4).wait_for()
    shown.get_by_role("button", name="Choose").nth(4).click()


def show_video(shown: Any) -> None:
    """Show the clip of the demo with its lanes."""
    shown.click("#tab-video")
    shown.get_by_text("Press Track").wait_for()
    shown.get_by_role("button", name="Track", exact=True).click()
    shown.get_by_text(re.compile(r"lanes in \d+ frames")).wait_for()
    shown.get_by_role("slider", name="Frame").fill("40")
    shown.locator(".lane .choose").first.click()


def show_browse(shown: Any) -> None:
    """Show the pictures of a store after some verdicts."""
    shown.click("#tab-browse")
    for key in "aaaraaaaaraaaa":
        shown.locator(".verdict").wait_for()
        shown.keyboard.press(key)
        shown.wait_for_timeout(400)


def show_compare(shown: Any) -> None:
    """Show two jobs of a sweep."""
    shown.click("#tab-compare")
    shown.locator("#compared-0").wait_for()


def write_labeled_scenes(folder: Path, count: int) -> list[str]:
    """Write scenes to `scenes/` and their labels to `truth.json`; return the names of their classes."""
    scenes: list[Scene] = [
        make_scene(np.random.default_rng([77, i]), count=5, size_hw=(320, 420)) for i in range(count)
    ]
    names = sorted({" ".join(pair) for scene in scenes for pair in scene.pairs})
    (folder / "scenes").mkdir()
    images, annotations = [], []
    for i, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(folder / "scenes" / f"{i:02}.png")
        images.append({"id": i + 1, "file_name": f"{i:02}.png", "width": 420, "height": 320})
        for pair, mask, (x1, y1, x2, y2) in zip(scene.pairs, scene.masks, scene.xyxy.tolist(), strict=True):
            ids = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": names.index(" ".join(pair)) + 1}
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(mask.sum()), "iscrowd": 0}
            annotations.append({**ids, **box, "segmentation": encode_rle(mask)})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(truth))
    return names


def screenshot(page: Path, name: str, size: tuple[int, int]) -> None:
    """Take a screenshot of a page with chromium."""
    browser = find_browser()
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        options += ["--disable-background-networking", "--no-first-run", "--virtual-time-budget=5000"]
        target = Path(profile) / "page.png"
        options += [f"--window-size={size[0]},{size[1]}", f"--screenshot={target}", page.resolve().as_uri()]
        subprocess.run([browser, *options], check=True, capture_output=True)
        save(np.asarray(Image.open(target).convert("RGB")), name)


def find_browser() -> str:
    """Return the path of chromium."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("chromium is not installed, which screenshots need")
    return browser


PICTURES: dict[str, Callable[[Path], None]] = {
    function.__name__: function for function in (hero, demo, clip, tiles, report, sweep, mistakes, notebook, page)
}


def main() -> None:
    """Make the pictures that are named, or all."""
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        with tempfile.TemporaryDirectory() as folder:
            PICTURES[name](Path(folder))
        print(*sorted(FOLDER.glob(f"{name}[.-]*")))


if __name__ == "__main__":
    main()
