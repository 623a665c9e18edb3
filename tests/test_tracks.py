"""Matching, ids and classes of tracks."""

from __future__ import annotations

import numpy as np
import pytest
import supervision as sv
from hypothesis import given, settings
from hypothesis import strategies as st

from grounded_sam import ConfigError
from grounded_sam.pipeline.track_settings import TrackSettings
from grounded_sam.pipeline.tracks import TrackManager
from grounded_sam.structures.detections import make_detections, tracked_detections
from grounded_sam.structures.masks import mask_iou, masks_to_xyxy
from grounded_sam.structures.vocabulary import Vocabulary

CLASSES = Vocabulary.parse(["a", "b"])
SIZE = (40, 60)


def square(x: int, y: int, side: int = 12) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[y : y + side, x : x + side] = True
    return mask


def detected(*objects: tuple[np.ndarray, float, int]) -> sv.Detections:
    """Detections from rows of mask, score, class."""
    masks = np.array([mask for mask, _, _ in objects], bool).reshape(-1, *SIZE)
    scores, classes = [score for _, score, _ in objects], [class_id for _, _, class_id in objects]
    return make_detections(masks_to_xyxy(masks), scores, classes, CLASSES, SIZE, masks)


def tracked(masks_by_id: dict[int, np.ndarray]) -> sv.Detections:
    """Tracked detections from masks by id."""
    masks, ones = np.array(list(masks_by_id.values()), bool).reshape(-1, *SIZE), np.ones(len(masks_by_id))
    return tracked_detections(np.array(list(masks_by_id), np.int64), masks, ones, ones)


def start(tracks: TrackManager, *objects: tuple[np.ndarray, float, int]) -> dict[int, np.ndarray]:
    """Start tracks from detections; return their masks by id."""
    new = tracks.match(tracked({}), detected(*objects)).new
    return dict(zip(new.tracker_id.tolist(), new.mask, strict=True))


def test_mask_iou_equals_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, *SIZE)) > 0.5, rng.random((4, *SIZE)) > 0.3
    want = [[(x & y).sum() / (x | y).sum() for y in b] for x in a]
    np.testing.assert_allclose(mask_iou(a, b), want)
    assert mask_iou(a, b[:0]).shape == (3, 0)


def test_a_detection_on_a_track_confirms_it_and_another_starts_one():
    tracks = TrackManager(TrackSettings())
    masks = start(tracks, (square(5, 5), 0.8, 0))
    match = tracks.match(tracked(masks), detected((square(6, 5), 0.7, 0), (square(30, 20), 0.6, 0)))
    assert match.new.tracker_id.tolist() == [2]
    np.testing.assert_array_equal(match.new.mask[0], square(30, 20))
    assert tracks.live[1].votes == {0: pytest.approx((2, 0.8 + 0.7))}


def test_matching_maximizes_total_overlap():
    tracks = TrackManager(TrackSettings(match_iou=0.1))
    masks = start(tracks, (square(5, 5), 0.9, 0), (square(11, 5), 0.8, 0))
    match = tracks.match(tracked(masks), detected((square(10, 5), 0.9, 0), (square(4, 5), 0.5, 0)))
    assert len(match.new) == 0
    assert tracks.live[1].votes[0] == pytest.approx((2, 0.9 + 0.5))
    assert tracks.live[2].votes[0] == pytest.approx((2, 0.8 + 0.9))


def test_another_class_in_the_same_place_starts_a_track_by_default():
    for across, count in ((False, 1), (True, 0)):
        tracks = TrackManager(TrackSettings(class_agnostic=across))
        masks = start(tracks, (square(5, 5), 0.6, 0))
        assert len(tracks.match(tracked(masks), detected((square(5, 5), 0.9, 1))).new) == count


def test_the_class_of_a_track_is_voted_on_and_does_not_flicker():
    tracks = TrackManager(TrackSettings(class_agnostic=True))
    masks = start(tracks, (square(5, 5), 0.6, 0))
    names = []
    for score, class_id in ((0.5, 1), (0.6, 0), (0.5, 1), (0.9, 1), (0.4, 0)):
        tracks.match(tracked(masks), detected((square(5, 5), score, class_id)))
        names.append(tracks.label(tracked(masks), CLASSES).data["class_name"][0])
    assert names == ["a", "a", "a", "b", "b"]


