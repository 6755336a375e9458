"""Experiment trackers get what a job records, once, whatever is killed; each is read back from its own files."""

import glob
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from builders.files import read_lines, write_lines
from builders.processes import environment, is_running, wait_until
from domainbed_reasoning.bridge import tracked

FOLLOW = "import sys; from domainbed_reasoning.tracking.follow import main; sys.exit(main())"
JOB = ["--dataset", "ShapesReasoning", "--test_envs", "2", "--steps", "6", "--checkpoint_freq", "1"]
FEW = {"answer": "label", "both_answers": False, "batch_size": 2, "mtct_epochs": 1, "sarr_rounds": 1, "sarr_epochs": 1}
FEW |= {"max_new_tokens": 8}
ARGS = {"algorithm": "RDMLDG", "dataset": "ShapesReasoning", "test_envs": [2], "hparams_seed": 0, "trial_seed": 1}
STAGE = {"name": "supervised stage", "first": 0, "last": 1, "values": {"loss": 1.5, "kept_share": 0.25}}
EXAMPLE = {"image": "photo/0", "domain": "photo", "label": "fep", "kept": True, "chain": "<SUMMARY>a|b</SUMMARY>"}


def read_tensorboard(sweep):
    """Return (metric → [(step, value)]), the names of tables, and the number of runs."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    runs = glob.glob(f"{sweep}/*/tensorboard/*")
    found, tables = {}, set()
    for run in runs:
        events = accumulator.EventAccumulator(run).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend((event.step, event.value) for event in events.Scalars(name))
        tables |= {name.removesuffix("/text_summary") for name in events.Tags()["tensors"]}
    return found, tables, len(runs)


def read_wandb(sweep):
    """Offline files are logs of records in LevelDB's layout, one file a start of the run."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found, tables, ids = {}, set(), set()
    for path in sorted(glob.glob(f"{sweep}/*/wandb/offline-run-*/*.wandb")):
        data, place, whole = Path(path).read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            whole += data[place + 7 : place + 7 + size]
            place += 7 + size
            if kind not in (1, 4):  # whole, or the last part
                continue
            record, whole = proto.Record.FromString(whole), b""
            ids |= {record.run.run_id} if record.run.run_id else set()
            names = [tuple(item.nested_key) or (item.key,) for item in record.history.item]
            row = {name: json.loads(item.value_json) for name, item in zip(names, record.history.item, strict=True)}
            for (name, *nested), value in row.items():
                if nested or isinstance(value, dict):
                    tables.add(name)
                else:
                    found.setdefault(name, []).append((row["step",], value))
    return found, tables, len(ids)


def read_mlflow(sweep):
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient((sweep / "mlruns").as_uri())
    experiment = client.get_experiment_by_name(sweep.name)
    runs = client.search_runs([experiment.experiment_id])
    found, tables = {}, set()
    for run in runs:
        for name in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, name)
            found.setdefault(name, []).extend((point.step, point.value) for point in history)
        tables |= {item.path for item in client.list_artifacts(run.info.run_id, "chains")}
    return found, {name.removesuffix(".json").replace("_", " ") for name in tables}, len(runs)


def read_trackio(sweep):
    pytest.importorskip("trackio")
    found, tables = {}, set()
    connection = sqlite3.connect(sweep.parent / "trackio" / f"{sweep.name}.db")
    for step, metrics in connection.execute("SELECT step, metrics FROM metrics ORDER BY id"):
        for name, value in json.loads(metrics).items():
            if isinstance(value, dict):
                tables.add(name)
            else:
                found.setdefault(name, []).append((step, value))
    ((runs,),) = connection.execute("SELECT COUNT(DISTINCT run_id) FROM metrics")
    return found, tables, runs


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


