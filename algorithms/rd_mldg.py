"""RD-MLDG (arXiv 2602.23777, algorithm 1): MTCT, then N rounds of SARR.

L_SARR = 1/B' Σ_i [ -log p(y_i | x_i, q_cls) - 1/T_i Σ_t log p(r̂_{i,t} | r̂_{i,<t}, x_i, q_reason) ]

over the B' samples whose self-generated chain r̂_i was kept; teacher chains play no part after MTCT.
"""

from __future__ import annotations

from domainbed_reasoning.algorithms.hparams import SARR_HPARAMS
from domainbed_reasoning.algorithms.mtct import MTCT


class RDMLDG(MTCT):
    """MTCT, then N rounds of self-labelling with both terms."""

    HPARAMS = {**MTCT.HPARAMS, **SARR_HPARAMS}
