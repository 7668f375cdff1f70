import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

# Small factorisations by OpenBLAS on several threads become a hundred times slower when another process is busy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Half of the suite is compilation of programs that run once or twice. XLA's emitter of fused loops through MLIR takes
# most of it, LLVM's optimisation the next part; the older emitter compiles the same programs in a third of the time.
# XLA dies of flags it does not know, so those that may come to go are given to the versions that were tried.
_FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if version("jaxlib").startswith("0.10."):
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))
# The workers, and the processes that tests start, compile much the same programs, most of them small.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Files of a minute and more, longest first: begun last, one of them would leave the other worker idle.
_LONG = ("pipeline", "sweep", "training", "allocation", "zoo_imagenet", "notebooks", "unread", "finetuning", "sharding")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; they stay whole and in order."""
    place = {f"test_{name}.py": i for i, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(_LONG)))


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file() -> Iterator[None]:
    """A process has room for 65,530 maps of memory; all programs of the suite together take more, and it dies."""
    yield
    import jax  # reads the variables above when it is imported

    jax.clear_caches()


SHARED = Path(__file__).resolve().parents[2] / "shared"


def _from_environment(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value and Path(value).is_dir() else None


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cifar10.npz and mnist.npz."""
    folder = _from_environment("UNIFIED_APPROX_DATA")
    if folder is not None:
        return folder
    script = SHARED / "data" / "make_npz.py"
    if not script.is_file():
        pytest.skip("needs CIFAR-10 and MNIST: set UNIFIED_APPROX_DATA to a folder with cifar10.npz and mnist.npz")
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """A folder with the published networks' weights."""
    folder = _from_environment("UNIFIED_APPROX_MODELS") or SHARED / "models"
    if not folder.is_dir():
        pytest.skip("needs the published weights: set UNIFIED_APPROX_MODELS to the folder with the safetensors files")
    return folder
