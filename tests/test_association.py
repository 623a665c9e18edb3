"""Matching, ids and classes of tracks."""

from __future__ import annotations

import numpy as np
import pytest
import supervision as sv
from hypothesis import given, settings
from hypothesis import strategies as st

from grounded_sam import ConfigError
from grounded_sam.pipeline.tracks import TrackManager, TrackSettings
from grounded_sam.structures.detections import make_detections, tracked_detections
from grounded_sam.structures.masks import mask_iou, masks_to_xyxy
from grounded_sam.structures.vocabulary import Vocabulary

CLASSES = Vocabulary.parse(["a", "b"])
SIZE = (40, 60)


def square(x: int, y: int, side: int = 12) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[y : y + side, x : x + side] = True
    return mask


def found(*things: tuple[np.ndarray, float, int]) -> sv.Detections:
    masks = np.array([mask for mask, _, _ in things], bool).reshape(-1, *SIZE)
    scores, classes = [score for _, score, _ in things], [class_id for _, _, class_id in things]
    return make_detections(masks_to_xyxy(masks), scores, classes, CLASSES, SIZE, masks)


def seen(things: dict[int, np.ndarray]) -> sv.Detections:
    masks = np.array(list(things.values()), bool).reshape(-1, *SIZE)
    return tracked_detections(np.array(list(things), np.int64), masks, np.ones(len(things)), np.ones(len(things)))


def begin(tracks: TrackManager, *things: tuple[np.ndarray, float, int]) -> dict[int, np.ndarray]:
    new = tracks.match(seen({}), found(*things)).new
    return dict(zip(new.tracker_id.tolist(), new.mask, strict=True))


def test_mask_iou_is_that_of_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, *SIZE)) > 0.5, rng.random((4, *SIZE)) > 0.3
    want = [[(x & y).sum() / (x | y).sum() for y in b] for x in a]
    np.testing.assert_allclose(mask_iou(a, b), want)
    assert mask_iou(a, b[:0]).shape == (3, 0)


def test_a_detection_on_a_track_is_that_track_and_one_elsewhere_is_new():
    tracks = TrackManager(TrackSettings())
    here = begin(tracks, (square(5, 5), 0.8, 0))
    change = tracks.match(seen(here), found((square(6, 5), 0.7, 0), (square(30, 20), 0.6, 0)))
    assert change.new.tracker_id.tolist() == [2]
    np.testing.assert_array_equal(change.new.mask[0], square(30, 20))
    assert tracks.live[1].votes == {0: pytest.approx((2, 0.8 + 0.7))}


def test_the_surest_pairing_of_all_wins_and_not_the_first():
    tracks = TrackManager(TrackSettings(match_iou=0.1))
    here = begin(tracks, (square(5, 5), 0.9, 0), (square(11, 5), 0.8, 0))
    change = tracks.match(seen(here), found((square(10, 5), 0.9, 0), (square(4, 5), 0.5, 0)))
    assert len(change.new) == 0
    assert tracks.live[1].votes[0] == pytest.approx((2, 0.9 + 0.5))
    assert tracks.live[2].votes[0] == pytest.approx((2, 0.8 + 0.9))


def test_another_class_in_the_same_place_is_another_track_unless_asked():
    for across, count in ((False, 1), (True, 0)):
        tracks = TrackManager(TrackSettings(match_across=across))
        here = begin(tracks, (square(5, 5), 0.6, 0))
        assert len(tracks.match(seen(here), found((square(5, 5), 0.9, 1))).new) == count


def test_the_class_is_voted_on_and_does_not_flicker():
    tracks = TrackManager(TrackSettings(match_across=True))
    here = begin(tracks, (square(5, 5), 0.6, 0))
    names = []
    for score, class_id in ((0.5, 1), (0.6, 0), (0.5, 1), (0.9, 1), (0.4, 0)):
        tracks.match(seen(here), found((square(5, 5), score, class_id)))
        names.append(tracks.label(seen(here), CLASSES).data["class_name"][0])
    assert names == ["a", "a", "a", "b", "b"]


def test_a_duplicate_detection_begins_nothing():
    tracks = TrackManager(TrackSettings())
    here = begin(tracks, (square(5, 5), 0.8, 0))
    change = tracks.match(seen(here), found((square(5, 5), 0.7, 0), (square(6, 6), 0.6, 0)))
    assert len(change.new) == 0 and len(tracks.live) == 1


def test_only_confident_detections_begin_a_track_but_weak_ones_confirm():
    tracks = TrackManager(TrackSettings(new_track_score=0.5))
    here = begin(tracks, (square(5, 5), 0.8, 0), (square(30, 5), 0.4, 0))
    assert list(here) == [1]
    tracks.match(seen(here), found((square(5, 5), 0.2, 0)))
    assert tracks.live[1].votes[0][0] == 2


