"""Runs the notebooks of this folder and writes them back with their outputs.

    python experiments/notebooks.py [experiments/2_inside_one_layer.ipynb ...] [--quick]

`--quick` runs the short mode that the tests use (UNIFIED_APPROX_QUICK=1) and writes nothing.
"""

import os
import time
from pathlib import Path
from typing import Annotated

import nbformat
import typer
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
QUICK = "UNIFIED_APPROX_QUICK"


def names() -> list[str]:
    """File names of all notebooks, in order."""
    return sorted(file.name for file in FOLDER.glob("*.ipynb"))


def read(name: str) -> NotebookNode:
    """A notebook of this folder.

    Raises:
        ValueError: no such notebook.
    """
    if name not in names():
        raise ValueError(f"name: there is no notebook {name!r}; choose from {', '.join(names())}")
    return nbformat.read(FOLDER / name, as_version=4)


def execute(name: str, *, quick: bool = False, timeout: int = 1800) -> NotebookNode:
    """A notebook with fresh outputs; the kernel runs in this folder.

    Args:
        name: file name.
        quick: the short mode.
        timeout: seconds a cell may take.

    Raises:
        ValueError: no such notebook.
        nbclient.exceptions.CellExecutionError: a cell failed; the text holds the cell and the traceback.
    """
    notebook = clean(read(name))
    where = {"metadata": {"path": str(FOLDER)}}
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", record_timing=False, resources=where, store_widget_state=False
    )
    client.execute(env={**os.environ, QUICK: "1" if quick else "0"})
    return clean(notebook, keep_outputs=True)


def clean(notebook: NotebookNode, *, keep_outputs: bool = False) -> NotebookNode:
    """The notebook without metadata that change from machine to machine; in place.

    Args:
        notebook: any notebook.
        keep_outputs: whether outputs stay.
    """
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    for number, cell in enumerate(notebook.cells):
        cell.metadata, cell.id = NotebookNode(), f"cell-{number}"
        if cell.cell_type == "code" and not keep_outputs:
            cell.outputs, cell.execution_count = [], None
    return notebook


def main(
    chosen: Annotated[list[str] | None, typer.Argument(help="Notebooks; all by default.")] = None, quick: bool = False
) -> None:
    """Run notebooks."""
    for name in [Path(file).name for file in chosen or names()]:
        start = time.perf_counter()
        notebook = execute(name, quick=quick)
        if not quick:
            nbformat.write(notebook, FOLDER / name)
        print(f"{name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    typer.run(main)
