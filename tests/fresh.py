"""The command in a process of its own, forked from a server that has loaded what it needs.

A session loads that once, and each process begins as a fresh one would after its imports: no experiment file is known
there and no method registered.
"""

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *["pytest", "torch", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp"],
        *["safetensors.torch", "flatmin.lab.cli._train", "flatmin.lab.cli._sharpness", "flatmin.lab.runs.run"],
        "flatmin.lab.comparison.run",
    ]
)


def start(*arguments: object, cwd: Path | str = ".") -> BaseProcess:
    """Starts ``flatmin ARGUMENTS``; what it prints goes to the files ``.stdout`` and ``.stderr`` of its folder."""
    given = ([str(argument) for argument in arguments], str(Path(cwd).absolute()), dict(os.environ))
    process = SERVER.Process(target=_command, args=given)
    process.start()
    return process


def run(*arguments: object, cwd: Path | str = ".", timeout: float = 120) -> "CompletedProcess[str]":
    """Runs ``flatmin ARGUMENTS`` to its end."""
    process = start(*arguments, cwd=cwd)
    process.join(timeout)
    process.kill()  # where it has not ended in time
    process.join()
    out, err = (Path(cwd, name).read_text() for name in (".stdout", ".stderr"))
    assert process.exitcode is not None
    return CompletedProcess(arguments, process.exitcode, out, err)


def _command(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, ".stdout"), (2, ".stderr")):
        os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    sys.argv = ["flatmin", *arguments]
    from flatmin.__main__ import main

    main()
