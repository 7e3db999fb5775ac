"""Compiles SAF's kernel for NVIDIA GPUs, as far as that takes none: run by `test_saf_kernel`, without the interpreter.

The interpreter runs what the compiler refuses: a branch that is not taken for a form, types that differ. What is
compiled here are SAF's own launches, their arguments typed as Triton's launcher types them.
"""

import warnings
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import flatmin
from flatmin.errors import FlatminWarning
from flatmin.losses import _fused
from flatmin.losses._saf_kernel import saf_kernel

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}
COMPUTE_CAPABILITIES = (80, 90)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Compiler:
    """Stands in for the kernel: compiles where it would launch."""

    def __init__(self) -> None:
        self.made = 0

    def __getitem__(self, grid: tuple[int]) -> "Compiler":
        return self

    def __call__(self, *arguments: Any, num_warps: int, **constants: Any) -> None:
        types: dict[str, str] = dict.fromkeys(saf_kernel.arg_names, "constexpr")
        for name, value in zip(saf_kernel.arg_names, arguments, strict=False):
            if isinstance(value, Tensor):
                types[name] = "*" + TYPES[value.dtype]
            elif isinstance(value, float):
                types[name] = "fp32"
            elif value == 1:  # which the launcher makes a constant
                constants[name] = 1
            else:
                types[name] = "i32"
        target = GPUTarget("cuda", COMPUTE_CAPABILITIES[self.made % len(COMPUTE_CAPABILITIES)], 32)
        source = ASTSource(fn=saf_kernel, signature=types, constexprs=constants)
        assert triton.compile(source, target=target, options={"num_warps": num_warps}).asm["cubin"]
        self.made += 1


if __name__ == "__main__":
    compiler = Compiler()
    _fused.KERNEL_DEVICES = {"cpu"}
    _fused._kernel = lambda: compiler
    warnings.simplefilter("error", FlatminWarning)
    for number, form in enumerate(["dense", "half", "int8", "int6", "int4"]):
        saf = flatmin.SAF(5, 33, history=form, lag=1 + number % 2, start_epoch=number % 2)
        for epoch, index in enumerate([[3, 1, 2], [1, 2, 4], [1, 2, 1]]):
            saf.set_epoch(epoch)
            logits = torch.zeros(3, 33, dtype=DTYPES[(number + epoch) % 3], requires_grad=True)
            saf(logits, torch.tensor(index))
    print(compiler.made, "kernels")
