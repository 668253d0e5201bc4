"""The rewritten model as a drop-in `nn.Module`: the original's call and output type, and gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from memcompile.backends.torch.placement import place
from memcompile.errors import MemcompileError

if TYPE_CHECKING:
    from memcompile.frontend.captured import Captured


class RewrittenModule(torch.nn.Module):
    """Called like the model it was captured from; parameters are the model's own tensors.

    It runs where its inputs are: `module.to("cuda")` moves parameters, and the graph follows the first input.
    """

    def __init__(self, captured: Captured) -> None:
        super().__init__()
        self.graph_module = captured.graph
        self._names = tuple(spec.name for spec in captured.inputs)
        self._rebuild = captured.rebuild
        # inner graphs are shared with other copies of the graph, so their device is not known before a call
        self._device: torch.device | None = None

    def forward(self, *args: torch.Tensor, **kwargs: Any) -> Any:
        """Run the graph. `position_ids` may be left out where the model would count them itself.

        Raises MC205 for inputs that were not among the example inputs of the capture.
        """
        given = dict(zip(self._names, args, strict=False)) | {
            k: v for k, v in kwargs.items() if v is not None
        }
        given.pop("use_cache", None)
        given.pop("return_dict", None)
        if "position_ids" in self._names and "position_ids" not in given and "input_ids" in given:
            given["position_ids"] = _count_positions(given["input_ids"], given.get("attention_mask"))
        unknown, missing = set(given) - set(self._names), set(self._names) - set(given)
        if unknown or missing:
            raise MemcompileError(
                "MC205",
                f"the model was captured with inputs {list(self._names)}; "
                + (f"unknown: {sorted(unknown)}" if unknown else f"missing: {sorted(missing)}"),
                fix="call it with the inputs it was captured with, or capture it with these example inputs",
            )
        inputs = [given[name] for name in self._names]
        if inputs[0].device != self._device:
            place(self.graph_module, inputs[0].device)
            self._device = inputs[0].device
        return self._rebuild(self.graph_module(*inputs))


def _count_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    # transformers' models count from the first slot, padded or not
    return (
        torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0).expand(input_ids.shape[0], -1)
    )
