"""Reading a run folder: what was asked for, an epoch at a time what happened, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spfde.app.runs.folder import CONFIG, METRICS, SUMMARY, RunFolder
from spfde.core import json_text
from spfde.core.errors import RunFolderError, shortened

LARGEST = 1e30
"""Above what any run counts, and far below where sums and axes break."""
MOST = 100_000
"""Epochs of a run, and its blocks: what a file says beyond that is not believed, as there would be a list of it."""


@dataclass(frozen=True)
class RecordedRun:
    """What a run folder says.

    Accuracies are fractions in [0, 1], times seconds, memory bytes. FLOPs and ``modelled_memory_bytes`` are modelled,
    everything else is measured or counted.

    Attributes:
        path: the folder.
        name: what to call it beside other runs.
        config: ``config.json``.
        epochs: of each finished epoch, from 0, the figures in ``metrics.jsonl`` that were recorded and are finite.
        summary: ``summary.json``; None while the run is unfinished.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    epochs: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    summary: Mapping[str, Any] | None = None

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def planned_epochs(self) -> int:
        """Epochs that were asked for; those that are done, where the folder does not say."""
        asked = number(self.section("command").get("epochs"))
        return max(min(int(asked or 0), MOST), max(self.epochs, default=-1) + 1)

    def section(self, name: str) -> Mapping[str, Any]:
        """A table of ``config.json``; empty if it has none of that name."""
        section = self.config.get(name)
        return section if isinstance(section, Mapping) else {}

    def points(self, name: str) -> tuple[list[int], list[float]]:
        """Epochs and values of one figure, where it was recorded."""
        found = {epoch: row[name] for epoch, row in self.epochs.items() if name in row}
        return list(found), list(found.values())

    @property
    def evaluated_on(self) -> Literal["val", "test"]:
        """The set that every epoch was evaluated on, as its figures' names have it."""
        return "val" if any("val_accuracy" in row for row in self.epochs.values()) else "test"

    def last(self, name: str) -> float | None:
        """The latest recorded value of one figure."""
        _, values = self.points(name)
        return values[-1] if values else None

    def largest(self, name: str) -> float | None:
        """The largest recorded value of one figure."""
        return max(self.points(name)[1], default=None)

    def total(self, name: str) -> float | None:
        """The sum of one figure over the epochs; None if it was never recorded."""
        _, values = self.points(name)
        return sum(values) if values else None

    @property
    def freezes(self) -> bool:
        """Whether a block was frozen, or is planned to be."""
        return bool(self.largest("frozen_blocks")) or any(self.planned_freezing())

    @property
    def sieves(self) -> bool:
        """Whether samples were left out."""
        return bool(self.largest("removed_samples"))

    def planned_freezing(self) -> list[int]:
        """Number of frozen blocks in each epoch, as the timeline in ``config.json`` says; empty where there is none."""
        try:
            rows = [(int(count), int(row["frozen_blocks"])) for count, row in self.section("timeline").get("rows", [])]
        except (KeyError, TypeError, ValueError, OverflowError):
            return []
        if sum(max(0, count) for count, _ in rows) > MOST:
            return []
        return [frozen for count, frozen in rows for _ in range(count)]

    def frozen_blocks(self) -> list[int]:
        """Number of frozen blocks in each epoch, as planned, or else as counted."""
        counts = dict(zip(*self.points("frozen_blocks"), strict=True))
        return self.planned_freezing() or [int(counts.get(epoch, 0)) for epoch in range(self.planned_epochs)]

    def block_names(self) -> list[str]:
        """A name for each block, front to back."""
        names = self.section("plan").get("block_names")
        given = [str(name) for name in names] if isinstance(names, list) else []
        least = max(self.largest("total_blocks") or 0, self.largest("frozen_blocks") or 0)
        return [*given, *(f"block {index}" for index in range(len(given), min(int(least), MOST)))]


def number(value: object) -> float | None:
    """A finite number as it is, anything else as None. (True and False are no numbers, nor is what no run can have.)"""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if -LARGEST <= value <= LARGEST else None


def read_run(path: str | Path) -> RecordedRun:
    """What the run folder ``path`` says. An unfinished run is allowed: its ``summary`` is None.

    A half-written last line of ``metrics.jsonl`` does not count, and of two lines about one epoch the later one does: a
    run that was killed goes on from its checkpoint and may train an epoch again.

    Raises:
        RunFolderError: it is no run folder, or a file in it is damaged.
    """
    folder = RunFolder.existing(Path(path))
    metrics = folder.path / METRICS
    return RecordedRun(
        path=folder.path,
        name=folder.path.resolve().name,
        config=folder.read_json(CONFIG),
        epochs=_read_epochs(metrics) if metrics.is_file() else {},
        summary=folder.read_json(SUMMARY) if folder.is_finished else None,
    )


def _read_epochs(path: Path) -> dict[int, dict[str, float]]:
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read ({error}). Make it readable, or leave this run out.") from None
    lines = [(at, line) for at, line in enumerate(text.split("\n"), start=1) if line.strip()]
    by_epoch: dict[int, dict[str, float]] = {}
    for at, line in lines:
        try:
            epoch, row = _parse_epoch(json_text.parse(line))
        except ValueError as error:
            if at == lines[-1][0]:
                break
            remedy = "Restore the file, or leave this run out."
            raise RunFolderError(f"{path}: line {at} is damaged ({error}). {remedy}") from None
        by_epoch[epoch] = row
    return dict(sorted(by_epoch.items()))


def _parse_epoch(row: object) -> tuple[int, dict[str, float]]:
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    at = row.pop("epoch", None)
    if not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < MOST:
        raise ValueError(f"epoch={shortened(at)} is no whole number from 0 to {MOST - 1}")
    for name, value in row.items():
        if not isinstance(value, (int, float, type(None))) or isinstance(value, bool):
            raise ValueError(f"{name}={shortened(value)} is no number")
    return at, {name: value for name, value in row.items() if number(value) is not None}
