"""What a run was trained on and what it came to, read from its folder while it may still be training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spfde.app.data.datasets import load_data
from spfde.app.data.images import DataSpec, ImageData
from spfde.app.data.validation import hold_out
from spfde.app.runs.checkpoints import check_whole, epoch_of
from spfde.app.runs.folder import CONFIG, RunFolder
from spfde.app.train.checks import check_device
from spfde.app.train.machine import Machine, pick_device
from spfde.app.train.models import build_for
from spfde.app.train.options import TrainOptions
from spfde.app.train.saving import load_weights
from spfde.core.errors import DataError, InvalidArgument, Problem, RunFolderError

Which = Literal["best", "last"]
"""Checkpoints of a run that others ask for."""


def spec_in(config: Mapping[str, Any], path: Path) -> DataSpec:
    """The shape of a run's data by its ``config.json``, at ``path``; the data need not be there.

    Raises:
        RunFolderError: it does not say.
    """
    try:
        spec = DataSpec(**{item.name: config["data"][item.name] for item in fields(DataSpec)})
        if not all(type(size) is int and size > 0 for size in (spec.num_classes, *spec.sample_shape)):
            raise TypeError(f"{spec.num_classes} classes of {spec.sample_shape}")
    except (KeyError, TypeError) as error:
        raise RunFolderError(
            f"{path}: does not say the shape of the run's images ({error!r}). Restore it from a copy."
        ) from error
    return spec


def own_data(trained: TrainOptions, config: Mapping[str, Any], folder: Path, *, root: Path | None) -> ImageData:
    """The data of a run, what it held out apart.

    Args:
        trained, config: its options, and its ``config.json``.
        root: where torchvision's sets lie; None: where the run had them.

    Raises:
        RunFolderError: the folder does not say what its data were.
        DataError: they are missing, or others than then: counts, shape and statistics of the images must agree.
    """
    whole = load_data(
        trained.data, root=root or trained.data_root, image_size=trained.image_size, crop_share=trained.crop_share
    )
    data = hold_out(whole, trained.validation_share, trained.seed)
    then = config.get("data")
    if not isinstance(then, Mapping):
        raise RunFolderError(f'{folder / CONFIG}: lacks the run\'s data ("data"). Restore the file from a copy.')
    for name, value in data.facts().items():
        if name != "name" and not _agrees(value, then.get(name)):
            raise DataError(
                f"{data.spec.name}: is not what the run in {folder} was trained on: {name} is {value}, and was "
                f"{then.get(name)}. Put the run's own data back."
            )
    return data


def _agrees(now: Any, then: Any) -> bool:
    if isinstance(now, list) and isinstance(then, list):
        return len(now) == len(then) and all(map(_agrees, now, then))
    if isinstance(now, float) and isinstance(then, (int, float)):
        return math.isclose(now, then, rel_tol=1e-4, abs_tol=1e-6)
    return bool(now == then)


def checkpoint_of(run: RunFolder, which: Which) -> Path:
    """The best or the last checkpoint, whole.

    Raises:
        RunFolderError: there is none, or it is damaged.
    """
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


def load_into(model: nn.Module, checkpoint: Path) -> None:
    """Give a model of the run a checkpoint's weights.

    Raises:
        RunFolderError: they are those of another model, or cannot be read.
    """
    try:
        load_weights(checkpoint, model)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunFolderError(
            f"checkpoint {checkpoint}: does not hold the weights of the run's model ({reason}). Where the run goes on "
            "training, try again; otherwise use the versions that wrote it."
        ) from error


def model_of(
    run: RunFolder, trained: TrainOptions, spec: DataSpec, machine: Machine, which: Which
) -> tuple[int, nn.Module]:
    """The epoch of a checkpoint, from 0, and a model with its weights, ready to evaluate.

    Raises:
        RunFolderError: there is no such checkpoint, or it is damaged.
    """
    model = build_for(trained.model, spec, width=trained.width, seed=0)

    def load(checkpoint: Path) -> int:
        load_into(model, checkpoint)
        return epoch_of(checkpoint)

    epoch = run.checkpoints.read(partial(checkpoint_of, run, which), load)
    return epoch, model.to(machine.device).to(memory_format=torch.channels_last).eval()


def machine_of(trained: TrainOptions, name: str) -> Machine:
    """The device of that name, in the precision of a run.

    Raises:
        InvalidArgument: there is no such device, or it has no such precision.
    """
    check_device(name)
    device = pick_device(name)
    if trained.precision == "fp16" and device.type == "cpu":
        remedy = "Use a GPU."
        raise InvalidArgument(Problem("device", name, "is a CPU here, and the run computed in fp16", remedy))
    return Machine(device, trained.precision)


def statistics_in(config: Mapping[str, Any], spec: DataSpec, path: Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation that a run's images were normalised by, ``(C,)`` each.

    Raises:
        RunFolderError: its ``config.json``, at ``path``, does not say.
    """
    try:
        mean, std = (torch.tensor(config["data"][name], dtype=torch.float32) for name in ("mean", "std"))
        if (
            mean.shape != (spec.channels,)
            or std.shape != mean.shape
            or not bool(mean.isfinite().all() & (std > 0).all())
        ):
            raise ValueError("not a number for each channel")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunFolderError(
            f"{path}: does not say what the run's images were normalised by ({error!r}). Restore it from a copy."
        ) from error
    return mean, std
