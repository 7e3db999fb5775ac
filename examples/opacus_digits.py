"""Digits with differential privacy: DP-SAT, or at the same epsilon DP-SGD (``opacus_digits.py 0``)."""

import sys
import warnings

import torch
from opacus import PrivacyEngine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from flatmin.integrations.opacus import DPSAT

DELTA = 1e-4


def main(rho: float = 0.01, epsilon: float = 4.0, epochs: int = 12) -> tuple[float, float]:
    """Returns test accuracy and the epsilon that was spent."""
    warnings.filterwarnings("ignore", ".*(Secure RNG|Full backward hook|Optimal order)")  # Opacus' own
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    net = nn.Sequential(nn.Linear(64, 64), nn.GroupNorm(8, 64), nn.Tanh(), nn.Linear(64, 10))
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9),
        data_loader=DataLoader(TensorDataset(x[:1200], y[:1200]), batch_size=200),
        target_epsilon=epsilon,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=0.5,
    )
    if rho > 0:
        DPSAT(module=model, optimizer=optimizer, rho=rho)
    for _ in range(epochs):
        model.train()
        for x_, y_ in loader:
            optimizer.zero_grad()
            loss: Tensor = F.cross_entropy(model(x_), y_)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = float((model(x[1200:]).argmax(1) == y[1200:]).float().mean())
    return accuracy, float(engine.get_epsilon(DELTA))


if __name__ == "__main__":
    accuracy, spent = main(float(sys.argv[1]) if len(sys.argv) > 1 else 0.01)
    print(f"test accuracy {100 * accuracy:.2f} %, epsilon {spent:.2f}")
