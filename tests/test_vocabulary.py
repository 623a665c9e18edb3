from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from grounded_sam import Vocabulary, VocabularyError


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("cat", ["cat"]),
        ("car . wheel", ["car", "wheel"]),
        ("car, wheel", ["car", "wheel"]),
        ("car. tire.", ["car", "tire"]),
        ("car; wheel\ntree", ["car", "wheel", "tree"]),
        ("parking entrance sign", ["parking entrance sign"]),
        ("U.S. flag", ["U.S. flag"]),
        ("U.S. flag, T-shirt?", ["U.S. flag", "T-shirt?"]),
        ("猫, chat noir", ["猫", "chat noir"]),
        (["car", "wheel", "car"], ["car", "wheel"]),
        (["Mr. Bean", "a. b"], ["Mr. Bean", "a. b"]),
        ([7], ["7"]),
    ],
)
def test_text_in_every_form_becomes_classes_in_order(text, classes):
    assert list(Vocabulary.parse(text).classes) == classes


def test_mapping_gives_phrases_to_classes():
    words = Vocabulary.parse({"vehicle": ["car", "truck"], "dog": "puppy", "tree": None}, negative="toy car, statue")
    assert words.classes == ("vehicle", "dog", "tree")
    assert words.phrases == (("car", "truck"), ("puppy",), ("tree",))
    assert words.negatives == ("toy car", "statue")


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".txt"])
def test_files_hold_the_same_forms(tmp_path, suffix):
    path = tmp_path / f"classes{suffix}"
    content = {"vehicle": ["car", "truck"], "dog": "puppy"}
    text = {
        ".yaml": yaml.safe_dump(content, sort_keys=False),
        ".json": json.dumps(content),
        ".txt": "vehicle\n# no\n\ndog\n",
    }
    path.write_text(text[suffix], encoding="utf-8")
    words = Vocabulary.parse(str(path))
    assert words.classes == ("vehicle", "dog")
    assert words.phrases == ((("vehicle",), ("dog",)) if suffix == ".txt" else (("car", "truck"), ("puppy",)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ([], "names no class"),
        ("", "names no class"),
        (["?"], "without letters"),
        ({"a": ["car"], "b": ["Car."]}, "stands for both 'a' and 'b'"),
        ([["car"]], "expected phrases"),
        (3.5, "got float"),
        ("nowhere.yaml", "cannot read the classes in nowhere.yaml"),
    ],
)
def test_what_names_nothing_or_one_thing_twice_is_refused_in_words(text, says):
    with pytest.raises(VocabularyError, match=says):
        Vocabulary.parse(text)


def test_a_negative_cannot_be_a_class():
    with pytest.raises(VocabularyError, match="stands for both"):
        Vocabulary.parse(["car"], negative=["car"])


def test_broken_files_are_named(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [b", encoding="utf-8")
    (tmp_path / "b.json").write_text("{", encoding="utf-8")
    (tmp_path / "c.yaml").write_text("just words", encoding="utf-8")
    for name, says in [("a.yaml", "not valid YAML"), ("b.json", "not valid JSON"), ("c.yaml", "must hold a list")]:
        with pytest.raises(VocabularyError, match=says):
            Vocabulary.parse(str(tmp_path / name))


words = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=12)


@given(st.lists(words, min_size=1, max_size=20, unique_by=str.casefold))
def test_a_list_and_its_joined_string_mean_the_same(names):
    assert Vocabulary.parse(", ".join(names)) == Vocabulary.parse(names)


@given(st.lists(words.filter(lambda w: len(w) > 1), min_size=1, max_size=20, unique_by=str.casefold))
def test_full_stops_part_classes_as_commas_do(names):
    assert Vocabulary.parse(" . ".join(names)) == Vocabulary.parse(names)
