"""Accelerate: attach to what ``accelerator.prepare`` takes or gives, in any order.

Accelerate's prepared loader puts batches on the device, and tells ``accelerator.accumulate`` where an epoch ends. So
the session's loader is put inside one of its kind; where the batches are no samples with ids, it is the other way
round.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from spfde.core.errors import InvalidArgument, Problem, StateMismatch
from spfde.core.say import counted
from spfde.recipe import Recipe
from spfde.session.attach import attach as attach_plain
from spfde.session.session import Session
from spfde.sieving.batch_sampler import SievedBatchSampler
from spfde.sieving.loader import SievedLoader, settings_of
from spfde.sieving.stream import is_stream

try:
    from accelerate import Accelerator
    from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SeedableRandomSampler
    from accelerate.utils import send_to_device
    from accelerate.utils.other import load
except ImportError as error:
    remedy = "Install it: pip install 'spfde[transformers]'."
    raise InvalidArgument(Problem("import", __name__, "needs the package accelerate", remedy)) from error


def attach(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    loader: Any,
    recipe: Recipe,
    *,
    epochs: int,
    **options: Any,
) -> Session:
    """Attach a recipe to a loop with Accelerate, before or after ``accelerator.prepare``.

    ``session.loader`` takes the prepared loader's place and needs no ``prepare``: it deals its batches out over the
    processes, puts them on the device, and ends accumulation with the epoch. A DataLoader that the session cannot deal
    out (over a stream, with a batch sampler of your own) is dealt out by Accelerate, and what is no DataLoader by
    nobody: each process iterates its own. ``accelerator.save_state`` and
    ``load_state`` take the session along after ``accelerator.register_for_checkpointing(session)``; ``load_state``
    then refuses a folder whose registered objects' files would run code, are cut off, or are missing.

    Args:
        accelerator: the Accelerator.
        model: the model, prepared or not; it is moved to the accelerator's device, as ``prepare`` does.
        optimizer: the optimizer, prepared or not, or a list.
        loader: the training loader, prepared or not; where nothing is sieved of any kind, as in ``spfde.attach``.
        recipe: what to save, and how.
        epochs: length of the run.
        options: further arguments of ``spfde.attach``.

    Raises:
        InvalidArgument: with every problem that was found, each with its remedy.

    Example:
        >>> from accelerate import Accelerator
        >>> from spfde.integrations.accelerate import attach
        >>> accelerator = Accelerator(cpu=True)
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        >>> session = attach(accelerator, model, optimizer, loader, spfde.presets.static, epochs=2)
        >>> accelerator.register_for_checkpointing(session)
        >>> for epoch in session.epochs():
        ...     for x, y in session.loader:
        ...         accelerator.backward(torch.nn.functional.cross_entropy(model(x), y))
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """
    _check_accelerator(accelerator)
    optimizers = [getattr(each, "optimizer", each) for each in _listed(optimizer)]
    plain = plain_loader(loader)
    if accelerator.device_placement and isinstance(model, nn.Module) and not hasattr(model, "hf_device_map"):
        model.to(accelerator.device)  # as prepare does: masks and the engine go by where the model is
    by_accelerate = is_dealt_by_accelerate(plain, recipe)
    if by_accelerate:
        plain = accelerator.prepare_data_loader(loader)
        options.setdefault("samples_per_epoch", samples_of_process(plain, accelerator.num_processes))
    elif accelerator.num_processes > 1 and isinstance(plain, DataLoader):
        share_order(plain)
    session = attach_plain(
        model,
        optimizers[0] if len(optimizers) == 1 else optimizers,
        plain,
        recipe,
        epochs=epochs,
        **options,
    )
    if not by_accelerate:
        session.loader = _SessionLoader(session.loader, accelerator)
    accelerator.register_load_state_pre_hook(partial(_check_folder, accelerator))
    return session


_EARLIER = "Nothing of it was loaded. Load the folder that was saved before it."


def _check_folder(accelerator: Accelerator, models: list[nn.Module], folder: str) -> None:
    """Look at what Accelerate is about to load: of registered objects it takes pickles of any kind, code included.

    It writes these last, and not at once: where they are whole, so is the folder.

    Raises:
        StateMismatch: a file holds more than tensors, arrays and primitives, or is not there to its end.
    """
    found = sorted(Path(folder).glob("custom_checkpoint_*.pkl"))
    if len(found) < (registered := len(accelerator._custom_objects)):
        raise StateMismatch(
            f"{folder}: has {len(found)} of the files of {counted(registered, 'registered object')}, "
            f"custom_checkpoint_N.pkl: it was not saved to its end, or without them. {_EARLIER}"
        )
    for path in found:
        try:
            load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            reason = str(error).strip().splitlines()[0]
            raise StateMismatch(
                f"{path}: holds more than tensors and primitives, and would run code when Accelerate loads it "
                f"({reason}). Nothing of {folder} was loaded. Use a checkpoint of your own that was saved to its end."
            ) from error
        except Exception as error:  # PyTorch's reader raises whatever it likes on damaged files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise StateMismatch(f"{path} cannot be read ({reason}). {_EARLIER}") from error


def plain_loader(loader: Any) -> Any:
    """The DataLoader that a prepared one was made from: all batches, in one order. Anything else stays as it is."""
    inner = getattr(loader, "base_dataloader", loader)
    if not isinstance(inner, DataLoader):
        return inner
    batches = inner.batch_sampler
    if isinstance(batches, BatchSamplerShard):
        if batches.split_batches:
            remedy = "Set DataLoaderConfiguration(split_batches=False), or attach before prepare."
            raise InvalidArgument(
                Problem(
                    "loader",
                    "split_batches",
                    "cuts each batch over the processes, and the session deals out whole batches",
                    remedy,
                )
            )
        batches = batches.batch_sampler
    sampler = getattr(batches, "sampler", None)
    if inner.batch_size is not None or type(batches) is not BatchSampler:
        return inner  # the user's own, or one of which attach says why it cannot take it
    if isinstance(sampler, SeedableRandomSampler):
        # It seeds itself anew in each epoch by counting: the session counts, saves and resumes the generator instead.
        generator = torch.Generator().manual_seed(sampler.initial_seed)
        sampler = RandomSampler(sampler.data_source, generator=generator)
    return DataLoader(
        inner.dataset,
        batch_size=batches.batch_size,
        sampler=sampler,
        drop_last=batches.drop_last,
        **settings_of(inner),
    )


def is_dealt_by_accelerate(plain: Any, recipe: Recipe) -> bool:
    """Whether a DataLoader's batches are not of samples with ids, so that the session cannot deal them out."""
    return isinstance(plain, DataLoader) and not recipe.sieves and is_stream(plain)


