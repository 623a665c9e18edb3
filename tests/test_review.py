"""Tests of the review: decisions about objects in a store, what exports get of them, and what they teach."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fakes import CLASSES, ByLevel, Fill, Halves, Levels, boxes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_store import clip, rows

from grounded_sam import ConfigError, Pipeline, Vocabulary
from grounded_sam.cli.review import main
from grounded_sam.config.build import build, build_sinks, build_source
from grounded_sam.config.compose import compose
from grounded_sam.errors import EditError
from grounded_sam.evaluation.verdicts import (
    Candidate,
    Verdicts,
    chances,
    next_candidates,
    proposed_negatives,
    read_verdicts,
    tuned_thresholds,
    tuned_vocabulary,
)
from grounded_sam.formats.review_list import REVIEW_COLUMNS
from grounded_sam.formats.store import StoreReader
from grounded_sam.formats.store_edits import ACTIONS, Edit, StoreEditor
from grounded_sam.formats.store_objects import merge_decisions, object_ids, owner_id
from grounded_sam.formats.store_schema import SCHEMA, STATUSES
from grounded_sam.pipeline.runner import Runner, Summary
from grounded_sam.pipeline.select import Select, select_detections
from grounded_sam.pipeline.track_settings import TrackSettings
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.sinks.report import ReportSink
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sources.auto import AutoSource
from grounded_sam.sources.images import ImageSource
from grounded_sam.sources.stored import StoreSource
from grounded_sam.structures.detections import make_detections

#: For properties: a busy machine is no failure.
SLOW = settings(suppress_health_check=[HealthCheck.too_slow])


def label(images: Path, output: Path, *sinks, detector=None, segmenter=None, settings=None, **options) -> Summary:
    """Store what a fake detector finds in the images of a folder: in each an `a` on the left and a `c` on the right."""
    model = Pipeline(detector or Halves(), segmenter or Fill(), vocabulary=CLASSES)
    return Runner(model, ImageSource(images), [StoreSink(output, CLASSES, settings, **options), *sinks], output).run()


def objects(output: Path) -> dict[str, list[tuple[str, str, str]]]:
    """Return id, class and status of the objects of each image or frame that are not rejected."""
    reader = StoreReader(output / "store")
    return {
        result.frame.name: list(
            zip(*(map(str, result.raw.data.get(k, [])) for k in ("object_id", "class_name", "status")), strict=True)
        )
        for key in list(reader.keys())
        for result in reader.read(key, reader.vocabulary)
    }


def ids_of(output: Path, name: str) -> list[str]:
    return [object_id for object_id, _, _ in objects(output)[name]]


def edit(output: Path, *edits: dict, author: str = "ann", **options) -> list[list[str]]:
    return StoreEditor(output).apply([Edit.from_json(item) for item in edits], author, **options).object_ids


def export(output: Path, to: Path, *overrides: str) -> dict:
    """Export a store to COCO with the config of the command."""
    cfg = compose(["source=stored", f"input='{output}'", "sink=coco", *overrides])
    source, model = build_source(cfg), build(cfg)
    model.vocabulary = model.vocabulary or source.vocabulary
    Runner(model, source, build_sinks(cfg, to, model.vocabulary), to).run()
    return json.loads((to / "annotations.json").read_text())


def exported(output: Path, to: Path, *overrides: str) -> list[tuple[str, str, list[float]]]:
    """Return image, class and box of everything that an export has."""
    content = export(output, to, *overrides)
    names = {category["id"]: category["name"] for category in content["categories"]}
    images = {image["id"]: image["file_name"] for image in content["images"]}
    return [(images[a["image_id"]], names[a["category_id"]], a["bbox"]) for a in content["annotations"]]


# Ids


def test_ids_are_unique_and_the_same_in_another_run_with_the_same_settings(folder, tmp_path):
    for name in ("one", "two"):
        label(folder, tmp_path / name)
    assert objects(tmp_path / "one") == objects(tmp_path / "two")
    ids = [object_id for found in objects(tmp_path / "one").values() for object_id, _, _ in found]
    assert len(set(ids)) == 8 and all(object_id.startswith(owner_id("0.png")) for object_id in ids[:2])
    stored = [row for row in rows(tmp_path / "one" / "store") if row["kind"] == "object"]
    assert sorted(row["object_id"] for row in stored) == sorted(ids)
    assert {row["status"] for row in stored} == {"predicted"}


@SLOW
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 3), min_size=4, max_size=4), st.none() | st.just(1)),
        max_size=12,
    )
)
def test_objects_of_an_image_never_share_an_id(found):
    ids = object_ids("a.png", "a.png", found)
    assert len(set(ids)) == len(found)
    assert object_ids("a.png", "a.png", found) == ids and not set(ids) & set(object_ids("b.png", "b.png", found))


def test_files_of_the_same_name_have_objects_of_their_own(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 20), "red" if name == "x" else "blue").save(tmp_path / name / "1.png")
        label(tmp_path / name, tmp_path / "out", resume="extend")
    found = objects(tmp_path / "out")
    assert list(found) == ["1.png", "1-2.png"] and not set(found["1.png"]) & set(found["1-2.png"])
    (changed,) = edit(tmp_path / "out", {"action": "reject", "object_id": found["1-2.png"][0][0]})
    assert changed == [found["1-2.png"][0][0]]
    assert [len(part) for part in objects(tmp_path / "out").values()] == [2, 1]


def test_a_store_of_version_1_reads_and_takes_decisions(tmp_path):
    shutil.copytree(Path(__file__).parent / "data" / "store_v1" / "store", tmp_path / "store")
    before = objects(tmp_path)
    assert {status for found in before.values() for _, _, status in found} == {"predicted"}
    assert objects(tmp_path) == before
    (name, [(object_id, class_name, _), *_]), *_ = before.items()
    edit(tmp_path, {"action": "accept", "object_id": object_id})
    assert (object_id, class_name, "accepted") in objects(tmp_path)[name]


# Decisions


def test_each_decision_is_in_the_exports(folder, tmp_path):
    label(folder, tmp_path)
    (left, right), (second, _) = ids_of(tmp_path, "0.png"), ids_of(tmp_path, "1.png")
    mask = np.zeros((200, 260), bool)
    mask[10:30, 20:60] = True
    ids = edit(
        tmp_path,
        {"action": "accept", "object_id": left},
        {"action": "reject", "object_id": right},
        {"action": "relabel", "object_id": second, "class": "B"},
        {"action": "box", "object_id": ids_of(tmp_path, "sub/2.png")[0], "box": [1, 2, 11, 22]},
        {"action": "mask", "object_id": ids_of(tmp_path, "sub/2.png")[1], "mask": mask},
        {
            "action": "add",
            "file": "sub/3.png",
            "class": "dog",
            "new_class": True,
            "mask": [[5, 5, 25, 5, 25, 15, 5, 15]],
        },
    )
    assert [len(item) for item in ids] == [1] * 6
    assert objects(tmp_path)["1.png"][0] == (second, "b", "edited")
    half = [0, 0, 130, 200], [130, 0, 130, 200]
    assert exported(tmp_path, tmp_path / "all") == [
        ("0.png", "a", half[0]),
        *(("1.png", "b", half[0]), ("1.png", "c", half[1])),
        *(("sub/2.png", "a", [1, 2, 10, 20]), ("sub/2.png", "c", [20, 10, 40, 20])),
        *(("sub/3.png", "a", half[0]), ("sub/3.png", "c", half[1]), ("sub/3.png", "dog", [5, 5, 20, 10])),
    ] or sorted(exported(tmp_path, tmp_path / "again")) == sorted(exported(tmp_path, tmp_path / "all"))
    areas = {tuple(a["bbox"]): a["area"] for a in export(tmp_path, tmp_path / "areas")["annotations"]}
    assert areas[1, 2, 10, 20] == 200 and areas[20, 10, 40, 20] == 800 and areas[5, 5, 20, 10] == 200
    assert exported(tmp_path, tmp_path / "accepted", "select.status=accepted") == [("0.png", "a", half[0])]
    decided = exported(tmp_path, tmp_path / "decided", "select.status=[accepted,edited,added]")
    assert len(decided) == 5 and ("sub/3.png", "dog", [5, 5, 20, 10]) in decided
    strict = exported(tmp_path, tmp_path / "strict", "select.score=0.99")  # a threshold removes no decision
    assert sorted(strict) == sorted(decided)


def test_a_decision_is_a_row_of_a_new_part_with_author_and_time(folder, tmp_path):
    label(folder, tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "store").glob("part-*")}
    (object_id,) = edit(tmp_path, {"action": "reject", "object_id": ids_of(tmp_path, "0.png")[1], "looks_like": "hat"})[
        0
    ]
    parts = sorted((tmp_path / "store").glob("part-*"))
    assert all(path.read_bytes() == content for path, content in before.items()) and len(parts) == len(before) + 1
    (row,) = pq.read_table(parts[-1]).to_pylist()
    assert (row["kind"], row["object_id"], row["status"], row["author"]) == ("edit", object_id, "rejected", "ann")
    assert (row["class"], row["predicted_class"], row["reason"], row["file"]) == ("c", "c", "hat", "0.png")
    assert row["edited_at"].endswith("+00:00") and row["counts"] and row["score"] == np.float32(0.45)
    lists = "".join(path.read_text() for path in (tmp_path / "store").glob("_parts-*"))
    assert parts[-1].name in lists
    damaged = parts[-1].read_bytes()[:-1] + b"x"
    parts[-1].write_bytes(damaged)
    with pytest.raises(ConfigError, match="its checksum is not the one"):
        StoreReader(tmp_path / "store")


def test_decisions_are_replayed_to_sinks_when_a_run_resumes(folder, tmp_path):
    label(folder, tmp_path)
    edit(tmp_path, *({"action": "reject", "object_id": ids_of(tmp_path, name)[0]} for name in objects(tmp_path)))
    summary = label(folder, tmp_path, CocoSink(tmp_path, CLASSES))
    assert (summary.images, summary.stored, summary.objects) == (4, 4, {"c": 4})
    content = json.loads((tmp_path / "annotations.json").read_text())
    assert {a["category_id"] for a in content["annotations"]} == {3}


def test_the_later_decision_wins_and_can_be_taken_back(folder, tmp_path):
    label(folder, tmp_path)
    before = objects(tmp_path)
    object_id = before["0.png"][0][0]
    edit(tmp_path, {"action": "reject", "object_id": object_id})
    edit(tmp_path, {"action": "relabel", "object_id": object_id, "class": "b"})
    assert objects(tmp_path)["0.png"][0] == (object_id, "b", "edited")
    edit(tmp_path, {"action": "accept", "object_id": object_id})
    assert objects(tmp_path)["0.png"][0] == (object_id, "b", "accepted")
    edit(tmp_path, {"action": "reset", "object_id": object_id})
    assert objects(tmp_path) == before
    (added,) = edit(tmp_path, {"action": "add", "file": "0.png", "class": "a", "box": [0, 0, 9, 9]})[0]
    assert added in ids_of(tmp_path, "0.png")
    edit(tmp_path, {"action": "reset", "object_id": added})
    assert objects(tmp_path) == before


def test_objects_of_a_store_without_masks_can_be_decided_about(folder, tmp_path):
    model = Pipeline(Halves(), None, vocabulary=CLASSES)
    Runner(model, ImageSource(folder), [StoreSink(tmp_path, CLASSES)], tmp_path).run()
    edit(
        tmp_path,
        {"action": "add", "file": "0.png", "class": "a", "box": [3, 4, 9.5, 9]},
        {"action": "box", "object_id": ids_of(tmp_path, "0.png")[0], "box": [0, 0, 5, 5]},
    )
    assert ("0.png", "a", [3, 4, 6.5, 5]) in exported(tmp_path, tmp_path / "out")
    assert ("0.png", "a", [0, 0, 5, 5]) in exported(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": "agree"}, "action must be one of accept, reject, .*got 'agree'"),
        ({"object_id": "5b39a3cc-000000000000"}, "the store has no object '5b39a3cc-000000000000'"),
        ({"object_id": None}, "accept needs object_id"),
        (
            {"action": "relabel", "class": "dog"},
            "no class 'dog'; its classes are 'a', 'b', 'c'; new_class=true adds one",
        ),
        ({"action": "relabel", "class": " "}, "class must be a text"),
        ({"action": "relabel", "class": "x\ny", "new_class": True}, "class must be one line"),
        ({"action": "box", "box": [0, 0, 300, 5]}, "must have an area and be inside the 260x200 px image"),
        ({"action": "box", "box": [5, 5, 5, 9]}, "must have an area"),
        ({"action": "box", "box": [0, 0, float("nan"), 5]}, "box must be four numbers"),
        ({"action": "box", "box": "12"}, "box must be four numbers"),
        ({"action": "box"}, "box needs a box"),
        ({"action": "mask", "mask": np.ones((3, 3), bool)}, r"the mask must be bool or uint8 of shape \(200, 260\)"),
        ({"action": "mask", "mask": {"size": [3, 3], "counts": "09"}}, r"the size \[3, 3\], the image \[200, 260\]"),
        ({"action": "mask", "mask": np.zeros((200, 260), bool)}, "the mask is empty"),
        ({"action": "mask", "mask": [[0, 0, 1]]}, "a polygon needs at least three points"),
        ({"action": "reset"}, "nothing was decided about object"),
        (
            {"action": "add", "file": "9.png", "class": "a", "box": [0, 0, 1, 1]},
            "no image or frame '9.png'; its images",
        ),
        ({"action": "add", "file": "0.png", "class": "a"}, "add needs a mask or a box"),
        (
            {"action": "delete_track", "file": "0.png", "track": 1},
            "the store has no video '0.png'; its videos are none",
        ),
        ({"action": "delete_track", "file": "0.png", "track": True}, "track must be a whole number"),
    ],
)
def test_an_edit_that_cannot_be_is_refused_in_words(folder, tmp_path, change, message):
    label(folder, tmp_path)
    first = ids_of(tmp_path, "0.png")
    before = sorted((tmp_path / "store").glob("part-*"))
    with pytest.raises(EditError, match=f"edit 1: .*{message}") as caught:
        edit(
            tmp_path,
            {"action": "accept", "object_id": first[1]},
            {"action": "accept", "object_id": first[0], **change},
        )
    assert [index for index, _ in caught.value.problems] == [1] and "\n" not in str(caught.value)
    assert sorted((tmp_path / "store").glob("part-*")) == before  # the batch is applied in whole or not at all
    applied = StoreEditor(tmp_path).apply(
        [Edit(action="accept", object_id=first[1]), Edit(action="nothing")], skip_invalid=True
    )
    assert applied.object_ids == [[first[1]], []] and [problem.index for problem in applied.problems] == [1]


def test_two_edits_of_one_object_in_a_batch_are_refused(folder, tmp_path):
    label(folder, tmp_path)
    object_id = ids_of(tmp_path, "0.png")[0]
    with pytest.raises(EditError, match=rf"edit 1: edit 0 of the same batch is about object {object_id} too"):
        edit(tmp_path, {"action": "accept", "object_id": object_id}, {"action": "reject", "object_id": object_id})


def test_edits_from_json_have_known_keys():
    with pytest.raises(ConfigError, match="an edit has no key 'klass'; the keys are action, object_id, class"):
        Edit.from_json({"action": "accept", "klass": "a"})
    with pytest.raises(ConfigError, match="an edit must be an object"):
        Edit.from_json(["accept"])
    with pytest.raises(ConfigError, match="an edit needs an action"):
        Edit.from_json({})


def test_several_writers_lose_nothing(folder, tmp_path):
    label(folder, tmp_path)
    found = [object_id for part in objects(tmp_path).values() for object_id, _, _ in part]
    errors: list[Exception] = []

    def work(action: str, ids: list[str]) -> None:
        try:
            editor = StoreEditor(tmp_path)
            for object_id in ids:
                editor.apply([Edit(action=action, object_id=object_id)], action)
        except Exception as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=("accept", found[:4])),
        threading.Thread(target=work, args=("reject", found[4:])),
        threading.Thread(target=lambda: label(folder, tmp_path, settings={"x": 1}, resume="replace")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    left = [item for part in objects(tmp_path).values() for item in part]
    assert [(object_id, status) for object_id, _, status in left] == [
        (object_id, "accepted") for object_id in found[:4]
    ]


# Runs after decisions


class Moved(Halves):
    """`Halves` whose boxes are a few pixels narrower, as another model would find them."""

    def detect(self, frames, vocabulary):
        results = super().detect(frames, vocabulary)
        for detections in results:
            detections.xyxy += np.array([2, 3, -2, -3], np.float32)
        return results


def test_a_run_with_other_settings_leaves_decisions_alone(folder, tmp_path):
    label(folder, tmp_path)
    accepted, rejected = ids_of(tmp_path, "0.png")
    edited, _ = ids_of(tmp_path, "1.png")
    added = {"action": "add", "file": "sub/2.png", "class": "b", "box": [50, 50, 60, 60]}
    edit(
        tmp_path,
        {"action": "accept", "object_id": accepted},
        {"action": "reject", "object_id": rejected},
        {"action": "relabel", "object_id": edited, "class": "b"},
        added,
    )
    before = objects(tmp_path)
    coco = CocoSink(tmp_path, CLASSES)
    summary = label(folder, tmp_path, coco, detector=Moved(), settings={"select": {"score": 0.1}}, resume="replace")
    assert "kept what people decided about 1 accepted, 1 added, 1 edited, 1 rejected objects" in summary.outputs[0]
    after = objects(tmp_path)
    assert after["0.png"] == [(accepted, "a", "accepted")]
    assert (edited, "b", "edited") in after["1.png"] and [c for _, c, _ in after["1.png"]].count("a") == 0
    assert before["sub/2.png"][2] in after["sub/2.png"] and len(after["sub/2.png"]) == 3
    assert after["sub/3.png"] != before["sub/3.png"] and len(after["sub/3.png"]) == 2  # nothing was decided there
    content = json.loads((tmp_path / "annotations.json").read_text())  # written by the same run, from what it found
    assert len(content["annotations"]) == 1 + 2 + 3 + 2
    replayed = label(folder, tmp_path, detector=Moved(), settings={"select": {"score": 0.1}})  # it is the only run now
    assert replayed.images == 0
    assert objects(tmp_path) == after


def test_what_is_found_as_something_else_is_no_decided_object(folder, tmp_path):
    label(folder, tmp_path)
    edit(tmp_path, {"action": "reject", "object_id": ids_of(tmp_path, "0.png")[1]})

    class Other(Halves):
        def detect(self, frames, vocabulary):
            return super().detect(frames, Vocabulary.parse(["a", "b"]))

    label(folder, tmp_path, detector=Other(), settings={"x": 1}, resume="replace")
    assert [name for _, name, _ in objects(tmp_path)["0.png"]] == ["a", "b"]  # where a `c` was rejected


def test_decisions_about_a_file_that_has_changed_do_not_apply(folder, tmp_path):
    label(folder, tmp_path)
    edit(tmp_path, {"action": "reject", "object_id": ids_of(tmp_path, "0.png")[1]})
    Image.new("RGB", (260, 200), "red").save(folder / "0.png")
    label(folder, tmp_path)
    assert [status for _, _, status in objects(tmp_path)["0.png"]] == ["predicted"] * 2


def test_a_replaced_store_has_every_image_once_although_it_was_moved(folder, tmp_path):
    label(folder, tmp_path)
    edit(tmp_path, {"action": "reject", "object_id": ids_of(tmp_path, "0.png")[1]})
    moved = folder.rename(tmp_path / "moved")
    label(moved, tmp_path, settings={"x": 1}, resume="replace")
    assert {name: len(part) for name, part in objects(tmp_path).items()} == {
        "0.png": 1,
        "1.png": 2,
        "sub/2.png": 2,
        "sub/3.png": 2,
    }


def _row(object_id: str, status: str, box: list[int], fingerprint: str = "new", class_name: str = "a") -> dict:
    columns = dict.fromkeys(SCHEMA.names)
    columns |= {"object_id": object_id, "status": status, "class": class_name, "fingerprint": fingerprint}
    return {
        **columns,
        "predicted_class": class_name,
        **dict(zip(("x1", "y1", "x2", "y2"), map(float, box), strict=True)),
    }


_BOXES = st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(1, 8), st.integers(1, 8)).map(
    lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]]
)


@SLOW
@given(
    predicted=st.lists(_BOXES, max_size=6),
    decided=st.lists(st.tuples(_BOXES, st.sampled_from(STATUSES), st.sampled_from(["old", "new"])), max_size=6),
)
def test_no_decision_is_lost_and_none_is_doubled(predicted, decided):
    found = [_row(f"p{i}", "predicted", box) for i, box in enumerate(predicted)]
    # Some decisions are about objects that were found again, others about those of another run.
    decisions = [_row(f"p{i * 2}", status, box, run) for i, (box, status, run) in enumerate(decided)]
    merged = merge_decisions(found, decisions, "new", (20, 20))
    ids = [row["object_id"] for row in merged]
    assert len(set(ids)) == len(ids)
    for decision in decisions:
        if decision["status"] != "predicted":
            assert decision in merged
    assert all(row in found or row in decisions for row in merged)
    assert merge_decisions(found, [], "new", (20, 20)) == found


# Selection


def test_a_selection_by_status_needs_a_store():
    with pytest.raises(ConfigError, match=r"select.status needs objects that somebody reviewed: use source=stored"):
        select_detections(boxes((0, 0, 9, 9, 0.9, 0)), Select(status="accepted"), CLASSES)
    with pytest.raises(ConfigError, match="select.status needs objects"):
        build(compose(["select.status=accepted", "text=[a]", "input=x"]))
    for wrong in ("rejected", "fine", ["accepted", "fine"], [], 3):
        with pytest.raises(ConfigError, match=r"select\.status must be "):
            Select(status=wrong)


def test_decided_objects_suppress_others_and_are_never_suppressed():
    found = boxes((0, 0, 10, 10, 0.3, 0), (0, 0, 10, 9, 0.9, 0), (50, 50, 60, 60, 0.8, 0), (0, 0, 9, 10, 0.2, 0))
    found.data["status"] = np.array(["accepted", "predicted", "predicted", "added"])
    kept = select_detections(found, Select(score=0.85, nms=0.5, top_k=1), CLASSES)
    assert kept.confidence.tolist() == pytest.approx([0.3, 0.2])
    assert select_detections(kept, Select(score=0.85, nms=0.5, top_k=1), CLASSES) == kept


# Videos


def track(folder: Path, output: Path) -> None:
    model = Pipeline(Levels(), None, vocabulary=CLASSES, tracker=ByLevel(), track=TrackSettings(redetect_every=5))
    Runner(model, AutoSource(folder), [StoreSink(output, CLASSES)], output).run()


def tracks(output: Path) -> dict[int, list[tuple[int, str]]]:
    """Return frame and class of the objects of each track."""
    found: dict[int, list[tuple[int, str]]] = {}
    for frame in StoreSource(output):
        for i, name in zip(frame.annotations.tracker_id.tolist(), frame.annotations.data["class_name"], strict=True):
            found.setdefault(i, []).append((frame.index, str(name)))
    return found


def test_tracks_are_split_merged_relabeled_and_deleted(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    clip(folder / "a.mkv")
    track(folder, tmp_path)
    whole = tracks(tmp_path)
    assert whole == {1: [(i, "b") for i in range(12)]}
    edit(tmp_path, {"action": "split_track", "file": "a.mkv", "track": 1, "frame": 7})
    assert {i: [n for n, _ in part] for i, part in tracks(tmp_path).items()} == {1: [*range(7)], 2: [*range(7, 12)]}
    edit(tmp_path, {"action": "relabel_track", "file": "a.mkv", "track": 2, "class": "c"})
    assert {name for _, name in tracks(tmp_path)[2]} == {"c"}
    with pytest.raises(EditError, match=r"a\.mkv has no track 5; its tracks are 1, 2"):
        edit(tmp_path, {"action": "delete_track", "file": "a.mkv", "track": 5})
    with pytest.raises(EditError, match="is seen from frame 0 to 6, so it cannot be split at 9"):
        edit(tmp_path, {"action": "split_track", "file": "a.mkv", "track": 1, "frame": 9})
    edit(tmp_path, {"action": "merge_tracks", "file": "a.mkv", "track": 2, "into": 1})
    assert tracks(tmp_path) == whole
    added = {"action": "add", "file": "a.mkv/000003", "class": "a", "box": [0, 0, 4, 4]}
    assert "a.mkv/000003" in objects(tmp_path)
    edit(tmp_path, added)
    assert tracks(tmp_path)[2] == [(3, "a")]
    with pytest.raises(EditError, match="tracks 2 and 1 are both seen in 1 frames, such as 3"):
        edit(tmp_path, {"action": "merge_tracks", "file": "a.mkv", "track": 2, "into": 1})
    edit(tmp_path, {"action": "delete_track", "file": "a.mkv", "track": 1})
    assert tracks(tmp_path) == {2: [(3, "a")]}


def test_every_action_is_tested():
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{action}"' in text for action in ACTIONS if action != "accept_track")


# Review lists


def review(*words: str, capsys) -> tuple[int, str, str]:
    """Run `grounded-sam-review`; return exit code, output and errors, with the message of the exit among them."""
    sys.argv[1:] = map(str, words)
    code, message = 0, ""
    try:
        main()
    except SystemExit as stopped:
        code, message = (stopped.code, "") if isinstance(stopped.code, int) else (1, f"{stopped.code}\n")
    captured = capsys.readouterr()
    return code, captured.out, captured.err + message


@pytest.fixture(autouse=True)
def _arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grounded-sam-review"])


def write_list(path: Path, lines: list[dict[str, str]], **options) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, REVIEW_COLUMNS, **options)
        writer.writeheader()
        writer.writerows(lines)
    return path


def test_the_list_of_the_report_comes_back_from_a_spreadsheet(folder, tmp_path, capsys):
    label(folder, tmp_path, ReportSink(tmp_path, CLASSES, duplicates=False))
    with (tmp_path / "review.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    listed = [line for line in lines if line["object_id"]]
    known = {object_id for part in objects(tmp_path).values() for object_id, _, _ in part}
    assert {line["object_id"] for line in listed} == known and {line["status"] for line in listed} == {"predicted"}
    listed[0] |= {"status": "rejected", "detail": "shadow"}
    listed[1] |= {"status": "Accept"}
    listed[2] |= {"class": "B"}
    path = write_list(tmp_path / "filled.csv", lines[::-1], delimiter=";")
    path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    code, out, err = review("import", tmp_path, path, "--author", "ann", capsys=capsys)
    assert (code, err) == (0, "") and "1 accept, 1 reject, 1 relabel; 5 lines without a decision" in out
    edits = {row["object_id"]: row for row in rows(tmp_path / "store") if row["kind"] == "edit"}
    assert edits[listed[0]["object_id"]]["reason"] == "shadow" and edits[listed[2]["object_id"]]["class"] == "b"
    assert {row["author"] for row in edits.values()} == {"ann"}
    code, out, _ = review("import", tmp_path, path, capsys=capsys)  # again
    assert code == 0 and "nothing to change" in out
    assert len([row for row in rows(tmp_path / "store") if row["kind"] == "edit"]) == 3


def test_lines_that_cannot_be_applied_are_named_and_the_others_are_applied(folder, tmp_path, capsys):
    label(folder, tmp_path)
    first, second = ids_of(tmp_path, "0.png")
    third, fourth = ids_of(tmp_path, "1.png")
    path = write_list(
        tmp_path / "list.csv",
        [
            {"object_id": first, "status": "accepted", "class": "a"},
            {"object_id": "nothing", "status": "accepted", "class": "a"},
            {"object_id": second, "status": "perhaps", "class": "c"},
            {"object_id": third, "status": "edited", "class": "'dog"},
            {"object_id": first, "status": "rejected", "class": "a"},
            {"object_id": fourth, "status": "added", "class": "c"},
            {"status": "rejected", "file": "0.png"},
            {"file": "0.png", "reason": "crowded"},
        ],
    )
    code, out, err = review("import", tmp_path / "store", path, capsys=capsys)
    assert code == 1 and "1 accept" in out
    for number, reason in (
        (3, "the store has no object 'nothing'"),
        (4, "status must be accepted, rejected or empty, got 'perhaps'"),
        (5, "the store has no class 'dog'; its classes are 'a', 'b', 'c'"),
        (6, f"edit 0 of the same batch is about object {first} too"),
        (7, "status is added, but the class is the same"),
        (8, "status is 'rejected', but object_id is empty"),
    ):
        assert f"list.csv, line {number}: {reason}" in err
    assert err.endswith(f"grounded-sam-review: 6 lines of {path} could not be applied\n")
    assert objects(tmp_path)["0.png"][0] == (first, "a", "accepted")
    code, *_ = review("import", tmp_path, path, "--new-classes", capsys=capsys)
    assert code == 1 and (third, "dog", "edited") in objects(tmp_path)["1.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "a command is missing: import, status, next or tune; --help shows examples"),
        (("look", "x"), "invalid choice: 'look'"),
        (("status",), "the following arguments are required: folder"),
        (("status", "nowhere"), "no store in nowhere: expected a folder with _run-"),
        (("next", "x", "--count", "0"), "argument --count: invalid whole number above 0 value: '0'"),
        (("tune", "x", "--precision", "2"), "argument --precision: invalid number above 0"),
        (("import", "x"), "the following arguments are required: list"),
    ],
)
def test_mistakes_in_the_command_end_with_one_line(words, message, capsys):
    code, out, err = review(*words, capsys=capsys)
    assert (
        (code, out) == (1, "") and message in err and err.startswith("grounded-sam-review: ") and err.count("\n") == 1
    )


def test_a_file_that_is_no_review_list_is_refused(folder, tmp_path, capsys):
    label(folder, tmp_path)
    path = tmp_path / "list.csv"
    for content, message in (
        ("", "has no column object_id"),
        ("file,reason\n", "has no column object_id"),
        ('object_id,status,class\n"a', "is not valid CSV"),
    ):
        path.write_text(content)
        code, _, err = review("import", tmp_path, path, capsys=capsys)
        assert code == 1 and message in err
    code, _, err = review("import", tmp_path, tmp_path / "none.csv", capsys=capsys)
    assert code == 1 and "none.csv" in err


def test_status_counts_by_class(folder, tmp_path, capsys):
    label(folder, tmp_path)
    first, second = ids_of(tmp_path, "0.png")
    edit(tmp_path, {"action": "accept", "object_id": first}, {"action": "reject", "object_id": second})
    code, out, _ = review("status", tmp_path, capsys=capsys)
    table = [line.split() for line in out.splitlines()]
    assert code == 0 and table[0] == ["class", "left", "accepted", "rejected", "edited", "added"]
    assert table[1:] == [
        ["a", "3", "1", "0", "0", "0"],
        ["c", "3", "0", "1", "0", "0"],
        ["all", "6", "1", "1", "0", "0"],
    ]


# What verdicts teach


class Scattered:
    """A detector of 12 boxes an image, whose scores are known to be right or wrong from `truth`."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.truth: dict[tuple[str, float], bool] = {}

    def detect(self, frames, vocabulary):
        results = []
        for frame in frames:
            right = self.rng.random(12) < 0.5
            class_ids = self.rng.integers(0, 2, 12)
            # Right objects of the class `a` score above 0.2, those of `b` above 0.7.
            low = np.where(class_ids == 0, 0.2, 0.7)
            scores = np.where(right, low + 0.2 * self.rng.random(12), low - 0.2 * self.rng.random(12)).clip(0.01, 0.99)
            xyxy = [[20 * i, 0, 20 * i + 10, 10] for i in range(12)]
            results.append(make_detections(xyxy, scores, class_ids, vocabulary, frame.size_hw))
            scores = results[-1].confidence.tolist()
            self.truth |= {(frame.name, score): bool(r) for score, r in zip(scores, right, strict=True)}
        return results


