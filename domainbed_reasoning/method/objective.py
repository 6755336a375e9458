"""The objective of MTCT and SARR: tensors in, tensors out (arXiv 2602.23777, eq. 1 and 2).

L = 1/B Σ_i [ -log p(y_i | x_i, q_cls)  -  1/T_i Σ_t log p(r_{i,t} | r_{i,<t}, x_i, q_reason) ]
"""

from __future__ import annotations

import torch


def label_nll(log_likelihoods: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return -log p(y_i | x_i, q_cls): the **sum** over the tokens of the class name with its end token, in nats.

    Args:
        log_likelihoods: of the target tokens, ``(n, T)``.
        mask: True where a row has a target token, ``(n, T)``.

    Returns:
        ``(n,)``.
    """
    return -(log_likelihoods * mask).sum(dim=1)


def chain_nll(log_likelihoods: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return -1/T_i Σ_t log p(r_{i,t} | …): the **mean** over a chain's own tokens, whatever its length, in nats.

    Args:
        log_likelihoods: of the target tokens, ``(n, T)``.
        mask: True where a row has a target token, ``(n, T)``.

    Returns:
        ``(n,)``.
    """
    return -(log_likelihoods * mask).sum(dim=1) / mask.sum(dim=1)
