"""What the log says of steps and rounds that train on nothing: their loss is 0.0, and no record shows why."""

from __future__ import annotations

from domainbed_reasoning.method.schedule import Stage
from domainbed_reasoning.method.self_labeling import SelfLabels

_CURE = (
    "Chains that are cut need a larger max_new_tokens; others a longer supervised stage (mtct_epochs) or better "
    "teacher chains."
)


def of_step(stage: Stage, step: int, labels: SelfLabels | None) -> str:
    """Return what is wrong where a step has no sample to train on; empty where a round has kept other chains.

    Args:
        stage: of the step.
        step: its number.
        labels: of a SARR round; None in the supervised stage.
    """
    if labels is None:
        cure = "More images need a chain: `domainbed-reasoning annotate`."
        return f"WARNING: {stage}, step {step}: no image of the batch has a chain, so no weight changes. {cure}"
    if labels.accepted_share:
        return ""
    said = f"none of its {labels.labelled} self-labelled chains so far was kept, so no weight changes"
    return f"WARNING: {stage}, step {step}: {said}. Training continues. {_CURE}"


def of_round(stage: Stage, labels: SelfLabels) -> str:
    """Return how many of its chains a SARR round kept, as it ends, and what follows if there were none."""
    said = f"{stage}: kept {labels.accepted_share:.1%} of {labels.labelled} self-labelled chains"
    if labels.accepted_share:
        return said
    return f"WARNING: {said}: the round trained on nothing and left the model as it was. {_CURE}"
