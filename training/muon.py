"""Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal before each step.

torch's own takes matrices only; convolutions profit as much, flattened to (out, in x height x width).
"""

from __future__ import annotations

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Steps as large as AdamW's (Liu et al. 2025, section 2.2), so that both share one learning rate."""

    def __init__(self, parameters: list[torch.nn.Parameter], momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - momentum)
                update = orthogonal(parameter.grad.lerp(mean, momentum).flatten(1))
                parameter.mul_(1 - rate * decay)
                scale = 0.2 * max(update.shape) ** 0.5
                parameter.add_(update.view_as(parameter), alpha=-rate * scale)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of the matrix's singular value decomposition U S V^T, by Newton and Schulz's iteration."""
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x: torch.Tensor = (matrix.T if is_tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if is_tall else x).to(matrix.dtype)


def split(
    module: torch.nn.Module, blocks: list[torch.nn.Module]
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The weights of the linear and convolutional layers in `blocks`, which Muon is for, and all others of `module`."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, kinds)]
    weights = [layer.get_parameter("weight") for layer in layers]
    numbers = {id(weight) for weight in weights}
    return weights, [parameter for parameter in module.parameters() if id(parameter) not in numbers]