def test_a_duplicate_detection_starts_no_track():
    tracks = TrackManager(TrackSettings())
    masks = start(tracks, (square(5, 5), 0.8, 0))
    match = tracks.match(tracked(masks), detected((square(5, 5), 0.7, 0), (square(6, 6), 0.6, 0)))
    assert len(match.new) == 0 and len(tracks.live) == 1


def test_weak_detections_confirm_tracks_but_start_none():
    tracks = TrackManager(TrackSettings(new_track_score=0.5))
    masks = start(tracks, (square(5, 5), 0.8, 0), (square(30, 5), 0.4, 0))
    assert list(masks) == [1]
    tracks.match(tracked(masks), detected((square(5, 5), 0.2, 0)))
    assert tracks.live[1].votes[0][0] == 2


def test_max_objects_keeps_the_most_confident():
    tracks = TrackManager(TrackSettings(max_objects=2))
    masks = start(tracks, (square(5, 5), 0.5, 0), (square(30, 5), 0.9, 0), (square(5, 25), 0.7, 0))
    assert [mask.tolist() for mask in masks.values()] == [square(30, 5).tolist(), square(5, 25).tolist()]


def test_the_younger_of_two_tracks_on_one_object_is_hidden():
    tracks = TrackManager(TrackSettings())
    masks = start(tracks, (square(6, 5), 0.8, 0), (square(5, 5), 0.9, 0), (square(30, 25), 0.9, 1))
    drifted = dict.fromkeys(masks, square(5, 5))
    assert [tracks.live[i].class_id for i in (1, 2, 3)] == [0, 1, 0]
    assert tracks.match(tracked(drifted), detected()).hidden == [3]
    update = tracks.update(tracked(drifted))
    visible_now = update.visible
    assert visible_now.tracker_id.tolist() == [1, 2]


@pytest.mark.parametrize("x", [5, 30])
def test_of_two_tracks_on_one_object_the_one_that_left_its_own_is_hidden(x):
    """The older one is on the left; both masks are at `x`."""
    tracks = TrackManager(TrackSettings())
    start(tracks, (square(5, 5), 0.9, 0), (square(30, 5), 0.8, 0))
    stray, other = (1, 2) if x == 30 else (2, 1)
    objects = detected((square(5, 5), 0.9, 0), (square(30, 5), 0.8, 0))
    match = tracks.match(tracked(dict.fromkeys((1, 2), square(x + 1, 5))), objects)
    # It is recovered where it was last confirmed, by the detection of its object, and none starts.
    assert match.corrected.tracker_id.tolist() == [stray] and not match.hidden and not len(match.new)
    assert match.corrected.xyxy[0, 0] == 35 - x and other in tracks.live
    # If its object is not detected, it is hidden.
    assert tracks.match(tracked(dict.fromkeys((1, 2), square(x, 5))), detected((square(x, 5), 0.9, 0))).hidden == [
        stray
    ]


def test_a_track_whose_mask_goes_over_to_a_look_alike_is_hidden_until_its_object_is_detected():
    """Half of the mask is still on its own object, so that the two tracks are not duplicates yet."""
    tracks = TrackManager(TrackSettings())
    masks = start(tracks, (square(5, 5), 0.9, 0), (square(30, 5), 0.8, 0))
    slid = square(30, 5) | square(5, 5, 6)
    match = tracks.match(tracked(masks | {1: slid}), detected((square(30, 5), 0.9, 0)))
    assert match.hidden == [1] and not len(match.new)
    visible = tracks.update(tracked(masks | {1: slid})).visible
    assert visible.tracker_id.tolist() == [2]
    match = tracks.match(visible, detected((square(30, 5), 0.9, 0), (square(6, 5), 0.9, 0)), tracked({1: slid}))
    assert match.corrected.tracker_id.tolist() == [1] and not len(match.new)


def test_a_track_that_no_detection_confirms_stays_where_it_overlaps_none():
    tracks = TrackManager(TrackSettings())
    masks = start(tracks, (square(5, 5), 0.9, 0), (square(30, 5), 0.8, 0))
    assert not tracks.match(tracked(masks | {1: square(12, 5)}), detected((square(30, 5), 0.9, 0))).hidden


