"""Every command, exit code and error of the command line, on the packaged digits network."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx
from networks import build
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from unified_approx import cli, datasets, evaluate, pipeline, storage, zoo
from unified_approx import run as run_module
from unified_approx.deep_compression import share
from unified_approx.report import LayerRow, Report
from unified_approx.zoo import digits

QUICK = ["--calibration", "60", "--rows", "512", "--form", "columns", "--keep", "conv1|conv3|fc"]
UNIFORM = ["--calibration", "60", "--allocation", "uniform"]
FACTORY = """
from unified_approx import zoo


def network():
    return zoo.load("digits")


def blank():
    return zoo.create("digits")


def number():
    return 3


constant = 3
"""


@pytest.fixture(scope="module")
def run():
    def invoke(*arguments):
        return CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200"})

    return invoke


@pytest.fixture(scope="module")
def compressed(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    out, json_file = folder / "small.safetensors", folder / "new" / "row.json"
    result = run("compress", "digits", *QUICK, "--budget", "params=0.85", "--out", out, "--json", json_file, "--debug")
    assert result.exit_code == 0, result.output
    return out, json.loads(json_file.read_text()), result


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "made_for_a_test.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "made_for_a_test", raising=False)
    return "made_for_a_test:"


def test_help_is_quick_and_needs_no_jax():
    code = (
        "import sys; from unified_approx.cli import main\ntry: main(['--help'])\nfinally: print('jax' in sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 10  # 0.6 s on an idle machine; loading JAX and Flax takes several
    assert done.stdout.strip().endswith("False")
    for command in ("demo", "compress", "evaluate", "info"):
        assert command in done.stdout


def test_compress_prints_and_writes_what_it_measured(compressed):
    out, found, result = compressed
    row = found["rows"][0]
    assert {name: found[name] for name in row} == row
    assert (row["network"], row["method"], row["budget"], row["form"]) == ("digits", "admm", "params=0.85", "columns")
    assert found["command"].startswith(
        "unified-approx compress digits --budget params=0.85 --group column --form columns"
    )
    assert found["command"].endswith(f"--keep 'conv1|conv3|fc' --out {out} --json {out.parent}/new/row.json --debug")
    assert found["budget_met"] is True
    assert row["file_bytes"] == out.stat().st_size
    assert row["bytes_ratio"] == pytest.approx(row["original_file_bytes"] / row["file_bytes"])
    assert row["drop"] == pytest.approx(row["reference_accuracy"] - row["accuracy"])
    assert 1 / 0.85 < row["cr"] <= row["params_ratio"] < 1.3
    assert row["speedup"] == pytest.approx(row["original_ms"] / row["compressed_ms"])
    assert row["speedup_batch1"] > 0
    assert found["peak_rss_mb"] > 100
    assert found["seconds"] > 0
    status = {layer["name"]: layer["status"] for layer in found["layers"]}
    assert status == {"conv1": "kept", "conv2": "compressed", "conv3": "kept", "fc": "kept"}
    for text in ("conv1", "accuracy on the test images", f"{row['accuracy']:.2f}", "Measured against the original"):
        assert text in result.stdout
    assert not result.stderr  # no progress where there is no terminal


def test_the_reference_is_the_packaged_network_on_all_test_images(compressed):
    data, entry = datasets.load("digits"), zoo.entry("digits")
    x = entry.preprocess(data.x_test)
    _, found, _ = compressed
    assert found["reference_accuracy"] == evaluate.accuracy(zoo.load("digits"), x, data.y_test)
    assert found["accuracy"] == evaluate.accuracy(storage.load(compressed[0]), x, data.y_test)


def test_evaluate_gives_the_same_accuracy_again(run, compressed, tmp_path):
    out, found, _ = compressed
    result = run("evaluate", out, "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    assert f"accuracy {found['accuracy']:.2f} %" in result.stdout
    again = json.loads((tmp_path / "e.json").read_text())
    for name in ("accuracy", "params_ratio", "cr", "macs_ratio", "file_bytes", "network", "budget"):
        assert again[name] == again["rows"][0][name] == found[name]


def test_evaluate_with_like(run, compressed, factory):
    out, found, _ = compressed
    for like, more in ((f"{factory}blank", ["--dataset", "digits"]), ("digits", [])):
        result = run("evaluate", out, "--like", like, *more)
        assert result.exit_code == 0, result.output
        assert f"accuracy {found['accuracy']:.2f} %" in result.stdout


def test_info(run, compressed, tmp_path):
    out, found, _ = compressed
    result = run("info", out)
    assert result.exit_code == 0
    for text in (
        "digits",
        "params=0.85 (met)",
        "conv2",
        "columns",
        f"{out.stat().st_size:,} bytes",
        f"format {storage.FORMAT}",
        "flax",
    ):
        assert text in result.stdout
    storage.save(tmp_path / "original.safetensors", zoo.load("digits"))
    plain = run("info", tmp_path / "original.safetensors")
    assert plain.exit_code == 0
    assert "conv1" not in plain.stdout


def test_the_smallest_network_that_keeps_the_accuracy(run, tmp_path):
    words = ["--budget", "max_drop=30", "--form", "columns", "--allocation", "uniform", "--calibration", 60]
    result = run("compress", "digits", *words, "--rows", 256, "--keep", "conv1|conv3|fc", "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "r.json").read_text())["budget"] == "max_drop=30"


def test_penalties_sgd_and_a_factory_with_its_own_data(run, factory, tmp_path):
    data, entry = datasets.load("digits"), zoo.entry("digits")
    arrays = {"x_train": entry.preprocess(data.x_train), "x_test": entry.preprocess(data.x_test)}
    np.savez(tmp_path / "own.npz", **arrays, y_train=data.y_train, y_test=data.y_test)
    penalties = ["--lambda-sparse", 0.3, "--lambda-rank", 0.3, "--m-step", "sgd"]
    words = [f"{factory}network", "--data", tmp_path, "--dataset", "own", *penalties, "--calibration", 60]
    result = run(
        "compress", *words, "--rows", 512, "--keep", "conv1|conv3|fc", "--json", tmp_path / "r.json", "--debug"
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["budget_met"] is None
    assert (found["network"], found["m_step"]) == (f"{factory}network", "sgd")
    assert found["reference_accuracy"] > 98
    assert found["layers"][1]["form"] == "admm"


def test_weights_for_a_factory(run, factory, tmp_path):
    tensors = zoo.torch_tensors(zoo.load("digits"))  # without `flatten`: names and layouts of the paths with dots
    save_file(tensors, tmp_path / "w.safetensors")
    words = ["compress", f"{factory}blank", "--dataset", "digits", "--weights", tmp_path / "w.safetensors", "--dry-run"]
    assert run(*words).exit_code == 0
    save_file({**tensors, "conv2.bias": tensors["conv2.bias"][:5]}, tmp_path / "w.safetensors")
    wrong = run(*words)
    assert wrong.exit_code == 2
    assert "conv2.bias" in wrong.stderr


def test_dry_run_shows_the_plan_and_solves_nothing(run, monkeypatch):
    monkeypatch.setattr(pipeline, "compress", None)
    result = run("compress", "digits", "--dry-run", "--keep", "conv1", "--keep", "fc", *UNIFORM)
    assert result.exit_code == 0, result.output
    for text in ("64 × 288", "64 × 576", "kept by rule: conv1, fc", "smallest reachable budget params=0.165"):
        assert text in result.stdout
    penalised = run("compress", "digits", "--dry-run", "--lambda-sparse", 0.1, "--lambda-rank", 0.1)
    assert "by penalties" in penalised.stdout


def test_exit_code_3_when_the_budget_is_not_met(run, compressed, monkeypatch):
    real = storage.load(compressed[0])
    header = storage.read_header(compressed[0])["report"]

    def missed(model, images, **settings):
        layers = tuple(LayerRow(**{**row, "shape": tuple(row["shape"])}) for row in header["layers"])
        names = ("budget", "params", "original_params", "bits", "original_bits", "macs", "original_macs", "seed")
        report = Report(layers=layers, budget_met=False, seconds=1.0, **{n: header[n] for n in names})
        return pipeline.Result(model=real, report=replace(report, warnings=("conv2: diverged",)))

    monkeypatch.setattr(pipeline, "compress", missed)
    result = run("compress", "digits", *QUICK)
    assert result.exit_code == 3
    assert "the budget params=0.85 was not met" in result.stderr
    assert "warning: conv2: diverged" in result.stdout


def test_exit_code_1_for_a_failure_and_a_traceback_only_for_debug(run, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of\n luck")

    monkeypatch.setattr(pipeline, "plan", broken)
    result = run("compress", "digits", "--dry-run")
    assert result.exit_code == 1
    assert result.stderr == "unified-approx: RuntimeError: out of luck\n"
    with_traceback = run("compress", "digits", "--dry-run", "--debug")
    assert isinstance(with_traceback.exception, RuntimeError)


BAD = {
    "unknown network": (["resnet21"], "unknown network 'resnet21': choose one of resnet20"),
    "no weights": (["resnet20"], "resnet20 has no weights in the package; give --weights"),
    "missing weights": (["digits", "--weights", "no.safetensors"], "no.safetensors does not exist"),
    "missing data": (["lenet300", "--weights", "{lenet}", "--data", "."], "mnist.npz"),
    "other data set": (["digits", "--dataset", "mnist"], "digits is for digits, not 'mnist'"),
    "no such factory": (["no_such_module:f"], "'no_such_module:f' cannot be imported"),
    "no such function": (["json:f"], "'json:f' cannot be imported"),
    "no function": (["made_for_a_test:constant"], "is a int; give a function"),
    "no network": (["made_for_a_test:number"], "returned a int; it must return a Flax NNX module"),
    "no data set": (["made_for_a_test:network"], "--dataset: none given for a factory; name one of cifar10"),
    "no npz": (["made_for_a_test:network", "--dataset", "own"], "there is no own.npz; give the path"),
    "budget spelling": (["digits", "--budget", "0.5"], "'0.5' is not understood; write NAME=FRACTION"),
    "budget range": (["digits", "--budget", "params=1.5"], "params=1.5 is not a fraction in (0, 1]"),
    "budget zero": (["digits", "--budget", "params=0"], "params=0.0 is not a fraction in (0, 1]"),
    "budget nan": (["digits", "--budget", "params=nan"], "is not a fraction in (0, 1]"),
    "budget too small": (["digits", "--budget", "params=0.001"], "already take 0.0026 of the network"),
    "budget and penalties": (
        ["digits", "--budget", "params=0.5", "--lambda-sparse", "0.1", "--lambda-rank", "0.1"],
        "give a budget or the two penalties, not both",
    ),
    "one penalty": (["digits", "--lambda-sparse", "0.1"], "or both lambda_sparse and lambda_rank"),
    "negative penalty": (["digits", "--lambda-sparse", "-0.1", "--lambda-rank", "0.1"], "-0.1 is not in [0, 1]"),
    "unknown form": (["digits", "--form", "best2"], "'best2' is unknown; choose best or one of"),
    "unknown group": (["digits", "--group", "row"], "'row' is unknown; choose column or channel"),
    "unknown M step": (["digits", "--m-step", "adam"], "--m-step: 'adam' is unknown; choose mm or sgd"),
    "no images": (["digits", "--calibration", "1"], "--calibration: 1 images; give at least 2"),
    "no devices": (["digits", "--devices", "0"], "devices: 0; give at least 1"),
    "devices": (["digits", "--devices", "99"], "XLA_FLAGS=--xla_force_host_platform_device_count=99"),
    "no rows": (["digits", "--rows", "0"], "rows: 0 sampled positions"),
    "rule without layer": (["digits", "--keep", "conv9"], "'conv9' matches no layer; layers are: conv1, conv2"),
    "rule without sense": (["digits", "--keep", "("], "'(' is not a regular expression"),
    "nothing left": (["digits", "--keep", ".*"], "there is no layer to compress"),
    "foreign work folder": (["digits", "--work-dir", "{full}", *QUICK], "is not empty and holds no run.json"),
    "out is a folder": (["digits", "--out", "{full}"], "is a folder; give the name of a file"),
    "json is a folder": (["digits", "--json", "{full}"], "is a folder; give the name of a file"),
    "out below a file": (["digits", "--out", "made_for_a_test.py/x"], "made_for_a_test.py is not a folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_is_one_clear_line_and_exit_code_2(run, factory, tmp_path, name):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("somebody's")
    if "{lenet}" in BAD[name][0]:
        tensors = zoo.torch_tensors(zoo.create("lenet300"), zoo.entry("lenet300").torch_names)
        save_file(tensors, tmp_path / "lenet.safetensors")
    places = {"{full}": tmp_path / "full", "{lenet}": tmp_path / "lenet.safetensors"}
    words, message = BAD[name]
    result = run("compress", *[places.get(word, word) for word in words])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def test_options_that_do_not_exist(run):
    for words in (["compress"], ["compress", "digits", "--bugdet", "1"], ["nothing"], ["info"]):
        assert run(*words).exit_code == 2


def test_work_folder_of_another_run(run, tmp_path):
    words = ["compress", "digits", *QUICK, "--budget", "params=0.85", "--work-dir", tmp_path / "w"]
    assert run(*words, "--json", tmp_path / "a.json").exit_code == 0
    assert run(*words, "--json", tmp_path / "b.json").exit_code == 0  # resumes
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert first["layers"] == second["layers"]
    other = run(*words, "--budget", "params=0.9")
    assert other.exit_code == 2
    assert "belongs to another run" in other.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": np.full(20, 10)}, "labels from 10 to 10"),
        ({"y_test": np.zeros(20)}, "y_test is float64 (20,)"),
        ({"x_test": np.full((20, 8, 8, 1), np.nan)}, "x_test holds NaN or infinite values"),
        ({"x_train": np.full((30, 8, 8, 1), np.inf)}, "NaN or infinite values; clean the data first"),
        ({"x_test": np.zeros((20, 8, 8, 2))}, "shapes must agree"),
        ({"x_train": None}, "does not hold x_train, y_train, x_test, y_test"),
    ],
)
def test_bad_data_is_found_before_anything_is_solved(run, factory, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(run_module.Run, "solve_all", None)
    arrays = {"x_train": np.zeros((30, 8, 8, 1)), "y_train": np.zeros(30, int)}
    arrays |= {"x_test": np.zeros((20, 8, 8, 1)), "y_test": np.zeros(20, int), **change}
    np.savez(tmp_path / "own.npz", **{k: v for k, v in arrays.items() if v is not None})
    result = run("compress", f"{factory}network", "--dataset", tmp_path / "own.npz")
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_nan_in_the_weights(run, tmp_path):
    tensors = load_file(digits.WEIGHTS)
    tensors["conv2.bias"] = np.full_like(tensors["conv2.bias"], np.nan)
    save_file(tensors, tmp_path / "nan.safetensors")
    result = run("compress", "digits", "--weights", tmp_path / "nan.safetensors")
    assert result.exit_code == 2
    assert "'conv2.bias' has NaN" in result.stderr
    (tmp_path / "cut.safetensors").write_bytes(digits.WEIGHTS.read_bytes()[:1000])
    cut = run("compress", "digits", "--weights", tmp_path / "cut.safetensors")
    assert cut.exit_code == 2
    assert "not a complete safetensors file" in cut.stderr


def test_bad_files_for_evaluate_and_info(run, compressed, factory, tmp_path):
    whole = compressed[0].read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-100])
    (tmp_path / "corrupted").write_bytes(whole[:-100] + bytes(b ^ 1 for b in whole[-100:]))
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "foreign")
    storage.save(tmp_path / "custom", build(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    for command, file, message in (
        ("evaluate", "missing", "there is no file"),
        ("info", "missing", "there is no file"),
        ("evaluate", "cut", "truncated"),
        ("info", "cut", "truncated"),
        ("evaluate", "foreign", "was not written by unified_approx"),
        ("info", "foreign", "was not written by unified_approx"),
        ("evaluate", "corrupted", "corrupted"),
        ("evaluate", "custom", "give --like package.module:factory"),
    ):
        result = run(command, tmp_path / file)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), (command, file, result.output)
        assert message in result.stderr, (command, file)
    assert "not of the zoo" in run("info", tmp_path / "custom").stdout
    wrong = run("evaluate", tmp_path / "custom", "--like", "digits")
    assert wrong.exit_code == 2
    assert "do not fit" in wrong.stderr


def test_pack_and_unpack(run, compressed, tmp_path):
    plain, packed, again = compressed[0], tmp_path / "small.uapk", tmp_path / "again.safetensors"
    result = run("pack", plain, "--out", packed)
    assert result.exit_code == 0, result.stderr
    assert f"{packed.stat().st_size:,} bytes" in result.stdout.replace("\n", " ")
    assert packed.stat().st_size < plain.stat().st_size
    assert run("unpack", packed, "--out", again).exit_code == 0
    left, right = storage.load(plain), storage.load(again)
    for a, b in zip(_arrays(left), _arrays(right), strict=True):
        np.testing.assert_array_equal(a, b)


def _arrays(model):
    return [np.asarray(leaf) for leaf in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))).leaves]


def test_info_of_a_packed_file_counts_its_bits(run, tmp_path):
    file = tmp_path / "digits.uapk"
    shared = share(zoo.load("digits"), 2, layers="conv2")
    size = storage.pack(file, shared.model)
    result = run("info", file)
    assert result.exit_code == 0, result.stderr
    lines = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in result.stdout.splitlines() if "│" in line}
    weights = 32 * 64 * 9 + 64
    name, dense, pruned, codes, coded, _ = (cell.strip() for cell in lines["conv2"])
    assert (name, dense, pruned) == (f"{weights:,}", "32.00", "32.00")
    assert 2.0 < float(coded) <= float(codes) < 2.2
    assert lines["all"][-1].strip() == f"{size:,}"


def test_a_file_that_is_not_packed_is_not_unpacked(run, compressed, tmp_path):
    result = run("unpack", compressed[0], "--out", tmp_path / "a")
    assert result.exit_code == 2
    assert "is not packed; give a file that `unified-approx pack` wrote" in result.stderr
    assert run("pack", tmp_path / "missing").exit_code == 2
