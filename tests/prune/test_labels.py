"""Labels: what is tied goes together, what is pinned stays, and all that is left can be cut from rectangular tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.prune.labels import FREE, Column, Columns, Labels


def roots(labels: Labels, *columns: Columns) -> list[int]:
    """What can go in these columns, as representatives."""
    atoms = [c.atoms for dim in columns for c in labels.resolve(dim)]
    return sorted({int(a) for part in atoms for a in part if a != FREE})


def kept(labels: Labels, columns: Columns, n: int, gone: set[int]) -> np.ndarray:
    """Which indices of a dimension stay when these representatives go."""
    result = np.ones(n, dtype=bool)
    for column in labels.resolve(columns):
        result &= ~np.isin(column.atoms, sorted(gone))
    return result


def flags(labels: Labels, columns: Columns, n: int, gone: set[int]) -> str:
    return "".join("x."[int(k)] for k in kept(labels, columns, n, gone))


def columns(labels: Labels, n: int) -> Columns:
    return (labels.column(n),)


# ------------------------------------------------------------------------------------------------ union
def test_fresh_atoms_are_their_own() -> None:
    labels = Labels()
    a, b = labels.fresh(3), labels.fresh(5000)  # more than the first block of memory
    assert labels.size == 5003
    assert np.array_equal(labels.find(np.concatenate([a, b])), np.arange(5003))
    assert np.array_equal(labels.find(np.array([FREE, 2])), [FREE, 2])


def test_tying_is_symmetric_and_transitive() -> None:
    labels = Labels()
    a, b, c = (columns(labels, 4) for _ in range(3))
    labels.tie(a, b, "")
    labels.tie(c, b, "")
    assert len(roots(labels, a, b, c)) == 4
    for i in range(4):
        gone = {int(labels.find(b[0].atoms)[i])}
        assert [flags(labels, x, 4, gone) for x in (a, b, c)] == ["...."[:i] + "x" + "...."[i + 1 :]] * 3


def test_ties_in_another_order_close_cycles() -> None:
    """Index i with index n - 1 - i: pairs of indices go together."""
    labels = Labels()
    a = columns(labels, 6)
    labels.tie(a, (a[0].take(np.arange(6)[::-1]),), "")
    assert len(roots(labels, a)) == 3
    assert flags(labels, a, 6, {int(labels.find(a[0].atoms)[1])}) == ".x..x."
    labels.tie(a, (a[0].take(np.roll(np.arange(6), 1)),), "")
    assert len(roots(labels, a)) == 1


def test_many_ties_to_one_atom() -> None:
    labels = Labels()
    a, one = columns(labels, 8), columns(labels, 1)
    labels.tie(a, (one[0].take(np.zeros(8, dtype=np.int64)),), "")
    assert len(roots(labels, a, one)) == 1


def test_tying_to_nothing_pins_with_the_reason() -> None:
    labels = Labels()
    a, b = columns(labels, 3), columns(labels, 3)
    labels.tie(a, b, "")
    labels.tie(b, (), "the other side stays")
    assert labels.resolve(a) == () == labels.resolve(b)
    assert [reason for _, reason in labels.reasons()] == ["the other side stays"]


def test_tying_to_a_hole_pins_that_index_alone() -> None:
    labels = Labels()
    a, b = columns(labels, 3), columns(labels, 3)
    holed = (Column(np.where([True, False, True], b[0].atoms, FREE), b[0].fill),)
    labels.tie(a, holed, "a hole")
    assert len(roots(labels, a)) == 2 and labels.resolve(a)[0].atoms[1] == FREE
    assert len(roots(labels, b)) == 3, "index 1 of b itself was not in the tie"


def test_pinned_stays_pinned_through_later_ties() -> None:
    labels = Labels()
    a, b = columns(labels, 4), columns(labels, 4)
    labels.pin((a[0].take(np.array([2])),), "used alone")
    labels.tie(b, a, "tied")
    for side in (a, b):
        assert flags(labels, side, 4, set(roots(labels, a, b))) == "xx.x"


def test_a_pin_survives_a_union_made_at_once() -> None:
    """One atom meets a hole at one index and another atom at the next, in the same tie: both stay."""
    for forward in (True, False):
        labels = Labels()
        one, other = columns(labels, 1), columns(labels, 1)
        twice = (one[0].take(np.zeros(2, dtype=np.int64)),)
        holed = (Column(np.array([FREE, other[0].atoms[0]]), np.zeros(2)),)
        labels.tie(*((twice, holed) if forward else (holed, twice)), "")
        assert roots(labels, one, other) == []


def test_columns_keep_their_fill_and_source() -> None:
    labels = Labels()
    a = (labels.column(4, np.arange(4.0), ("weight", 0)),)
    taken = labels.resolve((a[0].take(np.array([3, 1])),))[0]
    assert taken.fill.tolist() == [3.0, 1.0] and taken.source == ("weight", 0)
    assert a[0].filled(7.0).fill.tolist() == [7.0] * 4 and a[0].filled(7.0).source is None
    assert labels.merge([a, ()], [4, 2])[0].fill.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


# ------------------------------------------------------------------------------------------------ grids
def test_split_makes_a_grid_of_free_axes() -> None:
    """12 channels as 3 heads of width 4: a head is 4 channels, a position is one channel of each head."""
    labels = Labels()
    flat = columns(labels, 12)
    heads, width = labels.split(flat, [3, 4], "")
    head, position = labels.resolve(heads)[0].atoms, labels.resolve(width)[0].atoms
    assert len(roots(labels, flat)) == 7
    assert flags(labels, flat, 12, {int(head[1])}) == "....xxxx...."
    assert flags(labels, flat, 12, {int(position[2])}) == "..x...x...x."
    assert flags(labels, flat, 12, {int(head[0]), int(position[3])}) == "xxxx...x...x"


def test_three_axes_and_back() -> None:
    labels = Labels()
    flat = columns(labels, 24)
    dims = labels.split(flat, [2, 3, 4], "")
    again = labels.merge(dims, [2, 3, 4])
    gone = {int(labels.resolve(d)[0].atoms[1]) for d in dims}
    grid = ~(np.outer(np.outer([1, 0], [1, 0, 1]), [1, 0, 1, 1]).reshape(-1).astype(bool))
    assert np.array_equal(kept(labels, flat, 24, gone), ~grid)
    assert np.array_equal(kept(labels, again, 24, gone), ~grid)


def test_split_twice_differently() -> None:
    """[6] as [2, 3] and as [3, 2]: only what is a rectangle in both can go, here all or nothing of some axis."""
    labels = Labels()
    flat = columns(labels, 6)
    first, second = labels.split(flat, [2, 3], ""), labels.split(flat, [3, 2], "")
    for atom in roots(labels, flat, *first, *second):
        mask = kept(labels, flat, 6, {atom})
        for dims, sizes in ((first, (2, 3)), (second, (3, 2))):
            masks = [kept(labels, d, n, {atom}) for d, n in zip(dims, sizes, strict=True)]
            assert np.array_equal(mask.reshape(sizes), np.outer(*masks))


def test_split_of_what_varies_along_one_axis_only() -> None:
    labels = Labels()
    base = columns(labels, 3)
    repeated = (base[0].take(np.repeat(np.arange(3), 4)),)
    tiled = (base[0].take(np.tile(np.arange(3), 4)),)
    outer, inner = labels.split(repeated, [3, 4], "")
    assert np.array_equal(outer[0].atoms, labels.find(base[0].atoms)) and inner == ()
    outer, inner = labels.split(tiled, [4, 3], "")
    assert outer == () and np.array_equal(inner[0].atoms, labels.find(base[0].atoms))


def test_split_of_one_atom_for_all_pins_it() -> None:
    labels = Labels()
    one = columns(labels, 1)
    assert labels.split((one[0].take(np.zeros(6, dtype=np.int64)),), [2, 3], "all or nothing") == [(), ()]
    assert labels.resolve(one) == () and labels.reasons()[0][1] == "all or nothing"


def test_split_keeps_what_a_slice_holds_in_common() -> None:
    labels = Labels()
    fill = np.array([[1.0, 2.0, 3.0], [1.0, 5.0, 3.0]])
    outer, inner = labels.split((labels.column(6, fill.reshape(-1)),), [2, 3], "")
    assert np.isnan(outer[0].fill).all()
    assert inner[0].fill[[0, 2]].tolist() == [1.0, 3.0] and np.isnan(inner[0].fill[1])


def test_merge_names_the_outermost_first() -> None:
    labels = Labels()
    a, b = columns(labels, 2), columns(labels, 3)
    merged = labels.merge([a, (), b], [2, 2, 3])
    assert flags(labels, merged, 12, {int(a[0].atoms[1])}) == "......xxxxxx"
    assert flags(labels, merged, 12, {int(b[0].atoms[0])}) == "x..x..x..x.."


# ------------------------------------------------------------------------------------------------ products
def test_tying_a_plain_dimension_to_a_product_expands_it() -> None:
    labels = Labels()
    plain, heads, width = columns(labels, 6), columns(labels, 2), columns(labels, 3)
    labels.tie(plain, labels.merge([heads, width], [2, 3]), "")
    assert len(roots(labels, plain)) == 5
    assert flags(labels, plain, 6, {int(heads[0].atoms[0])}) == "xxx..."
    assert flags(labels, plain, 6, {int(width[0].atoms[2])}) == "..x..x"


def test_tying_two_products_ties_their_axes() -> None:
    """Queries and keys: head i with head i, position j with position j."""
    labels = Labels()
    q, k = columns(labels, 8), columns(labels, 8)
    q_axes, k_axes = labels.split(q, [2, 4], ""), labels.split(k, [2, 4], "")
    labels.tie(labels.merge(q_axes, [2, 4]), labels.merge(k_axes, [2, 4]), "")
    assert len(roots(labels, q, k)) == 6
    for atom in roots(labels, q):
        assert flags(labels, q, 8, {atom}) == flags(labels, k, 8, {atom})


def test_grouped_queries_follow_their_keys() -> None:
    """4 heads of queries read 2 heads of keys: removing a head of keys takes both of its readers."""
    labels = Labels()
    q, k = columns(labels, 8), columns(labels, 4)
    (q_heads, q_width), (k_heads, k_width) = labels.split(q, [4, 2], ""), labels.split(k, [2, 2], "")
    repeated = tuple(c.take(np.repeat(np.arange(2), 2)) for c in labels.resolve(k_heads))
    labels.tie(q_heads, repeated, "")
    labels.tie(q_width, k_width, "")
    gone = {int(labels.resolve(k_heads)[0].atoms[1])}
    assert flags(labels, q, 8, gone) == "....xxxx" and flags(labels, k, 4, gone) == "..xx"


def test_pinning_an_axis_leaves_the_other() -> None:
    labels = Labels()
    flat = columns(labels, 12)
    heads, width = labels.split(flat, [3, 4], "")
    labels.pin(width, "a sum over positions")
    assert flags(labels, flat, 12, {int(labels.resolve(heads)[0].atoms[2])}) == "........xxxx"
    assert len(roots(labels, flat)) == 3


def test_pinning_the_product_pins_both_axes() -> None:
    labels = Labels()
    flat = columns(labels, 12)
    axes = labels.split(flat, [3, 4], "")
    labels.pin(flat, "an output")
    assert [labels.resolve(a) for a in axes] == [(), ()]


def test_a_product_within_itself_is_not_circular() -> None:
    """Rolling a grid by one ties it to itself: it must end, and what is left must agree on both sides."""
    labels = Labels()
    flat = columns(labels, 6)
    labels.split(flat, [2, 3], "")
    rolled = tuple(c.take(np.roll(np.arange(6), 1)) for c in flat)
    labels.tie(flat, rolled, "rolled")
    for atom in roots(labels, flat):
        assert flags(labels, flat, 6, {atom}) == flags(labels, rolled, 6, {atom})


# ------------------------------------------------------------------------------------------------ any network
@dataclass
class Tensor:
    """Sizes and what the dimensions carry."""

    sizes: tuple[int, ...]
    dims: list[Columns]


@dataclass
class World:
    """A random program on labels: tensors, and pairs of them that must be cut alike."""

    labels: Labels = field(default_factory=Labels)
    tensors: list[Tensor] = field(default_factory=list)
    views: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    picks: list[tuple[Tensor, Tensor, int, np.ndarray]] = field(default_factory=list)
    ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor

    def new(self, sizes: Sequence[int]) -> Tensor:
        return self.add(Tensor(tuple(sizes), [columns(self.labels, n) for n in sizes]))

    def view(self, source: Tensor, sizes: tuple[int, ...]) -> Tensor:
        merged = self.labels.merge([self.labels.resolve(d) for d in source.dims], source.sizes)
        result = self.add(Tensor(sizes, self.labels.split(merged, sizes, "a view")))
        self.views.append((source, result))
        return result

    def pick(self, source: Tensor, dim: int, indices: np.ndarray) -> Tensor:
        dims = list(source.dims)
        dims[dim] = tuple(c.take(indices) for c in self.labels.resolve(dims[dim]))
        sizes = (*source.sizes[:dim], len(indices), *source.sizes[dim + 1 :])
        result = self.add(Tensor(sizes, dims))
        self.picks.append((source, result, dim, indices))
        return result

    def tie(self, a: Tensor, b: Tensor) -> None:
        for x, y in zip(a.dims, b.dims, strict=True):
            self.labels.tie(self.labels.resolve(x), self.labels.resolve(y), "added")
        self.ties.append((a, b))

    def masks(self, tensor: Tensor, gone: set[int]) -> list[np.ndarray]:
        return [kept(self.labels, d, n, gone) for d, n in zip(tensor.dims, tensor.sizes, strict=True)]

    def box(self, tensor: Tensor, gone: set[int]) -> np.ndarray:
        """Which elements of a tensor stay: the outer product of what stays of its dimensions."""
        result = np.ones((), dtype=bool)
        for mask in self.masks(tensor, gone):
            result = np.logical_and.outer(result, mask)
        return result

    def check(self, gone: set[int]) -> None:
        for source, result in self.views:
            assert np.array_equal(self.box(source, gone).reshape(result.sizes), self.box(result, gone))
        for source, result, dim, indices in self.picks:
            assert np.array_equal(self.box(source, gone).take(indices, axis=dim), self.box(result, gone))
        for a, b in self.ties:
            for x, y in zip(self.masks(a, gone), self.masks(b, gone), strict=True):
                assert np.array_equal(x, y)


def factored(n: int, draw: st.DrawFn) -> tuple[int, ...]:
    """Random factors of ``n``, in random order, ones among them."""
    sizes = []
    while n > 1:
        factor = draw(st.sampled_from([d for d in range(2, n + 1) if n % d == 0]))
        sizes.append(factor)
        n //= factor
    return tuple(draw(st.permutations([*sizes, 1][: draw(st.integers(len(sizes), len(sizes) + 1)) or 1])))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Few sizes, so that much can be tied; single indices are pinned, so that there are holes."""
    world = World()
    shapes = st.sampled_from([(12,), (4, 3), (2, 6), (3, 4), (2, 2, 3), (6, 2)])
    for _ in range(draw(st.integers(1, 2))):
        world.new(draw(shapes))
    for _ in range(draw(st.integers(2, 8))):
        source = draw(st.sampled_from(world.tensors))
        step = draw(st.sampled_from(["view", "view", "permute", "pick", "tie", "tie", "pin"]))
        if step == "view":
            sizes = draw(shapes) if math.prod(source.sizes) == 12 else factored(math.prod(source.sizes), draw)
            world.view(source, sizes)
        elif step == "permute":
            order = draw(st.permutations(range(len(source.sizes))))
            world.add(Tensor(tuple(source.sizes[d] for d in order), [source.dims[d] for d in order]))
        elif step == "pick":
            dim = draw(st.integers(0, len(source.sizes) - 1))
            world.pick(source, dim, np.array(draw(st.permutations(range(source.sizes[dim])))))
        elif step == "tie":
            fitting = [t for t in world.tensors if t.sizes == source.sizes and t is not source]
            world.tie(source, draw(st.sampled_from(fitting or [source])))
        else:
            dim = draw(st.integers(0, len(source.sizes) - 1))
            index = np.array([draw(st.integers(0, source.sizes[dim] - 1))])
            world.labels.pin(tuple(c.take(index) for c in world.labels.resolve(source.dims[dim])), "used")
    return world


