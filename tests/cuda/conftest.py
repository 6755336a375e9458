"""What tests on a GPU share; `tests/conftest.py` skips them where there is none."""

import pytest
import torch

from benchmarks import gpu_models
from benchmarks.mtct_step import BenchmarkSamples


@pytest.fixture
def device():
    return torch.device("cuda")


@pytest.fixture
def training():
    """``training(**hparams)``: MTCT on the embedded model, with a batch of eight images in micro-batches of four."""

    def build(**changes):
        return BenchmarkSamples("tiny", "MTCT", [20, 25] * 4, 48, **{"micro_batch": 4, **changes})

    return build


@pytest.fixture(scope="session")
def model_2b(tmp_path_factory):
    """Random weights of InternVL3-2B's shapes, 4 GB."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    return gpu_models.build(tmp_path_factory.mktemp("2B"), "2B", torch.device("cuda"))