def test_at_most_so_many_objects_the_surest_first():
    tracks = TrackManager(TrackSettings(max_objects=2))
    here = begin(tracks, (square(5, 5), 0.5, 0), (square(30, 5), 0.9, 0), (square(5, 25), 0.7, 0))
    assert [mask.tolist() for mask in here.values()] == [square(30, 5).tolist(), square(5, 25).tolist()]


def test_of_two_tracks_on_one_object_the_older_is_shown():
    tracks = TrackManager(TrackSettings())
    here = begin(tracks, (square(5, 5), 0.8, 0), (square(30, 5), 0.9, 0), (square(30, 25), 0.9, 1))
    drifted = dict.fromkeys(here, square(5, 5))
    assert [tracks.live[i].class_id for i in (1, 2, 3)] == [0, 1, 0]
    assert tracks.match(seen(drifted), found()).hidden == [3]
    shown, _, _ = tracks.look(seen(drifted))
    assert shown.tracker_id.tolist() == [1, 2]


def test_a_drifting_track_is_corrected_by_a_surer_detection_only_on_request():
    for correct, score, want in ((False, 0.9, []), (True, 0.9, [1]), (True, 0.5, [])):
        tracks = TrackManager(TrackSettings(correct=correct))
        here = begin(tracks, (square(5, 5), 0.6, 0))
        change = tracks.match(seen(here), found((square(8, 5), score, 0)))
        assert change.corrected.tracker_id.tolist() == want


def test_a_detection_finds_a_lost_track_again_where_the_tracker_guesses_it():
    tracks = TrackManager(TrackSettings(reach=0))
    here = begin(tracks, (square(5, 5), 0.6, 0), (square(30, 5), 0.5, 1))
    tracks.look(seen({2: here[2]}))
    back = (square(20, 25), 0.8, 0)
    change = tracks.match(seen({2: here[2]}), found(back, (square(30, 5), 0.5, 1)), seen({1: square(21, 25)}))
    assert change.corrected.tracker_id.tolist() == [1] and not len(change.new)
    assert tracks.live[1].lost == 0
    # A guess elsewhere, or a detection of another class there, is somebody else.
    for thing in ((square(5, 25), 0.8, 0), (square(20, 25), 0.8, 1)):
        tracks.look(seen({2: here[2]}))
        change = tracks.match(seen({2: here[2]}), found(thing), seen({1: square(21, 25)}))
        assert not len(change.corrected) and len(change.new) == 1


def test_a_detection_near_where_a_track_was_last_seen_finds_it_again():
    """The square's diagonal is 17 px: 10 px away is within its reach of one length, 25 px is not."""
    for x, class_id, again in ((15, 0, [1]), (30, 0, []), (15, 1, [])):
        tracks = TrackManager(TrackSettings(reach=1))
        begin(tracks, (square(5, 5), 0.6, 0))
        tracks.look(seen({}))
        change = tracks.match(seen({}), found((square(x, 5), 0.8, class_id)))
        assert change.corrected.tracker_id.tolist() == again and len(change.new) == 1 - len(again)


def test_a_track_that_jumps_is_hidden_until_a_detection_confirms_it():
    tracks = TrackManager(TrackSettings(jump=0.5))
    here = begin(tracks, (square(5, 5), 0.6, 0))
    tracks.note(seen(here))
    assert len(tracks.look(seen({1: square(6, 5)}))[0]) == 1
    shown, ended, jumped = tracks.look(seen({1: square(40, 20)}))
    assert not len(shown) and not ended and jumped == [1]
    assert not len(tracks.look(seen({1: square(41, 20)}))[0])
    change = tracks.match(shown, found((square(8, 5), 0.7, 0)), seen({1: square(41, 20)}))
    assert change.corrected.tracker_id.tolist() == [1] and not tracks.live[1].hidden


def test_a_click_on_a_hidden_track_shows_it_again():
    tracks = TrackManager(TrackSettings(jump=0.5))
    tracks.note(seen(begin(tracks, (square(5, 5), 0.6, 0))))
    assert tracks.look(seen({1: square(40, 20)}))[2] == [1]
    tracks.begin(1, 0, 1.0)
    tracks.note(seen({1: square(8, 5)}))
    assert len(tracks.look(seen({1: square(8, 5)}))[0]) == 1


