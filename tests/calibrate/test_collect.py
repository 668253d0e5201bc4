"""Calibration: what is measured, and that it is remembered, resumed and never confused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from memcompile.calibrate.cache import MeasurementCache, default_cache_folder
from memcompile.calibrate.collect import Calibration, CalibrationData, collect, token_windows
from memcompile.calibrate.statistics import ChannelRange
from memcompile.errors import MemcompileError
from memcompile.progress import Silent
from memcompile.regions import argument, attention_nodes
from memcompile.rewrite.fingerprint import graph_text
from tests.rewrite.tiny import calibration, tiny_graph


def measure(
    graph: fx.GraphModule, data: CalibrationData, statistic: ChannelRange | None = None, **options: Any
) -> Calibration:
    regions = [str(argument(n, "region")) for n in attention_nodes(graph)]
    return collect(graph, regions, statistic or ChannelRange(), data, graph_key=graph_text(graph), **options)


def nudge(graph: fx.GraphModule) -> None:
    """Give the graph an embedding of its own, a little different."""
    embedding = graph.get_submodule("embedding")
    weight = embedding.get_parameter("weight").detach().clone()
    weight[3, 3] += 1.0
    embedding.register_parameter("weight", torch.nn.Parameter(weight))


def test_the_range_of_every_channel_is_the_largest_magnitude(tmp_path: Path) -> None:
    graph, data = tiny_graph(), calibration(tmp_path)
    result = measure(graph, data)
    seen: dict[str, list[torch.Tensor]] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n in attention_nodes(graph):
                args, _ = self.fetch_args_kwargs_from_env(n)
                seen.setdefault(n.kwargs["region"], []).append(args[2])
            return super().run_node(n)

    with torch.no_grad():
        for window in data.windows:
            Watch(graph).run(window["input_ids"], window["position_ids"])
    for region, values in seen.items():
        largest = torch.cat(values, dim=2).abs().amax(dim=(0, 2))
        torch.testing.assert_close(result.statistics[region]["v"], largest, atol=0, rtol=0)


def test_a_percentile_is_the_mean_over_windows() -> None:
    k = torch.arange(1.0, 102.0).reshape(1, 1, 101, 1)
    statistic = ChannelRange(percentile=90.0)
    first, second = statistic.measure(k, k, k)["k"], statistic.measure(k, -3 * k, k)["k"]
    assert (first.item(), second.item()) == (91.0, 273.0)
    assert statistic.join("k", torch.stack((first, second))).item() == 182.0


def test_half_types_are_measured_in_float32() -> None:
    k = torch.randn(2, 3, 20, 4).to(torch.bfloat16)
    for percentile in (100.0, 99.0):
        assert ChannelRange(percentile).measure(k, k, k)["k"].dtype == torch.float32


def test_a_second_measurement_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, data = tiny_graph(), calibration(tmp_path)
    first = measure(graph, data)

    def fail(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(ChannelRange, "measure", fail)
    second = measure(graph, data)
    assert second.digest == first.digest
    for region, found in first.statistics.items():
        for name, tensor in found.items():
            torch.testing.assert_close(second.statistics[region][name], tensor, atol=0, rtol=0)


def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class Interrupt(Silent):
        def update(self, done: int, total: int) -> None:
            if done == 2:
                raise KeyboardInterrupt

    graph, data = tiny_graph(), calibration(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        measure(graph, data, progress=Interrupt())
    stored = sorted(tmp_path.rglob("window-*.safetensors"))
    assert len(stored) == 2
    written = [path.stat().st_mtime_ns for path in stored]
    result = measure(graph, data)
    assert result.windows == 3
    assert [path.stat().st_mtime_ns for path in stored] == written
    assert len(list(tmp_path.rglob("window-*.safetensors"))) == 3
    assert not list(tmp_path.rglob(".partial-*"))


@pytest.mark.parametrize("damage", [b"", b"rubbish", None])
def test_a_damaged_window_is_measured_again(tmp_path: Path, damage: bytes | None) -> None:
    graph, data = tiny_graph(), calibration(tmp_path)
    first = measure(graph, data)
    path = next(iter(sorted(tmp_path.rglob("window-*.safetensors"))))
    path.write_bytes(path.read_bytes()[:-7] if damage is None else damage)
    second = measure(graph, data)
    torch.testing.assert_close(second.statistics["0"]["k"], first.statistics["0"]["k"], atol=0, rtol=0)


def test_the_digest_covers_everything_the_result_depends_on(tmp_path: Path) -> None:
    base = measure(tiny_graph(), calibration(tmp_path)).digest
    assert measure(tiny_graph(), calibration(tmp_path / "elsewhere")).digest == base
    other_weights = tiny_graph()
    nudge(other_weights)
    changed = {
        "weights": measure(other_weights, calibration(tmp_path)),
        "graph": measure(tiny_graph(each={0: {"window": 4}}), calibration(tmp_path)),
        "tokens": measure(tiny_graph(), calibration(tmp_path, tokens=64)),
        "windows": measure(tiny_graph(), calibration(tmp_path, window=48)),
        "statistic": measure(tiny_graph(), calibration(tmp_path), ChannelRange(99.0)),
        "type": measure(tiny_graph(dtype=torch.bfloat16), calibration(tmp_path)),
    }
    digests = {name: result.digest for name, result in changed.items()}
    assert len({base, *digests.values()}) == 1 + len(digests), digests


def test_a_model_digest_stands_for_the_weights(tmp_path: Path) -> None:
    data = replace(calibration(tmp_path), model_digest="abc")
    first, other = tiny_graph(), tiny_graph()
    nudge(other)
    assert measure(first, data).digest == measure(other, data).digest
    assert measure(first, replace(data, model_digest="def")).digest != measure(first, data).digest


def test_only_what_the_regions_need_is_run(tmp_path: Path) -> None:
    graph = tiny_graph()
    head = next(
        n for n in graph.graph.nodes if "head" in str(n.args) and n.target is torch.ops.aten.linear.default
    )

    def fail(*_: Any) -> Any:
        raise AssertionError("the head was run")

    head.target = fail
    measure(graph, calibration(tmp_path))


def test_windows_are_cut_from_the_start_and_a_rest_is_dropped() -> None:
    windows = token_windows(list(range(10)), 4)
    assert [w["input_ids"].tolist() for w in windows] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert windows[1]["position_ids"].tolist() == [[0, 1, 2, 3]]


def test_too_short_a_text_is_an_error() -> None:
    with pytest.raises(MemcompileError, match=r"MC121 .* has 3 tokens, and a window needs 4"):
        token_windows([1, 2, 3], 4)


def test_no_windows_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(MemcompileError, match=r"MC107 data\.calibration"):
        measure(tiny_graph(), CalibrationData((), cache=tmp_path))


def test_data_that_does_not_fit_the_graph_is_an_error(tmp_path: Path) -> None:
    window = {"pixels": torch.zeros(1, 3)}
    with pytest.raises(MemcompileError, match=r"MC205 .* the graph also wants input_ids"):
        measure(tiny_graph(), CalibrationData((window,), cache=tmp_path))


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMCOMPILE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_folder() == Path.home() / ".cache" / "memcompile"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_folder() == tmp_path / "xdg" / "memcompile"
    monkeypatch.setenv("MEMCOMPILE_CACHE", str(tmp_path / "own"))
    assert default_cache_folder() == tmp_path / "own"
    assert MeasurementCache.at(None, "abc").folder == tmp_path / "own" / "calibration" / "abc"
