"""Which checkpoint and which hyper-parameters count, chosen in one of three ways."""

from __future__ import annotations

from typing import Any

import numpy as np

Record = dict[str, Any]
Chosen = dict[str, float]


def _environments(record: Record) -> list[int]:
    return sorted(int(key[3:-7]) for key in record if key.startswith("env") and key.endswith("_in_acc"))


def _alone(records: list[Record]) -> list[Record]:
    """Return the records with a single test environment."""
    return [record for record in records if len(record["args"]["test_envs"]) == 1]


class SelectionMethod:
    """A subclass names itself and picks the step of one run."""

    name: str

    @classmethod
    def run_acc(cls, run_records: list[Record]) -> Chosen | None:
        """Return {"val_acc", "test_acc"} of the records with one hparams_seed, or None where records lack."""
        raise NotImplementedError

    @classmethod
    def hparams_accs(cls, records: list[Record]) -> list[tuple[Chosen, list[Record]]]:
        """Return every run's choice with its records, the best first."""
        runs: dict[int, list[Record]] = {}
        for record in records:
            runs.setdefault(record["args"]["hparams_seed"], []).append(record)
        found = [(cls.run_acc(runs[seed]), runs[seed]) for seed in sorted(runs)]
        usable = [pair for pair in found if pair[0] is not None]
        return sorted(usable, key=lambda pair: pair[0]["val_acc"])[::-1]

    @classmethod
    def sweep_acc(cls, records: list[Record]) -> float | None:
        """Return the test accuracy of the best run, or None without any."""
        ranking = cls.hparams_accs(records)
        return ranking[0][0]["test_acc"] if ranking else None


class OracleSelectionMethod(SelectionMethod):
    """The last step, validated in the test environment."""

    name = "test-domain validation set (oracle)"

    @classmethod
    def run_acc(cls, run_records: list[Record]) -> Chosen | None:
        """Return the choice from records with one test environment."""
        usable = _alone(run_records)
        if not usable:
            return None
        last = usable[0]
        for record in usable:
            last = record if record["step"] > last["step"] else last
        split = f"env{last['args']['test_envs'][0]}"
        return {"val_acc": last[f"{split}_out_acc"], "test_acc": last[f"{split}_in_acc"]}


class IIDAccuracySelectionMethod(SelectionMethod):
    """The step that is best on the held-out parts of the training environments."""

    name = "training-domain validation set"

    @classmethod
    def run_acc(cls, run_records: list[Record]) -> Chosen | None:
        """Return the choice from records with one test environment."""
        best: Chosen | None = None
        for record in _alone(run_records):
            (target,) = record["args"]["test_envs"]
            sources = [record[f"env{env}_out_acc"] for env in _environments(record) if env != target]
            value = np.mean(sources)
            if best is None or value > best["val_acc"]:
                best = {"val_acc": value, "test_acc": record[f"env{target}_in_acc"]}
        return best


class LeaveOneOutSelectionMethod(SelectionMethod):
    """The step that is best when each source in turn was left out beside the target."""

    name = "leave-one-domain-out cross-validation"

    @classmethod
    def _step(cls, records: list[Record]) -> Chosen | None:
        alone = _alone(records)
        if not alone:
            return None
        (target,) = alone[0]["args"]["test_envs"]
        left_out = {}
        for record in records:
            others = [env for env in record["args"]["test_envs"] if env != target]
            if len(others) == 1:
                left_out[others[0]] = record[f"env{others[0]}_in_acc"]
        sources = [env for env in _environments(alone[0]) if env != target]
        if any(env not in left_out for env in sources):
            return None
        return {"val_acc": np.mean([left_out[env] for env in sources]), "test_acc": alone[0][f"env{target}_in_acc"]}

    @classmethod
    def run_acc(cls, run_records: list[Record]) -> Chosen | None:
        """Return the choice among the steps for which every source was left out once."""
        steps: dict[int, list[Record]] = {}
        for record in run_records:
            steps.setdefault(record["step"], []).append(record)
        usable = [found for found in map(cls._step, (steps[step] for step in sorted(steps))) if found is not None]
        return max(usable, key=lambda choice: choice["val_acc"], default=None)
