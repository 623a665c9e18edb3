"""Stores over HTTP: what is listed, what people decide, and what is left of it in the store."""

from __future__ import annotations

import io
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fakes import CLASSES, Fill, Halves
from PIL import Image
from serving import running
from test_review import exported, label, objects, track, tracks
from test_store import clip

from grounded_sam import Pipeline
from grounded_sam.cli.review import run_next
from grounded_sam.formats.review_list import read_review_list
from grounded_sam.formats.store_edits import ACTIONS, Edit, StoreEditor
from grounded_sam.formats.store_schema import STATUSES
from grounded_sam.serve.open_store import OpenStore
from grounded_sam.serve.schemas import EditItem
from grounded_sam.serve.store_pictures import PictureFilter, Status
from grounded_sam.structures.masks import encode_rle

for package in ("fastapi", "uvicorn", "python_multipart", "httpx"):
    pytest.importorskip(package, reason="the extra `serve`, or httpx, is not installed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, scenes) -> Path:
    """Return a folder with a store of four images, and one of a clip."""
    root = tmp_path_factory.mktemp("stores")
    (root / "photos" / "sub").mkdir(parents=True)
    (root / "clips").mkdir()
    for i, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(root / "photos" / ("sub" if i > 1 else "") / f"{i}.png")
    label(root / "photos", root / "labels")
    clip(root / "clips" / "a.mkv")
    track(root / "clips", root / "tracked")
    for name in ("labels", "tracked"):
        shutil.copytree(root / name, root / f"{name}-before")
    return root


@pytest.fixture(scope="module")
def served(folders):
    """Serve the stores, with models that are none."""
    model = Pipeline(Halves(), Fill(), vocabulary=CLASSES)
    stores = f"serve.stores={{scenes: {folders}/labels, clips: {folders}/tracked}}"
    with running(f"serve.roots=[{folders}]", stores, load=lambda: model) as http:
        yield http


@pytest.fixture
def client(served, folders):
    """Return the client, with the stores as they were before any test."""
    for name in ("labels", "tracked"):
        shutil.rmtree(folders / name)
        shutil.copytree(folders / f"{name}-before", folders / name)
    return served


def pictures(client, store: str = "scenes", **query) -> list[dict]:
    answer = client.get(f"/v1/stores/{store}/pictures", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["pictures"]


def shown(client, picture: dict, store: str = "scenes") -> dict:
    return client.get(f"/v1/stores/{store}/pictures/{picture['id']}").json()


def edit(client, *edits: dict, store: str = "scenes", status: int = 200, **options) -> dict:
    answer = client.post(f"/v1/stores/{store}/edits", json={"edits": list(edits), "author": "ann", **options})
    assert answer.status_code == status, answer.text
    return answer.json()


def ids(client, number: int = 0) -> list[str]:
    """Return the ids of the objects of a picture: an `a` on the left, a `c` on the right."""
    return [entry["object_id"] for entry in shown(client, pictures(client)[number])["detections"]]


def test_the_names_of_requests_are_those_of_the_store():
    assert EditItem.model_fields["action"].annotation.__args__ == ACTIONS
    assert Status.__args__ == STATUSES


def test_each_decision_is_in_the_store_and_in_its_exports(client, folders, tmp_path):
    first, second, third, fourth = pictures(client)
    (left, right), mask = ids(client, 0), np.zeros((200, 260), bool)
    mask[10:30, 20:60] = True
    rle = encode_rle(mask)
    answer = edit(
        client,
        {"action": "accept", "object_id": left},
        {"action": "reject", "object_id": right, "looks_like": "hat"},
        {"action": "relabel", "object_id": ids(client, 1)[0], "class": "B"},
        {"action": "box", "object_id": ids(client, 2)[0], "box": [1, 2, 11, 22]},
        {"action": "mask", "object_id": ids(client, 2)[1], "mask": rle},
        {"action": "add", "picture": fourth["id"], "class": "dog", "new_class": True, "mask": [[5, 5, 25, 5, 25, 15]]},
        {"action": "add", "file": fourth["name"], "class": "a", "box": [0, 0, 9, 9]},
    )
    assert [item["edit"] for item in answer["applied"]] == list(range(7)) and answer["refused"] == []
    assert answer["applied"][0] == {"edit": 0, "action": "accept", "objects": [left]}
    assert {p["id"] for p in answer["pictures"]} == {p["id"] for p in (first, second, third, fourth)}
    statuses = {"predicted": 3, "accepted": 1, "rejected": 1, "edited": 3, "added": 2}
    assert answer["counts"] == {
        "statuses": statuses,
        "reviewed": 7,
        "unreviewed": 3,
        "reviewed_pictures": 2,
        "unreviewed_pictures": 2,
    }
    whole = shown(client, first)
    assert whole["statuses"] == {"accepted": 1, "rejected": 1} and whole["objects"] == len(whole["detections"]) == 1
    (kept,), (rejected,) = whole["detections"], whole["rejected"]
    assert (kept["object_id"], kept["status"], kept["author"]) == (left, "accepted", "ann")
    assert (rejected["object_id"], rejected["looks_like"], rejected["class"]) == (right, "hat", "c")
    assert kept["edited_at"].endswith("+00:00") and kept["mask"]["counts"]
    relabeled = shown(client, second)["detections"][0]
    assert (relabeled["class"], relabeled["predicted_class"], relabeled["status"]) == ("b", "a", "edited")
    assert shown(client, third)["detections"][1]["mask"] == {"size": [200, 260], "counts": rle["counts"]}
    page = client.get("/v1/stores/scenes/pictures").json()
    assert page["classes"] == ["a", "b", "c", "dog"] and page["counts"]["statuses"] == statuses
    boxes = {name: box for name, _, box in exported(folders / "labels", tmp_path / "out", "select.status=added")}
    assert boxes == {"sub/3.png": [0, 0, 9, 9]} or len(boxes) == 1
    assert ("0.png", "c") not in {(name, class_name) for name, class_name, _ in exported(folders / "labels", tmp_path)}


def test_what_cannot_be_decided_is_named(client):
    (left, right), picture = ids(client), pictures(client)[0]["id"]
    bad = [
        ({"action": "accept", "object_id": "5b39a3cc-000000000000"}, "no object '5b39a3cc-000000000000'"),
        ({"action": "accept", "object_id": f"{left[:8]}-0"}, f"0.png has {left}, {right}"),
        ({"action": "relabel", "object_id": left, "class": "x"}, "no class 'x'; its classes are 'a', 'b', 'c'"),
        ({"action": "relabel", "object_id": left}, "class must be a text"),
        ({"action": "mask", "object_id": left, "mask": {"size": [3, 3], "counts": "09"}}, "the image [200, 260]"),
        ({"action": "mask", "object_id": left, "mask": {"size": [200, 260], "counts": "~~"}}, "the mask cannot be"),
        ({"action": "box", "object_id": left, "box": [0, 0, 999, 9]}, "inside the 260x200 px image"),
        ({"action": "add", "picture": picture, "class": "a"}, "add needs a mask or a box"),
        ({"action": "merge_tracks", "picture": picture, "track": 1, "into": 2}, "no video '0.png'"),
        ({"action": "reset", "object_id": left}, "nothing was decided"),
    ]
    good = {"action": "accept", "object_id": right}
    for wrong, words in bad:
        error = edit(client, good, wrong, status=422)["error"]
        assert error.startswith("edit 1: ") and words in error and "\n" not in error, error
    assert client.get("/v1/stores/scenes/pictures").json()["counts"]["reviewed"] == 0
    answer = edit(client, good, bad[0][0], {**good, "action": "reject"}, skip_invalid=True)
    assert [item["edit"] for item in answer["applied"]] == [0] and answer["counts"]["reviewed"] == 1
    assert [item["edit"] for item in answer["refused"]] == [1, 2]
    assert "edit 0 of the same batch" in answer["refused"][1]["reason"]
    nothing = edit(client, bad[0][0], skip_invalid=True)
    assert nothing["batch"] is None and nothing["applied"] == nothing["pictures"] == []
    shapeless = [
        {"action": "agree"},
        {"action": "accept", "id": left},
        {"action": "box", "object_id": left, "box": [1]},
    ]
    for wrong in (*shapeless, {"action": "add", "picture": "../x"}, {"action": "accept", "object_id": 7}):
        edit(client, wrong, status=422)
    edit(client, {"action": "add", "picture": "abcdef", "class": "a"}, status=404)
    edit(client, {"action": "add", "picture": picture, "file": "0.png", "class": "a"}, status=422)
    edit(client, status=422)
    edit(client, good, status=422, author="a\nb")
    assert client.post("/v1/stores/none/edits", json={"edits": [good]}).status_code == 404


def test_the_later_decision_counts_and_can_be_taken_back(client):
    left, _ = ids(client)

    def state() -> tuple[str, str]:
        entry = shown(client, pictures(client)[0])["detections"][0]
        return entry["class"], entry["status"]

    def undo(batch: str, status: int = 200) -> dict:
        answer = client.post("/v1/stores/scenes/undo", json={"batch": batch, "author": "bob"})
        assert answer.status_code == status, answer.text
        return answer.json()

    before = shown(client, pictures(client)[0])
    accepted = edit(client, {"action": "accept", "object_id": left})["batch"]
    relabeled = edit(client, {"action": "relabel", "object_id": left, "class": "b"})["batch"]
    assert state() == ("b", "edited")
    assert f"somebody decided about object {left} since" in undo(accepted, 422)["error"]
    undone = undo(relabeled)
    assert state() == ("a", "accepted") and undone["applied"] == [{"edit": 0, "action": "undo", "objects": [left]}]
    again = undo(undone["batch"])
    assert state() == ("b", "edited")
    undo(undo(again["batch"])["batch"])
    added = edit(client, {"action": "add", "file": "0.png", "class": "a", "box": [0, 0, 9, 9]})
    assert len(ids(client)) == 3
    undo(added["batch"])
    assert len(ids(client)) == 2
    edit(client, {"action": "reset", "object_id": left})
    assert shown(client, pictures(client)[0]) == before
    for batch in ("part-0", "../labels", accepted[:-1]):
        assert "no batch of edits" in undo(batch, 422)["error"]
    first_part = min((client.server.stores.folders["scenes"] / "store").glob("part-*"))
    assert "no batch of edits" in undo(first_part.stem, 422)["error"]  # what a run wrote


def test_tracks_are_merged_split_relabeled_and_deleted(client, folders):
    (video,) = client.get("/v1/stores/clips/videos").json()["videos"]
    assert (video["name"], video["frames"], video["first"], video["last"]) == ("a.mkv", 12, 0, 11)
    assert video["tracks"] == [
        {"track": 1, "class": "b", "frames": 12, "spans": [[0, 11]], "statuses": {"predicted": 12}, "min_score": 0.9}
    ]
    frames = pictures(client, "clips", video="a.mkv")
    assert [frame["frame"] for frame in frames] == list(range(12))

    def lanes() -> dict[int, tuple[str, list]]:
        (found,) = client.get("/v1/stores/clips/videos").json()["videos"]
        return {lane["track"]: (lane["class"], lane["spans"]) for lane in found["tracks"]}

    split = edit(client, {"action": "split_track", "file": "a.mkv", "track": 1, "frame": 7}, store="clips")
    assert lanes() == {1: ("b", [[0, 6]]), 2: ("b", [[7, 11]])} and len(split["pictures"]) == 5
    edit(client, {"action": "relabel_track", "picture": frames[3]["id"], "track": 2, "class": "c"}, store="clips")
    assert lanes()[2] == ("c", [[7, 11]])
    edit(
        client,
        {"action": "reject", "object_id": shown(client, frames[9], "clips")["detections"][0]["object_id"]},
        store="clips",
    )
    assert lanes()[2] == ("c", [[7, 8], [10, 11]])
    merged = edit(client, {"action": "merge_tracks", "file": "a.mkv", "track": 2, "into": 1}, store="clips")
    assert tracks(folders / "tracked") == {1: [(i, "b") for i in range(12) if i != 9]}
    assert client.post("/v1/stores/clips/undo", json={"batch": merged["batch"]}).status_code == 200
    assert lanes()[2] == ("c", [[7, 8], [10, 11]])
    edit(client, {"action": "accept_track", "file": "a.mkv", "track": 1}, store="clips")
    edit(client, {"action": "delete_track", "file": "a.mkv", "track": 2}, store="clips")
    assert lanes() == {1: ("b", [[0, 6]])} and tracks(folders / "tracked") == {1: [(i, "b") for i in range(7)]}
    error = edit(client, {"action": "delete_track", "file": "a.mkv", "track": 5}, store="clips", status=422)["error"]
    assert "a.mkv has no track 5; its tracks are 1" in error
    assert client.get("/v1/stores/clips/pictures", params={"video": "b.mkv"}).status_code == 404


def test_pictures_are_listed_by_what_was_decided(client):
    page = client.get("/v1/stores/scenes/pictures").json()
    names = [picture["name"] for picture in page["pictures"]]
    assert page["counts"]["unreviewed_pictures"] == 4 and page["pictures"][0]["statuses"] == {"predicted": 2}
    (left, right), (second, _) = ids(client, 0), ids(client, 1)
    edit(client, *({"action": "accept", "object_id": item} for item in (left, right)))
    edit(client, {"action": "reject", "object_id": second})

    def listed(**query) -> list[str]:
        return [picture["name"] for picture in pictures(client, **query)]

    assert listed(unreviewed=True) == names[1:] and listed(status="accepted") == names[:1]
    assert listed(status="rejected") == [names[1]] == listed(status="rejected", **{"class": "a"})
    assert listed(status="rejected", **{"class": "c"}) == [] == listed(status="added")
    assert listed(unreviewed=True, **{"class": "a"}) == names[2:]
    assert listed(unreviewed=True, max_score=0.5) == names[1:]
    low = {"action": "add", "file": names[3], "class": "a", "box": [0, 0, 9, 9]}
    edit(client, low)
    assert listed(status="added") == [names[3]]
    assert listed(order="uncertain") == names  # all have the same scores
    assert client.get("/v1/stores/scenes/pictures", params={"status": "done"}).status_code == 422


def test_the_least_certain_undecided_object_comes_first(tmp_path, scenes):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(photos / f"{i}.png")

    class Falling(Halves):
        def detect(self, frames, vocabulary):
            self.score -= 0.05
            return super().detect(frames, vocabulary)

    label(photos, tmp_path / "labels", detector=Falling())
    store = OpenStore(tmp_path / "labels" / "store", 10**7)
    store.refresh()

    def names(**keys) -> list[str]:
        return [p["name"] for p in store.page(PictureFilter(order="uncertain", **keys), 0)["pictures"]]

    assert names() == ["3.png", "2.png", "1.png", "0.png"]
    lowest = store.page(PictureFilter(order="uncertain"), 0)["pictures"][0]["id"]
    (_, right) = (entry["object_id"] for entry in store.objects(lowest, "none")["detections"])
    store.edit([Edit(action="accept", object_id=right)], "", False)
    assert names(unreviewed=True) == ["2.png", "1.png", "0.png", "3.png"]


def test_what_is_next_is_what_the_command_says(client, folders):
    for number in (0, 1):
        left, right = ids(client, number)
        edit(client, {"action": "accept", "object_id": left}, {"action": "reject", "object_id": right})
        run_next(folders / "labels", 3, folders / "next.csv")
        answer = client.get("/v1/stores/scenes/next", params={"count": 3}).json()
        wanted = [line.object_id for line in read_review_list(folders / "next.csv")]
        assert [entry["object_id"] for entry in answer["objects"]] == wanted
        assert answer["unreviewed"] == 6 - 2 * number
    by_id = {picture["id"]: picture["name"] for picture in pictures(client)}
    assert all(by_id[entry["picture"]] == entry["name"] and 0 < entry["chance"] < 1 for entry in answer["objects"])
    assert client.get("/v1/stores/scenes/next", params={"count": 0}).status_code == 422


def test_edits_of_many_clients_and_of_other_processes_lose_nothing(client, folders):
    found = [object_id for number in range(4) for object_id in ids(client, number)]
    other = threading.Thread(
        target=lambda: StoreEditor(folders / "labels").apply([Edit(action="reject", object_id=found[0])], "bob")
    )
    other.start()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda item: edit(client, {"action": "accept", "object_id": item}), found[1:]))
    other.join()
    assert len({answer["batch"] for answer in answers}) == 7
    counts = client.get("/v1/stores/scenes/pictures").json()["counts"]["statuses"]
    assert (counts["accepted"], counts["rejected"], counts["predicted"]) == (7, 1, 0)
    assert sum(status == "accepted" for part in objects(folders / "labels").values() for _, _, status in part) == 7


