"""A small private problem, and DP-SAT written out: sample by sample without Opacus, and by hand in Opacus' own loop."""

import warnings

import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

N, B, CLASSES = 64, 16, 3
MODES = [("hooks", True), ("hooks", False), ("functorch", True), ("functorch", False), ("ew", True)]
MODES += [("ghost", True), ("ghost", False)]  # how gradients of samples are taken, and whether the network is wrapped


def quiet():
    """Leaves out what Opacus, and torch of Opacus' hooks, warn of in every run."""
    for message in ("Secure RNG", "Full backward hook", "Expected epsilon", "Optimal order"):
        warnings.filterwarnings("ignore", f".*{message}")


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 1, 8, 8, generator=generator), torch.randint(CLASSES, (N,), generator=generator)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(144, CLASSES))


def sgd(net, lr=0.5):
    momentum = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3} if lr else {}
    return torch.optim.SGD(net.parameters(), lr=lr, **momentum)


def flat(net):
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


class Private:
    """A network that Opacus has prepared, with its optimizer and loader.

    Args:
        mode: Opacus' ``grad_sample_mode``.
        wrap: Opacus' ``wrap_model``.
        lr: Learning rate.
        batch: Expected batch size.
        clipping: Opacus'.
        accountant: Opacus'.
        dataset: Samples; by default of `data`.
        base: Makes the plain optimizer.
        **options: For ``make_private``.
    """

    def __init__(
        self,
        mode="hooks",
        wrap=True,
        *,
        lr=0.5,
        batch=B,
        clipping="flat",
        accountant="rdp",
        dataset=None,
        base=sgd,
        **options,
    ):
        quiet()
        self.net = network()
        self.engine = PrivacyEngine(accountant=accountant)
        self.noise = torch.Generator().manual_seed(3)
        bound = [0.5, 0.4, 0.3, 0.2, 0.1, 0.6] if clipping == "per_layer" else 1.0
        made = self.engine.make_private(
            module=self.net,
            optimizer=base(self.net, lr),
            data_loader=DataLoader(TensorDataset(*data()) if dataset is None else dataset, batch),
            **{"noise_multiplier": 1.0, "max_grad_norm": bound, "noise_generator": self.noise, **options},
            grad_sample_mode=mode,
            wrap_model=wrap,
            clipping=clipping,
        )
        self.module, self.optimizer, self.loader = made[0], made[1], made[-1]
        self.criterion = made[2] if len(made) == 4 else nn.CrossEntropyLoss()
        self.call = self.module if wrap else self.net
        self.sizes = []  # of the batches, physical ones

    def batches(self, count, physical=None):
        """Physical batches until there were ``count`` logical steps."""
        loader = self.loader
        if physical is not None:
            manager = BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=self.optimizer)
            loader = manager.__enter__()
        made = 0
        while made < count:
            for x, y in loader:
                self.sizes.append(len(x))
                yield x, y
                made += not self.optimizer._is_last_step_skipped
                if made == count:
                    return

    def backward(self, x, y):
        loss = self.criterion(self.call(x), y)
        loss.backward()
        return loss

    def fit(self, steps=5, physical=None, seed=3, between=lambda: None):
        """Trains as Opacus' documentation has it."""
        if seed is not None:
            torch.manual_seed(seed)
        for x, y in self.batches(steps, physical):
            self.optimizer.zero_grad()
            self.backward(x, y)
            self.optimizer.step()
            between()
        return self

    def epsilon(self):
        few = {"alphas": [2, 3, 4, 6, 8]} if self.engine.accountant.mechanism() == "rdp" else {}  # quicker
        return self.engine.accountant.get_epsilon(1e-5, **few)


def by_hand(private, rho, direction="gradient", steps=5, physical=None, perturbed=lambda parameter: True):
    """DP-SAT in Opacus' own loop, without flatmin: moved before each forward, put back after each backward pass."""
    torch.manual_seed(3)
    weights, last = [parameter for parameter in private.net.parameters() if perturbed(parameter)], None
    every = list(private.net.parameters())
    for x, y in private.batches(steps, physical):
        private.optimizer.zero_grad()
        kept = [weight.detach().clone() for weight in every]
        if last is not None:
            norm = float(torch.cat([tensor.flatten() for tensor in last]).double().norm())
            with torch.no_grad():
                for weight, tensor in zip(weights, last, strict=True):
                    weight.add_(tensor, alpha=rho / norm)
        private.backward(x, y)
        with torch.no_grad():
            for weight, value in zip(every, kept, strict=True):
                weight.copy_(value)
        if not private.optimizer.pre_step():
            continue
        before = [weight.detach().clone() for weight in weights]
        last = [weight.grad.clone() for weight in weights]
        private.optimizer.original_optimizer.step()
        if direction == "step":
            last = [old - new.detach() for old, new in zip(before, weights, strict=True)]
    return flat(private.net)


def brute_force(rho, direction="gradient", steps=5, per_layer=None):
    """DP-SAT from the paper: a loop over samples, clipped, summed and noised here; of Opacus only the batches."""
    quiet()
    net = network()
    weights, base = list(net.parameters()), sgd(net)
    noise, last, made = torch.Generator().manual_seed(3), None, 0
    bounds = per_layer or [1.0]
    sigma = torch.tensor(bounds).norm().item()
    loader = Private().loader
    torch.manual_seed(3)
    while made < steps:
        for x, y in loader:
            kept = [weight.detach().clone() for weight in weights]
            if last is not None:
                norm = torch.cat([tensor.flatten() for tensor in last]).norm()
                with torch.no_grad():
                    for weight, tensor in zip(weights, last, strict=True):
                        weight += rho * tensor / norm
            total = [torch.zeros_like(weight) for weight in weights]
            for i in range(len(x)):
                gradient = torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), weights)
                parts = [[part] for part in gradient] if per_layer else [list(gradient)]
                factors = [
                    min(1.0, bound / (float(torch.cat([part.flatten() for part in each]).norm()) + 1e-6))
                    for each, bound in zip(parts, bounds, strict=True)
                ]
                for index, (tensor, part) in enumerate(zip(total, gradient, strict=True)):
                    tensor += factors[index if per_layer else 0] * part
            with torch.no_grad():
                for weight, tensor, value in zip(weights, total, kept, strict=True):
                    weight.copy_(value)
                    weight.grad = (tensor + torch.normal(0, sigma, weight.shape, generator=noise)) / B
            last = [weight.grad.clone() for weight in weights]
            base.step()
            if direction == "step":
                last = [old - new.detach() for old, new in zip(kept, weights, strict=True)]
            made += 1
            if made == steps:
                break
    return flat(net)


def difference(a, b):
    return float((a - b).abs().max())
