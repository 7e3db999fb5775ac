"""What holds for all tests."""

import gc


def pytest_collection_finish() -> None:
    """Optimizers look for the network among all objects, once each: among those that tests make, and not torch's."""
    gc.collect()
    gc.freeze()
