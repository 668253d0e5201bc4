"""The list of blocks to visit: nothing visible is left out, and what is left out is most of a sparse mask."""

from __future__ import annotations

import pytest
import torch

from memcompile.backends.torch.triton.visits import plan_visits
from memcompile.dialect import visible_keys

RULES = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 40},
    "sinks": {"window": 40, "sinks": 4},
    "stride": {"window": 40, "sinks": 4, "block": 16, "stride": 5},
    "two-sided": {"causal": False, "window": 40},
}


def rule(**given: object) -> dict[str, object]:
    return {"causal": True, "window": 0, "sinks": 0, "block": 1, "stride": 0} | given


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("order", ["in order", "shuffled", "with holes"])
@pytest.mark.parametrize(("tokens", "slots"), [(1, 1), (1, 130), (65, 65), (200, 330)])
def test_every_visible_pair_is_visited_and_a_whole_block_is_wholly_visible(
    name: str, order: str, tokens: int, slots: int
) -> None:
    generator = torch.Generator().manual_seed(slots)
    positions = torch.arange(slots).repeat(2, 1)
    if order == "shuffled":
        positions[:, : slots - tokens] = positions[:, torch.randperm(slots - tokens, generator=generator)]
    if order == "with holes":
        positions[1, torch.rand(slots, generator=generator) < 0.1] = -1
    options = rule(**RULES[name])
    queries = positions[:, slots - tokens :]
    visits, counts = plan_visits(queries, positions, rows=64, keys=32, **options)  # type: ignore[arg-type]
    seen = visible_keys(queries, positions, **options)  # type: ignore[arg-type]
    for row in range(2):
        for tile in range(visits.shape[2]):
            whole, live = (int(x) for x in counts[row, 0, tile])
            listed = visits[row, 0, tile].tolist()
            part = seen[row, tile * 64 : tile * 64 + 64]
            some = {int(s) // 32 for s in part.any(dim=0).nonzero()}
            assert some <= set(listed[:live])
            for block in listed[:whole]:
                assert part[:, block * 32 : block * 32 + 32].all()
            assert len(set(listed[:live])) == live


def test_a_window_visits_as_many_blocks_as_it_is_wide_and_its_sinks() -> None:
    positions = torch.arange(4096).unsqueeze(0)
    options = rule(window=256, sinks=4)
    _, counts = plan_visits(positions, positions, rows=64, keys=64, **options)  # type: ignore[arg-type]
    # 256 tokens reach into five blocks, and the sinks are in one more
    assert int(counts[0, 0, -1, 1]) == 6
    assert int(counts[0, 0, -1, 0]) == 3


def test_half_of_a_causal_square_is_not_visited_and_nearly_all_of_the_rest_needs_no_mask() -> None:
    positions = torch.arange(1024).unsqueeze(0)
    _, counts = plan_visits(positions, positions, rows=64, keys=64, **rule())  # type: ignore[arg-type]
    assert counts[0, 0, :, 1].tolist() == list(range(1, 17))
    assert counts[0, 0, :, 0].tolist() == list(range(16))


def test_a_block_mask_takes_blocks_away_per_head() -> None:
    positions = torch.arange(256).unsqueeze(0)
    block_mask = torch.ones(1, 2, 4, 4, dtype=torch.uint8)
    block_mask[0, 1, :, 1] = 0
    options = rule()
    visits, counts = plan_visits(positions, positions, rows=64, keys=64, block_mask=block_mask, **options)  # type: ignore[arg-type]
    assert counts[0, 0, :, 1].tolist() == [1, 2, 3, 4]
    assert counts[0, 1, :, 1].tolist() == [1, 1, 2, 3]
    assert 1 not in visits[0, 1, 3, :3].tolist()


def test_under_a_run_time_mask_no_block_is_taken_as_wholly_visible() -> None:
    positions = torch.arange(256).unsqueeze(0)
    _, counts = plan_visits(positions, positions, rows=64, keys=64, masked=True, **rule())  # type: ignore[arg-type]
    assert counts[0, 0].tolist() == [[0, 1], [0, 2], [0, 3], [0, 4]]
