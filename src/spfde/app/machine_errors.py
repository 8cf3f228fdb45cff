"""What a machine does to a run, in a line: a file that cannot be read, a process that was killed, no more memory."""

from __future__ import annotations

_MEMORY = "there is not enough memory"
_OF_ALLOCATORS = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory", "Cannot allocate memory")
_OF_EXCHANGES = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
_KILLED = "DataLoader worker (pid"


def machine_error(error: BaseException) -> str | None:
    """The line to end with; None where the error is a fault of the program, whose traceback is wanted.

    Example:
        >>> from spfde.app.machine_errors import machine_error
        >>> machine_error(PermissionError(13, "Permission denied", "run/config.json"))
        'run/config.json: permission denied. Look at the disk and at who may use the file, and try again.'
        >>> machine_error(ValueError("wrong"))
    """
    text = str(error).strip()
    if _KILLED in text:
        return (
            "a loader's worker process was killed, as a system does that is out of memory. Go on with --resume, with "
            "fewer --workers or --workers 0."
        )
    if is_lost_process(error):
        return "another process of the run has ended, or cannot be reached any more; see what it or the launcher says."
    if is_out_of_memory(error):
        first = f" ({text.splitlines()[0]})" if text else ""
        return f"{_MEMORY}{first}. Try again with a smaller --batch-size, a smaller --model or --image-size."
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        reason = (error.strerror or text or type(error).__name__).lower()
        named = f"{error.filename}: " if error.filename else ""
        return f"{named}{reason}. Look at the disk and at who may use the file, and try again."
    return None


def is_lost_process(error: BaseException) -> bool:
    """Whether another process of the run has ended, so that nothing can be exchanged with it any more."""
    of_torch = {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}
    by_name = any(kind.__name__ in of_torch for kind in type(error).__mro__)
    return isinstance(error, RuntimeError) and (by_name or any(words in str(error) for words in _OF_EXCHANGES))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no more memory: Python's error and PyTorch's, that of the host told by its words."""
    text = str(error)
    by_words = isinstance(error, RuntimeError) and any(words in text for words in _OF_ALLOCATORS)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or by_words
