"""The seven tiny models, built once a session, and what the tests ask them."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest
import torch

_spec = importlib.util.spec_from_file_location("family_builders", pathlib.Path(__file__).with_name("builders.py"))
builders = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(builders)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """``folder_of(name)``: the saved tiny model of that family."""
    root, built = tmp_path_factory.mktemp("families"), {}

    def folder(name: str) -> str:
        if name not in built:
            built[name] = str(builders.build(name, root / name))
        return built[name]

    return folder


@pytest.fixture(scope="session", params=list(builders.BUILDERS))
def family_folder(request, folder_of) -> str:
    """Each family's folder in turn."""
    return folder_of(request.param)


@pytest.fixture(scope="session")
def class_names() -> tuple[str, ...]:
    """Names of which one is another's beginning."""
    return builders.CLASSES


@pytest.fixture
def images() -> torch.Tensor:
    """Five random images, none at any model's own size."""
    return torch.randint(0, 256, (5, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)
