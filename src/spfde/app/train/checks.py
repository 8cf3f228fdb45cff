"""What a person names on the command line: is it there? Checked before anything slow is done."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from spfde.app.data.datasets import describe_data
from spfde.app.data.images import DataSpec
from spfde.app.options import TrainingOptions
from spfde.app.train.models import check_model
from spfde.core.errors import InvalidArgument, Problem, Problems, nearest
from spfde.engines.choose import check_engine

TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")


def check_named(options: Mapping[str, Any]) -> DataSpec:
    """Describe the data.

    Args:
        options: as the fields of ``TrainOptions``, of which others may be wrong.

    Raises:
        InvalidArgument: an unknown tracker, engine, device, data set or model, or one that this machine lacks; all
            are told together.
        DataError: the data are not what they should be.
    """
    problems = Problems()
    for check, name in (
        (_check_trackers, "track"),
        (check_engine, "engine"),
        (check_device, "device"),
    ):
        with problems.collecting():
            check(options[name])
    with problems.collecting():
        check_model(options["model"], options["width"])
    on_cpu = options["device"] == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if options["precision"] == "fp16" and on_cpu:
        problems.add("precision", "fp16", "does not work on a CPU", "Use fp32 or bf16.")
    spec = None
    with problems.collecting():
        spec = describe_data(options["data"], options.get("image_size"))
    _check_augmentation(options, spec, problems)
    problems.raise_if_any()
    assert spec is not None, "or there was a problem"
    return spec


def _check_augmentation(options: Mapping[str, Any], spec: DataSpec | None, problems: Problems) -> None:
    """Find augmentation that does not fit the data, the batches or the cache."""
    magnitude = options["randaugment"]
    if magnitude is not None and find_spec("torchvision") is None:
        remedy = "Install it: pip install 'spfde[vision]'. Or leave it out."
        problems.add("randaugment", magnitude, "needs the package torchvision", remedy)
    if magnitude is not None and spec is not None and spec.channels not in (1, 3):
        rule = f"needs images with 1 or 3 channels, and these have {spec.channels}"
        problems.add("randaugment", magnitude, rule, "Leave it out.")
    if magnitude is None and options["randaugment_ops"] != TrainingOptions.randaugment_ops:
        rule = "is of no use without RandAugment"
        problems.add("randaugment_ops", options["randaugment_ops"], rule, "Give --randaugment too, such as 9.")
    for name in ("mixup", "cutmix"):
        if options[name] and options["batch_size"] == 1:
            rule = "has nothing to mix an image with in batches of 1"
            problems.add(name, options[name], rule, "Take larger batches, or leave it out.")
        if options[name] and options["cache_variants"]:
            rule = "makes other images of each batch, of which --cache-variants can keep nothing"
            problems.add(name, options[name], rule, "Leave one of the two out.")


def check_device(device: str) -> None:
    """Raise ``InvalidArgument`` for a name that is no device's, or one of a device that is not there."""
    kind, _, number = device.partition(":")
    if device not in ("auto", "cpu", "cuda", "mps") and not (kind == "cuda" and number.isascii() and number.isdigit()):
        known = ["auto", "cpu", "cuda", "cuda:0", "mps"]
        raise InvalidArgument(Problem("device", device, "is no device", nearest(device, known)))
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(kind, True):
        rule, remedy = "is not available to this PyTorch", "Use --device auto or --device cpu."
        raise InvalidArgument(Problem("device", device, rule, remedy))
    if number and int(number) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InvalidArgument(Problem("device", device, f"there are {count} GPUs", f"Use cuda:0 … cuda:{count - 1}."))


def _check_trackers(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in TRACKERS:
            raise InvalidArgument(Problem("track", name, "is no tracker", nearest(name, TRACKERS)))
        if missing := next((package for package in ("accelerate", name) if find_spec(package) is None), None):
            remedy = f"Install it with `pip install {missing}`, or leave the tracker out."
            raise InvalidArgument(Problem("track", name, f"needs {missing}, which is not installed", remedy))
