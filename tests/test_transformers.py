"""from_pretrained gives the packed model of `lowbit.load`, from both formats."""

import importlib
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from test_runtime import written
from transformers import CompressedTensorsConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from lowbit import runtime
from lowbit.runtime import PackedLinear

REPLACED = "compressed-tensors"


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the import registers, for these tests alone: others compare with transformers' own quantizer."""
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, REPLACED, AUTO_QUANTIZER_MAPPING[REPLACED])  # is put back after the test
    registered = importlib.import_module("lowbit.transformers")
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, REPLACED, registered._for_compressed_tensors)


@pytest.mark.parametrize(
    ("name", "scheme"), [("llama", "w4a16-g32"), ("llama", "w8a8"), ("bert", "w8a8"), ("mixtral", "w4a16-g32")]
)
@pytest.mark.parametrize("format", ["compressed-tensors", "lowbit"])
def test_from_pretrained(name: str, scheme: str, format: str, tmp_path: Path) -> None:
    """Logits to the bit, and no file is written from it."""
    if format == "lowbit" and Version(transformers.__version__) < Version("5.22"):
        pytest.skip("transformers before 5.22 looks for weight files before it asks a quantizer")
    out = written(name, tmp_path, scheme, format)
    model = tiny.auto_class(name).from_pretrained(out)
    assert any(isinstance(module, PackedLinear) for module in model.modules()) and model.lowbit
    tokens = tiny.tokens(2, 16)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, runtime.load(out, kernels=True)(tokens).logits)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")


def test_dequantized_as_before(tmp_path: Path) -> None:
    """Who asks transformers for dequantized weights gets them."""
    out = written("llama", tmp_path, "w4a16-g32", "compressed-tensors")
    model = tiny.auto_class("llama").from_pretrained(out, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
