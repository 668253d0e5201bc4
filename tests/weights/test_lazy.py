from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from memcompile.errors import MemcompileError
from memcompile.weights.codebook import codebook
from memcompile.weights.lazy import (
    Cast,
    Concat,
    Held,
    LazyTensor,
    Mapped,
    Narrow,
    Reshape,
    Stored,
    Take,
    Transpose,
)
from memcompile.weights.methods import METHODS, quantize
from memcompile.weights.parameter import (
    LazyParameter,
    expression_of,
    hollow,
    hollowed,
    materialise,
    parameter,
    remembering,
    stands_for,
    unhollow,
)
from memcompile.weights.safetensors_files import file_tensors, folder_tensors


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Stored, torch.Tensor]:
    """A bfloat16 tensor [65,48] on disk, and in memory; it is not the first of its file."""
    value = torch.randn(65, 48, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    save_file({"a": torch.ones(7), "w": value, "scalar": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    found = folder_tensors(tmp_path)
    assert found is not None
    tensor = found["w"]
    assert isinstance(tensor, Stored)
    return tensor, value


def _double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


EXPRESSIONS: dict[str, tuple[Callable[[LazyTensor], LazyTensor], Callable[[torch.Tensor], Any]]] = {
    "cast": (lambda t: Cast(t, torch.float32), lambda v: v.float()),
    "narrow rows": (lambda t: Narrow(t, 0, 3, 40), lambda v: v[3:43]),
    "narrow columns": (lambda t: Narrow(t, 1, 5, 9), lambda v: v[:, 5:14]),
    "take": (lambda t: Take(t, (4, 0, 64, 4)), lambda v: v[[4, 0, 64, 4]]),
    "concat rows": (lambda t: Concat((t, Narrow(t, 0, 2, 3), t), 0), lambda v: torch.cat([v, v[2:5], v])),
    "concat columns": (lambda t: Concat((t, t), 1), lambda v: torch.cat([v, v], 1)),
    "transpose": (lambda t: Transpose(t), lambda v: v.t()),
    "reshape finer": (lambda t: Reshape(t, (65 * 3, 16)), lambda v: v.reshape(-1, 16)),
    "reshape coarser": (lambda t: Reshape(t, (5, 13 * 48)), lambda v: v.reshape(5, -1)),
    "reshape flat": (lambda t: Reshape(t, (65 * 48,)), lambda v: v.reshape(-1)),
    "mapped": (lambda t: Mapped(t, _double, (65, 48), torch.bfloat16), lambda v: v * 2),
    "a mixture": (
        lambda t: Reshape(Cast(Transpose(Concat((t, t), 0)), torch.float64), (24, 260)),
        lambda v: torch.cat([v, v]).t().double().reshape(24, 260),
    ),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
@pytest.mark.parametrize("nbytes", [1, 200, 1 << 20])
def test_pieces_are_the_eager_value_bit_for_bit(
    stored: tuple[Stored, torch.Tensor], name: str, nbytes: int
) -> None:
    lazily, eagerly = EXPRESSIONS[name]
    expression, wanted = lazily(stored[0]), eagerly(stored[1])
    assert expression.shape == tuple(wanted.shape)
    assert expression.dtype == wanted.dtype
    assert torch.equal(torch.cat(list(expression.pieces(nbytes))), wanted)
    assert torch.equal(expression.evaluate(), wanted)


def test_expressions_of_the_same_numbers_are_equal_values(stored: tuple[Stored, torch.Tensor]) -> None:
    def make() -> LazyTensor:
        return Cast(Take(stored[0], (1, 2)), torch.float32)

    assert make() == make()
    assert make().digest() == make().digest()
    assert make() != Cast(Take(stored[0], (2, 1)), torch.float32)
    assert make().digest() != Cast(Take(stored[0], (2, 1)), torch.float32).digest()


def test_tensors_in_memory_are_equal_to_themselves_only() -> None:
    value = torch.ones(3)
    assert Held(value) == Held(value)
    assert Held(value) != Held(value.clone())
    assert Held(value).digest() == Held(value.clone()).digest()
    assert Held(value).digest() != Held(value * 2).digest()


def test_a_tensor_without_axes_is_read(tmp_path: Path, stored: tuple[Stored, torch.Tensor]) -> None:
    scalar = file_tensors(tmp_path / "model.safetensors")["scalar"]
    assert scalar.shape == ()
    assert float(scalar.evaluate()) == 3.0


def test_a_large_tensor_is_evaluated_in_parts(
    stored: tuple[Stored, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memcompile.weights.lazy.PIECE_BYTES", 256)
    assert torch.equal(Cast(stored[0], torch.float32).evaluate(), stored[1].float())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
def test_quantised_on_disk_equals_quantised_in_memory(
    stored: tuple[Stored, torch.Tensor], method: str, zero_point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memcompile.weights.methods.TOGETHER", 48 * 7)
    monkeypatch.setattr("memcompile.weights.methods.PIECE_BYTES", 48 * 4 * 20)
    options = {"bits": 4, "block": 32, "zero_point": zero_point, "method": method}
    lazily = quantize(parameter(stored[0]), **options)  # type: ignore[arg-type]
    eagerly = quantize(stored[1], **options)  # type: ignore[arg-type]
    assert lazily.nbytes == eagerly.nbytes
    assert lazily.tensors().keys() == eagerly.tensors().keys()
    for name, tensor in eagerly.tensors().items():
        part = lazily.tensors()[name]
        assert isinstance(part, LazyParameter)
        assert torch.equal(part.expression.evaluate(), tensor)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_table_of_a_weight_on_disk_is_that_of_one_in_memory(
    stored: tuple[Stored, torch.Tensor], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memcompile.weights.codebook.TOGETHER", 48 * 7)
    monkeypatch.setattr("memcompile.weights.codebook.PIECE_BYTES", 48 * 4 * 20)
    lazily, eagerly = (codebook(weight, bits=bits, block=32) for weight in (parameter(stored[0]), stored[1]))
    assert lazily.tensors().keys() == eagerly.tensors().keys() == {"codes", "scales", "table"}
    for name, tensor in eagerly.tensors().items():
        part = lazily.tensors()[name]
        assert isinstance(part, LazyParameter)
        assert part.shape == tensor.shape
        assert torch.equal(part.expression.evaluate(), tensor)


def test_a_table_weighed_by_inputs_is_made_at_once(stored: tuple[Stored, torch.Tensor]) -> None:
    moments = torch.rand(stored[1].shape[1]) ** 4
    lazily, eagerly = (
        codebook(weight, bits=3, block=32, moments=moments) for weight in (parameter(stored[0]), stored[1])
    )
    assert not torch.equal(eagerly.codes, codebook(stored[1], bits=3, block=32).codes)
    for name, tensor in eagerly.tensors().items():
        assert not isinstance(lazily.tensors()[name], LazyParameter)
        assert torch.equal(lazily.tensors()[name], tensor)


def test_views_and_casts_of_a_parameter_stay_lazy(stored: tuple[Stored, torch.Tensor]) -> None:
    lazy, value = parameter(stored[0]), stored[1]
    assert isinstance(lazy, torch.nn.Parameter)
    pairs = [
        (lazy.detach().t(), value.t()),
        (lazy.t().t(), value),
        (lazy.float(), value.float()),
        (lazy.to(torch.float16), value.to(torch.float16)),
        (lazy[3:7, :5], value[3:7, :5]),
        (lazy.reshape(-1, 16), value.reshape(-1, 16)),
        (torch.cat([lazy, lazy]), torch.cat([value, value])),
        (torch.stack([lazy, lazy]), torch.stack([value, value])),
        (lazy.chunk(2)[1], value.chunk(2)[1]),
        (lazy.transpose(0, 1), value.transpose(0, 1)),
    ]
    for made, wanted in pairs:
        assert isinstance(made, LazyParameter)
        assert made.shape == wanted.shape
        assert torch.equal(made.expression.evaluate(), wanted)
    assert expression_of(lazy.t().t()) == lazy.expression


def test_an_operation_evaluates_what_it_is_given(
    stored: tuple[Stored, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy, value = parameter(Cast(stored[0], torch.float32)), stored[1].float()
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[1, 64], [1, 0]])
    assert torch.equal(torch.nn.functional.linear(x, lazy), torch.nn.functional.linear(x, value))
    assert torch.equal(torch.nn.functional.embedding(ids, lazy), value[ids])
    assert torch.equal(lazy + 1, value + 1)
    assert float(lazy.sum()) == float(value.sum())
    monkeypatch.setattr("memcompile.weights.parameter._WHOLE_BYTES", 0)
    monkeypatch.setattr("memcompile.weights.lazy.PIECE_BYTES", 48 * 4 * 10)
    torch.testing.assert_close(
        torch.nn.functional.linear(x, lazy, torch.ones(65)), x @ value.t() + 1, rtol=1e-5, atol=1e-5
    )


def test_weights_are_remembered_up_to_a_number_of_bytes(
    stored: tuple[Stored, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    original = Stored.read

    def read(self: Stored, begin: int, end: int) -> torch.Tensor:
        reads.append("read")
        return original(self, begin, end)

    monkeypatch.setattr(Stored, "read", read)
    lazy = parameter(stored[0])
    for room, wanted in ((stored[0].nbytes, 1), (stored[0].nbytes - 1, 3)):
        reads.clear()
        with remembering(room):
            for _ in range(3):
                lazy.sum()
        assert len(reads) == wanted


def test_tracing_sees_tensors_without_memory(stored: tuple[Stored, torch.Tensor]) -> None:
    module = torch.nn.Linear(48, 65, bias=False)
    lazy = parameter(stored[0])
    module.weight = lazy
    with hollowed(module):
        traced = module.weight
        assert traced.untyped_storage().nbytes() == 0
        assert traced.shape == lazy.shape
        assert stands_for(traced) is lazy
        unhollow(module)
        assert module.weight is lazy
    assert module.weight is lazy
    assert hollow(stored[1]) is stored[1]


def test_what_is_materialised_stays_tied(stored: tuple[Stored, torch.Tensor]) -> None:
    first, second = torch.nn.Linear(48, 65, bias=False), torch.nn.Linear(48, 65, bias=False)
    first.weight, second.weight = parameter(stored[0]), parameter(stored[0])
    materialise(first, second)
    assert first.weight is second.weight
    assert isinstance(first.weight, torch.nn.Parameter)
    assert first.weight.requires_grad
    assert torch.equal(first.weight, stored[1])
    assert isinstance(expression_of(first.weight), Held)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-10], "w does not fit the file"),
        (lambda data: b"\xff" * 8 + data[8:], "its header would take"),
        (lambda data: data[:8] + b"?" + data[9:], "its header is not JSON"),
        (lambda data: data.replace(b'"BF16"', b'"BF17"'), "the entry of w"),
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: Path, stored: tuple[Stored, torch.Tensor], damage: object, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(MemcompileError, match="MC202") as raised:
        file_tensors(path)
    assert message in str(raised.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "gone.safetensors"}}')
    with pytest.raises(MemcompileError, match=r"gone\.safetensors"):
        folder_tensors(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "a/model.safetensors"])
def test_an_index_names_no_file_outside_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(MemcompileError, match=r"MC202.*not a file of the folder"):
        folder_tensors(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]},
        {"dtype": "U8", "shape": [-2, -2], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
    ],
    ids=["before the data", "negative sizes", "behind the end"],
)
def test_a_tensor_lies_inside_its_file(entry: dict[str, Any], tmp_path: Path) -> None:
    header = json.dumps({"weight": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(MemcompileError, match=r"MC202.*does not fit the file"):
        file_tensors(path)
