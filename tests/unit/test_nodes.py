"""Ranks and the nodes that they are on."""

from __future__ import annotations

from tetriserve.core.cluster import Nodes


def test_nodes_have_consecutive_ranks() -> None:
    nodes = Nodes(2)
    assert [nodes.of(rank) for rank in range(5)] == [0, 0, 1, 1, 2]
    assert nodes.share((2, 3)) and nodes.share(()) and not nodes.share((1, 2))
    assert nodes.by_node((3, 0, 2)) == {1: (3, 2), 0: (0,)}


def test_without_a_number_one_node_has_every_rank() -> None:
    assert Nodes().share(range(1000))
    assert Nodes().by_node((5, 1)) == {0: (5, 1)}
