"""The errors of this package, under their public name."""

from spfde.core.errors import *  # noqa: F403
from spfde.core.errors import __all__ as __all__
