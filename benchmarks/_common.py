"""What the benchmarks share: timing side by side, the stamp of the machine, and one form of result.

Variants are timed interleaved in one process and told as ratios: a machine drifts by more than what is measured, and
a ratio of two times taken one right after the other feels little of it.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

BENCHMARKS = Path(__file__).resolve().parent
RESULTS = BENCHMARKS / "results"

# --- timing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant, in order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """One variant's time over another's.

    Attributes:
        paired: median over the rounds of the ratio within a round. Drift of the machine cancels; this is the figure.
        of_medians: ratio of the two medians, for comparison: far from ``paired`` means a restless machine.
        quartiles: of the ratios within a round.
        n: rounds.
    """

    paired: float
    of_medians: float
    quartiles: tuple[float, float]
    n: int


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    around: Mapping[str, Callable[[], AbstractContextManager[None]]] | None = None,
) -> dict[str, Timing]:
    """Time callables turn by turn.

    Each round calls every one once and starts one further than the round before, so that none always runs right after
    the same other one.

    Args:
        calls: what to time, by name.
        rounds: timed rounds.
        warmup: rounds before, not timed.
        around: what each call of that name is made in, not timed: preparations before it and checks after it.
    """
    surrounded = around or {}
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: must be at least 1.")
    names = list(calls)
    for _ in range(warmup):
        for name, call in calls.items():
            with surrounded.get(name, nullcontext)():
                call()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for number in range(rounds):
        for offset in range(len(names)):
            name = names[(number + offset) % len(names)]
            with surrounded.get(name, nullcontext)():
                start = time.perf_counter()
                calls[name]()
                passed = time.perf_counter() - start
            seconds[name].append(passed)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def compare(timing: Timing, base: Timing) -> Ratio:
    """``timing`` over ``base``, both of the same rounds."""
    paired = [one / other for one, other in zip(timing.seconds, base.seconds, strict=True)]
    return Ratio(statistics.median(paired), timing.median / base.median, quartiles(paired), len(paired))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; a single value is both."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


class Served:
    """A process that answers each number with a line of JSON: that of its seconds, say."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            list(command), env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, n: int) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{n}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        """Stop it."""
        self._process.kill()
        self._process.wait()


# --- the machine ------------------------------------------------------------------------------------------------------


def stamp() -> dict[str, Any]:
    """Where, when and with what a figure was taken."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": _load(),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "numpy", "spfde")},
        },
    }


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    found = next(named, None) or _output("sysctl", "-n", "machdep.cpu.brand_string")
    return found or platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _load() -> float | None:
    """Processes that ran or waited in the last minute: above 1 at the start, somebody else is at work."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit(tree: Path = BENCHMARKS.parent) -> str | None:
    """The commit of a tree, and whether its sources have changed since; None outside of a repository."""
    found = _output("git", "rev-parse", "--short", "HEAD", cwd=tree)
    if not found:
        return None
    # Without optional locks: looking must not write to the repository.
    changed = _output("git", "--no-optional-locks", "status", "--short", "src", cwd=tree)
    return f"{found} with changes" if changed else found


def _output(*command: str, cwd: Path = BENCHMARKS.parent) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


# --- results ----------------------------------------------------------------------------------------------------------

Unit = Literal["share", "ratio", "epoch", "flops", "seconds", "accuracy", "points", "count"]


@dataclass(frozen=True)
class Figure:
    """One number, beside its target.

    Attributes:
        what: what it is, in a few words.
        value: the number; for ``points`` a difference of accuracies in [-1, 1].
        low: least value that meets the target; None for no bound.
        high: largest value that meets the target; None for no bound.
        aim: what is aimed at beyond the target; None for nothing.
        kind: measured on the machine, or modelled.
        n: repetitions behind it.
        spread: first and third quartile, or with ``spread_is="sd"`` the value minus and plus the standard deviation.
        of_medians: for a median of paired ratios, the ratio of the medians.
        headline: whether it belongs into the README.
    """

    what: str
    value: float
    unit: Unit
    low: float | None = None
    high: float | None = None
    aim: float | None = None
    kind: Literal["measured", "modelled"] = "measured"
    n: int | None = None
    spread: tuple[float, float] | None = None
    spread_is: Literal["quartiles", "sd"] = "quartiles"
    of_medians: float | None = None
    headline: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.low is None and self.high is None:
            return None
        return (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)

    @property
    def meets_aim(self) -> bool | None:
        """Whether the aim is reached, on the side that the target bounds; None without one."""
        if self.aim is None:
            return None
        return self.value <= self.aim if self.low is None else self.value >= self.aim

    @property
    def target(self) -> str:
        """The target in words."""
        if self.low is not None and self.high is not None:
            return f"{show(self.low, self.unit)} to {show(self.high, self.unit)}"
        if self.low is not None:
            return f"at least {show(self.low, self.unit)}"
        return f"at most {show(self.high, self.unit)}" if self.high is not None else "–"

    @classmethod
    def of(
        cls,
        what: str,
        ratio: Ratio,
        *,
        low: float | None = None,
        high: float | None = None,
        aim: float | None = None,
        headline: bool = False,
    ) -> Figure:
        """The figure of a measured ratio."""
        return cls(
            what,
            ratio.paired,
            "ratio",
            low=low,
            high=high,
            aim=aim,
            n=ratio.n,
            spread=ratio.quartiles,
            of_medians=ratio.of_medians,
            headline=headline,
        )


@dataclass(frozen=True)
class Table:
    """A table beside the figures; cells are text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of_timings(cls, title: str, what: str, timings: Mapping[str, Timing]) -> Table:
        """Median and quartiles of each timing; ``what`` heads the column of their names."""
        rows = [
            (name, show(timing.median, "seconds"), " … ".join(show(q, "seconds") for q in timing.quartiles))
            for name, timing in timings.items()
        ]
        return cls(title, (what, "median", "quartiles"), tuple(rows))


