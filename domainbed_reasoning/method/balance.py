"""Balances the two terms' gradients: the label term's is scaled to the norm of the chain term's.

With the weights of arXiv 2602.23777 (eq. 1: 1 and 1), the gradient norm of the label term, a sum over tokens, can be
many times that of the chain term, a mean over tokens. GradNorm (Chen et al., 2018, arXiv 1711.02257) learns task
weights that equalize the norms on the last shared layer; with two tasks and small adapters, the norms are made exactly
equal here, in every step and over all trained tensors. Costs a second backward pass through the shared computation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class LabelGradients:
    """The label term's gradients, separate from the chain term's, which are in ``.grad`` as usual.

    Args:
        parameters: the trained tensors.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]):
        self.parameters = list(parameters)
        self.sums = [torch.zeros_like(weight) for weight in self.parameters]

    def add(self, label_term: torch.Tensor, retain_graph: bool = True) -> None:
        """Add the gradients of a micro-batch's unweighted label term.

        Args:
            label_term: a scalar.
            retain_graph: whether the micro-batch has a chain term, too.
        """
        gradients = torch.autograd.grad(label_term, self.parameters, retain_graph=retain_graph, allow_unused=True)
        for total, gradient in zip(self.sums, gradients, strict=True):
            if gradient is not None:
                total += gradient

    def join(self, label_weight: float, chain_weight: float = 1.0) -> torch.Tensor:
        """Make ``.grad`` the weighted sum of the chain term's gradient and the label term's, scaled to its norm.

        Args:
            label_weight: of the scaled gradient of the label term.
            chain_weight: of the chain term's gradient, which is in ``.grad`` unweighted: a common factor of both terms
                would change nothing but the length of the step.

        Returns:
            The factor, a scalar on the gradients' device; ``label_weight`` itself if either term has no gradient.
        """
        chain = torch.stack([(0 * total if w.grad is None else w.grad).norm() for w, total in self._pairs()]).norm()
        label = torch.stack([total.norm() for total in self.sums]).norm()
        usable = (chain > 0) & (label > 0)
        factor = label_weight * torch.where(usable, chain / label, 1.0)
        for weight, total in self._pairs():
            weight.grad = factor * total if weight.grad is None else chain_weight * weight.grad + factor * total
        return factor

    def _pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.parameters, self.sums, strict=True))
