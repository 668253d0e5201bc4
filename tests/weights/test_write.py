from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from memcompile.artifact.store import JOURNAL, UNFINISHED, ArtifactWriter
from memcompile.weights import write as writing
from memcompile.weights.lazy import Cast, Held, LazyTensor, Reshape, Stored
from memcompile.weights.methods import QuantizeRows, quantize
from memcompile.weights.parameter import expression_of, parameter
from memcompile.weights.safetensors_files import file_tensors
from memcompile.weights.write import Place, watched, write_tensors


@pytest.fixture
def tensors(tmp_path: Path) -> list[LazyTensor]:
    generator = torch.Generator().manual_seed(0)
    values = {f"w{i}": torch.randn(33, 40 + i, generator=generator) for i in range(5)}
    save_file(values, tmp_path / "source.safetensors")
    return [Cast(t, torch.float16) for t in file_tensors(tmp_path / "source.safetensors").values()]


def _bytes(tensor: LazyTensor) -> bytes:
    return tensor.evaluate().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PIECE_BYTES", 500)


def _check(path: Path, tensors: list[LazyTensor], places: list[Place]) -> None:
    data = path.read_bytes()
    for tensor, place in zip(tensors, places, strict=True):
        assert data[place.offset : place.offset + place.length] == _bytes(tensor)
    assert {file.name for file in path.parent.iterdir()} <= {path.name, "source.safetensors"}


def test_the_file_holds_what_the_expressions_evaluate_to(tmp_path: Path, tensors: list[LazyTensor]) -> None:
    _check(tmp_path / "out.bin", tensors, write_tensors(tmp_path / "out.bin", tensors))
    assert (tmp_path / "out.bin").stat().st_size == sum(tensor.nbytes for tensor in tensors)


def test_equal_tensors_are_stored_once(tmp_path: Path, tensors: list[LazyTensor]) -> None:
    copy = Held(tensors[0].evaluate())
    given = [tensors[0], tensors[1], tensors[0], Reshape(tensors[0], (33 * 40,)), copy, tensors[2]]
    places = write_tensors(tmp_path / "out.bin", given)
    _check(tmp_path / "out.bin", given, places)
    assert len(set(places)) == 3
    assert (tmp_path / "out.bin").stat().st_size == sum(tensor.nbytes for tensor in tensors[:3])


def test_a_weight_is_quantised_once_for_all_its_parts(
    tmp_path: Path, tensors: list[LazyTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[QuantizeRows] = []
    original = QuantizeRows.produce

    def produce(self: QuantizeRows) -> dict[str, torch.Tensor]:
        made.append(self)
        return original(self)

    monkeypatch.setattr(QuantizeRows, "produce", produce)
    parts: list[LazyTensor] = []
    for tensor in tensors:
        found = quantize(parameter(tensor), bits=4, block=16, zero_point="integer", method="rtn")
        parts += [expression_of(part) for part in found.tensors().values()]
    places = write_tensors(tmp_path / "out.bin", parts)
    assert len(made) == len(tensors)
    _check(tmp_path / "out.bin", parts, places)


def test_a_tensor_is_read_a_piece_at_a_time(
    tmp_path: Path, tensors: list[LazyTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memcompile.weights.methods.TOGETHER", 45)
    monkeypatch.setattr("memcompile.weights.methods.PIECE_BYTES", 500)
    read: list[int] = []
    original = Stored.read

    def reading(self: Stored, begin: int, end: int) -> torch.Tensor:
        got = original(self, begin, end)
        read.append(got.nbytes)
        return got

    monkeypatch.setattr(Stored, "read", reading)
    found = quantize(parameter(tensors[0]), bits=8, block=16, zero_point="none", method="rtn")
    parts = [expression_of(part) for part in found.tensors().values()]
    write_tensors(tmp_path / "out.bin", [*tensors, *parts])
    assert max(read) <= 2 * 500, "float32 on disk takes twice the bytes of the float16 that are written"


def test_progress_is_told_and_ends_at_the_total(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with watched(lambda done, total: told.append((done, total))):
        write_tensors(tmp_path / "out.bin", [Held(torch.zeros(3 << 18))])
    assert told[-1] == (3, 3)


class _Killed(BaseException):
    pass


def _interrupted(tmp_path: Path, tensors: list[LazyTensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Write until the fourth tensor, then stop as a killed process does: without tidying up."""
    original = Stored.read

    def read(self: Stored, begin: int, end: int) -> torch.Tensor:
        if self == tensors[3].source:  # type: ignore[attr-defined]
            raise _Killed
        return original(self, begin, end)

    with monkeypatch.context() as patched:
        patched.setattr(Stored, "read", read)
        with pytest.raises(_Killed):
            write_tensors(tmp_path / "out.bin", tensors)


def _evaluated(monkeypatch: pytest.MonkeyPatch) -> set[Stored]:
    seen: set[Stored] = set()
    original = Stored.read

    def read(self: Stored, begin: int, end: int) -> torch.Tensor:
        seen.add(self)
        return original(self, begin, end)

    monkeypatch.setattr(Stored, "read", read)
    return seen


def test_an_interrupted_write_goes_on(
    tmp_path: Path, tensors: list[LazyTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupted(tmp_path, tensors, monkeypatch)
    assert not (tmp_path / "out.bin").exists()
    with monkeypatch.context() as patched:
        read = _evaluated(patched)
        places = write_tensors(tmp_path / "out.bin", tensors)
    assert read == {tensor.source for tensor in tensors[3:]}  # type: ignore[attr-defined]
    _check(tmp_path / "out.bin", tensors, places)


@pytest.mark.parametrize("what", ["bytes", "tensor", "journal"])
def test_what_does_not_fit_is_written_again(
    tmp_path: Path, tensors: list[LazyTensor], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    _interrupted(tmp_path, tensors, monkeypatch)
    unfinished, journal = (tmp_path / f".out.bin{end}" for end in (UNFINISHED, JOURNAL))
    if what == "bytes":
        data = bytearray(unfinished.read_bytes())
        data[tensors[0].nbytes + 3] ^= 1
        unfinished.write_bytes(data)
    elif what == "tensor":
        tensors = [tensors[0], *tensors[2:]]
    else:
        journal.write_text(journal.read_text().splitlines()[0] + "\n{half a li")
    with monkeypatch.context() as patched:
        read = _evaluated(patched)
        places = write_tensors(tmp_path / "out.bin", tensors)
    assert read == {tensor.source for tensor in tensors[1:]}  # type: ignore[attr-defined]
    _check(tmp_path / "out.bin", tensors, places)


def test_the_next_writer_of_an_artifact_takes_over_unfinished_weights(tmp_path: Path) -> None:
    dead = tmp_path / ".out.partial-0123456789ab"
    dead.mkdir()
    (dead / f".weights.bin{UNFINISHED}").write_bytes(b"abc")
    (dead / f".weights.bin{JOURNAL}").write_text(json.dumps({}))
    (dead / "model.onnx").write_bytes(b"half")
    with ArtifactWriter(tmp_path / "out") as writer:
        assert {file.name for file in writer.path.iterdir()} == {
            f".weights.bin{UNFINISHED}",
            f".weights.bin{JOURNAL}",
        }
        assert not dead.exists()
