"""Weights of a GGUF file stay the file's codes, and only where they stand for the model's own floats."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from memcompile.errors import MemcompileError
from memcompile.frontend import Captured, capture
from memcompile.frontend.gguf_weights import keep_stored_weights, matching_rows
from memcompile.frontend.lazy_gguf import parsed_once
from memcompile.regions import weight_regions
from tests.models import tiny_model
from tests.weights.test_gguf_blocks import random_rows

Kind = gguf.GGMLQuantizationType
HEADS = {"q_proj": 4, "k_proj": 2}
IDS, POSITIONS = torch.tensor([[5, 6, 7, 8]]), torch.arange(4).unsqueeze(0)


def file_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp keeps rows of q and k: pairs of a rotation beside each other."""
    shaped = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(shaped.swapaxes(1, 2).reshape(rows.shape))


def blocks_of(name: str, shape: tuple[int, ...], weight: np.ndarray) -> tuple[np.ndarray, Any]:
    """The bytes that the file has for a weight, by what its name ends with."""
    if name.endswith("up_proj.weight"):
        return quantize(weight, Kind.Q4_0), Kind.Q4_0
    if name.endswith("embed_tokens.weight"):
        return quantize(weight, Kind.Q8_0), Kind.Q8_0
    if name.endswith("down_proj.weight"):
        return random_rows("Q4_K", *shape), Kind.Q4_K
    if name.endswith("o_proj.weight"):
        return weight.astype(np.float16), Kind.F16
    return quantize(weight, Kind.Q4_1), Kind.Q4_1


def written(
    folder: Path, change: Callable[[str, np.ndarray, Any], tuple[str, np.ndarray, Any]] | None = None
) -> tuple[Captured, Path]:
    """A captured tiny Llama with the floats of a GGUF file, and the file; `change` edits a tensor of it."""
    model = tiny_model("llama", tie_word_embeddings=True, hidden_size=64, intermediate_size=256)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2:
            continue
        raw, kind = blocks_of(name, tuple(parameter.shape), parameter.detach().numpy())
        parameter.data = torch.from_numpy(np.asarray(dequantize(raw, kind), dtype=np.float32).copy())
        heads = next((heads for part, heads in HEADS.items() if part in name), 0)
        raw = file_rows(raw, heads) if heads else raw
        known = str(names.get_name(name.removesuffix(".weight")))
        if change is not None:
            known, raw, kind = change(known, raw, kind)
        writer.add_tensor(f"{known}.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return capture(model), path


def logits(captured: Captured) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = captured.graph(IDS, POSITIONS)[captured.logits_index]
    return found


def test_every_weight_keeps_its_codes_and_the_model_its_outputs(tmp_path: Path) -> None:
    captured, path = written(tmp_path)
    before = logits(captured)
    kept = keep_stored_weights(captured, path, int8_activations=False)
    formats = {weight.region.rpartition(".")[2]: weight.file_format for weight in kept.weights}
    assert formats == {
        "embed_tokens": "Q8_0", "q_proj": "Q4_1", "k_proj": "Q4_1", "v_proj": "Q4_1", "gate_proj": "Q4_1",
        "up_proj": "Q4_0", "down_proj": "Q4_K",
    }  # fmt: skip
    assert kept.refusals == ()
    assert all(weight.error == 0 for weight in kept.weights)
    # head and embedding are one; o_proj is float in the file too
    bits = {region.region: region.bits for region in weight_regions(kept.graph)}
    assert bits["lm_head"] == bits["model.embed_tokens"] == 8
    assert bits["model.layers.0.self_attn.o_proj"] == 0
    scale = float(before.abs().max())
    torch.testing.assert_close(logits(kept), before, atol=1e-5 * scale, rtol=0)


def test_the_floats_are_let_go(tmp_path: Path) -> None:
    captured, path = written(tmp_path)
    kept = keep_stored_weights(captured, path, int8_activations=False)
    stored = sum(t.numel() * t.element_size() for t in kept.graph.buffers())
    floats = {name for name, parameter in kept.graph.named_parameters() if parameter.ndim == 2}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in floats} == {"o_proj"}
    assert stored >= sum(weight.nbytes for weight in kept.weights)


