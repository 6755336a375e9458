"""Ways to run a list of shell commands, by name."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Sequence

import torch


def local_launcher(commands: Sequence[str]) -> None:
    """Run the commands one after another; a failing one does not stop the next."""
    for line in commands:
        subprocess.run(line, shell=True, check=False)


def dummy_launcher(commands: Sequence[str]) -> None:
    """Print the commands."""
    print("".join(f"Dummy launcher: {line}\n" for line in commands), end="")


def multi_gpu_launcher(commands: Sequence[str]) -> None:
    """Run one command at a time on each visible GPU.

    Raises:
        RuntimeError: no GPU is visible.
    """
    gpus = torch.cuda.device_count()
    if gpus == 0:
        raise RuntimeError("The multi_gpu launcher finds no GPU. Use --command_launcher local.")
    waiting = iter(commands)
    running: dict[int, subprocess.Popen] = {}
    for gpu in itertools.cycle(range(gpus)):
        if gpu in running:
            try:
                running[gpu].wait(timeout=1 / gpus)
            except subprocess.TimeoutExpired:
                continue
            del running[gpu]
        line = next(waiting, None)
        if line is not None:
            running[gpu] = subprocess.Popen(f"CUDA_VISIBLE_DEVICES={gpu} {line}", shell=True)
        elif not running:
            return


REGISTRY: dict[str, Callable[[Sequence[str]], None]] = {
    "local": local_launcher,
    "dummy": dummy_launcher,
    "multi_gpu": multi_gpu_launcher,
}
