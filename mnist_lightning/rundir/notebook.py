"""Show a run's progress in a notebook."""

import html
import sys
import time
from typing import Any

PAUSE = 0.2  # seconds between two drawings, each of which sends a message to the browser


def in_notebook() -> bool:
    """Tell whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class NotebookBar:
    """Show one line below a cell, updated in place, with the methods of ``tqdm`` that ``Progress`` uses."""

    def __init__(self) -> None:
        from IPython.display import DisplayHandle

        self._handle = DisplayHandle()  # type: ignore[no-untyped-call,unused-ignore]
        self._title = self._postfix = self._told = ""
        self._total = self._done = 0
        self._drawn = 0.0
        self._handle.display(self)  # type: ignore[no-untyped-call,unused-ignore]

    def start(self, title: str, *, total: int, done: int) -> None:
        self._title, self._total, self._done = title, total, done

    def tell(self, text: str) -> None:
        """Show the line of a finished epoch until the next epoch ends."""
        self._told = text
        self._draw()

    def update(self) -> bool:
        """Count one step, and return whether the line was drawn."""
        self._done += 1
        due = time.monotonic() - self._drawn >= PAUSE
        if due:
            self._draw()
        return due

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self._postfix = text
        if refresh:
            self._draw()

    def close(self) -> None:
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._handle.update(self)  # type: ignore[no-untyped-call,unused-ignore]

    def __repr__(self) -> str:
        return self._told or self._title

    def _repr_html_(self) -> str:
        bar = f'<progress value="{self._done}" max="{self._total}" style="width: 10em"></progress>'
        under_way = "" if self._told.startswith(self._title) else f"{self._title}   {self._postfix}   "
        text = html.escape(f"{under_way}{self._told}")
        return f'<div style="font-family: monospace; white-space: pre-wrap">{bar} {text}</div>'


def to_table(rows: list[list[Any]], *, header: list[str] | None = None) -> str:
    """Return rows of cells as an HTML table; each cell is shown as its escaped ``str``."""
    lines = [("th", header)] if header else []
    lines += [("td", row) for row in rows]
    body = "".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
        for tag, cells in lines
    )
    return f"<table>{body}</table>"
