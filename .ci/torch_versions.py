"""Whether flatmin uses only what each version of torch has, as far as types tell: mypy, on the sources of that version.

Of a wheel of a gigabyte, the 5 MB of Python and stubs alone are fetched. Nothing is installed. By hand:

    .venv/bin/python .ci/torch_versions.py 2.6.0 2.7.1 2.8.0 2.9.1 2.10.0 2.11.0 2.12.0
"""

import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, url2pathname, urlopen

SOURCE = Path(__file__).resolve().parent.parent / "src" / "flatmin"
LEFT_OUT = ("torch/testing/", "torch/_inductor/", "torch/onnx/", "torch/ao/")  # which flatmin does not name
BLOCK = 2**20
SETTINGS = f"""[mypy]
files = {SOURCE}
ignore_missing_imports = True
[mypy-torch.*]
ignore_errors = True
"""


class Remote(io.RawIOBase):
    """A file behind an address, of which only the blocks that are read are fetched."""

    def __init__(self, url: str) -> None:
        self.url, self.place, self.blocks = url, 0, dict[int, bytes]()
        with urlopen(Request(url, method="HEAD")) as answer:
            self.size = int(answer.headers["Content-Length"])

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves there."""
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def read(self, size: int = -1) -> bytes:
        """Reads that many bytes, or all that are left."""
        end = self.size if size < 0 else min(self.place + size, self.size)
        found = b"".join(self._block(number) for number in range(self.place // BLOCK, -(-end // BLOCK)))
        start = self.place % BLOCK
        found, self.place = found[start : start + end - self.place], end
        return found

    def _block(self, number: int) -> bytes:
        if number not in self.blocks:
            last = min((number + 1) * BLOCK, self.size) - 1
            with urlopen(Request(self.url, headers={"Range": f"bytes={number * BLOCK}-{last}"})) as answer:
                self.blocks[number] = answer.read()
        return self.blocks[number]


def address(version: str) -> str:
    """Where the index has the wheel."""
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
    report = subprocess.run([*line, "--report", "-", f"torch=={version}"], check=True, capture_output=True, text=True)
    return str(json.loads(report.stdout)["install"][0]["download_info"]["url"])


def checked(version: str, folder: Path) -> int:
    """Runs mypy, and returns its exit code."""
    url = address(version)
    file = url2pathname(urlsplit(url).path) if url.startswith("file:") else Remote(url)
    with zipfile.ZipFile(file) as wheel:
        names = [name for name in wheel.namelist() if name.startswith("torch/") and name.endswith((".py", ".pyi"))]
        wheel.extractall(folder, [name for name in names if not name.startswith(LEFT_OUT)])
    (folder / "mypy.ini").write_text(SETTINGS)
    print(f"torch {version}:", flush=True)
    line = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache"]
    return subprocess.run(line, cwd=folder, env={"MYPYPATH": str(folder)}).returncode


def main() -> None:
    """Checks each version that is named."""
    codes = []
    for version in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            codes.append(checked(version, Path(folder)))
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
