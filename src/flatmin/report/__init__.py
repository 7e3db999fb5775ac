"""From results on disk to one page that opens in any browser, without a network.

Needs ``pip install 'flatmin[report]'``; TensorBoard's files need ``'flatmin[tensorboard]'``.
"""

from ._write import write_report as write_report

__all__ = ["write_report"]