def test_a_detection_of_a_part_of_a_confirmed_object_starts_no_track():
    tracks = TrackManager(TrackSettings())
    whole, corner = square(5, 5, 20), square(18, 5, 6)
    masks = start(tracks, (whole, 0.9, 0))
    assert not len(tracks.match(tracked(masks), detected((whole, 0.9, 0), (corner, 0.6, 0))).new)
    # Another class, an object in front that the mask of the track leaves out, and one beside it are objects.
    for found, mask in (
        ((corner, 0.6, 1), whole),
        ((corner, 0.6, 0), whole & ~corner),
        ((square(26, 5, 6), 0.6, 0), whole),
    ):
        tracks = TrackManager(TrackSettings())
        start(tracks, (mask, 0.9, 0))
        assert len(tracks.match(tracked({1: mask}), detected((mask, 0.9, 0), found)).new) == 1
    # So is a part without the whole: that may be hidden, with a mask that is too large.
    tracks = TrackManager(TrackSettings())
    start(tracks, (whole, 0.9, 0))
    assert len(tracks.match(tracked({1: whole}), detected((corner, 0.6, 0))).new) == 1


def test_a_detection_whose_box_is_that_of_a_track_and_whose_mask_is_not_starts_no_track():
    """Where two objects cross, the box of one may get the mask of the other: neither track is hidden."""
    tracks = TrackManager(TrackSettings())
    left, right = square(5, 5), square(18, 5)
    masks = start(tracks, (left, 0.9, 0), (right, 0.8, 1))
    wrong = detected((right, 0.9, 0))
    wrong.xyxy[0] = [4, 5, 20, 17]
    match = tracks.match(tracked(masks), wrong)
    assert not len(match.new) and not len(match.corrected) and not match.hidden
    assert tracks.live[1].votes[0][0] == 2
    # A track that another detection confirms has its object: this is a second one.
    match = tracks.match(tracked(masks), detected((left, 0.9, 0), (square(5, 18), 0.8, 0)))
    assert len(match.new) == 1


def test_a_drifting_track_is_corrected_only_if_correct_is_set():
    for correct, score, want in ((False, 0.9, []), (True, 0.9, [1]), (True, 0.5, [])):
        tracks = TrackManager(TrackSettings(correct=correct))
        masks = start(tracks, (square(5, 5), 0.6, 0))
        match = tracks.match(tracked(masks), detected((square(8, 5), score, 0)))
        assert match.corrected.tracker_id.tolist() == want


def test_a_lost_track_is_recovered_where_the_tracker_predicts_it():
    tracks = TrackManager(TrackSettings(max_center_distance=0))
    masks = start(tracks, (square(5, 5), 0.6, 0), (square(30, 5), 0.5, 1))
    tracks.update(tracked({2: masks[2]}))
    back = (square(20, 25), 0.8, 0)
    match = tracks.match(tracked({2: masks[2]}), detected(back, (square(30, 5), 0.5, 1)), tracked({1: square(21, 25)}))
    assert match.corrected.tracker_id.tolist() == [1] and not len(match.new)
    assert tracks.live[1].lost == 0
    # A prediction elsewhere, or a detection of another class there, is another object.
    for other in ((square(5, 25), 0.8, 0), (square(20, 25), 0.8, 1)):
        tracks.update(tracked({2: masks[2]}))
        match = tracks.match(tracked({2: masks[2]}), detected(other), tracked({1: square(21, 25)}))
        assert not len(match.corrected) and len(match.new) == 1


def test_a_lost_track_is_recovered_near_its_last_box():
    """The diagonal of the square is 17 px: a detection 10 px lost is near enough, one 25 px lost is not."""
    for x, class_id, recovered in ((15, 0, [1]), (30, 0, []), (15, 1, [])):
        tracks = TrackManager(TrackSettings(max_center_distance=1))
        start(tracks, (square(5, 5), 0.6, 0))
        tracks.update(tracked({}))
        match = tracks.match(tracked({}), detected((square(x, 5), 0.8, class_id)))
        assert match.corrected.tracker_id.tolist() == recovered and len(match.new) == 1 - len(recovered)


