"""How flat a minimum is: SAM's measure, the Hessian's eigenvalues, trace and spectrum, and loss landscapes.

All are functions of ``(model, loss_fn, batches, *, ...)`` and leave the model as it was: weights, buffers, modes,
gradients and random states, also when something raises. ``loss_fn(model(x), y)`` is the mean over a batch; take the
plain cross entropy, without label smoothing, where numbers are to be compared. ``batches`` are pairs ``(x, y)`` that
can be gone through several times, such as a list or a DataLoader; their mean counts every sample once. Batches of up to
256 MiB together are kept where the model is; larger sets are read again in each pass, from the same random numbers.

Options that all have:

* ``normalise_logits``: centre each sample's logits and divide them by their length. A cross entropy, and with it its
  sharpness, rises and falls with the scale of the logits, which a method that softens or sharpens predictions changes
  and which says nothing of flatness. Give both values.
* ``batch_statistics``: whether batch- and instance-norm layers use each batch's own statistics, as in training; dropout
  is off in any case.
* ``dtype``: ``torch.float32`` or ``torch.float64``; that of the weights, and at least float32, where it is None.
* ``samples``: measure on this many samples at most, drawn by ``seed``; None for all.
* ``seed``: draws the samples, and directions and vectors where there are some.

Sharpness is no measure of generalisation: see ``docs/sharpness.md``.
"""

from ._density import SpectralDensity as SpectralDensity
from ._density import spectral_density as spectral_density
from ._hessian import HessianEigenvalues as HessianEigenvalues
from ._hessian import HessianTrace as HessianTrace
from ._hessian import hessian_eigenvalues as hessian_eigenvalues
from ._hessian import hessian_trace as hessian_trace
from ._landscape import Landscape as Landscape
from ._landscape import loss_landscape as loss_landscape
from ._sam import AverageSharpness as AverageSharpness
from ._sam import SamSharpness as SamSharpness
from ._sam import average_sharpness as average_sharpness
from ._sam import sam_sharpness as sam_sharpness

__all__ = [
    "AverageSharpness",
    "HessianEigenvalues",
    "HessianTrace",
    "Landscape",
    "SamSharpness",
    "SpectralDensity",
    "average_sharpness",
    "hessian_eigenvalues",
    "hessian_trace",
    "loss_landscape",
    "sam_sharpness",
    "spectral_density",
]
