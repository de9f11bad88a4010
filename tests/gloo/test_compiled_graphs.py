"""What the compiler sees of teams: one graph of a block per degree, whatever the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from tetriserve.models.parallel import SequenceParallel

NUM_TEXT, SIDE, WIDTH, HEADS = 16, 8, 32, 4
TEAMS = [(2, 0), (2, 1), (4, 3), (1, 0), (4, 0), (2, 1), (4, 2), (1, 0), (2, 0), (4, 1)]
"""Degree and index, as this process takes part in one team after the other: six teams, and degree 1."""


@dataclass(frozen=True)
class Echo:
    """A team whose other members send what this rank sends them."""

    degree: int
    index: int

    def exchange(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], largest_bytes: int) -> None:
        for sent, received in zip(sends, receives, strict=True):
            received.copy_(sent)


def inputs(num_text: int, side: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, side * side, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, num_text, WIDTH, generator=generator),
        "pooled_projections": torch.randn(1, WIDTH, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(side * side, 3),
        "txt_ids": torch.zeros(num_text, 3),
        "return_dict": False,
    }


@pytest.fixture
def transformer() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=HEADS,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip


@torch.no_grad()
def test_each_degree_has_one_graph_of_each_kind_of_block(transformer: Any) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    parallel, plain = SequenceParallel(transformer), {}
    for degree, index in TEAMS:
        parallel.use(Echo(degree, index) if degree > 1 else None)
        plain[degree, index] = transformer(**inputs(NUM_TEXT, SIDE))[0]
    transformer.compile_repeated_blocks(fullgraph=True, backend=count)
    num_graphs: dict[int, int] = {}
    for degree, index in TEAMS:
        parallel.use(Echo(degree, index) if degree > 1 else None)
        compiled = transformer(**inputs(NUM_TEXT, SIDE))[0]
        assert torch.allclose(compiled, plain[degree, index], atol=1e-5), (degree, index)
        num_graphs.setdefault(degree, len(graphs))
    # A double and a single block each; and the order in which they come first.
    assert num_graphs == {2: 2, 4: 4, 1: 6}
    assert len(graphs) == 6, "no team after the first of its degree adds one"
    ops = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert "tetriserve.all_to_all" in ops
    assert not any("c10d" in op or "group" in op for op in ops)
