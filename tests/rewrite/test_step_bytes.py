"""The bytes of a decode step, counted by hand for a tiny model."""

from __future__ import annotations

import pytest

from memcompile.rewrite.entry import WorkloadSizes
from memcompile.rewrite.manager import apply
from memcompile.rewrite.step_bytes import StepBytes, step_bytes
from tests.models import captured_tiny
from tests.rewrite.tiny import entry, tiny_graph

WORKLOAD = WorkloadSizes(prompt_tokens=1000, new_tokens=24, batch=2)
# 4 query and 2 key/value heads of 8, a vocabulary of 64, 512 positions
LAYER, HEAD, ROW, POSITIONS = 32 * (32 + 16 + 16 + 32), 64 * 32, 32, 512 * 32


def test_of_a_float_model() -> None:
    found = step_bytes(tiny_graph(layers=3), WORKLOAD)
    # of the token embedding, the two rows of the batch
    assert found.weights == 4 * (3 * LAYER + HEAD + 2 * ROW + POSITIONS)
    assert found.state == 3 * 2 * 1024 * 2 * (2 * 8) * 4
    linear = 3 * (2 * 64 + 2 * 48) + (32 + 64)
    assert found.activations == 2 * 4 * (linear + 3 * 2 * (4 + 2) * 8)


def test_quantised_weights_move_fewer_bytes_and_known_states_count() -> None:
    graph = tiny_graph(layers=3)
    apply(graph, [entry("weights.quantize", bits=4, block_size=32)])
    found = step_bytes(graph, WORKLOAD, {"0": 10, "1": 20, "2": 30})
    # half a byte a weight, and a scale a block of 32
    codes = (3 * LAYER + HEAD + 2 * ROW) * 5 // 8
    assert found.weights == codes + 4 * POSITIONS
    assert found.state == 60


def test_a_tied_head_is_read_whole_and_the_embedding_by_the_row() -> None:
    tied = step_bytes(captured_tiny("llama", tie_word_embeddings=True).graph, WORKLOAD)
    untied = step_bytes(captured_tiny("llama", tie_word_embeddings=False).graph, WORKLOAD)
    assert tied == untied


def test_of_experts_only_the_chosen_ones_are_read() -> None:
    graph = captured_tiny("mixtral").graph
    one = step_bytes(graph, WorkloadSizes(prompt_tokens=10, batch=1))
    all_ = step_bytes(graph, WorkloadSizes(prompt_tokens=10, batch=2))
    experts = sum(
        p.numel() * 4 for name, p in captured_tiny("mixtral").graph.named_parameters() if "experts" in name
    )
    rows = 48 * 4
    # two of four experts a token
    assert all_.weights - one.weights == experts // 2 + rows


@pytest.mark.parametrize(
    ("bytes_", "text"),
    [
        (
            StepBytes(71, 29, 0),
            "weights are 71% of the bytes of a decode step and the cache 29%: KV compression can win at most "
            "1.4x, weight compression 3.4x",
        ),
        (
            StepBytes(100, 0, 100),
            "weights are 50% of the bytes of a decode step and the cache 0%: KV compression can win at most "
            "1.0x, weight compression 2.0x",
        ),
    ],
)
def test_it_says_what_can_be_won(bytes_: StepBytes, text: str) -> None:
    assert bytes_.sentence() == text
