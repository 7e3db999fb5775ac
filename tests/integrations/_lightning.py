"""A module, loaders and trainers of Lightning's for the tests, and SAM written out by hand, without flatmin."""

import contextlib
import functools
import logging
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from flatmin.errors import FlatminWarning

N, B, EPOCHS = 76, 16, 2  # five batches an epoch, the last one smaller; an uneven end for windows of 2 and of 3
for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)


@functools.cache
def data():
    digits = load_digits()
    return TensorDataset(torch.tensor(digits.data[:N], dtype=torch.float32) / 16, torch.tensor(digits.target[:N]))


def network(norm=False, dropout=0.0):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(16)] if norm else []
    return nn.Sequential(nn.Linear(64, 16), *middle, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 10))


class Net(L.LightningModule):
    """An ordinary module, which knows nothing of flatmin.

    Args:
        net: Its network.
        scheduler: Makes a scheduler of the optimizer, for each step.
        wrap: Wraps the optimizer before it is returned.
        lr: Learning rate.
    """

    def __init__(self, net=None, scheduler=None, wrap=None, lr=0.1):
        super().__init__()
        self.net = network() if net is None else net
        self.scheduler, self.wrap, self.lr = scheduler, wrap, lr

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.net.parameters(), lr=self.lr, momentum=0.9)
        optimizer = optimizer if self.wrap is None else self.wrap(optimizer)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}


class Order(Sampler):
    """Another order in each epoch, the same in each run."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return N

    def __iter__(self):
        return iter(torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def loader(dataset=None, kind=DataLoader, **options):
    return kind(data() if dataset is None else dataset, B, sampler=Order(), **options)


def trainer(*callbacks, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": 1,
        **quiet,
        "enable_model_summary": False,
        **options,
    }
    return L.Trainer(callbacks=list(callbacks), **options)


@contextlib.contextmanager
def without_lightnings_warnings():
    """Inside, those of others are left out, and flatmin's are as they were."""
    expected = bool(warnings.filters) and warnings.filters[0][0] == "always"  # within pytest.warns
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|torch|pydantic|contextlib")
        warnings.filterwarnings("always" if expected else "error", category=FlatminWarning)
        yield


def fit(module, *callbacks, batches=None, validation=None, ckpt_path=None, **options):
    """Trains the module; returns the trainer."""
    torch.manual_seed(7)
    with without_lightnings_warnings():
        made = trainer(*callbacks, **options)
        made.fit(module, loader() if batches is None else batches, validation, ckpt_path=ckpt_path)
    return made


def half(init_scale=256.0):
    """Lightning's float16 with its scaler, on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


def windows(accumulate=1, batches=None):
    """The micro-batches of each step, as Lightning forms them; ``accumulate`` may depend on the epoch."""
    for epoch in range(EPOCHS):
        count = accumulate(epoch) if callable(accumulate) else accumulate
        order = batches or loader()
        order.sampler.set_epoch(epoch)
        window = []
        for batch in order:
            window.append(batch)
            if len(window) == count:
                yield window, count
                window = []
        if window:
            yield window, count


def sam_by_hand(net, *, rho=0.05, accumulate=1, clip=None, clip_value=None, dtype=None, scale=1.0, scheduler=None):
    """Trains ``net`` with SAM; returns the losses of the first passes, one for each step."""
    torch.manual_seed(7)
    weights = list(net.parameters())
    base = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    schedule = None if scheduler is None else scheduler(base)
    losses = []
    for window, count in windows(accumulate):

        def gradient(window=window, count=count):
            for weight in weights:
                weight.grad = None
            total = 0.0
            for x, y in window:
                autocast = torch.autocast("cpu", dtype, cache_enabled=False) if dtype else contextlib.nullcontext()
                with autocast:
                    loss = F.cross_entropy(net(x), y)
                (loss / count * scale).backward()
                total += float(loss.detach())
            for weight in weights:
                weight.grad /= scale
            return total / len(window)

        random = torch.get_rng_state()
        losses.append(gradient())
        first = [weight.grad.clone() for weight in weights]
        norm = torch.sqrt(sum((g**2).sum() for g in first))
        kept = [weight.detach().clone() for weight in weights]
        buffers = [buffer.clone() for buffer in net.buffers()]
        after = torch.get_rng_state()
        with torch.no_grad():
            for weight, g in zip(weights, first, strict=True):
                weight += rho * g / (norm + 1e-12)
        torch.set_rng_state(random)
        gradient()
        torch.set_rng_state(after)
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
            for buffer, value in zip(net.buffers(), buffers, strict=True):
                buffer.copy_(value)
        if clip is not None:
            nn.utils.clip_grad_norm_(weights, clip)
        if clip_value is not None:
            nn.utils.clip_grad_value_(weights, clip_value)
        base.step()
        if schedule is not None:
            schedule.step()
    return losses


def difference(a, b):
    """The largest difference between parameters and buffers of two networks."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)
