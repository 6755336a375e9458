"""DomainBed's train script, unmodified, in this process and under timers: what `whole_job` and `first_update` start.

    python -m benchmarks.timed_train STARTED FILE [--first-update] -- [arguments of the train script]

Writes the seconds of its parts, and those from its start to the end of the first update, to FILE as JSON.
"""

from __future__ import annotations

import json
import pathlib
import runpy
import sys
from typing import Any

from benchmarks.parts import Parts

TRAIN = "domainbed.scripts.train"
DATA, MODEL, TRAINING, ANSWERS, SAVING = "data", "model", "training", "answers", "saving"


class FirstUpdate(SystemExit):
    """Ends the process after the first update."""


def watch_reasoning(parts: Parts) -> None:
    """Count the parts of this package's algorithms: self-labels are answers, wherever they are generated."""
    from domainbed_reasoning.algorithms import trained_mllm
    from domainbed_reasoning.jobs import answers, history, replay_log, session
    from domainbed_reasoning.method import self_labeling

    parts.watch(trained_mllm, "load_mllm", MODEL)
    parts.watch(self_labeling.SelfLabels, "chains_for", ANSWERS)
    for owner, functions in (
        (session.Session, ("start", "state_dict")),
        (history.History, ("save",)),
        (replay_log.Progress, ("record_step", "record_answers", "record_ahead")),
        (answers.AnswerRecords, ("add", "report")),
    ):
        for function in functions:
            parts.watch(owner, function, SAVING)


def main(argv: list[str]) -> int:
    """Run the train script; write the seconds."""
    started, file, *options = argv
    parts = Parts(float(started))
    parts.watch_imports()
    import torch
    from domainbed import algorithms, datasets
    from domainbed.lib import misc

    only_first = options[0] == "--first-update"
    arguments = options[options.index("--") + 1 :]
    chosen = {name: arguments[arguments.index(f"--{name}") + 1] for name in ("algorithm", "dataset")}
    cls = algorithms.get_algorithm_class(chosen["algorithm"])
    if cls.__module__.startswith("domainbed_reasoning."):
        watch_reasoning(parts)
    first: list[float] = []
    update: Any = cls.update

    def timed(*args: Any, **kwargs: Any) -> Any:
        with parts.part(TRAINING):
            values = update(*args, **kwargs)
        if not first:
            first.append(parts.since_start())
            if only_first:
                raise FirstUpdate(0)
        return values

    cls.update = timed
    parts.watch(cls, "predict", ANSWERS)
    parts.watch(vars(datasets)[chosen["dataset"]], "__init__", DATA)
    parts.watch(torch.utils.data.dataloader._BaseDataLoaderIter, "__next__", DATA)
    parts.watch(misc, "split_dataset", DATA)
    parts.watch(torch, "save", SAVING)
    sys.argv = [TRAIN, *arguments]
    try:
        runpy.run_module(TRAIN, run_name="__main__", alter_sys=True)
    except FirstUpdate:
        pass
    result = {"first_update": first[0], "parts": parts.finished()}
    pathlib.Path(file).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
