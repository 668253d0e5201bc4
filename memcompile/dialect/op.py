"""What a dialect operator is: a schema, its meaning in plain torch, its cost and its state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

_DTYPES_LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Cost:
    """Work and traffic of one call: floating point operations, bytes moved, bytes of state held after."""

    flops: int = 0
    bytes_moved: int = 0
    state_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes_moved + other.bytes_moved,
            self.state_bytes + other.state_bytes,
        )


@dataclass(frozen=True, slots=True)
class DialectOp:
    """One operator of the dialect.

    `definition` is its meaning: plain torch, right in float64, and the judge of every kernel.
    `cost` takes the sizes by their shape letters (B, T, S, H, G, D, ...) and gives a `Cost`.
    `state` names the outputs that are carried between calls.
    """

    name: str
    definition: Callable[..., Any]
    cost: Callable[..., Cost]
    state: tuple[str, ...] = field(default=())

    @property
    def target(self) -> Any:
        """The overload that graph nodes call."""
        return getattr(torch.ops.memcompile, self.name).default

    @property
    def schema(self) -> str:
        return str(self.target._schema)


DIALECT: dict[str, DialectOp] = {}


def register(op: DialectOp) -> DialectOp:
    """Enter `op` in the dialect's table."""
    DIALECT[op.name] = op
    return op


def differentiate_through_definition(
    custom_op: Any, definition: Callable[..., Any], tensor_count: int
) -> None:
    """Give `custom_op` a backward pass: run its definition again under autograd.

    The first `tensor_count` arguments of the schema are the (optional) tensors; the rest are attributes.
    """

    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: dict[str, Any] | None = None
    ) -> None:
        ctx.attributes = (inputs[tensor_count:], keyword_only_inputs or {})
        ctx.missing = [value is None for value in inputs[:tensor_count]]
        ctx.save_for_backward(*[value for value in inputs[:tensor_count] if value is not None])

    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        tensors = [None if missing else next(saved) for missing in ctx.missing]
        rest, keywords = ctx.attributes
        with torch.enable_grad():
            leaves = [
                t.detach().requires_grad_(t.is_floating_point()) if t is not None else None for t in tensors
            ]
            outputs = definition(*leaves, *rest, **keywords)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(
            torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
            if pairs
            else [None] * len(wanted)
        )
        result = [next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves]
        return (*result, *[None] * len(rest))

    custom_op.register_autograd(backward, setup_context=setup_context)


def accumulate_type(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in: float32 for half types, otherwise the type itself."""
    return torch.float32 if dtype in _DTYPES_LOW else dtype
