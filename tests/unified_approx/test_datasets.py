import functools
import hashlib
import http.server
import io
import tarfile
import threading

import numpy as np
import pytest
from sklearn.datasets import load_digits

from unified_approx import datasets

SHAPES = {"mnist": (28, 28), "cifar10": (32, 32, 3)}


def arrays(name, train=6, test=4):
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.integers, 0, 256, dtype=np.uint8)
    return {
        "x_train": draw(size=(train, *SHAPES[name])),
        "y_train": rng.integers(0, 10, train, np.uint8),
        "x_test": draw(size=(test, *SHAPES[name])),
        "y_test": rng.integers(0, 10, test, np.uint8),
    }


def check(data, expected):
    for key, value in expected.items():
        np.testing.assert_array_equal(getattr(data, key), value)
    assert data.x_train.dtype == np.uint8
    assert data.y_train.dtype == data.y_test.dtype == np.int32


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv(datasets.ENVIRONMENT, raising=False)
    monkeypatch.setattr(datasets.pooch, "retrieve", _no_download)


def _no_download(*args, **kwargs):
    raise AssertionError("a download was started")


def test_digits_are_a_fixed_permutation_of_sklearns():
    data = datasets.load("digits")
    assert data.x_train.shape == (1297, 8, 8)
    assert data.x_test.shape == (500, 8, 8)
    assert data.x_train.max() == 16
    images, labels = load_digits(return_X_y=True)
    ours = np.column_stack([np.concatenate([data.x_test, data.x_train]).reshape(-1, 64), [*data.y_test, *data.y_train]])
    theirs = np.column_stack([images, labels]).astype(int)
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
    assert np.bincount(data.y_test).min() >= 35  # 50 of each digit expected
    again = datasets.load("digits")
    np.testing.assert_array_equal(data.x_test, again.x_test)


@pytest.mark.parametrize("name", SHAPES)
def test_reads_npz_from_folder_or_environment(name, tmp_path, monkeypatch):
    expected = arrays(name)
    np.savez(tmp_path / f"{name}.npz", **expected)
    check(datasets.load(name, tmp_path), expected)
    check(datasets.load(name, str(tmp_path)), expected)
    monkeypatch.setenv(datasets.ENVIRONMENT, str(tmp_path))
    check(datasets.load(name), expected)


def test_unknown_name_and_missing_file(tmp_path):
    with pytest.raises(ValueError, match="'svhn'.*cifar10, mnist, digits"):
        datasets.load("svhn")
    with pytest.raises(FileNotFoundError, match=r"mnist\.npz.*leave data_dir out"):
        datasets.load("mnist", tmp_path)
    assert datasets.names() == ("cifar10", "mnist", "digits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": np.array([0, 1, 2, 10])}, "y_test has labels 0 to 10"),
        ({"y_train": np.array([0, 1, 2, 3, 4, -1])}, "y_train has labels -1 to 4"),
        ({"y_test": np.zeros(4)}, "y_test is float64"),
        ({"y_test": np.zeros(3, int)}, r"expected integers \(4,\)"),
        ({"y_test": np.zeros((4, 1), int)}, r"y_test is int64 \(4, 1\)"),
        ({"x_train": np.zeros((6, 28, 28), np.float32)}, "x_train is float32"),
        ({"x_train": np.zeros((6, 32, 32), np.uint8)}, r"expected uint8 \(n, \*\(28, 28\)\)"),
        ({"x_test": np.zeros((0, 28, 28), np.uint8)}, r"x_test is uint8 \(0, 28, 28\)"),
        ({"x_test": None}, "not a readable data set.*no array 'x_test'"),
        ({"x_test": np.array([None] * 4)}, "not a readable data set"),  # a pickle inside
    ],
)
def test_wrong_arrays_are_named(change, message, tmp_path):
    content = arrays("mnist") | change
    np.savez(tmp_path / "mnist.npz", **{k: v for k, v in content.items() if v is not None})
    with pytest.raises(ValueError, match=message):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "text", "single", "empty"])
