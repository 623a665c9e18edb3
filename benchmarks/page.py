"""Measure the page of `grounded-sam-serve` in a browser: how soon it shows something, and how long a slider takes.

    python benchmarks/page.py [--masks 100] [--size 1800 1200]

Needs Chromium and playwright. The server runs in a process of its own, with the small models on the CPU.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.shapes.scenes import make_crowded_scene
from grounded_sam.structures.masks import encode_rle

#: Give the page candidates as the server does, and step the slider of the score.
STEPS = """async ([answer, steps]) => {
    const view = groundedSam.views.try;
    const [width, height] = [answer.width, answer.height];
    const blank = Object.assign(document.createElement('canvas'), { width, height });
    view.picture = { id: '0', name: 'benchmark.png', width, height };
    view.objects.clear(width, height);
    view.viewer.setPicture(blank, width, height);
    let started = performance.now();
    const { fromRle } = await import('/static/app/rle.js');
    for (const object of answer.objects) fromRle(object.mask);
    const decoding = performance.now() - started;
    view.take(answer);
    const input = document.getElementById('slider-score');
    const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    const [scripts, frames, shown] = [[], [], []];
    for (let i = 0; i < steps; i++) {
        await frame();
        input.value = 0.1 + (0.8 * (i % 40)) / 40;
        started = performance.now();
        input.dispatchEvent(new Event('input'));
        scripts.push(performance.now() - started);
        await frame();
        frames.push(performance.now() - started);
        shown.push(view.objects.list().length);
    }
    return { decoding, scripts, frames, shown };
}"""


def make_masks(count: int, size: tuple[int, int]) -> list[NDArray[np.bool_]]:
    """Return masks of shapes at random places, scaled up to a size."""
    import cv2

    rng, masks = np.random.default_rng(5), list[NDArray[np.bool_]]()
    while len(masks) < count:
        for mask in make_crowded_scene(rng).masks:
            masks.append(cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(bool))
    return masks[:count]


def make_answer(count: int, size: tuple[int, int]) -> dict[str, Any]:
    """Return an answer of /v1/predict with that many candidates."""
    width, height = size
    rng, objects = np.random.default_rng(6), []
    names = [f"class {i}" for i in range(6)]
    for i, (mask, score) in enumerate(zip(make_masks(count, size), -np.sort(-rng.random(count)), strict=True)):
        ys, xs = np.nonzero(mask)
        box = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
        entry = {"id": i, "class": names[i % 6], "score": round(float(score), 6), "box": box, "area": int(mask.sum())}
        objects.append({**entry, "mask": encode_rle(mask)})
    colors = ["#a351fb", "#ff4040", "#ffa1a0", "#ff7633", "#ffb633", "#d1d435"]
    answer = {"prediction": "0", "picture": "0", "width": width, "height": height, "classes": names, "colors": colors}
    return {**answer, "class_score": {}, "min_score": 0.05, "selected": [], "objects": objects}


def start_server() -> tuple[subprocess.Popen[str], str, float]:
    """Start the server; return its process, its address, and when it was ready."""
    command = [sys.executable, "-m", "grounded_sam.cli.serve", "preset=shapes", "serve.port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    url = ""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://[\d.:]+", line):
            url = found[0]
        if line.startswith("Ready"):
            return process, url, time.monotonic()
    sys.exit("the server did not start")


def until(page: Any, script: str) -> float:
    """Wait until a function in the page returns true, and return when."""
    while not page.evaluate(script):
        time.sleep(0.005)
    return time.monotonic()


def describe(name: str, values: list[float]) -> None:
    """Print median, 95th percentile and maximum in milliseconds."""
    low, high = np.percentile(values, [50, 95])
    print(f"{name:<44}{low:7.1f} ms median {high:7.1f} ms 95% {max(values):7.1f} ms at most")


def main() -> None:
    """Measure."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=int, default=100)
    parser.add_argument("--size", type=int, nargs=2, default=(1800, 1200), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--steps", type=int, default=120)
    arguments = parser.parse_args()
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        sys.exit("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1360, "height": 860})
        process, url, ready = start_server()
        try:
            page.goto(url)
            picture = until(
                page, "() => globalThis.groundedSam?.views.try.viewer.image !== null && !!globalThis.groundedSam"
            )
            found = until(page, "() => groundedSam.views.try.objects.list().length > 0")
            print(f"from ready until the example is shown {picture - ready:.2f} s, its objects {found - ready:.2f} s")
            answer = make_answer(arguments.masks, tuple(arguments.size))
            size = len(json.dumps(answer)) / 1000
            print(f"{arguments.masks} masks of {arguments.size[0]}x{arguments.size[1]} px: {size:.0f} kB of JSON")
            measured = page.evaluate(STEPS, [answer, arguments.steps])
            print(f"masks decoded in {measured['decoding']:.1f} ms; {max(measured['shown'])} shown at most")
            describe("a step of the slider, script and drawing", measured["scripts"])
            describe("until the frame after it", measured["frames"])
        finally:
            process.terminate()
            process.wait(30)
            browser.close()


if __name__ == "__main__":
    main()
