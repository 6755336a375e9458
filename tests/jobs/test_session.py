"""What a session restores after a restart, with a real algorithm and the real log."""

import argparse

import torch

from builders.training import build, minibatches
from domainbed_reasoning.jobs.history import History
from domainbed_reasoning.jobs.replay_log import Progress


def test_an_evaluation_whose_answers_were_replayed_is_a_member_of_the_average(tmp_path):
    """The state was saved by the update before the evaluation, and the process killed after it: two members."""
    args = argparse.Namespace(output_dir=str(tmp_path / "out"))

    def run(is_first):
        dataset, algorithm = build(
            "MTCT", average_adapters=True, micro_batch=8, answer="label", both_answers=False, lr=1e-2
        )
        algorithm.session.history = History(Progress({"args": vars(args)}, tmp_path), args, "")
        assert algorithm.session.history.replays != is_first
        batches = minibatches(dataset)
        for step in range(3):
            algorithm.update(batches)
            if step == 2 and is_first:
                algorithm.session.history.save(3, algorithm.training_state, now=True)
            if step > 0:
                algorithm.predict(batches[0][0])
        algorithm.session.state_dict(algorithm)  # DomainBed saves the model after each record
        algorithm.session.history.progress.close()
        return {name: weight.detach().clone() for name, weight in algorithm.adapters().items()}

    first, second = run(True), run(False)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