def test_a_duplicate_detection_is_no_track_that_was_lost_nearby():
    tracks = TrackManager(TrackSettings(reach=3))
    here = begin(tracks, (square(5, 5), 0.6, 0), (square(20, 5), 0.5, 0))
    tracks.look(seen({1: here[1]}))
    change = tracks.match(
        seen({1: here[1]}), found((square(5, 5), 0.8, 0), (square(6, 6), 0.7, 0)), seen({2: square(6, 6)})
    )
    assert not len(change.corrected) and not len(change.new)


def test_a_track_on_a_detection_of_another_class_is_astray_until_it_is_found_again():
    tracks = TrackManager(TrackSettings())
    here = begin(tracks, (square(5, 5), 0.6, 0))
    strayed = {1: square(30, 20)}
    change = tracks.match(seen(strayed), found((square(30, 20), 0.7, 1)))
    assert change.hidden == [1] and change.new.tracker_id.tolist() == [2]
    both = seen(strayed | {2: square(30, 20)})
    shown, _, _ = tracks.look(both)
    assert shown.tracker_id.tolist() == [2]
    change = tracks.match(shown, found((square(5, 5), 0.6, 0), (square(30, 20), 0.7, 1)), seen(here))
    assert change.corrected.tracker_id.tolist() == [1] and not change.hidden
    assert len(tracks.look(seen(here | {2: square(30, 20)}))[0]) == 2


def test_tracks_of_two_classes_that_belong_together_stay_when_one_is_missed():
    """A woman who is a person too: the detector may miss either word at a keyframe."""
    tracks = TrackManager(TrackSettings())
    here = begin(tracks, (square(5, 5), 0.6, 0), (square(5, 5), 0.8, 1))
    tracks.match(seen(here), found((square(5, 5), 0.6, 0), (square(5, 5), 0.8, 1)))
    assert not tracks.match(seen(here), found((square(5, 5), 0.8, 1))).hidden


def test_patience_with_the_lost():
    tracks = TrackManager(TrackSettings(lost_patience=2))
    here = begin(tracks, (square(5, 5), 0.6, 0))
    assert tracks.look(seen({}))[1] == [] and tracks.look(seen({}))[1] == []
    assert tracks.look(seen(here))[1] == []
    assert [tracks.look(seen({}))[1] for _ in range(3)] == [[], [], [1]]
    assert not tracks.live


def test_ids_of_clicks_are_never_given_to_anything_else():
    tracks = TrackManager(TrackSettings(), reserved=[1, 3])
    assert [tracks.fresh_id() for _ in range(3)] == [2, 4, 5]


boxes = st.tuples(st.integers(0, 45), st.integers(0, 25), st.floats(0, 1, width=32), st.integers(0, 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(boxes, max_size=5), max_size=6), st.booleans(), st.data())
def test_whatever_comes_an_id_is_one_thing_and_is_never_used_again(keyframes, across, data):
    tracks = TrackManager(TrackSettings(match_across=across, lost_patience=1, max_objects=4))
    given_ids: list[int] = []
    here: dict[int, np.ndarray] = {}
    for things in keyframes:
        here = {i: m for i, m in here.items() if i in tracks.live and data.draw(st.booleans())}
        shown, ended, _ = tracks.look(seen(here))
        here = {i: m for i, m in here.items() if i not in ended}
        before, visible = set(tracks.live), set(shown.tracker_id.tolist())
        away = {i: square(data.draw(st.integers(0, 45)), 10) for i in before - visible}
        change = tracks.match(shown, found(*((square(x, y), s, c) for x, y, s, c in things)), seen(away))
        new = change.new.tracker_id.tolist()
        assert not set(new) & set(given_ids) and len(set(new)) == len(new)
        assert set(tracks.live) == before | set(new)
        assert set(change.hidden) <= visible
        again = change.corrected.tracker_id.tolist()
        assert len(set(again)) == len(again) and not set(again) & set(change.hidden)
        assert len(tracks.live) <= 4
        given_ids += new
        here = here | dict(zip(new, change.new.mask, strict=True))
        labelled = tracks.label(seen(here), CLASSES)
        assert sorted(labelled.tracker_id.tolist()) == sorted(here)
        assert all((labelled.confidence >= 0) & (labelled.confidence <= 1))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"redetect_every": 0}, "track.redetect_every"),
        ({"match_iou": 2}, "track.match_iou"),
        ({"new_track_score": "x"}, "track.new_track_score"),
        ({"lost_patience": -1}, "track.lost_patience"),
        ({"reach": -1}, "track.reach"),
        ({"max_objects": 0}, "track.max_objects"),
        ({"direction": "back"}, "track.direction"),
    ],
)
def test_settings_out_of_range_name_their_key(keys, says):
    with pytest.raises(ConfigError, match=says):
        TrackSettings(**keys)