def test_damaged_files(damage, tmp_path):
    path = tmp_path / "mnist.npz"
    np.savez(path, **arrays("mnist"))
    if damage == "single":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.write_bytes({"truncated": path.read_bytes()[:-500], "text": b"not found", "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"mnist\.npz is not a readable data set"):
        datasets.load("mnist", tmp_path)


# --- downloads: from a server on this machine, through pooch itself ---


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(folder, url): what is put in the folder is served."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.undo()  # the real pooch.retrieve again
        monkeypatch.delenv(datasets.ENVIRONMENT, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(datasets.pooch, "os_cache", lambda project: tmp_path / "cache" / project)
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def cifar_archive(path, content, drop=None, cut=0):
    """A small archive in the layout of cifar-10-binary.tar.gz."""
    x, y = content["x_train"].transpose(0, 3, 1, 2).reshape(-1, 3072), content["y_train"]
    train = np.column_stack([y, x]).astype(np.uint8)
    test = np.column_stack([content["y_test"], content["x_test"].transpose(0, 3, 1, 2).reshape(-1, 3072)])
    files = {f"data_batch_{i + 1}.bin": part.tobytes() for i, part in enumerate(np.split(train, 5))}
    files |= {"test_batch.bin": test.astype(np.uint8).tobytes(), "batches.meta.txt": b"airplane\n"}
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(folder := tarfile.TarInfo("cifar-10-batches-bin"))
        folder.type = tarfile.DIRTYPE
        for name, data in files.items():
            if name == drop:
                continue
            data = data[: len(data) - cut]
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def serve(monkeypatch, server, name, file):
    folder, url = server
    digest = hashlib.md5((folder / file).read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setitem(datasets._SOURCES, name, (f"{url}/{file}", f"md5:{digest}"))


def test_downloads_mnist_once(server, monkeypatch, tmp_path):
    expected = arrays("mnist")
    np.savez(server[0] / "mnist.npz", **expected)
    serve(monkeypatch, server, "mnist", "mnist.npz")
    monkeypatch.setenv(datasets.ENVIRONMENT, str(tmp_path))  # a folder without the file
    check(datasets.load("mnist"), expected)
    (server[0] / "mnist.npz").unlink()
    check(datasets.load("mnist"), expected)


def test_downloads_cifar10_in_binary_form(server, monkeypatch):
    expected = arrays("cifar10", train=10)
    cifar_archive(server[0] / "cifar.tar.gz", expected)
    serve(monkeypatch, server, "cifar10", "cifar.tar.gz")
    check(datasets.load("cifar10"), expected)


def test_a_download_with_another_checksum_is_refused(server, monkeypatch):
    np.savez(server[0] / "mnist.npz", **arrays("mnist"))
    serve(monkeypatch, server, "mnist", "mnist.npz")
    np.savez(server[0] / "mnist.npz", **arrays("mnist", train=7))
    with pytest.raises(ValueError, match=r"is not the expected file.*give data_dir="):
        datasets.load("mnist")


def test_a_failed_download_says_what_to_do(server, monkeypatch):
    monkeypatch.setitem(datasets._SOURCES, "mnist", (f"{server[1]}/nothing.npz", "md5:" + "0" * 32))
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz failed .*404.*a folder with mnist\.npz"):
        datasets.load("mnist")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"drop": "test_batch.bin"}, "test_batch.bin is missing or incomplete"),
        ({"cut": 1}, "data_batch_1.bin is missing or incomplete"),
        (None, "not a complete tar.gz"),
    ],
)
def test_damaged_archives(damage, message, tmp_path, monkeypatch):
    path = tmp_path / "cifar.tar.gz"
    cifar_archive(path, arrays("cifar10", train=10), **(damage or {}))
    if damage is None:
        path.write_bytes(path.read_bytes()[:-2000])
    monkeypatch.setattr(datasets.pooch, "retrieve", lambda url, known_hash, path: str(tmp_path / "cifar.tar.gz"))
    with pytest.raises(ValueError, match=message):
        datasets.load("cifar10")


def test_official_sources_are_checksummed_and_never_pickles():
    assert datasets._SOURCES["cifar10"] == (
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "md5:c32a1d4ab5d03f1284b67883e8d87530",
    )
    assert datasets._SOURCES["mnist"][1].startswith("sha256:731c5ac6")


@pytest.mark.parametrize(("name", "train"), [("cifar10", 50_000), ("mnist", 60_000)])
def test_the_real_data(name, train, data_dir):
    data = datasets.load(name, data_dir)
    assert data.x_train.shape == (train, *SHAPES[name])
    assert data.x_test.shape == (10_000, *SHAPES[name])
    assert np.bincount(data.y_train).min() > 0.09 * train
