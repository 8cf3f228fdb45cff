"""A run's model as it was at its kept checkpoints, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spfde.analysis import BlockOutputs, native_outputs, output_modules
from spfde.app.data.images import ImageData
from spfde.app.runs import kept_checkpoints
from spfde.app.train.augment import normalise
from spfde.app.train.models import build_for
from spfde.app.train.options import TrainOptions
from spfde.core.errors import InvalidArgument, RunFolderError
from spfde.engines.native import build
from spfde.planning.blueprint import draw


@dataclass(frozen=True)
class BlockLayers:
    """A block: its name, the module whose output is compared (None where there is none), its layers' weights."""

    name: str
    module: str | None
    weights: tuple[str, ...]


class CheckpointedModel:
    """A run's model, into which one checkpoint after the other is loaded."""

    def __init__(self, trained: TrainOptions, data: ImageData, *, native: bool) -> None:
        spec = data.spec
        on_gpu = trained.device != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        # As the run computed, where its kernels are still there: several times as fast, and equal but for rounding.
        self.engine = "native" if native and not on_gpu and build.available() is None else "masked"
        self.data = data
        self.seed = trained.seed
        self.name = trained.model
        module = build_for(trained.model, spec, width=trained.width)
        self.module = module.to(self.device).to(memory_format=torch.channels_last).eval()
        sample = torch.zeros(1, *spec.sample_shape, device=self.device)
        blueprint = draw(self.module, sample, trained.load_recipe(), trained.epochs)
        parts = (*blueprint.partition.blocks, blueprint.partition.head)
        weights: list[list[str]] = [[] for _ in parts]
        for layer, block in zip(blueprint.cost.layers, blueprint.block_of_layer, strict=True):
            weights[block].append(layer.name)
        modules = output_modules(self.module, blueprint.partition, sample)
        self.blocks = [
            BlockLayers(part.name, module, tuple(names))
            for part, module, names in zip(parts, modules, weights, strict=True)
        ]
        self.masks: dict[str, Tensor] = {}

    def load(self, checkpoint: Path) -> None:
        """Take a kept checkpoint's weights and masks.

        Raises:
            RunFolderError: they do not fit the model.
        """
        remedy = "Restore the run's config.json and checkpoints from a copy."
        try:
            state, masks = kept_checkpoints.read(checkpoint)
            self.module.load_state_dict(state)
        except Exception as error:  # readers raise whatever they like on damaged files
            reason = " ".join(str(error).split())[:200]
            raise RunFolderError(f"checkpoint {checkpoint}: does not fit {self.name} ({reason}). {remedy}") from error
        self.masks = {name: mask.to(self.device) for name, mask in masks.items()}

    def outputs(self) -> AbstractContextManager[Callable[[Tensor], dict[str, Tensor]]]:
        """What gives the blocks' outputs for a batch of images, by module."""
        modules = list(dict.fromkeys(block.module for block in self.blocks if block.module is not None))
        if self.engine == "native":
            with suppress(InvalidArgument):  # it cannot be traced whole: the run had parts of it computed natively
                return nullcontext(native_outputs(self.module, modules, masks=lambda: self.masks))
        return BlockOutputs(self.module, modules)

    def batches(self, images: Tensor, n_batches: int) -> Iterator[Tensor]:
        """Normalised images in batches of about equal size."""
        for part in images.tensor_split(n_batches):
            x = normalise(part.to(self.device), self.data.mean, self.data.std)
            yield x.contiguous(memory_format=torch.channels_last)
