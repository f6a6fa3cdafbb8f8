"""Labels: which channels must go together.

Every index of a prunable dimension carries *atoms*. An index goes when any of its atoms goes. Atoms that must go together
are united (a union-find); an atom may turn out to be a product, when a flat dimension is viewed as a grid: channel
``h * width + w`` goes when head ``h`` goes or when position ``w`` of every head goes. So one atom is *expanded* into two.
All three steps only ever tie more than needed, never less: what comes out can always be cut from rectangular tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FREE", "Column", "Columns", "Floats", "Ints", "Labels"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

#: In a column: this index has no atom here. An index without any atom always stays.
FREE = -1


@dataclass(frozen=True, eq=False)
class Column:
    """One atom per index of a dimension.

    Attributes:
        atoms: int64 [n], or ``FREE``.
        fill: float64 [n]: what a removed index holds in the masked model: mostly 0; NaN when it is no known constant.
        source: ``(tensor, dim)`` when the dimension is one of a parameter itself, moved at most.
    """

    atoms: Ints
    fill: Floats
    source: tuple[str, int] | None = None

    def take(self, indices: Ints) -> Column:
        """The column of the indices picked from this one."""
        return Column(self.atoms[indices], self.fill[indices], self.source)

    def filled(self, fill: Floats | float) -> Column:
        """The same atoms, another fill; no longer a parameter's own dimension."""
        return Column(self.atoms, np.broadcast_to(np.asarray(fill, dtype=np.float64), self.atoms.shape))


#: What one dimension carries. No columns: nothing of it can go.
Columns = tuple[Column, ...]