@pytest.fixture(autouse=True)
def local_trackers(tmp_path, monkeypatch):
    """Every tracker in the test's folder and offline, as it is without variables of the user's."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for the reader in this process
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DOMAINBED_REASONING_DOMAINBED", "")


def train(root, folder, algorithm, track, stock_environment, **variables):
    hparams = json.dumps(FEW | {"track": track} if algorithm != "ERM" else {"batch_size": 8, "track": track})
    command = [sys.executable, "-m", "domainbed.scripts.train", *JOB, "--algorithm", algorithm, "--hparams", hparams]
    environ = stock_environment(root) | variables
    return subprocess.Popen(
        [*command, "--output_dir", str(folder)], cwd=root, env=environ, stdout=-1, stderr=-2, text=True
    )


def ended_well(process):
    output = process.communicate(timeout=3600)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def points(records, name):
    return [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in records if name in record]


def test_a_killed_job_continues_its_run(either_domainbed, stock_environment, tmp_path):
    pytest.importorskip("tensorboard")
    folder = tmp_path / "sweep" / ("a" * 32)
    job = train(either_domainbed, folder, "RDMLDG", "tensorboard", stock_environment)
    wait_until(lambda: "2" in json.loads((folder / "tracking.json").read_text())["logged"])
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert "Resumed after step" in ended_well(
        train(either_domainbed, folder, "RDMLDG", "tensorboard", stock_environment)
    )
    records = read_lines(folder / "results.jsonl")
    found, tables, runs = read_tensorboard(tmp_path / "sweep")
    assert runs == 1
    assert tables == {"config", "chains/supervised stage", "chains/SARR round 1"} | (
        {"chains/target domains"} if (folder / "predictions.jsonl").exists() else set()
    )
    assert len(records) == 6
    for name in ("loss", "label_loss", "chain_loss", "env2_in_acc", "sarr1_accepted", "step_time"):
        assert found[name] == points(records, name)
    first, second = read_lines(folder / "stages.jsonl")
    assert [step for step, _ in found["stage_loss"]] == [first["last"], second["last"]]
    mean = sum(record["loss"] for record in records[: first["last"] + 1]) / (first["last"] + 1)
    assert found["stage_loss"][0][1] == pytest.approx(mean)  # a record is a step here
    assert found["stage_kept_share"] == [(5, pytest.approx(records[-1]["sarr1_accepted"]))]
    assert len(second["examples"]) == 8 and {example["domain"] for example in second["examples"]} >= {"photo"}


def test_a_baseline_is_tracked_and_trains_as_if_it_were_not(either_domainbed, stock_environment, tmp_path):
    pytest.importorskip("tensorboard")
    for track in ("tensorboard", "none"):
        ended_well(train(either_domainbed, tmp_path / track / "job", "ERM", track, stock_environment))
    records, others = (read_lines(tmp_path / track / "job" / "results.jsonl") for track in ("tensorboard", "none"))
    assert [record["env2_in_acc"] for record in records] == [record["env2_in_acc"] for record in others]
    found, tables, runs = read_tensorboard(tmp_path / "tensorboard")
    assert (found["loss"], tables, runs) == (points(records, "loss"), {"config"}, 1)
    assert not list((tmp_path / "none" / "job").glob("track*"))


def test_a_tracker_that_fails_is_one_warning_and_the_job_ends_well(either_domainbed, stock_environment, tmp_path):
    (tmp_path / "broken" / "trackio").mkdir(parents=True)
    (tmp_path / "broken" / "trackio" / "__init__.py").write_text("raise RuntimeError('no space left')")
    path = os.pathsep.join([str(tmp_path / "broken"), stock_environment(either_domainbed)["PYTHONPATH"]])
    output = ended_well(train(either_domainbed, tmp_path / "job", "ERM", "trackio", stock_environment, PYTHONPATH=path))
    assert output.count("WARNING: tracking with trackio failed (RuntimeError: no space left). The job continues") == 1
    assert (tmp_path / "job" / "done").exists()


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(tmp_path, capsys):
    tracked._start(str(tmp_path), "{}", "no_such_tracker", os.getpid())
    assert "no_such_tracker is not installed, so this job is not tracked. Run pip install" in capsys.readouterr().out


def follow(folder, tool):
    """Start the process that follows a job's files."""
    process = subprocess.Popen([sys.executable, "-c", FOLLOW], stdin=-1, stderr=-1, text=True, env=environment())
    job = {"folder": str(folder), "tool": tool, "args": ARGS, "is_of_sweep": True, "process": os.getpid()}
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    return process


def record(step, loss, **more):
    return {"step": step, "args": ARGS, "hparams": {"lr": 0.1}, "loss": loss, "step_time": 1.0, **more}


def logged(folder):
    return json.loads((folder / "tracking.json").read_text())["logged"]


@pytest.mark.parametrize("tool", READERS)
def test_every_tracker_has_each_record_once_in_one_run_of_its_sweep(tool, tmp_path):
    """The first process is killed after two records; the job repeats them, measured anew, and writes two more."""
    pytest.importorskip(tool)
    folder = tmp_path / "sweep" / ("b" * 32)
    folder.mkdir(parents=True)
    first = [record(0, 3.0), record(1, 2.0)]
    write_lines(folder / "results.jsonl", [{**first[0], "args": {}}, *first])  # and one of another job
    process = follow(folder, tool)
    wait_until(lambda: "1" in logged(folder))
    write_lines(folder / "results.jsonl", [first[0], first[1] | {"well_formed": 0.5}])  # added to the record later
    wait_until(lambda: "well_formed" in logged(folder)["1"])
    process.kill()
    process.wait()
    again = [one | {"step_time": 2.0} for one in [*first, record(2, 1.0), record(3, 0.5)]]
    write_lines(folder / "results.jsonl", again)
    write_lines(folder / "stages.jsonl", [STAGE | {"examples": [EXAMPLE]}])
    answers = [{"env": env, "image": "x", "label": "fep", "chain": "c"} for env in (1, 2)]
    write_lines(folder / "predictions.jsonl", answers)
    (folder / "done").touch()
    process = follow(folder, tool)
    assert "WARNING" not in process.communicate("end\n", timeout=600)[1]
    found, tables, runs = READERS[tool](tmp_path / "sweep")
    assert runs == 1
    assert found["loss"] == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.5)]
    assert found["well_formed"] == [(1, 0.5)]
    assert [value for _, value in found["stage_loss"]] == [1.5]
    assert [value for _, value in found["stage_kept_share"]] == [0.25]
    assert {"chains/supervised stage", "chains/target domains"} <= tables


