"""Runs something in a child process that is killed at its n-th operation on files."""

import itertools
import os
import signal
import traceback
import warnings
from collections.abc import Callable

import safetensors.torch
import torch

OPERATIONS = ("rename", "replace", "fsync", "link", "mkdir", "unlink", "rmdir")


def killed_at(number: int, action: Callable[[], object]) -> bool:
    """Runs ``action`` in a child and returns whether it came to its ``number``-th operation, at which it was killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child uses none of the parent's
        child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            _watch(number)
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _watch(number: int) -> None:
    count = itertools.count(1)

    def watched(function, part=None):
        def call(*arguments, **options):
            if next(count) == number:
                if part is not None:  # killed in the middle of writing
                    part(arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    def cut_short(path):
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        os.truncate(path, 20)

    for name in OPERATIONS:
        setattr(os, name, watched(getattr(os, name)))
    safetensors.torch.save_file = watched(safetensors.torch.save_file, lambda arguments: cut_short(arguments[1]))
    write = os.write
    os.write = watched(write, part=lambda arguments: write(arguments[0], arguments[1][:20]))
