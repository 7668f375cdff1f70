"""Rows of an experiment that are kept as they come, so that a killed run resumes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unified_approx.files import replacing

Rows = list[dict[str, Any]]


def kept(work: Path, name: str, make: Callable[[], Rows]) -> Rows:
    """Rows from the work folder, or made now and put there.

    Args:
        work: the folder.
        name: of the file, `<part>-...`; a row without a field `part` gets one.
        make: makes the rows.
    """
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"{name}.json"
    if not file.exists():
        rows = make()
        with replacing(file) as partial:
            partial.write_text(json.dumps([{"part": name.split("-")[0], **row} for row in rows], default=float))
    return json.loads(file.read_text())
