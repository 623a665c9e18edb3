"""Find and load weights: from the hub, from local files, or those that ship with the package.

Pickles are never executed: only safetensors, and `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from grounded_sam.errors import CheckpointError, ConfigError, MissingWeightsError
from grounded_sam.files import home_path

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
#: Weights that ship with the package.
BUILTIN_DIR = Path(__file__).parents[1] / "shapes" / "weights"
_SUFFIXES = (".safetensors", ".pt", ".pth")


def builtin_path(name: str, kind: str) -> Path:
    """Return the file or folder of `builtin:NAME`.

    Args:
        name: Name of the model, such as `shapes`.
        kind: Kind of the model: `detector`, `sam`, `sam2` or `siglip`.

    Raises:
        CheckpointError: If the package has no such model; the message lists those it has.

    >>> builtin_path("shapes", "sam2").name
    'shapes-sam2.safetensors'
    """
    for path in (BUILTIN_DIR / f"{name}-{kind}", BUILTIN_DIR / f"{name}-{kind}.safetensors"):
        if path.exists():
            return path
    paths = [*BUILTIN_DIR.glob(f"*-{kind}"), *BUILTIN_DIR.glob(f"*-{kind}.safetensors")]
    names = sorted(path.name.rsplit("-", 1)[0] for path in paths)
    available = ", ".join(f"builtin:{name_}" for name_ in names) or "none"
    raise CheckpointError(f"the package has no {kind} named {name!r}; available: {available}")


def find_folder(checkpoint: str, kind: str) -> str:
    """Return the local folder of a transformers checkpoint, or its hub id.

    Args:
        checkpoint: `builtin:NAME`, local folder, or hub id.
        kind: Kind of the model, for `builtin:`.

    Raises:
        CheckpointError: If it is a path, but not a folder with `config.json`.
    """
    checkpoint = str(checkpoint)
    if checkpoint.startswith("builtin:"):
        return str(builtin_path(checkpoint.removeprefix("builtin:"), kind))
    path = home_path(checkpoint)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} has no config.json, so it is not a transformers checkpoint")
        return str(path)
    if path.exists() or path.is_absolute() or checkpoint.startswith((".", "~")) or checkpoint.count("/") != 1:
        raise CheckpointError(
            f"no checkpoint at {checkpoint!r}: expected a hub id (owner/name), a local folder or builtin:NAME"
        )
    return checkpoint


def builtin_settings(path: Path, kind: str) -> dict[str, Any] | None:
    """Return the settings of embedded weights: `model` and `mask_generator`; None for other weights.

    Args:
        path: File of the weights.
        kind: Kind of the model: `sam` or `sam2`.

    >>> sorted(builtin_settings(builtin_path("shapes", "sam"), "sam"))
    ['mask_generator', 'model']
    """
    if not path.is_relative_to(BUILTIN_DIR):
        return None
    from omegaconf import OmegaConf

    settings: Any = OmegaConf.to_container(OmegaConf.load(BUILTIN_DIR.parent / f"{kind}.yaml"))
    return settings  # type: ignore[no-any-return]


def find_file(checkpoint: str, kind: str, hub_file: str | None = None, sha256: str | None = None) -> Path:
    """Return a file of weights, downloaded if needed.

    Args:
        checkpoint: `builtin:NAME`, local file, folder with one such file, or hub id.
        kind: Kind of the model, for `builtin:`.
        hub_file: File to take from a hub repository.
        sha256: SHA-256 that the file must have; None if unknown.

    Raises:
        CheckpointError: If there is no such file, it cannot be downloaded, or its checksum differs.
    """
    checkpoint = str(checkpoint)
    path = home_path(checkpoint)
    if checkpoint.startswith("builtin:"):
        path = builtin_path(checkpoint.removeprefix("builtin:"), kind)
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        if len(files) != 1:
            raise CheckpointError(
                f"expected one file of weights ({', '.join(_SUFFIXES)}) in {path}, found {len(files)}; name the file"
            )
        path = files[0]
    elif not path.is_file():
        if path.suffix in _SUFFIXES or path.is_absolute() or checkpoint.count("/") != 1 or hub_file is None:
            raise CheckpointError(
                f"no weights at {checkpoint!r}: expected a file ({', '.join(_SUFFIXES)}), a folder with one, "
                "a hub id (owner/name) or builtin:NAME"
            )
        path = _from_hub(checkpoint, hub_file)
    if sha256 is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256.lower():
            raise CheckpointError(f"{path} is damaged or another file: expected SHA-256 {sha256}, got {digest}")
    return path


def _from_hub(repo: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    def load(local_files_only: bool) -> str:
        return hf_hub_download(repo, file, local_files_only=local_files_only)

    return Path(from_cache_or_hub(repo, load))


def from_cache_or_hub(repo: str, load: Callable[[bool], T]) -> T:
    """Load something from the hub's cache, or else from the hub.

    Args:
        repo: Hub id, for messages.
        load: Function that loads it; its argument is `local_files_only`.

    Raises:
        CheckpointError: If the hub cannot be reached or does not have it. Without a network this does not wait for the
            retries of the hub's client.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session

    try:
        return load(True)
    except (OSError, ValueError) as error:
        failure: Exception = error
    try:
        if not constants.HF_HUB_OFFLINE:
            get_session().head(constants.ENDPOINT, timeout=10)
            return load(False)
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        failure = error
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        failure = error
    reason = " ".join(str(failure).split()).split(". ")[0][:200]
    raise MissingWeightsError(repo, reason) from failure


