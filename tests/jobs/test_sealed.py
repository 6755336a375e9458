"""Files of tensors with a digest."""

import contextlib
import io

import pytest
import torch

from domainbed_reasoning.jobs import sealed


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_a_write_raises_is_raised_as_it_is(error, tmp_path, monkeypatch):
    """torch.save would raise a RuntimeError, which a job takes for progress that could not be saved, and goes on."""

    class Failing(io.BytesIO):
        writes = 0

        def write(self, data):
            self.writes += 1
            if self.writes == 3:
                raise error
            return super().write(data)

    monkeypatch.setattr(sealed, "replacing", lambda *_, **__: contextlib.nullcontext(Failing()))
    with pytest.raises(error if isinstance(error, type) else type(error)):
        sealed.write_tensors(tmp_path / "state.pt", {"weights": torch.zeros(1000)})
