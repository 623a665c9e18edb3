"""The YAML files; a package, so that other Hydra apps can name `pkg://grounded_sam.conf`."""