def scattered(tmp_path: Path, images: int = 40) -> tuple[Path, Scattered]:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(images):
        Image.new("RGB", (260, 20), (i, i, i)).save(folder / f"{i:03d}.png")
    detector = Scattered()
    model = Pipeline(detector, None, vocabulary=Vocabulary.parse(["a", "b"]), select=Select(score=0.0))
    Runner(model, ImageSource(folder), [StoreSink(tmp_path, model.vocabulary)], tmp_path).run()
    return tmp_path, detector


def decide(output: Path, detector: Scattered, chosen: list) -> None:
    edits = []
    for candidate in chosen:
        right = detector.truth[candidate.file, candidate.score]
        looks_like = None if right else "a hat" if candidate.class_name == "b" else None
        action = "accept" if right else "reject"
        edits.append(Edit(action=action, object_id=candidate.object_id, looks_like=looks_like))
    StoreEditor(output).apply(edits, "script")


def test_next_and_tune_find_the_thresholds_with_few_verdicts(tmp_path, capsys):
    output, detector = scattered(tmp_path)
    code, _, err = review("tune", output, capsys=capsys)
    assert code == 1 and "nobody has accepted or rejected an object" in err
    for _ in range(4):
        verdicts = read_verdicts(StoreEditor(output).rows)
        decide(output, detector, [verdicts.candidates[i] for i in next_candidates(verdicts, 10)])
    code, out, _ = review("tune", output, capsys=capsys)
    assert code == 0 and f"Ontology for text=: {output / 'reviewed-classes.yaml'}" in out
    words = Vocabulary.parse(output / "reviewed-classes.yaml")
    assert words.classes == ("a", "b") and words.negatives == ("a hat",)
    assert words.scores == pytest.approx((0.2, 0.7), abs=0.1)
    content = export(output, tmp_path / "out", f"text='{output / 'reviewed-classes.yaml'}'")
    names, images = ({entry["id"]: entry for entry in content[key]} for key in ("categories", "images"))
    wrong = 0
    for annotation in content["annotations"]:
        key = images[annotation["image_id"]]["file_name"], annotation["score"]
        truth = next(
            right for (file, score), right in detector.truth.items() if file == key[0] and abs(score - key[1]) < 1e-5
        )
        wrong += not truth
    assert len(names) == 2 and wrong <= 0.1 * len(content["annotations"])
    (output / "reviewed-classes.yaml").write_text("classes: {}")
    code, _, err = review("tune", output, capsys=capsys)
    assert code == 1 and "was not written by this command; choose another file with --to" in err


