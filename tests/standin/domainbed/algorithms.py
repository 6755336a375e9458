"""Five algorithms of domain generalization."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from domainbed import networks
from torch import Tensor, nn
from torch.nn import functional

ALGORITHMS = ["ERM", "IRM", "GroupDRO", "Mixup", "CORAL"]

Batches = list[tuple[Tensor, Tensor]]


def get_algorithm_class(algorithm_name: str) -> type:
    """Return the class of that name."""
    try:
        return globals()[algorithm_name]
    except KeyError:
        raise NotImplementedError(f"Algorithm not found: {algorithm_name}") from None


class Algorithm(nn.Module):
    """What learns from minibatches, one an environment, and predicts class scores."""

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: dict[str, Any]
    ) -> None:
        super().__init__()
        self.hparams = hparams

    def update(self, minibatches: Batches, unlabeled: list[Tensor] | None = None) -> dict[str, float]:
        """Take one step and return the numbers to report."""
        raise NotImplementedError

    def predict(self, x: Tensor) -> Tensor:
        """Return class scores (batch, classes)."""
        raise NotImplementedError


class ERM(Algorithm):
    """Empirical risk minimisation: cross-entropy over all environments at once."""

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: dict[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.featurizer = networks.Featurizer(input_shape, hparams)
        nonlinear = hparams["nonlinear_classifier"]
        self.classifier = networks.Classifier(self.featurizer.n_outputs, num_classes, nonlinear)
        self.network = nn.Sequential(self.featurizer, self.classifier)
        self._new_optimizer()

    def _new_optimizer(self) -> None:
        rates = {"lr": self.hparams["lr"], "weight_decay": self.hparams["weight_decay"]}
        self.optimizer = torch.optim.Adam(self.network.parameters(), **rates)

    def _minimise(self, loss: Tensor, **also: Tensor) -> dict[str, float]:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()} | {name: value.item() for name, value in also.items()}

    def _risks(self, minibatches: Batches) -> list[Tensor]:
        return [functional.cross_entropy(self.predict(x), y) for x, y in minibatches]

    def update(self, minibatches: Batches, unlabeled: list[Tensor] | None = None) -> dict[str, float]:
        """Minimise the mean cross-entropy of all samples."""
        images, labels = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
        return self._minimise(functional.cross_entropy(self.predict(images), labels))

    def predict(self, x: Tensor) -> Tensor:
        """Return class scores."""
        return self.network(x)


class IRM(ERM):
    """Invariant risk minimisation: the gradient at a fixed classifier scale should vanish in every environment."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("update_count", torch.tensor([0]))

    @staticmethod
    def _penalty(scores: Tensor, labels: Tensor) -> Tensor:
        scale = torch.ones((), device=scores.device, requires_grad=True)
        grads = [
            torch.autograd.grad(
                functional.cross_entropy(scale * scores[half::2], labels[half::2]), scale, create_graph=True
            )
            for half in (0, 1)
        ]
        return grads[0][0] * grads[1][0]

    def update(self, minibatches: Batches, unlabeled: list[Tensor] | None = None) -> dict[str, float]:
        """Minimise risk plus penalty; the penalty's weight jumps once, and Adam starts anew there."""
        count = int(self.update_count)
        annealed = count >= self.hparams["irm_penalty_anneal_iters"]
        pairs = [(self.predict(x), y) for x, y in minibatches]
        nll = torch.stack([functional.cross_entropy(scores, y) for scores, y in pairs]).mean()
        penalty = torch.stack([self._penalty(scores, y) for scores, y in pairs]).mean()
        if count == self.hparams["irm_penalty_anneal_iters"]:
            self._new_optimizer()
        values = self._minimise(
            nll + (self.hparams["irm_lambda"] if annealed else 1.0) * penalty, nll=nll, penalty=penalty
        )
        self.update_count += 1
        return values


class GroupDRO(ERM):
    """Environments with a larger risk gain weight."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("q", torch.empty(0))

    def update(self, minibatches: Batches, unlabeled: list[Tensor] | None = None) -> dict[str, float]:
        """Minimise the weighted risk after an exponentiated-gradient step of the weights."""
        risks = torch.stack(self._risks(minibatches))
        weights = self.q if len(self.q) else torch.ones_like(risks)
        weights = weights * (self.hparams["groupdro_eta"] * risks.detach()).exp()
        self.q = weights / weights.sum()
        return self._minimise(risks @ self.q)


class Mixup(ERM):
    """Risk on mixtures of images from two environments."""

    def update(self, minibatches: Batches, unlabeled: list[Tensor] | None = None) -> dict[str, float]:
        """Mix every environment with a random other one."""
        order = torch.randperm(len(minibatches)).tolist()
        alpha, losses = self.hparams["mixup_alpha"], []
        for one, other in zip(order, order[1:] + order[:1], strict=True):
            (a, label_a), (b, label_b) = minibatches[one], minibatches[other]
            n = min(len(a), len(b))
            part = np.random.beta(alpha, alpha)
            scores = self.predict(part * a[:n] + (1 - part) * b[:n])
            first, second = (functional.cross_entropy(scores, y[:n]) for y in (label_a, label_b))
            losses.append(part * first + (1 - part) * second)
        return self._minimise(torch.stack(losses).mean())


class CORAL(ERM):
    """Means and covariances of the features should agree between environments."""

    def update(self, minibatches: Batches, unlabeled: list[Tensor] | None = None) -> dict[str, float]:
        """Minimise risk plus ``mmd_gamma`` times the mean distance over pairs of environments."""
        features = [self.featurizer(x) for x, _ in minibatches]
        scores = [self.classifier(part) for part in features]
        risk = sum(functional.cross_entropy(s, y) for s, (_, y) in zip(scores, minibatches, strict=True)) / len(scores)
        pairs = list(itertools.combinations(features, 2))
        gap = sum((self._distance(a, b) for a, b in pairs), torch.zeros((), device=features[0].device))
        gap = gap / max(1, len(pairs))
        values = self._minimise(risk + self.hparams["mmd_gamma"] * gap)
        return values | {"penalty": gap.item()}

    @staticmethod
    def _distance(a: Tensor, b: Tensor) -> Tensor:
        moments = ((x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)) / max(1, len(x) - 1)) for x in (a, b))
        (mean_a, cov_a), (mean_b, cov_b) = moments
        return (mean_a - mean_b).square().mean() + (cov_a - cov_b).square().mean()
