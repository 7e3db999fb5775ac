"""Digits with timm: its network, optimizer factory and task, with MSAM, MESA or both (``timm_digits.py msam mesa``)."""

import sys
from collections.abc import Collection
from typing import Any

import timm
import timm.optim
import torch
from sklearn.datasets import load_digits
from timm.task import ClassificationTask
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from flatmin.integrations.timm import MESATask, register


def main(methods: Collection[str], epochs: int = 12) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    x = F.interpolate(x, size=32)
    loader = DataLoader(TensorDataset(x[:1200], y[:1200]), 64, shuffle=True)
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)

    register()
    opt = {"opt": "flatmin_msam", "base": "sgd", "rho": 0.3} if "msam" in methods else {"opt": "sgd"}
    optimizer = timm.optim.create_optimizer_v2(model, lr=0.05, weight_decay=1e-4, **opt)
    criterion = nn.CrossEntropyLoss()
    task: Any = ClassificationTask(model, criterion)
    if "mesa" in methods:
        task = MESATask(model, criterion, start_update=2 * len(loader), coefficient=0.8)
    task.setup_ema(decay=0.98)

    updates = 0
    for _ in range(epochs):
        task.train()
        for inputs, target in loader:
            optimizer.zero_grad()
            task(inputs, target)["loss"].backward()
            optimizer.step()
            updates += 1
            task.update_ema(step=updates)

    if "msam" in methods:  # its passes were at moved weights, and so are batch norm's running statistics
        torch.optim.swa_utils.update_bn(loader, model)
    model.eval()
    with torch.no_grad():
        return float((model(x[1200:]).argmax(dim=1) == y[1200:]).float().mean())


if __name__ == "__main__":
    print(f"test accuracy {100 * main(sys.argv[1:]):.2f} %")
