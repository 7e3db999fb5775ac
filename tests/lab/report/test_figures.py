"""Figures for a paper."""

from io import BytesIO

import pytest
from PIL import Image

from flatmin.errors import OutputError
from flatmin.lab.report import write_figures


def test_each_plot_as_svg_and_png(comparison, tmp_path):
    folder = comparison(("base", "sam $x$", "saf </svg>"))
    names = {file.name for file in write_figures([folder], tmp_path / "figures")}
    assert {"cost.svg", "cost.png", "differences.svg", "landscape-random.png", "spectrum.svg", "memory.png"} <= names
    assert "sam $x$" in (tmp_path / "figures" / "cost.svg").read_text()
    assert Image.open(BytesIO((tmp_path / "figures" / "cost.png").read_bytes())).size[0] > 900


def test_never_over_anything_else(comparison, tmp_path):
    (tmp_path / "cost.svg").write_text("mine")
    folder = comparison(seeds=1, sharp=False)
    with pytest.raises(OutputError, match="was not written by flatmin report"):
        write_figures([folder], tmp_path)
