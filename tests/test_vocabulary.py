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


def test_a_mapping_gives_classes_their_phrases():
    vocabulary = Vocabulary.parse(
        {"vehicle": ["car", "truck"], "dog": "puppy", "tree": None}, negative="toy car, statue"
    )
    assert vocabulary.classes == ("vehicle", "dog", "tree")
    assert vocabulary.phrases == (("car", "truck"), ("puppy",), ("tree",))
    assert vocabulary.negatives == ("toy car", "statue")


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".txt"])
def test_files_may_hold_the_same_forms(tmp_path, suffix):
    path = tmp_path / f"classes{suffix}"
    content = {"vehicle": ["car", "truck"], "dog": "puppy"}
    text = {
        ".yaml": yaml.safe_dump(content, sort_keys=False),
        ".json": json.dumps(content),
        ".txt": "vehicle\n# comment\n\ndog\n",
    }
    path.write_text(text[suffix], encoding="utf-8")
    vocabulary = Vocabulary.parse(str(path))
    assert vocabulary.classes == ("vehicle", "dog")
    assert vocabulary.phrases == ((("vehicle",), ("dog",)) if suffix == ".txt" else (("car", "truck"), ("puppy",)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([], "names no class"),
        ("", "names no class"),
        (["?"], "without letters"),
        ({"a": ["car"], "b": ["Car."]}, "belongs to both 'a' and 'b'"),
        ([["car"]], "expected phrases"),
        (3.5, "got float"),
        ("nowhere.yaml", "cannot read the classes in nowhere.yaml"),
    ],
)
def test_text_without_classes_or_with_duplicates_is_refused(text, message):
    with pytest.raises(VocabularyError, match=message):
        Vocabulary.parse(text)


def test_a_negative_cannot_be_a_class():
    with pytest.raises(VocabularyError, match="belongs to both"):
        Vocabulary.parse(["car"], negative=["car"])


def test_invalid_files_are_named_in_the_error(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [b", encoding="utf-8")
    (tmp_path / "b.json").write_text("{", encoding="utf-8")
    (tmp_path / "c.yaml").write_text("just words", encoding="utf-8")
    for name, message in [("a.yaml", "not valid YAML"), ("b.json", "not valid JSON"), ("c.yaml", "must hold a list")]:
        with pytest.raises(VocabularyError, match=message):
            Vocabulary.parse(str(tmp_path / name))


CLASS_NAMES = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=12)


@given(st.lists(CLASS_NAMES, min_size=1, max_size=20, unique_by=str.casefold))
def test_a_list_and_its_joined_string_are_equivalent(names):
    assert Vocabulary.parse(", ".join(names)) == Vocabulary.parse(names)


@given(st.lists(CLASS_NAMES.filter(lambda name: len(name) > 1), min_size=1, max_size=20, unique_by=str.casefold))
def test_full_stops_separate_classes_like_commas(names):
    assert Vocabulary.parse(" . ".join(names)) == Vocabulary.parse(names)


ONTOLOGY = """
classes:
  car: {phrases: [car, taxi], id: 3, score: 0.4, colour: red, supercategory: vehicle}
  "no": {id: 7}
  truck: {phrases: lorry, id: 8, colour: "#00ff7f"}
negatives: [toy car]
"""


def test_an_ontology_sets_all_properties_of_a_class(tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text(ONTOLOGY)
    vocabulary = Vocabulary.parse(str(path), ["statue"])
    assert vocabulary.classes == ("car", "no", "truck")
    assert vocabulary.phrases == (("car", "taxi"), ("no",), ("lorry",))
    assert vocabulary.negatives == ("toy car", "statue")
    assert vocabulary.category_ids == (3, 7, 8) and vocabulary.class_score == {"car": 0.4}
    assert vocabulary.palette()[0] == "#ff0000" and vocabulary.palette()[2] == "#00ff7f"
    assert vocabulary.categories()[0] == {"id": 3, "name": "car", "supercategory": "vehicle"}
    assert vocabulary.categories()[1] == {"id": 7, "name": "no"}


@pytest.mark.parametrize(
    "classes",
    [["car", "truck"], {"car": None, "truck": None}, [{"name": "car"}, "truck"], {"car": "car", "truck": ["truck"]}],
)
def test_an_ontology_can_be_written_in_every_form(classes):
    vocabulary = Vocabulary.parse({"classes": classes})
    assert vocabulary == Vocabulary.parse(["car", "truck"]) and vocabulary.category_ids == (1, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"classes": {"car": {"scroe": 0.3}}}, r"classes.car: .*'scroe'.*keys are colour, id, phrases, score"),
        ({"classes": {"car": {"score": 1.5}}}, r"classes.car.score: 1.5 is greater than the maximum"),
        ({"classes": {"car": {"score": "high"}}}, r"classes.car.score: 'high' is not of type 'number'"),
        ({"classes": {"car": {"id": 1.5}}}, r"classes.car.id: 1.5 is not of type 'integer'"),
        ({"classes": {"car": {"id": 1}, "bus": {}}}, r"give all classes an id, or none; there is none for 'bus'"),
        ({"classes": {"car": {"id": 1}, "bus": {"id": 1}}}, r"'car' and 'bus' have the same id 1"),
        ({"classes": {"car": {"colour": "redish"}}}, r"classes.car.colour: 'redish' is not a color"),
        ({"classes": {"car": {}}, "negative": ["x"]}, r"'negative' was unexpected.*keys are .*negatives"),
        ({"classes": []}, r"names no class"),
        ({"classes": "car"}, r"mapping or a list"),
        ({"classes": [{"phrases": ["x"]}]}, r"needs a name"),
        ({"classes": ["car", "car"]}, r"no two the same"),
        ({"categories": [{"name": "car"}]}, r"must have an id and a name"),
    ],
)
def test_errors_in_an_ontology_name_the_key(content, message):
    with pytest.raises(VocabularyError, match=message):
        Vocabulary.parse(content)


