"""flatmin in a training loop of your own: ``python examples/own_loop.py --method logit_squeezing``."""

import argparse

import torch
from torch.utils.data import DataLoader

import flatmin
from flatmin.lab.problems import data, models


def main(method: str = "logit_squeezing", epochs: int = 60, seed: int = 0) -> float:
    """Trains on scikit-learn's digits and returns the test accuracy after the last epoch."""
    torch.manual_seed(seed)
    digits = data.load_digits(seed)
    loader = DataLoader(digits.train, batch_size=128, shuffle=True)
    model = models.SmallCNN(1, digits.num_classes)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    # A method is a loss beside the criterion (logit squeezing, SAF, MESA) or a wrapper of the optimizer (SAM).
    trajectory: flatmin.SAF | flatmin.MESA | None = None
    if method == "saf":
        trajectory = flatmin.SAF(len(digits.train), digits.num_classes)  # type: ignore[arg-type]
    elif method == "mesa":
        trajectory = flatmin.MESA(model, decay=flatmin.ema_decay(12, len(loader)))
        trajectory.attach(optimizer)  # updates the average after each step
    elif method == "sam":
        optimizer = flatmin.SAM(optimizer, rho=0.05)

    for epoch in range(epochs):
        model.train()
        if trajectory is not None:
            trajectory.set_epoch(epoch)
        for index, (x, y) in flatmin.with_indices(loader):

            def closure(index: torch.Tensor = index, x: torch.Tensor = x, y: torch.Tensor = y) -> float:
                optimizer.zero_grad()
                logits = model(x)
                loss = torch.nn.CrossEntropyLoss()(logits, y)
                if trajectory is not None:
                    loss = loss + trajectory(logits, index if method == "saf" else x)
                elif method == "logit_squeezing":
                    loss = loss + flatmin.logit_squeezing(logits)
                loss.backward()
                return float(loss.detach())

            optimizer.step(closure)
        scheduler.step()
        if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
            x, y = digits.test[:]
            accuracy = float((model.eval()(x).argmax(dim=1) == y).float().mean())
            print(f"epoch {epoch + 1}: test accuracy {100 * accuracy:.2f} %")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=["logit_squeezing", "saf", "mesa", "sam"], default="logit_squeezing")
    main(**vars(parser.parse_args()))
