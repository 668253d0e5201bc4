"""The kernel library as Python calls it: addresses, sizes and strides, nothing copied."""

from __future__ import annotations

import ctypes
import functools
import warnings
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from memcompile.kernels.build import BuildError, build

TYPES: Final = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4, "int3": 5}
MAX_HEAD_WIDTH: Final = 256


class CTensor(ctypes.Structure):
    """`McTensor`: an address and the strides of its batch, head and token axes, in elements."""

    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("token", c_int64)]


class CAttention(ctypes.Structure):
    """`McAttention` of csrc/attention.h."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "T", "S", "H", "G", "D")),
        *((name, CTensor) for name in ("q", "k", "v", "out")),
        ("q_type", c_int32), ("kv_type", c_int32), ("scale", c_float), ("softcap", c_float),
        *((name, c_int64) for name in ("causal", "window", "sinks", "block", "stride")),
        ("key_positions", c_void_p), ("query_positions", c_void_p), ("positions_stride", c_int64),
        ("used", c_void_p),
        *((name, c_void_p) for name in ("k_scale", "v_scale", "k_token_scale", "v_token_scale")),
        ("blocks", c_void_p), ("block_tokens", c_int64), ("blocks_batch", c_int64), ("blocks_head", c_int64),
        ("slots", c_void_p), ("slot_count", c_int64),
        ("pattern", c_void_p), ("pattern_from", c_int64),
        ("bounds", CTensor), ("page_tokens", c_int64), ("page_keep", c_int64), ("page_from", c_int64),
        ("lse", c_void_p),
        ("parallel", c_void_p), ("host", c_void_p),
        ("threads", c_int32), ("splits", c_int32), ("key_tile", c_int32), ("products", c_int32),
    ]  # fmt: skip


class CAppend(ctypes.Structure):
    """`McAppend` of csrc/attention.h."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "T", "G", "D")),
        *((name, CTensor) for name in ("k", "v", "past_k", "past_v")),
        ("type", c_int32), ("cache_type", c_int32),
        ("used", c_void_p), ("k_scale", c_void_p), ("v_scale", c_void_p),
    ]  # fmt: skip


class CLinear(ctypes.Structure):
    """`McLinear` of csrc/linear.h."""

    _fields_ = [
        *((name, c_int64) for name in ("M", "N", "K")),
        ("x", c_void_p), ("out", c_void_p), ("weight", c_void_p),
        ("weight_type", c_int32), ("block", c_int32),
        *((name, c_void_p) for name in ("scales", "zero_points", "offsets", "table", "bias")),
        ("activations", c_int32), ("parallel", c_void_p), ("host", c_void_p), ("threads", c_int32),
    ]  # fmt: skip


class CFfn(ctypes.Structure):
    """`McFfn` of csrc/ffn.h."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "M", "F", "keep")),
        *((name, c_void_p) for name in ("x", "gate", "up", "down", "counts", "out")),
        ("activation", c_int32), ("parallel", c_void_p), ("host", c_void_p), ("threads", c_int32),
    ]  # fmt: skip


@dataclass(frozen=True)
class KernelLibrary:
    """The loaded library."""

    path: Path
    handle: Any

    @property
    def isa(self) -> str:
        """The instruction set in use: "avx2", "avx512" or "avx512bf16"."""
        name: bytes = self.handle.mc_isa()
        return name.decode()

    def use(self, isa: str) -> None:
        """Go on with another instruction set. Raises ValueError when this CPU has it not."""
        if self.handle.mc_use(isa.encode()):
            raise ValueError(f"this CPU has no {isa}")

    def attention(self, call: CAttention) -> None:
        """Run attention. Raises ValueError when no kernel takes the sizes, MemoryError without memory."""
        self._check(self.handle.mc_attention(ctypes.byref(call)))

    def append(self, call: CAppend) -> None:
        """Write new keys and values to a cache, as codes where it holds codes."""
        self._check(self.handle.mc_append(ctypes.byref(call)))

    def ffn(self, call: CFfn) -> None:
        """Run a sparse feed-forward layer. Raises as `attention` does."""
        self._check(self.handle.mc_ffn(ctypes.byref(call)))

    def linear(self, call: CLinear) -> None:
        """Run a linear layer. Raises as `attention` does."""
        self._check(self.handle.mc_linear(ctypes.byref(call)))

    def _check(self, code: int) -> None:
        if code:
            reason = self.handle.mc_reason(code).decode()
            raise (MemoryError if code == 2 else ValueError)(reason)


def open_library(path: Path) -> KernelLibrary:
    """Load a built library. Raises BuildError when it does not load or this CPU has none of its sets."""
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path.name} does not load: {error}") from error
    handle.mc_isa.restype = c_char_p
    handle.mc_reason.restype, handle.mc_reason.argtypes = c_char_p, [c_int32]
    handle.mc_use.restype, handle.mc_use.argtypes = c_int32, [c_char_p]
    handle.mc_use_gomp.restype, handle.mc_use_gomp.argtypes = None, [c_void_p]
    handle.mc_attention.restype, handle.mc_attention.argtypes = c_int32, [POINTER(CAttention)]
    handle.mc_ffn.restype, handle.mc_ffn.argtypes = c_int32, [POINTER(CFfn)]
    handle.mc_linear.restype, handle.mc_linear.argtypes = c_int32, [POINTER(CLinear)]
    handle.mc_append.restype, handle.mc_append.argtypes = c_int32, [POINTER(CAppend)]
    library = KernelLibrary(path, handle)
    if not library.isa:
        raise BuildError("this CPU has no AVX2")
    return library


@functools.cache
def find_library() -> KernelLibrary | None:
    """The library, built when it is first asked for; None, after one warning, where it cannot be had."""
    try:
        return open_library(build())
    except (BuildError, OSError) as error:
        warnings.warn(
            f"memcompile's own kernels are not used: {error}; the runtimes' attention is, which is slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
