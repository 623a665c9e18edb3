"""The command `grounded-sam-review`: decisions about the objects of a store, and what they teach."""

from __future__ import annotations

import argparse
import getpass
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grounded_sam.cli.arguments import ArgumentParser
from grounded_sam.errors import ConfigError, GroundedSamError, count_of
from grounded_sam.files import home_path, store_path
from grounded_sam.formats.review_list import edit_of_line, read_review_list, write_review_list
from grounded_sam.formats.store import find_store
from grounded_sam.formats.store_edits import Edit, StoreEditor
from grounded_sam.formats.store_rows import StoreRows
from grounded_sam.formats.store_schema import STATUSES
from grounded_sam.output.paths import OutputPath, RemotePath

if TYPE_CHECKING:
    from grounded_sam.evaluation.verdicts import Verdicts

COMMANDS = ("import", "status", "next", "tune")
HELP = """\
Review the objects of a store, and learn from it.

  grounded-sam-review next labels --count 50           what to look at next: labels/next.csv
  grounded-sam-review import labels labels/next.csv    the list with status filled in: accepted or rejected
  grounded-sam-review status labels                    counts by class and status
  grounded-sam-review tune labels                      thresholds and negatives: labels/reviewed-classes.yaml

The folder is that of a store, or the output folder that has one.
"""
COMMANDS_HELP = """\
import  apply a list such as review.csv: accepted or rejected in the column status, another class in the column class,
        in the column detail what a rejected object looks like. Lines that cannot be applied are named, and the exit
        code is 1; all others are applied
status  how many objects of each class were accepted, rejected, edited and added, and how many nobody has looked at
next    the objects whose review changes most: near the threshold of their class, where few were reviewed
tune    the best threshold of each class, and phrases that rejected objects look like, as an ontology for text=
"""
#: First line of the ontologies that `tune` writes; no other file is overwritten.
TUNED = "# Thresholds from the review of"


def _list_path(folder: OutputPath, path: Path | None, name: str) -> Path:
    """Return the file to write: the one given, else one of a name beside the store.

    Raises:
        ConfigError: If none is given and the store is at an address.
    """
    if path is not None:
        return path
    store = find_store(folder)
    if isinstance(store, RemotePath):
        raise ConfigError(f"{store} is at an address; say with --to where to write {name}")
    return (store.parent if store.name == "store" else store) / name


def run_import(folder: OutputPath, path: Path, author: str, new_classes: bool) -> None:
    """Run `grounded-sam-review import`.

    Args:
        folder: Folder of the store.
        path: The list.
        author: Who decided.
        new_classes: Whether classes may be ones that the store does not have.

    Raises:
        ConfigError: If lines cannot be applied; all others are applied first.
    """
    lines = read_review_list(path)
    editor = StoreEditor(folder)
    edits: list[Edit] = []
    numbers: list[int] = []
    problems: list[tuple[int, str]] = []
    for line in lines:
        edit = edit_of_line(line, editor.rows, new_classes)
        if isinstance(edit, str):
            problems.append((line.number, edit))
        elif edit is not None:
            edits.append(edit)
            numbers.append(line.number)
    applied = editor.apply(edits, author, skip_invalid=True)
    problems += [(numbers[problem.index], problem.reason) for problem in applied.problems]
    counts = Counter(edit.action for edit, ids in zip(edits, applied.object_ids, strict=True) if ids)
    done = ", ".join(f"{count} {action}" for action, count in sorted(counts.items())) or "nothing to change"
    unchanged = len(lines) - len(edits) - len(problems) + len(applied.problems)
    print(f"{path}: {done}; {count_of(unchanged, 'line')} without a decision")
    for number, reason in sorted(problems):
        print(f"grounded-sam-review: {path}, line {number}: {reason}", file=sys.stderr)
    if problems:
        raise ConfigError(f"{count_of(len(problems), 'line')} of {path} could not be applied")


def run_status(folder: OutputPath) -> None:
    """Run `grounded-sam-review status`."""
    from rich.console import Console
    from rich.table import Table

    store = StoreRows(find_store(folder))
    counts: Counter[tuple[str, str]] = Counter()
    for key in store.index.sorted_keys():
        for _, rows in store.rows(key):
            counts.update((row["class"], row["status"]) for row in rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("class")
    for status in STATUSES:
        table.add_column("left" if status == "predicted" else status, justify="right")
    for name in sorted({name for name, _ in counts}):
        table.add_row(name, *(f"{counts[name, status]:,}" for status in STATUSES))
    total = Counter({status: sum(n for (_, s), n in counts.items() if s == status) for status in STATUSES})
    table.add_row("all", *(f"{total[status]:,}" for status in STATUSES))
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=200)  # so that scripts get whole lines
    console.print(table)


