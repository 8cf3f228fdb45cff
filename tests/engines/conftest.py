from helpers.blocks import started  # noqa: F401  # a fixture of the tests of blocks here and inside of captured steps
from helpers.tracing import equal_networks_are_traced_once  # noqa: F401  # for all tests here
