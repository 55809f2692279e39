"""What all tests share: no network, a fixed number of threads, seeds, and the fixtures that find models and engines."""

import functools
import gc
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports torch or the hub, and inherited by every subprocess that a test starts.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
# Products this small are several times slower in threads that wait for one another, and cores are for other tests. The order
# of a sum depends on the number of threads too: with one, results are the same on every machine.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
# Triton decides when its own functions are defined whether kernels are interpreted, and many libraries import it.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("lowbit", deadline=None, derandomize=True)
settings.load_profile("lowbit")

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a CUDA device where there is none, and the interpreter's tests where Triton compiles for one."""
    if item.get_closest_marker("gpu") and not _has_cuda():
        pytest.skip("needs a CUDA device")
    if item.path.parent.name == "kernels" and "TRITON_INTERPRET" not in os.environ:
        pytest.skip("on a machine with a GPU, benchmarks/kernels.py and scans.py check the kernels")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random state, in the generators that are already imported."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _collections() -> Iterator[None]:
    """Spare what the libraries and pytest hold from the collections after every block, which would take most of the time; let
    go of what was frozen at the end of every file."""
    gc.freeze()
    yield
    gc.unfreeze()
    gc.collect()


@pytest.fixture(autouse=True)
def _frozen_too(_collections: None) -> None:
    """Spare what the fixtures of the file hold as well."""
    gc.collect()  # what the test before left, while it can be told from these
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the tests of kernels interpret them; elsewhere a CPU takes their specification, as it does for users."""
    if request.path.parent.name != "kernels":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)


_READ_PAGES = {"test_page.py", "test_report.py", "test_views.py", "test_cli.py", "test_demo.py"}


@pytest.fixture(autouse=True)
def _no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no page for the hundreds of runs of tests that look at none: half a second each."""
    if request.path.name not in _READ_PAGES:
        monkeypatch.setattr("lowbit.report.report_page", lambda report: report["model"]["name"])


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Larger models and texts that live beside the repository, where a developer has them."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared with the larger models and texts, which is not part of the repository")
    return folder


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The small Llama that the repository carries, as a transformers folder."""
    return ROOT / "demo" / "llama-7m"


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The python of an environment with vLLM, from LOWBIT_VLLM_PYTHON; `make test` builds one and sets the variable."""
    value = os.environ.get("LOWBIT_VLLM_PYTHON")
    if not value:
        message = "LOWBIT_VLLM_PYTHON is not set to the python of an environment with vLLM (`make test` does this)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    if not os.access(value, os.X_OK):
        pytest.fail(f"LOWBIT_VLLM_PYTHON={value!r} is not an executable file")
    return Path(value)
