"""The analysis behind ``spfde analyze``: a run's kept checkpoints against its last one."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic_core import to_json
from torch import Tensor

from spfde.analysis import batch_grams, gradient_norms, minibatch_cka
from spfde.analysis.gradients import successive_differences
from spfde.analysis.structure import structural_overlap
from spfde.app.data.images import draw
from spfde.app.declaring import with_words
from spfde.app.options import AnalysisOptions
from spfde.app.runs.checkpoints import check_whole, described
from spfde.app.runs.folder import CONFIG, RunFolder, check_inside
from spfde.app.runs.kept_model import CheckpointedModel
from spfde.app.runs.trained import own_data
from spfde.app.train.options import TrainOptions
from spfde.app.train.stamp import hardware, versions
from spfde.core.errors import DataError, RunFolderError
from spfde.core.files import clear_errors, written_whole
from spfde.core.say import counted
from spfde.core.technique import Technique

RESULT = "analysis.json"
FRACTION = 0.5
"""Share of the non-zeros that structural similarity looks at, as in the paper."""


@with_words
class AnalyzeOptions(Technique, AnalysisOptions):
    """What to measure on, as ``spfde analyze`` takes it."""


def analyze_run(folder: Path, options: AnalyzeOptions, out: Path, *, tell: Callable[[str], None]) -> Path:
    """Compare a run's kept checkpoints with the last of them; the ``analysis.json`` that was written.

    Raises:
        RunFolderError: no run folder, fewer than two kept checkpoints, a damaged one, or ``out`` cannot be written.
        StateMismatch: a checkpoint is of another run.
        DataError: the data are missing, or not those of the run.
    """
    if out.is_relative_to(folder):
        check_inside(out, folder)
    config, trained, checkpoints = _read_run(folder)
    data = own_data(trained, config, folder, root=options.data_root)
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
    with clear_errors(out), written_whole(out / RESULT) as (draft,):
        # What is no number at a checkpoint (an output that is the same for all samples, say) is null in the file.
        draft.write_bytes(to_json(content, indent=2, inf_nan_mode="null") + b"\n")
    return out / RESULT


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_run(folder: Path) -> tuple[dict[str, Any], TrainOptions, dict[int, Path]]:
    run = RunFolder.existing(folder)
    config = run.read_json(CONFIG)
    trained = TrainOptions.from_config(config, folder / CONFIG)
    checkpoints = run.checkpoints.kept()
    if len(checkpoints) < 2:
        raise RunFolderError(
            f"{folder}: has {counted(len(checkpoints), 'kept checkpoint')}, and two are needed to compare. Train with "
            "`spfde train --keep-every N`, N less than the number of epochs, and let it get that far."
        )
    for path in checkpoints.values():
        check_whole(path)
        trained.check_identity(described(path), path)
    return config, trained, checkpoints


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
    seconds: dict[str, float] = defaultdict(float)
    # Structural overlap by layer, CKA by module and gradient norms by layer: each a value a checkpoint.
    overlaps, alignments, norms = (defaultdict[str, list[Any]](list) for _ in range(3))
    model.load(checkpoints[max(checkpoints)])
    final_masks = model.masks
    with model.outputs() as outputs:
        with _timed(seconds, "cka"):
            reference = list(batch_grams(outputs, model.batches(images, n_batches)))
        for number, (epoch, path) in enumerate(checkpoints.items(), start=1):
            tell(f"checkpoint {number}/{len(checkpoints)}: after {counted(epoch, 'epoch')}")
            model.load(path)
            with _timed(seconds, "structural_similarity"):
                weights = dict(model.module.named_parameters())
                for name, mask in final_masks.items():
                    overlaps[name].append(structural_overlap(weights[name], mask, fraction=FRACTION))
            with _timed(seconds, "cka"):
                is_reference = epoch == max(checkpoints)
                grams = reference if is_reference else batch_grams(outputs, model.batches(images, n_batches))
                for module, value in minibatch_cka(grams, reference).items():
                    alignments[module].append(value)
            with _timed(seconds, "gradient_norm"):
                for name, norm in _norms(model, train, options.batch_size).items() if train is not None else ():
                    norms[name].append(norm)
    return {
        "samples": len(images),
        "batch_size": math.ceil(len(images) / n_batches),
        "gradient_samples": 0 if train is None else len(train[0]),
        "engine": model.engine,
        "seconds": seconds,
        "blocks": [
            {
                "name": block.name,
                "module": block.module,
                "structural_similarity": _similarity(*(overlaps[name] for name in block.weights if name in overlaps)),
                "cka": None if block.module is None else alignments[block.module],
                "layers": [_layer(name, overlaps, norms) for name in block.weights],
            }
            for block in model.blocks
        ],
    }


def _layer(name: str, overlaps: Mapping[str, Any], norms: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "structural_similarity": _similarity(overlaps[name]) if name in overlaps else None,
        "gradient_norm": norms.get(name),
        "gradient_norm_difference": successive_differences(norms[name]) if name in norms else None,
    }


def _similarity(*layers: Sequence[tuple[int, int]]) -> list[float | None] | None:
    """Structural similarity of layers together at each checkpoint; None where there are no layers."""
    shares = []
    for counts in zip(*layers, strict=True):
        common, chosen = (sum(column) for column in zip(*counts, strict=True))
        shares.append(common / chosen if chosen else None)
    return shares or None


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


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start
