"""Runs that share a GPU: under NVIDIA's Multi-Process Service (MPS) they run side by side, and otherwise by turns.

Without it a GPU runs kernels of one process at a time, so that several small networks take as long as one after the
other. The service is a program that comes with the driver and that any user may start.
"""

import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from ...errors import FlatminWarning

CONTROL = "nvidia-cuda-mps-control"
PIPE, LOG = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"  # by which processes find a service
CHOSEN = "CUDA_VISIBLE_DEVICES"  # counts among the GPUs that a service has, so that the service must have all
USUAL = Path("/tmp/nvidia-mps/control")  # of a service that was started without them
KINDS = {"cuda"}  # types of devices that can be shared so
LONGEST = 80  # characters of the folder: sockets in it have at most 108
PATIENCE = 60.0  # seconds: a first process may take some, and a service that is out of order lets it wait for ever

# Lives as long as its input is open, so that nothing stays behind however the process at the other end has ended.
_SERVICE = f"{CONTROL} -d >start 2>&1 </dev/null || exit 1; echo; cat >/dev/null; echo quit | {CONTROL} >/dev/null 2>&1"
_ATTACH = "import sys, torch; torch.zeros(1, device=sys.argv[1]).item()"

_log = logging.getLogger("flatmin")


class _CannotShareError(Exception):
    """Why runs do not share a GPU side by side."""


@contextmanager
def side_by_side(device: torch.device, runs: int) -> Iterator[None]:
    """Inside, processes that are started run their kernels side by side on a GPU, if more than one at a time wants to.

    The environment says where the service is: one that the user has started, or turned off by an empty place such as
    ``CUDA_MPS_PIPE_DIRECTORY=/dev/null``, is left alone. A service that does not serve is left out, with a warning.

    Args:
        device: Where the runs are.
        runs: How many there are at a time.
    """
    if runs < 2 or device.type not in KINDS or torch.version.hip is not None or PIPE in os.environ or USUAL.exists():
        yield
        return
    with ExitStack() as stack:
        service = folder = None
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mps", ignore_cleanup_errors=True))
            service = _started(device, Path(folder))
        except (_CannotShareError, OSError) as error:
            why = error if isinstance(error, _CannotShareError) else f"NVIDIA's MPS could not be started ({error})"
            warnings.warn(
                f"{runs} runs share the GPU by turns, which takes about as long as one after the other: {why}; "
                f"{PIPE}=/dev/null does the same without this warning",
                FlatminWarning,
                stacklevel=5,  # this, contextlib, Comparison.run, compare
            )
        else:
            stack.callback(_end, service)
            _log.info("%d runs share the GPU side by side, under NVIDIA's MPS", runs)
        with _environment(folder if service else None):
            yield


def _started(device: torch.device, folder: Path) -> "subprocess.Popen[bytes]":
    """A service that was seen to serve; until its input is closed."""
    if shutil.which(CONTROL) is None:
        raise _CannotShareError(f"NVIDIA's MPS would run them side by side, but there is no {CONTROL} here")
    if len(str(folder)) > LONGEST:
        raise _CannotShareError(
            f"the folder for temporary files, {folder.parent}, has too long a name for NVIDIA's MPS: set TMPDIR"
        )
    with _environment(str(folder)):
        service = subprocess.Popen(
            ["sh", "-c", _SERVICE],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if name != CHOSEN},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it
        )
        try:
            assert service.stdout is not None
            if not select.select([service.stdout], [], [], PATIENCE)[0]:
                _kill(service)
                raise _CannotShareError(f"NVIDIA's MPS did not start in {PATIENCE:.0f} s")
            if not service.stdout.readline():
                said = (folder / "start").read_text(errors="replace").split()
                raise _CannotShareError(f"NVIDIA's MPS did not start ({' '.join(said):.200})")
            attach(device)
            if not _servers():
                raise _CannotShareError("NVIDIA's MPS has started, but serves nobody")
        except BaseException:
            _end(service)
            raise
    return service


def attach(device: torch.device) -> None:
    """Uses the device from another process, as runs will.

    Raises:
        _CannotShareError: If that does not work.
    """
    try:
        subprocess.run(
            [sys.executable, "-c", _ATTACH, str(device)], check=True, capture_output=True, timeout=PATIENCE, text=True
        )
    except subprocess.TimeoutExpired as error:
        raise _CannotShareError(f"NVIDIA's MPS did not answer in {PATIENCE:.0f} s") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["?"])[-1]
        raise _CannotShareError(f"under NVIDIA's MPS the GPU could not be used ({last:.200})") from error


def _servers() -> list[str]:
    """The processes through which the service serves."""
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run([CONTROL], input="get_server_list\n", capture_output=True, timeout=PATIENCE, text=True)
        return [word for word in answer.stdout.split() if word.isdigit()]
    return []


def _end(service: "subprocess.Popen[bytes]") -> None:
    try:
        with suppress(OSError, subprocess.SubprocessError):  # it has ended before, or does not
            service.communicate(timeout=PATIENCE)
    finally:
        if service.poll() is None:
            _kill(service)
            service.communicate()


def _kill(service: "subprocess.Popen[bytes]") -> None:
    """Kills it, and what it waits for."""
    with suppress(ProcessLookupError):
        os.killpg(service.pid, signal.SIGKILL)


@contextmanager
def _environment(folder: str | None) -> Iterator[None]:
    """Inside, processes that are started find the service of this folder."""
    before = {name: os.environ.get(name) for name in (PIPE, LOG)}
    if folder is not None:
        os.environ.update(dict.fromkeys(before, folder))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
