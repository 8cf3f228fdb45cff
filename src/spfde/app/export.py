"""The command ``spfde export``: the weights of a run's checkpoint in a file of their own."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from spfde.app.data.images import DataSpec
from spfde.app.runs.best import chosen_by, is_sparse
from spfde.app.runs.checkpoints import check_whole, epoch_of
from spfde.app.runs.folder import CONFIG, RunFolder
from spfde.app.train.models import build_for
from spfde.app.train.options import TrainOptions
from spfde.core.errors import InvalidArgument, Problem, RunFolderError, nearest
from spfde.cost import format_bytes
from spfde.export import save_compressed, save_dense, save_onnx

SUFFIX = {"dense": ".safetensors", "compressed": ".compressed.safetensors", "onnx": ".onnx"}
_MODEL = "model.safetensors"


def export_run(folder: Path, *, kind: str, out: Path | None, which: Literal["best", "last"]) -> str:
    """Write a run's weights; the run may still be training. What was written, in a line.

    Args:
        folder: the run's.
        kind: dense, compressed or onnx.
        out: the file; if None, in the run's folder, named after the checkpoint.
        which: the best checkpoint by validation accuracy, or by test accuracy where the run has no validation share,
            among those as sparse as the run came to be; or the last one.

    Raises:
        InvalidArgument: there is no such kind; the nearest is named. Or ``out`` exists, or cannot be in its folder.
        RunFolderError: the folder is no run's, it has no whole checkpoint, or its best one is denser than the run.
        WeightsFileError: the file cannot be written.
    """
    if kind not in SUFFIX:
        raise InvalidArgument(Problem("--format", kind, "is no format", nearest(kind, SUFFIX)))
    path = out if out is not None else folder / f"{which}{SUFFIX[kind]}"
    run = RunFolder.existing(folder)
    if path.exists():
        raise InvalidArgument(Problem("--out", str(path), "exists already", "Remove it, or choose another name."))
    if not path.parent.is_dir():
        raise InvalidArgument(Problem("--out", str(path), f"there is no folder {path.parent}", "Make it first."))
    model, sample = _build(run.read_json(CONFIG), folder / CONFIG)

    def load(checkpoint: Path) -> tuple[Path, str]:
        _load(model, checkpoint)
        return checkpoint, _why(run, checkpoint, which)

    checkpoint, why = run.checkpoints.read(partial(_checkpoint, run, which), load)
    state = model.state_dict()
    if kind == "dense":
        save_dense(state, path)
    elif kind == "compressed":
        save_compressed(state, path)
    else:
        save_onnx(model, sample, path)
    size, dense_size = path.stat().st_size, sum(tensor.nbytes for tensor in state.values())
    share = f"{size / dense_size:.1%} of the dense weights' {format_bytes(dense_size)}"
    return f"{path}: {format_bytes(size)}, {share}, from {checkpoint} ({why})"


def _checkpoint(run: RunFolder, which: Literal["best", "last"]) -> Path:
    if which == "best":
        for best in (run.checkpoints.best, run.checkpoints.best_before):
            if best.is_dir():
                check_whole(best)
                return best
    newest = run.checkpoints.newest()
    go_on = f"go on with `spfde train --resume {run.path}`."
    if newest is None:
        raise RunFolderError(f"{run.path}: has no checkpoint yet. Wait for its first epoch, or {go_on}")
    if which == "best":
        raise RunFolderError(f"{run.path}: has no best checkpoint. Pass --last, or {go_on}")
    return newest


def _why(run: RunFolder, checkpoint: Path, which: Literal["best", "last"]) -> str:
    """Which epoch this is, and why it was taken.

    Raises:
        RunFolderError: the best one is denser than the run: it was kept by a version that went by accuracy alone.
    """
    epoch, rows = epoch_of(checkpoint), run.read_metrics()
    row = rows.get(epoch)
    if which == "last" or row is None:
        return f"epoch {epoch}, {'the last one' if which == 'last' else 'the best one'}"
    lowest = min(row["density"] for row in rows.values())
    if not is_sparse(row, lowest):
        raise RunFolderError(
            f"{run.path}: its best checkpoint, of epoch {epoch}, has a density of {row['density']:.3f}, and the run "
            f"came down to {lowest:.3f}. Pass --last for the last epoch."
        )
    among = "" if lowest == 1 else f" among those of density {lowest:.3f}"
    return f"epoch {epoch}, chosen by {chosen_by(row)} accuracy{among}"


def _build(config: dict[str, Any], path: Path) -> tuple[nn.Module, torch.Tensor]:
    """The run's model with other weights, and an input for it; its data need not be there."""
    options = TrainOptions.from_config(config, path)
    try:
        spec = DataSpec(**{item.name: config["data"][item.name] for item in fields(DataSpec)})
        sample = torch.zeros(2, *spec.sample_shape)
    except (KeyError, TypeError, RuntimeError) as error:
        raise RunFolderError(
            f"{path}: does not say the shape of the run's images ({error!r}). Restore it from a copy."
        ) from error
    return build_for(options.model, spec, width=options.width, seed=0), sample


def _load(model: nn.Module, checkpoint: Path) -> None:
    from safetensors.torch import load_model

    try:
        load_model(model, checkpoint / _MODEL)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunFolderError(
            f"checkpoint {checkpoint}: does not hold the weights of the run's model ({reason}). Where the run goes on "
            "training, try again; export it with the versions that wrote it."
        ) from error
