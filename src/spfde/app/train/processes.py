"""The processes that ``torchrun`` has started to train one run together, or this one alone.

Each has a copy of the model, and takes its share of the samples. The first one alone holds the run folder and shows
progress; what the others need of the folder it sends them, so that other hosts need not see it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from spfde.app.runs.checkpoints import Checkpoints
from spfde.app.runs.folder import RunFolder
from spfde.app.runs.manifest import files_in
from spfde.app.train.options import TrainOptions
from spfde.app.train.saving import seed_all
from spfde.core.errors import InvalidArgument, Problem, Problems
from spfde.core.numbers import mix
from spfde.core.say import n_started
from spfde.session.distributed import OtherRankFailed, World

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes(World):
    """Those that train together; every method that exchanges something has to be called by all of them.

    Attributes:
        local_rank: this process among those of its host, from 0.
        store: where a launcher's processes leave word for each other, without waiting; None where there is one.

    Example:
        >>> from spfde.app.train.processes import Processes
        >>> alone = Processes()
        >>> alone.is_first, alone.first(lambda: "done")
        (True, 'done')
    """

    local_rank: int = 0
    store: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this one writes, and tells what happens."""
        return self.rank == 0

    def first(self, work: Callable[[], Result]) -> Result:
        """What ``work`` gives in the first process, for all of them: it runs there alone, and the others wait.

        Raises:
            OtherRankFailed: in the others, where ``work`` has raised an error.
        """
        if not self.is_shared:
            return work()
        found: list[Any] = [False, None]
        error = None
        if self.is_first:
            try:
                found = [True, work()]
            except Exception as raised:
                error = raised
        torch.distributed.broadcast_object_list(found)
        if error is not None:
            raise error
        if not found[0]:
            raise OtherRankFailed
        result: Result = found[1]
        return result

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """All leave the block when all have come to its end; an error in one of them ends all.

        Args:
            what: is done in it, for ``World.gather``.
        """
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        self.gather(None, error, what=what)

    def in_turn(self, work: Callable[[], Result]) -> Result:
        """What ``work`` gives in each: on each host one process does it first, and the others find what it has left."""
        result, is_done = None, not self.is_shared or not self.local_rank
        with self.together("what one process of a host does first"):
            result = work() if is_done else None
        return result if is_done else work()  # type: ignore[return-value]  # it is what work gave

    @contextmanager
    def copied(self, folder: Path) -> Iterator[Path]:
        """A folder of the first process's, to read from: the others have a copy of its files while this is open."""
        contents = self.first(lambda: {str(path.relative_to(folder)): path.read_bytes() for path in files_in(folder)})
        if self.is_first:
            yield folder
            return
        with tempfile.TemporaryDirectory(prefix="spfde-") as copy:
            for name, content in contents.items():
                place = Path(copy) / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
            yield Path(copy)

    def wrapped(self, model: nn.Module, device: torch.device) -> nn.Module:
        """What a model is called by in training: with others, its gradients are averaged."""
        if not self.is_shared:
            return model
        return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def level(self, model: nn.Module) -> None:
        """Give each process's model the first one's buffers, which DistributedDataParallel does before each step."""
        for buffer in model.buffers() if self.is_shared else ():
            torch.distributed.broadcast(buffer, 0)

    def seed_epoch(self, seed: int, epoch: int) -> None:
        """With others, let the global generators begin each epoch anew, apart from theirs.

        So dropout differs between processes, and a run goes on as if it had not been stopped, though one checkpoint
        serves processes of any number. A process that is alone goes on where its generators stand.
        """
        if self.is_shared:
            seed_all(int(mix(torch.tensor([seed]), epoch, self.rank)) % 2**32)


