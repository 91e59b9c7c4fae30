"""METHODS: the ways to merge adapters from their files alone, without data or a base model.

To add one, write a function in module_merges.py and add a line here. The table names functions by
their module, which is imported when a merge begins, so that `--help` does without them and numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lorakit.settings import StaticSettings

if TYPE_CHECKING:
    from lorakit.adapters.tensors import Pair
    from lorakit.merging.task_vectors import Part

    # Takes the parts of one module and returns its merged A and B.
    ModuleMerge = Callable[[Sequence[Part], StaticSettings], Pair]


class Method(NamedTuple):
    """A way to merge without data: a line of help, its function, and the settings it reads.

    `function` is the one that merges a module, after its file in this folder: `module_merges.ties`.
    """

    help: str
    function: str
    settings: tuple[str, ...]

    @property
    def merge(self) -> ModuleMerge:
        """The function that merges one module, imported on access."""
        import importlib

        module, _, name = self.function.rpartition(".")
        function: ModuleMerge = getattr(importlib.import_module(f"lorakit.merging.{module}"), name)
        return function


METHODS: dict[str, Method] = {
    "cat": Method(
        "the weighted sum, exact; ranks add up, blocks stay visible",
        "module_merges.cat",
        ("weights",),
    ),
    "linear": Method(
        "the weighted sum, exact, at the lowest rank it has",
        "module_merges.linear",
        ("weights",),
    ),
    "svd": Method(
        "the matrix of --rank, or of --keep-energy, nearest to the weighted sum",
        "module_merges.svd",
        ("weights", "rank", "keep_energy", "max_rank"),
    ),
    "ties": Method(
        "trim to --density, elect signs, mean of the agreeing",
        "module_merges.ties",
        ("weights", "density", "rank"),
    ),
    "dare-linear": Method(
        "drop at random to --density, rescale, sum",
        "module_merges.dare_linear",
        ("weights", "density", "rank", "seed"),
    ),
    "dare-ties": Method(
        "drop at random, rescale, elect signs as ties",
        "module_merges.dare_ties",
        ("weights", "density", "rank", "seed"),
    ),
    "magnitude-prune": Method(
        "keep the largest to --density, sum",
        "module_merges.magnitude_prune",
        ("weights", "density", "rank"),
    ),
    "knots": Method(
        "as ties, in the common basis of an SVD",
        "module_merges.knots",
        ("weights", "density", "rank"),
    ),
    "tsv": Method(
        "singular vectors, made orthogonal between adapters, sum",
        "module_merges.tsv",
        ("weights", "density", "rank"),
    ),
}
