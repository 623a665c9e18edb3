"""A real Label Studio, a real browser: projects, predictions, smart clicks, videos, and labels that come back."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from command import run_command
from serving import until

from grounded_sam.cli.label_studio import create_projects, parse_options
from grounded_sam.formats.label_studio import read_region
from grounded_sam.formats.store_rows import StoreRows
from grounded_sam.media.mp4 import Mp4Writer
from grounded_sam.serve.label_studio.client import LabelStudioClient
from grounded_sam.shapes.examples import FPS, demo_clip, demo_images

pytestmark = pytest.mark.label_studio
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "grounded_sam" / "shapes" / "examples" / "demo"
USER, PASSWORD, TOKEN = "a@b.co", "a-password-1", "0123456789abcdef0123456789abcdef01234567"
WORDS = ["red circle", "blue square", "green star", "yellow triangle", "orange ring", "purple cross"]
FRAMES = 12


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextmanager
def process(command: list[str], folder: Path, environment: dict[str, str], name: str):
    """Run a command until the end of the block; its output is in a file of its name."""
    with (folder / f"{name}.log").open("ab") as log:
        started = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield started
        finally:
            started.terminate()
            try:
                started.wait(60)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait(30)


@pytest.fixture(scope="module")
def chromium() -> str:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("chromium is not installed")
    return path


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """Start a Label Studio that serves a folder; a first start takes minutes."""
    program = os.environ.get("GROUNDED_SAM_LABEL_STUDIO") or shutil.which("label-studio")
    if not program or not Path(program).is_file():
        pytest.skip("Label Studio is not installed; set GROUNDED_SAM_LABEL_STUDIO to its command label-studio")
    folder, root = tmp_path_factory.mktemp("label-studio"), tmp_path_factory.mktemp("root")
    port = free_port()
    environment = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder),
        "LOCAL_FILES_SERVING_ENABLED": "true",
        "LOCAL_FILES_DOCUMENT_ROOT": str(root),
        "ML_BLOCK_LOCAL_IP": "false",
        "USE_DEFAULT_BANNED_SUBNETS": "false",
        "COLLECT_ANALYTICS": "false",
        "PYTHONPATH": "",
    }
    options = ["--no-browser", "--port", str(port), "--username", USER, "--password", PASSWORD]
    options += ["--user-token", TOKEN, "--enable-legacy-api-token"]
    with process([program, "start", *options], folder, environment, "label-studio"):
        client = LabelStudioClient(f"http://127.0.0.1:{port}", TOKEN)
        until(lambda: _answers(client), 900)
        yield SimpleNamespace(client=client, address=client.address, root=root, folder=folder)


def _answers(client) -> bool:
    try:
        return bool(client.call("GET", "/api/current-user/whoami")["id"])
    except Exception:
        return False


@pytest.fixture(scope="module")
def labels(studio) -> Path:
    """Store what is found in a scene and in a short clip."""
    photos = studio.root / "photos"
    photos.mkdir()
    shutil.copy(DEMO / "scene-1.png", photos)
    video = Mp4Writer(photos / "clip.mp4", crf=24)
    for t, scene in zip(range(FRAMES), demo_clip(), strict=False):
        video.write(scene.image, t / FPS)
    video.close()
    words = [
        "preset=shapes",
        f"input={photos}",
        f"text=[{','.join(WORDS)}]",
        f"output={studio.root}/labels",
        "sink=store",
    ]
    result = run_command("grounded_sam.cli.main", words, studio.root)
    assert result.returncode == 0, result.stderr
    return studio.root / "labels"


class Backend:
    """`grounded-sam-serve` as a process that can be restarted.

    Args:
        studio: Label Studio.
        labels: The store.
    """

    def __init__(self, studio, labels) -> None:
        self.studio, self.port = studio, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "grounded_sam.cli.serve", "preset=shapes", f"serve.port={self.port}"]
        self._command += [f"serve.roots=[{studio.root}]", f"serve.stores={{labels: {labels}}}"]
        self._command += [f"serve.label_studio={studio.address}"]

    @contextmanager
    def running(self):
        import httpx

        environment = {"LABEL_STUDIO_API_KEY": TOKEN, "PYTHONPATH": str(ROOT)}
        with process(self._command, self.studio.folder, environment, "serve"):
            until(lambda: httpx.get(f"{self.address}/ready").status_code == 200)
            yield


@pytest.fixture(scope="module")
def backend(studio, labels) -> Backend:
    return Backend(studio, labels)


@pytest.fixture(scope="module")
def projects(studio, labels, backend, request):
    """Make the projects with the command, and return the ids of that of the images and that of the videos."""
    os.environ["LABEL_STUDIO_API_KEY"] = TOKEN
    request.addfinalizer(lambda: os.environ.pop("LABEL_STUDIO_API_KEY"))
    words = ["create", str(labels), "--url", studio.address, "--backend", backend.address, "--root", str(studio.root)]
    with backend.running():
        addresses = create_projects(parse_options(words))
        yield [int(address.split("/")[-2]) for address in addresses]


@pytest.fixture
def page(studio, chromium):
    """Return a page of somebody who is logged in."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(f"{studio.address}/user/login")
        page.fill("input[name=email]", USER)
        page.fill("input[name=password]", PASSWORD)
        page.click("button[type=submit]")
        page.wait_for_url(lambda url: "login" not in url)
        yield page
        browser.close()


