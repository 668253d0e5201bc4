"""`memcompile::observe`: remember the last queries, so that an eviction can ask what they looked at."""

from __future__ import annotations

import torch

from memcompile.dialect.op import Cost, DialectOp, differentiate_through_definition, register


def observe_definition(
    q: torch.Tensor, past: torch.Tensor, positions: torch.Tensor, tokens: int
) -> torch.Tensor:
    """The last `tokens` valid queries of `past` [B,H,W,D] followed by `q` [B,H,T,D], newest last.

    positions: int64 [B,P+T] of the group's keys; a query is valid when its position is not negative.
    Zeros stand on the left while fewer queries were seen.
    """
    new = q.shape[2]
    padded = torch.nn.functional.pad(past, (0, 0, tokens, 0))[:, :, past.shape[2] :]
    joined = torch.cat((padded, q), dim=2)
    valid = positions[:, positions.shape[1] - new :] >= 0
    # valid queries of a row come first in a call, padding last: the row's window ends after its valid ones
    count = valid.sum(dim=1, keepdim=True)
    index = count + torch.arange(tokens, device=q.device).unsqueeze(0)
    index_BHWD = index.reshape(-1, 1, tokens, 1).expand(q.shape[0], q.shape[1], tokens, q.shape[3])
    return torch.gather(joined, 2, index_BHWD)


@torch.library.custom_op("memcompile::observe", mutates_args=())
def observe(q: torch.Tensor, past: torch.Tensor, positions: torch.Tensor, tokens: int) -> torch.Tensor:
    """The last `tokens` valid queries seen so far, [B,H,tokens,D]; see `observe_definition`."""
    return observe_definition(q, past, positions, tokens)


@observe.register_fake
def _(q: torch.Tensor, past: torch.Tensor, positions: torch.Tensor, tokens: int) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], tokens, q.shape[3]))


differentiate_through_definition(observe, observe_definition, tensor_count=3)


def observe_cost(*, B: int, H: int, D: int, tokens: int, element_bytes: int = 4) -> Cost:
    size = B * H * tokens * D * element_bytes
    return Cost(bytes_moved=2 * size, state_bytes=size)


OBSERVE = register(DialectOp("observe", observe_definition, observe_cost, state=("observed",)))
