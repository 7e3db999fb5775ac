"""What holds for all tests."""

import gc
import os
import signal

import pytest
import torch

# Without a GPU, Triton's kernels are interpreted. Triton must know before it is first imported, by whomever.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--fuzz 20`` draws twenty times as many random cases in tests/fuzz."""
    parser.addoption("--fuzz", type=int, default=1, metavar="N", help="Draw N times as many cases in tests/fuzz.")


def pytest_configure() -> None:
    """A shell ignores Ctrl-C for what it runs in the background, and all processes of the tests would inherit it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Optimizers look for the network among all objects, once each: among those that tests make, and not torch's.

    Torch makes many when it is first used, and again when it first compiles.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a comparison are forked from a server that has loaded torch, instead of loading it each."""
    from flatmin.lab.comparison import workers
    from tests.fresh import SERVER

    monkeypatch.setattr(workers, "CONTEXT", SERVER)


def pytest_sessionfinish() -> None:
    """Libraries that count what is theirs at the end find nothing left over."""
    gc.unfreeze()
