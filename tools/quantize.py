"""Quantise linear layers, one by one; used by the trainers where base_model_precision says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

QUANTO_TYPES = {"fp8": "qfloat8", "int8": "qint8", "int4": "qint4", "int2": "qint2"}


@torch.no_grad()
def quantize_linear(linear: Any, precision: str) -> torch.nn.Module:
    """Quantise a layer. nf4: blocks of 64, fp32 scales; quanto: per output channel or group."""
    if precision == "nf4-bnb":
        from bitsandbytes.nn import Linear4bit, Params4bit

        how: dict[str, Any] = {"compress_statistics": False, "quant_type": "nf4"}
        sizes, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
        layer: Any = Linear4bit(*sizes, compute_dtype=dtype, device="meta", **how)
        # KEEP: some CPUs would repack the weights in eval mode, and nothing could train after that
        layer.support_avx512bf16_for_cpu = False
        weight: Any = Params4bit(linear.weight.data, module=layer, **how)
        layer.weight, layer.bias = weight.to(linear.weight.device), linear.bias  # .to() quantises
        return layer
    from optimum import quanto

    unpack_without_compiler()
    kind = getattr(quanto, QUANTO_TYPES[precision.partition("-")[0]])
    layer = quanto.QLinear.from_module(linear, weights=kind)
    groups = {} if kind.bits == 8 else {"group_size": layer.weight_group_size}
    found = layer.optimizer(linear.weight, qtype=kind, axis=0, **groups)
    groups |= {"scale": found[0], "shift": found[1]} if groups else {"scale": found}
    # KEEP optimized=False: the fp8 kernel that quanto 0.2.7 would choose on CUDA leaves out the
    # bias and wants nvcc, its int4 kernel is made for a few tokens
    weight = quanto.quantize_weight(linear.weight, qtype=kind, axis=0, **groups, optimized=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def unpack_without_compiler() -> None:
    """Let quanto unpack 4 and 2 bits with torch; its own code is compiled at the first use."""
    from optimum import quanto

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        shifted = [packed >> shift for shift in range(0, 8, bits)]  # lowest bits first
        return torch.cat([part & (2**bits - 1) for part in shifted])

    for name in ("quanto_cpp", "quanto_cuda", "quanto_hip", "quanto_mps"):
        if quanto.is_extension_available(name):
            extension = quanto.get_extension(name)
            extension._lib = extension._lib or SimpleNamespace(unpack=unpack)
