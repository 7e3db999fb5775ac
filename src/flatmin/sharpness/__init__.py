"""How flat a minimum is: SAM's sharpness, the Hessian's eigenvalues, trace and spectrum, and loss landscapes.

Say once what to measure, an `Objective`; every measure is a function of it::

    objective = Objective(model, torch.nn.functional.cross_entropy, batches)
    print(sam_sharpness(objective, rho=0.05).value, hessian_eigenvalues(objective, k=3).eigenvalues)
    print(sam_sharpness(objective.variant(normalise_logits=True), rho=0.05).value)

Each measure takes the weights that the model has when it is called, and leaves the model as it was. Sharpness does not
measure generalisation: see ``docs/check/sharpness.md``.

Example:
    >>> import torch
    >>> from flatmin.sharpness import Objective, sam_sharpness
    >>> model = torch.nn.Linear(4, 3)
    >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    >>> objective = Objective(model, torch.nn.functional.cross_entropy, batches)
    >>> sam_sharpness(objective).value > 0
    True
"""

from ._density import SpectralDensity as SpectralDensity
from ._density import spectral_density as spectral_density
from ._hessian import HessianEigenvalues as HessianEigenvalues
from ._hessian import HessianTrace as HessianTrace
from ._hessian import hessian_eigenvalues as hessian_eigenvalues
from ._hessian import hessian_trace as hessian_trace
from ._landscape import Landscape as Landscape
from ._landscape import loss_landscape as loss_landscape
from ._objective import Objective as Objective
from ._sam import AverageSharpness as AverageSharpness
from ._sam import SamSharpness as SamSharpness
from ._sam import average_sharpness as average_sharpness
from ._sam import sam_sharpness as sam_sharpness

__all__ = [
    "AverageSharpness",
    "HessianEigenvalues",
    "HessianTrace",
    "Landscape",
    "Objective",
    "SamSharpness",
    "SpectralDensity",
    "average_sharpness",
    "hessian_eigenvalues",
    "hessian_trace",
    "loss_landscape",
    "sam_sharpness",
    "spectral_density",
]