def test_int8_activations_are_asked_for(tmp_path: Path) -> None:
    captured, path = written(tmp_path)
    before = logits(captured)
    kept = keep_stored_weights(captured, path, int8_activations=True)
    difference = (logits(kept) - before).abs().max() / before.abs().max()
    assert 1e-5 < float(difference) < 0.05


def test_a_tensor_that_stands_for_other_numbers_is_not_taken(tmp_path: Path) -> None:
    def flip(name: str, raw: np.ndarray, kind: Any) -> tuple[str, np.ndarray, Any]:
        if name == "blk.1.ffn_up":
            raw = raw.copy()
            raw[3, 7] ^= 0x10
        return name, raw, kind

    captured, path = written(tmp_path, flip)
    before = logits(captured)
    kept = keep_stored_weights(captured, path, int8_activations=False)
    assert [(r.where, r.reason) for r in kept.refusals] == [
        (
            "model.layers.1.mlp.up_proj",
            "blk.1.ffn_up.weight stands for other numbers than the model's model.layers.1.mlp.up_proj.weight",
        )
    ]
    torch.testing.assert_close(logits(kept), before, atol=1e-5 * float(before.abs().max()), rtol=0)


def test_a_weight_that_the_file_does_not_name_stays_float(tmp_path: Path) -> None:
    def rename(name: str, raw: np.ndarray, kind: Any) -> tuple[str, np.ndarray, Any]:
        return ("something.else" if name == "blk.0.ffn_gate" else name), raw, kind

    captured, path = written(tmp_path, rename)
    kept = keep_stored_weights(captured, path, int8_activations=False)
    assert [r.reason for r in kept.refusals] == [
        "the file has no tensor that is known to be model.layers.0.mlp.gate_proj.weight"
    ]


def test_a_format_without_an_equal_is_quantised_anew_and_its_error_told(tmp_path: Path) -> None:
    from memcompile.frontend import gguf_weights

    captured, path = written(tmp_path)
    formats = dict(gguf_weights.FORMATS)
    formats.pop("Q4_K")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_weights, "FORMATS", formats)
        kept = keep_stored_weights(captured, path, int8_activations=False)
    anew = [weight for weight in kept.weights if weight.file_format == "Q4_K"]
    assert len(anew) == 2
    assert all(weight.bits == 8 and 0 < weight.error < 0.01 for weight in anew)
    assert re.fullmatch(
        r"Q4_K has no equal: quantised anew to 8 bits, error \d\.\d\de-03", anew[0].as_decision()["decision"]
    )


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    captured, path = written(tmp_path)
    path.write_bytes(b"GGUF" + b"\0" * 10)
    with pytest.raises(MemcompileError, match="MC202 the GGUF file could not be read again") as caught:
        keep_stored_weights(captured, path, int8_activations=False)
    assert caught.value.where == str(path)


def test_a_file_that_is_opened_again_is_parsed_once(tmp_path: Path) -> None:
    _, path = written(tmp_path)
    alone = gguf.GGUFReader(path)
    with parsed_once():
        reader = gguf.GGUFReader(path)
        assert gguf.GGUFReader(str(path)) is reader
    assert gguf.GGUFReader(path) is not reader
    assert [field.contents() for field in reader.fields.values()] == [
        field.contents() for field in alone.fields.values()
    ]
    for found, wanted in zip(reader.tensors, alone.tensors, strict=True):
        assert (found.name, found.data_offset) == (wanted.name, wanted.data_offset)
        np.testing.assert_array_equal(found.data, wanted.data)


def test_rows_are_matched_whatever_their_order_and_no_other_row_is() -> None:
    rows = np.random.default_rng(0).standard_normal((12, 6)).astype(np.float32)
    order = np.random.default_rng(1).permutation(12)
    found = matching_rows(rows, torch.from_numpy(rows[order]))
    assert found is not None
    assert found.tolist() == order.tolist()
    changed = rows[order].copy()
    changed[4, 2] = np.nextafter(changed[4, 2], np.float32(10))
    assert matching_rows(rows, torch.from_numpy(changed)) is None
    assert matching_rows(rows, torch.from_numpy(rows[:, :5])) is None


def test_rows_are_matched_in_the_models_type() -> None:
    rows = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    found = matching_rows(rows, torch.from_numpy(rows[::-1].copy()).to(torch.bfloat16))
    assert found is not None
    assert found.tolist() == list(range(7, -1, -1))
