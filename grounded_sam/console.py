"""Progress bars for people: on a terminal and in notebooks, never in logs and pipes."""

from __future__ import annotations

from types import TracebackType


class ProgressBar:
    """A bar with counts and the estimated time left, on stderr; removed at the end.

    Nothing is shown where stderr is neither a terminal nor a notebook.

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
        shown = console.is_terminal or console.is_jupyter
        self._bar = Progress(*columns, console=console, transient=True, disable=not shown)
        self._task = self._bar.add_task(description, total=total)

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
