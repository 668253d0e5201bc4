"""Run the model and its captured graph on a probe: a mask or scale read wrongly shows as another output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memcompile.errors import MemcompileError
from memcompile.frontend.captured import evaluating
from memcompile.regions import attention_nodes

# float32 sums in another order differ by less than 1e-6; larger differences mean another function
TOLERANCE = 1e-4
HALF_PRECISION_TOLERANCE = 0.05
# attention outputs are compared over this many tokens: a long example's would not fit in memory
COMPARED_TOKENS = 64

_TEXT_INPUTS = {"input_ids", "position_ids", "attention_mask", "token_type_ids"}


def verify_capture(
    model: PreTrainedModel, graph: fx.GraphModule, inputs: Mapping[str, torch.Tensor], logits: int | None
) -> None:
    """Compare outputs, and where the model's attention function is a registered one every attention's output.

    An encoder's attention can be so even that a wrong scale hardly moves the model's output; it moves the
    attention's own. The graph goes on with the model's outputs, so that rounding does not add up over layers.
    Errors are relative to the largest value of what is compared.

    Raises:
        MemcompileError: MC204, the graph differs from the model.
    """
    values = probe_inputs(model, inputs)
    extra = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
    with evaluating(model), torch.no_grad():
        with _recorded_attention(model) as attention:
            expected = model(**values, **extra)
        recorder = _Recorder(graph, attention)
        got = recorder.run(*values.values())
    padding = values.get("attention_mask")
    rows = padding.bool() if padding is not None and padding.ndim == 2 else None
    if len(attention) == len(recorder.attention):
        for (node, have), want in zip(recorder.attention, attention, strict=True):
            seen = None if rows is None else rows[:, :COMPARED_TOKENS]
            what = f"the output of attention {node.kwargs.get('region') or node.name}"
            _compare(model, what, want, have, seen)
    if logits is not None:
        pairs = [(expected["logits"], got[logits])]
    else:
        leaves = torch.utils._pytree.tree_leaves(expected)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        pairs = list(zip(tensors, [value for value in got if isinstance(value, torch.Tensor)], strict=False))
    for want, have in pairs:
        _compare(model, "its outputs", want, have, rows)


def probe_inputs(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs of the same shapes with random tokens or pixels: among equal tokens no scale shows.

    Masks and positions stay, and so do tokens beside other kinds of input, whose places may mean something.
    """
    values = dict(inputs)
    generator = torch.Generator().manual_seed(0)
    if "input_ids" in values and values.keys() <= _TEXT_INPUTS:
        vocabulary = int(model.config.get_text_config().vocab_size)
        ids = values["input_ids"]
        values["input_ids"] = torch.randint(0, vocabulary, ids.shape, generator=generator).to(ids)
    elif values.keys() == {"pixel_values"}:
        pixels = values["pixel_values"]
        values["pixel_values"] = torch.randn(pixels.shape, generator=generator).to(pixels)
    return values


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what its attention nodes give, [B,T,H,D]; goes on with as many `given`."""

    def __init__(self, graph: fx.GraphModule, given: Sequence[torch.Tensor]) -> None:
        super().__init__(graph)
        self.attention: list[tuple[fx.Node, torch.Tensor]] = []
        self._nodes = set(attention_nodes(graph))
        self._given = given if len(given) == len(self._nodes) else ()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._nodes:
            compared = result[0].transpose(1, 2)[:, :COMPARED_TOKENS]
            self.attention.append((n, compared.clone()))
            index = len(self.attention) - 1
            if self._given and self._given[index].shape == compared.shape:
                compared.copy_(self._given[index])
        return result


@contextlib.contextmanager
def _recorded_attention(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """What the model's own attention function gives, in the order of its calls; nothing when it has none."""
    outputs: list[torch.Tensor] = []
    name = model.config._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS.get(name, None)
    if original is None:
        yield outputs
        return

    def recorded(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        outputs.append(result[0][:, :COMPARED_TOKENS].clone())
        return result

    AttentionInterface.register(name, recorded)
    try:
        yield outputs
    finally:
        AttentionInterface.register(name, original)


def _compare(
    model: PreTrainedModel, what: str, want: torch.Tensor, have: torch.Tensor, rows: torch.Tensor | None
) -> None:
    if want.shape != have.shape:
        error = float("inf")
    else:
        if rows is not None and want.shape[:2] == rows.shape:
            # a padded query sees nothing: what it gives means nothing
            want, have = want[rows], have[rows]
        size = float(want.abs().max()) or 1.0
        error = float((want.float() - have.float()).abs().max()) / size
    tolerance = TOLERANCE if want.dtype == torch.float32 else HALF_PRECISION_TOLERANCE
    if not error <= tolerance:
        raise MemcompileError(
            "MC204",
            f"the captured graph of {type(model).__name__} differs from the model by {error:.2e} "
            f"of the largest value of {what} (allowed {tolerance:.0e})",
            where=type(model).__name__,
            fix="report this model: its attention does something that the capture does not know",
        )
