"""Digits with Accelerate: SAM over accumulated micro-batches, beside MESA if asked for (``accelerate_digits.py mesa``).

``torchrun --nproc-per-node 2 accelerate_digits.py`` trains on two processes.
"""

import sys

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin.integrations.accelerate import sharpness_aware


def main(method: str = "sam", epochs: int = 10) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, test = TensorDataset(x[:1200], y[:1200]), TensorDataset(x[1200:], y[1200:])
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    mesa = flatmin.MESA(net, decay=0.99)
    model, optimizer, loader, test_loader = accelerator.prepare(
        net, flatmin.SAM(base, rho=0.05), DataLoader(train, 32, shuffle=True), DataLoader(test, 256)
    )
    steps = epochs * len(train) // 64  # 32 samples in each of two micro-batches
    schedule = accelerator.prepare(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps))
    mesa.attach(optimizer)  # which saves it in accelerator.save_state, too

    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = model(x)
        found = F.cross_entropy(logits, y)
        return found + mesa(logits, x) if method == "mesa" else found

    step = sharpness_aware(accelerator, model, optimizer, loss=loss)
    for epoch in range(epochs):
        mesa.set_epoch(epoch)
        model.train()
        for x_, y_ in loader:
            step(x_, y_)  # None, or the loss where a step was due
            schedule.step()
    model.eval()
    right = [accelerator.gather_for_metrics((model(x_).argmax(1) == y_).float()) for x_, y_ in test_loader]
    return float(torch.cat(right).mean())


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else "sam"
    print(f"test accuracy {100 * main(chosen):.2f} %")