@settings(max_examples=150, deadline=None)
@given(worlds(), st.data())
def test_whatever_goes_all_that_is_left_is_rectangular(world: World, data: st.DataObject) -> None:
    """A view of the kept elements is the kept elements of the view; tied dimensions lose the same indices."""
    units = roots(world.labels, *(d for t in world.tensors for d in t.dims))
    for unit in units[:6]:
        world.check({unit})
    if units:
        world.check(set(data.draw(st.lists(st.sampled_from(units), max_size=len(units)))))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_unions_are_the_connected_components(pairs: list[tuple[int, int]]) -> None:
    labels = Labels()
    atoms = labels.fresh(10)
    if pairs:
        a, b = (np.array(side) for side in zip(*pairs, strict=True))
        labels.tie((Column(atoms[a], np.zeros(len(a))),), (Column(atoms[b], np.zeros(len(b))),), "")
    component = list(range(10))
    for x, y in pairs:
        old, new = component[x], component[y]
        component = [new if c == old else c for c in component]
    found = labels.find(atoms)
    for i in range(10):
        for j in range(10):
            assert (found[i] == found[j]) == (component[i] == component[j])


@pytest.mark.parametrize("n", [1, 7])
def test_merging_and_splitting_with_ones(n: int) -> None:
    labels = Labels()
    flat = columns(labels, n)
    one, same, other = labels.split(flat, [1, n, 1], "")
    assert one == other == ()
    assert n == 1 or np.array_equal(same[0].atoms, flat[0].atoms)
