"""The command line: `unified-approx demo | compress | lc | pack | unpack | evaluate | info | sweep | plot`.

JAX and everything that needs it is imported inside the commands, so that help is there at once.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from unified_approx.cli_common import (
    Data,
    DataName,
    Debug,
    Json,
    Like,
    check_outputs,
    command_line,
    console,
    errors,
)
from unified_approx.cli_compress import compress
from unified_approx.cli_lc import lc
from unified_approx.cli_pack import pack, stages_table, unpack
from unified_approx.cli_sweep import plot, sweep

if TYPE_CHECKING:
    pass

app = typer.Typer(
    name="unified-approx",
    help="Make trained Flax networks smaller and faster.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad usage, 3 done but the budget was not met.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the compressed network.")] = Path(
        "unified-approx-demo"
    ),
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Compress a small network that comes with the package; tables and pictures in under 90 seconds."""
    start, command = time.perf_counter(), command_line("demo", locals())
    with errors(debug):
        check_outputs(json=json_file)
        from unified_approx.demo import run

        run(out, json_file, console=console(), command=command, started=start)


File = Annotated[Path, typer.Argument(metavar="FILE", help="A network that compress --out or ua.save wrote.")]


@app.command()
def evaluate(
    file: File,
    data: Data = None,
    dataset: DataName = None,
    like: Like = None,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Accuracy of a saved network on the test images."""
    start, command = time.perf_counter(), command_line("evaluate", locals())
    with errors(debug):
        check_outputs(json=json_file)
        from unified_approx import resolve, storage
        from unified_approx.evaluate import accuracy

        header = storage.read_header(file)
        name = like or (header["network"] or {}).get("name")
        if name is None:
            raise ValueError(f"--like: {file} holds no network of the zoo; give --like package.module:factory")
        model = storage.load(file, like=None if like is None else resolve.blank_network(like))
        model.eval()
        images = resolve.load_images(name, data, dataset)
        reached = accuracy(model, images.x_test, images.y_test)
        console().print(f"{file}: {name}, accuracy {reached:.2f} % on {len(images.y_test):,} test images")
        if json_file is not None:
            from unified_approx.results import saved_network_row, write_results

            row = saved_network_row(name, reached, file.stat().st_size, header["report"])
            seconds = time.perf_counter() - start
            write_results(json_file, command, [row], seconds=seconds, seed=0, repeat_row=True)


@app.command()
def info(file: File, like: Like = None, debug: Debug = False) -> None:
    """What a saved network is made of; of a packed one also the bits of every layer, stage by stage.

    Reads the header only where the file is not packed: `evaluate` also checks the arrays.
    """
    with errors(debug):
        from unified_approx.storage import is_packed, read_header

        header, screen = read_header(file), console()
        network = header["network"]
        screen.print(f"{file}: {file.stat().st_size:,} bytes, format {header['format']}")
        screen.print(f"network: {network['name'] if network else 'not of the zoo (load it with like=)'}")
        screen.print(f"written with {', '.join(f'{k} {v}' for k, v in header.get('versions', {}).items())}")
        report = header["report"]
        if report is not None:
            met = {True: " (met)", False: " (not met)", None: ""}[report["budget_met"]]
            screen.print(
                f"{report['budget']}{met}: parameters ÷ {report['params_ratio']:.2f}, bits ÷ {report['cr']:.2f}, "
                f"multiply-adds ÷ {report['macs_ratio']:.2f}"
            )
        screen.print(_modules_table(header["modules"], report))
        for coded in header.get("coded", ()):
            screen.print(f"stored as bits: {coded['name']}")
        if is_packed(file):
            screen.print(_stages_table(file, like))


def _stages_table(file: Path, like: str | None) -> Table:
    from unified_approx import resolve, storage
    from unified_approx.packing import accounting, parse

    model = storage.load(file, like=None if like is None else resolve.blank_network(like))
    data = file.read_bytes()
    return stages_table(accounting.bits_by_stage(parse(data), model), len(data))


def _modules_table(modules: Sequence[dict[str, Any]], report: dict[str, Any] | None) -> Table:
    rows = {row["name"]: row for row in (report or {}).get("layers", ())}
    table = Table(title="replaced modules")
    for heading in ("module", "kind", "terms", "execution", "form", "columns", "rank", "params", "error held out"):
        table.add_column(heading, justify="right" if heading in ("columns", "rank", "params") else "left")
    for module in modules:
        path = "/".join(map(str, module["homes"][0]))
        spec, row = module.get("spec", {}), rows.get(path)
        terms = " + ".join(term["kind"] for term in spec.get("terms", ()))
        figures = ("", "", "", "", "")
        if row is not None:
            error = "" if row["error_after_held_out"] is None else f"{row['error_after_held_out']:.4f}"
            share = f"{row['params'] / row['original_params']:.0%}"
            figures = (row["form"] or row["status"], str(row["kept_columns"]), str(row["rank"]), share, error)
        table.add_row(path, module["kind"], terms, spec.get("execution", ""), *figures)
    return table


app.command()(compress)
app.command()(lc)
app.command()(pack)
app.command()(unpack)
app.command()(sweep)
app.command()(plot)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process with its code."""
    app(args=None if argv is None else list(argv))


if __name__ == "__main__":
    main()
