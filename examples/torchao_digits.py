"""Digits in 2 bits: a float network, then SQuAT on torchao's fake quantisers, then converted to integers."""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig, initialize_fake_quantizers

import flatmin
from flatmin.integrations.torchao import convert, step_sizes, weights

INT2: Any = getattr(torch, "int2")  # noqa: B009 has no type


def main(epochs: int = 10) -> dict[str, float]:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def train(optimizer: torch.optim.Optimizer) -> None:
        for _ in range(epochs):
            for batch in torch.randperm(1200).view(-1, 30):

                def closure() -> float:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(x[batch]), y[batch])  # noqa: B023 is called at once
                    loss.backward()  # type: ignore[no-untyped-call]
                    return float(loss.detach())

                optimizer.step(closure)

    def accuracy() -> float:
        with torch.no_grad():
            return float((model(x[1200:]).argmax(1) == y[1200:]).float().mean())

    train(torch.optim.AdamW(model.parameters(), lr=1e-3))
    found = {"float": accuracy()}

    # The order matters: the step sizes are parameters only after initialize_fake_quantizers.
    learned = IntxFakeQuantizeConfig(INT2, "per_channel", is_dynamic=False, range_learning=True)
    quantize_(model, QATConfig(weight_config=learned, step="prepare"))
    initialize_fake_quantizers(model, (x[:2],))
    found["rounded"] = accuracy()
    sizes = {"params": step_sizes(model), "lr": 1e-4, "weight_decay": 0.0}  # about a hundredth of their size
    base = torch.optim.AdamW([{"params": weights(model), "lr": 1e-3}, sizes])
    train(flatmin.SQuAT(base, step_sizes=step_sizes(model), rho=0.05))
    found["squat"] = accuracy()
    convert(model, IntxWeightOnlyConfig(weight_dtype=INT2, granularity=PerAxis(0)))
    found["converted"] = accuracy()
    return found


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name}: {100 * accuracy:.1f} % right")
