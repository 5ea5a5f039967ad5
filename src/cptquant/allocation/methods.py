"""The spellings of `--allocator`."""

from cptquant.allocation.first_last import FirstLast
from cptquant.allocation.kmeans import KMeans
from cptquant.allocation.knapsack import Knapsack
from cptquant.allocation.problem import Allocator
from cptquant.allocation.random_fill import RandomFill
from cptquant.allocation.uniform import Uniform
from cptquant.core.errors import UserError

ALLOCATORS: dict[str, Allocator] = {
    "knapsack": Knapsack(),
    "kmeans": KMeans(),
    "uniform": Uniform(),
    "first_last": FirstLast(),
    "random": RandomFill(),
}


def find_allocator(name: str) -> Allocator:
    """An allocator with its default hyper-parameters.

    Raises:
        UserError: no such allocator.
    """
    if name not in ALLOCATORS:
        raise UserError(f"--allocator {name!r} is unknown; choose one of: {', '.join(ALLOCATORS)}")
    return ALLOCATORS[name]