def tasks_of(studio, project):
    return studio.client.call("GET", f"/api/tasks?project={project}&fields=all")["tasks"]


def open_task(page, studio, project, task, ready):
    page.goto(f"{studio.address}/projects/{project}/data?task={task}")
    page.wait_for_function(f"window.Htx?.annotationStore?.selected && ({ready})")


def click_on(page, x, y):
    """Click on a point of the scene, in pixels of the picture."""
    box = page.evaluate(
        """() => {
            const image = Htx.annotationStore.selected.names.get('image');
            const content = image.stageRef.content.getBoundingClientRect();
            return [content.x, content.y, image.stageWidth, image.stageHeight];
        }"""
    )
    height, width = demo_images()[0].image.shape[:2]
    at = box[0] + x / width * box[2], box[1] + y / height * box[3]
    page.mouse.move(at[0] - 4, at[1] - 4)
    page.mouse.move(*at)
    page.mouse.down()
    page.wait_for_timeout(100)
    page.mouse.up()


def smart_click(page, label, x, y):
    """Choose the smart point and a label, click, and wait for what comes back."""
    with page.expect_response(lambda answer: "interactive-annotating" in answer.url) as waiting:
        page.locator(".lsf-toolbar > *").last.hover()  # opens the list of the smart tools
        page.locator("[class*=tool_smart][aria-label=key-point-tool]").first.click()
        page.locator(".lsf-label", has_text=label).nth(1).click()
        click_on(page, x, y)
    return waiting.value.json()["data"]["result"]


def truth_of(color, shape):
    scene = demo_images()[0]
    return scene.masks[scene.pairs.index((color, shape))]


def overlap(result, truth) -> float:
    mask = read_region(result, truth.shape).mask
    return float((mask & truth).sum() / (mask | truth).sum())


def test_the_backend_is_connected_and_tasks_are_predicted_and_shown(studio, projects, page):
    project = projects[0]
    (backend,) = studio.client.call("GET", f"/api/ml?project={project}")
    assert backend["readable_state"] == "Connected" and backend["model_version"].startswith("grounded_sam-")
    chosen = {"selectedItems": {"all": True, "excluded": []}}
    studio.client.call("POST", f"/api/dm/actions?id=retrieve_tasks_predictions&project={project}", chosen)
    (task,) = tasks_of(studio, project)
    versions = {p["model_version"]: len(p["result"]) for p in task["predictions"]}
    assert len(versions) == 2 and backend["model_version"] in versions and all(versions.values())
    open_task(page, studio, project, task["id"], "Htx.annotationStore.selected.regions.length > 3")
    page.locator(".lsf-outliner-item").nth(3).wait_for()


