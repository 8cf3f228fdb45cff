from helpers.tracing import equal_networks_are_traced_once  # noqa: F401  # for all tests here
