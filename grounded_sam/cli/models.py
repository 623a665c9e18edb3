"""The command `grounded-sam-models`: which weights the stages take, fetching them ahead, and where they lie."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from grounded_sam.config.compose import to_override
from grounded_sam.config.weights import every_choice, needed
from grounded_sam.errors import CheckpointError, ConfigError, GroundedSamError
from grounded_sam.weights.hub import (
    Weights,
    _asked,
    cached,
    fetch,
    known,
    unreachable,
)
from grounded_sam.weights.loading import BUILTIN_DIR

COMMANDS = ("list", "fetch", "path")


HELP = """\
The weights of the stages: which there are, fetching them ahead, and where they lie.

  grounded-sam-models list                                     every choice that takes weights
  grounded-sam-models list detector=owlv2 segmenter=sam        what these words load
  grounded-sam-models fetch                                    what `grounded-sam` loads by default
  grounded-sam-models fetch detector=sam3 tracker=none
  grounded-sam-models fetch segmenter=sam2 segmenter.size=large tracker.size=large
  HF_HUB_OFFLINE=1 grounded-sam-models path segmenter=sam      a path per line, for scripts
  grounded-sam-models list --json > weights.json

The words are those of `grounded-sam`; what they leave open is as the config has it. To see what is fetched, `list`
the same words before.
"""


COMMANDS_HELP = """\
list    stage, choice, repository on the Hugging Face hub (and the file in it, where one is all that is loaded),
        size to fetch, licence, whether it is gated, and how much of it lies in the hub's cache. What neither the hub
        nor the package knows is `unknown`
fetch   brings into the hub's cache what is not there yet, only the files that are loaded, and compares each with the
        digest that the cache keeps of it; a damaged file is fetched anew. Again, to check what is there
path    the folder or file of each, from the cache alone; exit code 1 if one is missing

Gated models need an account that has been given access: accept the licence on the model's page, then `hf auth login`
or HF_TOKEN. HF_HOME says where the cache is, HF_ENDPOINT names another hub, HF_HUB_OFFLINE=1 asks none.
"""


def table(found: Sequence[Weights]) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each of the weights, with None for what is not known, and what could not be found out."""
    repos = [weights.repo for weights in found if weights.repo is not None]
    why = unreachable() if repos else None
    infos = _asked(repos) if why is None else {}
    notes = [f"the hub is not asked ({why}); this is what the cache and the package know"] if why else []
    notes += [info for info in infos.values() if isinstance(info, str)]
    facts = known()
    rows = []
    for weights in found:
        row: dict[str, Any] = {"stage": weights.stage, "choice": weights.choice, "key": weights.key}
        row |= {"checkpoint": weights.checkpoint, "repo": weights.repo, "file": weights.file}
        if weights.repo is None:
            assert weights.place is not None
            licence = "apache-2.0" if weights.place.is_relative_to(BUILTIN_DIR) else None  # the package's own
            row |= {"size": 0, "licence": licence, "gated": False, "cached": None, "cached_size": None}
            rows.append(row | {"path": str(weights.place)})
            continue
        info = infos.get(weights.repo)
        info = None if isinstance(info, str) else info
        have = cached(weights.repo, weights.file, info)
        fact = facts.get(weights.repo, {})
        card = getattr(info, "card_data", None) or {}
        licence = card.get("license")
        licence = card.get("license_name") or licence if licence == "other" else licence
        gated = None if info is None or info.gated is None else bool(info.gated)
        row |= {"size": have.size, "licence": licence or fact.get("licence")}
        row |= {"gated": fact.get("gated") if gated is None else gated}
        row |= {"cached": "whole" if have.whole else "part" if have.present else "no", "cached_size": have.present}
        rows.append(row | {"path": str(have.place(weights)) if have.whole else None})
    return rows, notes


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    def said(value: Any) -> str:
        return "unknown" if value is None else {True: "yes", False: "no"}.get(value, str(value))

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "choice", "weights", "to fetch", "licence", "gated", "in the cache"):
        shown.add_column(column, overflow="fold", justify="right" if column == "to fetch" else "left")
    for row in rows:
        inside = row["key"].removeprefix(row["stage"]).lstrip(".")
        choice = row["choice"] + (f"\n{inside}" if inside else "")
        if row["repo"] is None:
            place = "part of the package" if Path(row["path"]).is_relative_to(BUILTIN_DIR) else f"lies in {row['path']}"
            shown.add_row(row["stage"], choice, row["checkpoint"], "nothing", said(row["licence"]), "no", place)
            continue
        size = "unknown" if row["size"] is None else decimal(row["size"])
        there = {"whole": "yes", "no": "no"}.get(row["cached"], f"{decimal(row['cached_size'])} of {size}")
        name = row["repo"] + (f"\n{row['file']}" if row["file"] else "")
        shown.add_row(row["stage"], choice, name, size, said(row["licence"]), said(row["gated"]), there)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=200)  # so that scripts see whole lines
    console.print(shown)


