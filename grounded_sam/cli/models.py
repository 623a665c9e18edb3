"""The command `grounded-sam-models`: list, download and locate the weights of the stages."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grounded_sam.cli.arguments import ArgumentParser
from grounded_sam.config.compose import to_override
from grounded_sam.config.weights import all_weights, required_weights
from grounded_sam.errors import CheckpointError, ConfigError, GroundedSamError
from grounded_sam.files import home_path
from grounded_sam.weights.hub import (
    WeightsSpec,
    cache_status,
    fetch_weights,
    known_models,
    model_infos,
    why_unreachable,
)
from grounded_sam.weights.loading import BUILTIN_DIR

COMMANDS = ("list", "fetch", "path")
HELP = """\
List, download and locate the weights of the stages.

  grounded-sam-models list                                     every choice that loads weights
  grounded-sam-models list detector=owlv2 segmenter=sam        what a run with these overrides loads
  grounded-sam-models fetch                                    download what `grounded-sam` loads by default
  grounded-sam-models fetch detector=sam3 tracker=none
  grounded-sam-models fetch segmenter=sam2 segmenter.size=large tracker.size=large
  HF_HUB_OFFLINE=1 grounded-sam-models path segmenter=sam      one path per line, for scripts
  grounded-sam-models list --json > weights.json

Overrides are those of `grounded-sam`; everything else is as in the config. `list` with the same overrides shows what
`fetch` would download.
"""
COMMANDS_HELP = """\
list    stage, choice, repository on the Hugging Face hub (and the file in it, if only one is loaded), download size,
        license, whether it is gated, and how much of it is in the hub's cache. `unknown` is what neither the hub nor
        the package knows
fetch   download to the hub's cache what is missing, only files that are loaded, and compare each file with the digest
        that the cache keeps of it; damaged files are downloaded again. Run it again to verify the cache
path    the folder or file of each, from the cache alone; exit code 1 if one is missing

Gated models need an account with access: accept the license on the model's page, then run `hf auth login` or set
HF_TOKEN. HF_HOME sets the folder of the cache, HF_ENDPOINT another hub, and HF_HUB_OFFLINE=1 disables the network.
"""


@dataclass(frozen=True)
class WeightsRow:
    """A row of the table, and an entry of `--json`; None is unknown.

    Attributes:
        stage: Config group.
        choice: Choice of that group.
        key: Key of the config that names the checkpoint.
        checkpoint: The checkpoint, as it is named there.
        repo: Repository on the hub.
        file: File in it.
        size: Bytes to download.
        license: License.
        gated: Whether access has to be requested.
        cached: `whole`, `part` or `no`.
        cached_size: Bytes in the cache.
        path: Path of the weights.
    """

    stage: str
    choice: str
    key: str
    checkpoint: str
    repo: str | None
    file: str | None
    size: int | None
    license: str | None
    gated: bool | None
    cached: str | None
    cached_size: int | None
    path: str | None


def weights_rows(specs: Sequence[WeightsSpec]) -> tuple[list[WeightsRow], list[str]]:
    """Return a row for each of the weights, and a line for everything that could not be determined."""
    repos = [spec.repo for spec in specs if spec.repo is not None]
    unreachable = why_unreachable() if repos else None
    infos = model_infos(repos) if unreachable is None else {}
    notes = []
    if unreachable is not None:
        notes.append(f"the hub was not contacted ({unreachable}); rows come from the cache and the package")
    notes += [info for info in infos.values() if isinstance(info, str)]
    known = known_models()
    rows = []
    for spec in specs:
        info = infos.get(spec.repo) if spec.repo is not None else None
        rows.append(_row(spec, None if isinstance(info, str) else info, known.get(spec.repo or "", {})))
    return rows, notes


def _row(spec: WeightsSpec, info: Any, known: dict[str, Any]) -> WeightsRow:
    """Return the row of one spec.

    Args:
        spec: Which weights.
        info: What the hub says about the repository; None if it was not contacted.
        known: What the package knows about it.
    """
    common = (spec.stage, spec.choice, spec.key, spec.checkpoint, spec.repo, spec.file)
    if spec.repo is None:
        assert spec.path is not None
        license_name = "apache-2.0" if spec.path.is_relative_to(BUILTIN_DIR) else None
        return WeightsRow(*common, 0, license_name, False, None, None, str(spec.path))
    status = cache_status(spec.repo, spec.file, info)
    card = (info.card_data if info is not None else None) or {}
    license_name = card.get("license")
    license_name = card.get("license_name") or license_name if license_name == "other" else license_name
    gated = known.get("gated") if info is None or info.gated is None else bool(info.gated)
    cached = "whole" if status.is_complete else "part" if status.cached_bytes else "no"
    path = str(status.path(spec.file)) if status.is_complete else None
    license_name = license_name or known.get("license")
    return WeightsRow(*common, status.size, license_name, gated, cached, status.cached_bytes, path)


def print_table(rows: Sequence[WeightsRow]) -> None:
    """Print rows as a table."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    def text(value: Any) -> str:
        return "unknown" if value is None else {True: "yes", False: "no"}.get(value, str(value))

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "choice", "weights", "download", "license", "gated", "in the cache"):
        table.add_column(column, overflow="fold", justify="right" if column == "download" else "left")
    for row in rows:
        inner = row.key.removeprefix(row.stage).lstrip(".")
        choice = row.choice + (f"\n{inner}" if inner else "")
        if row.repo is None:
            is_builtin = Path(row.path or "").is_relative_to(BUILTIN_DIR)
            location = "part of the package" if is_builtin else f"local: {row.path}"
            table.add_row(row.stage, choice, row.checkpoint, "nothing", text(row.license), "no", location)
            continue
        size = "unknown" if row.size is None else decimal(row.size)
        cached = {"whole": "yes", "no": "no"}.get(str(row.cached), f"{decimal(row.cached_size or 0)} of {size}")
        name = row.repo + (f"\n{row.file}" if row.file else "")
        table.add_row(row.stage, choice, name, size, text(row.license), text(row.gated), cached)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=200)  # so that scripts get whole lines
    console.print(table)