class _SessionLoader(DataLoaderShard):  # type: ignore[misc]  # Accelerate is not there for mypy
    """The session's loader as Accelerate's: batches on the device, and the last one announced.

    Accelerate's own loads one batch ahead to know the last one; here the sampler tells it, where there is one.
    """

    def __init__(self, loader: Any, accelerator: Accelerator) -> None:
        device = accelerator.device if accelerator.device_placement else None
        super().__init__(getattr(loader, "dataset", []), device=device)
        self.base_dataloader = loader
        self._n_processes = accelerator.num_processes
        self._is_accelerate_prepared = True  # so that prepare() leaves it as it is

    def __iter__(self) -> Iterator[Any]:
        self.begin()
        self.remainder = _remainder(self.base_dataloader, self._n_processes)
        try:
            for batch, is_last in _announced(self.base_dataloader):
                self.end_of_dataloader = is_last
                yield batch if self.device is None else send_to_device(batch, self.device)
        finally:
            self.end()


def _announced(loader: Any) -> Iterator[tuple[Any, bool]]:
    """Batches of an epoch, and whether each is the last one."""
    batches = iter(loader)
    if isinstance(loader, SievedLoader):
        for batch in batches:
            yield batch, not loader.has_more
        return
    ahead = list(islice(batches, 1))
    while ahead:
        batch, ahead = ahead[0], list(islice(batches, 1))
        yield batch, not ahead


def _remainder(loader: Any, n_processes: int) -> int:
    """Samples of an epoch's last round of batches before those that come again, where ``gather_for_metrics`` cuts it.

    0: none come again. -1, Accelerate's word for a length that is not known: it cuts nothing, and logs that.
    """
    if n_processes == 1:
        return 0
    batches = getattr(loader, "batch_sampler", None)
    if not isinstance(batches, SievedBatchSampler) or batches.share[1] != n_processes:
        return -1
    if batches.drop_last:
        return 0
    try:
        return batches.n_samples() % (n_processes * batches.batch_size)
    except TypeError:
        return -1


def samples_of_process(loader: Any, n_processes: int) -> int | None:
    """Samples of an epoch that Accelerate deals out to each of several processes; None where attach can tell."""
    if n_processes == 1:
        return None
    try:
        n: int = loader.total_dataset_length
    except TypeError:
        return None
    batch_size: int = loader.batch_size or 1
    return n // (batch_size * n_processes) * batch_size if loader.drop_last else -(-n // n_processes)


def _listed(optimizer: Any) -> list[Any]:
    return list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]


def _check_accelerator(accelerator: Accelerator) -> None:
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "TP", "XLA"):
        rule = "shards or replaces the parameters, which masks and freezing work on"
        raise InvalidArgument(Problem("accelerator", kind, rule, "Train on one device, or with DDP (MULTI_GPU)."))


def share_order(loader: DataLoader[Any]) -> None:
    """Give the samplers of all processes rank 0's order; the session deals out the batches of one order."""
    generator = getattr(loader.sampler, "generator", None)
    if generator is None and type(loader.sampler) is RandomSampler:
        generator = loader.sampler.generator = torch.Generator()
        generator.manual_seed(torch.initial_seed() % 2**63)
    if generator is not None:
        state = [generator.get_state()]
        torch.distributed.broadcast_object_list(state)
        generator.set_state(state[0])
