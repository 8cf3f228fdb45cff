"""Reading a run folder: what was asked for, an epoch at a time what happened, and how it ended."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from spfde.app.runs.folder import CONFIG, METRICS, SUMMARY, RunFolder
from spfde.core.errors import RunFolderError


@dataclass(frozen=True)
class Epoch:
    """One line of ``metrics.jsonl``. None: not recorded, or not a finite number.

    Accuracies are fractions in [0, 1], times seconds, memory bytes. FLOPs and ``modelled_memory_bytes`` are modelled,
    everything else is measured or counted.

    Attributes:
        epoch: from 0.
        density: share of active weights among the masked weights.
        samples: samples trained on in this epoch.
        training_flops: of this epoch, and so are the five after it.
        seconds: of training, without evaluation.
        saved_tensor_bytes: what autograd kept for the backward pass of one step.
        sieve_moved: samples that changed places at the top of this epoch, in each direction.
        sieve_ever_used: distinct samples trained on so far.
    """

    epoch: int
    train_loss: float | None = None
    train_accuracy: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    learning_rate: float | None = None
    density: float | None = None
    explored: float | None = None
    frozen_blocks: float | None = None
    total_blocks: float | None = None
    partial_samples: float | None = None
    removed_samples: float | None = None
    samples: float | None = None
    steps: float | None = None
    training_flops: float | None = None
    dense_training_flops: float | None = None
    saved_by_sparsity: float | None = None
    saved_by_freezing: float | None = None
    saved_by_sieving: float | None = None
    dense_gradient_flops: float | None = None
    overhead_flops: float | None = None
    seconds: float | None = None
    evaluation_seconds: float | None = None
    peak_memory_bytes: float | None = None
    saved_tensor_bytes: float | None = None
    modelled_memory_bytes: float | None = None
    sieve_moved: float | None = None
    sieve_ever_used: float | None = None


_FIELDS = tuple(item.name for item in fields(Epoch) if item.name != "epoch")


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Attributes:
        path: the folder.
        name: what to call it beside other runs.
        config: ``config.json``.
        epochs: the finished epochs, in order, each once.
        summary: ``summary.json``; None while the run is unfinished.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    epochs: tuple[Epoch, ...] = ()
    summary: Mapping[str, Any] | None = field(default=None)

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def planned_epochs(self) -> int:
        """Epochs that were asked for; those that are done, where the folder does not say."""
        asked = number(self.section("command").get("epochs"))
        return max(int(asked or 0), self.epochs[-1].epoch + 1 if self.epochs else 0)

    def section(self, name: str) -> Mapping[str, Any]:
        """A table of ``config.json``; empty if it has none of that name."""
        section = self.config.get(name)
        return section if isinstance(section, Mapping) else {}

    def points(self, name: str) -> tuple[list[int], list[float]]:
        """Epochs and values of one field of ``Epoch``, where it was recorded."""
        found = [(epoch.epoch, value) for epoch in self.epochs if (value := getattr(epoch, name)) is not None]
        return [epoch for epoch, _ in found], [value for _, value in found]

    def last(self, name: str) -> float | None:
        """The latest recorded value of one field."""
        _, values = self.points(name)
        return values[-1] if values else None

    def largest(self, name: str) -> float | None:
        """The largest recorded value of one field."""
        return max(self.points(name)[1], default=None)

    def total(self, name: str) -> float | None:
        """The sum of one field over the epochs; None if it was never recorded."""
        _, values = self.points(name)
        return sum(values) if values else None

    @property
    def freezes(self) -> bool:
        """Whether a block was frozen, or is going to be."""
        return bool(self.largest("frozen_blocks")) or any(epoch is not None for epoch in self.freeze_epochs())

    @property
    def sieves(self) -> bool:
        """Whether samples were left out."""
        return bool(self.largest("removed_samples"))

    def freeze_epochs(self) -> list[int | None]:
        """The first epoch of each block, front to back, in which it is frozen; None where that never comes.

        What happened counts where there are epochs, the plan where they are still to come.
        """
        planned = self.section("plan").get("freeze_epochs")
        plan = [number(epoch) for epoch in planned] if isinstance(planned, list) else []
        n_blocks = max(int(self.largest("total_blocks") or 0), int(self.largest("frozen_blocks") or 0), len(plan))
        done = self.epochs[-1].epoch + 1 if self.epochs else 0
        epochs, frozen = self.points("frozen_blocks")
        result: list[int | None] = []
        for block in range(n_blocks):
            seen = next((epoch for epoch, count in zip(epochs, frozen, strict=True) if count > block), None)
            to_come = plan[block] if block < len(plan) else None
            pending = to_come is not None and to_come >= done and not self.finished
            result.append(int(to_come) if seen is None and pending and to_come is not None else seen)
        return result

    def frozen_spans(self) -> list[list[tuple[int, int]]]:
        """For each block the spans of epochs, ends excluded, in which it is frozen: what happened, then the plan.

        A plan that does not say how many blocks are frozen in each epoch is taken to keep them frozen. What was frozen
        earlier than planned stays so, unless the plan thaws blocks.
        """
        counted = dict(zip(*self.points("frozen_blocks"), strict=True))
        written = self.section("plan").get("frozen_blocks")
        planned = [number(count) or 0.0 for count in written] if isinstance(written, list) else []
        if planned and not self.finished:
            least = max(counted.values(), default=0.0) if planned == sorted(planned) else 0.0
            to_come = {epoch: max(count, least) for epoch, count in enumerate(planned) if epoch not in counted}
            counted |= to_come
        spans: list[list[tuple[int, int]]] = []
        for block, first in enumerate(self.freeze_epochs()):
            stays = self.planned_epochs if first is None else first
            frozen = [counted[e] > block if e in counted else e >= stays for e in range(self.planned_epochs)]
            edges = [e for e, (a, b) in enumerate(pairwise([False, *frozen, False])) if a != b]
            spans.append(list(zip(edges[::2], edges[1::2], strict=True)))
        return spans

    def block_names(self) -> list[str]:
        """A name for each entry of ``freeze_epochs()``."""
        names = self.section("plan").get("block_names")
        given = [str(name) for name in names] if isinstance(names, list) else []
        return [given[i] if i < len(given) else f"block {i}" for i in range(len(self.freeze_epochs()))]


def number(value: object) -> float | None:
    """A finite number as it is, anything else as None. (True and False are no numbers.)"""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def read_run(path: str | Path) -> Run:
    """What the run folder ``path`` says. An unfinished run is allowed: its ``summary`` is None.

    A half-written last line of ``metrics.jsonl`` does not count, and of two lines about one epoch the later one does: a
    run that was killed goes on from its checkpoint and may train an epoch again.

    Raises:
        RunFolderError: it is no run folder, or a file in it is damaged.
    """
    folder = RunFolder.existing(Path(path))
    metrics = folder.path / METRICS
    return Run(
        path=folder.path,
        name=folder.path.resolve().name,
        config=folder.read_json(CONFIG),
        epochs=_read_epochs(metrics) if metrics.is_file() else (),
        summary=folder.read_json(SUMMARY) if folder.is_finished else None,
    )


def _read_epochs(path: Path) -> tuple[Epoch, ...]:
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read ({error}). Make it readable, or leave this run out.") from None
    lines = [(at, line) for at, line in enumerate(text.split("\n"), start=1) if line.strip()]
    by_epoch: dict[int, Epoch] = {}
    for at, line in lines:
        try:
            epoch = _parse_epoch(json.loads(line))
        except (ValueError, RecursionError) as error:
            if at == lines[-1][0]:
                break
            remedy = "Restore the file, or leave this run out."
            raise RunFolderError(f"{path}: line {at} is damaged ({error}). {remedy}") from None
        by_epoch[epoch.epoch] = epoch
    return tuple(by_epoch[at] for at in sorted(by_epoch))


def _parse_epoch(row: object) -> Epoch:
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    at = row.get("epoch")
    if not isinstance(at, int) or isinstance(at, bool) or at < 0:
        raise ValueError(f"epoch={at!r} is no whole number from 0 on")
    for name in _FIELDS:
        if not isinstance(row.get(name), (int, float, type(None))) or isinstance(row.get(name), bool):
            raise ValueError(f"{name}={row[name]!r} is no number")
    return Epoch(epoch=at, **{name: number(row.get(name)) for name in _FIELDS})
