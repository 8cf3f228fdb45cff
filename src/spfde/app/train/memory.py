"""A run that needs more memory than there is ends with advice, not with the allocator's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from spfde.app.machine_errors import is_out_of_memory
from spfde.app.train.options import TrainOptions
from spfde.core.errors import UsageError


@contextmanager
def memory_advice(options: TrainOptions, out: Path) -> Iterator[None]:
    """Turn running out of memory into an error that says what to change.

    Raises:
        UsageError: there was not enough memory, of the device or of the host.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        on_device = isinstance(error, torch.OutOfMemoryError)
        where = "the device" if on_device else "the machine"
        change = [f"a smaller --batch-size (it was {options.batch_size})", "a smaller --model or --image-size"]
        if on_device:
            change += ["--data-on host"] if options.data_on != "host" else []
            change += ["--precision bf16"] if options.precision == "fp32" else []
        elif options.workers:
            change += [f"fewer --workers (they were {options.workers})"]
        remedy = f"Start a new run with {', '.join(change[:-1])} or {change[-1]}"
        again = f", or free some memory and go on with `spfde train --resume {out}`" if out.is_dir() else ""
        raise UsageError(f"{where} has no memory left for the run. {remedy}{again}.") from error