def test_smart_clicks_before_and_after_a_restart(studio, labels, backend, projects, page):
    """The server of this test is another one than that of the projects, so that it can be restarted."""
    own = Backend(studio, labels)
    config = studio.client.call("GET", f"/api/projects/{projects[0]}")["label_config"]
    project = studio.client.call("POST", "/api/projects", {"title": "clicks", "label_config": config})["id"]
    folder = str(labels / "label_studio" / "images")
    storage = {"project": project, "path": folder, "title": "images", "use_blob_urls": True}
    studio.client.call("POST", "/api/storages/localfiles", storage)
    image = {"image": "/data/local-files/?d=labels/label_studio/images/scene-1.png"}
    studio.client.call("POST", f"/api/projects/{project}/import", [{"data": image}])
    (task,) = tasks_of(studio, project)
    ready = "Htx.annotationStore.selected.names.get('image')?.imageIsLoaded"
    circle, square = truth_of("red", "circle"), truth_of("blue", "square")
    with own.running():
        body = {"project": project, "url": f"{own.address}/label-studio", "title": "clicks", "is_interactive": True}
        studio.client.call("POST", "/api/ml", body)
        open_task(page, studio, project, task["id"], ready)
        page.wait_for_timeout(3000)  # predictions come when the task is opened
        page.evaluate("Htx.annotationStore.selected.deleteAllRegions()")
        page.get_by_text("Auto-Annotation", exact=True).first.click()
        page.get_by_text("Auto-Accept Suggestions", exact=True).first.click()
        ys, xs = np.nonzero(circle)
        (first,) = smart_click(page, "red circle", xs.mean(), ys.mean())
        assert overlap(first, circle) > 0.9
    with own.running():
        ys, xs = np.nonzero(square)
        (second,) = smart_click(page, "blue square", xs.mean(), ys.mean() + 40)
        assert overlap(second, square) > 0.8  # a corner of it is covered
        page.wait_for_function(
            "Htx.annotationStore.selected.regions.filter(r => r.type == 'polygonregion').length == 2"
        )
        with page.expect_response(lambda r: r.request.method == "POST" and "/annotations" in r.url):
            page.get_by_text("Submit", exact=True).first.click()
    (annotation,) = tasks_of(studio, project)[0]["annotations"]
    polygons = [r for r in annotation["result"] if r["type"] == "polygonlabels"]
    assert max(overlap(result, circle) for result in polygons) > 0.9


def test_a_video_prediction_is_on_the_timeline(studio, projects, page):
    project = projects[1]
    (task,) = tasks_of(studio, project)
    ready = "Htx.annotationStore.selected.regions.length > 3"
    open_task(page, studio, project, task["id"], ready)
    regions = page.evaluate("Htx.annotationStore.selected.regions.map(r => [r.type, r.sequence.length])")
    assert all(kind == "videorectangleregion" and keys >= 1 for kind, keys in regions)
    page.wait_for_function("Htx.annotationStore.selected.names.get('video').length > 1")
    length = page.evaluate("Htx.annotationStore.selected.names.get('video').length")
    assert abs(length - FRAMES) <= 1
    page.locator(".lsf-keypoints").nth(3).wait_for()
    assert page.locator(".lsf-keypoints__point").count() >= len(regions)


def test_an_annotation_comes_back_into_the_store_and_as_coco(studio, labels, projects, page):
    (task,) = tasks_of(studio, projects[0])
    found = next(p for p in task["predictions"] if not p["model_version"].startswith("grounded_sam-"))["result"]
    results = [{**result, "origin": "prediction"} for result in found]
    rejected = results.pop()
    studio.client.call("POST", f"/api/tasks/{task['id']}/annotations/", {"result": results})

    def statuses():
        store = StoreRows(labels / "store")
        ((_, rows),) = store.rows(store.key_of_name("scene-1.png"))
        return {row["object_id"]: row["status"] for row in rows}

    until(lambda: set(statuses().values()) == {"accepted", "rejected"}, 30)
    assert statuses()[rejected["id"].removesuffix("-polygon")] == "rejected"

    content = io.BytesIO()
    url = f"{studio.address}/api/projects/{projects[0]}/export?exportType=COCO&download_all_tasks=false"
    studio.client.download(url, content, 1 << 30)
    with zipfile.ZipFile(content) as archive:
        exported = json.loads(archive.read("result.json"))
    coco = studio.root / "exported.json"
    coco.write_text(json.dumps(exported))
    words = ["source=coco", f"input={coco}", f"source.images={studio.root}/photos", "detector=stored", "segmenter=none"]
    words += [f"output={studio.root}/back", "sink=coco"]
    result = run_command("grounded_sam.cli.main", words, studio.root)
    assert result.returncode == 0, result.stderr
    back = json.loads((studio.root / "back" / "annotations.json").read_text())
    names = {category["id"]: category["name"] for category in back["categories"]}
    wanted = sorted(r["value"]["polygonlabels"][0] for r in results)
    assert sorted(names[a["category_id"]] for a in back["annotations"]) == wanted