class FolderElsewhere(RunFolder):
    """A run folder that the first process holds: nothing is read of it here, and nothing written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.checkpoints = CheckpointsElsewhere(self.checkpoints.path)

    def write_text(self, name: str, text: str) -> None:
        """The first process does."""

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """The first process does."""

    def discard(self) -> None:
        """The first process does."""

    def read_json(self, name: str) -> dict[str, Any]:
        return {}


class CheckpointsElsewhere(Checkpoints):
    """Those in a folder that the first process holds."""

    def save(self, *_: Any, **__: Any) -> None:
        """The first process does."""

    def keep(self, *_: Any, **__: Any) -> None:
        """The first process does."""


def open_folder(processes: Processes, out: Path, *, resume: bool) -> RunFolder:
    """The run folder, held by the first process, new or as it is.

    Raises:
        RunFolderError: in the first process, as ``RunFolder.create`` and ``RunFolder.reopen`` have it.
        OtherRankFailed: in the others then.
    """
    folder: RunFolder = FolderElsewhere(out)
    with processes.together("opening the run folder"):
        if processes.is_first:
            folder = RunFolder.reopen(out) if resume else RunFolder.create(out)
    return folder


# --- who they are ----------------------------------------------------------------------------------------------------

_joined: Processes | None = None
_PATIENCE = timedelta(hours=6)
"""For which others wait while one downloads or decodes; a process that has died is noticed at once."""


def current() -> Processes:
    """The processes that this one trains with, as far as it has joined them."""
    world = World.current()
    if _joined is not None and (_joined.rank, _joined.size) == (world.rank, world.size):
        return _joined
    return Processes(world.rank, world.size, local_rank=int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of the launcher that started this one, joined while this is open; a group that is there is used.

    CPU tensors travel by gloo, those of GPUs by NCCL.

    Raises:
        InvalidArgument: the launcher does not say where they meet.
    """
    global _joined
    size = n_started()
    if size == 1 or World.current().is_shared:
        yield current()
        return
    if not torch.distributed.is_available():
        rule = "this PyTorch was built without torch.distributed"
        raise InvalidArgument(Problem("torchrun", size, rule, "Start one process, or install another build."))
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # documented, and not in __all__

    try:
        store, rank, size = next(rendezvous("env://"))
    except ValueError as error:
        rule = f"the processes do not know where to meet ({error})"
        raise InvalidArgument(Problem("WORLD_SIZE", size, rule, "Start them by torchrun, or unset it.")) from error
    if "LOCAL_RANK" not in os.environ:
        rule = "is not set, and says which of a host's processes this is: which GPU it takes, and who downloads"
        raise InvalidArgument(Problem("LOCAL_RANK", None, rule, "Start the processes by torchrun, or set it."))
    on_gpus = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=_PATIENCE,
    )
    word = PrefixStore("spfde", store)
    _joined = Processes(rank, size, local_rank=int(os.environ.get("LOCAL_RANK", "0")), store=word)
    try:
        yield _joined
    finally:
        _joined = None
        torch.distributed.destroy_process_group()


def check_together(options: TrainOptions, processes: Processes) -> None:
    """Raise ``InvalidArgument`` for what several processes cannot do; with one there is nothing to find."""
    if not processes.is_shared:
        return
    problems, kind = Problems(), options.device.partition(":")[0]
    if ":" in options.device or kind == "mps":
        rule = f"{processes.size} processes train together, each on a GPU of its own or on the CPU"
        problems.add("device", options.device, rule, "Use --device cuda, cpu or auto.")
    n_gpus = torch.cuda.device_count() if kind in ("auto", "cuda") else 0
    if kind in ("auto", "cuda") and 0 < n_gpus <= processes.local_rank:
        rule = f"each process of a host has a GPU of its own, and there are {n_gpus}"
        problems.add("device", options.device, rule, f"Start {n_gpus} processes on this host, or use --device cpu.")
    if options.cache_variants:
        rule = "a sample comes to another process in each epoch, which has not kept its variants"
        problems.add("cache_variants", options.cache_variants, rule, "Leave it out (0), or train in one process.")
    problems.raise_if_any()