def test_next_writes_a_list_that_can_be_imported(tmp_path, capsys):
    output, detector = scattered(tmp_path, images=10)
    code, out, _ = review("next", output, "--count", 20, capsys=capsys)
    assert code == 0 and out.startswith(f"20 objects to look at: {output / 'next.csv'}: ")
    with (output / "next.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len({line["object_id"] for line in lines}) == 20
    assert len({line["file"] for line in lines}) >= 8 and {line["class"] for line in lines} == {"a", "b"}
    for line in lines:
        truth = {(name, round(score, 4)): right for (name, score), right in detector.truth.items()}
        line["status"] = "accepted" if truth[line["file"], float(line["score"])] else "rejected"
    code, _, _ = review("import", output, write_list(tmp_path / "done.csv", lines), capsys=capsys)
    assert code == 0
    verdicts = read_verdicts(StoreEditor(output).rows)
    judged = {c.object_id for c in verdicts.candidates if c.is_right is not None}
    assert judged == {line["object_id"] for line in lines}
    again = next_candidates(verdicts, 500)
    assert len(again) == 100 and not judged & {verdicts.candidates[i].object_id for i in again}


def candidate(score: float, is_right: bool | None = None, class_name: str = "a", **values) -> Candidate:
    number = values.pop("image", 0)
    return Candidate(
        f"{class_name}{score}{number}{values}", "x.png", number, class_name, score, (0, 0, 9, 9), is_right, **values
    )


def verdicts_of(*candidates: Candidate, words: Vocabulary | None = None) -> Verdicts:
    return Verdicts(list(candidates), [], 1 + max(c.image for c in candidates), words or Vocabulary.parse(["a", "b"]))


def test_a_class_with_few_verdicts_follows_the_others():
    many = [candidate(s / 100, s > 85, image=s) for s in range(5, 95, 2)]
    unseen = candidate(0.6, class_name="b")
    before = chances(verdicts_of(unseen))[0]
    after = chances(verdicts_of(unseen, *many))[0]
    assert before == pytest.approx(0.6, abs=0.01) and after < before - 0.05


def test_thresholds_of_classes_that_nobody_reviewed_stay():
    found = [candidate(s / 100, s > 70, image=s) for s in range(5, 95, 3)] + [candidate(0.5, class_name="b")]
    a, b = tuned_thresholds(verdicts_of(*found))
    assert b is None and a is not None and 0.62 <= a.score <= 0.74


@SLOW
@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([None, True, False]), st.sampled_from("ab")), min_size=1))
def test_chances_are_probabilities_and_rise_with_the_score(found):
    verdicts = verdicts_of(*(candidate(s, right, name, image=i) for i, (s, right, name) in enumerate(found)))
    chance = chances(verdicts)
    assert ((chance >= 0) & (chance <= 1)).all()
    for right, value in zip((right for _, right, _ in found), chance, strict=True):
        assert right is None or value == right
    chosen = next_candidates(verdicts, 10)
    assert len(chosen) == min(10, sum(right is None for _, right, _ in found)) == len(set(chosen))


