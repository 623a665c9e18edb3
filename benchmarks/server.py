"""The server: seconds until it answers, memory over many requests, and seconds of a decision in a large store.

    python benchmarks/server.py
    python benchmarks/server.py --predictions 100 --sessions 20 --pictures 500

It starts `grounded-sam-serve preset=shapes`, with a store of random boxes, and talks to it over HTTP. Each
prediction is of another scene. Memory is the resident memory of the server, read from /proc (Linux).
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from grounded_sam import Pipeline, Vocabulary
from grounded_sam.pipeline.runner import Runner
from grounded_sam.pipeline.select import Select
from grounded_sam.shapes.scenes import make_scene
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sources.images import ImageSource
from grounded_sam.structures.detections import make_detections

WORDS = Vocabulary.parse(["green star", "red circle", "blue square", "yellow triangle"])


class RandomBoxes:
    """A detector that finds ten random boxes in each image."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def detect(self, frames, vocabulary):
        """Return ten boxes of each frame."""
        return [self._detect(frame, vocabulary) for frame in frames]

    def _detect(self, frame, vocabulary):
        corners = self.rng.uniform(0, 60, (10, 2))
        boxes = np.concatenate([corners, corners + self.rng.uniform(5, 30, (10, 2))], 1)
        scores, class_ids = self.rng.uniform(0.05, 0.95, 10), self.rng.integers(0, len(vocabulary), 10)
        return make_detections(boxes, scores, class_ids, vocabulary, frame.size_hw)


def make_store(folder: Path, count: int) -> None:
    """Write a store of random boxes in small pictures."""
    photos = folder / "photos"
    photos.mkdir()
    for i in range(count):
        Image.new("RGB", (96, 96), (i % 256, i // 256, 80)).save(photos / f"{i}.png")
    model = Pipeline(RandomBoxes(), None, vocabulary=WORDS, select=Select(score=0.0, nms=None))
    Runner(model, ImageSource(photos), [StoreSink(folder / "labels", WORDS)], folder / "labels").run()


def memory(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def until(condition: Callable[[], bool], seconds: float = 600) -> float:
    """Wait until a condition holds; return the seconds that it took."""
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        with suppress(httpx.TransportError):
            if condition():
                return time.perf_counter() - start
        time.sleep(0.02)
    raise SystemExit("the server does not answer")


def timed(ask: Callable[[], httpx.Response]) -> float:
    """Return the seconds of a request that must succeed."""
    start = time.perf_counter()
    ask().raise_for_status()
    return time.perf_counter() - start


def measure_memory(http: httpx.Client, pid: int, predictions: int, sessions: int) -> None:
    """Print the memory of the server during predictions and sessions."""
    print(f"| requests | MB |\n|---|---|\n| none | {memory(pid):.0f} |")
    for number in range(predictions):
        scene = make_scene(np.random.default_rng([5, number]), count=4, size_hw=(240, 320))
        content = io.BytesIO()
        Image.fromarray(scene.image).save(content, "PNG")
        picture = http.post("/v1/pictures", files={"file": ("a.png", content.getvalue())}).json()["id"]
        http.post("/v1/predict", json={"picture": picture, "text": list(WORDS.classes)}).raise_for_status()
        if (number + 1) % max(1, predictions // 5) == 0:
            print(f"| {number + 1} predictions | {memory(pid):.0f} |", flush=True)
    for number in range(sessions):
        session = http.post("/v1/sessions", json={"picture": picture}).json()["id"]
        prompts = {"prompts": [{"points": [[160, 120]]}]}
        http.post(f"/v1/sessions/{session}/segment", json=prompts).raise_for_status()
        http.delete(f"/v1/sessions/{session}")
        if (number + 1) % max(1, sessions // 2) == 0:
            print(f"| {number + 1} sessions | {memory(pid):.0f} |", flush=True)


def measure_review(http: httpx.Client, pictures: int) -> None:
    """Print how long the routes of a review take."""
    url = "/v1/stores/labels"
    print(f"\n| a store of {pictures:,} pictures and {10 * pictures:,} objects | s |\n|---|---|")
    print(f"| first page, which reads the store | {timed(lambda: http.get(f'{url}/pictures')):.2f} |")
    print(f"| next 50, the first time | {timed(lambda: http.get(f'{url}/next')):.2f} |")
    decided = http.get(f"{url}/next", params={"count": 100}).json()["objects"]
    seconds = []
    for number, entry in enumerate(decided):
        edit = {"action": ("accept", "reject")[number % 2], "object_id": entry["object_id"]}
        seconds.append(timed(lambda edit=edit: http.post(f"{url}/edits", json={"edits": [edit]})))
    print(f"| a decision, median and longest of {len(seconds)} | {np.median(seconds):.3f}, {max(seconds):.3f} |")
    print(f"| next 50, after them | {timed(lambda: http.get(f'{url}/next')):.2f} |")
    print(f"| a page of what is left | {timed(lambda: http.get(f'{url}/pictures?unreviewed=true')):.3f} |")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=int, default=500)
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--pictures", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_store(folder, arguments.pictures)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        settings = ["preset=shapes", f"serve.port={port}", f"serve.roots=[{folder}]"]
        command = [sys.executable, "-m", "grounded_sam.cli.serve", *settings]
        server = subprocess.Popen([*command, f"serve.stores={{labels: {folder}/labels}}"], cwd=folder)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as http:
                health = until(lambda: http.get("/health").status_code == 200)
                ready = health + until(lambda: http.get("/ready").status_code == 200)
                page = timed(lambda: http.get("/"))
                print(f"answers after {health:.1f} s, ready after {ready:.1f} s, the page in {1e3 * page:.0f} ms\n")
                measure_memory(http, server.pid, arguments.predictions, arguments.sessions)
                measure_review(http, arguments.pictures)
        finally:
            server.terminate()
            server.wait(30)


if __name__ == "__main__":
    main()
