"""The engines that come with this package: importing this module registers them."""

from spfde.engines.blocks.engine import BlocksEngine
from spfde.engines.cudagraph.engine import CudaGraphEngine
from spfde.engines.masked import MaskedEngine
from spfde.engines.native.engine import NativeEngine

__all__ = ["BlocksEngine", "CudaGraphEngine", "MaskedEngine", "NativeEngine"]
