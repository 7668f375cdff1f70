"""What the commands share: their common options, the console, errors as exit codes."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

_POSITIONAL = ("network", "file", "files")
DONE, FAILED, BAD_USAGE, BUDGET_NOT_MET = range(4)

Network = Annotated[
    str,
    typer.Argument(
        metavar="NETWORK",
        help="A name of the zoo, or package.module:factory, a function without arguments that returns a Flax NNX "
        "module (the current folder is searched too).",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Safetensors file in PyTorch's layouts; for a factory its names are the paths with dots. Not needed for "
        "digits, nor for a factory that loads its weights itself."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="Folder with the data set's npz file (x_train, y_train, x_test, y_test). Not needed for digits."),
]
DataName = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help="For a factory: cifar10, mnist, digits, or an npz file. Floating point arrays are passed on as they are, "
        "integer images are scaled to [0, 1].",
    ),
]
Like = Annotated[
    str | None,
    typer.Option(metavar="NETWORK", help="The original network, for files that do not hold one of the zoo."),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def console() -> Console:
    """Standard output; wide enough for the tables where it is not a terminal."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=max(plain.width, 140))


@contextmanager
def errors(debug: bool) -> Iterator[None]:
    """One line on standard error and an exit code in place of a traceback."""
    try:
        yield
    except typer.Exit:
        raise
    except Exception as error:
        if debug:
            raise
        bad_usage = isinstance(error, ValueError | FileNotFoundError)
        text = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"unified-approx: {text if bad_usage else f'{type(error).__name__}: {text}'}", err=True)
        raise typer.Exit(BAD_USAGE if bad_usage else FAILED) from error


def command_line(command: str, arguments: Mapping[str, Any]) -> str:
    """The command as it could be typed again, with its defaults; `arguments` are those of its function."""
    named = {name: value for name, value in arguments.items() if name not in _POSITIONAL}
    return shlex.join(["unified-approx", command, *_positional(arguments), *flags(named)])


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments of a command's function as the words of its options."""
    words: list[str] = []
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        flag = f"--{name.removesuffix('_file').replace('_', '-')}"
        values = value if isinstance(value, list) else [value]
        words += [word for item in values for word in ([flag] if item is True else [flag, str(item)])]
    return words


def _positional(arguments: Mapping[str, Any]) -> list[str]:
    values = [arguments[name] for name in _POSITIONAL if name in arguments]
    return [str(item) for value in values for item in (value if isinstance(value, list) else [value])]


def check_outputs(**outputs: Path | None) -> None:
    """Files are written at the end of a long run: find out now if they cannot be."""
    for name, path in outputs.items():
        if path is None:
            continue
        if path.is_dir():
            raise ValueError(f"--{name}: {path} is a folder; give the name of a file")
        if path.parent.exists() and not path.parent.is_dir():
            raise ValueError(f"--{name}: {path.parent} is not a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
