"""Config: every choice composes, keys match the arguments of classes, and errors are one line."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf

from grounded_sam import ConfigError, GroundedSamError
from grounded_sam.config.build import build_node, load
from grounded_sam.config.compose import RENAMED, check_renamed, compose, to_override
from grounded_sam.config.hydra import conf_dir
from grounded_sam.formats.store_migrations import STAGE_KEYS

CHOICES = [
    (group.name, file.stem)
    for group in sorted(conf_dir().iterdir())
    if group.is_dir() and not group.name.startswith("_")
    for file in sorted(group.glob("*.yaml"))
]


def targets(node, path=""):
    """Yield the path and node of everything in a config that is instantiated."""
    if OmegaConf.is_dict(node):
        if "_target_" in node:
            yield path, node
        for key in node:
            if not OmegaConf.is_missing(node, key) and OmegaConf.is_config(node._get_node(key)):
                yield from targets(node[key], f"{path}.{key}")


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_its_keys_match_its_class(group, choice):
    if choice == "slurm":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra slurm is not installed")
    added = "+" if group == "serve" else ""  # which only the server's command has
    cfg = compose([f"{added}{group}={choice}", "input=x", "text=[a]"])
    nodes = dict(targets(cfg))
    assert nodes
    for path, node in nodes.items():
        allowed, required = arguments(get_object(node._target_))
        keys = set(node) - {"_target_", "_recursive_"}
        assert keys <= allowed, f"{path}: {keys - allowed} are not arguments of {node._target_}"
        given = keys | {"output", "vocabulary"}
        assert required <= given, f"{path}: {required - given} of {node._target_} have no key"


def arguments(target):
    """Return the names of all arguments of a class or function, and of those without a default.

    A class that takes `**options` takes the fields of the dataclass `OPTIONS` as keyword arguments.
    """
    parameters = inspect.signature(target).parameters.values()
    allowed = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    required = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.default is p.empty}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        for field in dataclasses.fields(target.OPTIONS):
            allowed.add(field.name)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                required.add(field.name)
    return allowed, required


@pytest.mark.parametrize(
    ("overrides", "check"),
    [
        (["preset=shapes"], lambda c: c.detector.checkpoint == c.segmenter.checkpoint == "builtin:shapes"),
        (["preset=[shapes]", "segmenter=sam"], lambda c: c.segmenter.checkpoint == "builtin:shapes"),
        (["preset=[shapes,demo]"], lambda c: c.input == "builtin:demo"),
        (["preset=demo", "text=[x]"], lambda c: c.text == ["x"]),
        (["preset=shapes", "detector.checkpoint=a/b"], lambda c: c.detector.checkpoint == "a/b"),
        (["preset=shapes", "detector=clicks"], lambda c: set(c.detector) == {"_target_", "prompts"}),
        (["sink=[coco,masks]"], lambda c: list(c.sink) == ["coco", "masks"]),
        (["sink=none"], lambda c: not c.sink),
        (["segmenter=none"], lambda c: c.segmenter is None),
        (["text=cat"], lambda c: c.text == "cat"),
        (["select.class_score={wheel: 0.5}"], lambda c: c.select.class_score.wheel == 0.5),
        (["text=[parking entrance sign, U.S. flag, T-shirt?]"], lambda c: c.text[1:] == ["U.S. flag", "T-shirt?"]),
        (["text={vehicle: [car, truck]}"], lambda c: c.text.vehicle == ["car", "truck"]),
    ],
)
def test_choices_and_presets_compose(overrides, check):
    assert check(compose(overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("selct.score=1", "unknown key 'selct.score'; did you mean 'select'?"),
        (
            "detector.examples={cup: [a.jpg]}",
            "unknown key 'detector.examples'; it is a key of detector=owlv2 or detector=",
        ),
        ("select.scor=1", "unknown key 'select.scor'; did you mean 'select.score'?"),
        (
            "detector=yolo",
            "unknown choice detector=yolo; the choices are clicks, ensemble, everything, florence2, grounding_dino",
        ),
        ("preset=nothing", "unknown choice preset=nothing; the choices are demo, label, shapes"),
        ("detector.checkpoint", "."),
        ("segmenter=null", "segmenter=none"),
        ("input=bücher/a.jpg", r"""quote the value inside quotes for the shell, "input='bücher/a.jpg'"""),
        ("input=a (1).jpg", r"""quote the value inside quotes"""),
    ],
)
def test_unknown_keys_and_choices_give_one_line_with_the_alternatives(override, message):
    with pytest.raises(ConfigError, match=message) as error:
        compose([override])
    assert "\n" not in str(error.value)


#: Overrides that select a stage with each renamed key, and the old key.
OLD_STAGE_KEYS = [
    ("segmenter=sam2", "segmenter.exports"),
    ("detector=grounding_dino", "detector.exports"),
    ("tracker=sam2", "tracker.exports"),
    ("detector=sam3", "detector.floor"),
    ("segmenter=sam", "segmenter.fill_holes"),
    ("segmenter=sam_hq", "segmenter.drop_specks"),
    ("tracker=sam3_video", "tracker.patience"),
]


def renamed_message(old):
    """Return the message for an old key."""
    parent, _, key = old.rpartition(".")
    return f"{old} was renamed to {RENAMED.get(old, f'{parent}.{STAGE_KEYS.get(key)}')}"


def test_the_stage_keys_tested_cover_all_that_were_renamed():
    assert {old.rpartition(".")[2] for _, old in OLD_STAGE_KEYS} == set(STAGE_KEYS)


