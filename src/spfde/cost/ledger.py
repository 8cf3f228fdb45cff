"""The bill: one row an epoch, totals, and a table that keeps modelled and measured figures apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args, get_type_hints

from spfde.core.errors import InvalidArgument, Problem, StateMismatch
from spfde.core.state import check_all, check_entries
from spfde.cost.training import EpochCost, total_cost

_DASH = "-"


@dataclass(frozen=True)
class LedgerRow:
    """One epoch. FLOPs and ``modelled_memory_bytes`` are modelled, ``seconds`` and ``peak_memory_bytes`` measured.

    The FLOPs are those of an ``EpochCost``: ``LedgerRow(**dataclasses.asdict(cost), epoch=…, …)``.

    Attributes:
        epoch: from 0.
        samples: samples trained on.
        steps: optimizer steps, or batches where that is what the caller counts.
        density: share of active weights among the masked weights at the end of the epoch; 1 without any.
        frozen_blocks: blocks frozen during the epoch.
        partial_samples: size of the partial set.
        training_flops: what the epoch cost.
        dense_training_flops: what it would cost the dense model on all samples.
        saved_by_sparsity: FLOPs.
        saved_by_freezing: FLOPs.
        saved_by_sieving: FLOPs.
        dense_gradient_flops: FLOPs added by gradients of inactive weights.
        overhead_flops: FLOPs computed beside the training steps (scores of pruning at initialisation, probes).
        seconds: wall clock.
        peak_memory_bytes: measured peak; None if the platform does not tell.
        modelled_memory_bytes: None if not modelled.
        lr: learning rate of the first group; None if unknown.
        dense_weight_bytes: what the model's tensors take at the end of the epoch, dense; None if not modelled.
        compressed_weight_bytes: what they take without what the masks cut off (``spfde.export``).

    Example:
        >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=1)
        >>> for epoch in session.epochs():
        ...     for x, y in session.loader:
        ...         model(x).sum().backward()
        ...         optimizer.step()
        >>> row = session.cost.rows[0]
        >>> row.samples, row.steps
        (20, 3)
    """

    epoch: int
    samples: int
    steps: int
    density: float
    frozen_blocks: int
    partial_samples: int
    training_flops: int
    dense_training_flops: int
    saved_by_sparsity: int
    saved_by_freezing: int
    saved_by_sieving: int
    dense_gradient_flops: int
    seconds: float
    peak_memory_bytes: int | None = None
    modelled_memory_bytes: int | None = None
    lr: float | None = None
    overhead_flops: int = 0
    dense_weight_bytes: int | None = None
    compressed_weight_bytes: int | None = None

    @property
    def cost(self) -> EpochCost:
        """The FLOPs of this row."""
        return EpochCost(**{f.name: getattr(self, f.name) for f in dataclasses.fields(EpochCost)})


@dataclass(frozen=True)
class LedgerTotals:
    """Sums over the rows; the largest peak; modelled memory averaged and least; the weights' bytes in the last row.

    Example:
        >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2)
        >>> for epoch in session.epochs():
        ...     for x, y in session.loader:
        ...         model(x).sum().backward()
        ...         optimizer.step()
        >>> session.cost.totals.epochs, session.cost.totals.cost.saved_by_freezing
        (2, 0)
    """

    epochs: int
    samples: int
    steps: int
    cost: EpochCost
    seconds: float
    peak_memory_bytes: int | None
    average_memory_bytes: float | None
    minimum_memory_bytes: int | None
    dense_weight_bytes: int | None = None
    compressed_weight_bytes: int | None = None

    @property
    def flops_ratio(self) -> float:
        """Training FLOPs over those of the dense model; 1 before any are spent."""
        dense = self.cost.dense_training_flops
        return self.cost.training_flops / dense if dense else 1.0


class Ledger:
    """Rows in order of epochs, and what they add up to.

    Args:
        uncounted: modules that the modelled FLOPs leave out, by type name, with their calls (``ModelCost.uncounted``).
        dense_memory_bytes: modelled memory of the dense model, to hold the rows' against.

    Example:
        >>> session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=1)
        >>> for epoch in session.epochs():
        ...     for x, y in session.loader:
        ...         model(x).sum().backward()
        ...         optimizer.step()
        >>> session.cost.totals.samples
        20
    """

    def __init__(self, *, uncounted: Mapping[str, int] | None = None, dense_memory_bytes: int | None = None) -> None:
        self.uncounted = dict(uncounted) if uncounted is not None else None
        self.dense_memory_bytes = dense_memory_bytes
        self._rows: list[LedgerRow] = []

    @property
    def rows(self) -> tuple[LedgerRow, ...]:
        """All rows, oldest first."""
        return tuple(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self.state_dict() == other.state_dict()

    __hash__ = None  # type: ignore[assignment]  # it grows

    def add(self, row: LedgerRow) -> None:
        """Enter an epoch.

        Raises:
            InvalidArgument: the epoch is not later than the last one, or the savings do not add up.
        """
        last = self._rows[-1].epoch if self._rows else -1
        if row.epoch <= last:
            rule, remedy = f"must be later than the last one ({last})", "Enter each epoch once."
            raise InvalidArgument(Problem("row.epoch", row.epoch, rule, remedy))
        saved = row.saved_by_sparsity + row.saved_by_freezing + row.saved_by_sieving
        added = row.dense_gradient_flops + row.overhead_flops
        if row.dense_training_flops - saved + added != row.training_flops:
            rule = "must be the dense FLOPs less the savings plus the dense gradients and the overhead"
            remedy = "Take the figures of one EpochCost."
            raise InvalidArgument(Problem("row.training_flops", row.training_flops, rule, remedy))
        self._rows.append(row)

    @property
    def totals(self) -> LedgerTotals:
        """Sums over all rows so far."""
        rows = self._rows
        peaks = [row.peak_memory_bytes for row in rows if row.peak_memory_bytes is not None]
        modelled = [row.modelled_memory_bytes for row in rows if row.modelled_memory_bytes is not None]
        return LedgerTotals(
            epochs=len(rows),
            samples=sum(row.samples for row in rows),
            steps=sum(row.steps for row in rows),
            cost=total_cost(row.cost for row in rows),
            seconds=math.fsum(row.seconds for row in rows),
            peak_memory_bytes=max(peaks, default=None),
            average_memory_bytes=sum(modelled) / len(modelled) if modelled else None,
            minimum_memory_bytes=min(modelled, default=None),
            dense_weight_bytes=rows[-1].dense_weight_bytes if rows else None,
            compressed_weight_bytes=rows[-1].compressed_weight_bytes if rows else None,
        )

    def __str__(self) -> str:
        return _render(self.totals, self.uncounted, self.dense_memory_bytes)

    def __repr__(self) -> str:
        return f"<Ledger: {len(self)} epochs, {self.totals.flops_ratio:.1%} of the dense training FLOPs>"

    def state_dict(self) -> dict[str, Any]:
        """Rows and baselines, in primitives."""
        return {
            "uncounted": None if self.uncounted is None else dict(self.uncounted),
            "dense_memory_bytes": self.dense_memory_bytes,
            "rows": [dataclasses.asdict(row) for row in self._rows],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a saved ledger in place of this one; nothing changes when the state does not fit.

        Raises:
            StateMismatch: the state is not a ledger's, or its rows do not add up.
        """
        check_entries(
            state, "the bill", {"uncounted": (dict, NoneType), "dense_memory_bytes": (int, NoneType), "rows": list}
        )
        check_all(state["uncounted"] or {}, "uncounted in the state of the bill", int)
        saved = Ledger(uncounted=state["uncounted"], dense_memory_bytes=state["dense_memory_bytes"])
        for entry in state["rows"]:
            check_entries(entry, "a row of the bill", _KINDS)
            try:
                saved.add(LedgerRow(**entry))
            except InvalidArgument as error:
                raise StateMismatch(f"the state of the bill holds a damaged row: {error}") from error
        vars(self).update(vars(saved))


