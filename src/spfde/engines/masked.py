"""Dense arithmetic under a mask: PyTorch as it is, with zeros where no weight is."""

from __future__ import annotations

from typing import ClassVar

from spfde.core.registry import register
from spfde.engines.base import Engine, Job, Parts


@register("engine")
class MaskedEngine(Engine):
    """Leaves the model to PyTorch. It works everywhere, and is what other engines are compared with."""

    name: ClassVar[str] = "masked"
    summary: ClassVar[str] = "PyTorch's dense arithmetic, with zeros where no weight is"

    @classmethod
    def supports(cls, job: Job) -> str | None:
        return None

    @classmethod
    def expected_speed(cls, job: Job) -> float:
        return 1.0

    def attach(self, job: Job, parts: Parts) -> None:
        """Nothing to do: the masks keep the weights at zero."""

    def detach(self) -> None:
        """Nothing was done."""

    def describe(self) -> list[str]:
        return ["computed: by PyTorch as it is, masked weights as zeros"]
