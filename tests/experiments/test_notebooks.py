"""The notebooks run, and what is stored of them is small and the same everywhere."""

import base64
import re
from concurrent.futures import ThreadPoolExecutor

import notebooks
import pytest
from nbclient.exceptions import CellExecutionError

NAMES = notebooks.names()


def _pictures(notebook):
    data = [o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    return [base64.b64decode(d["image/png"]) for d in data if "image/png" in d]


def test_there_are_seven():
    assert [name[0] for name in NAMES] == list("1234567")


@pytest.fixture(scope="module")
def executed():
    """Futures of all notebooks in short mode, by name; two kernels run at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(notebooks.execute, name, quick=True, timeout=300) for name in NAMES}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", NAMES)
def test_runs_in_short_mode_and_its_assertions_hold(name, executed):
    done = executed[name].result()
    code = [cell for cell in done.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert any("assert" in cell.source for cell in code)
    assert len(_pictures(done)) == len(_pictures(notebooks.read(name)))


@pytest.mark.parametrize("name", NAMES)
def test_is_stored_with_small_outputs_and_no_noise(name):
    stored = notebooks.read(name)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(len(picture) < 100_000 for picture in _pictures(stored))
    assert (notebooks.FOLDER / name).stat().st_size < 400_000
    outputs = str([output for cell in code for output in cell.outputs])
    assert "stderr" not in outputs
    assert not re.search(r"/(tmp|home|root|work|Users)/", outputs)
    before = str(stored)
    assert str(notebooks.clean(stored, keep_outputs=True)) == before


def test_a_failing_cell_is_an_error(tmp_path, monkeypatch):
    broken = notebooks.nbformat.v4.new_notebook(cells=[notebooks.nbformat.v4.new_code_cell("assert 1 + 1 == 3")])
    notebooks.nbformat.write(broken, tmp_path / "broken.ipynb")
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    with pytest.raises(CellExecutionError, match="1 \\+ 1 == 3"):
        notebooks.execute("broken.ipynb")
    with pytest.raises(ValueError, match=r"no notebook 'none\.ipynb'; choose from broken\.ipynb"):
        notebooks.execute("none.ipynb")