_KINDS = {name: (*(get_args(hint) or (hint,)), int) for name, hint in get_type_hints(LedgerRow).items()}
"""What the entries of a saved row are."""


def _render(totals: LedgerTotals, uncounted: Mapping[str, int] | None, dense_memory: float | None) -> str:
    """Modelled and measured in columns of their own, and against dense."""
    cost = totals.cost
    spent, dense = cost.training_flops, cost.dense_training_flops

    def source(label: str, saved: int) -> tuple[str, ...]:
        amount = format_flops(-saved) if saved else "0 FLOP"
        return f"  {label}", amount, "", "", f"{-saved / dense:+.1%}" if saved and dense else ""

    def memory(label: str, value: float | None, against: float | None = dense_memory) -> tuple[str, ...]:
        return label, format_bytes(value), "", format_bytes(against), _percent(value, against)

    table = [
        ("", "modelled", "measured", "dense", "of dense"),
        ("training FLOPs", format_flops(spent), "", format_flops(dense), _percent(spent, dense)),
        source("saved by sparsity", cost.saved_by_sparsity),
        source("saved by freezing", cost.saved_by_freezing),
        source("saved by sieving", cost.saved_by_sieving),
        source("added by dense gradients", -cost.dense_gradient_flops),
        *([source("added by scores and probes", -cost.overhead_flops)] if cost.overhead_flops else []),
        memory("step memory, average", totals.average_memory_bytes),
        memory("step memory, least", totals.minimum_memory_bytes),
        memory("weights, compressed", totals.compressed_weight_bytes, totals.dense_weight_bytes),
        ("peak memory", "", format_bytes(totals.peak_memory_bytes), "", ""),
        ("time", "", format_seconds(totals.seconds), _DASH, _DASH),
    ]
    title = f"Cost of {totals.epochs:,} epochs, {totals.steps:,} steps, {totals.samples:,} samples"
    lines = [title, "", _table(table), "", "The dense column is modelled."]
    if uncounted is not None:
        listed = ", ".join(f"{name} x{calls}" for name, calls in sorted(uncounted.items())) or "nothing"
        lines.append(f"Modelled FLOPs leave out: {listed}.")
    return "\n".join(lines)


