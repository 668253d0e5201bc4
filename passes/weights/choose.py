"""Choose 4 or 8 bits for each weight under the budget of a plan."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import fx

from memcompile.calibrate.collect import Calibration, CalibrationData
from memcompile.dialect.quantized_weights import stored_bytes
from memcompile.passes.weights.sensitivity import Change, measure_sensitivity
from memcompile.progress import Progress
from memcompile.regions import WeightRegion
from memcompile.weights.methods import quantize
from memcompile.weights.mixed import Option, allocate

if TYPE_CHECKING:
    from memcompile.passes.weights.quantize import WeightsConfig

CHOICES: Final = (8, 4)


def choose_bits(
    graph_module: fx.GraphModule,
    regions: Sequence[WeightRegion],
    config: WeightsConfig,
    data: CalibrationData,
    progress: Progress,
) -> Calibration:
    """Bits and predicted loss of every region. Regions that share a weight get the same bits.

    The losses are those of rounding to nearest (or HQQ), whatever the method: they rank the weights. They do
    not depend on the budget, so another budget of the same plan measures nothing again.
    """
    zero_point, block = config.zero_point, config.block_size
    method = "hqq" if config.method == "hqq" else "rtn"

    def at(bits: int) -> Change:
        def change(region: WeightRegion) -> torch.Tensor:
            weight = region.stored
            assert weight is not None
            return quantize(
                weight.float(), bits=bits, block=block, zero_point=zero_point, method=method
            ).dequantized()

        return change

    digest, losses = measure_sensitivity(
        graph_module,
        regions,
        {str(bits): at(bits) for bits in CHOICES},
        (block, zero_point, method),
        data,
        progress,
    )
    sharing: dict[str, list[WeightRegion]] = defaultdict(list)
    for region in regions:
        sharing[str(region.weight.target)].append(region)
    options: dict[str, tuple[Option, ...]] = {}
    for target, members in sharing.items():
        first, loss = members[0], sum(losses[member.region] for member in members)
        assert isinstance(loss, torch.Tensor)
        options[target] = tuple(
            Option(
                bits,
                stored_bytes(
                    first.rows, first.width, block, bits,
                    zero_points=zero_point == "integer", offsets=zero_point == "float",
                ),
                float(loss[index]),
            )
            for index, bits in enumerate(CHOICES)
        )  # fmt: skip
    max_bytes: float | None = config.max_bytes
    if config.average_bits is not None:
        # bytes go in a straight line with bits: scales stay
        most, least = (sum(found[index].nbytes for found in options.values()) for index in (0, -1))
        max_bytes = least + (most - least) * (config.average_bits - CHOICES[-1]) / (CHOICES[0] - CHOICES[-1])
    found = allocate(options, max_bytes=max_bytes, max_loss=config.max_loss)
    statistics = {}
    for target, members in sharing.items():
        bits = found.bits[target]
        for member in members:
            loss = losses[member.region][CHOICES.index(bits)]
            statistics[member.region] = {"bits": torch.tensor(bits), "loss": loss}
    return Calibration(digest, len(data.windows), statistics)


def joined(codes: Calibration, chosen: Calibration) -> Calibration:
    """Codes, and the bits they were given, as one calibration."""
    digest = hashlib.sha256(f"{codes.digest} {chosen.digest}".encode()).hexdigest()
    names = {*codes.statistics, *chosen.statistics}
    statistics = {
        name: {**chosen.statistics.get(name, {}), **codes.statistics.get(name, {})} for name in sorted(names)
    }
    return Calibration(digest, codes.windows, statistics)