@pytest.mark.parametrize("tool", ["tensorboard", "mlflow"])
def test_a_job_that_is_killed_after_its_last_record_ends_well_once_resumed(tool, tmp_path):
    """All records were logged before the kill: the resumed job has only its answers and its end to add."""
    pytest.importorskip(tool)
    folder = tmp_path / "sweep" / ("d" * 32)
    folder.mkdir(parents=True)
    write_lines(folder / "results.jsonl", [record(0, 3.0), record(1, 2.0)])
    process = follow(folder, tool)
    wait_until(lambda: "1" in logged(folder))
    process.kill()
    process.wait()
    write_lines(folder / "predictions.jsonl", [{"env": 2, "image": "x", "label": "fep", "chain": "c"}])
    (folder / "done").touch()
    for _ in range(2):
        assert "WARNING" not in follow(folder, tool).communicate("end\n", timeout=600)[1]
    found, tables, runs = READERS[tool](tmp_path / "sweep")
    assert runs == 1 and found["loss"] == [(0, 3.0), (1, 2.0)] and "chains/target domains" in tables
    if tool == "mlflow":
        client = sys.modules[tool].MlflowClient((tmp_path / "sweep" / "mlruns").as_uri())
        experiment = client.get_experiment_by_name("sweep").experiment_id
        assert [run.info.status for run in client.search_runs([experiment])] == ["FINISHED"]


def test_a_job_whose_records_change_gets_a_run_of_its_own(tmp_path):
    pytest.importorskip("tensorboard")
    folder = tmp_path / "sweep" / ("c" * 32)
    folder.mkdir(parents=True)
    for loss in (3.0, 2.9):
        write_lines(folder / "results.jsonl", [record(0, loss), record(1, 1.0)])
        follow(folder, "tensorboard").communicate("end\n", timeout=600)
    found, _, runs = read_tensorboard(tmp_path / "sweep")
    assert runs == 2
    assert sorted(found["loss"]) == [(0, pytest.approx(2.9)), (0, 3.0), (1, 1.0), (1, 1.0)]


def test_accuracies_before_the_first_evaluation_are_not_logged(tmp_path):
    """They would show a model that answers class 0; the last record has the hparam beyond its step, and is measured."""
    pytest.importorskip("tensorboard")
    folder = tmp_path / "sweep" / ("e" * 32)
    folder.mkdir(parents=True)
    more = {"hparams": {"first_evaluation": 9}, "env0_in_acc": 0.25}
    write_lines(folder / "results.jsonl", [record(0, 3.0) | more, record(1, 2.0) | more])
    (folder / "done").touch()
    follow(folder, "tensorboard").communicate("end\n", timeout=600)
    found, _, runs = read_tensorboard(tmp_path / "sweep")
    assert runs == 1 and found["loss"] == [(0, 3.0), (1, 2.0)] and found["env0_in_acc"] == [(1, 0.25)]


def test_the_process_ends_with_the_job_that_it_follows(tmp_path):
    pytest.importorskip("tensorboard")
    folder = tmp_path / "job"
    folder.mkdir()
    write_lines(folder / "results.jsonl", [record(0, 3.0)])
    job = {"folder": str(folder), "tool": "tensorboard", "args": ARGS, "is_of_sweep": False}
    code = (
        "import json, os, subprocess, sys, time\n"
        f"process = subprocess.Popen([sys.executable, '-c', {FOLLOW!r}], stdin=-1, text=True, pass_fds=[])\n"
        f"process.stdin.write(json.dumps({{**{job!r}, 'process': os.getpid()}}) + '\\n'); process.stdin.flush()\n"
        "print(process.pid, flush=True); time.sleep(3600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=-1, text=True, env=environment())
    follower = int(parent.stdout.readline())
    wait_until(lambda: "0" in logged(folder))
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_running(follower))
