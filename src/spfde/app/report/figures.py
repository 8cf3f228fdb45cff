"""Figures of a run, from its summary or its epochs, and how figures are put into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spfde.app.report.folders import RecordedRun, number

MISSING = "–"
NBSP = "\N{NO-BREAK SPACE}"
"""Between a number and its unit, so that no line breaks there."""


def percent(share: float | None, digits: int = 1) -> str:
    """A fraction as per cent."""
    return MISSING if share is None else f"{100 * share:.{digits}f}{NBSP}%"


def times(ratio: float | None) -> str:
    """A ratio, with three significant digits."""
    if ratio is None:
        return MISSING
    return f"{ratio:.3g}×" if ratio < 100 else f"{ratio:.0f}×"


def flops(count: float | None) -> str:
    """A number of operations in scientific notation: 1.32 × 10¹⁶."""
    if count is None:
        return MISSING
    if count == 0:
        return "0"
    mantissa, exponent = f"{count:.2e}".split("e")
    return f"{mantissa}{NBSP}×{NBSP}10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return MISSING
    if seconds < 99.95:
        return f"{seconds:.1f}{NBSP}s" if seconds >= 1 else f"{seconds:.3g}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}{NBSP}h {minutes:02d}{NBSP}min"
    return f"{minutes}{NBSP}min {rest:02d}{NBSP}s"


def memory(count: float | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return MISSING
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f}{NBSP}{unit}" if unit == "B" or size >= 100 else f"{size:.1f}{NBSP}{unit}"


def count(value: float | None) -> str:
    """A whole number with its thousands set apart."""
    return MISSING if value is None else f"{value:,.0f}".replace(",", "\u202f")


def figure(run: RecordedRun, name: str, otherwise: float | None) -> float | None:
    """A number of the summary; for an unfinished run, or where the summary has none, ``otherwise``."""
    value = number(run.summary.get(name)) if run.summary is not None else None
    return otherwise if value is None else value


def last_accuracy(run: RecordedRun) -> float | None:
    return figure(run, "test_accuracy", run.last("test_accuracy"))


def best_accuracy(run: RecordedRun) -> float | None:
    return figure(run, "best_test_accuracy", run.largest("test_accuracy"))


def training_flops(run: RecordedRun) -> float | None:
    return figure(run, "training_flops", run.total("training_flops"))


def flops_ratio(run: RecordedRun) -> float | None:
    """Training FLOPs over those of the dense model for the same epochs on all samples."""
    spent, dense = run.total("training_flops"), run.total("dense_training_flops")
    return figure(run, "flops_ratio", spent / dense if spent is not None and dense else None)


def seconds(run: RecordedRun) -> float | None:
    return figure(run, "seconds", run.total("seconds"))


def peak_memory(run: RecordedRun) -> float | None:
    return figure(run, "peak_memory_bytes", run.largest("peak_memory_bytes")) or None


def sparsity(run: RecordedRun) -> float | None:
    density = run.last("density")
    return figure(run, "final_sparsity", None if density is None else 1 - density)


def samples_seen(run: RecordedRun) -> float | None:
    return figure(run, "samples_seen", run.total("samples"))


def setting(run: RecordedRun, name: str) -> str:
    """A setting by the summary, by the command line, or by ``config.json`` itself."""
    command = run.section("command")
    for value in ((run.summary or {}).get(name), command.get(f"{name}_name"), command.get(name), run.config.get(name)):
        if isinstance(value, (str, int)):
            return str(value)
    return MISSING


def data_name(run: RecordedRun) -> str:
    name = run.section("data").get("name") or run.section("command").get("data")
    return str(name) if name else MISSING


def engine(run: RecordedRun) -> str:
    """The engine that ran; it is resolved in the summary and in ``config.json``, not in the command ("auto")."""
    for value in ((run.summary or {}).get("engine"), run.config.get("engine"), run.section("command").get("engine")):
        if isinstance(value, str):
            return value
    return MISSING


def versions(run: RecordedRun) -> str:
    found = {**run.section("versions"), **_mapping((run.summary or {}).get("versions"))}
    shown = [f"{name}{NBSP}{found[name]}" for name in ("spfde", "torch") if found.get(name)]
    return ", ".join(shown) or MISSING


def hardware(run: RecordedRun) -> str:
    parts = [
        str(value) for value in (run.section("hardware").get("name"), run.section("hardware").get("device")) if value
    ]
    return ", ".join(dict.fromkeys(parts)) or MISSING


def state(run: RecordedRun) -> str:
    """How far an unfinished run has come."""
    return f"unfinished: {len(run.epochs)} of {run.planned_epochs or '?'} epochs"


def frozen_blocks(run: RecordedRun) -> str:
    frozen = figure(run, "frozen_blocks", run.last("frozen_blocks"))
    total = figure(run, "total_blocks", run.largest("total_blocks"))
    return MISSING if frozen is None else f"{frozen:.0f} / {MISSING if total is None else f'{total:.0f}'}"


def partial_share(run: RecordedRun) -> str:
    partial, removed = run.last("partial_samples"), run.last("removed_samples")
    if partial is None:
        return MISSING
    return percent(partial / (partial + removed), 0) if removed else percent(1.0, 0)


def accuracies(run: RecordedRun) -> str:
    return f"{percent(last_accuracy(run))} / {percent(best_accuracy(run))}"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def dense_run(run: RecordedRun, runs: Sequence[RecordedRun]) -> RecordedRun | None:
    """The dense run among ``runs`` that ``run`` can be timed against: same model, data, epochs, batch and machine."""

    def setup(of: RecordedRun) -> tuple[object, ...]:
        command, machine = of.section("command"), of.section("hardware")
        shared = tuple(str(command.get(name)) for name in ("batch_size", "precision", "workers"))
        return (setting(of, "model"), data_name(of), of.planned_epochs, str(dict(machine)), *shared)

    for other in runs:
        ratio = flops_ratio(other)
        if other.finished and ratio is not None and abs(ratio - 1) < 1e-9 and setup(other) == setup(run):
            return other
    return None


def time_against_dense(run: RecordedRun, runs: Sequence[RecordedRun]) -> str:
    """Seconds over those of a dense run: one of ``runs``, or an estimate from dense steps that the run itself timed."""
    spent, dense = seconds(run), dense_run(run, runs)
    if spent is None or not run.finished:
        return MISSING
    if dense is not None and (base := seconds(dense)):
        return times(spent / base)
    estimate = figure(run, "dense_seconds_extrapolated", None)
    return f"≈ {times(spent / estimate)}" if estimate else MISSING


def share_of_dense(run: RecordedRun, name: str) -> float | None:
    """A FLOPs field, summed over the run, over the dense model's."""
    part, dense = run.total(name), run.total("dense_training_flops")
    return None if part is None or not dense else part / dense
