"""Landscapes: directions by filter, planes through checkpoints, and work that is never done twice."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatmin.errors import DataError, InvalidArgumentError, OutputError
from flatmin.sharpness import Objective, loss_landscape
from flatmin.sharpness._directions import random_axes


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=4), nn.Flatten(), nn.Linear(16, 3)
    ).double()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64), torch.arange(n) % 3) for n in (6, 3)]


def directions(model, images, **options):
    with Objective(model, F.cross_entropy, images)._snapshot() as loss:
        axes = random_axes(loss, **{"count": 2, "points": 3, "radius": 1.0, "seed": 0, **options})
        return axes, [loss.split(direction) for direction in axes.directions]


def test_each_filter_has_the_length_of_the_models_and_vectors_stand_still(model, images):
    axes, parts = directions(model, images)
    for name, weights in model.named_parameters():
        for number, part in enumerate(parts):
            if weights.ndim < 2 or (number == 1 and weights[0].numel() == 1):
                assert (part[name] == 0).all(), name
            else:
                assert torch.allclose(part[name].flatten(1).norm(dim=1), weights.flatten(1).norm(dim=1)), name
    one, other = axes.directions
    assert float(one @ other) == pytest.approx(0, abs=1e-12)
    assert float(one.norm()) > 1


def test_directions_follow_from_their_seed(model, images):
    one, again, other = (directions(model, images, seed=seed)[0].directions[0] for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    alone = directions(model, images, seed=3, count=1)[0].directions
    assert len(alone) == 1
    assert torch.equal(alone[0], one)


def loss_at(model, parts, coordinates, images):
    moved = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, p in moved.named_parameters():
            for part, coordinate in zip(parts, coordinates, strict=True):
                p += coordinate * part[name]
        x, y = (torch.cat(column) for column in zip(*images, strict=True))
        return float(F.cross_entropy(moved(x), y))


def test_every_point_is_the_loss_there(model, images):
    found = loss_landscape(Objective(model, F.cross_entropy, images), points=5, radius=0.7)
    _, parts = directions(model, images)
    assert found.x == found.y == pytest.approx((-0.7, -0.35, 0, 0.35, 0.7))
    for row, y in zip(found.loss, found.y, strict=True):
        assert row == pytest.approx([loss_at(model, parts, (x, y), images) for x in found.x], rel=1e-9)
    assert found.loss[2][2] == pytest.approx(found.origin_loss, rel=1e-12)


def test_one_direction_gives_one_row(model, images):
    found = loss_landscape(Objective(model, F.cross_entropy, images), points=4, directions=1)
    _, parts = directions(model, images, count=1)
    assert found.y is None
    assert found.loss == pytest.approx([loss_at(model, parts, (x,), images) for x in found.x], rel=1e-9)


def test_the_plane_goes_through_its_checkpoints(network, batches):
    torch.manual_seed(0)
    states = [copy.deepcopy(network.state_dict())]
    states += [{n: p + share + 0.3 * torch.randn_like(p) for n, p in states[0].items()} for share in (0.2, 0.1)]
    found = loss_landscape(Objective(network, F.cross_entropy, batches), points=3, plane=states, margin=0.0)
    flats = [torch.cat([tensor.flatten() for tensor in state.values()]) for state in states]
    for one in range(3):
        for other in range(one):
            distance = math.dist(found.places[one], found.places[other])
            assert distance == pytest.approx(float((flats[one] - flats[other]).norm()), rel=1e-9)
    assert found.places[0] == (0, 0)
    assert found.places[1][1] == 0
    # Without a margin the first two checkpoints are at the ends of the lowest row.
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    for place, state in ((0, states[0]), (-1, states[1])):
        network.load_state_dict(state)
        assert found.loss[0][place] == pytest.approx(F.cross_entropy(network(x), y).item(), rel=1e-9)


def test_a_plane_normalises_with_each_batchs_own_statistics(model, images):
    states = [copy.deepcopy(model.state_dict()) for _ in range(3)]
    for number, state in enumerate(states):
        state["0.weight"] += number
        state["5.weight"][number] += 1
    objective = Objective(model, F.cross_entropy, images)
    with pytest.raises(InvalidArgumentError, match=r"needs .* batch_statistics=True"):
        loss_landscape(objective, points=2, plane=states)
    seen = set()
    hook = model[1].register_forward_pre_hook(lambda module, args: seen.add(module.training))
    loss_landscape(objective.variant(batch_statistics=True), points=2, plane=states)
    hook.remove()
    assert seen == {True}


def test_a_plane_of_networks_without_averaged_statistics_needs_no_option(network, batches):
    network.append(nn.BatchNorm1d(3, track_running_stats=False)).double()
    states = [{name: tensor + shift for name, tensor in network.state_dict().items()} for shift in (0, 1)]
    states.append({**states[0], "4.bias": states[0]["4.bias"] + 1})
    objective = Objective(network, F.cross_entropy, batches[:2])
    found = loss_landscape(objective, points=2, plane=states)
    assert found.loss == loss_landscape(objective.variant(batch_statistics=True), points=2, plane=states).loss


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s[:2], "three checkpoints, got 2"),
        (lambda s: [s[0], s[0], s[1]], "on one line"),
        (lambda s: [s[0], s[1], s[1]], "on one line"),
        (lambda s: [s[0], s[1], {k: 2 * s[1][k] - s[0][k] for k in s[0]}], "on one line"),
        (lambda s: [s[0], s[1], {"0.weight": s[0]["0.weight"]}], "checkpoint 2 is of another network: 0.bias is miss"),
        (lambda s: [s[0], {**s[1], "0.weight": torch.zeros(2, 2)}, s[1]], r"checkpoint 1 .* 0.weight is \(2, 2\)"),
    ],
)
def test_what_is_no_plane_is_refused(network, batches, change, match):
    state = network.state_dict()
    states = [state, {name: tensor + 1 for name, tensor in state.items()}]
    with pytest.raises(InvalidArgumentError, match=match):
        loss_landscape(Objective(network, F.cross_entropy, batches), plane=change(states))


class Interrupt(KeyboardInterrupt):
    pass


def counting(calls, stop=None):
    def progress(done, total):
        calls.append((done, total))
        if done == stop:
            raise Interrupt

    return progress


def test_an_interrupted_landscape_goes_on_where_it_was(model, images, tmp_path):
    objective = Objective(model, F.cross_entropy, images)
    whole = loss_landscape(objective, points=4)
    partial, calls = tmp_path / "landscape.partial", []
    with pytest.raises(Interrupt):
        loss_landscape(objective, points=4, partial=partial, on_progress=counting(calls, stop=6))
    assert len(json.loads(partial.read_text())["losses"]) == 6
    again = loss_landscape(objective, points=4, partial=partial, on_progress=counting(calls))
    assert calls == [(n, 16) for n in range(1, 17)]
    assert again == whole
    assert loss_landscape(objective, points=4, partial=partial, on_progress=counting(calls)) == whole
    assert len(calls) == 16
    assert [path.name for path in tmp_path.iterdir()] == ["landscape.partial"]


def test_it_is_saved_as_it_goes(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr("flatmin.sharpness._landscape.SAVE_EVERY", 0.0)
    partial, sizes = tmp_path / "partial", []
    loss_landscape(
        Objective(model, F.cross_entropy, images),
        points=3,
        partial=partial,
        on_progress=lambda done, total: sizes.append(
            len(json.loads(partial.read_text())["losses"]) if partial.exists() else 0
        ),
    )
    assert sizes == list(range(9))


def test_the_beginning_of_another_landscape_is_kept_and_refused(model, images, tmp_path):
    partial = tmp_path / "partial"
    loss_landscape(Objective(model, F.cross_entropy, images), points=3, partial=partial)
    content = partial.read_text()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[5].bias += 1e-3
    objective = Objective(model, F.cross_entropy, images)
    calls = [
        (objective, {"points": 4}),
        (objective, {"points": 3, "direction_seed": 1}),
        (objective.variant(normalise_logits=True), {"points": 3}),
        (Objective(model, F.cross_entropy, images[:1]), {"points": 3}),
        (Objective(model, F.cross_entropy, [(x, (y + 1) % 3) for x, y in images]), {"points": 3}),
        (Objective(other, F.cross_entropy, images), {"points": 3}),
    ]
    for changed, options in calls:
        with pytest.raises(DataError, match="another landscape"):
            loss_landscape(changed, partial=partial, **options)
        assert partial.read_text() == content


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"key": 1, "origin": 1, "losses": ["a"]}'])
def test_a_file_that_is_none_is_kept_and_refused(model, images, tmp_path, content):
    partial = tmp_path / "partial"
    partial.write_text(content)
    with pytest.raises(DataError, match="not the beginning of a landscape"):
        loss_landscape(Objective(model, F.cross_entropy, images), points=3, partial=partial)
    assert partial.read_text() == content


def test_a_place_that_cannot_be_written_is_named(model, images, tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        loss_landscape(Objective(model, F.cross_entropy, images), points=2, partial=tmp_path / "none" / "partial")


def test_a_loss_may_be_infinite_far_from_the_minimum(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)

    def loss(z, y):
        return torch.where(z > 1.5, torch.inf, z).mean()

    batches = [(torch.ones(1, 1), torch.zeros(1))]
    objective = Objective(model, loss, batches)
    found = loss_landscape(objective, points=3, directions=1, partial=tmp_path / "partial")
    assert math.inf in found.loss
    assert loss_landscape(objective, points=3, directions=1, partial=tmp_path / "partial") == found
