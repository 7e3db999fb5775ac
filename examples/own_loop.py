"""flatmin in a loop of your own: ``python examples/own_loop.py --method saf``."""

import argparse

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import flatmin
from flatmin.lab.problems import data, models


def main(method: str = "saf", epochs: int = 60, seed: int = 0) -> float:
    """Trains on scikit-learn's digits and returns the test accuracy after the last epoch."""
    torch.manual_seed(seed)
    digits = data.load_digits(seed)
    loader = DataLoader(digits.train, batch_size=128, shuffle=True)
    model = models.SmallCNN(1, digits.num_classes)
    criterion = nn.CrossEntropyLoss()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    # A loss added to the criterion (SAF, MESA) or a wrapper around the optimizer (SAM).
    trajectory: flatmin.SAF | flatmin.MESA | None = None
    if method == "saf":
        trajectory = flatmin.SAF(len(digits.train), digits.num_classes)  # type: ignore[arg-type]
    elif method == "mesa":
        trajectory = flatmin.MESA(model, decay=flatmin.ema_decay(12, len(loader)))
        trajectory.attach(optimizer)
    elif method == "sam":
        optimizer = flatmin.SAM(optimizer, rho=0.05)

    for epoch in range(epochs):
        model.train()
        if trajectory is not None:
            trajectory.set_epoch(epoch)
        for index, (x, y) in flatmin.with_indices(loader):

            def closure(index: Tensor = index, x: Tensor = x, y: Tensor = y) -> float:
                optimizer.zero_grad()
                logits = model(x)
                loss = criterion(logits, y)
                if trajectory is not None:
                    loss = loss + trajectory(logits, index if method == "saf" else x)
                loss.backward()
                return float(loss.detach())

            optimizer.step(closure)
        scheduler.step()
        if epoch % 10 == 9 or epoch + 1 == epochs:
            model.eval()
            x, y = digits.test[:]
            accuracy = float((model(x).argmax(dim=1) == y).float().mean())
            print(f"epoch {epoch + 1}: test accuracy {100 * accuracy:.2f} %")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=["saf", "mesa", "sam"], default="saf")
    main(parser.parse_args().method)