def test_a_track_that_was_last_seen_as_a_sliver_is_recovered_by_the_size_of_the_whole_object():
    tracks = TrackManager(TrackSettings(max_center_distance=1))
    sliver = square(5, 5) & (np.arange(SIZE[1]) < 7)
    start(tracks, (sliver, 0.6, 0))
    tracks.update(tracked({}))
    match = tracks.match(tracked({}), detected((square(15, 5), 0.8, 0)))
    assert match.corrected.tracker_id.tolist() == [1] and not len(match.new)


def test_a_track_that_jumps_is_hidden_until_it_is_confirmed():
    tracks = TrackManager(TrackSettings(min_step_iou=0.5))
    masks = start(tracks, (square(5, 5), 0.6, 0))
    tracks.remember(tracked(masks))
    assert len(tracks.update(tracked({1: square(6, 5)})).visible) == 1
    update = tracks.update(tracked({1: square(40, 20)}))
    visible_now, ended, jumped = update.visible, update.ended, update.jumped
    assert not len(visible_now) and not ended and jumped == [1]
    assert not len(tracks.update(tracked({1: square(41, 20)})).visible)
    match = tracks.match(visible_now, detected((square(8, 5), 0.7, 0)), tracked({1: square(41, 20)}))
    assert match.corrected.tracker_id.tolist() == [1] and not tracks.live[1].hidden


def test_look_alikes_that_the_memory_confuses_keep_their_ids():
    """Track 1 jumps to the other object, whose track is predicted where the first one is."""
    tracks = TrackManager(TrackSettings(min_step_iou=0.5, max_center_distance=3))
    a, b = square(5, 5), square(22, 5)
    tracks.remember(tracked(start(tracks, (a, 0.9, 0), (b, 0.8, 0))))
    for _ in range(20):
        tracks.update(tracked({1: a}))  # the other object is behind something
    visible = tracks.update(tracked({1: b})).visible
    match = tracks.match(visible, detected((b, 0.9, 0), (a, 0.8, 0)), tracked({1: b, 2: a}))
    assert dict(zip(match.corrected.tracker_id.tolist(), match.corrected.xyxy[:, 0], strict=True)) == {1: 5, 2: 22}


def test_a_track_that_was_visible_at_the_last_keyframe_comes_before_one_that_is_predicted_in_its_place():
    tracks = TrackManager(TrackSettings(max_center_distance=0))
    a = square(5, 5)
    start(tracks, (a, 0.9, 0), (square(40, 20), 0.8, 0))
    for _ in range(20):
        tracks.update(tracked({1: a}))
    tracks.update(tracked({}))
    match = tracks.match(tracked({}), detected((a, 0.9, 0)), tracked({1: square(40, 5), 2: square(6, 5)}))
    assert match.corrected.tracker_id.tolist() == [1]


def test_a_click_shows_a_hidden_track_again():
    tracks = TrackManager(TrackSettings(min_step_iou=0.5))
    tracks.remember(tracked(start(tracks, (square(5, 5), 0.6, 0))))
    assert tracks.update(tracked({1: square(40, 20)})).jumped == [1]
    tracks.start_or_confirm(1, 0, 1.0)
    tracks.remember(tracked({1: square(8, 5)}))
    assert len(tracks.update(tracked({1: square(8, 5)})).visible) == 1


def test_a_duplicate_detection_does_not_recover_a_lost_track_nearby():
    tracks = TrackManager(TrackSettings(max_center_distance=3))
    masks = start(tracks, (square(5, 5), 0.6, 0), (square(20, 5), 0.5, 0))
    tracks.update(tracked({1: masks[1]}))
    match = tracks.match(
        tracked({1: masks[1]}), detected((square(5, 5), 0.8, 0), (square(6, 6), 0.7, 0)), tracked({2: square(6, 6)})
    )
    assert not len(match.corrected) and not len(match.new)


