"""The laboratory: does any of it help on your problem, and what does it cost?

What the command ``flatmin`` does, from Python::

    from flatmin import lab

    if __name__ == "__main__":
        found = lab.compare("my_experiment.py", methods=["base", "sam", "saf"])
        print(found)

It needs ``pip install 'flatmin[cli]'``. ``import flatmin`` does not import it.

=====================  ==========================================================================
`compare`              several methods on the same splits, weights and batches: table and verdict
`train`, `resume`      one network with one method, kept in a folder; a run that was ended early
`Recipe`               what is trained and how: data, network, epochs, optimizer
`measure_sharpness`    how sharp the minimum of a saved run is
`measure_landscape`    the loss around the minimum of a saved run
`measure_after`        what is left of a saved run after rounding, noise and a fine-tune
`methods`              the methods by name, and how to register one of your own
`results`              what is on disk: file names, rows, intervals, the verdict
`report`               one page for the browser from the folders of comparisons and runs
=====================  ==========================================================================
"""

from . import methods as methods
from . import report as report
from . import results as results
from .comparison.compare import compare as compare
from .recipe import Recipe as Recipe
from .runs.after import measure_after as measure_after
from .runs.landscape import measure_landscape as measure_landscape
from .runs.sharpness import measure_sharpness as measure_sharpness
from .runs.train import resume as resume
from .runs.train import train as train

__all__ = [
    "Recipe",
    "compare",
    "measure_after",
    "measure_landscape",
    "measure_sharpness",
    "methods",
    "report",
    "results",
    "resume",
    "train",
]
