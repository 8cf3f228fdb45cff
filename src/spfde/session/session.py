"""The session: the only room where sparsity, freezing, sieving and their cost meet.

``spfde.attach`` makes it. Everything that changes the network's structure happens at the top of an epoch, in this
order: the sieve turns, weights are dropped and grown, blocks are frozen.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from spfde.core.clock import Clock
from spfde.core.errors import InvalidArgument, UsageError
from spfde.core.numbers import mix, round_half_up
from spfde.cost import Ledger, LedgerRow, epoch_cost, memory_of, peak_bytes
from spfde.engines.choose import Choice, choose_engine, say_choice, say_on_stderr
from spfde.export.encoding import weight_bytes
from spfde.freezing import Freezer, GroupRates, is_held
from spfde.model.sample import Sample, unwrap
from spfde.planning.bill import Blueprint, scoring_flops
from spfde.recipe.recipe import Recipe
from spfde.session.distributed import World, deals_out
from spfde.session.state import STATE_FORMAT, check_fit
from spfde.sieving import (
    ClassLabels,
    Observer,
    Scorer,
    Sieve,
    SievedBatchSampler,
    SievedLoader,
    loader_generators,
    population_of,
)
from spfde.sparsity import Masker

if TYPE_CHECKING:
    from spfde.engines.native.engine import NativeEngine
    from spfde.engines.native.prefix import CachedPrefix
    from spfde.session.convergence import Convergence


class Session:
    """A recipe attached to a training loop; made by ``spfde.attach``.

    Attributes:
        loader: a DataLoader over the partial set, with the arguments of the caller's.
        recipe: as attached, as are ``engine`` and ``seed``.
        blueprint: which layers are sparse, which blocks there are, when each is frozen.
        cost: the bill so far, one row per finished epoch: modelled FLOPs, measured seconds and memory.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loader: DataLoader[Any],
        recipe: Recipe,
        *,
        blueprint: Blueprint,
        seed: int,
        choice: Choice,
        sample: Sample,
        labels: Tensor | None = None,
        masks: Mapping[str, Tensor] | None = None,
        probe: Sample | None = None,
    ) -> None:
        self.recipe, self.seed, self.blueprint = recipe, seed, blueprint
        self.engine, self.engine_reason, self._asked_engine = choice.name, choice.reason, choice.asked
        self._given, self._sample = model, sample
        self._asked_for_seeds = self._asked_for_weights = False
        self._native: NativeEngine | None = None
        self._model, self._optimizer = unwrap(model), optimizer
        self._clock = Clock()
        self._world = World.current()
        self._attached = True
        self._loaded_drained = False
        self._generator = torch.Generator().manual_seed(seed)

        # First what may still be refused: from here on the model and the optimizer are changed.
        self._rates = self._make_rates()
        self._masker = self._make_masker(masks)
        self._freezer = Freezer(self._model, blueprint.partition.blocks, optimizer)
        self._population = population_of(loader)
        self._classes = self._make_classes(labels)
        self._sieve = self._make_sieve()
        self.loader = self._make_loader(loader)
        self._scorer: Scorer | None = None
        self._observer: Observer | None = None
        if self._sieve is not None:
            self._observer = self._make_observer(self._sieve)
        layers = blueprint.cost.layers
        dense = memory_of(
            layers, (1.0,) * len(layers), (False,) * len(layers), batch_size=self._batch_size, accounting="actual"
        )
        self.cost = Ledger(uncounted=blueprint.cost.uncounted, dense_memory_bytes=dense.total)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if self._masker is not None:
            self._masker.install()
        self._start_engine()
        self._convergence = self._make_convergence(probe)

    # --- the clock -------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch that runs now or comes next, from 0."""
        return self._clock.epoch

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self._clock.step

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, each begun; a loaded state goes on where it was taken.

        Leaving the loop early does not end the epoch.
        """
        self._check_attached()
        if self._loaded_drained:
            self.end_epoch()
        while self._attached and self.epoch < self.blueprint.epochs:
            self._begin_epoch()
            epoch = self.epoch
            yield epoch
            # The loop's body may have ended the epoch, or the session.
            if self._attached and self.epoch == epoch:
                self.end_epoch()

    def end_epoch(self) -> None:
        """Close the running epoch: its row goes into the bill. ``epochs`` calls it; callbacks call it themselves.

        Raises:
            UsageError: no epoch is running, or samples were sieved without being observed.
        """
        self._check_attached()
        clock = self._clock
        if clock.phase == "between":
            raise UsageError(
                "end_epoch() was called while no epoch is running. Call it once after the batches of an epoch; "
                "session.epochs() calls it for you."
            )
        self._check_observed()
        self._check_seeds()
        self._check_weights()
        self._exchange()
        self._clock.stop_watch(self._device)
        self.cost.add(self._row())
        clock.epoch += 1
        clock.phase = "between"
        self._loaded_drained = False

    def begin_epoch(self) -> None:
        """Begin the next epoch: for loops without ``epochs`` that draw their batches elsewhere. Begun, it stays begun.

        ``epochs`` and ``session.loader`` begin an epoch themselves. Without any of the three it begins at the first
        ``observe`` or optimizer step, when a batch of it has gone through the model already.
        """
        self._check_attached()
        if self._loaded_drained:
            self.end_epoch()
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        clock = self._clock
        if clock.phase != "between" or clock.epoch >= self.blueprint.epochs:
            return
        clock.begin_epoch()
        self._asked_for_seeds = self._asked_for_weights = False
        if self._observer is not None:
            self._observer.begin_epoch()
        self._turn_sieve()
        # Before the mutation: what is frozen now keeps the weights that it has trained.
        self._freeze_to(self._n_frozen_now())
        if self._masker is not None:
            self._masker.reset_epoch_counters()
            layers = zip(self.blueprint.cost.layers, self.blueprint.settling_layers(clock.epoch), strict=True)
            settling = {layer.name for layer, settles in layers if settles}
            if self._convergence is not None:
                settling |= self._convergence.settling
            self._masker.begin_epoch(clock.epoch, self._freezer.frozen_parameters, settling)
        if self._rates is not None:
            self._rates.apply(clock.epoch)

    def _n_frozen_now(self) -> int:
        """Blocks that are frozen in the epoch that begins: by the plan, or because they have converged."""
        blueprint, epoch = self.blueprint, self.epoch
        planned = blueprint.freeze_plan.n_frozen_at(epoch)
        if self._convergence is None:
            return planned
        is_update_epoch = epoch % blueprint.interval == 0
        decides = epoch + blueprint.interval < blueprint.epochs
        return self._convergence.begin_epoch(planned=planned, is_update_epoch=is_update_epoch, decides=decides)

    def _turn_sieve(self) -> None:
        sieve, blueprint = self._sieve, self.blueprint
        if sieve is None or not sieve.technique.updates_at(
            self.epoch, interval=blueprint.interval, epochs=blueprint.epochs
        ):
            return
        assert self._scorer is not None
        labels = None if self._classes is None else self._classes.labels[self._population]
        difficulty = self._scorer.difficulty()[self._population]
        self._clock.sieve_moved = sieve.update(difficulty, labels)
        self._scorer.reset()

    def _freeze_to(self, n_blocks: int) -> None:
        blueprint = self.blueprint
        if self._masker is not None:
            # A block under a soft bound must not stay above its target for good; through a pause it may.
            plan = blueprint.freeze_plan
            fresh = range(self._freezer.n_frozen, n_blocks)
            for_good = [n for n in fresh if not plan.pauses or plan.settles(n, self.epoch, blueprint.interval)]
            self._masker.prune_to_target([p for n in for_good for p in blueprint.partition.blocks[n].parameters])
        self._freezer.freeze_to(n_blocks)

    # --- the loop --------------------------------------------------------------------------------------------------

    def observe(
        self,
        logits: Tensor | None = None,
        y: Tensor | None = None,
        indices: Tensor | None = None,
        *,
        correct: Tensor | None = None,
        loss: Tensor | None = None,
    ) -> None:
        """Tell the sieve how a batch went: once a batch, anywhere in the loop's body. Without a sieve it does nothing.

        Args:
            logits: the model's output for the batch, [N, classes].
            y: class labels, [N]; beside correct or loss only to balance classes that are not known otherwise.
            indices: indices of the samples in the data set, [N]; by default those of the batch drawn last.
            correct: instead of logits and y: which samples the model got right, bool [N].
            loss: instead: the loss of each sample, [N]; for tasks without right and wrong.

        Raises:
            UsageError: called twice for a batch, or before any batch.
            InvalidArgument: not exactly one kind of evidence, one that the criterion has no use for, wrong lengths, or
                labels that are no classes (those on an accelerator are looked at when the epoch ends).
        """
        self._check_attached()
        self._begin_epoch()
        if self._scorer is not None and self._observer is not None:
            self._observer.check_labels(logits, y)
            values = self._scorer.criterion.evidence(logits, y, correct=correct, loss=loss)
            labels = self._classes.from_report(logits, y) if self._classes is not None else None
            self._observer.report(values, indices, labels)

    def loss_weights(self, indices: Tensor | None = None) -> Tensor:
        """Weights for the losses of a batch, so that sieving leaves the gradient unbiased.

        With ``DataSieving(rescale_loss=True)`` backpropagate ``(session.loss_weights() * loss).mean()``, where ``loss``
        is one loss a sample, and observe the loss as it is. Their mean over the partial set is 1, so that a learning
        rate means what it did. Otherwise all are 1.

        Args:
            indices: indices of the samples in the data set, [N]; by default those of the batch drawn last.

        Returns:
            float32 [N], on the model's device.

        Raises:
            UsageError: it cannot be told which samples are in the batch.
            InvalidArgument: an index is not in the partial set.
        """
        self._check_attached()
        self._begin_epoch()
        samples = self._samples_of("loss_weights", indices)
        self._asked_for_weights = True
        if self._sieve is None or not self._sieve.technique.rescales:
            return torch.ones(samples.numel(), device=self._device)
        return self._sieve.loss_weights(samples).to(self._device)

    def _check_weights(self) -> None:
        rescales = self._sieve is not None and self._sieve.technique.rescales
        if rescales and self._clock.steps and not self._asked_for_weights and not self._loaded_drained:
            raise UsageError(
                "rescale_loss is set, but the losses were not weighted: multiply each sample's loss by "
                "session.loss_weights() before taking the mean, or set rescale_loss=False."
            )

    def _samples_of(self, asked: str, indices: Tensor | None) -> Tensor:
        """The samples of a batch, by default of the one drawn last."""
        samples = self.loader.current_indices if indices is None else torch.as_tensor(indices).cpu().long()
        if samples is None:
            raise UsageError(
                f"{asked}() cannot tell which samples are in this batch. Draw it from session.loader (not with "
                "in_order=False), or pass indices=."
            )
        return samples

    @property
    def caches_prefix(self) -> bool:
        """Whether outputs of the frozen front are kept; then all augmentation must come from ``augmentation_seeds``."""
        freezing = self.recipe.freezing
        return freezing is not None and freezing.cache_variants > 0

    def augmentation_seeds(self, indices: Tensor | None = None) -> Tensor:
        """Seeds from which to augment a batch: equal seeds must give a sample the same augmentation.

        With ``freezing.cache_variants``, and once blocks are frozen, each sample comes in so many variants, drawn anew
        whenever another block is frozen, and the next forward pass in training mode reads the frozen front's outputs
        for them from the cache. Otherwise every epoch has seeds of its own.

        Args:
            indices: indices of the samples in the data set, [N]; by default those of the batch drawn last.

        Returns:
            int64 [N], each in [0, 2**62).

        Raises:
            UsageError: it cannot be told which samples are in the batch.
        """
        self._check_attached()
        self._begin_epoch()
        samples = self._samples_of("augmentation_seeds", indices)
        self._asked_for_seeds = True
        freezings = [at for at in self.blueprint.freeze_plan.freeze_epochs if at is not None and at <= self.epoch]
        if self.caches_prefix and self._native is not None and self.frozen_blocks:
            variants = self._native.cached_variants(self._sample)
            if variants:
                since = max(freezings)
                variant = (self.epoch - since) % variants
                self._native.use_cache(samples, variant)
                return mix(samples, self.seed, since, 1 + variant)
        return mix(samples, self.seed, self.epoch, 0)

    def _check_seeds(self) -> None:
        if self.caches_prefix and self.frozen_blocks and self._clock.steps and not self._asked_for_seeds:
            raise UsageError(
                "cache_variants is set and blocks are frozen, but nothing was cached: augment each batch from "
                "session.augmentation_seeds(), called once before its forward pass, or set cache_variants=0."
            )

    def _check_observed(self) -> None:
        if self._observer is not None and not self._loaded_drained:
            self._observer.check_reported()
            self._observer.check_any(self._clock.steps, self._clock.samples_drawn)

    def _exchange(self) -> None:
        if self._observer is not None:
            self._observer.exchange()

    def _on_loader_start(self) -> None:
        if self._loaded_drained:
            # A state from the bottom of an epoch, loaded by a loop that does not ask for epochs().
            self.end_epoch()
        if self._observer is not None:
            self._observer.check_reported()
        if self._clock.phase == "drained" and self._clock.steps:
            warnings.warn(
                "session.loader was started again while its epoch has not ended, so nothing is mutated, frozen or "
                "sieved. Loop over session.epochs(), or call session.end_epoch() after each epoch; for evaluation take "
                "another loader.",
                stacklevel=4,
            )
        self._begin_epoch()
        self._drawn_before = self._clock.samples_drawn

    def _on_batch(self, indices: Tensor | None) -> None:
        clock = self._clock
        if clock.epoch >= self.blueprint.epochs:
            return
        if self._observer is not None:
            self._observer.await_report()
        if self._native is not None:
            self._native.use_cache(None)
        clock.phase = "running"
        clock.samples_drawn = self._drawn_before + self.loader.samples_handed

    def _on_loader_end(self) -> None:
        if self._clock.phase in ("begun", "running"):
            self._clock.phase = "drained"
            if self._observer is not None:
                self._observer.check_reported()
            self._exchange()
            self._clock.stop_watch(self._device)

    def _before_step(self, *_: Any) -> None:
        self._begin_epoch()

    def _after_step(self, *_: Any) -> None:
        clock = self._clock
        if clock.phase == "begun":
            # A batch from elsewhere: only the end of the epoch can be resumed from now on.
            clock.phase = "running"
        clock.step += 1
        clock.steps += 1

    # --- what there is to see ----------------------------------------------------------------------------------------

    @property
    def frozen_blocks(self) -> int:
        """Number of frozen blocks."""
        return self._freezer.n_frozen

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Masks by parameter name; True where the weight exists."""
        return dict(self._masker.masks) if self._masker is not None else {}

    @property
    def density(self) -> float:
        """Active share of the masked tensors; 1.0 where none is masked."""
        if self._masker is None:
            return 1.0
        masks = self._masker.masks
        return sum(map(self._masker.n_active, masks)) / sum(mask.numel() for mask in masks.values())

    @property
    def explored(self) -> float:
        """Share of the masked weights that have been active at some time (ITOP's rate); 1.0 where none is masked."""
        return self._masker.explored if self._masker is not None else 1.0

    @property
    def partial_set(self) -> Tensor:
        """Indices of the samples in use, ascending."""
        return self._sieve.partial if self._sieve is not None else self._population

    @property
    def removed_set(self) -> Tensor:
        """Indices of the samples that are out, the queue's head first."""
        return self._sieve.removed if self._sieve is not None else self._population[:0]

    @property
    def sieve_turnover(self) -> Mapping[str, int]:
        """Samples moved at the top of this epoch, and distinct samples used so far."""
        used = self._sieve.ever_used if self._sieve is not None else len(self._population)
        return {"moved": self._clock.sieve_moved, "ever_used": used}

    def _row(self) -> LedgerRow:
        model_cost, n_frozen = self.blueprint.cost, self._freezer.n_frozen
        of_weights = self._masker.mean_densities() if self._masker is not None else {}
        density = model_cost.densities(of_weights)
        frozen = self.blueprint.layers_in_first(n_frozen)
        samples = self._samples_seen()
        wide, reach = 0, None
        if self._masker is not None:
            wide = min(samples, self._masker.dense_gradient_steps * self._batch_size)
            if beyond := self._masker.gradient_densities():
                wide, reach = samples, model_cost.densities({**of_weights, **beyond})
        cost = epoch_cost(
            model_cost.forward,
            density,
            frozen,
            samples=samples,
            population=self._baseline_samples,
            dense_gradient_samples=wide,
            gradient_density=reach,
            overhead_flops=self._overhead_flops(),
        )
        memory = memory_of(model_cost.layers, density, frozen, batch_size=self._batch_size, accounting="actual")
        tensors = {name: value for name, value in self._model.state_dict().items() if isinstance(value, Tensor)}
        weights = weight_bytes(tensors, self.masks)
        return LedgerRow(
            **dataclasses.asdict(cost),
            epoch=self.epoch,
            samples=samples,
            steps=self._clock.steps,
            density=self.density,
            frozen_blocks=n_frozen,
            partial_samples=len(self.partial_set),
            seconds=self._clock.seconds,
            peak_memory_bytes=peak_bytes(self._device),
            modelled_memory_bytes=memory.total,
            # The largest: the rate of the blocks that learn longest.
            lr=max(float(group["lr"]) for group in self._optimizer.param_groups),
            dense_weight_bytes=weights.dense,
            compressed_weight_bytes=weights.compressed,
        )

    def _overhead_flops(self) -> int:
        """Of this epoch: scores that the first masks were chosen by, and looks at how far blocks have converged."""
        looks = self._convergence.overhead if self._convergence is not None else 0
        if self.epoch > 0:
            return looks
        return looks + scoring_flops(self.blueprint, samples=len(self._population), batch_size=self._batch_size)

    def _samples_seen(self) -> int:
        observed = self._observer.samples if self._observer is not None else 0
        return self._world.sum(self._clock.samples_drawn or observed or self._clock.steps * self._batch_size)

    def __repr__(self) -> str:
        blueprint, blocks = self.blueprint, self.blueprint.partition.blocks
        masked = list(self.masks)
        state = "attached" if self._attached else "detached"
        lines = [
            f"Session({state}, engine={self.engine}, epoch {self.epoch} of {blueprint.epochs}, step {self.step})",
            f"  sparsity: {f'{self.recipe.sparsity!r}, density now {self.density:.4f}' if masked else 'none'}",
            f"  freezing: {self.frozen_blocks} of {len(blocks)} blocks frozen; "
            f"freeze epochs {list(blueprint.freeze_plan.freeze_epochs)}",
            f"  sieving: {len(self.partial_set):,} of {len(self._population):,} samples in use",
            f"  learning rate: {'the caller’s' if self._rates is None else repr(self.recipe.learning_rate)}",
        ]
        lines.insert(1, f"  engine: {self.engine} ({self.engine_reason})")
        if self._native is not None and self._attached:
            regions, left = self._native.taken, self._native.left
            lines.append(
                f"  replaced: the model's forward; {sum(len(region.nodes) for region in regions)} operations in "
                f"{len(regions)} native regions, in PyTorch: {', '.join(left) or 'nothing'}"
            )
        if self._attached:
            lines.append("  hooked: the optimizer's steps (clock)")
            lines.append("  made: session.loader, whose batches drive the clock; your loader stays as it is")
            if masked:
                lines.append(f"  hooked: the optimizer's steps and the gradients of {len(masked)} tensors (masks):")
                lines += [f"    {name}" for name in masked]
            if self._rates is not None:
                lines.append(f"  split: the optimizer's groups, by block, into {len(self._optimizer.param_groups)}")
            held = [name for name, module in self._model.named_modules() if is_held(module)]
            if held:
                lines.append(f"  replaced: train() of {len(held)} norms, which frozen blocks hold in evaluation mode:")
                lines += [f"    {name}" for name in held]
        return "\n".join(lines)

    # --- attaching and detaching -----------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self._model.parameters()), torch.device("cpu"))

    def _make_classes(self, labels: Tensor | None) -> ClassLabels | None:
        technique = self.recipe.sieving
        if technique is None or not (self.recipe.sieves and technique.balanced):
            return None
        return ClassLabels(int(self._population.max()) + 1, labels)

    def _make_sieve(self) -> Sieve | None:
        technique, classes = self.recipe.sieving, self._classes
        if technique is None or not self.recipe.sieves:
            return None
        labels = classes.labels[self._population] if classes is not None and not classes.collects else None
        return Sieve(self._population, technique, generator=self._generator, labels=labels)

    def _make_observer(self, sieve: Sieve) -> Observer:
        criterion = sieve.technique.make_criterion()
        self._scorer = criterion.scorer(int(self._population.max()) + 1)
        return Observer(
            self._scorer,
            self.loader,
            self._world.gather if self._world.is_shared else None,
            classes=self._classes,
            is_needed=criterion.needs_every_batch or (self._classes is not None and self._classes.collects),
        )

    def _make_masker(self, masks: Mapping[str, Tensor] | None) -> Masker | None:
        blueprint = self.blueprint
        if blueprint.method is None:
            return None
        masker = Masker(
            blueprint.sparse_layers,
            self._optimizer,
            blueprint.method,
            generator=self._generator,
            interval=blueprint.interval,
            epochs=blueprint.epochs,
            masks=masks,
        )
        if self._world.is_shared:
            masker.average = self._world.average_
        return masker

    def _start_engine(self) -> None:
        """Make the model compute as ``engine`` says."""
        if self._native is not None:
            self._native.detach()
            self._native = None
        if self.engine == "native":
            from spfde.engines.native.engine import NativeEngine

            assert self._masker is not None, "only what is sparse has a native engine"
            masker, freezer = self._masker, self._freezer
            self._native = NativeEngine(
                self._model,
                masks=lambda: masker.masks,
                dense_gradients=lambda: masker.wants_dense_gradients,
                frozen=lambda: freezer.frozen_parameters,
                cached=self._make_cache(),
                sample=self._sample,
            )

    def _make_cache(self) -> CachedPrefix | None:
        freezing = self.recipe.freezing
        if freezing is None or not freezing.cache_variants:
            return None
        from spfde.engines.native.prefix import CachedPrefix

        return CachedPrefix(
            int(self._population.max()) + 1,
            freezing.cache_variants,
            freezing.cache_precision,
            int(freezing.cache_limit_gib * 2**30),
            None if freezing.cache_folder is None else Path(freezing.cache_folder),
        )

    def _make_convergence(self, probe: Sample | None) -> Convergence | None:
        technique, blueprint = self.recipe.freezing, self.blueprint
        if technique is None or not (technique.adapts and self.recipe.freezes):
            return None
        from spfde.session.convergence import Convergence, Criterion, RepresentationCriterion, StructureCriterion

        criterion: Criterion
        if technique.criterion == "structure":
            assert self._masker is not None, "the door lets no dense recipe in"
            criterion = StructureCriterion(blueprint.sparse_layers, lambda: self.masks)
        else:
            assert probe is not None, "the door draws the probe samples"
            samples = technique.probe_samples
            criterion = RepresentationCriterion(self._model, blueprint.partition, probe, samples, self._in_pytorch)
        return Convergence(
            criterion,
            blueprint.partition.blocks[: max(blueprint.freeze_plan.frozen)],
            threshold=technique.threshold,
            flops_of_look=self._forward_flops,
            # Ranks on other hardware may round otherwise: they all go by the first one's figure.
            agreed=lambda similarity: float(self._world.gather(similarity)[0]),
        )

    def _forward_flops(self, samples: int) -> int:
        """Of the forward pass of so many samples under the masks as they are."""
        cost = self.blueprint.cost
        density = cost.densities(self._masker.densities() if self._masker is not None else {})
        return sum(round_half_up(samples * flops * share) for flops, share in zip(cost.forward, density, strict=True))

    @contextmanager
    def _in_pytorch(self) -> Iterator[None]:
        """The model computes through its own modules, whatever the engine."""
        patched = vars(self._model).pop("forward", None) if self._native is not None else None
        try:
            yield
        finally:
            if patched is not None:
                self._model.forward = patched

    def _make_rates(self) -> GroupRates | None:
        technique, blueprint = self.recipe.learning_rate, self.blueprint
        if technique is None:
            return None
        blocks = blueprint.partition.blocks
        by_name = dict(self._model.named_parameters())
        block_of = {id(by_name[name]): index for index, block in enumerate(blocks) for name in block.parameters}
        resume = blueprint.freeze_plan.resume_epoch
        return GroupRates(self._optimizer, block_of, blueprint.learning_stops, technique, resume_epoch=resume)

    def _make_loader(self, loader: DataLoader[Any]) -> SievedLoader:
        assert loader.batch_size is not None, "the door lets no such loader in"
        self._batch_size = loader.batch_size
        self._baseline_samples = _samples_per_epoch(loader)
        share = (0, 1)
        if self._world.is_shared and not self.recipe.is_neutral:
            if deals_out(loader, self._world):
                share = (self._world.rank, self._world.size)
            else:
                self._baseline_samples *= self._world.size
        keep: Callable[[], Tensor | None] = self._sieve.keep if self._sieve is not None else _keep_all
        sampler = SievedBatchSampler(loader.sampler, loader.batch_size, loader.drop_last, keep=keep, share=share)
        built = SievedLoader(loader, sampler)
        # Weak: a loader that outlives its session must not keep the session, and so the model, alive.
        session = weakref.ref(self)

        def while_attached(act: Callable[[Session], None]) -> None:
            alive = session()
            if alive is not None and alive._attached:
                act(alive)

        built.on_start = lambda: while_attached(Session._on_loader_start)
        built.on_batch = lambda indices: while_attached(lambda alive: alive._on_batch(indices))
        built.on_end = lambda: while_attached(Session._on_loader_end)
        return built

    def holds(self, target: object) -> bool:
        """Is this session attached to that model or optimizer?"""
        return self._attached and (target is self._model or target is self._optimizer)

    def detach(self) -> None:
        """Undo everything: hooks, frozen flags, held BatchNorms and the split of the optimizer's groups.

        The weights stay as they are, zeros included; ``masks`` and ``cost`` can still be read.
        """
        if not self._attached:
            return
        self._attached = False
        for handle in self._handles:
            handle.remove()
        if self._masker is not None:
            self._masker.remove()
        if self._native is not None:
            self._native.detach()
        self._freezer.freeze_to(0)
        if self._rates is not None:
            self._rates.join()

    def infer_masks(self) -> None:
        """Take the masks from the model's zeros, after loading a sparse checkpoint that came without a session.

        Raises:
            StateMismatch: the model is denser than the recipe allows.
            UsageError: the recipe has no sparsity.
        """
        self._check_attached()
        if self._masker is None:
            raise UsageError("infer_masks() needs a recipe with sparsity. Attach with Recipe(sparsity=...).")
        self._masker.infer_masks()

    def _check_attached(self) -> None:
        if not self._attached:
            raise UsageError("the session is detached. Call spfde.attach again to go on.")

    # --- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the session remembers, as tensors and primitives.

        Raises:
            UsageError: taken between two batches of an epoch; only the top and the bottom of an epoch can be resumed.
        """
        self._check_attached()
        if self._clock.phase == "running":
            raise UsageError(
                "state_dict() was called between two batches. Take it at the top of an epoch, or after its last batch "
                "(with batches from elsewhere, after end_epoch())."
            )
        if self._clock.phase == "drained":
            self._check_observed()
        self._clock.samples_observed = self._observer.samples if self._observer is not None else 0
        return {
            "format": STATE_FORMAT,
            "recipe": self.recipe.to_dict(),
            "engine": self.engine,
            "fit": self._fit(),
            "seed": self.seed,
            "clock": self._clock.state_dict(),
            "generator": self._generator.get_state(),
            "loader_generators": [generator.get_state() for generator in loader_generators(self.loader)],
            "cost": self.cost.state_dict(),
            "parts": {name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken. Load the model and the optimizer first.

        Raises:
            StateMismatch: the state is from another recipe, model, run length, data set or version.
        """
        self._check_attached()
        parts = self._parts()
        check_fit(state, recipe=self.recipe.to_dict(), fit=self._fit(), parts=parts)
        if state["engine"] != self.engine:
            self._switch_engine(state["engine"])
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        self._generator.set_state(state["generator"].cpu())
        for generator, saved in zip(loader_generators(self.loader), state["loader_generators"], strict=True):
            generator.set_state(saved.cpu())
        self.cost.load_state_dict(state["cost"])
        self.seed = state["seed"]
        self._clock = Clock.from_state(state["clock"])
        self._loaded_drained = self._clock.phase == "drained"
        self.loader.had_workers = self._clock.epoch > 0 or self._loaded_drained
        if self._observer is not None:
            self._observer.begin_epoch()
            self._observer.samples = self._clock.samples_observed

    def _switch_engine(self, engine: str) -> None:
        """Take the engine that the state was saved with, for another one rounds otherwise; unless one was asked for."""
        if self._asked_engine != "auto":
            warnings.warn(
                f'The state was saved with engine="{engine}" and goes on with engine="{self._asked_engine}", as asked: '
                'the two round differently, so the run is not bit for bit the same. Attach with engine="auto" to go on '
                "as it was.",
                stacklevel=3,
            )
            return
        try:
            choice = choose_engine(
                engine, self._given, self.blueprint, sample=self._sample, batch_size=self._batch_size,
                is_neutral=self.recipe.is_neutral, on_build=say_on_stderr,
            )  # fmt: skip
        except InvalidArgument as error:
            self.engine_reason = f"the state was saved with the {engine} engine, which {error.problems[0].rule}"
            say_choice(self.engine, self.engine_reason)
            return
        self.engine, self.engine_reason = choice.name, "as the state was saved with"
        self._start_engine()

    def _parts(self) -> dict[str, Any]:
        """The parts that remember something, by name, in the order in which they are loaded."""
        parts = {
            "freezer": self._freezer,
            "convergence": self._convergence,
            "masker": self._masker,
            "rates": self._rates,
            "sieve": self._sieve,
            "scorer": self._scorer,
            "classes": self._classes if self._classes is not None and self._classes.collects else None,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _fit(self) -> dict[str, Any]:
        """What a state must agree on with the session that it is loaded into."""
        return {
            "epochs": self.blueprint.epochs,
            "interval": self.blueprint.interval,
            "samples": len(self._population),
            "batch_size": self._batch_size,
            "parameters": {name: list(p.shape) for name, p in self._model.named_parameters()},
            "blocks": [block.name for block in self.blueprint.partition.blocks],
            "loader_generators": len(loader_generators(self.loader)),
        }


def _samples_per_epoch(loader: DataLoader[Any]) -> int:
    """Samples that the plain loop trains on in an epoch."""
    assert loader.batch_size is not None
    try:
        drawn = len(loader.sampler)  # type: ignore[arg-type]  # samplers need not have a length
    except TypeError:
        drawn = len(loader.dataset)  # type: ignore[arg-type]
    return drawn - drawn % loader.batch_size if loader.drop_last else drawn


def _keep_all() -> None:
    """Nothing is removed."""
