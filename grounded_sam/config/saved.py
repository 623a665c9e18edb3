"""Save the config of a run, such that it can be run again as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grounded_sam.config.secrets import hide_secrets
from grounded_sam.files import atomic_write_text
from grounded_sam.output.paths import OutputPath, RemotePath

if TYPE_CHECKING:
    from omegaconf import DictConfig, ListConfig

#: Settings of Hydra itself without which a saved config would run in another way.
HYDRA_KEYS = ("run", "sweep", "callbacks", "output_subdir")


def save_config(cfg: DictConfig, hydra_cfg: DictConfig, folder: OutputPath) -> None:
    """Write `config.yaml`, `hydra.yaml` and `overrides.yaml` into a folder, without secrets in URLs.

    `grounded-sam --config-path FOLDER --config-name config` runs `config.yaml` again.

    Args:
        cfg: Config of the run.
        hydra_cfg: Config of Hydra.
        folder: Absolute path or address of the folder.
    """
    hydra = unresolved(hydra_cfg)
    if isinstance(folder, RemotePath):  # the command has kept the address from Hydra
        hydra["run"]["dir"] = "${output}"
    defaults = ["_self_", {"override hydra/job_logging": hydra_cfg.runtime.choices["hydra/job_logging"]}]
    again = {"defaults": defaults, **unresolved(cfg), "hydra": {key: hydra[key] for key in HYDRA_KEYS}}
    _write(folder / "config.yaml", again)
    _write(folder / "hydra.yaml", {"hydra": {key: hydra[key] for key in hydra if key not in ("help", "hydra_help")}})
    _write(folder / "overrides.yaml", hydra["overrides"]["task"])


def unresolved(cfg: DictConfig | ListConfig) -> Any:
    """Convert a config to dicts and lists, with interpolations as they are and without secrets."""
    from omegaconf import OmegaConf

    return hide_secrets(OmegaConf.to_container(cfg, resolve=False))


def _write(path: OutputPath, content: Any) -> None:
    from omegaconf import OmegaConf

    atomic_write_text(path, OmegaConf.to_yaml(OmegaConf.create(content)))