def load_checkpoint(
    checkpoint: str,
    kinds: Sequence[str],
    model_class: Any,
    part_classes: Sequence[Any],
    dtype: Any = None,
    builtin_kind: str = "detector",
) -> tuple[Any, ...]:
    """Load a transformers model in evaluation mode, and what belongs to it, such as its processor.

    Args:
        checkpoint: Hub id, local folder, or `builtin:NAME`.
        kinds: Values of `model_type` that are accepted.
        model_class: Class that loads the model, or such a class by `model_type`.
        part_classes: Classes that load the rest.
        dtype: Torch dtype of the weights; None for float32.
        builtin_kind: Kind of the model, for `builtin:`.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, incomplete, or of another kind.
    """
    folder = find_folder(checkpoint, builtin_kind)
    import torch
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for the milliseconds of reading a file

    def load(local_files_only: bool) -> tuple[Any, ...]:
        safe: dict[str, Any] = {"local_files_only": local_files_only, "trust_remote_code": False}
        kind = AutoConfig.from_pretrained(folder, **safe).model_type
        if kind not in kinds:
            raise CheckpointError(f"{checkpoint} is a {kind} checkpoint; expected {' or '.join(kinds)}")
        parts = [part_class.from_pretrained(folder, **safe) for part_class in part_classes]
        safe["dtype"] = dtype or torch.float32
        chosen: Any = model_class[kind] if isinstance(model_class, Mapping) else model_class
        return *chosen.from_pretrained(folder, output_loading_info=True, **safe), *parts

    try:
        model, info, *parts = load(True) if Path(folder).is_dir() else from_cache_or_hub(folder, load)
    except CheckpointError:
        raise
    except Exception as error:  # damaged files make transformers and safetensors raise many kinds of error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"cannot load {checkpoint}: {reason}") from error
    missing = sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])])
    if missing:
        raise CheckpointError(f"{checkpoint} lacks {len(missing)} weights of its model, such as {missing[0]}")
    return model.eval(), *parts


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a `.safetensors`, `.pt` or `.pth` file to the CPU, floats as float32.

    A wrapping `{"model": ...}`, as in the files of SAM 2, is removed.

    Raises:
        CheckpointError: If the file cannot be read, or holds anything but tensors.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            weights: Any = load_file(path)
        else:
            # Memory-mapped, so that weights are not held twice; PyTorch's old format does not support it.
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged files make both libraries raise many kinds of error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"cannot load {path} as weights: {reason}") from error
    if isinstance(weights, dict) and isinstance(weights.get("model"), dict):
        weights = weights["model"]
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f"{path} does not hold a dictionary of tensors")
    return {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}


def load_into(model: Any, path: Path, name: str) -> None:
    """Load a file of weights into a model; every tensor must fit.

    Args:
        model: A `torch.nn.Module`.
        path: File of weights.
        name: Name of the model, for messages.

    Raises:
        CheckpointError: If tensors are missing, unknown or of another shape; the message names the first ones.
    """
    weights, own = load_weights(path), model.state_dict()
    problems = [f"lacks {key}" for key in own if key not in weights]
    problems += [f"has an unknown {key}" for key in weights if key not in own]
    problems += [
        f"has {key} of shape {tuple(weights[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path} does not fit {name}: it {'; '.join(problems[:3])}{more}")
    model.load_state_dict(weights)


def pick_device(device: str) -> str:
    """Resolve `auto` to `cuda` or `mps` (Apple) where there is such a device, else to `cpu`; check any other device.

    Raises:
        ConfigError: If torch has no such device.

    >>> pick_device("cpu")
    'cpu'
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except RuntimeError as error:
        raise ConfigError(f"device={device} is unknown to torch; use auto, cpu, cuda, cuda:1 or mps") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(
            f"device={device}, but torch sees {count or 'no'} CUDA devices; use device=cpu or device=auto"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device=mps, but torch sees no Apple GPU; use device=cpu or device=auto")
    return str(chosen)


def weights_digest(weights: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of weights.

    Args:
        weights: A state dict.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