def test_negatives_are_what_rejected_objects_look_like_and_no_class():
    words = Vocabulary.parse({"a": ["a", "big a"], "b": None}, ["known"])
    looks = ["hat", "Hat", "hat ", "shoe", "big A", "B", "known", "shoe", "once", "7"]
    wrong = [candidate(0.5, False, image=i, looks_like=text) for i, text in enumerate(looks)]
    right = [candidate(0.5, True, image=i + 50, looks_like=None) for i in range(3)]
    found = proposed_negatives(verdicts_of(*wrong, *right, words=words))
    assert [(negative.phrase, negative.count, negative.classes) for negative in found] == [
        ("hat", 3, ("a",)),
        ("shoe", 2, ("a",)),
    ]
    assert tuned_vocabulary(verdicts_of(*wrong, words=words), found).negatives == ("known", "hat", "shoe")


def test_a_class_of_another_run_explains_what_was_rejected(folder, tmp_path):
    label(folder, tmp_path)
    other = Pipeline(Halves(score=0.95), Fill(), vocabulary=Vocabulary.parse(["ghost", "x"]))
    Image.new("RGB", (50, 40), "red").save(folder / "9.png")
    store = StoreSink(tmp_path, other.vocabulary, {"x": 1}, resume="extend")
    Runner(other, ImageSource(folder), [store], tmp_path).run()
    edit(tmp_path, {"action": "reject", "object_id": ids_of(tmp_path, "0.png")[0]})
    edit(tmp_path, {"action": "add", "file": "0.png", "class": "ghost", "box": [0, 0, 130, 200]})
    verdicts = read_verdicts(StoreEditor(tmp_path).rows, CLASSES)
    (wrong,) = [c for c in verdicts.candidates if c.is_right is False]
    assert wrong.looks_like == "ghost"


def test_detectors_that_disagree_come_first():
    alike = [candidate(0.5, image=i, disagreement=0.9 if i == 7 else 0.0) for i in range(20)]
    assert next_candidates(verdicts_of(*alike), 1) == [7]


def test_the_scores_of_several_detectors_are_stored(folder, tmp_path):
    class Two(Halves):
        def detect(self, frames, vocabulary):
            results = super().detect(frames, vocabulary)
            for detections in results:
                detections.data["detector_scores"] = np.array([{"x": 0.9, "y": 0.8}, {"x": 0.1, "y": 0.7}], object)
            return results

    label(folder, tmp_path, detector=Two())
    found = read_verdicts(StoreEditor(tmp_path).rows).candidates
    assert [candidate.disagreement for candidate in found] == pytest.approx([0.1, 0.6] * 4)
