"""RD-MLDG (arXiv 2602.23777, algorithm 1): MTCT on teacher chains, then N rounds of SARR on self-generated ones.

L_MTCT = 1/B Σ_i [ -log p(y_i | x_i, q_cls) - 1/T_i Σ_t log p(r_{i,t} | r_{i,<t}, x_i, q_reason) ]       (eq. 1)

L_SARR = the same over the B' samples whose self-generated chain r̂_i concludes with y_i                    (eq. 2)

Both are implemented in `base`: `stages` and `begin` are algorithm 1, `chains_of` selects the chains of a stage, `terms`
and `Objective` are the two equations, `step` is the update, `answer` the evaluation.
"""

from __future__ import annotations

from typing import Any

from domainbed_reasoning.algorithms.hparams import SARR_HPARAMS
from domainbed_reasoning.algorithms.mtct import MTCT


class RDMLDG(MTCT):
    """MTCT, then N rounds of self-labeling with both terms; teacher chains are not used after MTCT."""

    HPARAMS = {**MTCT.HPARAMS, **SARR_HPARAMS}

    @classmethod
    def stages(cls, hparams: dict[str, Any]) -> list[int]:
        """Return the number of epochs of MTCT and of each SARR round."""
        return [hparams["mtct_epochs"], *[hparams["sarr_epochs"]] * hparams["sarr_rounds"]]
