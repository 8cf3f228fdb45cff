"""Figures of a run, from its summary or its epochs, and how figures are put into words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from spfde.app.report.folders import RecordedRun, number
from spfde.app.runs.best import best_epoch

MISSING = "–"
SPLITS = {"val": "validation", "test": "test"}
"""The sets that figures are measured on, by what the figures' names begin with."""
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


def figure(run: RecordedRun, name: str) -> float | None:
    """A number of the summary; of an unfinished run, or where the summary has none, what its epochs come to so far."""
    value = number(run.summary.get(name)) if run.summary is not None else None
    return _SO_FAR[name](run) if value is None and name in _SO_FAR else value


def _sparsity(run: RecordedRun) -> float | None:
    density = run.last("density")
    return None if density is None else 1 - density


def _best(name: str) -> Callable[[RecordedRun], float | None]:
    """That of the best epoch, as the summary has it."""

    def of(run: RecordedRun) -> float | None:
        rows = [{"density": 1.0, **row} for row in run.epochs.values() if name in row]
        best = best_epoch(rows)
        return None if best is None else rows[best][name]

    return of


_SO_FAR: Mapping[str, Callable[[RecordedRun], float | None]] = {
    "test_accuracy": lambda run: run.last("test_accuracy"),
    "best_test_accuracy": _best("test_accuracy"),
    "val_accuracy": lambda run: run.last("val_accuracy"),
    "best_val_accuracy": _best("val_accuracy"),
    "training_flops": lambda run: run.total("training_flops"),
    "flops_ratio": lambda run: share_of_dense(run, "training_flops"),
    "seconds": lambda run: run.total("seconds"),
    "peak_memory_bytes": lambda run: run.largest("peak_memory_bytes"),
    "final_sparsity": _sparsity,
    "samples_seen": lambda run: run.total("samples"),
    "frozen_blocks": lambda run: run.last("frozen_blocks"),
    "total_blocks": lambda run: run.largest("total_blocks"),
}


def setting(run: RecordedRun, name: str) -> str:
    """A setting by the summary, by ``config.json``, or as it was asked for on the command line."""
    asked = run.section("command")
    for value in ((run.summary or {}).get(name), run.config.get(name), asked.get(f"{name}_name"), asked.get(name)):
        if isinstance(value, (str, int)):
            return str(value)
    return MISSING


def model(run: RecordedRun) -> str:
    """The model's name, and its width where that is not 1."""
    width = number(run.section("command").get("width"))
    return setting(run, "model") + ("" if width in (None, 1) else f", width {width:g}")


def data_name(run: RecordedRun) -> str:
    name = run.section("data").get("name") or run.section("command").get("data")
    return str(name) if name else MISSING


def versions(run: RecordedRun) -> str:
    summarised = (run.summary or {}).get("versions")
    found = {**run.section("versions"), **(summarised if isinstance(summarised, dict) else {})}
    shown = [f"{name}{NBSP}{found[name]}" for name in ("spfde", "torch") if found.get(name)]
    return ", ".join(shown) or MISSING


def state(run: RecordedRun) -> str:
    """How far an unfinished run has come."""
    return f"unfinished: {len(run.epochs)} of {run.planned_epochs or '?'} epochs"


def frozen_blocks(run: RecordedRun) -> str:
    frozen, total = figure(run, "frozen_blocks"), figure(run, "total_blocks")
    return MISSING if frozen is None else f"{count(frozen)} / {count(total)}"


def peak_memory(run: RecordedRun) -> str:
    return memory(figure(run, "peak_memory_bytes") or None)


def partial_share(run: RecordedRun) -> str:
    partial, removed = run.last("partial_samples"), run.last("removed_samples") or 0.0
    return MISSING if partial is None else percent(partial / (partial + removed), 0)


def accuracies(run: RecordedRun) -> str:
    chosen = "" if figure(run, "test_accuracy") is None else f", best by {SPLITS[run.evaluated_on]}"
    return _last_and_best(run, "test_accuracy") + chosen


def validated(run: RecordedRun) -> str:
    return _last_and_best(run, "val_accuracy") if run.evaluated_on == "val" else MISSING


def _last_and_best(run: RecordedRun, name: str) -> str:
    return f"{percent(figure(run, name))} / {percent(figure(run, f'best_{name}'))}"


def headline(run: RecordedRun) -> tuple[str, float | None]:
    """A run's accuracy and its name: on the test set, unless that has not been looked at yet."""
    split = "test" if run.finished else run.evaluated_on
    return f"{SPLITS[split]} accuracy", figure(run, f"{split}_accuracy")


def dense_run(run: RecordedRun, runs: Sequence[RecordedRun]) -> RecordedRun | None:
    """The dense run among ``runs`` that ``run`` can be timed against: same model, data, epochs, batch and machine."""

    def setup(of: RecordedRun) -> tuple[object, ...]:
        command, machine = of.section("command"), of.section("hardware")
        shared = tuple(str(command.get(name)) for name in ("batch_size", "precision", "workers"))
        held_out = command.get("validation_share") or 0  # older runs do not say it
        return (model(of), held_out, data_name(of), of.planned_epochs, str(dict(machine)), *shared)

    for other in runs:
        ratio = figure(other, "flops_ratio")
        if other.finished and ratio is not None and abs(ratio - 1) < 1e-9 and setup(other) == setup(run):
            return other
    return None


def time_against_dense(run: RecordedRun, runs: Sequence[RecordedRun]) -> str:
    """Seconds over those of a dense run: one of ``runs``, or an estimate from dense steps that the run itself timed."""
    spent, dense = figure(run, "seconds"), dense_run(run, runs)
    if spent is None or not run.finished:
        return MISSING
    if dense is not None and (base := figure(dense, "seconds")):
        return times(spent / base)
    estimate = figure(run, "dense_seconds_extrapolated")
    return f"≈ {times(spent / estimate)}" if estimate else MISSING


def share_of_dense(run: RecordedRun, name: str) -> float | None:
    """A FLOPs field, summed over the run, over the dense model's."""
    part, dense = run.total(name), run.total("dense_training_flops")
    return None if part is None or not dense else part / dense
