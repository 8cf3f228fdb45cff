"""The model as it is evaluated, and kept to be exported: its weights averaged, its norms' statistics estimated anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from spfde.app.data.images import collate
from spfde.app.train.averaging import Average, copy_into
from spfde.app.train.norms import norms_in, reestimate
from spfde.app.train.options import TrainOptions
from spfde.app.train.saving import EVALUATED, load_weights, save_weights
from spfde.core.errors import InvalidArgument, Problem, StateMismatch
from spfde.core.state import check_entries, read_saved
from spfde.freezing.freezer import is_held

_AVERAGING = "averaging.pt"


class Evaluated:
    """Gives the model to evaluate: the trained one, or a twin of it where the options ask for another.

    Args:
        model: the one that is trained.
        options: of the run.
        masks: gives the session's masks by parameter name.
        make_twin: makes another model like it.
        samples: gives the first so many training samples, as the model takes them, in batches.
        forward: calls a model in the run's precision.

    Raises:
        InvalidArgument: norms are to be estimated anew, and the model has none.
    """

    def __init__(
        self,
        model: nn.Module,
        options: TrainOptions,
        masks: Callable[[], Mapping[str, Tensor]],
        *,
        make_twin: Callable[[], nn.Module],
        samples: Callable[[int], Iterator[Tensor]],
        forward: Callable[[nn.Module, Tensor], object],
    ) -> None:
        check_norms(model, options)
        self._model, self._n_samples = model, options.reestimate_bn
        self._samples, self._forward = samples, forward
        self._twin = make_twin().eval() if options.ema or self._n_samples else None
        self._average = None
        if self._twin is not None and options.ema:
            self._average = Average(model, self._twin, masks, options.ema)

    def stepped(self) -> None:
        """The optimizer has stepped."""
        if self._average is not None:
            self._average.update()

    def ready(self) -> nn.Module:
        """The model to evaluate, brought up to date; training goes on from what it had."""
        if self._twin is None:
            return self._model
        if self._average is not None:
            self._average.finish()
        else:
            copy_into(self._twin, self._model)
        if self._n_samples:
            # What learns behind a frozen block has learned from what its norms give with the statistics that they have.
            kept = [name for name, norm in norms_in(self._model).items() if is_held(norm)]
            reestimate(self._twin, self._samples(self._n_samples), self._forward, kept=kept)
        return self._twin

    def save(self, folder: Path) -> None:
        """Write it as it was evaluated last, and what the average goes on from; nothing where it is the trained one."""
        if self._twin is not None:
            save_weights(folder, self._twin, EVALUATED)
        if self._average is not None:
            torch.save({"updates": self._average.updates}, folder / _AVERAGING)

    def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote, once the model and its masks are loaded.

        Raises:
            StateMismatch: it is not as it was written.
        """
        if self._average is None:
            return
        state: Any = read_saved(folder / _AVERAGING)
        check_entries(state, "the averaged weights", {"updates": int})
        if state["updates"] < 0:
            raise StateMismatch(f"the averaged weights were updated {state['updates']} times. The state is damaged.")
        load_weights(folder, self._average.twin, EVALUATED)
        self._average.updates = state["updates"]
        self._average.begin()


def check_norms(model: nn.Module, options: TrainOptions) -> None:
    """Raise ``InvalidArgument`` where norms are to be estimated anew, and the model has none."""
    if options.reestimate_bn and not norms_in(model):
        rule = f"{options.model} has no batch norms"
        raise InvalidArgument(Problem("reestimate_bn", options.reestimate_bn, rule, "Leave it out."))


def drawn(dataset: Dataset[tuple[Tensor, int]], count: int, *, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Images of so many samples at most, drawn by the seed alone, in batches of about equal size; none is augmented."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count]  # type: ignore[arg-type]
    # Never a batch of one image, which has no variance.
    for part in order.tensor_split(max(1, len(order) // max(2, batch_size))):
        images, _ = collate([dataset[index] for index in part.tolist()])
        yield images


def told(options: TrainOptions) -> str | None:
    """What is evaluated and kept, in a line; None where it is the trained weights as they are."""
    words = [] if not options.ema else [f"a moving average of the weights (decay {options.ema:g})"]
    if options.reestimate_bn:
        words.append(f"norms estimated anew on {options.reestimate_bn:,} training images")
    return f"evaluated: {', '.join(words)}" if words else None


def weights_in(options: TrainOptions) -> str:
    """Which weights of a run are evaluated and exported."""
    words = ["averaged" if options.ema else "trained"]
    return ", ".join([*words, "norms estimated anew"] if options.reestimate_bn else words)
