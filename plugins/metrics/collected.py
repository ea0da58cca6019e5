"""What metrics over whole sets of images have in common: keeping the rows, and refusing too few."""

import torch
from jaxtyping import Float
from torch import Tensor

import sandbox


class Collected:
    """The rows seen so far of one side; metrics share the tensors, none copies them."""

    def __init__(self, metric: str, side: str) -> None:
        self.metric, self.side = metric, side
        self.rows: list[Tensor] = []

    def add(self, rows: Float[Tensor, "b d"]) -> None:
        self.rows.append(rows.detach())

    def all(self, at_least: int, why: str) -> Float[Tensor, "n d"]:
        """Everything seen, in float64. Raises SandboxError where that is too little."""
        count = sum(len(rows) for rows in self.rows)
        if count < at_least:
            raise sandbox.SandboxError(
                f"{self.metric}: {count} {self.side} images are too few for {why}: "
                f"evaluate at least {at_least}"
            )
        rows = torch.cat(self.rows).double()
        refuse_nan(self.metric, self.side, rows)
        return rows


def refuse_nan(metric: str, side: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise sandbox.RunError(
            f"{metric}: the features of the {side} images are not all finite: "
            "the extractor or the images hold NaN or infinity"
        )
