"""What the log says of stages: where they begin, what their rounds kept, and steps that train on nothing."""

from __future__ import annotations

from domainbed_reasoning.method.schedule import Schedule, Stage
from domainbed_reasoning.method.self_labeling import SelfLabels

_ADVICE = (
    "Chains that are cut off need a larger max_new_tokens; others a longer supervised stage (mtct_epochs) or better "
    "teacher chains."
)


class StageLog:
    """Prints the stages of one algorithm.

    Args:
        name: of the algorithm.
        schedule: its stages.
    """

    def __init__(self, name: str, schedule: Schedule):
        self.name = name
        self.schedule = schedule
        self._idle: Stage | None = None  # the stage whose steps without samples have been reported

    def begin(self, stage: Stage) -> None:
        """Report that a stage begins, or is resumed."""
        print(f"{self.name}: {stage} of {self.schedule.n_steps} steps", flush=True)

    def step(self, stage: Stage, step: int, labels: SelfLabels | None, samples: int) -> None:
        """Report a step without samples, once a stage, and at a round's end what it kept.

        A step without samples has loss 0.0 and changes no weight; no record shows why.

        Args:
            stage: of the step.
            step: its number.
            labels: of a SARR round; None in the supervised stage.
            samples: that the step trained on.
        """
        if not samples and self._idle is not stage and (labels is None or not labels.accepted_share):
            self._idle = stage
            print(f"WARNING: {stage}, step {step}: {_idle(labels)}", flush=True)
        if labels is not None and step == stage.last:
            print(_round(stage, labels), flush=True)


def _idle(labels: SelfLabels | None) -> str:
    if labels is None:
        return "no image of the batch has a chain, so no weight changes. Add chains: `domainbed-reasoning annotate`."
    return (
        f"none of its {labels.labelled} self-labelled chains so far was kept, so no weight changes. Training "
        f"continues. {_ADVICE}"
    )


def _round(stage: Stage, labels: SelfLabels) -> str:
    kept = f"{stage}: kept {labels.accepted_share:.1%} of {labels.labelled} self-labelled chains"
    if labels.accepted_share:
        return kept
    return f"WARNING: {kept}: the round trained on nothing and left the model as it was. {_ADVICE}"
