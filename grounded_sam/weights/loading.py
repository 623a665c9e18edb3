"""Where weights come from: the hub, a local file or folder, or the small ones that ship with the package.

Nothing is ever unpickled with code: safetensors, or `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from grounded_sam.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
BUILTIN_DIR = Path(__file__).parents[1] / "shapes" / "weights"
_SUFFIXES = (".safetensors", ".pt", ".pth")


def builtin_path(name: str, kind: str) -> Path:
    """The file or folder behind `builtin:NAME` for a kind of model (`detector`, `sam`, `sam2`).

    Raises:
        CheckpointError: if the package ships none of that name; lists those it ships.
    """
    for path in (BUILTIN_DIR / f"{name}-{kind}", BUILTIN_DIR / f"{name}-{kind}.safetensors"):
        if path.exists():
            return path
    found = [*BUILTIN_DIR.glob(f"*-{kind}"), *BUILTIN_DIR.glob(f"*-{kind}.safetensors")]
    names = sorted(path.name.rsplit("-", 1)[0] for path in found)
    raise CheckpointError(
        f"the package ships no {kind} named {name!r}; it ships {', '.join(f'builtin:{n}' for n in names) or 'none'}"
    )


def find_folder(checkpoint: str, kind: str) -> str:
    """A transformers checkpoint: `builtin:NAME`, a local folder, or a hub id (returned as it is).

    Raises:
        CheckpointError: for a path that is no folder with a `config.json`.
    """
    checkpoint = str(checkpoint)
    if checkpoint.startswith("builtin:"):
        return str(builtin_path(checkpoint.removeprefix("builtin:"), kind))
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} holds no config.json, so it is not a transformers checkpoint")
        return str(path)
    if path.exists() or path.is_absolute() or checkpoint.startswith((".", "~")) or checkpoint.count("/") != 1:
        raise CheckpointError(
            f"no checkpoint at {checkpoint!r}: expected a hub id (owner/name), a local folder or builtin:NAME"
        )
    return checkpoint


def find_file(checkpoint: str, kind: str, hub_file: str | None = None, sha256: str | None = None) -> Path:
    """A file of weights: `builtin:NAME`, a local file, a folder with one such file, or a hub id.

    Args:
        checkpoint: which.
        kind: of model, for `builtin:`.
        hub_file: the file to take from a hub repository.
        sha256: what the file's SHA-256 has to be, if known.

    Raises:
        CheckpointError: if there is no such file, it cannot be fetched, or its checksum differs.
    """
    checkpoint = str(checkpoint)
    path = Path(checkpoint).expanduser()
    if checkpoint.startswith("builtin:"):
        path = builtin_path(checkpoint.removeprefix("builtin:"), kind)
    elif path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in _SUFFIXES)
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
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != sha256.lower():
            raise CheckpointError(f"{path} is damaged or another file: expected SHA-256 {sha256}, got {got}")
    return path


def _from_hub(repo: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    def fetch(local_files_only: bool) -> str:
        return hf_hub_download(repo, file, local_files_only=local_files_only)

    return Path(from_cache_or_hub(repo, fetch))


def from_cache_or_hub(repo: str, load: Callable[[bool], T]) -> T:
    """Call `load(local_files_only)`: first on the hub's cache, then, if that lacks something, on the hub.

    Raises:
        CheckpointError: if the hub cannot be reached or does not have it; without waiting through the
            hub client's retries when there is no network at all.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session

    try:
        return load(True)
    except (OSError, ValueError) as error:
        missing: Exception = error
    try:
        if not constants.HF_HUB_OFFLINE:
            get_session().head(constants.ENDPOINT, timeout=10)
            return load(False)
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        missing = error
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        missing = error
    reason = " ".join(str(missing).split()).split(". ")[0][:200]
    raise CheckpointError(
        f"cannot get the weights {repo!r} from the Hugging Face hub, nor are they in its cache ({reason}); "
        "give a local copy with checkpoint=PATH, or use preset=shapes, whose weights ship with the package"
    ) from missing


def load_checkpoint(
    checkpoint: str,
    kinds: Sequence[str],
    model_kind: Any,
    part_kinds: Sequence[Any],
    dtype: Any = None,
    builtin_kind: str = "detector",
) -> tuple[Any, ...]:
    """A model of transformers, in evaluation mode, and what belongs to it, such as its processor.

    Args:
        checkpoint: a hub id, a local folder, or `builtin:NAME`.
        kinds: the `model_type`s that will do.
        model_kind: class that loads the model.
        part_kinds: classes that load the rest.
        dtype: torch's, of the weights; None: 32-bit floats.
        builtin_kind: of model, for `builtin:`.

    Raises:
        CheckpointError: if the checkpoint cannot be had, is damaged, lacks weights or is of another kind.
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
        parts = [part.from_pretrained(folder, **safe) for part in part_kinds]
        safe["dtype"] = dtype or torch.float32
        return *model_kind.from_pretrained(folder, output_loading_info=True, **safe), *parts

    try:
        model, loaded, *parts = load(True) if Path(folder).is_dir() else from_cache_or_hub(folder, load)
    except CheckpointError:
        raise
    except Exception as error:  # damaged files make transformers and safetensors raise all sorts
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"cannot load {checkpoint}: {reason}") from error
    lacking = sorted([*loaded["missing_keys"], *(str(key) for key in loaded["mismatched_keys"])])
    if lacking:
        raise CheckpointError(f"{checkpoint} lacks {len(lacking)} weights of its model, such as {lacking[0]}")
    return model.eval(), *parts


def load_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors`, `.pt` or `.pth` file, in 32-bit floats, on the CPU.

    A wrapping `{"model": ...}` (as SAM 2's files have) is taken off.

    Raises:
        CheckpointError: if the file cannot be read, or holds anything but tensors.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            weights: Any = load_file(path)
        else:
            # Mapped, so that it is not in memory twice while a model is filled; PyTorch's old format cannot be.
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged files make both libraries raise all sorts
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"cannot load {path} as weights: {reason}") from error
    if isinstance(weights, dict) and isinstance(weights.get("model"), dict):
        weights = weights["model"]
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise CheckpointError(f"{path} does not hold a dictionary of tensors")
    return {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}


def load_into(model: Any, path: Path, what: str) -> None:
    """Load weights into a model; every tensor must fit.

    Raises:
        CheckpointError: naming the first tensors that are missing, unknown or of another shape.
    """
    weights, own = load_weights(path), model.state_dict()
    problems = [f"misses {k}" for k in own if k not in weights]
    problems += [f"has an unknown {k}" for k in weights if k not in own]
    problems += [
        f"has {k} of shape {tuple(weights[k].shape)}, not {tuple(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path} does not fit {what}: it {'; '.join(problems[:3])}{more}")
    model.load_state_dict(weights)


def pick_device(device: str) -> str:
    """`auto` to `cuda` where there is one, else `cpu`; anything else as it is.

    Raises:
        ConfigError: if torch has no such device, or not as many.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except RuntimeError as error:
        raise ConfigError(f"device={device} is none that torch knows; use auto, cpu, cuda or cuda:1") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise ConfigError(f"device={device}, but torch sees {seen or 'no'} CUDA devices; use device=cpu or device=auto")
    return str(chosen)


def weights_digest(weights: Mapping[str, Any]) -> str:
    """A name for weights: the SHA-256 of their names, dtypes and bytes."""
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
