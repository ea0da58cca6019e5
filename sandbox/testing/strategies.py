"""Hypothesis strategies of what laws are tried on. Needs the extra `test`.

Shapes and seeds are drawn, never the values of tensors: those come from the seed, so that a failing
example shrinks to a small layout in seconds.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from hypothesis import strategies as st

from sandbox.layout import Layout, Mask, Step

seeds = st.integers(0, 2**16)
"""Seeds of random generators."""

_growths = st.tuples(st.integers(0, 2), st.integers(0, 2)).filter(any)


def _pyramid(first: tuple[int, int], growths: Sequence[tuple[int, int]]) -> Layout:
    sizes = [first]
    for taller, wider in growths:
        sizes.append((sizes[-1][0] + taller, sizes[-1][1] + wider))
    return Layout.pyramid(*sizes)


def _grouped(height: int, cells: Sequence[int], cuts: Sequence[int]) -> Layout:
    """One map, filled group by group: what masked prediction and its kin do."""
    edges = sorted({0, len(cells), *(cut % len(cells) for cut in cuts)})
    groups = [tuple(cells[a:b]) for a, b in pairwise(edges)]
    return Layout(tuple(Step(height, len(cells) // height, group) for group in groups))


def _orders(most: int) -> st.SearchStrategy[tuple[int, list[int]]]:
    sizes = st.tuples(st.integers(1, most), st.integers(1, most))
    return sizes.flatmap(
        lambda size: st.tuples(st.just(size[0]), st.permutations(range(size[0] * size[1])))
    )


pyramids: st.SearchStrategy[Layout] = st.builds(
    _pyramid, st.tuples(st.integers(1, 2), st.integers(1, 2)), st.lists(_growths, max_size=3)
)
"""Growing whole maps, non-square too: one to four steps, sides of at most 8 cells."""

rasters: st.SearchStrategy[Layout] = _orders(3).map(
    lambda drawn: Layout.raster(drawn[0], len(drawn[1]) // drawn[0], drawn[1])
)
"""One token a step, in any order, over a map of at most 3 x 3 cells."""

groupings: st.SearchStrategy[Layout] = st.builds(
    lambda drawn, cuts: _grouped(drawn[0], drawn[1], cuts), _orders(3), st.lists(st.integers(0, 8))
)
"""Several tokens a step, in any order and grouping, over one map."""

layouts: st.SearchStrategy[Layout] = pyramids | rasters | groupings
"""Any layout; only backbones and objectives must take all of them."""


def _dense(num_queries: int, num_keys: int, seed: int) -> Mask:
    allowed = torch.rand(num_queries, num_keys, generator=torch.Generator().manual_seed(seed)) < 0.5
    allowed[:, 0] = True  # a query that sees nothing has no answer
    return Mask(dense=allowed)


_lengths = st.integers(1, 20)
attention_calls: st.SearchStrategy[tuple[Mask, int, int]] = (
    layouts.map(lambda layout: (Mask(layout.lens), layout.seq_len, layout.seq_len))
    | st.tuples(st.just(Mask()), _lengths, _lengths)
    | st.builds(lambda n, p, seed: (_dense(n, p, seed), n, p), _lengths, _lengths, seeds)
)
"""A mask with the numbers of queries and keys it is for."""
