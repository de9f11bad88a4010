"""Weights that all ranks of a machine map: one copy, the same bits, and no rank sees what another writes."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tetriserve.worker.team.region import Region
from tetriserve.worker.weights import share_weights

FILE = "memfd:tetriserve-team"
DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


@pytest.fixture
def region() -> Iterator[Region]:
    region = Region(2, 4096)
    yield region
    region.close()


def weights_of_a_rank() -> list[torch.Tensor]:
    """As each rank loads them: of many sizes and dtypes, one empty, one a number, one with strides of its own."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(100 + 7 * n, 33, generator=generator).to(DTYPES[n % 3]) for n in range(9)]
    kernel = torch.randn(8, 3, 1, 1, generator=generator).to(memory_format=torch.channels_last)
    return [
        torch.nn.Parameter(each, requires_grad=False) for each in (*weights, torch.zeros(0), weights[0][3, 3], kernel)
    ]


def is_shared(tensor: torch.Tensor) -> bool:
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if FILE in line]
    spans = [[int(address, 16) for address in line.split()[0].split("-")] for line in lines]
    return any(first <= tensor.data_ptr() < end for first, end in spans)


def test_ranks_map_one_copy_of_the_same_bits(region: Region) -> None:
    ranks = [weights_of_a_rank() for _ in range(3)]
    for weights in ranks:
        share_weights(weights, region)
        for weight, loaded in zip(weights, weights_of_a_rank(), strict=True):
            assert torch.equal(weight, loaded)
            assert (weight.dtype, weight.shape, weight.stride()) == (loaded.dtype, loaded.shape, loaded.stride())
            assert weight.data_ptr() % 64 == 0, "as torch aligns it"
            assert is_shared(weight) == (weight.numel() > 0)
    num_bytes = sum(weight.nbytes + 64 for weight in ranks[0])
    assert os.fstat(region.file).st_size <= region.num_bytes + num_bytes


def test_what_a_rank_writes_stays_its_own(region: Region) -> None:
    first, second = weights_of_a_rank(), weights_of_a_rank()
    share_weights(first, region)
    share_weights(second, region)
    first[0].zero_()
    second[3].fill_(1)
    third = weights_of_a_rank()
    share_weights(third, region)
    loaded = weights_of_a_rank()
    assert torch.equal(second[0], loaded[0]) and torch.equal(first[3], loaded[3])
    assert all(map(torch.equal, third, loaded))


def test_weights_do_not_touch_the_exchanges(region: Region) -> None:
    before = bytes(region.memory)
    share_weights(weights_of_a_rank(), region)
    assert bytes(region.memory) == before


def test_a_rank_keeps_its_own_of_what_differs(region: Region) -> None:
    """The checkpoint was replaced, or the first rank died over a tensor."""
    share_weights(weights_of_a_rank(), region)
    other = weights_of_a_rank()
    other[1].add_(1)
    kept = other[1].clone()
    share_weights(other, region)
    assert torch.equal(other[1], kept) and not is_shared(other[1])
    assert is_shared(other[0]) and is_shared(other[2])


def test_a_rank_goes_on_where_the_first_died(region: Region) -> None:
    share_weights(weights_of_a_rank()[:4], region)
    weights = weights_of_a_rank()
    share_weights(weights, region)
    assert all(map(torch.equal, weights, weights_of_a_rank()))
    assert is_shared(weights[0]) and is_shared(weights[8])


def test_without_room_ranks_keep_their_own(region: Region, caplog: pytest.LogCaptureFixture) -> None:
    weights = weights_of_a_rank()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (region.num_bytes + 4096, before[1]))
    try:
        share_weights(weights, region)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert all(map(torch.equal, weights, weights_of_a_rank()))
    assert not any(map(is_shared, weights[:9]))
    assert caplog.messages == ["not all weights are shared with the other ranks: File too large"]


def test_models_lie_apart_so_that_a_rank_without_one_shares_the_others(region: Region) -> None:
    first, second = weights_of_a_rank(), weights_of_a_rank()
    second[1].add_(1)
    loaded = [weight.clone() for weight in second]
    share_weights(first, region, place=0)
    share_weights(second, region, place=3)
    alone = [weight.clone() for weight in loaded]
    share_weights(alone, region, place=3)
    assert all(is_shared(weight) for weight in (*first, *second, *alone) if weight.numel())
    assert all(map(torch.equal, alone, loaded)) and all(map(torch.equal, second, loaded))
    taken = os.fstat(region.file).st_blocks * 512
    num_bytes = 2 * sum(weight.nbytes + 64 for weight in first)
    assert taken <= region.num_bytes + num_bytes + 2 * resource.getpagesize(), "only what is written takes memory"
