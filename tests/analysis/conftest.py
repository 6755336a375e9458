"""A job of the embedded model: a stage of MTCT and a round of SARR, trained by the stock command, once a session."""

import json
from pathlib import Path

import pytest

from domainbed_reasoning.analysis.checkpoints import open_checkpoint
from domainbed_reasoning.analysis.data import data_of_job

SHORT = {"mtct_epochs": 1, "sarr_epochs": 1, "sarr_rounds": 1, "max_new_tokens": 40, "answer": "label"}


@pytest.fixture(scope="session")
def job(run_stock, tmp_path_factory):
    """The folder of the job; its checkpoints of every stage are there."""
    stand_in = Path(__file__).parent.parent / "standin"
    folder = tmp_path_factory.mktemp("jobs") / "rdmldg"
    run_stock(
        stand_in, "train", "--dataset", "ShapesReasoning", "--algorithm", "RDMLDG", "--test_envs", 3, "--steps", 21,
        "--output_dir", folder, "--save_model_every_checkpoint", "--hparams", json.dumps(SHORT), cwd=folder.parent,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def checkpoint(job):
    return open_checkpoint(str(job))


@pytest.fixture(scope="session")
def material(checkpoint):
    """What the job was given, its source domains' chains among it."""
    return data_of_job(checkpoint.job, chains=True)


@pytest.fixture(scope="session")
def trained(checkpoint):
    return checkpoint.load()


@pytest.fixture(scope="session")
def base():
    return open_checkpoint("tiny").load()