@pytest.mark.parametrize("old", RENAMED)
@pytest.mark.parametrize("form", ["override", "addition", "preset"])
def test_an_old_key_gives_an_error_with_the_new_name(old, form, tmp_path):
    with pytest.raises(ConfigError) as error:
        check_renamed(compose(overrides_with(old, form, tmp_path)))
    assert str(error.value) == renamed_message(old)


@pytest.mark.parametrize(("choice", "old"), OLD_STAGE_KEYS)
@pytest.mark.parametrize("form", ["override", "addition", "preset"])
def test_an_old_key_of_a_stage_gives_an_error_with_the_new_name(choice, old, form, tmp_path):
    with pytest.raises(ConfigError) as error:
        build_node(compose([choice, *overrides_with(old, form, tmp_path)]), old.partition(".")[0])
    assert str(error.value) == renamed_message(old)


def overrides_with(key, form, folder):
    """Return overrides that set a key to 1: as `key=1`, as `+key=1`, or through a preset in a folder."""
    if form == "override":
        return [f"{key}=1"]
    if form == "addition":
        return [f"+{key}=1"]
    (folder / "preset").mkdir()
    preset = OmegaConf.create()
    OmegaConf.update(preset, key, 1)
    (folder / "preset" / "old.yaml").write_text(f"# @package _global_\n{OmegaConf.to_yaml(preset)}")
    return [f"hydra.searchpath=[file://{folder}]", "preset=old"]


def test_sam2_and_hydra_work_together_in_either_order():
    """`import sam2` takes over Hydra's global state; neither order of imports may break the other."""
    programs = {
        "sam2 first": "import sam2; from grounded_sam import load; m = load(preset='shapes', segmenter='sam2')",
        "sam2 last": (
            "from grounded_sam import load; m = load(preset='shapes'); import hydra, sam2;"
            "hydra.initialize_config_module('sam2', version_base='1.2');"
            "from sam2.build_sam import build_sam2; build_sam2('configs/sam2.1/sam2.1_hiera_t.yaml', device='cpu')"
        ),
        "another app after": (
            "import sys; sys.argv = ['x']; from grounded_sam import load; m = load(preset='shapes');"
            "import hydra; hydra.main(version_base=None, config_path=None)(lambda cfg: print('ran'))()"
        ),
    }
    for name, program in programs.items():
        code = f"{program}; print('done')"
        out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
        assert out.stdout.endswith("done\n"), f"{name}: {out.stderr}"


def test_the_wheel_lists_all_packages_on_disk():
    import tomllib

    root = Path(__file__).parents[1]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {".".join(p.parent.relative_to(root).parts) for p in (root / "grounded_sam").rglob("__init__.py")}
    assert sorted(listed) == sorted(on_disk | {"grounded_sam.conf"})


def test_all_yaml_files_are_valid():
    for path in conf_dir().rglob("*.yaml"):
        assert yaml.safe_load(path.read_text()) is not None, path


def test_suggested_keys_are_those_of_the_choices_made():
    with pytest.raises(ConfigError, match=r"did you mean 'detector.prompts'\? the keys of detector are prompts"):
        compose(["detector=clicks", "detector.prompt=x"])
    with pytest.raises(ConfigError, match=r"did you mean 'sink.masks.mode'"):
        compose(["sink=[masks]", "sink.masks.modes=labels"])


def test_values_from_python_are_quoted():
    model = load(preset="shapes", segmenter=None, text=["Straße (1)", "a, b"], negative=["toy, car"])
    assert model.vocabulary.classes == ("Straße (1)", "a, b")
    assert model.vocabulary.negatives == ("toy, car",)
    assert model.parse_text("x").negatives == ("toy, car",)
    for value in ("a\\b", "a\\\\b", "it's", "a\\'b", "end\\", "", "'"):
        assert compose([f"text={to_override(value)}"]).text == value
    entry = {"class": "toy, car", "box": [1, 2, 30, 40]}
    clicked = load(preset="shapes", segmenter=None, detector="clicks", **{"detector.prompts": [entry]})
    assert clicked.detector.vocabulary.classes == ("toy, car",)
    assert load("text=[a]", preset="shapes", **{"select.class_score": {"a b": 0.5}}).select.class_score == {"a b": 0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("device=cude", "unknown to torch"),
        ("device=cuda:99", "CUDA devices"),
        ("detector.batch_size=-1", "detector.batch_size must be"),
        ("segmenter.chunk=0", "segmenter.chunk must be"),
        ("segmenter.max_hole_area=many", "segmenter.max_hole_area must be"),
        ("segmenter.size=huge", "segmenter.size must be tiny, small"),
        ("select.score=null", "select.score must be"),
        ("select.top_k=1.5", "select.top_k must be"),
        ("checkpoints.sam2=facebook/sam2.1-hiera-large", "has size large, but segmenter.size is tiny"),
    ],
)
def test_an_invalid_value_gives_an_error_that_names_its_key(override, message):
    with pytest.raises(GroundedSamError, match=message):
        load(override, preset="shapes")


def test_missing_masks_are_reported_before_any_model_loads():
    with pytest.raises(ConfigError, match="needs masks"):
        load("select.nms_by=mask", "detector.checkpoint=./nowhere", segmenter="none")
    assert load("select.nms_by=mask", detector="stored", segmenter="none").select.nms_by == "mask"  # stored masks