def run_list(overrides: Sequence[str], extra: Sequence[str], as_json: bool) -> None:
    """Run `grounded-sam-models list`.

    Args:
        overrides: Overrides of the user; without any, every choice is listed.
        extra: Overrides for a user-defined config folder.
        as_json: Print JSON instead of a table.
    """
    notes: list[str] = []
    errors: list[str] = []
    if overrides:
        specs, notes = required_weights([*extra, *overrides])
    else:
        specs, errors = all_weights(extra)
    rows, warnings = weights_rows(specs)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], ensure_ascii=False, indent=1))
    else:
        if rows:
            print_table(rows)
        print(*notes, sep="\n", end="\n" if notes else "")
    for line in [*errors, *warnings]:
        print(f"grounded-sam-models: {line}", file=sys.stderr)


def run_fetch(overrides: Sequence[str]) -> None:
    """Run `grounded-sam-models fetch`.

    Raises:
        CheckpointError: If some weights could not be downloaded; all others are downloaded first.
    """
    from rich.filesize import decimal

    specs, notes = required_weights(overrides)
    print(*notes, sep="\n", end="\n" if notes else "")
    users: dict[tuple[str, str | None, str | None], list[WeightsSpec]] = {}
    for spec in specs:
        if spec.repo is None:
            is_builtin = spec.path is not None and spec.path.is_relative_to(BUILTIN_DIR)
            location = "is part of the package" if is_builtin else f"is local ({spec.path})"
            print(f"{spec}: {spec.checkpoint} {location}, nothing to download")
        else:
            users.setdefault((spec.repo, spec.file, spec.sha256), []).append(spec)
    unreachable = why_unreachable() if users else None
    failures = []
    for (repo, file, sha256), stages in users.items():
        names = ", ".join(map(str, stages))
        try:
            status, unverified = fetch_weights(repo, file, sha256, unreachable, _report_damaged)
        except CheckpointError as error:
            failures.append(f"{names}: {error}")
            continue
        count = len(status.files)
        verified = f"{count - len(unverified)} of {count} digests match" if count else ""
        if unverified:
            verified += "; the others cannot be verified: without symlinks the cache keeps no digests"
        print(f"{names}: {repo}, {decimal(status.cached_bytes)}, {verified}, in {status.path(file)}")
    if failures:
        for failure in failures[:-1]:
            print(f"grounded-sam-models: {failure}", file=sys.stderr)
        raise CheckpointError(failures[-1])


def _report_damaged(paths: list[Path]) -> None:
    joined = ", ".join(map(str, paths))
    print(f"grounded-sam-models: damaged in the cache, downloading again: {joined}", file=sys.stderr)


def run_path(overrides: Sequence[str], typed: Sequence[str]) -> None:
    """Run `grounded-sam-models path`.

    Args:
        overrides: All overrides.
        typed: The arguments that the user typed, for the command in the message.

    Raises:
        CheckpointError: If something is not in the cache, with the command that downloads it.
    """
    specs, _ = required_weights(overrides)
    missing = []
    for spec in specs:
        if spec.repo is None:
            print(spec.path)
            continue
        status = cache_status(spec.repo, spec.file)
        if status.is_complete:
            print(status.path(spec.file))
        else:
            missing.append(f"{spec.repo} of {spec}")
    if missing:
        command = shlex.join(["grounded-sam-models", "fetch", *typed])
        raise CheckpointError(f"not in the cache: {', '.join(missing)}; download with: {command}")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: If a command or an option is unknown.
    """
    parser = ArgumentParser(
        prog="grounded-sam-models",
        description=HELP,
        epilog=COMMANDS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", metavar="list|fetch|path")
    parser.add_argument("overrides", nargs="*", help="key=value, as for grounded-sam")
    parser.add_argument("--json", action="store_true", help="with list: print JSON, null for unknown")
    parser.add_argument("--config-dir", "-cd", type=home_path, metavar="FOLDER", help="folder of choices of your own")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.command is None:
        raise ConfigError(f"a command is missing: {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}; --help shows examples")
    if parsed.command not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(parsed.command, COMMANDS, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"unknown command {parsed.command!r}; {meant}the commands are {', '.join(COMMANDS)}")
    if parsed.json and parsed.command != "list":
        raise ConfigError(f"--json goes with list, not with {parsed.command}")
    if parsed.config_dir is not None and not parsed.config_dir.is_dir():
        raise ConfigError(f"--config-dir: folder {parsed.config_dir} does not exist")
    return parsed


def main() -> None:
    """Run the command: a user's mistake ends with one line and exit code 1."""
    try:
        parsed = parse_arguments(sys.argv[1:])
        typed, extra = list(parsed.overrides), []
        if parsed.config_dir is not None:
            typed = [f"--config-dir={parsed.config_dir}", *typed]
            extra = [f"hydra.searchpath=[{to_override(f'file://{parsed.config_dir.resolve()}')}]"]
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # hides the client's own advice
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))  # for user-defined stages, as in `grounded-sam`
        if parsed.command == "list":
            run_list(parsed.overrides, extra, parsed.json)
        elif parsed.command == "fetch":
            run_fetch([*extra, *parsed.overrides])
        else:
            run_path([*extra, *parsed.overrides], typed)
    except (GroundedSamError, OSError) as error:
        sys.exit(f"grounded-sam-models: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
