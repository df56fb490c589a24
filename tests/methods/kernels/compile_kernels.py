"""Compile all Triton kernels to machine code, which needs no GPU and no driver; print one JSON line per kernel.

A program of its own, as Triton's interpreter is chosen when a kernel is defined.
"""

import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from normkit.methods.batchless.triton_kernel import _backward, _forward
from normkit.methods.kernels.triton_kernel import _sums
from normkit.methods.riemannian.triton_kernel import _advance

IMAGES = {"inner_stride": 1, "BLOCK_ROWS": 2048, "BLOCK_FEATURES": 1}
CHANNELS_LAST = {"inner": 1, "feature_stride": 1, "BLOCK_ROWS": 32, "BLOCK_FEATURES": 64}
TYPES = {
    **dict.fromkeys(("x", "y", "dx", "dy"), "*bf16"),
    **dict.fromkeys(("partial", "mean", "inverse", "gamma", "beta", "corrections", "taps"), "*fp32"),
    **dict.fromkeys(
        ("rows", "inner", "features", "outer_stride", "inner_stride", "feature_stride", "positions", "weights"), "i32"
    ),
    **dict.fromkeys(("fan_ins", "firsts", "owners"), "*i32"),
    **dict.fromkeys(("lr", "momentum", "beta2", "eps", "max_norm"), "fp32"),
    "pointers": "*i64",
}
KERNELS = [
    *((_forward, {"AFFINE": affine, **layout}) for affine in (True, False) for layout in (IMAGES, CHANNELS_LAST)),
    *((_backward, {"WRITE": write, **layout}) for write in (True, False) for layout in (IMAGES, CHANNELS_LAST)),
    *(
        (_sums, {"WEIGHTED": weighted, "DTYPE": dtype, **layout})
        for weighted in (False, True)
        for dtype in (tl.float32, tl.float64)
        for layout in (IMAGES, CHANNELS_LAST)
    ),
    *((_advance, {"ADAM": adam, "BLOCK": 1024}) for adam in (True, False)),
]


def compiled(kernel, constants, capability):
    """Machine code and PTX, arguments taken for multiples of 16 as torch's allocator makes them."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if kernel is not _advance and signature[name][0] in "*i"
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm


for capability in map(int, sys.argv[1:]):
    for kernel, constants in KERNELS:
        asm = compiled(kernel, constants, capability)
        print(
            json.dumps({
                "kernel": kernel.__name__,
                "capability": capability,
                "bytes": len(asm["cubin"]),
                "wide_loads": "ld.global.v4" in asm["ptx"],
                "spills": ".local" in asm["ptx"],
            })
        )
