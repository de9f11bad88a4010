"""Exchanges among the ranks of a step, as custom ops: `tetriserve::all_to_all` and `tetriserve::all_gather`.

A compiled graph holds an op and how many tokens each member has, not the ranks: one graph serves all teams of a degree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tetriserve.models.team import Team

_team: Team | None = None
"""The team of this process: the ops find it here, out of the compiler's sight."""


def set_team(team: Team | None) -> None:
    """From the next exchange on."""
    global _team
    _team = team


def all_to_all(tensor: torch.Tensor, counts: Sequence[int], num_tokens: int, *, gathers_tokens: bool) -> torch.Tensor:
    """Ulysses' two exchanges; `counts` are the tokens of each member. What goes together is concatenated along B.

    It is the op where a graph is made, else what the op calls, which spares 10 us of dispatch.

    gathers_tokens: (B, own tokens, H, D) becomes (B, all tokens, H / degree, D); otherwise the other way.
    num_tokens: of the result.
    """
    if torch.compiler.is_compiling():
        return torch.ops.tetriserve.all_to_all(tensor, counts, num_tokens, gathers_tokens)  # type: ignore[no-any-return]
    return _all_to_all(tensor, counts, num_tokens, gathers_tokens)


def _all_to_all(tensor: torch.Tensor, counts: Sequence[int], num_tokens: int, gathers_tokens: bool) -> torch.Tensor:
    assert _team is not None
    result = _fake_all_to_all(tensor, counts, num_tokens, gathers_tokens)
    wide, narrow = (tensor, result) if gathers_tokens else (result, tensor)
    by_heads, by_tokens = torch.split(wide, narrow.shape[2], 2), torch.split(narrow, [*counts], 1)
    sends, receives = (by_heads, by_tokens) if gathers_tokens else (by_tokens, by_heads)
    _team.exchange(sends, receives, max(counts) * _token_bytes(narrow))
    return result


def _fake_all_to_all(
    tensor: torch.Tensor, counts: Sequence[int], num_tokens: int, gathers_tokens: bool
) -> torch.Tensor:
    """What `_all_to_all` returns, empty."""
    batch, _, num_heads, width = tensor.shape
    num_heads = num_heads // len(counts) if gathers_tokens else num_heads * len(counts)
    return tensor.new_empty(batch, num_tokens, num_heads, width)


def _all_gather(tensor: torch.Tensor, dim: int, counts: list[int]) -> torch.Tensor:
    """The members' parts one after the other, along `dim`."""
    assert _team is not None
    part, whole = tensor.movedim(dim, 1), _fake_all_gather(tensor, dim, counts)
    parts = torch.split(whole.movedim(dim, 1), counts, 1)
    _team.exchange([part] * len(counts), parts, max(counts) * _token_bytes(part))
    return whole


def _fake_all_gather(tensor: torch.Tensor, dim: int, counts: Sequence[int]) -> torch.Tensor:
    """What `_all_gather` returns, empty."""
    shape = [*tensor.shape]
    shape[dim] = sum(counts)
    return tensor.new_empty(shape)


def _token_bytes(tensor: torch.Tensor) -> int:
    """Of one token of all the batch; (B, tokens, ...)."""
    return math.prod((tensor.shape[0], *tensor.shape[2:])) * tensor.element_size()


_library = torch.library.Library("tetriserve", "DEF")  # type: ignore[no-untyped-call]
for _schema, _kernel, _fake in (
    (
        "all_to_all(Tensor tensor, SymInt[] counts, SymInt num_tokens, bool gathers_tokens) -> Tensor",
        _all_to_all,
        _fake_all_to_all,
    ),
    ("all_gather(Tensor tensor, int dim, SymInt[] counts) -> Tensor", _all_gather, _fake_all_gather),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema)  # type: ignore[no-untyped-call]
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"tetriserve::{_name}", _fake, lib=_library)
