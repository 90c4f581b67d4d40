"""Make docs/tutorial.ipynb of docs/tutorial.py, and run it.

    python docs/notebook.py

The text is in docs/tutorial.py, whose changes can be read: each line that begins with ``# %%`` begins a cell.
The notebook is written with what its cells have printed and drawn.
"""

import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

SOURCE = Path(__file__).with_name("tutorial.py")
NOTEBOOK = Path(__file__).with_name("tutorial.ipynb")
MARK = "# %%"


def main() -> None:
    notebook = read_cells(SOURCE.read_text(encoding="utf-8"))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
    nbformat.write(notebook, NOTEBOOK)
    seconds, size = time.monotonic() - start, NOTEBOOK.stat().st_size
    print(f"{NOTEBOOK}: {len(notebook.cells)} cells in {seconds:.0f} s, {size / 1000:.0f} kB")


def read_cells(text: str) -> NotebookNode:
    """A notebook, not yet run, of a Python file with cells."""
    cells = []
    for number, part in enumerate(text.split(MARK)[1:]):
        kind, _, body = part.partition("\n")
        body = body.strip("\n")
        if kind.strip() == "[markdown]":
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
            cell = nbformat.v4.new_markdown_cell(body)
        else:
            cell = nbformat.v4.new_code_cell(body)
        cell.id = f"cell-{number}"  # not drawn at random: the same text gives the same file
        cells.append(cell)
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def execute(notebook: NotebookNode, folder: Path, environment: dict[str, str] | None = None) -> None:
    """Run all cells in a kernel of their own and keep what they print and draw.

    Args:
        folder: where the kernel works, and its runs are left.
        environment: of the kernel; None: this process's.

    Raises:
        CellExecutionError: a cell has failed.
    """
    client = NotebookClient(
        notebook, timeout=600, coalesce_streams=True, resources={"metadata": {"path": str(folder)}}
    )
    client.execute(**({} if environment is None else {"env": environment}))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell ran: another time in every diff


if __name__ == "__main__":
    main()
