"""Parameters that are not in memory: tensors that know the expression they stand for.

A `LazyParameter` has shape, type and device, and no storage. Views and casts of it are lazy again; any other
operation that is given one evaluates it, for that operation only. So a model or a graph runs with its weights
on disk, one tensor in memory at a time, and code that looks at shapes alone never reads any.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

from memcompile.weights.lazy import PIECE_BYTES, Cast, Concat, Held, LazyTensor, Narrow, Reshape, Transpose

# an operation on a larger weight is done in parts of it where it can be
_WHOLE_BYTES: Final = 4 * PIECE_BYTES


class LazyParameter(torch.Tensor):
    """A tensor without storage that stands for `expression`."""

    expression: LazyTensor

    @staticmethod
    def __new__(cls, expression: LazyTensor) -> LazyParameter:
        made: LazyParameter = torch.Tensor._make_wrapper_subclass(
            cls, expression.shape, dtype=expression.dtype, device=torch.device("cpu"), requires_grad=False
        )
        made.expression = expression
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = kwargs or {}
        lazily = _LAZILY.get(func)
        if lazily is not None:
            made = lazily(*args, **kwargs)
            if made is not NotImplemented:
                return made
        if func in _ABOUT or getattr(func, "__name__", "") in ("__get__", "__set__"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(LazyParameter, evaluated, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        args, kwargs = pytree.tree_map_only(LazyParameter, evaluated, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyParameter({list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyParameter:
        copied = _like(self, self.expression)
        memo[id(self)] = copied
        return copied


def _like(source: LazyParameter, expression: LazyTensor) -> LazyParameter:
    made = LazyParameter(expression)
    if getattr(source, "_is_param", False):
        made._is_param = True
    return made


def parameter(expression: LazyTensor) -> LazyParameter:
    """A module's parameter that stands for an expression."""
    made = LazyParameter(expression)
    # what torch looks for to call a tensor of another class a parameter
    made._is_param = True
    return made


def expression_of(tensor: torch.Tensor) -> LazyTensor:
    """The expression that a tensor stands for; a tensor in memory stands for itself."""
    return tensor.expression if isinstance(tensor, LazyParameter) else Held(tensor)


def evaluated(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory."""
    if not isinstance(tensor, LazyParameter):
        return tensor
    return _memory[-1].get(tensor.expression) if _memory else tensor.expression.evaluate()


class _Memory:
    """The tensors that were evaluated last, up to a number of bytes."""

    def __init__(self, nbytes: int) -> None:
        self._room = nbytes
        self._kept: OrderedDict[LazyTensor, torch.Tensor] = OrderedDict()

    def get(self, expression: LazyTensor) -> torch.Tensor:
        found = self._kept.get(expression)
        if found is None:
            found = expression.evaluate()
            if expression.nbytes <= self._room:
                # weights are read in the same order again and again: what came first stays
                self._kept[expression] = found
                self._room -= expression.nbytes
        return found


_memory: list[_Memory] = []


@contextlib.contextmanager
def remembering(nbytes: int) -> Iterator[None]:
    """Keep weights in memory that are evaluated inside, up to `nbytes`: for work that reads them often."""
    _memory.append(_Memory(nbytes))
    try:
        yield
    finally:
        _memory.pop()


def available_memory_bytes() -> int:
    """Memory that can be had without swapping; 2 GiB where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2 << 30


def hollow(tensor: torch.Tensor) -> torch.Tensor:
    """A plain tensor of the same shape and type to trace with, whose memory was given back.

    Its numbers must not be read.
    """
    if not isinstance(tensor, LazyParameter):
        return tensor
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        plain = torch.empty(tensor.expression.shape, dtype=tensor.expression.dtype)
        plain.untyped_storage().resize_(0)
    return torch.nn.Parameter(plain, requires_grad=False) if getattr(tensor, "_is_param", False) else plain


_STANDS_FOR: Final = "_memcompile_stands_for"


@contextlib.contextmanager
def hollowed(module: torch.nn.Module) -> Iterator[None]:
    """Put hollow tensors in the place of a module's lazy ones while it is traced."""
    swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    made: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for held in _tables(part):
            for name, tensor in held.items():
                if isinstance(tensor, LazyParameter):
                    if id(tensor) not in made:
                        made[id(tensor)] = hollow(tensor)
                        setattr(made[id(tensor)], _STANDS_FOR, tensor)
                    swapped.append((held, name, tensor))
                    held[name] = made[id(tensor)]
    try:
        yield
    finally:
        for held, name, tensor in swapped:
            held[name] = tensor


def stands_for(tensor: Any) -> LazyParameter | None:
    """The lazy tensor in whose place a hollow one was traced."""
    return getattr(tensor, _STANDS_FOR, None)


def unhollow(module: torch.nn.Module) -> None:
    """Put the lazy tensors back into a module that was made while they were hollow."""

    def lazy(tensor: torch.Tensor) -> torch.Tensor:
        found = stands_for(tensor)
        return tensor if found is None else found

    _replace_tensors(module, lazy)


def materialise(*modules: torch.nn.Module) -> None:
    """Evaluate the lazy tensors of modules in place; equal expressions become one tensor."""
    made: dict[LazyTensor, torch.Tensor] = {}

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, LazyParameter):
            return tensor
        if tensor.expression not in made:
            value = tensor.expression.evaluate()
            parameter = getattr(tensor, "_is_param", False) and value.is_floating_point()
            made[tensor.expression] = torch.nn.Parameter(value) if parameter else value
        return made[tensor.expression]

    for module in modules:
        _replace_tensors(module, real)