class Labels:
    """Union-find over atoms, with expansion into products and pinning."""

    def __init__(self) -> None:
        self._parent: Ints = np.zeros(0, dtype=np.int64)
        self._first: Ints = np.zeros(0, dtype=np.int64)
        self._second: Ints = np.zeros(0, dtype=np.int64)
        self._pinned: NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        self._used = 0
        self._reasons: list[tuple[Ints, str]] = []

    @property
    def size(self) -> int:
        """Number of atoms made so far."""
        return self._used

    def fresh(self, n: int) -> Ints:
        """``n`` new atoms."""
        start, self._used = self._used, self._used + n
        if self._used > len(self._parent):
            self._grow(max(self._used, 2 * len(self._parent), 4096))
        return np.arange(start, self._used, dtype=np.int64)

    def column(self, n: int, fill: Floats | float = 0.0, source: tuple[str, int] | None = None) -> Column:
        """A column of new atoms."""
        return Column(self.fresh(n), np.broadcast_to(np.asarray(fill, dtype=np.float64), (n,)), source)

    def _grow(self, capacity: int) -> None:
        more = capacity - len(self._parent)
        self._parent = np.concatenate([self._parent, np.arange(len(self._parent), capacity, dtype=np.int64)])
        self._first = np.concatenate([self._first, np.full(more, FREE, dtype=np.int64)])
        self._second = np.concatenate([self._second, np.full(more, FREE, dtype=np.int64)])
        self._pinned = np.concatenate([self._pinned, np.zeros(more, dtype=np.bool_)])

    def find(self, atoms: Ints) -> Ints:
        """Representative of each atom; ``FREE`` for pinned ones. Paths are halved on the way."""
        known = atoms >= 0
        current = np.where(known, atoms, 0)
        while True:
            parents = self._parent[current]
            if np.array_equal(parents, current):
                break
            self._parent[current] = self._parent[parents]
            current = parents
        return np.where(known & ~self._pinned[current], current, FREE)

    def resolve(self, columns: Columns) -> Columns:
        """The columns in representatives: expanded atoms replaced by their parts, pinned ones and repeats left out."""
        result: list[Column] = []
        pending = list(reversed(columns))
        while pending:
            column = pending.pop()
            roots = self.find(column.atoms)
            expanded = (roots >= 0) & (self._first[roots] >= 0)
            if expanded.any():
                first = np.where(expanded, self._first[roots], roots)
                second = np.where(expanded, self._second[roots], FREE)
                pending.append(Column(second, column.fill))
                pending.append(Column(first, column.fill))
                continue
            for other in result:
                roots = np.where(roots == other.atoms, FREE, roots)
            if (roots >= 0).any():
                result.append(Column(roots, column.fill, column.source))
        return tuple(result)

    # ------------------------------------------------------------------------------------------- pin
    def pin(self, columns: Columns, reason: str) -> None:
        """None of these indices may go, and nothing that is tied to them."""
        for column in self.resolve(columns):
            self.pin_atoms(np.unique(column.atoms[column.atoms >= 0]), reason)

    def pin_atoms(self, roots: Ints, reason: str) -> None:
        """Pin representatives."""
        if len(roots):
            self._pinned[roots] = True
            self._reasons.append((roots, reason))

    def reasons(self) -> list[tuple[Ints, str]]:
        """Which atoms were pinned and why, in order."""
        return list(self._reasons)

    # ------------------------------------------------------------------------------------------- tie
    def tie(self, a: Columns, b: Columns, reason: str) -> None:
        """Index ``i`` of ``a`` goes exactly when index ``i`` of ``b`` goes. ``reason`` is given for what gets pinned."""
        while True:
            left, right = self.resolve(a), self.resolve(b)
            if not left or not right:
                self.pin(left or right, reason)
                return
            if len(left) == 1 and len(right) == 1:
                self._tie_single(left[0].atoms, right[0].atoms, reason)
                return
            if _same_sets(left, right):
                return
            if not self._tie_step(left, right, reason):
                return

    def _tie_single(self, a: Ints, b: Ints, reason: str) -> None:
        self._pin_lonely(a, b, reason)
        both = (a >= 0) & (b >= 0) & (a != b)
        self._unite(a[both], b[both])

    def _pin_lonely(self, a: Ints, b: Ints, reason: str) -> None:
        self.pin_atoms(np.unique(a[(a >= 0) & (b < 0)]), reason)
        self.pin_atoms(np.unique(b[(b >= 0) & (a < 0)]), reason)

    def _unite(self, a: Ints, b: Ints) -> None:
        """Unite pairs of representatives; the pairs may repeat and chain. What is united with a pinned one is pinned."""
        if not len(a):
            return
        for x, y in ((a, b), (b, a)):
            if len(np.unique(x)) == len(x) and not np.isin(x, y).any():
                self._parent[x] = y  # each x moves once and is nobody's new root: no chains
                self._pinned[y[self._pinned[x]]] = True
                return
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            rx, ry = self._root(x), self._root(y)
            if rx != ry:
                self._parent[rx] = ry
                self._pinned[ry] |= self._pinned[rx]

    def _root(self, atom: int) -> int:
        while (parent := int(self._parent[atom])) != atom:
            self._parent[atom] = self._parent[parent]
            atom = parent
        return atom

    def _tie_step(self, left: Columns, right: Columns, reason: str) -> bool:
        """One step of tying products, index by index classes; False when nothing is left to do."""
        if len(left) == len(right) and _same_holes(left, right):
            for x, y in zip(left, right, strict=True):
                x_now, y_now = self.find(x.atoms), self.find(y.atoms)
                both = (x_now >= 0) & (y_now >= 0) & (x_now != y_now)
                self._unite(x_now[both], y_now[both])
            return False
        if len(left) == 1 or len(right) == 1:
            single, product = (left[0], right) if len(left) == 1 else (right[0], left)
            if self._expand(single.atoms, product):
                return True
        return self._tie_rows(left, right, reason)

    def _expand(self, single: Ints, product: Columns) -> bool:
        """Let each atom of ``single`` be the product beside it where it first occurs. False when that would be circular."""
        parts = np.stack([c.atoms for c in product])
        useful = (single >= 0) & ((parts >= 0).sum(axis=0) >= 2)
        if not useful.any():
            return False
        roots, where = np.unique(single[useful], return_index=True)
        chosen = parts[:, useful][:, where]
        if np.isin(chosen, roots).any():
            return False
        self._first[roots], self._second[roots] = self._chain(chosen)
        return True

    def _chain(self, parts: Ints) -> tuple[Ints, Ints]:
        """Columns of parts as pairs: the first, and an atom for the rest."""
        parts = np.take_along_axis(parts, np.argsort(parts < 0, axis=0, kind="stable"), axis=0)
        while len(parts) > 2 and (parts[-1] < 0).all():
            parts = parts[:-1]
        if len(parts) == 2:
            return parts[0], parts[1]
        first, second = self._chain(parts[1:])
        rest = np.where(second >= 0, self.fresh(len(first)), first)
        fresh = second >= 0
        self._first[rest[fresh]], self._second[rest[fresh]] = first[fresh], second[fresh]
        return parts[0], rest

    def _tie_rows(self, left: Columns, right: Columns, reason: str) -> bool:
        """The general case, row by row: change one distinct row, then look again. Ties all of a row when nothing fits."""
        rows = np.unique(np.stack([c.atoms for c in (*left, *right)]), axis=1).T
        for row in rows.tolist():
            a, b = {x for x in row[: len(left)] if x >= 0}, {x for x in row[len(left) :] if x >= 0}
            if a == b:
                continue
            self._tie_row(sorted(a), sorted(b), reason)
            return True
        return False

    def _tie_row(self, a: list[int], b: list[int], reason: str) -> None:
        if not a or not b:
            self.pin_atoms(np.asarray(a or b, dtype=np.int64), reason)
            return
        every = np.asarray(sorted({*a, *b}), dtype=np.int64)
        if min(len(a), len(b)) == 1 and not set(a) & set(b):
            root, parts = (a[0], b) if len(a) == 1 else (b[0], a)
            if len(parts) > 1:
                first, second = self._chain(np.asarray(parts, dtype=np.int64)[:, None])
                self._first[root], self._second[root] = first[0], second[0]
                return
        self._unite(every[:-1], every[1:])

    # ------------------------------------------------------------------------------------------- shapes
    def merge(self, dims: Sequence[Columns], sizes: Sequence[int]) -> Columns:
        """Columns of the dimension that holds all of ``dims``, the first one outermost."""
        n = int(np.prod(sizes))
        before, result = 1, []
        for columns, size in zip(dims, sizes, strict=True):
            after = n // max(before * size, 1)
            indices = np.tile(np.repeat(np.arange(size), after), before) if columns else None
            result += [] if indices is None else [_without_source(c.take(indices)) for c in columns]
            before *= size
        return self.resolve(tuple(result))

    def split(self, columns: Columns, sizes: Sequence[int], reason: str) -> list[Columns]:
        """Columns of each of the dimensions a dimension is split into, the first one outermost."""
        result: list[list[Column]] = [[] for _ in sizes]
        for column in self.resolve(columns):
            for axis, part in self._split_column(column, sizes, reason):
                result[axis].append(part)
        return [self.resolve(tuple(r)) for r in result]

    def _split_column(self, column: Column, sizes: Sequence[int], reason: str) -> Iterator[tuple[int, Column]]:
        grid = column.atoms.reshape(tuple(sizes))
        fill = column.fill.reshape(tuple(sizes))
        axes = [i for i, n in enumerate(sizes) if n > 1 and not (grid == grid.take([0], axis=i)).all()]
        if not axes:
            self.pin((column,), reason)
            return
        if len(axes) == 1:
            yield axes[0], Column(_along(grid, axes[0]), _uniform(fill, axes[0]))
            return
        parts = [Column(self.fresh(sizes[a]), _uniform(fill, a)) for a in axes]
        whole = [p.take(np.indices(tuple(sizes))[a].reshape(-1)) for a, p in zip(axes, parts, strict=True)]
        self.tie((column,), tuple(whole), reason)
        yield from zip(axes, parts, strict=True)


def _along(grid: Ints, axis: int) -> Ints:
    """A grid that only varies along ``axis``, along it."""
    result: Ints = np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)[:, 0]
    return result


def _uniform(fill: Floats, axis: int) -> Floats:
    """Fill along ``axis``: the value that all of a slice holds, NaN when it differs within the slice."""
    rows = np.moveaxis(fill, axis, 0).reshape(fill.shape[axis], -1)
    result: Floats = np.where((rows == rows[:, :1]).all(axis=1), rows[:, 0], np.nan)
    return result


def _without_source(column: Column) -> Column:
    return Column(column.atoms, column.fill)


def _same_sets(left: Columns, right: Columns) -> bool:
    if len(left) != len(right):
        return False
    a, b = (np.sort(np.stack([c.atoms for c in side]), axis=0) for side in (left, right))
    return bool(np.array_equal(a, b))


def _same_holes(left: Columns, right: Columns) -> bool:
    return all(np.array_equal(x.atoms < 0, y.atoms < 0) for x, y in zip(left, right, strict=True))