def format_flops(flops: float | None) -> str:
    """``13.23 PFLOP``: a number of operations, not a rate.

    Example:
        >>> spfde.cost.format_flops(1.323e16)
        '13.23 PFLOP'
    """
    return _scaled(flops, 1000, ("", "k", "M", "G", "T", "P", "E", "Z"), "FLOP")


def format_bytes(size: float | None) -> str:
    """``312.4 MiB``.

    Example:
        >>> spfde.cost.format_bytes(327_600_000)
        '312.4 MiB'
    """
    return _scaled(size, 1024, ("", "Ki", "Mi", "Gi", "Ti", "Pi"), "B")


def format_seconds(seconds: float | None) -> str:
    """``12.3 s``, ``5 min 12 s``, ``3 h 05 min``.

    Example:
        >>> spfde.cost.format_seconds(312)
        '5 min 12 s'
    """
    if seconds is None:
        return _DASH
    if seconds < 60:
        return f"{seconds:.1f} s" if round(seconds, 1) < 60 else "1 min 00 s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _scaled(value: float | None, base: int, prefixes: Sequence[str], unit: str) -> str:
    if value is None:
        return _DASH
    power = 0
    while abs(float(f"{value:.4g}")) >= base and power < len(prefixes) - 1:
        value /= base
        power += 1
    number = f"{value:.4g}" if power or value != int(value) else f"{int(value)}"
    return f"{number} {prefixes[power]}{unit}"


def _percent(part: float | None, whole: float | None) -> str:
    return _DASH if part is None or not whole else f"{part / whole:.1%}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)