def _replace_tensors(module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for part in module.modules():
        for held in _tables(part):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = change(tensor)


def _tables(module: torch.nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


def _same(x: LazyParameter, *_: Any, **__: Any) -> Any:
    return _like(x, x.expression)


def _cast(x: LazyParameter, dtype: torch.dtype) -> LazyParameter:
    return x if x.dtype == dtype else LazyParameter(Cast(x.expression, dtype))


def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, LazyParameter):
        return NotImplemented
    given = [*args, *kwargs.values()]
    device = [g for g in given if isinstance(g, (str, torch.device))]
    if any(torch.device(d).type != "cpu" for d in device) or any(isinstance(g, torch.Tensor) for g in given):
        return NotImplemented
    dtype = next((g for g in given if isinstance(g, torch.dtype)), None)
    return x if dtype is None else _cast(x, dtype)


def _transposed(x: LazyParameter, *axes: int) -> Any:
    if x.ndim != 2 or (axes and {axis % 2 for axis in axes} != {0, 1}):
        return NotImplemented
    inner = x.expression
    return LazyParameter(inner.source if isinstance(inner, Transpose) else Transpose(inner))


def _reshaped(x: LazyParameter, *sizes: Any) -> Any:
    shape = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    if not all(isinstance(size, int) for size in shape):
        return NotImplemented
    with_sizes = torch.empty(x.shape, device="meta").reshape(*shape).shape
    return LazyParameter(Reshape(x.expression, tuple(with_sizes)))


def _sliced(x: LazyParameter, index: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    if index and index[0] is Ellipsis and len(index) == 1:
        return _like(x, x.expression)
    if not all(isinstance(i, slice) and i.step in (None, 1) for i in index):
        return NotImplemented
    made = x.expression
    for axis, part in enumerate(index):
        start, stop, _ = part.indices(x.shape[axis])
        if (start, stop) != (0, x.shape[axis]):
            made = Narrow(made, axis, start, max(0, stop - start))
    return LazyParameter(made)


def _narrowed(x: LazyParameter, dim: int, start: int, length: int) -> Any:
    return LazyParameter(Narrow(x.expression, dim % x.ndim, int(start), int(length)))


def _chunked(x: LazyParameter, chunks: int, dim: int = 0) -> Any:
    size = -(-x.shape[dim] // chunks)
    total = x.shape[dim]
    return tuple(_narrowed(x, dim, at, min(size, total - at)) for at in range(0, total, size))


def _joined(tensors: Sequence[torch.Tensor], dim: int = 0, **other: Any) -> Any:
    if other or not all(isinstance(t, LazyParameter) and t.dtype == tensors[0].dtype for t in tensors):
        return NotImplemented
    return LazyParameter(Concat(tuple(expression_of(t) for t in tensors), dim % tensors[0].ndim))


def _stacked(tensors: Sequence[torch.Tensor], dim: int = 0, **other: Any) -> Any:
    if other or dim or not all(isinstance(t, LazyParameter) for t in tensors):
        return NotImplemented
    parts = tuple(Reshape(expression_of(t), (1, *t.shape)) for t in tensors)
    return LazyParameter(Concat(parts, 0))


def _embedding(*args: Any, **kwargs: Any) -> Any:
    """Look rows up in a table that stays on disk: only those are read."""
    weights_first = isinstance(args[0], LazyParameter)
    given = dict(zip(("weight", "indices") if weights_first else ("indices", "weight"), args, strict=False))
    indices, weight = given.get("indices"), given.get("weight")
    if indices is None or not isinstance(weight, LazyParameter) or isinstance(indices, LazyParameter):
        return NotImplemented
    if kwargs.get("max_norm") is not None or isinstance(indices, torch._subclasses.FakeTensor):
        return NotImplemented
    wanted, places = torch.unique(indices, return_inverse=True)
    rows = torch.cat([weight.expression.read(int(row), int(row) + 1) for row in wanted])
    return rows[places]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """A product with a large weight, a part of its rows at a time."""
    if not isinstance(weight, LazyParameter) or weight.expression.nbytes <= _WHOLE_BYTES:
        return NotImplemented
    parts = [torch.nn.functional.linear(evaluated(x), some) for some in weight.expression.pieces()]
    out = torch.cat(parts, -1)
    return out if bias is None else out + evaluated(bias)


_T: Any = torch.Tensor
_LAZILY: Final[dict[Any, Callable[..., Any]]] = {
    _T.detach: _same, _T.contiguous: _same, _T.clone: _same, _T.requires_grad_: lambda x, *_, **__: x,
    _T.data.__get__: _same, _T.cpu: lambda x: x, _T.to: _to,
    _T.float: lambda x: _cast(x, torch.float32), _T.half: lambda x: _cast(x, torch.float16),
    _T.bfloat16: lambda x: _cast(x, torch.bfloat16),
    _T.t: _transposed, torch.t: _transposed, _T.T.__get__: _transposed, _T.mT.__get__: _transposed,
    _T.transpose: _transposed, torch.transpose: _transposed,
    _T.reshape: _reshaped, _T.view: _reshaped, _T.__getitem__: _sliced,
    _T.narrow: _narrowed, torch.narrow: _narrowed, _T.chunk: _chunked, torch.chunk: _chunked,
    torch.cat: _joined, torch.concat: _joined, torch.stack: _stacked,
    torch.nn.functional.embedding: _embedding, torch.ops.aten.embedding.default: _embedding,
    torch.nn.functional.linear: _linear, torch.ops.aten.linear.default: _linear,
}  # fmt: skip
# questions about a tensor that its values do not answer
_ABOUT: Final = frozenset({
    _T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.stride, _T.is_contiguous, _T.element_size,
    _T.is_floating_point, _T.is_complex, _T.storage_offset, _T.get_device, _T.__len__, _T.is_shared,
    torch.is_floating_point, torch.is_complex, torch.numel, _T.is_pinned, _T._is_view, _T.type,
})  # fmt: skip