def run_next(folder: OutputPath, count: int, path: Path | None) -> None:
    """Run `grounded-sam-review next`.

    Args:
        folder: Folder of the store.
        count: Number of objects.
        path: CSV file to write; None for `next.csv` in the output folder.
    """
    from grounded_sam.evaluation.verdicts import chances, next_candidates

    path = _list_path(folder, path, "next.csv")
    verdicts = _verdicts(folder)
    chosen, chance = next_candidates(verdicts, count), chances(verdicts)
    candidates = [verdicts.candidates[i] for i in chosen]
    write_review_list(
        path,
        [
            {
                "file": candidate.file,
                "reason": "next",
                "class": candidate.class_name,
                "score": round(candidate.score, 4),
                "object_id": candidate.object_id,
                "status": "predicted",
            }
            for candidate in candidates
        ],
    )
    classes = Counter(candidate.class_name for candidate in candidates)
    found = ", ".join(f"{number} {name}" for name, number in classes.most_common()) or "nothing is left to look at"
    print(f"{count_of(len(chosen), 'object')} to look at: {path}: {found}")
    if len(chosen):
        expected = sum(chance[chosen])
        print(
            f"About {expected:.0f} of them are expected to be right. Fill in the column status, then import the file."
        )


def run_tune(folder: OutputPath, path: Path | None, precision: float | None, min_count: int) -> None:
    """Run `grounded-sam-review tune`.

    Args:
        folder: Folder of the store.
        path: YAML file to write; None for `reviewed-classes.yaml` in the output folder.
        precision: Precision to reach; None for the fewest errors.
        min_count: Fewest rejected objects that look alike, for a negative.

    Raises:
        ConfigError: If nobody has decided about anything, or the file was not written by this command.
    """
    from grounded_sam.evaluation.thresholds import write_ontology
    from grounded_sam.evaluation.verdicts import proposed_negatives, tuned_thresholds, tuned_vocabulary

    verdicts = _verdicts(folder)
    judged = sum(candidate.is_right is not None for candidate in verdicts.candidates)
    if not judged:
        raise ConfigError(f"nobody has accepted or rejected an object of {folder} yet; see grounded-sam-review next")
    path = _list_path(folder, path, "reviewed-classes.yaml")
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(TUNED):
        raise ConfigError(f"{path} exists and was not written by this command; choose another file with --to")
    thresholds, negatives = tuned_thresholds(verdicts, precision), proposed_negatives(verdicts, min_count)
    comment = f"{TUNED[2:]} {count_of(judged, 'object')}.\n"
    comment += "".join(
        f"Negative {n.phrase!r}: {count_of(n.count, 'rejected object')} of {', '.join(n.classes)}.\n" for n in negatives
    )
    write_ontology(path, tuned_vocabulary(verdicts, negatives), thresholds, comment)
    for name, best in zip(verdicts.vocabulary.classes, thresholds, strict=True):
        if best is None:
            print(f"{name}: not reviewed, or not to be reached; its threshold stays")
            continue
        print(f"{name}: score {best.score:.3f}; expected precision {best.precision:.3f}, recall {best.recall:.3f}")
    for negative in negatives:
        print(f"negative {negative.phrase}: {count_of(negative.count, 'rejected object')} look like it")
    print(f"Ontology for text=: {path}")


def _verdicts(folder: OutputPath) -> Verdicts:
    from grounded_sam.evaluation.verdicts import read_verdicts

    return read_verdicts(StoreRows(find_store(folder)))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError
    return value


_positive.__name__, _share.__name__ = "whole number above 0", "number above 0, at most 1,"  # for argparse's messages


def parse_review(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: If a command or an option is unknown.
    """
    parser = ArgumentParser(
        prog="grounded-sam-review",
        description=HELP,
        epilog=COMMANDS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="import|status|next|tune", parser_class=ArgumentParser)
    parsers = {name: commands.add_parser(name, allow_abbrev=False) for name in COMMANDS}
    for command in parsers.values():
        command.add_argument("folder", type=store_path, help="output folder, or folder of the store; may be an address")
    parsers["import"].add_argument("list", type=home_path, help="the list, such as review.csv")
    parsers["import"].add_argument("--author", default=_user(), help="who decided; by default the name of the user")
    parsers["import"].add_argument("--new-classes", action="store_true", help="allow new classes")
    parsers["next"].add_argument("--count", type=_positive, default=200, help="number of objects")
    parsers["next"].add_argument("--to", type=home_path, metavar="FILE", help="CSV file to write")
    parsers["tune"].add_argument("--to", type=home_path, metavar="FILE", help="YAML file to write")
    parsers["tune"].add_argument("--precision", type=_share, help="precision to reach, instead of the fewest errors")
    parsers["tune"].add_argument(
        "--negatives", type=_positive, default=2, metavar="N", help="rejected objects that a negative must look like"
    )
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        raise ConfigError(f"a command is missing: {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}; --help shows examples")
    return parsed


def _user() -> str:
    """Return the name of the user; empty where the system does not tell."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""


def main() -> None:
    """Run the command: a user's mistake ends with one line and exit code 1."""
    try:
        parsed = parse_review(sys.argv[1:])
        if parsed.command == "import":
            run_import(parsed.folder, parsed.list, parsed.author, parsed.new_classes)
        elif parsed.command == "status":
            run_status(parsed.folder)
        elif parsed.command == "next":
            run_next(parsed.folder, parsed.count, parsed.to)
        else:
            run_tune(parsed.folder, parsed.to, parsed.precision, parsed.negatives)
    except (GroundedSamError, OSError) as error:
        sys.exit(f"grounded-sam-review: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
