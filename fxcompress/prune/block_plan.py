"""Plans that remove whole residual blocks, certified by a bypass."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fxcompress.analysis import Shapes, count_macs, count_parameters, node_macs
from fxcompress.errors import PruneError
from fxcompress.ir import Program
from fxcompress.layers import Fused
from fxcompress.prune.block_importance import BlockScore, Evaluate, score_blocks
from fxcompress.prune.block_removal import certify_removal, remove_blocks
from fxcompress.prune.blocks import Block, find_blocks
from fxcompress.prune.statistics import Loss

__all__ = ["KIND", "BlockCertificate", "BlockPlan", "check_amount", "fits", "plan_block_removal"]

#: What an entry of ``Program.history`` that holds such a plan says under ``kind``.
KIND = "remove_blocks"


@dataclass(frozen=True)
class BlockCertificate:
    """That a program without some blocks equals the dense one whose branches give zero.

    Attributes:
        blocks: Names of the blocks.
        error: Largest output difference on the example, relative to the largest output.
        tolerance: What was allowed: 1e-4 in float32, 1e-9 in float64.
    """

    blocks: tuple[str, ...]
    error: float
    tolerance: float


@dataclass(frozen=True)
class BlockPlan:
    """Which residual blocks go.

    Attributes:
        blocks: All residual blocks of the program, those that cannot be bypassed with the reason.
        removed: Names of the blocks that go, in execution order.
        importance: What they were chosen by; ``names`` when they were named.
        scores: Importance by block; the lower, the earlier it goes.
        parameters: Number of parameters before and after.
        macs: Multiply-accumulates for the example inputs, before and after.
    """

    blocks: tuple[Block, ...]
    removed: tuple[str, ...]
    importance: str
    scores: dict[str, float] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)

    def apply(self, program: Program) -> Program:
        """A copy of ``program`` without the blocks. All other names of its state dict stay.

        Raises:
            PruneError: the plan was made for another program.
        """
        pruned = remove_blocks(program, self._found(program))
        if self.removed:
            pruned.history.append(self.to_dict())
        return pruned

    def certify(self, program: Program, pruned: Program | None = None) -> BlockCertificate:
        """Prove on the example that ``pruned`` is ``program`` with the branches of the blocks giving zero.

        Args:
            program: The dense program the plan was made for.
            pruned: What `apply` returned, not yet trained; None to apply the plan here.

        Raises:
            CertificateError: they differ; names the block.
            PruneError: the plan was made for another program.
        """
        blocks = self._found(program)
        error, tolerance = certify_removal(program, pruned or remove_blocks(program, blocks), blocks)
        return BlockCertificate(self.removed, error, tolerance)

    def _found(self, program: Program) -> list[Block]:
        """The blocks that go, in this program."""
        known = {b.name: b for b in find_blocks(program) if not b.reason}
        missing = [name for name in self.removed if name not in known]
        if missing:
            fix = "apply it to the program it was made for, before other passes; or make a new plan"
            raise PruneError(414, "the plan of blocks does not fit this program", where=missing[0], fix=fix)
        return [known[name] for name in self.removed]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in JSON's own types."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        blocks = [{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(b).items()} for b in self.blocks]
        lists = {k: list(v) for k, v in plain.items() if isinstance(v, tuple)}
        return {"kind": KIND, **plain, **lists, "scores": dict(self.scores), "blocks": blocks}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BlockPlan:
        """Inverse of `to_dict`.

        Raises:
            PruneError: ``data`` is not such a plan.
        """
        try:
            if data["kind"] != KIND:
                raise KeyError("kind")
            blocks = [Block(**_tuples(b)) for b in data["blocks"]]
            plain = _tuples({f.name: data[f.name] for f in fields(cls)})
            return cls(**{**plain, "blocks": tuple(blocks), "scores": dict(data["scores"])})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise PruneError(415, "this is no plan of blocks", why=why, fix="give what to_dict returned") from error

    def __str__(self) -> str:
        """A table: one block a line, then the totals."""
        head = ("block", "layers", "parameters", "MACs", self.importance, "")
        rows = [head, *(self._row(b) for b in self.blocks)]
        widths = [max(len(r[i]) for r in rows) for i in range(5)]
        lines = []
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:5], widths[1:], strict=True)), row[5]]
            lines.append("  ".join(cells).rstrip())
        totals = " | ".join(
            f"{what} {before:,} -> {after:,} ({after / max(before, 1) - 1:+.1%})"
            for what, (before, after) in (("parameters", self.parameters), ("MACs", self.macs))
        )
        return "\n".join([*lines, f"{len(self.removed)} of {len(self.blocks)} blocks removed | {totals}"])

    def _row(self, block: Block) -> tuple[str, ...]:
        score = f"{self.scores[block.name]:.4g}" if block.name in self.scores else ""
        fate = "removed" if block.name in self.removed else f"cannot go: {block.reason}" if block.reason else ""
        return block.name, str(len(block.layers)), f"{block.parameters:,}", f"{block.macs:,}", score, fate


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}


def plan_block_removal(
    program: Program,
    *,
    count: int | None = None,
    ratio: float | None = None,
    names: str | Iterable[str] | None = None,
    macs: float | None = None,
    importance: str | BlockScore = "cosine",
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    samples: int | None = 256,
) -> BlockPlan:
    """Choose residual blocks to remove: by number, share, name, or down to a budget of MACs.

    All blocks are scored once on the dense program, and the lowest scores go first.

    Args:
        program: Left untouched.
        count: How many blocks to remove, at least 1.
        ratio: Share of the blocks that can be bypassed, from 0 to below 1, rounded down to whole blocks.
        names: Blocks by name, by a module path that holds them (``blocks.3``), or by globs, which pass over blocks
            that cannot be bypassed.
        macs: Share of the MACs to keep at most, between 0 and 1.
        importance: ``cosine``, ``magnitude``, ``loss`` or a function; see `score_blocks`. Not used with ``names``.
        data: Iterable of batches for the importance.
        loss: ``loss(output, batch)`` for importance ``loss``; None for the cross-entropy.
        evaluate: Instead of data and a loss: scores any callable model, higher is better.
        samples: Samples to use at most; None for all.

    Raises:
        PruneError: a wrong or missing amount, unknown or unfit names, no block, no block left, a budget that cannot be
            met, data missing.
        CalibrationError: batches that do not fit the program.
    """
    check_amount(count, ratio, names, macs)
    blocks = find_blocks(program)
    free = [b for b in blocks if not b.reason]
    if not free:
        raise _no_blocks(program, blocks)
    if names is not None:
        chosen, scores, by = _named(blocks, names), {}, "names"
    else:
        scores = score_blocks(program, free, importance, data, loss=loss, evaluate=evaluate, samples=samples)
        by = importance if isinstance(importance, str) else getattr(importance, "__name__", "user")
        ranked = sorted(free, key=lambda b: scores[b.name])
        chosen = _cheapest(program, blocks, ranked, _wanted(free, count, ratio), macs)
    _check_rest(blocks, chosen)
    taken = {b.name for b in chosen}
    removed = [b for b in blocks if b.name in taken]
    pruned = remove_blocks(program, removed)
    return BlockPlan(
        blocks=tuple(blocks),
        removed=tuple(b.name for b in removed),
        importance=by,
        scores=scores,
        parameters=(count_parameters(program), count_parameters(pruned)),
        macs=(count_macs(program), count_macs(pruned)),
    )


def check_amount(count: Any, ratio: Any, names: Any, macs: Any) -> None:
    """Raise PruneError unless exactly one amount is given and in range."""
    given = [n for n, v in (("count", count), ("ratio", ratio), ("names", names), ("macs", macs)) if v is not None]
    if len(given) != 1:
        what = f"give one of count, ratio, names and macs, not {' and '.join(given) or 'none of them'}"
        raise PruneError(401, what, fix="for example count=2")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise PruneError(402, f"count must be an integer of at least 1, not {count!r}")
    if ratio is not None and not (_is_number(ratio) and 0 <= ratio < 1):
        raise PruneError(403, f"ratio must be at least 0 and less than 1, not {ratio!r}")
    if macs is not None and not (_is_number(macs) and 0 < macs < 1):
        raise PruneError(404, f"macs must be between 0 and 1, not {macs!r}", why="it is the share of MACs to keep")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _no_blocks(program: Program, blocks: Sequence[Block]) -> PruneError:
    why = f"{blocks[0].name}: {blocks[0].reason}" if blocks else "there is no add of a value and a branch that reads it"
    fused = any(isinstance(m, Fused) and len(n.args) > 1 for n, m in program.layers())
    fix = "remove blocks before FuseActivations" if fused else "prune channels instead"
    return PruneError(400, "there is no residual block that can be removed", why=why, fix=fix)


def _named(blocks: Sequence[Block], names: str | Iterable[str]) -> list[Block]:
    """The blocks that are meant, each once."""
    chosen: dict[str, Block] = {}
    for name in [names] if isinstance(names, str) else list(names):
        found = _matches(blocks, name)
        unfit = next((b for b in found if b.reason), None)
        if unfit is not None:
            raise PruneError(406, f"block {unfit.name!r} cannot be removed", where=f"%{unfit.output}", why=unfit.reason)
        chosen |= {b.name: b for b in found}
    return list(chosen.values())


def fits(block: str, name: Any) -> bool:
    """True when ``name`` is the block's, a module path above it, or a glob it matches."""
    plain = isinstance(name, str)
    return plain and (block == name or block.startswith(f"{name}.") or fnmatch.fnmatchcase(block, name))


