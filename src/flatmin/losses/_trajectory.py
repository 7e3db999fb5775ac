"""The losses between a network's output and a target, as pure functions: equations 8 and 12 of the paper, and kin.

*Sharpness-Aware Training for Free*, Du et al., NeurIPS 2022, arXiv 2205.14083.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import check_mask, check_number, check_tensor, shown
from .._privacy import clipped
from ..errors import InvalidArgumentError

# Softened logits are clamped to this bound, so that no difference of two of them overflows. Differences far smaller
# already give the smaller logit probability 0.
BOUND = 1e30


def trajectory_loss(
    logits: Tensor, target: Tensor, *, temperature: float, mask: Tensor | None = None, class_dim: int | None = None
) -> Tensor:
    """Divergence of a network's predictions from a target, such as its past predictions, averaged over the batch.

    ``T**2 / B * sum_i mask_i * KL(softmax(target_i / T) || softmax(logits_i / T))``

    The factor ``T**2`` keeps the size of the gradient independent of ``T``, as in distillation (Hinton et al. 2015,
    arXiv 1503.02531). The paper's equations omit it and the authors' code has it; divide your coefficient by ``T**2``
    to be without it.

    Args:
        logits: The current logits, floating, shape (B, C), or with more dimensions and ``class_dim``.
        target: The logits to stay close to, floating, of the same shape. No gradient flows into them.
        temperature: ``T`` > 0; both are divided by it.
        mask: Bool, shape (B,), in general that of the logits without their classes: what contributes. None: all. The
            mean is over all ``B`` in any case.
        class_dim: Which dimension is the classes': 1 for maps (B, C, H, W), -1 for tokens (B, L, C); the mean is then
            over all pixels or tokens. None: 1, for logits of two dimensions alone.

    Returns:
        A scalar, float64 if ``logits`` are float64 and float32 otherwise, inside autocast too. It is finite if both
        arguments are, and 0 for an empty batch.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used, or logits have another number of dimensions
            than two and no ``class_dim``.

    Example:
        >>> import torch
        >>> from flatmin.losses import trajectory_loss
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> trajectory_loss(logits, logits, temperature=5.0)
        tensor(0.)
        >>> trajectory_loss(logits, -logits, temperature=5.0, mask=torch.tensor([True, False]))
        tensor(0.9869)
    """
    dim = _check(logits, target, mask, class_dim)
    check_number("temperature", temperature, above=0)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    divergence = F.kl_div(
        _log_softmax(logits.to(dtype), temperature, dim),
        _log_softmax(target.detach().to(dtype), temperature, dim),
        reduction="none",
        log_target=True,
    ).sum(dim=dim)
    if mask is not None:
        divergence = divergence.where(mask, 0)
    return clipped(temperature**2 * divergence.sum() / max(divergence.numel(), 1), logits)


def binary_trajectory_loss(logits: Tensor, target: Tensor, *, temperature: float, mask: Tensor | None = None) -> Tensor:
    """The trajectory loss of logits that are independent of each other: several labels a sample, or yes and no.

    ``T**2 / n * sum_k mask_k * KL(Bernoulli(sigmoid(target_k / T)) || Bernoulli(sigmoid(logits_k / T)))``

    over all ``n`` logits: a mean, as that of ``binary_cross_entropy_with_logits``. Its gradient after a logit is ``T *
    (sigmoid(logit / T) - sigmoid(target / T)) / n``.

    Args:
        logits: The current logits, floating, of any shape.
        target: The logits to stay close to, floating, of the same shape. No gradient flows into them.
        temperature: ``T`` > 0; both are divided by it.
        mask: Bool, of the logits' shape or of its first dimensions: what contributes. None: all. The mean is over all
            ``n`` in any case.

    Returns:
        A scalar, float64 if ``logits`` are float64 and float32 otherwise; 0 for an empty batch.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used.

    Example:
        >>> import torch
        >>> from flatmin.losses import binary_trajectory_loss
        >>> binary_trajectory_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]), temperature=1.0)
        tensor(0.2169)
    """
    check_tensor("target", target, like=check_tensor("logits", logits))
    _check_order("logits", logits, target)
    if mask is not None:
        check_mask("mask", mask, logits.shape, first=True)
    check_number("temperature", temperature, above=0)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    now = (logits.to(dtype) / temperature).clamp(-BOUND, BOUND)
    then = (target.detach().to(dtype) / temperature).clamp(-BOUND, BOUND)
    divergence = then.sigmoid() * (F.logsigmoid(then) - F.logsigmoid(now))
    divergence = divergence + (-then).sigmoid() * (F.logsigmoid(-then) - F.logsigmoid(-now))
    if mask is not None:
        divergence = divergence.where(_spread(mask, divergence), 0)
    return clipped(temperature**2 * divergence.sum() / max(divergence.numel(), 1), logits)


def feature_distance(
    features: Tensor, target: Tensor, *, class_dim: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """Squared error of normalised features, for networks without classes.

    ``1 / n * sum_i mask_i * mean_d (norm(features_i) - norm(target_i))_d**2``,  ``norm(f) = (f - mean(f)) / std(f)``

    over all ``n`` positions, normalised over the channels ``d``: layer norm without weights.

    Args:
        features: The current features, floating, shape (B, D), or with more dimensions and ``class_dim``.
        target: The features to stay close to, floating, of the same shape. No gradient flows into them.
        class_dim: Which dimension is the channels': 1 for maps (B, D, H, W), -1 for tokens (B, L, D).
        mask: Bool, the features' shape without their channels: what contributes. None: all. The mean is over all in any
            case.

    Returns:
        A scalar, float64 if ``features`` are float64 and float32 otherwise; 0 for an empty batch.

    Raises:
        InvalidArgumentError: (a ValueError) if an argument cannot be used, or features have another number of
            dimensions than two and no ``class_dim``.

    Example:
        >>> import torch
        >>> from flatmin.losses import feature_distance
        >>> feature_distance(torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, 0.0]]))
        tensor(4.0000)
    """
    dim = _check(features, target, mask, class_dim, name="features")
    dtype = torch.promote_types(features.dtype, torch.float32)
    now, then = (each.to(dtype).movedim(dim, -1) for each in (features, target.detach()))
    width = (now.shape[-1],)
    error = (F.layer_norm(now, width) - F.layer_norm(then, width)).square().mean(dim=-1)
    if mask is not None:
        error = error.where(mask, 0)
    return clipped(error.sum() / max(error.numel(), 1), features)


def resolve_class_dim(logits: Tensor, class_dim: int | None, *, name: str = "logits") -> int:
    """Which dimension of ``logits``, an argument called ``name``, is the classes'.

    Raises:
        InvalidArgumentError: If it is not said and there is a choice, or it is the first or none of them.
    """
    if class_dim is None and logits.ndim == 2:
        return 1
    if class_dim is None:
        raise InvalidArgumentError(
            f"{name} must be floating and of shape (batch, classes), got {logits.dtype} of shape "
            f"{tuple(logits.shape)}; with more dimensions say which is the classes': class_dim=1 for maps (B, C, H, "
            "W), class_dim=-1 for tokens (B, L, C)"
        )
    known = isinstance(class_dim, int) and not isinstance(class_dim, bool)
    dim = class_dim % logits.ndim if known and -logits.ndim <= class_dim < logits.ndim else 0
    if dim == 0:
        raise InvalidArgumentError(
            f"class_dim must be a dimension after the first, got {shown(class_dim)} for {name} of shape "
            f"{tuple(logits.shape)}"
        )
    return dim


def _check(logits: Tensor, target: Tensor, mask: Tensor | None, class_dim: int | None, name: str = "logits") -> int:
    """Checks the tensors of a loss over classes, and returns which dimension is theirs."""
    dim = resolve_class_dim(check_tensor(name, logits), class_dim, name=name)
    check_tensor("target", target, like=logits, owner=name)
    _check_order(name, logits, target)
    if mask is not None:
        check_mask("mask", mask, [*logits.shape[:dim], *logits.shape[dim + 1 :]])
    return dim


def _check_order(name: str, logits: Tensor, target: Tensor) -> None:
    """Refuses a target that comes first: no gradient would flow."""
    if torch.is_grad_enabled() and target.requires_grad and not logits.requires_grad:
        raise InvalidArgumentError(
            f"target needs a gradient and {name} do not, and no gradient flows into target: {name} come first, and "
            "target.detach() second if it is meant so"
        )


def _log_softmax(logits: Tensor, temperature: float, dim: int) -> Tensor:
    return (logits / temperature).clamp(-BOUND, BOUND).log_softmax(dim=dim)


def _spread(mask: Tensor, over: Tensor) -> Tensor:
    """A mask of the first dimensions, for all of them."""
    return mask.reshape(*mask.shape, *(1,) * (over.ndim - mask.ndim)).expand_as(over)
