"""The command ``spfde export``: the weights of a run's checkpoint in a file of their own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from spfde.app.runs.best import chosen_by, is_sparse
from spfde.app.runs.checkpoints import epoch_of
from spfde.app.runs.folder import CONFIG, RunFolder
from spfde.app.runs.trained import Which, checkpoint_of, load_into, spec_in
from spfde.app.train.evaluated import weights_in
from spfde.app.train.models import build_for
from spfde.app.train.options import TrainOptions
from spfde.core.errors import InvalidArgument, Problem, RunFolderError, nearest
from spfde.cost import format_bytes
from spfde.export import save_compressed, save_dense, save_onnx

SUFFIX = {"dense": ".safetensors", "compressed": ".compressed.safetensors", "onnx": ".onnx"}


def export_run(folder: Path, *, kind: str, out: Path | None, which: Which) -> str:
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
    config = run.read_json(CONFIG)
    options, spec = TrainOptions.from_config(config, folder / CONFIG), spec_in(config, folder / CONFIG)
    model = build_for(options.model, spec, width=options.width, seed=0)

    def load(checkpoint: Path) -> tuple[Path, str]:
        load_into(model, checkpoint)
        return checkpoint, _why(run, checkpoint, which)

    checkpoint, why = run.checkpoints.read(partial(checkpoint_of, run, which), load)
    state = model.state_dict()
    if kind == "dense":
        save_dense(state, path)
    elif kind == "compressed":
        save_compressed(state, path)
    else:
        save_onnx(model, torch.zeros(2, *spec.sample_shape), path)
    size, dense_size = path.stat().st_size, sum(tensor.nbytes for tensor in state.values())
    share = f"{size / dense_size:.1%} of the dense weights' {format_bytes(dense_size)}"
    weights = "" if (which_weights := weights_in(options)) == "trained" else f", weights {which_weights}"
    return f"{path}: {format_bytes(size)}, {share}, from {checkpoint} ({why}{weights})"


def _why(run: RunFolder, checkpoint: Path, which: Which) -> str:
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