def run_list(words: Sequence[str], extra: Sequence[str], as_json: bool) -> None:
    """What `grounded-sam-models list` does."""
    without: list[str] = []
    wrong: list[str] = []
    if words:
        found, without = needed([*extra, *words])
    else:
        found, wrong = every_choice(extra)
    rows, notes = table(found)
    if as_json:
        print(json.dumps(rows, ensure_ascii=False, indent=1))
    else:
        if rows:
            show(rows)
        print(*without, sep="\n", end="\n" if without else "")
    for line in [*wrong, *notes]:
        print(f"grounded-sam-models: {line}", file=sys.stderr)


def run_fetch(words: Sequence[str]) -> None:
    """What `grounded-sam-models fetch` does.

    Raises:
        CheckpointError: for what could not be had, after everything else was.
    """
    from rich.filesize import decimal

    found, without = needed(words)
    for line in without:
        print(line)
    for weights in found:
        if weights.repo is None:
            part = weights.place is not None and weights.place.is_relative_to(BUILTIN_DIR)
            place = "is part of the package" if part else f"lies in {weights.place}"
            print(f"{weights}: {weights.checkpoint} {place}, there is nothing to fetch")
    wanted: dict[tuple[str, str | None, str | None], list[Weights]] = {}
    for weights in found:
        if weights.repo is not None:
            wanted.setdefault((weights.repo, weights.file, weights.sha256), []).append(weights)
    why = unreachable() if wanted else None
    failed = []
    for (repo, file, sha256), users in wanted.items():
        whose = ", ".join(map(str, users))
        try:
            have, unchecked = fetch(repo, file, sha256, why)
        except CheckpointError as error:
            failed.append(f"{whose}: {error}")
            continue
        checked = f"{len(have.files) - len(unchecked)} of {len(have.files)} digests right" if have.files else ""
        if unchecked:
            checked += "; the rest cannot be checked: without symlinks the cache keeps no digests"
        print(f"{whose}: {repo}, {decimal(have.present)}, {checked}, in {have.place(users[0])}")
    if failed:
        raise CheckpointError("\ngrounded-sam-models: ".join(failed))


def run_path(words: Sequence[str], typed: Sequence[str]) -> None:
    """What `grounded-sam-models path` does.

    Raises:
        CheckpointError: if something is not in the cache, with the command that fetches it.
    """
    found, _ = needed(words)
    missing = []
    for weights in found:
        if weights.repo is None:
            print(weights.place)
            continue
        have = cached(weights.repo, weights.file)
        if have.whole:
            print(have.place(weights))
        else:
            missing.append(f"{weights.repo} of {weights}")
    if missing:
        command = shlex.join(["grounded-sam-models", "fetch", *typed])
        raise CheckpointError(f"not in the cache: {', '.join(missing)}; get it with: {command}")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are `ConfigError`s."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help shows examples")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Command, words and options.

    Raises:
        ConfigError: for a command or an option that there is not.
    """
    parser = Parser(
        prog="grounded-sam-models",
        description=HELP,
        epilog=COMMANDS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", metavar="list|fetch|path")
    parser.add_argument("words", nargs="*", help="key=value, as for grounded-sam")
    parser.add_argument("--json", action="store_true", help="with list: the same for scripts; null is unknown")
    parser.add_argument("--config-dir", "-cd", type=Path, metavar="FOLDER", help="of choices of your own")
    given = parser.parse_intermixed_args(arguments)
    if given.command is None:
        raise ConfigError(f"say {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}; --help shows examples")
    if given.command not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(given.command, COMMANDS, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"there is no command {given.command!r}; {meant}the commands are {', '.join(COMMANDS)}")
    if given.json and given.command != "list":
        raise ConfigError(f"--json goes with list, not with {given.command}")
    if given.config_dir is not None and not given.config_dir.is_dir():
        raise ConfigError(f"--config-dir: there is no folder {given.config_dir}")
    return given


def main() -> None:
    """Entry point of `grounded-sam-models`: a user's mistake ends in one line and exit code 1."""
    try:
        given = parsed(sys.argv[1:])
        typed, extra = list(given.words), []
        if given.config_dir is not None:
            typed = [f"--config-dir={given.config_dir}", *typed]
            extra = [f"hydra.searchpath=[{to_override(f'file://{given.config_dir.resolve()}')}]"]
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # the client's advice is not what was asked for
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if given.command == "list":
            run_list(given.words, extra, given.json)
        elif given.command == "fetch":
            run_fetch([*extra, *given.words])
        else:
            run_path([*extra, *given.words], typed)
    except (GroundedSamError, OSError) as error:
        sys.exit(f"grounded-sam-models: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
