"""Damaged and hostile packed files: each gives an error or arrays, none a crash, wrong values or a flood of memory.

    python experiments/fuzz_packed.py [--files 100000] [--seed 0]

A third are cut short, lengthened, have bits flipped or bytes exchanged. Another third are, and get checksums that fit
again, so that what is behind these is tried. In the last third the header lies about a size, a type or a length. A file
whose checksums nobody mended must give the very arrays that were packed, or an error.
"""

import json
import time
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jaxtyping import Shaped

from unified_approx.packing import arrays, container, symbols
from unified_approx.results import check, peak_rss_mb, write_results

RESULT = Path(__file__).parent / "results" / "fuzz_packed.json"
LARGEST = 10**6  # bytes that arrays may take
KINDS = ("as damaged", "checksums that fit", "a header that lies")
_SLOW = 10.0  # seconds for one file, in which a decoder may be compiled


def tensors(rng: np.random.Generator) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Arrays that are written in all the ways there are."""
    values = rng.standard_normal((60, 50)).astype(np.float32)
    book = rng.standard_normal(9).astype(np.float32)
    some = rng.random((60, 50)) < rng.random((60, 1)) ** 5
    return {
        "plain": values,
        "pruned": np.where(rng.random((60, 50)) < 0.1, values, 0).astype(np.float32),
        "shared": book[rng.integers(0, 9, (60, 50))],
        "grid": np.where(some, book[rng.integers(0, 9, (60, 50))], 0).astype(np.float32),
        "columns": np.sort(rng.choice(4608, 200, replace=False)).astype(np.int32),
        "zeros": np.zeros(500, np.float32),
        "scalar": np.array(3, np.uint32),
    }


def with_checksums(data: bytes) -> bytes:
    """The same file, its checksums made to fit, so that what is behind them is tried."""
    start = len(container.MAGIC) + 1
    length = int.from_bytes(data[start : start + 4], "little")
    header = data[start + 8 : start + 8 + length]
    try:
        described = json.loads(zlib.decompress(header))
        body, at = data[start + 8 + length :], 0
        for entry in described["arrays"]:
            entry[4] = zlib.crc32(body[at : at + entry[3]])
            at += entry[3]
    except (zlib.error, KeyError, TypeError, ValueError, IndexError):
        return data
    return repacked(described, body)


def repacked(described: Mapping[str, Any], body: bytes) -> bytes:
    """A file of that header and these streams."""
    header = zlib.compress(json.dumps(described).encode())
    prefix = container.MAGIC + bytes([container.VERSION]) + len(header).to_bytes(4, "little")
    return prefix + zlib.crc32(prefix + header).to_bytes(4, "little") + header + body


def described_in(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and streams of a file."""
    start = len(container.MAGIC) + 1
    length = int.from_bytes(data[start : start + 4], "little")
    return json.loads(zlib.decompress(data[start + 8 : start + 8 + length])), data[start + 8 + length :]


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut short, lengthened, bits flipped, or bytes exchanged."""
    out = bytearray(data)
    kind = rng.integers(4)
    if kind == 0:
        return bytes(out[: rng.integers(len(out))])
    if kind == 1:
        return bytes(out) + rng.bytes(int(rng.integers(1, 9)))
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(len(out)))
        out[place] = out[place] ^ 1 << int(rng.integers(8)) if kind == 2 else int(rng.integers(256))
    return bytes(out)


def lying(data: bytes, rng: np.random.Generator) -> bytes:
    """A header that says something else of one array, its own checksum right."""
    described, body = described_in(data)
    entry = described["arrays"][rng.integers(len(described["arrays"]))]
    number = int(2 ** rng.uniform(0, 70)) - 1
    kind = rng.integers(4)
    if kind == 0:
        entry[1] = str(rng.choice(arrays.DTYPES))
    elif kind == 1:
        entry[2] = [number, *entry[2][1:]] if entry[2] else [number]
    elif kind == 2:
        entry[2] = list(entry[2])[::-1] + [int(rng.integers(3))]
    else:
        entry[3] = number
    return with_checksums(repacked(described, body))


def read(data: bytes) -> tuple[Mapping[str, Shaped[np.ndarray, "..."]] | None, str]:
    """The arrays, or None and what the error says."""
    try:
        return container.parse(data, largest=LARGEST).arrays(), ""
    except ValueError as error:
        return None, str(error)


def is_same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(left[k].tobytes() == right[k].tobytes() for k in left)


def main(
    files: Annotated[int, typer.Option(help="How many.")] = 100_000,
    seed: int = 0,
    json_file: Annotated[Path, typer.Option("--json")] = RESULT,
) -> None:
    """Count what becomes of them."""
    start, rng, counts = time.perf_counter(), np.random.default_rng(seed), Counter[str]()
    known = tensors(rng)
    whole = [container.dump({"network": None}, known, coder) for coder in symbols.CODERS]
    before, slowest = peak_rss_mb(), 0.0
    for number in range(files):
        kind, source = KINDS[number % 3], whole[number // 3 % len(whole)]
        data = lying(source, rng) if kind == "a header that lies" else damaged(source, rng)
        data = with_checksums(data) if kind == "checksums that fit" else data
        clock = time.perf_counter()
        found, message = read(data)
        slowest = max(slowest, time.perf_counter() - clock)
        if found is None:
            counts[f"{kind}: refused"] += 1
            counts["unclear messages"] += not message.startswith(("path: ", "largest: "))
        else:
            counts[f"{kind}: read"] += 1
            counts["wrong values"] += kind == KINDS[0] and not is_same(found, known)
        if number % 10_000 == 9_999:
            print(number + 1, dict(counts), flush=True)
    row = {"files": files, **counts, "slowest_seconds": slowest, "memory_mb": peak_rss_mb() - before}
    checks = {
        "files": check(files, ">=", 100_000),
        "wrong values": check(counts["wrong values"], "==", 0),
        "unclear messages": check(counts["unclear messages"], "==", 0),
        "seconds for the slowest": check(slowest, "<=", _SLOW),
        "memory above that of the start, MB": check(row["memory_mb"], "<=", 500),
    }
    command = f"python experiments/fuzz_packed.py --files {files} --seed {seed}"
    write_results(json_file, command, [row], checks, seconds=time.perf_counter() - start, seed=seed)
    print(json.dumps(checks, indent=1))


if __name__ == "__main__":
    typer.run(main)
