"""`kv.quantize`: scales, rounding error, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import fx

from memcompile.dialect.cache_codes import dequantize, quantize
from memcompile.passes.kv.quantize import QuantizeConfig, symmetric_scale
from memcompile.regions import argument, attention_nodes, attention_regions
from memcompile.rewrite.manager import apply
from tests.rewrite.tiny import calibration, entry, prompts, run, tiny_graph


def quantized(graph: fx.GraphModule, folder: Path, **values: Any) -> fx.GraphModule:
    apply(graph, [entry("kv.quantize", **values)], calibration=calibration(folder))
    return graph


def scales(graph: fx.GraphModule, region: str) -> tuple[torch.Tensor, torch.Tensor]:
    node = next(n for n in attention_nodes(graph) if argument(n, "region") == region)
    return tuple(graph.get_buffer(str(argument(node, name).target)) for name in ("k_scale", "v_scale"))  # type: ignore[return-value]


def error_of(bits: int, folder: Path) -> float:
    rows = prompts(5, 30)
    want = run(tiny_graph(), rows)
    graph = tiny_graph()
    # enough tokens that the range of every channel has been seen
    apply(graph, [entry("kv.quantize", bits=bits)], calibration=calibration(folder, tokens=1024))
    got = run(graph, rows)
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))


def test_eight_bits_stay_close_and_four_are_coarser(tmp_path: Path) -> None:
    fine, coarse = error_of(8, tmp_path), error_of(4, tmp_path)
    # logits of about 1; a code is 1/127 and 1/7 of a channel's range
    assert 0 < fine < 0.02
    assert fine < coarse < 0.5


def test_scales_are_float32_also_in_a_bfloat16_model(tmp_path: Path) -> None:
    graph = quantized(tiny_graph(dtype=torch.bfloat16), tmp_path)
    for scale in scales(graph, "0"):
        assert scale.dtype == torch.float32
        assert scale.shape == (16,)
    assert torch.isfinite(torch.cat(run(graph, prompts(5, 30)))).all()


def test_the_largest_calibrated_magnitude_takes_the_largest_code(tmp_path: Path) -> None:
    graph = tiny_graph()
    seen: list[torch.Tensor] = []

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n is argument(attention_nodes(graph)[1], "k"):
                seen.append(result)
            return result

    for window in calibration(tmp_path).windows:
        Watch(graph).run(window["input_ids"], window["position_ids"])
    largest = torch.cat(seen, dim=2).abs().amax(dim=(0, 2)).flatten()
    k_scale, _ = scales(quantized(graph, tmp_path), "1")
    torch.testing.assert_close(k_scale * 127, largest, atol=1e-6, rtol=1e-6)


def test_clipping_lowers_the_scales(tmp_path: Path) -> None:
    whole = torch.cat(scales(quantized(tiny_graph(), tmp_path), "0"))
    clipped = torch.cat(scales(quantized(tiny_graph(), tmp_path, clip_percentile=90.0), "0"))
    assert (clipped < whole).all()


def test_a_code_is_off_by_half_a_scale_at_most() -> None:
    x = torch.randn(1, 2, 50, 6, generator=torch.Generator().manual_seed(1))
    for bits, largest in ((8, 127), (4, 7)):
        scale = symmetric_scale(x.abs().amax(dim=(0, 2)), largest)
        error = (dequantize(quantize(x, scale, bits), scale, bits, 6) - x).abs()
        assert (error <= scale.reshape(1, 2, 1, 6) / 2 + 1e-6).all()


def test_a_silent_channel_takes_the_scale_of_the_others() -> None:
    scale = symmetric_scale(torch.tensor([[127.0, 0.0, 254.0], [0.0, 0.0, 0.0]]), 127)
    assert scale.tolist() == [1.0, 1.5, 2.0, 1.0, 1.0, 1.0]


def test_golden_of_a_quantised_layer(tmp_path: Path) -> None:
    graph = tiny_graph(layers=1)
    result = apply(graph, [entry("kv.quantize")], calibration=calibration(tmp_path))
    assert [(e.action, e.node) for e in result.journal.entries] == [
        ("stored", "attention_0_k_scale"),
        ("made", "attention_0_k_scale"),
        ("stored", "attention_0_v_scale"),
        ("made", "attention_0_v_scale"),
        ("changed", "attention"),
    ]
    (region,) = attention_regions(graph)
    assert region.bits == 8
    assert [output.dtype for output in region.node.meta["val"]] == [torch.float32, torch.int8, torch.int8]
    assert "attention_0_k_scale" in dict(graph.named_buffers())


def test_the_calibration_is_reported(tmp_path: Path) -> None:
    result = apply(tiny_graph(), [entry("kv.quantize")], calibration=calibration(tmp_path))
    (found,) = result.calibrations.values()
    assert found["windows"] == 3
    assert found["regions"] == ["0", "1", "2"]
    assert len(found["digest"]) == 64


def refusal(graph: fx.GraphModule, folder: Path, **values: Any) -> str:
    result = apply(graph, [entry("kv.quantize", **values)], calibration=calibration(folder), strict=False)
    return result.refusals[0].reason


def test_refuses_what_is_already_quantised(tmp_path: Path) -> None:
    graph = quantized(tiny_graph(), tmp_path)
    assert refusal(graph, tmp_path, bits=4) == "its cache is already quantised to 8 bits"


def test_refuses_four_bits_for_an_odd_width(tmp_path: Path) -> None:
    assert "7 wide, and 4-bit codes come in pairs" in refusal(tiny_graph(head_dim=7), tmp_path, bits=4)


def test_refuses_attention_without_a_cache(tmp_path: Path) -> None:
    each = {layer: {"causal": False} for layer in range(3)}
    assert "has no cache" in refusal(tiny_graph(each=each), tmp_path)


def test_none_may_be_written_as_a_word() -> None:
    assert QuantizeConfig(bits="none").bits is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values", [{"bits": 3}, {"bits": "8"}, {"clip_percentile": 50.0}, {"clip_percentile": 101.0}]
)
def test_refuses_a_setting(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        QuantizeConfig(**values)
