"""Pages that decoding chooses, in an ONNX Runtime artifact: state, fallback, and what is recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from memcompile.artifact.manifest import parse_manifest
from memcompile.backends.onnxruntime import tuned
from memcompile.backends.onnxruntime.backend import KERNEL_MODEL, OnnxRuntimeBackend
from memcompile.errors import MemcompileError
from memcompile.frontend import capture
from memcompile.lowering import get_backend
from memcompile.program import build_program
from memcompile.progress import SILENT
from memcompile.rewrite.manager import apply
from memcompile.runtime import Session, load
from memcompile.runtime import session as runtime_session
from memcompile.tuning import Database, Workload
from memcompile.tuning.crossover import Rule, Switch, switch_of
from tests.backends.onnxruntime.build import artifact_of
from tests.models import captured_tiny, tiny_model
from tests.rewrite.tiny import entry

pytestmark = pytest.mark.xdist_group("pages")

PROMPT = [int(t) for t in np.random.default_rng(3).integers(3, 64, 100)]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny model as it is, and with pages."""
    folder = tmp_path_factory.mktemp("pages")
    dense = artifact_of(build_program(captured_tiny("llama")), folder / "dense")
    captured = captured_tiny("llama")
    apply(captured.graph, [entry("attention.sparse", selector="pages", keep_tokens=32, dense_tokens=0)])
    return dense, artifact_of(build_program(captured), folder / "pages")


def decoded(session: Session) -> np.ndarray:
    state = session.new_state(1, len(PROMPT), 5)
    session.prefill(state, [PROMPT])
    return np.stack([session.decode(state, [token])[0] for token in range(3, 8)])


def test_the_fallback_looks_at_everything(
    artifacts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, paged = (load(path, threads=1) for path in artifacts)
    expected, chosen = decoded(dense), decoded(paged)
    assert np.abs(chosen - expected).max() > 1e-3
    monkeypatch.setattr(runtime_session, "find_library", lambda: None)
    np.testing.assert_allclose(decoded(load(artifacts[1], threads=1)), expected, atol=5e-5, rtol=0)


def test_extending_by_known_tokens_is_decoding_them(artifacts: tuple[Path, Path]) -> None:
    session = load(artifacts[1], threads=1)
    state = session.new_state(1, len(PROMPT), 5)
    session.prefill(state, [PROMPT])
    given = session.extend(state, [3, 4, 5, 6, 7])
    np.testing.assert_allclose(given, decoded(session), atol=1e-5, rtol=0)


def test_the_bounds_are_counted_in_the_state(artifacts: tuple[Path, Path]) -> None:
    dense, paged = (load(path, threads=1).new_state(2, 100, 20).nbytes for path in artifacts)
    # of 120 slots 8 pages, two layers, two heads of 16 channels
    assert paged - dense == 2 * 2 * 2 * 8 * 2 * 16 * 4


def test_bounds_of_a_bfloat16_cache_are_those_of_the_keys_it_keeps(tmp_path: Path) -> None:
    captured = capture(tiny_model("llama").bfloat16())
    apply(captured.graph, [entry("attention.sparse", selector="pages", keep_tokens=32, dense_tokens=0)])
    session = load(artifact_of(build_program(captured), tmp_path / "out"), threads=1)
    assert {"AttentionBFloat16", "PageBoundsBFloat16"} <= set(session.manifest.functions["step"].kernels)
    state = session.new_state(1, len(PROMPT), 5)
    session.prefill(state, [PROMPT])
    session.decode(state, [3])
    for caches in state.caches:
        assert caches.bounds is not None
        keys, bounds = (_floats(buffer.row(0)) for buffer in (caches.key, caches.bounds))
        pages = np.split(keys[:, : len(PROMPT) + 1], range(16, len(PROMPT) + 1, 16), axis=1)
        for page, kept in enumerate(pages):
            expected = np.concatenate([kept.max(axis=1), kept.min(axis=1)], axis=-1)
            np.testing.assert_array_equal(bounds[:, page], expected)


def _floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_both_graphs_have_the_interface_of_the_manifest(artifacts: tuple[Path, Path]) -> None:
    path = artifacts[1]
    step = load(path, threads=1).manifest.functions["step"]
    assert step.kernels == ("Attention", "PageBounds")
    for file in (step.file, str(step.kernel_file)):
        graph = ir.load(path / file).graph
        assert {v.name for v in graph.inputs} == {t.name for t in step.inputs}
        assert [v.name for v in graph.outputs] == [t.name for t in step.outputs]
    assert not any(node.domain == "memcompile" for node in ir.load(path / step.file).graph)


def test_what_chooses_nothing_is_recorded(tmp_path: Path) -> None:
    captured = captured_tiny("llama")
    apply(captured.graph, [entry("attention.sparse", selector="pages", layers=1, dense_tokens=0)])
    lowered = get_backend("onnxruntime").lower(
        build_program(captured), tmp_path, device="cpu", progress=SILENT.stage
    )
    (decision,) = lowered.decisions
    assert decision["regions"] == "1"
    assert decision["decision"] == "without the kernel library, model.onnx looks at every key while decoding"
    assert "genai_config.json" not in lowered.files


def test_a_manifest_whose_pages_make_no_sense_is_refused(artifacts: tuple[Path, Path]) -> None:
    text = (artifacts[1] / "manifest.json").read_text(encoding="utf-8")
    manifest = parse_manifest(text)
    state = manifest.states[0]
    for wrong in (
        replace(state, page_tokens=0),
        replace(state, bounds_in=None),
        replace(state, bounds_out="logits2"),
    ):
        data = replace(manifest, states=(wrong, *manifest.states[1:])).as_dict()
        with pytest.raises(MemcompileError, match=r"MC505.*(go together|no output 'logits2')"):
            parse_manifest(json.dumps(data))


def test_the_artifact_switches_where_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Rule, int]] = []

    def measured(rule: Rule, database: Database, *, most_tokens: int, **_: object) -> Switch:
        asked.append((rule, most_tokens))
        return switch_of([(512, 0.9), (1024, 2.0)])

    monkeypatch.setattr(tuned, "find_switch", measured)
    captured = captured_tiny("llama")
    apply(
        captured.graph,
        [
            entry("attention.sparse", selector="pages", layers=0),
            entry("attention.sparse", selector="shape", layers=1),
        ],
    )
    program = build_program(captured)
    for workload, begin in ((None, 2048), (Workload(3000, 100), 512)):
        folder = tmp_path / str(begin)
        folder.mkdir()
        lowered = OnnxRuntimeBackend(workload, Database(tmp_path / "none.json")).lower(
            program, folder, device="cpu", progress=SILENT.stage
        )
        nodes = [n for n in ir.load(folder / KERNEL_MODEL).graph if n.op_type == "Attention"]
        assert [n.attributes.get_int("page_from") for n in nodes] == [begin, 0]
        assert [n.attributes.get_int("pattern_from") for n in nodes] == [0, begin]
        texts = [d["decision"] for d in lowered.decisions if d.get("tuned") == "attention.sparse"]
        assert len(texts) == 2
        assert all(text.startswith(f"keys are chosen from {begin:,} on") for text in texts)
    assert [(rule.page_keep, rule.block, most) for rule, most in asked] == [(0, 64, 3100), (400, 0, 3100)]
