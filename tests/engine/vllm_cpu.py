"""vLLM's CPU build: how it is started here, and what its library for this processor can compute.

    python vllm_cpu.py

prints the abilities as one JSON object. vLLM has a library for processors with AVX-512 and one for those with AVX2 alone, and
takes the one that the processor allows. LOWBIT_VLLM_ISA=avx2 has it take the one for AVX2 anywhere; set ONEDNN_MAX_CPU_ISA=AVX2
as well, for the products that come from oneDNN. Imports torch and vllm only.
"""

import json
import os

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

import torch  # noqa: E402

if os.environ.get("LOWBIT_VLLM_ISA") == "avx2":
    for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        setattr(torch.cpu, name, lambda: False)


def abilities() -> dict[str, bool]:
    """What this build computes on this processor.

    int4: the product with 4-bit weights. fp8_cache: attention to an FP8 key-value cache. exact_int8: int8 products are summed
    in 32 bits; without VNNI instructions, oneDNN sums pairs in 16 bits, which saturate.
    """
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    inner, rows = 256, 32
    x = torch.full((rows, inner), 127, dtype=torch.int8)
    handler = ops.create_onednn_scaled_mm(x.t(), torch.ones(rows, 1), torch.float32, True, False)
    product = torch.empty(rows, rows)
    ops.onednn_scaled_mm(handler, x, product, torch.ones(rows, 1), None, None, None)
    return {
        "int4": hasattr(torch.ops._C, "cpu_gemm_wna16"),
        "fp8_cache": bool(torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
        "exact_int8": bool((product == 127 * 127 * inner).all()),
    }


if __name__ == "__main__":
    print(json.dumps(abilities()))
