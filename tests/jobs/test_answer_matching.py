"""The hparam `answer_matching` in every place where training and evaluation read chains."""

import argparse
import itertools

import pytest
import torch

from builders.training import build
from domainbed_reasoning.jobs.answers import records_for


@pytest.mark.parametrize(("matching", "reads"), [("tolerant", True), ("exact", False)])
def test_answer_matching_applies_to_answers_records_votes_and_self_labels(matching, reads, monkeypatch):
    """The model writes "A NAME." in lower-case tags for class 3, in two of three samples; the third names class 1."""
    dataset, algorithm = build(
        "SARR", max_new_tokens=40, answer_matching=matching, votes=3, sarr_votes=3, temperature=0.9, eval_batch=4
    )
    names = algorithm.task.class_names
    blemished = f"Sure: <conclusion>A {names[3]}.</conclusion>"
    drawn = itertools.cycle([blemished, f"<CONCLUSION>{names[1]}</CONCLUSION>", blemished])
    monkeypatch.setattr(
        type(algorithm.mllm), "generate", lambda self, images, *_: [text for text in [next(drawn)] for _ in images]
    )
    images = torch.stack([dataset[0][i][0] for i in range(2)])
    assert algorithm.predict(images).argmax(1).tolist() == [3 if reads else 1] * 2
    labels = algorithm.labeler()
    kept = labels.chains_for(algorithm.pixels(images), [3, 1], None)
    canonical = f"<CONCLUSION>{names[3]}</CONCLUSION>"
    assert kept == ([canonical, None] if reads else [None, f"<CONCLUSION>{names[1]}</CONCLUSION>"])
    args = argparse.Namespace(output_dir=".", holdout_fraction=0.2, trial_seed=0, test_envs=[3], uda_holdout_fraction=0)
    records = records_for(algorithm.task, args, algorithm.hparams)
    records.add(torch.tensor([[0, 0], [0, 1]]), [blemished] * 2, None, last=False)
    assert (records.chains, records.unparsed) == (2, 0 if reads else 2)


def test_another_answer_matching_is_refused():
    with pytest.raises(ValueError, match="hparam answer_matching must be .tolerant. or .exact.; got .fuzzy."):
        build("MTCT", answer_matching="fuzzy")
