"""What the YAML files promise: they compose, in every combination, and their keys fit their classes."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf

from grounded_sam import ConfigError
from grounded_sam.config.compose import compose, to_override
from grounded_sam.config.hydra import conf_dir

CHOICES = [
    (group.name, file.stem)
    for group in sorted(conf_dir().iterdir())
    if group.is_dir() and not group.name.startswith("_")
    for file in sorted(group.glob("*.yaml"))
]


def targets(node, path=""):
    """All nodes of a config that build something."""
    if OmegaConf.is_dict(node):
        if "_target_" in node:
            yield path, node
        for key in node:
            if not OmegaConf.is_missing(node, key) and OmegaConf.is_config(node._get_node(key)):
                yield from targets(node[key], f"{path}.{key}")


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_its_keys_fit_its_class(group, choice):
    if choice == "slurm":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra slurm is not installed")
    cfg = compose([f"{group}={choice}", "input=x", "text=[a]"])
    found = dict(targets(cfg))
    assert found
    for path, node in found.items():
        signature = inspect.signature(get_object(node._target_))
        names = set(signature.parameters)
        keys = set(node) - {"_target_", "_recursive_"}
        assert keys <= names, f"{path}: {keys - names} are no arguments of {node._target_}"
        given = keys | {"output", "vocabulary"}
        needed = {n for n, p in signature.parameters.items() if p.default is p.empty}
        assert needed <= given, f"{path}: {needed - given} of {node._target_} have no key"


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
    ("override", "says"),
    [
        ("selct.score=1", "unknown key 'selct.score'; did you mean 'select'?"),
        ("select.scor=1", "unknown key 'select.scor'; did you mean 'select.score'?"),
        (
            "detector=yolo",
            "there is no detector=yolo; the choices are clicks, ensemble, everything, florence2, grounding_dino",
        ),
        ("preset=nothing", "there is no preset=nothing; the choices are demo, label, shapes"),
        ("detector.checkpoint", "."),
        ("segmenter=null", "segmenter=none"),
        ("input=bücher/a.jpg", r"""put the value in quotes of its own, "input='bücher/a.jpg'"""),
        ("input=a (1).jpg", r"""put the value in quotes"""),
    ],
)
def test_wrong_keys_and_choices_are_one_line_with_what_there_is(override, says):
    with pytest.raises(ConfigError, match=says) as error:
        compose([override])
    assert "\n" not in str(error.value)


def test_sam2_and_hydra_get_along_in_both_orders():
    """`import sam2` seizes Hydra's global state; neither order may break the other."""
    programs = {
        "sam2 first": "import sam2; from grounded_sam import load; m = load(preset='shapes', segmenter='sam2')",
        "sam2 last": (
            "from grounded_sam import load; m = load(preset='shapes'); import hydra, sam2;"
            "hydra.initialize_config_module('sam2', version_base='1.2');"
            "from sam2.build_sam import build_sam2; build_sam2('configs/sam2.1/sam2.1_hiera_t.yaml', device='cpu')"
        ),
        "own app after": (
            "import sys; sys.argv = ['x']; from grounded_sam import load; m = load(preset='shapes');"
            "import hydra; hydra.main(version_base=None, config_path=None)(lambda cfg: print('ran'))()"
        ),
    }
    for name, program in programs.items():
        code = f"{program}; print('fine')"
        out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
        assert out.stdout.endswith("fine\n"), f"{name}: {out.stderr}"


def test_packages_on_disk_are_the_packages_in_the_wheel():
    import tomllib

    root = Path(__file__).parents[1]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {".".join(p.parent.relative_to(root).parts) for p in (root / "grounded_sam").rglob("__init__.py")}
    assert sorted(listed) == sorted(on_disk | {"grounded_sam.conf"})


def test_yaml_files_are_valid_and_documented_by_their_class():
    for path in conf_dir().rglob("*.yaml"):
        assert yaml.safe_load(path.read_text()) is not None, path


def test_keys_are_listed_for_the_choices_made():
    with pytest.raises(ConfigError, match=r"did you mean 'detector.prompts'\? the keys of detector are prompts"):
        compose(["detector=clicks", "detector.prompt=x"])
    with pytest.raises(ConfigError, match=r"did you mean 'sink.masks.mode'"):
        compose(["sink=[masks]", "sink.masks.modes=labels"])


def test_values_from_python_are_quoted():
    from grounded_sam import load

    model = load(preset="shapes", segmenter=None, text=["Straße (1)", "a, b"], negative=["toy, car"])
    assert model.vocabulary.classes == ("Straße (1)", "a, b")
    assert model.vocabulary.negatives == ("toy, car",)
    assert model.ask("x").negatives == ("toy, car",)
    for odd in ("a\\b", "a\\\\b", "it's", "a\\'b", "end\\", "", "'"):
        assert compose([f"text={to_override(odd)}"]).text == odd
    entry = {"class": "toy, car", "box": [1, 2, 30, 40]}
    clicked = load(preset="shapes", segmenter=None, detector="clicks", **{"detector.prompts": [entry]})
    assert clicked.detector.vocabulary.classes == ("toy, car",)
    assert load("text=[a]", preset="shapes", **{"select.class_score": {"a b": 0.5}}).settings.class_score == {
        "a b": 0.5
    }


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("device=cude", "none that torch knows"),
        ("device=cuda:99", "CUDA devices"),
        ("detector.batch_size=-1", "detector.batch_size must be"),
        ("segmenter.chunk=0", "segmenter.chunk must be"),
        ("segmenter.fill_holes=many", "segmenter.fill_holes must be"),
        ("segmenter.size=huge", "segmenter.size must be one of tiny"),
        ("select.score=null", "select.score must be"),
        ("select.top_k=1.5", "select.top_k must be"),
        ("checkpoints.sam2=facebook/sam2.1-hiera-large", "holds segmenter.size=large"),
    ],
)
def test_values_that_cannot_be_name_their_key(override, says):
    from grounded_sam import GroundedSamError, load

    with pytest.raises(GroundedSamError, match=says):
        load(override, preset="shapes")


def test_masks_are_asked_for_before_any_model_loads():
    from grounded_sam import load

    with pytest.raises(ConfigError, match="needs masks"):
        load("select.nms_by=mask", "detector.checkpoint=./nowhere", segmenter="none")
    assert load("select.nms_by=mask", detector="stored", segmenter="none").settings.nms_by == "mask"  # stores have some
