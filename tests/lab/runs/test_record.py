"""What is recorded about a run beside its numbers."""

import getpass
import json
import platform
import socket
import sys

from flatmin.lab.runs.record import command_line, environment


def test_the_command_line_can_be_typed_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/y/__main__.py", "train", "--data", "folder:/my images"])
    assert command_line() == "flatmin train --data 'folder:/my images'"


def test_the_environment_has_versions_and_hardware_and_names_nobody():
    found = environment()
    assert found["versions"]["python"] == platform.python_version()
    assert {"flatmin", "torch", "numpy", "scipy", "scikit-learn"} <= found["versions"].keys()
    assert {"system", "processor", "cores", "threads", "accelerator"} == found["hardware"].keys()
    values = json.dumps(found)
    assert socket.gethostname() not in values
    assert f'"{getpass.getuser()}"' not in values
