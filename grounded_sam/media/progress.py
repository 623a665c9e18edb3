"""Progress for people: a bar on a terminal, a line in a notebook, nothing in logs and pipes."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class ProgressBar:
    """A bar with counts and the estimated time left on a terminal (stderr), removed at the end; a line in a notebook.

    Args:
        description: What is counted or done, such as `images`.
        total: Number of steps; None if unknown.

    >>> with ProgressBar("images", total=2) as bar:
    ...     bar.update(1)
    """

    def __init__(self, description: str, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(description, total=total)
        self._line = _NotebookLine() if console.is_jupyter else None

    def __enter__(self) -> ProgressBar:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def update(self, completed: int, description: str | None = None) -> None:
        """Show how many steps are done.

        Args:
            completed: Number of steps.
            description: New description; None to keep it.
        """
        self._bar.update(self._task, completed=completed, description=description)
        if self._line is not None:
            task = self._bar.tasks[0]
            self._line.show(f"{task.description} {completed}/{'?' if task.total is None else int(task.total)}")


class _NotebookLine:
    """A line of output below the cell that runs, which is replaced when it is shown again."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, text: str) -> None:
        from IPython.display import display

        output = {"text/plain": text}
        if self._handle is None:
            self._handle = display(output, raw=True, display_id=True)
        else:
            self._handle.update(output, raw=True)