def test_only_changed_pictures_are_read_again(client, monkeypatch):
    left, _ = ids(client, 2)
    store = client.server.stores.get("scenes")
    read: list[str] = []
    monkeypatch.setattr(
        store, "_read", lambda *arguments: (read.append(arguments[0]), type(store)._read(store, *arguments))[1]
    )
    answer = edit(client, {"action": "accept", "object_id": left})
    assert [picture["id"] for picture in answer["pictures"]] == read and len(read) == 1


def test_a_stored_picture_is_shown_in_full_and_opened(client, folders):
    for store, number in (("scenes", 2), ("clips", 5)):
        picture = pictures(client, store)[number]
        image = Image.open(io.BytesIO(client.get(f"/v1/stores/{store}/pictures/{picture['id']}/image").content))
        assert image.size == (picture["width"], picture["height"])
        answer = client.post(f"/v1/stores/{store}/pictures/{picture['id']}/open")
        assert answer.status_code == 200, answer.text
        opened = answer.json()
        assert (opened["width"], opened["height"]) == image.size
        found = client.post("/v1/predict", json={"picture": opened["id"], "text": ["a", "b"]}).json()
        assert len(found["objects"]) > 0
    path = folders / "photos" / "sub" / "2.png"
    content = path.read_bytes()
    picture = pictures(client)[2]
    try:
        Image.new("RGB", (260, 200)).save(path)
        for answer in (
            client.post(f"/v1/stores/scenes/pictures/{picture['id']}/open"),
            client.get(f"/v1/stores/scenes/pictures/{picture['id']}/image"),
        ):
            assert answer.status_code == 409 and "has changed since it was processed" in answer.json()["error"]
            assert "/" not in answer.json()["error"].replace("sub/2.png", "")
        path.unlink()
        answer = client.post(f"/v1/stores/scenes/pictures/{picture['id']}/open")
        assert answer.status_code == 409 and "no such file" in answer.json()["error"]
    finally:
        path.write_bytes(content)
    assert client.post("/v1/stores/scenes/pictures/abc/open").status_code == 404


def test_a_damaged_store_is_named_and_repaired_stores_are_read_again(client, folders):
    part = next((folders / "labels" / "store").glob("part-*"))
    content = part.read_bytes()
    part.write_bytes(content[:-1] + b"x")
    answer = client.get("/v1/stores/scenes/pictures")
    assert answer.status_code == 422 and "cannot be read" in answer.json()["error"]
    assert json.dumps(str(folders)) not in answer.text
    part.write_bytes(content)
    assert client.get("/v1/stores/scenes/pictures").json()["total"] == 4
