"""Accelerate's accelerator, a network and a run for the tests, and SAM written out by hand, without flatmin."""

import contextlib
import functools

import accelerate
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin.integrations.accelerate import sharpness_aware

N, B, EPOCHS = 76, 16, 2  # five batches an epoch, the last one smaller; an uneven end for windows of 2 and of 3


@functools.cache
def data():
    digits = load_digits()
    return torch.tensor(digits.data[:N], dtype=torch.float32) / 16, torch.tensor(digits.target[:N])


def network(norm=False, dropout=0.0):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(16)] if norm else []
    return nn.Sequential(nn.Linear(64, 16), *middle, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 10))


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def reset():
    """Has Accelerate as in a new process."""
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def accelerator(accumulate=1, precision="no"):
    """An accelerator, as in a new process; float16, which Accelerate has on no CPU, with torch's scaler."""
    reset()
    half = precision == "fp16"
    made = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, mixed_precision="no" if half else precision
    )
    if half:
        made.scaler, made.native_amp = torch.amp.GradScaler("cpu", init_scale=256.0), True
        made.state._mixed_precision = "fp16"
    return made


def order(epoch):
    return torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).tolist()


def loader(epoch):
    x, y = data()
    return DataLoader(TensorDataset(x[order(epoch)], y[order(epoch)]), B)


class Run:
    """A network, prepared, that is trained as the documentation has it.

    Args:
        make: Makes flatmin's optimizer of the plain one.
        accumulate: Micro-batches of a step.
        precision: Accelerate's ``mixed_precision``.
        penalty: A function of the logits and the inputs, that is added.
        clip: Given the accelerator and the model.
        **architecture: Of the network.
    """

    def __init__(self, make=flatmin.SAM, accumulate=1, precision="no", penalty=None, clip=None, **architecture):
        self.net = network(**architecture)
        self.accelerator = accelerator(accumulate, precision)
        self.model, self.optimizer = self.accelerator.prepare(self.net, make(sgd(self.net)))
        self.penalty, self.losses = penalty, []
        clip = None if clip is None else functools.partial(clip, self.accelerator, self.model)
        self.step = sharpness_aware(self.accelerator, self.model, self.optimizer, loss=self.loss, clip=clip)

    def loss(self, x, y):
        logits = self.model(x)
        found = F.cross_entropy(logits, y)
        return found if self.penalty is None else found + self.penalty(logits, x)

    def fit(self, *epochs):
        torch.manual_seed(7)
        for epoch in epochs or range(EPOCHS):
            for x, y in self.accelerator.prepare_data_loader(loader(epoch)):
                self.losses.append(self.step(x, y))
        return self


def windows(accumulate):
    for epoch in range(EPOCHS):
        batches = list(loader(epoch))
        for start in range(0, len(batches), accumulate):
            yield batches[start : start + accumulate]


def sam_by_hand(net, *, accumulate=1, clip=None, clip_value=None, dtype=None, scale=1.0, rho=0.05):
    """Trains ``net`` with SAM, without flatmin; returns the losses of the first passes, one for each step."""
    torch.manual_seed(7)
    weights, base, losses = list(net.parameters()), sgd(net), []
    for window in windows(accumulate):

        def gradient(window=window):
            total = 0.0
            for weight in weights:
                weight.grad = None
            for x, y in window:
                with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
                    logits = net(x)
                loss = F.cross_entropy(logits.float(), y)
                (loss / accumulate * scale).backward()
                total += float(loss.detach())
            for weight in weights:
                weight.grad /= scale
            return total / len(window)

        random = torch.get_rng_state()
        losses.append(gradient())
        after = torch.get_rng_state()
        first = [weight.grad.clone() for weight in weights]
        norm = torch.sqrt(sum((g**2).sum() for g in first))
        kept = [weight.detach().clone() for weight in weights]
        buffers = [buffer.clone() for buffer in net.buffers()]
        with torch.no_grad():
            for weight, g in zip(weights, first, strict=True):
                weight += rho * g / (norm + 1e-12)
        torch.set_rng_state(random)
        gradient()
        torch.set_rng_state(after)
        with torch.no_grad():
            for tensor, value in zip([*weights, *net.buffers()], [*kept, *buffers], strict=True):
                tensor.copy_(value)
        if clip is not None:
            nn.utils.clip_grad_norm_(weights, clip)
        if clip_value is not None:
            nn.utils.clip_grad_value_(weights, clip_value)
        base.step()
    return losses


def difference(a, b):
    """The largest difference between parameters and buffers of two networks."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)
