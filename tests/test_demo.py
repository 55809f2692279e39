"""`make demo`: one table of what each setting cost, nothing else on the screen, and a failure where a folder does not load."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "demo" / "demo.py"
BARS = {  # most perplexity over the original's, most KL in nats, least share of same top tokens
    "w4a16": (1.08, 0.07, 0.80),
    "w8a8": (1.01, 0.004, 0.94),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo writes; something older is in its way."""
    folder = tmp_path_factory.mktemp("demo")
    lowbit.quantize(str(ROOT / "demo" / "llama-7m"), folder / "w4a16", scheme="w8a16")  # as an earlier run left it
    return folder


@pytest.fixture(scope="module")
def result(out: Path) -> subprocess.CompletedProcess[str]:
    """The finished demo."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), "--out", str(out)]
    return subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    """demo.py as a module."""
    spec = importlib.util.spec_from_file_location("lowbit_demo", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prints_the_table_and_nothing_else(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    head, rule, *rows, empty, caption = result.stdout.splitlines()[:7]
    assert re.split(r"  +", head) == [
        "model", "size, MB", "bits/weight", "perplexity", "ratio", "KL, nats", "same top token", "seconds",
    ]  # fmt: skip
    assert set(rule) == {"-", " "} and empty == ""
    assert [row.split()[0] for row in rows] == ["llama-7m", "w4a16", "w8a8"]
    assert caption == "Continuing 'The ship', loaded by transformers from the folder:"
    lines = result.stdout.splitlines()[7:]
    assert [line.split()[:3] for line in lines] == [[name, "The", "ship"] for name in ("llama-7m", "w4a16", "w8a8")]
    assert all(len(line.split()) > 6 for line in lines)


def test_figures_of_the_table(result: subprocess.CompletedProcess[str], out: Path) -> None:
    """Each figure is in the range of its setting, and sizes are those of the files."""
    cells = [row.split() for row in result.stdout.splitlines()[2:5]]
    rows = {name: [float(value.rstrip("%")) for value in values] for name, *values in cells}
    size, bits, perplexity, ratio = rows["llama-7m"]
    assert (size, bits, ratio) == (13.64, 16, 1) and 25 < perplexity < 40
    for scheme, (most_ratio, most_kl, least_agreement) in BARS.items():
        size, bits, found, ratio, kl, agreement, seconds = rows[scheme]
        files = sum(path.stat().st_size for path in (out / scheme).glob("*.safetensors"))
        assert size == pytest.approx(files / 1e6, abs=0.006)
        assert bits == pytest.approx({"w4a16": 4.125, "w8a8": 8.05}[scheme], abs=0.01)
        assert ratio == pytest.approx(found / perplexity, abs=2e-4)
        assert 0.99 < ratio < most_ratio and 0 < kl < most_kl and least_agreement < agreement / 100 < 1 and seconds > 0
    assert rows["w8a8"][-3] < rows["w4a16"][-3]


def test_replaces_what_was_there(result: subprocess.CompletedProcess[str], out: Path) -> None:
    assert sorted(path.name for path in out.iterdir()) == ["w4a16", "w8a8"]
    assert "w4a16" in (out / "w4a16" / "report.md").read_text()


def test_a_folder_that_lacks_a_tensor(
    result: subprocess.CompletedProcess[str], out: Path, demo: ModuleType, tmp_path: Path
) -> None:
    """transformers itself would go on with a weight of ones."""
    for path in (out / "w8a8").iterdir():
        (tmp_path / path.name).symlink_to(path)
    shard = tmp_path / "model-00003-of-00007.safetensors"
    tensors = load_file(shard)
    shard.unlink()
    tensors.pop("model.layers.2.input_layernorm.weight")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.2\.input_layernorm\.weight"):
        demo.reload(tmp_path)


def test_a_folder_that_computes_something_else(result: subprocess.CompletedProcess[str], out: Path, demo: ModuleType) -> None:
    """One matrix whose columns are in another order is noticed."""
    from lowbit import load

    tokens = demo.evaluation_tokens(str(demo.TEXT), demo.AutoTokenizer.from_pretrained(demo.MODEL))[:256]
    quantized = load(str(out / "w8a8"), dtype=torch.float32)
    loaded = demo.reload(out / "w8a8")
    demo.check_same(quantized, loaded, tokens)
    with torch.no_grad():
        weight = loaded.model.layers[3].mlp.down_proj.weight
        weight.copy_(weight.flip(1))
    with pytest.raises(ValueError, match="computes something else than was evaluated: mean KL"):
        demo.check_same(quantized, loaded, tokens)


def test_a_failed_reload_ends_the_demo(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status says so."""
    reload = demo.reload

    def fails(folder: Path) -> object:
        if folder == demo.MODEL:
            return reload(folder)
        raise ValueError("made up")

    monkeypatch.setattr(demo, "reload", fails)
    monkeypatch.setattr(demo, "WINDOWS", 1)
    monkeypatch.setattr(demo, "DATA", demo.DataSpec(source=demo.DATA.source, rows=2, length=128))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path)])
    assert demo.main() == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"{tmp_path / 'w4a16'} does not load in transformers: made up\n"
