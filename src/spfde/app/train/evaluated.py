"""The model as it is evaluated, and kept to be exported: its weights averaged, its norms' statistics estimated anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spfde.app.data.images import ImageData, collate
from spfde.app.train.averaging import Average, copy_into
from spfde.app.train.feed import workers_for
from spfde.app.train.norms import norms_in, reestimate
from spfde.app.train.options import TrainOptions
from spfde.app.train.saving import EVALUATED, load_weights, save_weights
from spfde.core.errors import InvalidArgument, Problem, StateMismatch
from spfde.core.state import check_entries, read_saved
from spfde.freezing.freezer import is_held

KEPT_BYTES = 2**29
"""Images that norms are estimated on, and that were decoded for it, stay in memory up to so much: 3,500 photographs."""
_AVERAGING = "averaging.pt"


class Evaluated:
    """Gives the model to evaluate: the trained one, or a twin of it where the options ask for another.

    Args:
        model: the one that is trained.
        options: of the run.
        masks: gives the session's masks by parameter name.
        make_twin: makes another model like it.
        samples: gives the training samples that norms are estimated on, as the model takes them, in batches.
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
        samples: Callable[[], Iterator[Tensor]],
        forward: Callable[[nn.Module, Tensor], object],
    ) -> None:
        check_norms(model, options)
        self._model, self._reestimates = model, options.reestimate_bn > 0
        self._samples, self._forward = samples, forward
        self._twin = make_twin().eval() if options.ema or self._reestimates else None
        self._average = None
        if self._twin is not None and options.ema:
            freezing = options.load_recipe().freezing
            pauses = freezing is not None and freezing.scheme_class.pauses
            self._average = Average(model, self._twin, masks, options.ema, pauses=pauses)

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
        if self._reestimates:
            # What learns behind a frozen block has learned from what its norms give with the statistics that they have.
            kept = [name for name, norm in norms_in(self._model).items() if is_held(norm)]
            reestimate(self._twin, self._samples(), self._forward, kept=kept)
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


class Drawn:
    """Images of so many training samples at most, drawn by the seed alone, in batches of about equal size.

    None is augmented. Where they have to be decoded, a loader's workers do so, and what comes is kept where it is no
    more than ``KEPT_BYTES``. Of several processes each has all of them, so that all estimate the same.

    Args:
        data: the images.
        count: samples, at most.
        options: of the run.
    """

    def __init__(self, data: ImageData, count: int, options: TrainOptions) -> None:
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(options.seed))[:count]  # type: ignore[arg-type]  # it has a length
        # Never a batch of one image, which has no variance.
        parts = order.tensor_split(max(1, len(order) // max(2, options.batch_size)))
        self._loader = DataLoader(
            data.train,
            batch_sampler=[part.tolist() for part in parts],
            collate_fn=collate,
            num_workers=0 if data.in_memory else workers_for(data, options.workers),
            generator=torch.Generator(),  # a pass draws from it, and would from the global one
        )
        self._count, self._in_memory = len(order), data.in_memory
        self._kept: list[Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Tensor] = []
        for images, _ in self._loader:
            if not self._in_memory and images[0].nbytes * self._count <= KEPT_BYTES:
                kept.append(images)
            yield images
        self._kept = kept or None


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
