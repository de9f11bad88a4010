"""Names of live process groups: one per set of ranks, never used twice, capped."""

from __future__ import annotations

from tetriserve.executor.groups import GroupTable


def test_a_set_of_ranks_keeps_its_name_and_another_gets_another() -> None:
    table = GroupTable(8)
    first = table.name((0, 1))
    assert table.name((0, 1)) == first
    assert len({first, table.name((1, 2)), table.name((0, 1, 2))}) == 3


def test_order_of_ranks_matters_because_the_leader_comes_first() -> None:
    table = GroupTable(8)
    assert table.name((0, 1)) != table.name((1, 0))


def test_beyond_the_cap_the_least_recently_used_goes_first() -> None:
    table = GroupTable(2)
    names = {ranks: table.name(ranks) for ranks in ((0, 1), (1, 2), (2, 3))}
    table.name((0, 1))
    assert table.surplus(()) == [((1, 2), names[1, 2])]
    assert table.surplus(()) == []
    assert (table.name((0, 1)), table.name((2, 3))) == (names[0, 1], names[2, 3])


def test_a_group_in_use_is_kept_beyond_the_cap() -> None:
    table = GroupTable(1)
    for ranks in ((0, 1), (2, 3), (4, 5)):
        table.name(ranks)
    assert [ranks for ranks, _ in table.surplus({(0, 1), (4, 5)})] == [(2, 3)]
    assert [ranks for ranks, _ in table.surplus({(4, 5)})] == [(0, 1)]


def test_a_dead_rank_breaks_exactly_its_groups() -> None:
    table = GroupTable(8)
    names = {ranks: table.name(ranks) for ranks in ((0, 1), (2, 3), (1, 2))}
    assert sorted(table.broken(1)) == [((0, 1), names[0, 1]), ((1, 2), names[1, 2])]
    assert table.broken(1) == []
    assert table.name((2, 3)) == names[2, 3]


def test_a_group_can_be_taken_out_by_its_name() -> None:
    table = GroupTable(8)
    name = table.name((0, 1))
    assert table.discard_named("group-of-nobody") is None
    assert table.discard_named(name) == (0, 1)
    assert table.discard_named(name) is None
    assert table.name((0, 1)) != name


def test_a_group_formed_again_gets_a_name_of_its_own() -> None:
    table = GroupTable(1)
    used = {table.name((0, 1))}
    table.broken(0)
    used.add(table.name((0, 1)))
    assert table.discard((0, 1)) in used
    assert table.discard((0, 1)) is None
    used.add(table.name((0, 1)))
    table.name((2, 3))
    assert [ranks for ranks, _ in table.surplus(())] == [(0, 1)]
    used.add(table.name((0, 1)))
    assert len(used) == 4
