"""Digits with Lightning: one module, and SAM, SAF or MESA by a callback (``lightning_digits.py saf``)."""

import sys

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin.integrations.lightning import SharpnessAware, TrajectoryLoss


class Digits(L.LightningModule):
    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method
        self.net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits: Tensor = self.net(x)
        loss = F.cross_entropy(logits, y)
        if self.method == "saf":
            loss = loss + self.saf(logits)  # type: ignore[operator]  # which the callback gives the module
        if self.method == "mesa":
            loss = loss + self.mesa(logits, x)  # type: ignore[operator]
        self.log("loss", loss)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(method: str, epochs: int = 10) -> float:
    L.seed_everything(0, verbose=False)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, test = TensorDataset(x[:1200], y[:1200]), TensorDataset(x[1200:], y[1200:])
    callback: L.Callback = SharpnessAware(flatmin.SAM, rho=0.05)
    if method == "saf":
        callback = TrajectoryLoss(flatmin.SAF(len(train), 10))
    if method == "mesa":
        callback = TrajectoryLoss(flatmin.MESA, network="net", decay=0.99)
    trainer = L.Trainer(max_epochs=epochs, callbacks=[callback], accelerator="cpu", devices=1, logger=False)
    module = Digits(method)
    trainer.fit(module, DataLoader(flatmin.indexed(train) if method == "saf" else train, 64, shuffle=True))
    return float(trainer.test(module, DataLoader(test, 256), verbose=False)[0]["accuracy"])


if __name__ == "__main__":
    print(f"test accuracy {100 * main(sys.argv[1]):.2f} %")