def test_categories_of_a_coco_file_keep_their_ids(tmp_path):
    categories = [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 1, "name": "person"}]
    (tmp_path / "instances.json").write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    vocabulary = Vocabulary.parse(str(tmp_path / "instances.json"))
    assert vocabulary.classes == ("dog", "person") and vocabulary.category_ids == (18, 1)
    assert vocabulary.categories() == categories


def test_appended_classes_get_free_ids():
    vocabulary = Vocabulary.parse({"classes": {"a": {"id": 5, "score": 0.2}, "b": {"id": 2}}}).with_classes(
        ["b", "c", "d"]
    )
    assert (
        vocabulary.classes == ("a", "b", "c", "d")
        and vocabulary.ids == (5, 2, 6, 7)
        and vocabulary.class_score == {"a": 0.2}
    )
    assert Vocabulary.parse(["a"]).with_classes(["b"]).category_ids == (1, 2)


@pytest.mark.parametrize(
    ("name", "content", "classes", "ids"),
    [
        ("data.yaml", "path: ../d\ntrain: images\nnc: 2\nnames: [red circle, bolt]", ("red circle", "bolt"), (1, 2)),
        ("data.yaml", "names:\n  1: bolt\n  0: red circle", ("red circle", "bolt"), (1, 2)),
        ("data.yaml", "names: {3: bolt, 1: nut}", ("nut", "bolt"), (1, 3)),
        ("obj.names", "red circle\nbolt\n", ("red circle", "bolt"), (1, 2)),
        ("id2label.json", '{"1": "bolt", "0": "red circle"}', ("red circle", "bolt"), (1, 2)),
        ("label2id.json", '{"bolt": 1, "red circle": 0}', ("red circle", "bolt"), (1, 2)),
        ("config.json", '{"model_type": "x", "id2label": {"0": "a", "1": "b"}}', ("a", "b"), (1, 2)),
        ("labels.json", '[{"id": 7, "name": "bolt"}, {"id": 2, "name": "nut"}]', ("bolt", "nut"), (7, 2)),
        ("labels.json", '[{"name": "bolt"}, {"name": "nut"}]', ("bolt", "nut"), (1, 2)),
        ("classes.csv", "name,id\nbolt,4\nnut,9\n", ("bolt", "nut"), (4, 9)),
        ("classes.csv", "bolt,0\nnut,1\n", ("bolt", "nut"), (1, 2)),
        ("classes.csv", "bolt\nnut\n", ("bolt", "nut"), (1, 2)),
        ("classes.txt", "C# book\n#1 bolt\n# x\n#\nring # my\n", ("C# book", "#1 bolt", "ring"), (1, 2, 3)),
        ("names.yaml", "names: [signature, name tag]\nface: [face]\n", ("names", "face"), (1, 2)),
    ],
)
def test_class_files_of_other_tools_are_read(name, content, classes, ids, tmp_path):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    vocabulary = Vocabulary.parse(str(path))
    assert vocabulary.classes == classes
    assert vocabulary.category_ids == ids


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "car: [car]\ndog: []\ncar: [auto]", "the key 'car' appears twice"),
        ("a.yaml", "classes: {car: {id: 1, id: 2}}", "the key 'id' appears twice"),
        ("a.json", '{"car": "a", "car": "b"}', "the key 'car' appears twice"),
        ("a.yaml", 'classes: {"": {phrases: [x]}, car: {}}', "a class has an empty name"),
        ("a.yaml", '"": [x]\ncar: [car]', "a class has an empty name"),
        ("a.json", '{"categories": [{"id": 1, "name": ""}]}', "must have an id and a name"),
        ("a.json", '{"categories": [{"id": 1, "name": null}]}', "must have an id and a name"),
        ("data.yaml", "nc: 3\nnames: [a, b]", "nc is 3, but there are 2 names"),
        ("a.json", '{"car": 1, "dog": 1}', "have the same id 1|named twice"),
        ("a.csv", "x,y,z\n1,2,3", "expected a column called name"),
        ("a.csv", "car,1\ncar,2", "'car' is a name twice"),
        ("labels.pbtxt", "item {}", "is a file, but not one of classes"),
        ("car", "x", "is a file, but not one of classes"),
    ],
)
def test_class_files_that_are_unclear_are_refused_by_name(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(VocabularyError, match=message) as error:
        Vocabulary.parse(str(path))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_file_in_a_list_is_no_phrase_but_a_list_can_name_what_is_also_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.yaml").write_text("[car]")
    (tmp_path / "cat").write_text("")
    with pytest.raises(VocabularyError, match=r"to read its classes write text=classes.yaml"):
        Vocabulary.parse(["dog", "classes.yaml"])
    with pytest.raises(VocabularyError, match=r"write text=\[cat\]"):
        Vocabulary.parse("cat")
    assert Vocabulary.parse(["cat"]).classes == ("cat",)
    assert Vocabulary.parse("x" * 5000 + ", ~nobody").classes[1] == "~nobody"


def test_a_list_or_mapping_inside_quotes_is_none_of_its_brackets():
    assert Vocabulary.parse("[green star, driver's license]").classes == ("green star", "driver's license")
    assert Vocabulary.parse("{vehicle: [car, bus]}").phrases == (("car", "bus"),)
    assert Vocabulary.parse("car", negative="[toy car, statue]").negatives == ("toy car", "statue")
    with pytest.raises(VocabularyError, match="'True'|got True"):
        Vocabulary.parse([True])
