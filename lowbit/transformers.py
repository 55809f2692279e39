"""transformers' own `from_pretrained` with lowbit's kernels: import this module once, before it is called.

    import lowbit.transformers
    model = transformers.AutoModelForCausalLM.from_pretrained("OUT", device_map="cuda")

Linears stay packed and run as `lowbit.load(..., kernels=True)` has them, on a CPU too, there slowly. The import registers the
method "lowbit", which lowbit's own format names in its config.json, and takes the place of transformers' quantizer for
compressed-tensors, whose files stay what they are; `quantization_config=CompressedTensorsConfig(dequantize=True)` still gives
what it gave. Own-format folders need a transformers that shows a quantizer the model's configuration before it looks for files
(5.22 does; with 5.17, use `lowbit.load`).
"""

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit import runtime
from lowbit.arch import Arch
from lowbit.export import NATIVE, QuantizedSource, open_checkpoint
from lowbit.source import index_name

_COMPRESSED_TENSORS = "compressed-tensors"


@register_quantization_config(NATIVE)
class LowbitConfig(QuantizationConfigMixin):
    """What config.json says of lowbit's own format: its name."""

    def __init__(self, quant_method: str = NATIVE, **others: Any) -> None:
        self.quant_method: Any = quant_method


@register_quantizer(NATIVE)
class LowbitQuantizer(HfQuantizer):
    """Puts packed modules into a model that transformers loads."""

    requires_calibration = True

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the weight files of lowbit's own format, as this is called before transformers looks for them."""
        if self.quantization_config.quant_method == NATIVE:
            config.transformers_weights = index_name(NATIVE)
        return config

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **others: Any) -> Any:
        if not checkpoint_files:
            raise ValueError("lowbit's kernels need the checkpoint's files; give from_pretrained a folder or a hub id")
        source = open_checkpoint(str(Path(checkpoint_files[0]).parent))
        assert isinstance(source, QuantizedSource)
        self._source = source
        with torch.device("cpu"):  # transformers creates everything on the meta device meanwhile
            self._arch = Arch(self._source, model=model)
            self._rows = runtime.place(self._arch, self._source)
        known = [name.replace(".", r"\.") for name in self._source.stored]
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *known}
        return model

    def _process_model_after_weight_loading(self, model: Any, **others: Any) -> Any:
        arch = self._arch
        arch.model, arch.dtype, arch.device = model, model.dtype, model.device
        dequantized = [self._source.modules[row.name].tensor for row in self._rows if row.runs == "dequantized"]
        for tensor in (*dequantized, *self._source.parameters):
            arch.load((tensor,))
        return runtime.finished(arch, self._source, self._rows)

    def is_serializable(self, **others: Any) -> bool:
        """Packed modules are not written; the checkpoint they came from is there."""
        return False

    @property
    def is_trainable(self) -> bool:
        """There are no gradients through the kernels."""
        return False

    @property
    def is_compileable(self) -> bool:
        """torch.compile takes these models."""
        return True


_stock = AUTO_QUANTIZER_MAPPING[_COMPRESSED_TENSORS]


def _for_compressed_tensors(config: Any, **given: Any) -> HfQuantizer:
    return (_stock if getattr(config, "dequantize", False) else LowbitQuantizer)(config, **given)


_quantizers: dict[str, Any] = AUTO_QUANTIZER_MAPPING
_quantizers[_COMPRESSED_TENSORS] = _for_compressed_tensors
