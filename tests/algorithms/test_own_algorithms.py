"""What an author of an algorithm may override: the update, the stages, the chains; and where its weights come from."""

import json

import pytest
import torch

from builders.training import build, build_dataset, minibatches
from domainbed_reasoning.algorithms.hparams import SARR_HPARAMS
from domainbed_reasoning.algorithms.label_sft import LabelSFT
from domainbed_reasoning.algorithms.mtct import MTCT
from domainbed_reasoning.jobs.origin import check_origin
from domainbed_reasoning.jobs.trained import JobError

QUICK = {"answer": "label", "both_answers": False, "micro_batch": 64}


class OwnStep(LabelSFT):
    """A whole update of its own."""

    def step(self, minibatches):
        loss = 0.0
        for x, y in minibatches:
            names = [self.task.class_names[label] for label in y.tolist()]
            label, _ = self.terms(self.pixels(x), names, None)
            loss = loss + label.mean()
        loss.backward()
        with torch.no_grad():
            for weight in self.mllm.adapters().values():
                weight -= 0.5 * weight.grad
                weight.grad = None
        return {"loss": float(loss.detach()), "stage": 0.0}


def built(cls, **changes):
    torch.manual_seed(0)
    dataset, hparams = build_dataset("LabelSFT", **QUICK, **changes)
    return dataset, cls(dataset.input_shape, dataset.num_classes, 3, hparams)


def test_an_update_of_its_own_is_what_answers_and_resumes():
    """Copies of earlier weights must not answer, and a restart goes on from the trained ones."""
    dataset, algorithm = built(OwnStep)
    x = minibatches(dataset)[0][0]
    before = algorithm.predict(x)
    algorithm.update(minibatches(dataset))
    after = algorithm.predict(x)
    assert not torch.equal(before, after)
    _, again = built(OwnStep)
    again.restore(algorithm.training_state())
    assert torch.equal(again.predict(x), after)


@pytest.mark.parametrize("base", [LabelSFT, MTCT])
def test_a_second_stage_without_what_rounds_need_is_refused_before_training(base):
    class TwoStages(base):
        @classmethod
        def stages(cls, hparams):
            return [1, 1]

    dataset, hparams = build_dataset(base.__name__, **QUICK)
    with pytest.raises(ValueError, match=r"TwoStages.stages returns more than one stage.*`SARR_HPARAMS`"):
        TwoStages(dataset.input_shape, dataset.num_classes, 3, hparams)
    hparams |= {name: row.default_on("ShapesReasoning") for name, row in SARR_HPARAMS.items()}
    if base is MTCT:
        assert len(TwoStages(dataset.input_shape, dataset.num_classes, 3, hparams).schedule.stages) == 2


@pytest.mark.parametrize("name", ["ReasoningSFT", "MTCT"])
def test_a_falling_chain_weight_is_for_algorithms_with_both_terms(name):
    """A sweep gives all of its algorithms the same hparams."""
    dataset, algorithm = build(name, **QUICK, chain_weighting="falling_loss")
    assert ("chain_scale" in algorithm.update(minibatches(dataset))) == (name == "MTCT")


@pytest.mark.parametrize(
    ("dataset", "seen", "refused"), [("ShapesReasoning", [3], True), ("VLCSReasoning", [3], False)]
)
def test_weights_that_were_trained_on_a_target_domain_are_refused(tmp_path, dataset, seen, refused):
    """Of the same dataset; a job's own targets may have been more."""
    _, algorithm = build("LabelSFT", **QUICK, test_envs=(2,))
    task = algorithm.task
    folder = tmp_path / "adapter"
    folder.mkdir()
    check_origin("init_adapter", str(folder), task)
    kept = {"algorithm": "MTCT", "dataset": dataset, "subject": "x", "class_names": ["a"], "environments": ["e"]}
    kept |= {"prompt_version": "1", "hparams": dict(algorithm.hparams), "test_envs": [3]}
    (folder / "task.json").write_text(json.dumps(kept))
    if refused:
        with pytest.raises(ValueError, match=r"hparam model .*: it was trained on sketch, a target domain of this job"):
            check_origin("model", str(folder), task)
        with pytest.raises(ValueError, match="hparam init_adapter .*: it was trained on sketch"):
            build("LabelSFT", **QUICK, test_envs=(2,), init_adapter=str(folder))
    else:
        check_origin("model", str(folder), task)
    (folder / "task.json").write_text(json.dumps(kept | {"test_envs": [0, 2, 3]}))
    check_origin("model", str(folder), task)
    (folder / "task.json").write_text("{")
    with pytest.raises(JobError, match="damaged"):
        check_origin("model", str(folder), task)