def test_a_track_that_drifts_to_another_class_is_hidden_until_recovered():
    tracks = TrackManager(TrackSettings())
    masks = start(tracks, (square(5, 5), 0.6, 0))
    drifted = {1: square(30, 20)}
    match = tracks.match(tracked(drifted), detected((square(30, 20), 0.7, 1)))
    assert match.hidden == [1] and match.new.tracker_id.tolist() == [2]
    both = tracked(drifted | {2: square(30, 20)})
    update = tracks.update(both)
    visible_now = update.visible
    assert visible_now.tracker_id.tolist() == [2]
    match = tracks.match(visible_now, detected((square(5, 5), 0.6, 0), (square(30, 20), 0.7, 1)), tracked(masks))
    assert match.corrected.tracker_id.tolist() == [1] and not match.hidden
    assert len(tracks.update(tracked(masks | {2: square(30, 20)})).visible) == 2


def test_tracks_of_two_classes_on_one_object_survive_a_missed_class():
    """A woman is a person too: the detector may miss either class at a keyframe."""
    tracks = TrackManager(TrackSettings())
    masks = start(tracks, (square(5, 5), 0.6, 0), (square(5, 5), 0.8, 1))
    tracks.match(tracked(masks), detected((square(5, 5), 0.6, 0), (square(5, 5), 0.8, 1)))
    assert not tracks.match(tracked(masks), detected((square(5, 5), 0.8, 1))).hidden


def test_a_track_ends_after_max_lost_frames():
    tracks = TrackManager(TrackSettings(max_lost_frames=2))
    masks = start(tracks, (square(5, 5), 0.6, 0))
    assert tracks.update(tracked({})).ended == [] and tracks.update(tracked({})).ended == []
    assert tracks.update(tracked(masks)).ended == []
    assert [tracks.update(tracked({})).ended for _ in range(3)] == [[], [], [1]]
    assert not tracks.live


def test_ids_that_a_click_has_used_are_not_given_to_others():
    tracks = TrackManager(TrackSettings())
    assert tracks.new_id() == 1
    tracks.start_or_confirm(3, class_id=0, confidence=1.0)
    assert [tracks.new_id() for _ in range(2)] == [2, 4]


boxes = st.tuples(st.integers(0, 45), st.integers(0, 25), st.floats(0, 1, width=32), st.integers(0, 1))


@settings(max_examples=60)
@given(st.lists(st.lists(boxes, max_size=5), max_size=6), st.booleans(), st.data())
def test_an_id_is_one_object_and_is_never_reused(keyframes, class_agnostic, data):
    tracks = TrackManager(TrackSettings(class_agnostic=class_agnostic, max_lost_frames=1, max_objects=4))
    given_ids: list[int] = []
    masks: dict[int, np.ndarray] = {}
    for objects in keyframes:
        masks = {i: m for i, m in masks.items() if i in tracks.live and data.draw(st.booleans())}
        update = tracks.update(tracked(masks))
        visible_now, ended = update.visible, update.ended
        masks = {i: m for i, m in masks.items() if i not in ended}
        before, visible = set(tracks.live), set(visible_now.tracker_id.tolist())
        lost = {i: square(data.draw(st.integers(0, 45)), 10) for i in before - visible}
        match = tracks.match(visible_now, detected(*((square(x, y), s, c) for x, y, s, c in objects)), tracked(lost))
        new = match.new.tracker_id.tolist()
        assert not set(new) & set(given_ids) and len(set(new)) == len(new)
        assert set(tracks.live) == before | set(new)
        assert set(match.hidden) <= visible
        recovered = match.corrected.tracker_id.tolist()
        assert len(set(recovered)) == len(recovered) and not set(recovered) & set(match.hidden)
        assert len(tracks.live) <= 4
        given_ids += new
        masks = masks | dict(zip(new, match.new.mask, strict=True))
        labeled = tracks.label(tracked(masks), CLASSES)
        assert sorted(labeled.tracker_id.tolist()) == sorted(masks)
        assert all((labeled.confidence >= 0) & (labeled.confidence <= 1))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"redetect_every": 0}, "track.redetect_every"),
        ({"match_iou": 2}, "track.match_iou"),
        ({"new_track_score": "x"}, "track.new_track_score"),
        ({"max_lost_frames": -1}, "track.max_lost_frames"),
        ({"max_center_distance": -1}, "track.max_center_distance"),
        ({"max_objects": 0}, "track.max_objects"),
        ({"direction": "back"}, "track.direction"),
    ],
)
def test_settings_out_of_range_name_their_key(keys, message):
    with pytest.raises(ConfigError, match=message):
        TrackSettings(**keys)
