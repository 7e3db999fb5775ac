"""From results on disk to one page that opens in any browser, without a network.

Needs ``pip install 'flatmin[report]'``.
"""

from ._write import write_figures as write_figures
from ._write import write_report as write_report
from ._write import write_tensorboard as write_tensorboard

__all__ = ["write_figures", "write_report", "write_tensorboard"]
