from helpers.blocks import started  # noqa: F401  # a fixture of the tests of blocks here and inside of captured steps