@dataclass(frozen=True)
class Result:
    """What one benchmark found.

    Attributes:
        name: of the script and of the file with the result.
        title: heading.
        question: one or two sentences.
        command: how to run it.
        settings: what was run, by name.
        data: anything else worth keeping (curves); not shown.
    """

    name: str
    title: str
    question: str
    command: str
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stamp: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The whole result as JSON text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        """The result that ``to_json`` wrote."""
        fields = json.loads(text)
        figures = [{**figure, "spread": _pair(figure["spread"])} for figure in fields.pop("figures")]
        tables = [
            Table(table["title"], tuple(table["columns"]), tuple(tuple(row) for row in table["rows"]))
            for table in fields.pop("tables")
        ]
        notes = tuple(fields.pop("notes"))
        return cls(figures=tuple(Figure(**figure) for figure in figures), tables=tuple(tables), notes=notes, **fields)


def _pair(spread: Sequence[float] | None) -> tuple[float, float] | None:
    return None if spread is None else (spread[0], spread[1])


def show(value: float, unit: Unit) -> str:
    """A number as it is printed."""
    match unit:
        case "share":
            return f"{value:.2%}" if abs(value) < 0.2 else f"{value:.1%}"
        case "ratio":
            return f"{value:.3g}x"
        case "epoch":
            return f"{value:.0f}"
        case "flops":
            return f"{value:.4g}"
        case "seconds":
            if value < 1e-3:
                return f"{1e6 * value:.0f} µs"
            return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"
        case "count":
            return f"{value:,.0f}"
        case "accuracy":
            return f"{value:.4f}"
        case "points":
            return f"{100 * value:.2f} points"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned to the left, the others to the right."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join(["---", *["---:"] * (len(columns) - 1)]) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def figures_table(figures: Sequence[Figure]) -> str:
    """The figures with target, aim, spread and n."""
    medians = any(figure.of_medians is not None for figure in figures)
    aims = any(figure.aim is not None for figure in figures)
    columns = ["figure", "value", "target", "met", *(["aim", "reached"] if aims else []), "spread", "n"]
    columns += ["ratio of medians"] if medians else []
    rows = []
    for figure in figures:
        row = [figure.what, show(figure.value, figure.unit), figure.target, met_text(figure)]
        if aims:
            row += ["–" if figure.aim is None else show(figure.aim, figure.unit), _yes_or_no(figure.meets_aim)]
        row += [_spread_text(figure), "–" if figure.n is None else str(figure.n)]
        if medians:
            row.append("–" if figure.of_medians is None else show(figure.of_medians, "ratio"))
        rows.append(row)
    return markdown_table(columns, rows)


def met_text(figure: Figure) -> str:
    """``yes``, ``no``, or a dash without a target."""
    return _yes_or_no(figure.met)


def _yes_or_no(met: bool | None) -> str:
    return {None: "–", True: "yes", False: "**no**"}[met]


def _spread_text(figure: Figure) -> str:
    if figure.kind == "modelled":
        return "modelled"
    if figure.spread is None:
        return "–"
    low, high = figure.spread
    if figure.spread_is == "sd":
        return f"± {show((high - low) / 2, figure.unit)} sd"
    return f"{show(low, figure.unit)} … {show(high, figure.unit)}"


def markdown(result: Result, *, heading: str = "##") -> str:
    """The whole result as Markdown."""
    parts = [f"{heading} {result.title}", result.question, figures_table(result.figures)]
    for table in result.tables:
        parts += [f"**{table.title}**", markdown_table(table.columns, table.rows)]
    if result.notes:
        parts.append("\n".join(f"- {note}" for note in result.notes))
    if result.settings:
        parts.append("Run with: " + ", ".join(f"{name} {value}" for name, value in result.settings.items()) + ".")
    parts.append(f"`{result.command}` · {stamp_line(result.stamp)}")
    return "\n\n".join(parts)


def stamp_line(stamped: Mapping[str, Any]) -> str:
    """The stamp in one line."""
    if not stamped:
        return "not stamped"
    versions = stamped["versions"]
    parts = [
        stamped["date"],
        f"{stamped['cpu']}, {stamped['cores']} cores, {stamped['threads']} threads",
        stamped["accelerator"] and f"accelerator present: {stamped['accelerator']}",
        stamped["system"],
        stamped["memory_gib"] and f"{stamped['memory_gib']} GiB",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        stamped["commit"] and f"commit {stamped['commit']}",
        stamped["load_average"] is not None and f"load average at the start {stamped['load_average']}",
    ]
    return " · ".join(part for part in parts if part)


# --- the command line -------------------------------------------------------------------------------------------------


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has; its docstring is the help."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--quick", action="store_true", help="a smoke test: few repetitions, and no result is kept unless --results"
    )
    made.add_argument(
        "--results", type=Path, default=None, metavar="FOLDER", help="where the JSON goes (benchmarks/results)"
    )
    made.add_argument("--threads", type=int, default=None, help="PyTorch's threads (its own choice by default)")
    return made


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """Take the common options; call it first, and put what it returns, the stamp, into the result."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return stamp()


def publish(result: Result, options: argparse.Namespace) -> None:
    """Print the result, and keep it unless this was a smoke test."""
    print(markdown(result), flush=True)
    folder = options.results if options.results is not None else None if options.quick else RESULTS
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{result.name}.json"
        path.write_text(result.to_json(), encoding="utf-8")
        print(f"\nwritten: {path}", flush=True)
