"""Folders as flatmin leaves them, made by hand: comparisons of any rows and seeds, with measures of sharpness."""

import functools
import json
import math

import pytest

PLACE = {"versions": {"flatmin": "0.1.0"}, "hardware": {"system": "Linux", "accelerator": None}}
RECIPE = {"experiment": None, "data": "digits", "model": "cnn", "epochs": 4, "optimizer": "sgd"}
METHODS = ("base", "sam", "saf")


def interval(values):
    mean = sum(values) / len(values)
    return {"mean": mean, "half": 0.3 if len(values) > 1 else None}


def after(values, place):
    """What was measured after training."""
    found = {}
    for name, lost in (("rounded_4", 1.0), ("rounded_2", 20.0), ("noise_0.2", 2.0), ("tuned_shifted", 30.0)):
        found[name] = {
            "values": [value - lost for value in values],
            "mean": interval([value - lost for value in values]),
            "difference": interval([0.2 * place] * len(values)),
            **({"p_value_holm": 0.01} if place else {}),
        }
    return found


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_run(folder, method, seed, place, *, sharp, epochs=4):
    write(folder / "config.json", {"method": method, "settings": {}, "seed": seed, "recipe": RECIPE, **PLACE})
    lines = [
        {
            "epoch": epoch,
            "train_loss_vanilla": 2.0 * math.exp(-epoch) + 0.01 * (place + seed),
            "test_accuracy": 0.9 + 0.01 * epoch,
            "test_loss": None if epoch == 1 else 0.5,
            **({"sharpness": 0.1 / (1 + epoch), "lr_times_top_eigenvalue": 2.5 - epoch} if sharp and epoch % 2 else {}),
        }
        for epoch in range(epochs)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not sharp:
        return
    measures = [
        {"name": name, "logits": logits, "rho": rho, "value": 0.125 + place, "standard_error": None}
        for name, rho in (("sam_sharpness", 0.05), ("hessian_trace", None))
        for logits in ("raw", "normalised")
    ]
    density = {"grid": [-1.0, 0.0, 1.0, 9.0], "density": [0.1, 5.0, 0.01, 0.001]}
    write(folder / "sharpness.json", {"measures": measures, "eigenvalues": [9.0, 3.0], "spectral_density": density})
    axis = [-1.0, -0.5, 0.0, 0.5, 1.0]
    loss = [[0.1 + (1 + place) * (x * x + y * y) for x in axis] for y in axis]
    loss[0][0] = None
    write(folder / "landscape.json", {"kind": "random", "x": axis, "y": axis, "loss": loss, "checkpoints": []})
    write(folder / "landscape-line.json", {"kind": "random", "x": axis, "y": None, "loss": loss[2]})
    points = [{"name": label, "x": x, "y": 0.0} for label, x in (("start", -0.5), ("end", 0.5))]
    write(folder / "landscape-plane.json", {"kind": "plane", "x": axis, "y": axis, "loss": loss, "checkpoints": points})


def write_comparison(parent, labels=METHODS, seeds=5, *, sharp=True, name="comparison", **changed):
    """Writes a comparison and returns its folder; keywords replace what its results hold."""
    folder = parent / name
    base = [97.0 + 0.1 * seed for seed in range(seeds)]
    rows = []
    for place, label in enumerate(labels):
        values = [value + 0.2 * place for value in base]
        rows.append(
            {
                "label": label,
                "method": label.split()[0],
                "settings": {"rho": 0.05},
                "test_accuracy": values,
                "accuracy": interval(values),
                "difference": interval([0.2 * place] * seeds),
                "p_value_holm": 0.01 if place == 1 else 0.5,
                "step_ratio": 1.0 + 0.5 * place,
                "extra_bytes": 1000 * place,
                **({"epsilon": 2.0, "after": after(values, place)} if sharp else {}),
            }
        )
        for seed in range(seeds):
            run = folder / "runs" / f"{label.replace(' ', '-').replace('/', '_')}-seed{seed}"
            write_run(run, label.split()[0], seed, place, sharp=sharp)
    config = {"rows": [{"label": label, "method": label, "settings": {}} for label in labels], "recipe": RECIPE}
    write(folder / "config.json", config)
    results = {
        "command": "flatmin compare --seeds 5",
        **PLACE,
        "recipe": RECIPE,
        "seeds": list(range(seeds)),
        "rows": rows,
        "verdict": "Better than base beyond noise here: sam (+0.20 points). Not told apart from it: saf. (Paired.)",
    }
    write(folder / "results.json", {**results, **changed})
    return folder


@pytest.fixture
def comparison(tmp_path):
    """Writes a comparison into the test's folder, see `write_comparison`."""
    return functools.partial(write_comparison, tmp_path)


@pytest.fixture(scope="module")
def make_comparison():
    """Writes a comparison into a given folder."""
    return write_comparison


@pytest.fixture
def single(tmp_path):
    """Writes a run of ``flatmin train`` and returns its folder."""

    def make(method="mesa", seed=0, **options):
        folder = tmp_path / f"{method}-seed{seed}"
        write_run(folder, method, seed, 0, sharp=False, **options)
        return folder

    return make
