"""The command ``spfde evaluate``: how a run's last and best weights do, on its test set or on other data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic_core import to_json
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spfde.app.data.datasets import describe_data, load_data, names_in
from spfde.app.data.images import DataSpec, ImageData, collate
from spfde.app.declaring import with_words
from spfde.app.options import EvaluationOptions
from spfde.app.runs.folder import CONFIG, RunFolder
from spfde.app.runs.trained import Which, checkpoint_of, machine_of, model_of, own_data, spec_in, statistics_in
from spfde.app.train.augment import normalise
from spfde.app.train.evaluated import weights_in
from spfde.app.train.feed import workers_for
from spfde.app.train.machine import Machine
from spfde.app.train.options import TrainOptions
from spfde.app.train.tally import Tally
from spfde.core.errors import InvalidArgument, Problem
from spfde.core.technique import Technique

TOP = 5


@with_words
class EvaluateOptions(Technique, EvaluationOptions):
    """What to evaluate on, as ``spfde evaluate`` takes it."""


@dataclass(frozen=True)
class Scores:
    """What a pass over a set gave.

    Attributes:
        epoch: that the weights are from, from 0.
        loss: mean cross-entropy.
        top1: share of the images whose class has the largest output.
        top5: share of those whose class is among the five largest; None where there are no more than five classes.
        counts: images of each class.
        hits: those of them that were told right.
    """

    epoch: int
    loss: float
    top1: float
    top5: float | None
    counts: tuple[int, ...]
    hits: tuple[int, ...]

    def by_class(self) -> list[float | None]:
        """The accuracy of each class; None where there is no image of it."""
        return [hits / n if n else None for hits, n in zip(self.hits, self.counts, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """The figures of the whole set."""
        return {name: value for name, value in vars(self).items() if name not in ("counts", "hits")}


@dataclass(frozen=True)
class Evaluation:
    """How the weights of a run do.

    Attributes:
        run: its folder.
        finished: whether its training is over.
        data: what it was evaluated on.
        is_own: whether that is the run's own test set.
        chosen_by: the accuracy, "validation" or "test", by which the best epoch was chosen.
        model, width, precision, device: what it was computed with.
        weights: which ones: "trained", "averaged" or "…, norms estimated anew".
        class_names: where the data name their classes.
        last, best: None where the folder has no best checkpoint.
    """

    run: str
    finished: bool
    data: str
    is_own: bool
    chosen_by: str
    model: str
    width: float
    precision: str
    device: str
    weights: str
    class_names: tuple[str, ...] | None
    last: Scores
    best: Scores | None

    def to_json(self) -> str:
        """One object; what there is none of, such as the accuracy of a class without images, is null."""
        facts = {name: value for name, value in vars(self).items() if name not in ("class_names", "last", "best")}
        best = None if self.best is None else self.best.to_dict()
        classes = [dict(zip(("name", "n", "last", "best"), row, strict=True)) for row in self._classes()]
        content = facts | {"samples": sum(self.last.counts), "last": self.last.to_dict(), "best": best}
        return to_json(content | {"classes": classes}, inf_nan_mode="null").decode()

    def __str__(self) -> str:
        """For people, in 80 columns."""
        state = "" if self.finished else ", which is not finished"
        width = "" if self.width == 1 else f", width {self.width:g}"
        weights = "" if self.weights == "trained" else f" · weights: {self.weights}"
        computed = f"{self.model}{width} · {self.precision} on {self.device} (measured){weights}"
        lines = [f"{self.run}{state}: {sum(self.last.counts):,} test images of {self.data}", computed, "", _HEADING]
        for name, scores in (("last", self.last), ("best", self.best)):
            lines.append(f"{name:<8}" + ("there is no best checkpoint" if scores is None else _scores(scores)))
        flatters = ", which flatters them" if self.is_own and self.chosen_by == "test" else ""
        lines.append(f"The best weights were chosen by {self.chosen_by} accuracy{flatters}.")
        if self.last.top5 is None:
            lines.append(f"There is no top-{TOP}: the data have {len(self.last.counts)} classes.")
        lines += ["", f"{'class':<44}{'n':>10}{'last':>10}{'best':>10}"]
        lines += [f"{name[:43]:<44}{n:>10,}{_share(last)}{_share(best)}" for name, n, last, best in self._classes()]
        return "\n".join(lines)

    def _classes(self) -> Iterator[tuple[str, int, float | None, float | None]]:
        """Name, number of images, and accuracies of the last and the best weights."""
        names = self.class_names or tuple(map(str, range(len(self.last.counts))))
        best = [None] * len(names) if self.best is None else self.best.by_class()
        yield from zip(names, self.last.counts, self.last.by_class(), best, strict=True)


_HEADING = f"{'weights':<8}{'epoch':>8}{'loss':>10}{'top-1':>10}{'top-5':>10}"


def _scores(scores: Scores) -> str:
    return f"{scores.epoch + 1:>8}{scores.loss:>10.4f}{_share(scores.top1)}{_share(scores.top5)}"


def _share(share: float | None) -> str:
    return f"{'–':>10}" if share is None else f"{share:>10.4f}"


def evaluate_run(folder: Path, options: EvaluateOptions) -> Evaluation:
    """Evaluate a run's last and best weights; the run may still be training.

    The whole pass is in the run's precision, by PyTorch itself: an engine's kernels may round differently in the last
    digits of a loss.

    Raises:
        RunFolderError: no run folder, no checkpoint yet, or a damaged one.
        InvalidArgument: the data are not of the run's shape and classes, or an option is wrong.
        DataError: the data are missing, or the run's own are others than then.
    """
    run = RunFolder.existing(folder)
    config = run.read_json(CONFIG)
    trained, spec = TrainOptions.from_config(config, folder / CONFIG), spec_in(config, folder / CONFIG)
    mean, std = statistics_in(config, spec, folder / CONFIG)
    machine = machine_of(trained, options.device)
    checkpoint_of(run, "last")  # before data are read, and perhaps downloaded
    data = _data(run, trained, spec, options)
    loader: DataLoader[Any] = DataLoader(
        data.test, options.batch_size, collate_fn=collate, num_workers=workers_for(data, None)
    )
    measured = partial(_measured, loader, partial(normalise, mean=mean, std=std), machine)
    with machine.in_use():
        weights = [model_of(run, trained, spec, machine, which) for which in _which(run)]
        scores = {epoch: measured(model, epoch) for epoch, model in dict(weights).items()}
    last, best = scores[weights[0][0]], scores[weights[1][0]] if len(weights) > 1 else None
    return Evaluation(
        run=str(folder),
        finished=run.is_finished,
        data=data.spec.name,
        is_own=options.data is None,
        chosen_by="validation" if trained.validation_share else "test",
        model=trained.model,
        width=trained.width,
        precision=machine.precision,
        device=str(machine.device),
        weights=weights_in(trained),
        class_names=data.class_names,
        last=last,
        best=best,
    )


def _which(run: RunFolder) -> tuple[Which, ...]:
    has_best = run.checkpoints.best.is_dir() or run.checkpoints.best_before.is_dir()
    return ("last", "best") if has_best else ("last",)


def _data(run: RunFolder, trained: TrainOptions, spec: DataSpec, options: EvaluateOptions) -> ImageData:
    if options.data is None:
        if options.image_size is not None:
            remedy = "Leave it out, or give --data too."
            raise InvalidArgument(
                Problem("image_size", options.image_size, "the run's own data have their size", remedy)
            )
        return own_data(trained, run.read_json(CONFIG), run.path, root=options.data_root)
    _check_fits(describe_data(options.data, options.image_size), spec, options.data)  # before anything is downloaded
    root = options.data_root or trained.data_root
    data = load_data(options.data, root=root, image_size=options.image_size, crop_share=trained.crop_share)
    for mine, other in zip(names_in(trained.data) or (), data.class_names or (), strict=False):
        if mine != other:
            rule = f"has class {other!r} where the run's data have {mine!r}"
            raise InvalidArgument(
                Problem("data", options.data, rule, "Give data of the run's classes, in their order.")
            )
    return data


def _check_fits(other: DataSpec, spec: DataSpec, name: str) -> None:
    """Raise ``InvalidArgument`` where other data are not of the run's shape and number of classes."""
    if other.sample_shape != spec.sample_shape:
        sizes = (" x ".join(map(str, shape)) for shape in (other.sample_shape, spec.sample_shape))
        rule = "has images of {} (channels, height, width), and the run's are {}".format(*sizes)
        height, width = spec.image_size
        can_be_scaled = other.channels == spec.channels and height == width
        remedy = f"Use --image-size {height}." if can_be_scaled else "Give data of the run's shape."
        raise InvalidArgument(Problem("data", name, rule, remedy))
    if other.num_classes != spec.num_classes:
        rule = f"has {other.num_classes} classes, and the run's data {spec.num_classes}"
        raise InvalidArgument(Problem("data", name, rule, "Give data of the run's classes."))


@torch.no_grad()
def _measured(
    loader: DataLoader[Any], normalised: Callable[[Tensor], Tensor], machine: Machine, model: nn.Module, epoch: int
) -> Scores:
    """One pass over a set."""
    tally, device, among = Tally(machine.device), machine.device, 0
    hits, counts = Counter[int](), Counter[int]()
    for images, labels in loader:
        x, y = normalised(images.to(device)).contiguous(memory_format=torch.channels_last), labels.to(device)
        with machine.autocast():
            logits = model(x)
        logits = logits.float()
        tally.add(F.cross_entropy(logits, y, reduction="sum"), logits, y)
        hits.update(y[logits.argmax(1) == y].tolist())
        counts.update(labels.tolist())
        among += int((logits.topk(min(TOP, logits.shape[1])).indices == y[:, None]).sum())
    found, classes = tally.read(), range(logits.shape[1])
    top5 = among / counts.total() if len(classes) > TOP else None
    per_class = (tuple(each[label] for label in classes) for each in (counts, hits))
    return Scores(epoch, found.loss, found.accuracy, top5, *per_class)
