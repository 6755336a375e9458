"""The objective of MTCT and SARR (arXiv 2602.23777, eq. 1 and 2), and its gradient in micro-batches.

L = 1/B Σ_i [ -log p(y_i | x_i, q_cls)  -  1/T_i Σ_t log p(r_{i,t} | r_{i,<t}, x_i, q_reason) ]

MTCT uses teacher chains r and all B samples; SARR self-generated chains r̂ and the B' samples whose chain was kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from domainbed_reasoning.method.balance import LabelGradients
from domainbed_reasoning.method.ranks import Ranks

# label_nll and chain_nll, (n,) each, in nats; None if the samples do not have the term.
Terms = tuple[torch.Tensor | None, torch.Tensor | None]


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


def running_average(average: float | None, value: float) -> float:
    """Return an exponential moving average (decay 0.9) that starts with its first value, None before it."""
    return value if average is None else 0.9 * average + 0.1 * value


def falling_loss_factor(chain_loss: float | None) -> float:
    """Return exp(-L), the geometric mean of the probability of a chain's tokens, in [0, 1].

    Beyond the paper. Early on, the chains are unlikely and their gradient would drown the label's: the chain term
    starts small and approaches its full weight as its loss falls.

    Args:
        chain_loss: L, the running average of the previous updates, in nats per token; None before the first: 0.
    """
    return 0.0 if chain_loss is None else math.exp(-chain_loss)


@dataclass(frozen=True)
class Objective:
    """L = 1/B Σ_i [w_label · label_nll_i + w_chain · chain_nll_i], and its gradient.

    Attributes:
        label_weight: weight of the label term; 1 in the paper.
        chain_weight: weight of the chain term; 1 in the paper.
        micro_batch: samples per forward and backward pass; the gradient is that of the whole batch.
        grad_clip: maximum gradient norm; 0 disables clipping.
        balanced: beyond the paper, scale the label term's gradient to the chain term's norm (see `balance`).
    """

    label_weight: float
    chain_weight: float
    micro_batch: int
    grad_clip: float = 0.0
    balanced: bool = False

    @classmethod
    def of(cls, hparams: Mapping[str, Any], label_path: bool, chain_path: bool, chain_factor: float = 1.0) -> Objective:
        """Return the objective of an algorithm with these hyper-parameters.

        Args:
            hparams: of the job.
            label_path: whether it includes the classification path.
            chain_path: whether it includes the reasoning path.
            chain_factor: of the chain weight, in [0, 1]; see `falling_loss_factor`.
        """
        return cls(
            float(hparams["label_weight"]) if label_path else 0.0,
            chain_factor * float(hparams["chain_weight"]) if chain_path else 0.0,
            hparams["micro_batch"],
            hparams["grad_clip"],
            label_path and chain_path and hparams["gradient_balance"] == "norm",
        )

    def backward(
        self,
        terms: Callable[[torch.Tensor, list[str] | None, list[str] | None], Terms],
        images: torch.Tensor,
        names: Sequence[str] | None,
        chains: Sequence[str | None],
        used: list[int],
        parameters: Sequence[torch.Tensor],
        ranks: Ranks | None = None,
    ) -> dict[str, float]:
        """Add the clipped gradient of L over the B ``used`` samples to ``.grad``; no-op if B is 0.

        Micro-batches contain samples with the same terms; their gradients add up to that of the whole batch.

        Args:
            terms: returns both terms of a micro-batch, given images, class names and chains.
            images: of the batch, ``(n, 3, H, W)``.
            names: n names of the true classes; None without the classification path.
            chains: n chains; None for samples without one.
            used: rows of the batch that L averages over.
            parameters: the trained tensors.
            ranks: share the micro-batches; each ends with the gradient of the whole batch. None for one process.

        Returns:
            ``loss``, ``label_loss`` and ``chain_loss`` in nats, means over the samples that have the term. With
            ``balanced``, ``loss`` excludes the label term, whose factor is ``label_scale``.
        """
        if not used:
            return {"loss": 0.0}
        sums: dict[str, list[torch.Tensor]] = {"loss": [], "label_loss": [], "chain_loss": []}
        counts = {"label_loss": 0, "chain_loss": 0}
        balance = LabelGradients(parameters) if self.balanced else None
        ranks = ranks or Ranks()
        for rows in ranks.share(micro_batches(used, chains, self.micro_batch, ranks.world)):
            texts = [str(chains[row]) for row in rows] if chains[rows[0]] is not None else None
            pictures = torch.stack([images[row] for row in rows])  # a list as index is a copy that the host waits for
            label, chain = terms(pictures, [names[row] for row in rows] if names is not None else None, texts)
            loss = torch.zeros((), device=parameters[0].device)
            if label is not None:
                if balance is None:
                    loss = loss + self.label_weight * label.sum()
                else:
                    balance.add(label.sum() / len(used), retain_graph=chain is not None)
                sums["label_loss"].append(label.detach().sum())
                counts["label_loss"] += len(rows)
            if chain is not None:
                loss = loss + (self.chain_weight if balance is None else 1.0) * chain.sum()
                sums["chain_loss"].append(chain.detach().sum())
                counts["chain_loss"] += len(rows)
            if loss.requires_grad:  # False if the label term is separate and the only one
                (loss / len(used)).backward()
            sums["loss"].append(loss.detach())
        totals: dict[str, float] = {}
        if ranks.world > 1:
            totals, counts = ranks.add_up(parameters, balance.sums if balance is not None else [], sums, counts)
            sums = {}
        if balance is not None:
            sums["label_scale"] = [balance.join(self.label_weight, self.chain_weight)]
        if self.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(parameters, self.grad_clip)
        totals |= read(sums) if sums else {}
        means = {name: totals[name] / count for name, count in counts.items() if count}
        scale = {name: totals[name] for name in totals.keys() - counts.keys() - {"loss"}}
        weight = self.chain_weight if balance is not None else 1.0  # join has applied it to the gradient
        return {"loss": weight * totals["loss"] / len(used), **means, **scale}


def read(sums: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, float]:
    """Return the totals of the micro-batches' scalars, with a single device-to-host transfer.

    Args:
        sums: by name, scalars in order; 0 for none.
    """
    scalars = [scalar.float() for values in sums.values() for scalar in values]
    values = iter(torch.stack(scalars).tolist())
    return {name: sum((next(values) for _ in each), 0.0) for name, each in sums.items()}


def check_shares(samples: int, micro_batch: int, world: int) -> None:
    """Check that every rank has a micro-batch of an update.

    Args:
        samples: of an update.
        micro_batch: maximum samples per forward and backward pass.
        world: number of ranks.

    Raises:
        ValueError: there are more ranks than micro-batches.
    """
    count = -(-samples // micro_batch)
    if world > count:
        raise ValueError(
            f"{world} ranks, but an update on {samples} images in micro-batches of up to {micro_batch} has only "
            f"{count}: some ranks would have nothing to do. Reduce micro_batch, or the number of ranks to {count}."
        )


def micro_batches(used: list[int], chains: Sequence[str | None], size: int, world: int = 1) -> list[list[int]]:
    """Return the ``used`` rows in groups of at most ``size``, with and without a chain in separate groups.

    Group sizes differ by at most one: a small last group would launch as many kernels for fewer rows.

    Args:
        used: rows of a batch.
        chains: of every row of the batch; None for rows without one.
        size: maximum rows per group.
        world: ranks that share the groups: their number is a multiple of it where there are enough rows.
    """
    groups = []
    for with_chain in (True, False):
        rows = [row for row in used if (chains[row] is not None) == with_chain]
        if with_chain:
            rows.sort(key=lambda row: len(str(chains[row])))  # less padding
        count = min(-(-len(rows) // (size * world)) * world, len(rows))
        groups += [rows[len(rows) * i // count : len(rows) * (i + 1) // count] for i in range(count)]
    return groups
