"""The commands `pack` and `unpack`, and what `info` shows of a packed file."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from unified_approx.cli_common import Debug, Like, check_outputs, console, errors

if TYPE_CHECKING:
    from unified_approx.packing.accounting import LayerBits

_PACKED, _UNPACKED = ".uapk", ".safetensors"


def pack(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A network that --out or ua.save wrote.")],
    out: Annotated[Path | None, typer.Option(help=f"Where to.  [default: FILE with {_PACKED}]")] = None,
    coder: Annotated[str, typer.Option(help="ans, or huffman as in Deep Compression.")] = "ans",
    like: Like = None,
    debug: Debug = False,
) -> None:
    """Write a saved network in as few bytes as its values allow, bit for bit the same."""
    with errors(debug):
        from unified_approx import storage

        target = out or file.with_suffix(_PACKED)
        check_outputs(out=target)
        model, described = _read(file, like)
        size = storage.pack(target, model, **described, coder=coder)
        console().print(f"{target}: {size:,} bytes, {file.stat().st_size / size:.2f} times smaller than {file}")


def unpack(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A network that pack wrote.")],
    out: Annotated[Path | None, typer.Option(help=f"Where to.  [default: FILE with {_UNPACKED}]")] = None,
    like: Like = None,
    debug: Debug = False,
) -> None:
    """Write a packed network as a safetensors file again."""
    with errors(debug):
        from unified_approx import storage

        if not storage.is_packed(file):
            raise ValueError(f"FILE: {file} is not packed; give a file that `unified-approx pack` wrote")
        target = out or file.with_suffix(_UNPACKED)
        check_outputs(out=target)
        model, described = _read(file, like)
        size = storage.save(target, model, **described)
        console().print(f"{target}: {size:,} bytes")


def _read(file: Path, like: str | None) -> tuple[Any, dict[str, Any]]:
    """The network, and what its file says of it besides."""
    from unified_approx import resolve, storage

    header = storage.read_header(file)
    model, coded = storage.load_coded(file, like=None if like is None else resolve.blank_network(like))
    known = header["network"]
    network = None if known is None else storage.Network(known["name"], known["options"])
    return model, {"network": network, "metadata": header.get("metadata"), "coded": coded}


def stages_table(lines: "Sequence[LayerBits]", size: int) -> Table:
    """Bits per original weight of every layer after each stage of Deep Compression.

    Args:
        lines: of `bits_by_stage`.
        size: of the file, in bytes; what is not in the lines is the header's.
    """
    table = Table(title="bits per weight of the original layer")
    for heading in ("layer", "weights", "dense", "pruned", "shared", "coded", "bytes"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for line in lines:
        bits = (line.dense, line.pruned, line.shared, line.coded)
        table.add_row(line.name, f"{line.weights:,}", *_per_weight(bits, line.weights), f"{line.coded // 8:,}")
    total = [sum(column) for column in zip(*(_figures(line) for line in lines), strict=True)] or [0] * 5
    header = size - total[4] // 8
    table.add_row("header", "", "", "", "", "", f"{header:,}")
    table.add_row("all", f"{total[0]:,}", *_per_weight(total[1:4] + [8 * size], total[0]), f"{size:,}")
    return table


def _figures(line: "LayerBits") -> tuple[int, ...]:
    return line.weights, line.dense, line.pruned, line.shared, line.coded


def _per_weight(bits: Sequence[int], weights: int) -> list[str]:
    return [f"{b / weights:.2f}" if weights else "" for b in bits]
