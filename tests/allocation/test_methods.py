import pytest

from cptquant.allocation.methods import ALLOCATORS, find_allocator
from cptquant.core.errors import UserError


def test_names_are_the_methods_own():
    assert {name: allocator.name for name, allocator in ALLOCATORS.items()} == {name: name for name in ALLOCATORS}
    assert find_allocator("knapsack") is ALLOCATORS["knapsack"]


def test_only_methods_that_read_a_table_ask_for_one():
    assert {name for name, allocator in ALLOCATORS.items() if allocator.needs_table} == {"knapsack", "kmeans"}


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(UserError) as caught:
        find_allocator("milp")
    assert str(caught.value) == (
        "--allocator 'milp' is unknown; choose one of: knapsack, kmeans, uniform, first_last, random"
    )
