"""Folders of sweeps as the train script and our algorithms write them."""

import json

import pytest


@pytest.fixture
def write_job(tmp_path):
    """``write_job(name, algorithm=…, target=…, …)`` writes a job's folder below ``tmp_path / "sweep"``.

    ``accs`` is the target domain's accuracy at each step; the sources' accuracies grow with the step.
    """

    def write(
        name, algorithm="ERM", dataset="Debug28", target=0, trial=0, accs=(0.1, 0.2), done=True, sweep="sweep", **more
    ):
        folder = tmp_path / sweep / name
        folder.mkdir(parents=True)
        hparams = {"lr": 0.001} | more.pop("hparams", {})
        args = {
            "algorithm": algorithm,
            "dataset": dataset,
            "test_envs": [target],
            "trial_seed": trial,
            "hparams_seed": 0,
            "holdout_fraction": 0.2,
            "task": "domain_generalization",
            "steps": None,
            "seed": 7,
            "data_dir": "data",
            "output_dir": str(folder),
            "hparams": None,
        } | more.pop("args", {})
        lines = []
        for step, acc in enumerate(accs):
            record = {"step": 10 * step, "step_time": 0.5, "mem_gb": 0.0, "args": args, "hparams": hparams, **more}
            for env in range(2 if dataset.endswith("BaseToNew") else 4 if "Reasoning" in dataset else 3):
                own = acc if env == target else step / 10
                record |= {f"env{env}_in_acc": own, f"env{env}_out_acc": own}
            lines.append(json.dumps(record) + "\n")
        (folder / "results.jsonl").write_text("".join(lines))
        if done:
            (folder / "done").write_text("done")
        return folder

    write.folder = tmp_path / "sweep"
    return write
