"""The analysis behind ``spfde analyze``: a run's kept checkpoints against its last one."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spfde.analysis import batch_grams, gradient_norms, minibatch_cka
from spfde.analysis.gradients import successive_differences
from spfde.analysis.structure import structural_overlap
from spfde.app.data.datasets import load_data
from spfde.app.data.images import ImageData, draw
from spfde.app.options import AnalysisOptions, with_words
from spfde.app.runs.checkpoints import check_whole, described
from spfde.app.runs.folder import CONFIG, RunFolder
from spfde.app.runs.kept_model import BlockLayers, CheckpointedModel
from spfde.app.train.options import TrainOptions
from spfde.app.train.setup import hardware, versions
from spfde.core.errors import DataError, RunFolderError
from spfde.core.files import clear_errors, written_whole
from spfde.core.technique import Technique

RESULT = "analysis.json"
FRACTION = 0.5
"""Share of the non-zeros that structural similarity looks at, as in the paper."""


@with_words
class AnalyzeOptions(Technique, AnalysisOptions):
    """What to measure on, as ``spfde analyze`` takes it."""


def analyze_run(folder: Path, options: AnalyzeOptions, out: Path, *, tell: Callable[[str], None]) -> Path:
    """Compare a run's kept checkpoints with the last of them, and write ``analysis.json``.

    Args:
        folder: of a run that was trained with ``keep_every``, finished or not.
        options: what to measure on.
        out: folder of the result; made when needed.
        tell: takes a line of progress.

    Returns:
        The file.

    Raises:
        RunFolderError: no run folder, fewer than two kept checkpoints, a damaged one, or ``out`` cannot be written.
        StateMismatch: a checkpoint is of another run.
        DataError: the data are missing, or not those of the run.
    """
    config, trained, checkpoints = _read_run(folder)
    data = load_data(trained.data, root=options.data_root or trained.data_root)
    _check_data(data, config, folder)
    with clear_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    model = CheckpointedModel(trained, data, native=config.get("engine") == "native")
    found = _measure(model, checkpoints, options, tell)
    content = {
        "run": str(folder),
        "model": trained.model,
        "data": trained.data,
        "recipe": trained.recipe_name,
        "run_epochs": trained.epochs,
        "epochs": list(checkpoints),
        "reference_epoch": max(checkpoints),
        "fraction": FRACTION,
        **found,
        "versions": versions(),
        "hardware": hardware(model.device),
    }
    # What is no number at a checkpoint (an output that is the same for all samples, say) is null in the file.
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    with clear_errors(out), written_whole(out / RESULT) as (draft,):
        draft.write_text(json.dumps(finite, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return out / RESULT


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_run(folder: Path) -> tuple[dict[str, Any], TrainOptions, dict[int, Path]]:
    run = RunFolder.existing(folder)
    config = run.read_json(CONFIG)
    trained = TrainOptions.from_config(config, folder / CONFIG)
    checkpoints = run.checkpoints.kept()
    if len(checkpoints) < 2:
        raise RunFolderError(
            f"{folder}: has {len(checkpoints)} kept checkpoints, and two are needed to compare. Train with "
            "`spfde train --keep-every N`, N less than the number of epochs, and let it get that far."
        )
    for path in checkpoints.values():
        check_whole(path)
        trained.check_identity(described(path), path)
    return config, trained, checkpoints


def _check_data(data: ImageData, config: Mapping[str, Any], folder: Path) -> None:
    """Refuse other data than those of the run: the counts, the shape and the statistics of the images must agree."""
    then = config.get("data")
    if not isinstance(then, Mapping):
        raise RunFolderError(f'{folder / CONFIG}: lacks the run\'s data ("data"). Restore the file from a copy.')
    for name, value in data.facts().items():
        if name != "name" and not _agrees(value, then.get(name)):
            raise DataError(
                f"{data.spec.name}: is not what the run in {folder} was trained on: {name} is {value}, and was "
                f"{then.get(name)}. Put the run's own data back."
            )


def _agrees(now: Any, then: Any) -> bool:
    if isinstance(now, list) and isinstance(then, list):
        return len(now) == len(then) and all(map(_agrees, now, then))
    if isinstance(now, float) and isinstance(then, (int, float)):
        return math.isclose(now, then, rel_tol=1e-4, abs_tol=1e-6)
    return bool(now == then)


# --- measuring -------------------------------------------------------------------------------------------------------


def _measure(
    model: CheckpointedModel, checkpoints: Mapping[int, Path], options: AnalyzeOptions, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Figures of every checkpoint, by block and by layer, in the form of ``analysis.json``."""
    generator = torch.Generator().manual_seed(model.seed)
    images, _ = draw(model.data.test, options.samples, generator)
    train = draw(model.data.train, options.gradient_samples, generator) if options.gradient_samples else None
    if len(images) < 4:
        raise DataError(f"{model.data.spec.name}: has {len(images)} test images, and CKA needs 4. Use a larger set.")
    n_batches = min(math.ceil(len(images) / options.batch_size), len(images) // 4)
    watch = _Stopwatch()
    columns = []
    model.load(checkpoints[max(checkpoints)])
    final_masks = model.masks
    with model.outputs() as outputs:
        with watch("cka"):
            reference = list(batch_grams(outputs, model.batches(images, n_batches)))
        for number, (epoch, path) in enumerate(checkpoints.items(), start=1):
            tell(f"checkpoint {number}/{len(checkpoints)}: after {epoch} epochs")
            model.load(path)
            with watch("structural_similarity"):
                overlaps = _overlaps(model, final_masks)
            with watch("cka"):
                is_reference = epoch == max(checkpoints)
                grams = reference if is_reference else batch_grams(outputs, model.batches(images, n_batches))
                alignment = minibatch_cka(grams, reference)
            with watch("gradient_norm"):
                norms = _norms(model, train, options.batch_size) if train is not None else {}
            columns.append(Column(overlaps, alignment, norms))
    return {
        "samples": len(images),
        "batch_size": math.ceil(len(images) / n_batches),
        "gradient_samples": 0 if train is None else len(train[0]),
        "engine": model.engine,
        "seconds": watch.seconds,
        "blocks": [_block(block, columns) for block in model.blocks],
    }


@dataclass(frozen=True)
class Column:
    """What was found at one checkpoint: overlaps and gradient norms by layer, CKA by module."""

    overlaps: Mapping[str, tuple[int, int]]
    alignment: Mapping[str, float]
    norms: Mapping[str, float]


def _block(block: BlockLayers, columns: Sequence[Column]) -> dict[str, Any]:
    """One block over all checkpoints; null where there is nothing to tell."""
    masked = [name for name in block.weights if name in columns[0].overlaps]
    pooled = [[sum(counts) for counts in zip(*(c.overlaps[name] for name in masked), strict=True)] for c in columns]
    return {
        "name": block.name,
        "module": block.module,
        "structural_similarity": [_share(*counts) for counts in pooled] if masked else None,
        "cka": [c.alignment[block.module] for c in columns] if block.module is not None else None,
        "layers": [_layer(name, columns) for name in block.weights],
    }


def _layer(name: str, columns: Sequence[Column]) -> dict[str, Any]:
    has_mask, has_norm = name in columns[0].overlaps, name in columns[0].norms
    norms = [c.norms[name] for c in columns] if has_norm else None
    return {
        "name": name,
        "structural_similarity": [_share(*c.overlaps[name]) for c in columns] if has_mask else None,
        "gradient_norm": norms,
        "gradient_norm_difference": None if norms is None else successive_differences(norms),
    }


def _share(common: int, chosen: int) -> float | None:
    return common / chosen if chosen else None


def _overlaps(model: CheckpointedModel, final_masks: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    weights = dict(model.module.named_parameters())
    return {name: structural_overlap(weights[name], mask, fraction=FRACTION) for name, mask in final_masks.items()}


def _norms(model: CheckpointedModel, train: tuple[Tensor, Tensor], batch_size: int) -> dict[str, float]:
    images, labels = train
    n_batches = math.ceil(len(images) / batch_size)
    targets = (part.to(model.device) for part in labels.tensor_split(n_batches))
    return gradient_norms(
        model.module,
        zip(model.batches(images, n_batches), targets, strict=True),
        F.cross_entropy,
        parameters=[name for block in model.blocks for name in block.weights],
        masks=model.masks,
    )


class _Stopwatch:
    """Seconds by name, measured."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
