"""Tasks as text: `fc1=prune(0.05), fc2=low_rank(10), conv.*=joint(quantize(2)+prune(0.01))`.

PATTERN=FORM, several with commas. A pattern is a regular expression for whole names, as in `Task`. A form is the `word`
of a compression with its arguments, by position or by name; `+` makes sums; `joint(...)` takes all that the pattern
names together. Numbers with a point are fractions where a number of weights is asked for.
"""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from solvers import compressions
from solvers.compressions import Additive, Compression
from solvers.prox import CHANNELS, COLUMNS, ROWS
from unified_approx.learning_compression.tasks import Task

_NAMES = {"columns": COLUMNS, "rows": ROWS, "channels": CHANNELS}
_JOINT = "joint"
_COMBINATIONS = ("sum", "each", "one_of")  # words that take any number of forms


def words() -> dict[str, Callable[..., Compression]]:
    """What the language calls the compressions: their `word`, or the name of a function that makes one."""
    found = {}
    for name in compressions.__all__:
        thing = getattr(compressions, name)
        word = name if inspect.isfunction(thing) else getattr(thing, "word", None)
        if word is not None:
            found[word] = thing
    return found


def parse_tasks(text: str) -> list[Task]:
    """The tasks that a text says.

    Raises:
        ValueError: what cannot be read, an unknown word, or arguments that it does not take; the part is named.
    """
    return [_task(part) for part in _split(text, ",")]


def _task(text: str) -> Task:
    pattern, *forms = _split(text, "=", 1)
    if len(forms) != 1:
        raise ValueError(f"--tasks: {text!r} is not PATTERN=FORM, for example fc1=prune(0.05)")
    try:
        tree = ast.parse(forms[0], mode="eval").body
    except SyntaxError as error:
        raise ValueError(
            f"--tasks: {forms[0]!r} cannot be read ({error.msg}); write for example prune(0.05)"
        ) from error
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == _JOINT:
        if len(tree.args) != 1 or tree.keywords:
            raise ValueError(f"--tasks: {forms[0]!r}: joint takes one form")
        return Task(path=pattern, compression=_form(tree.args[0]), view="vector", joint=True)
    return Task(path=pattern, compression=_form(tree))


def _split(text: str, sign: str, most: int = -1) -> list[str]:
    """The parts between signs that stand outside all brackets, at most `most` splits."""
    parts, start = [], 0
    for at in _outside(text):
        if text[at] == sign and len(parts) != most:
            parts.append(text[start:at].strip())
            start = at + 1
    parts.append(text[start:].strip())
    if not all(parts):
        raise ValueError(f"--tasks: {text!r} has an empty part; write for example fc1=prune(0.05),fc2=quantize(2)")
    return parts


def _outside(text: str) -> Iterator[int]:
    """Places outside all brackets; what follows a backslash is no bracket."""
    depth = 0
    for match in re.finditer(r"\\.|.", text):
        character = match.group()
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            yield match.start()


def _form(tree: ast.expr) -> Compression:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        return Additive((*_terms(tree.left), *_terms(tree.right)))
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        raise ValueError(f"--tasks: {ast.unparse(tree)!r} is no form; write one of {', '.join(words())} with (...)")
    word, known = tree.func.id, words()
    if word not in known:
        raise ValueError(f"--tasks: {word!r} is unknown; there are {', '.join(known)}, and joint(...)")
    values = [_value(argument) for argument in tree.args]
    arguments = [tuple(values)] if word in _COMBINATIONS else values
    try:
        return known[word](*arguments, **{k.arg: _value(k.value) for k in tree.keywords if k.arg})
    except TypeError as error:
        signature = inspect.signature(known[word])
        raise ValueError(f"--tasks: {ast.unparse(tree)!r}: {error}; its arguments are {signature}") from error
    except ValueError as error:
        raise ValueError(f"--tasks: {ast.unparse(tree)!r}: {error}") from error


def _terms(tree: ast.expr) -> list[Compression]:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        return [*_terms(tree.left), *_terms(tree.right)]
    return [_form(tree)]


def _value(tree: ast.expr) -> Any:
    """A number, a tuple of numbers, a word, or a form."""
    if isinstance(tree, ast.Name):
        return _NAMES.get(tree.id, tree.id)
    if isinstance(tree, ast.Call | ast.BinOp):
        return _form(tree)
    try:
        return ast.literal_eval(tree)
    except ValueError as error:
        raise ValueError(f"--tasks: {ast.unparse(tree)!r} is no number, word or form") from error