def _is_glob(name: Any) -> bool:
    return any(c in str(name) for c in "*?[")


def _matches(blocks: Sequence[Block], name: Any) -> list[Block]:
    exact = [b for b in blocks if b.name == name]
    fitting = [b for b in blocks if fits(b.name, name)]
    found = exact or ([b for b in fitting if not b.reason] if _is_glob(name) else fitting)
    if not found:
        known = [b.name for b in blocks]
        near = difflib.get_close_matches(str(name), known, 3, cutoff=0.4) or known[:3]
        raise PruneError(405, f"there is no residual block {name!r}", fix=f"did you mean {', '.join(near)}?")
    return found


def _wanted(free: Sequence[Block], count: int | None, ratio: float | None) -> int | None:
    """How many blocks to remove; None for as many as a budget takes."""
    if ratio is not None:
        return int(ratio * len(free) + 1e-9)
    if count is not None and count > len(free):
        fix = f"remove at most {len(free)}"
        raise PruneError(408, f"{count} blocks cannot be removed: {len(free)} can be bypassed", fix=fix)
    return count


def _cheapest(
    program: Program, blocks: Sequence[Block], ranked: Sequence[Block], wanted: int | None, share: float | None
) -> list[Block]:
    """The lowest scores until there are ``wanted``, or until the MACs are down to ``share``; inner blocks go along."""
    shapes = Shapes(program)
    cost = {n.name: node_macs(program, n, shapes) for n in program.graph.nodes}
    budget = (share or 0.0) * sum(cost.values())
    chosen: list[Block] = []
    gone: set[str] = set()

    def left() -> int:
        return sum(v for name, v in cost.items() if name not in gone)

    for block in ranked:
        if len(chosen) == wanted or (wanted is None and left() <= budget):
            return chosen
        if block.output in gone:
            continue
        if wanted is None and not _rest(blocks, [*chosen, block]):
            break  # the last block stays
        gone |= set(block.nodes)
        chosen = [b for b in chosen if b.output not in gone] + [block]
    if wanted is None and left() > budget:
        closest = left() / max(sum(cost.values()), 1)
        what = f"the MACs cannot be brought down to {share:.1%} by removing blocks"
        raise PruneError(409, what, why=f"{closest:.1%} is the closest", fix="allow more MACs, or prune channels too")
    return chosen


def _rest(blocks: Sequence[Block], chosen: Sequence[Block]) -> list[Block]:
    """The blocks that are left without the chosen ones and those inside them."""
    gone = {name for b in chosen for name in (*b.nodes, b.output)}
    return [b for b in blocks if b.output not in gone]


def _check_rest(blocks: Sequence[Block], chosen: Sequence[Block]) -> None:
    if chosen and not _rest(blocks, chosen):
        fix = "keep at least one" if len(blocks) > 1 else "prune its channels instead"
        raise PruneError(407, f"no residual block would be left of {len(blocks)}", fix=fix)
