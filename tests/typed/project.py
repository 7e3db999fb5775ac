"""A user's project, as strict type checkers see it and as it runs from the wheel with torch alone: see .ci/wheel."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin.errors import InvalidArgumentError
from flatmin.optim import schedules
from flatmin.sharpness import Objective, sam_sharpness

x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
data = TensorDataset(x, x.argmax(1))
loader = DataLoader(data, batch_size=16, shuffle=True)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))


def sam(model: nn.Module) -> float:
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = flatmin.SAM(base, rho=0.05, when=schedules.Every(2))
    losses: list[float] = []
    for images, labels in loader:

        def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            torch.autograd.backward(loss)
            return loss

        losses.append(optimizer.step(closure).item())
    return sum(losses) / len(losses)


def saf(model: nn.Module) -> None:
    penalty = flatmin.SAF(len(data), num_classes=8, lag=1, start_epoch=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(2):
        penalty.set_epoch(epoch)
        for index, (images, labels) in flatmin.with_indices(loader):
            logits = model(images)
            optimizer.zero_grad()
            (F.cross_entropy(logits, labels) + penalty(logits, index)).backward()
            optimizer.step()


def mesa(model: nn.Module) -> flatmin.MESA:
    penalty = flatmin.MESA(model, decay=flatmin.ema_decay(1, len(loader)), start_epoch=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for images, labels in loader:
        logits = model(images)
        optimizer.zero_grad()
        (F.cross_entropy(logits, labels) + penalty(logits, images)).backward()
        optimizer.step()
        penalty.update()
    return penalty


def averaged(model: nn.Module) -> nn.Module:
    average = flatmin.EMA(model, decay=0.9)
    average.update()
    average.refresh(images for images, _ in loader)
    return average.module


def main() -> None:
    loss = sam(network())
    saf(network())
    penalty = mesa(network())
    averaged(network())
    value = sam_sharpness(Objective(network(), F.cross_entropy, [(x, x.argmax(1))]), rho=0.05)
    try:
        penalty.set_epoch(-1)
    except InvalidArgumentError as error:
        print(f"loss {loss:.3f}, sharpness {value.value:.3f}; {error}")


if __name__ == "__main__":
    main()
