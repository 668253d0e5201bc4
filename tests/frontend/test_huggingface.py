"""Every family captures with all of its attention regions, and computes what the model computes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from memcompile.errors import MemcompileError
from memcompile.frontend import capture, huggingface
from memcompile.regions import attention_regions
from tests.models import FAMILIES, WINDOW_TOKENS, captured_tiny, save_tiny, tiny_model

HUGGING_FACE = [f for f in FAMILIES if f != "transformer_encoder"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_layer_is_a_region(family: str) -> None:
    captured = captured_tiny(family)
    regions = attention_regions(captured.graph)
    layers = tiny_model(family).config.num_hidden_layers if family in HUGGING_FACE else 2
    assert [r.layer for r in regions] == list(range(layers))
    assert not captured.refusals
    assert all(r.path for r in regions)


@pytest.mark.parametrize(("family", "kinds"), [
    ("llama", ["causal"] * 2), ("mistral", ["sliding_window"] * 2),
    ("gemma3", ["sliding_window", "causal"] * 2), ("bert", ["padding"] * 2), ("vit", ["none"] * 2),
])  # fmt: skip
def test_masks_are_named(family: str, kinds: list[str]) -> None:
    regions = attention_regions(captured_tiny(family).graph)
    assert [r.mask.kind for r in regions] == kinds
    assert {r.window_tokens for r in regions} <= {None, WINDOW_TOKENS}


def test_no_mask_is_built_in_the_graph() -> None:
    targets = {str(n.target) for n in captured_tiny("llama").graph.graph.nodes}
    assert not {t for t in targets if "cumsum" in t or "tril" in t or "masked_fill" in t}


def test_norms_and_rotary_embeddings_are_dialect_operators() -> None:
    targets = [str(n.target) for n in captured_tiny("llama").graph.graph.nodes]
    assert targets.count("memcompile.rms_norm.default") == 5
    assert targets.count("memcompile.rotary.default") == 4


def test_parameters_are_the_models_own_tensors() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    graph = capture(model).graph
    assert {p.data_ptr() for p in graph.parameters()} == {p.data_ptr() for p in model.parameters()}


def test_capture_leaves_the_model_as_it_was() -> None:
    model = tiny_model("mixtral", num_hidden_layers=1).train()
    before = (model.config._attn_implementation, model.config._experts_implementation, model.config.use_cache)
    capture(model)
    after = (model.config._attn_implementation, model.config._experts_implementation, model.config.use_cache)
    assert (before, True) == (after, model.training)
    model.eval()


def test_padding_mask_of_the_caller_is_kept() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    ids = torch.randint(3, 100, (2, 9))
    padding = torch.ones_like(ids)
    padding[1, :4] = 0
    captured = capture(model, {"input_ids": ids, "attention_mask": padding})
    names = [i.name for i in captured.inputs]
    positions = torch.arange(9).repeat(2, 1)
    given = {"input_ids": ids, "attention_mask": padding, "position_ids": positions}
    with torch.no_grad():
        got = captured.graph(*[given[n] for n in names])[captured.logits_index or 0]
        want = model(**given).logits
    torch.testing.assert_close(got[padding.bool()], want[padding.bool()], atol=1e-5, rtol=0)


def test_a_folder_is_a_source(tmp_path: Path) -> None:
    folder = save_tiny("qwen3", tmp_path / "model", num_hidden_layers=1)
    captured = capture(str(folder))
    assert captured.model.family == "qwen3"
    assert captured.model.causal


def test_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MemcompileError, match="MC201") as caught:
        capture(str(tmp_path / "nothing.gguf"))
    assert caught.value.exit_code == 3
    assert caught.value.fix


def test_refuses_what_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(MemcompileError, match=r"MC202.*not a GGUF file"):
        capture(str(file))
    with pytest.raises(MemcompileError, match=r"MC202.*no config.json"):
        capture(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MemcompileError, match=r"MC202.*not JSON"):
        capture(str(tmp_path))


def test_refuses_an_architecture_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchForCausalLM"], "model_type": "no_such"}')
    with pytest.raises(MemcompileError, match=r"MC203.*NoSuchForCausalLM") as caught:
        capture(str(tmp_path))
    assert caught.value.exit_code == 3


class Branching(torch.nn.Module):
    """Takes one of two ways, depending on the values it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x


def test_refuses_a_branch_on_tensor_values_and_shows_its_line() -> None:
    with pytest.raises(MemcompileError, match=r"MC204 torch.export could not trace Branching") as caught:
        capture(Branching(), torch.ones(2, 5, 8))
    assert caught.value.exit_code == 3
    line = inspect.getsourcelines(Branching.forward)[1] + 1
    assert caught.value.where == f"{__file__}:{line}"
    assert "no branches or loops on tensor values" in (caught.value.fix or "")


@pytest.fixture
def _scale_read_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = huggingface._attention

    def sharper(*args: Any, scaling: float, **options: Any) -> tuple[torch.Tensor, None]:
        return attention(*args, scaling=1.2 * scaling, **options)

    monkeypatch.setattr(huggingface, "_attention", sharper)


@pytest.mark.usefixtures("_scale_read_wrongly")
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_refuses_a_graph_with_another_scale_and_leaves_the_model_as_it_was(family: str) -> None:
    model = tiny_model(family, num_hidden_layers=1).train()
    frozen = model.get_submodule("model.norm" if family == "llama" else "embeddings").eval()
    # tokens that are all alike hide a scale: the probe has others
    alike = {"input_ids": torch.full((2, 9), 5)}
    name = type(model).__name__
    own = AttentionInterface()[model.config._attn_implementation]
    with pytest.raises(
        MemcompileError, match=rf"MC204 .* {name} differs from the model .* attention 0"
    ) as caught:
        capture(model, alike)
    assert caught.value.where == name
    assert "its attention does something" in (caught.value.fix or "")
    assert model.training
    assert not frozen.training
    assert AttentionInterface()[model.config._attn_implementation] is own


@pytest.mark.parametrize(
    ("module", "code"),
    [
        (torch.nn.Linear(3, 3), "MC205"),
        (torch.nn.Sequential(Branching(), torch.nn.Dropout().eval()), "MC204"),
    ],
    ids=["inputs do not fit", "not traceable"],
)
def test_a_refused_capture_leaves_a_module_as_it_was(module: torch.nn.Module, code: str) -> None:
    before = [part.training for part in module.modules()]
    with pytest.raises(MemcompileError, match=code):
        capture(module, torch.ones(2, 5, 8))
    assert [part.training for part in module.modules()] == before


def test_refuses_a_module_without_example_inputs() -> None:
    with pytest.raises(MemcompileError, match="MC205"):
        capture(torch.nn.Linear(2, 2))


def test_a_factory_is_a_source() -> None:
    captured = capture("tests.models:encoder_factory")
    assert len(attention_regions(captured.graph)) == 2
    with pytest.raises(MemcompileError, match="MC201"):
        capture("tests.models:no_such_factory")


def test_a_model_with_fewer_positions_than_the_probe_is_captured() -> None:
    captured = capture(tiny_model("gpt2", n_positions=40, n_layer=1))
    assert captured.example_inputs["input_ids"].shape == (2, 40)
