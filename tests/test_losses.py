"""Tests of losses that add something in training."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_lightning.losses import VirtualAdversarial
from mnist_lightning.network import FeedForward


def make_net(**settings: Any) -> FeedForward:
    torch.manual_seed(1)
    return FeedForward(64, **settings)


def measure_move(net: nn.Module, images: Tensor, changes: Tensor) -> float:
    """Mean Kullback-Leibler divergence between the answers without and with a change of the images."""
    before, after = net(images).log_softmax(1), net(images + changes).log_softmax(1)
    return (before.exp() * (before - after)).sum(1).mean().item()


def test_virtual_adversarial_change_moves_the_answers_more_than_random_ones() -> None:
    net, images = make_net(), torch.randn(20, 1, 28, 28)
    found = VirtualAdversarial(epsilon=0.5).penalize_net(net, images, net(images)).item()
    for _ in range(20):
        noise = torch.randn_like(images)
        noise *= 0.5 / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert found > 10 * measure_move(net, images, noise) > 0


def test_virtual_adversarial_change_is_the_worst_where_that_is_known() -> None:
    """With two classes and a linear net, the worst direction is the difference of the classes' weights."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 2))
    images, weight = torch.randn(5, 1, 28, 28), net[1].weight.detach()
    worst = (weight[0] - weight[1]) / (weight[0] - weight[1]).norm()
    worst = 0.3 * worst.view(1, 1, 28, 28)
    for image in images.split(1):
        found = VirtualAdversarial(epsilon=0.3).penalize_net(net, image, net(image)).item()
        either = [measure_move(net, image, change) for change in (worst, -worst)]
        assert min(abs(found - value) for value in either) < 1e-3 * found


def test_virtual_adversarial_weight_and_gradient() -> None:
    net, images = make_net(), torch.randn(8, 1, 28, 28)
    values = []
    for weight in (1.0, 2.5):
        torch.manual_seed(2)
        values.append(VirtualAdversarial(weight=weight).penalize_net(net, images, net(images)))
    assert values[1].item() == pytest.approx(2.5 * values[0].item())
    values[0].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


def test_virtual_adversarial_leaves_the_running_statistics_alone() -> None:
    net, images = make_net(norm="batch"), torch.randn(8, 1, 28, 28)
    logits = net(images)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    VirtualAdversarial().penalize_net(net, images, logits).backward()
    assert all(buffer.equal(before[name]) for name, buffer in net.named_buffers())
    net(images)  # the next step counts again
    assert not all(buffer.equal(before[name]) for name, buffer in net.named_buffers())


def test_virtual_adversarial_lets_noise_and_dropout_rest() -> None:
    """The noise would be taken for the worst change: the same net without it must give the same penalty."""
    images, values = torch.randn(8, 1, 28, 28), []
    for settings in ({}, {"noise": 0.5, "input_noise": 1.0, "dropout": 0.5}):
        net = make_net(norm="batch", **settings)
        logits = net(images)
        torch.manual_seed(3)  # the direction begins at random
        values.append(VirtualAdversarial(epsilon=0.1).penalize_net(net, images, logits).item())
        assert all(part.training for part in net.modules())
    assert values[0] == pytest.approx(values[1])


def test_virtual_adversarial_is_cross_entropy_itself() -> None:
    logits, labels = torch.randn(6, 10), torch.arange(6)
    assert VirtualAdversarial().eval()(logits, labels).equal(F.cross_entropy(logits, labels))
