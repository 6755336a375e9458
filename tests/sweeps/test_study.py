"""Studies: stock commands, the sweep's jobs, and one study from end to end."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from builders.processes import environment, run_python
from domainbed_reasoning import __main__ as cli
from domainbed_reasoning import registry
from domainbed_reasoning.images import catalog
from domainbed_reasoning.mllm.loading import TINY
from domainbed_reasoning.sweeps import stock
from domainbed_reasoning.sweeps.launchers import jobs, restart
from domainbed_reasoning.sweeps.studies import launch, single_source
from domainbed_reasoning.sweeps.studies.study import STUDIES, Grid, Settings, jobs_of, load_study, sweep_command
from domainbed_reasoning.sweeps.studies.train_jobs import make_job

SETTINGS = Settings("/data", "/out")
BASELINES_AND_CLIP = {"ERM", "CORAL", "CLIPZeroShot", "CLIPLoRA"}


def printed_by(capsys, *arguments):
    assert cli.main(["study", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", STUDIES)
def test_studies_have_name_claim_and_source_of_the_paper_numbers(name):
    study = load_study(name)
    assert study.name == name
    assert study.claim and "arXiv" in study.paper
    for scale in ("mini", "paper"):
        datasets, grids = study.at(scale)
        assert set(datasets) <= registry.DATASETS.keys()
        for grid in grids:
            known = set(registry.ALGORITHMS) if grid.mllm else BASELINES_AND_CLIP
            assert set(grid.algorithms) <= known
    assert all(grid.n_trials == 1 for grid in study.mini)


def test_without_a_name_all_are_listed(capsys):
    printed = printed_by(capsys)
    assert [name for name in STUDIES if f"  {name} " not in printed] == []


def test_misspelled_name_suggests_the_nearest_one(capsys):
    assert cli.main(["study", "ablatoin"]) == 1
    assert "Unknown study 'ablatoin'. Did you mean 'ablation'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["ablation", "--launch"], "--scale mini needs no data"),
        (
            ["ablation", "--launch", "--data_dir", "/nowhere"],
            "the folder /nowhere/office_home does not exist",
        ),
        (["ablation", "--launcher", "slrum"], "Did you mean 'slurm'?"),
        (["ablation", "--gpu", "T5"], "Unknown GPU 'T5'"),
    ],
)
def test_an_error_names_the_fix(capsys, arguments, fix):
    assert cli.main(["study", *arguments]) == 1
    assert fix in capsys.readouterr().err


def test_missing_chains_are_named_before_hours_are_spent(tmp_path, capsys):
    (tmp_path / catalog.STOCK["TerraIncognita"].folder).mkdir()
    assert cli.main(["study", "sarr_rounds", "--launch", "--data_dir", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert "RDMLDG require chains" in printed and "domainbed-reasoning annotate --dataset TerraIncognita" in printed


def test_grids_that_collect_results_cannot_distinguish_have_separate_folders():
    """It reads neither `--hparams` nor anything else but names and seeds."""
    for name in STUDIES:
        for scale in ("mini", "paper"):
            rows = [(grid.folder, row) for grid in load_study(name).at(scale)[1] for row in grid.algorithms]
            assert len(set(rows)) == len(rows)


def test_the_users_hparams_reach_the_language_models_alone():
    """A baseline would take `model` for its own, or nothing would."""
    settings = Settings("/data", "/out", model="m", hparams={"lr": 1}, steps=5, n_trials=2)
    ours = sweep_command(Grid(("RDMLDG",), "f", {"sarr_rounds": 1, "lr": 2}), ["PACSReasoning"], settings)
    assert json.loads(ours[ours.index("--hparams") + 1]) == {"sarr_rounds": 1, "lr": 1, "model": "m"}
    assert ours[ours.index("--output_dir") + 1] == "/out/f"
    assert ours[ours.index("--n_trials") + 1] == "2" and ours[ours.index("--steps") + 1] == "5"
    assert "--hparams" not in sweep_command(Grid(("ERM",), mllm=False), ["PACSReasoning"], settings)


def test_clips_hparams_reach_clip_alone():
    """Without the hub both models are folders, and one `--hparams` names them."""
    settings = Settings("/data", "/out", hparams={"model": "/vl", "clip_model": "/clip"})
    _, clip, ours = load_study("main_comparison").grids
    for grid, its in ((clip, {"clip_model": "/clip"}), (ours, {"model": "/vl"})):
        command = sweep_command(grid, ["PACSReasoning"], settings)
        assert json.loads(command[command.index("--hparams") + 1]) == its


def test_paths_mean_the_same_in_the_jobs_which_run_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vl").symlink_to(TINY)
    for name in ("clip", "tiny"):
        (tmp_path / name).mkdir()
    hparams = json.dumps({"clip_model": "clip"})
    printed = printed_by(capsys, "main_comparison", "--scale", "paper", "--model", "./vl", "--hparams", hparams)
    assert f'{{"model": "{tmp_path}/vl"}}' in printed and f'{{"clip_model": "{tmp_path}/clip"}}' in printed
    assert stock.located("org/model") == "org/model" and stock.located("./gone") == "./gone"
    assert stock.located("tiny") == "tiny"  # the embedded model, whatever lies here


def test_one_chain_file_is_refused_for_several_datasets(tmp_path, capsys):
    """Jobs of all other datasets would end with images that are not theirs."""
    hparams = json.dumps({"chains": "/some.jsonl"})
    assert cli.main(["study", "ablation", "--launch", "--data_dir", str(tmp_path), "--hparams", hparams]) == 1
    assert "one chain file, /some.jsonl, but ablation has 2 datasets. Put" in capsys.readouterr().err


def test_an_update_on_one_source_has_as_many_images_as_one_on_three():
    for scale, images in (("paper", 129), ("mini", 18)):
        _, ours = load_study("single_source").at(scale)[1]
        assert ours.hparams == {"batch_size": images}


@pytest.mark.parametrize(
    ("scale", "chosen", "epochs"),
    [("paper", {}, 12), ("mini", {}, 12), ("mini", {"sarr_rounds": 1}, 8), ("paper", {"mtct_epochs": 1}, 10)],
)
def test_the_ablations_control_is_mtct_for_as_many_epochs_as_rdmldg(scale, chosen, epochs):
    """3 + 3 x 3; on the embedded set 6 + 3 x 2. What the user sets of RDMLDG's schedule counts."""
    settings = dataclasses.replace(SETTINGS, hparams=chosen)
    parts, control = load_study("ablation").at(scale)[1]
    assert control.algorithms == ("MTCT",) and "RDMLDG" in parts.algorithms and parts.folder != control.folder
    hparams = settings.hparams_of(control)
    rdmldg = registry.load(registry.ALGORITHMS["RDMLDG"])
    dataset = "ShapesReasoning" if scale == "mini" else "PACSReasoning"
    theirs = {name: row.default_on(dataset) for name, row in rdmldg.HPARAMS.items()} | settings.hparams_of(parts)
    assert hparams["mtct_epochs"] == sum(rdmldg.stages(theirs)) == epochs


def test_the_single_source_study_has_the_papers_averages(capsys):
    printed = printed_by(capsys, "single_source", "--scale", "mini")
    assert "average 89.37" in printed and "62.03" in printed


def test_leave_one_domain_out_selection_gets_its_pairs(capsys):
    """4 targets and 6 pairs, 20 draws, 3 trials: 600 jobs an algorithm."""
    study = load_study("random_search")
    assert [jobs_of(study, grid, "PACSReasoning", SETTINGS) for grid in study.grids] == [600, 600, 600]
    assert "--single_test_envs" not in sweep_command(study.grids[0], study.datasets, SETTINGS)
    assert "--single_test_envs" in sweep_command(load_study("ablation").grids[0], ["PACSReasoning"], SETTINGS)


def test_printed_study_has_commands_claim_and_hours(capsys):
    """TerraIncognita, rounds 0 to 5: 4 targets x 3 trials each; a further round costs hours."""
    printed = printed_by(capsys, "sarr_rounds", "--data_dir", "/data", "--output_dir", "/out", "--gpu", "H100")
    assert "claim   The first round helps most" in printed
    commands = [line for line in printed.splitlines() if line.startswith("python -m domainbed.scripts.sweep launch")]
    assert [json.loads(shlex.split(one)[-1]) for one in commands] == [{"sarr_rounds": n} for n in range(6)]
    assert printed.count("# 12 jobs: RDMLDG on TerraIncognitaReasoning") == 6
    hours = [float(hours) for hours in re.findall(r"RDMLDG \(rounds_\d\) +([\d.]+)", printed)]
    assert len(hours) == 6 and hours == sorted(set(hours))
    total = float(re.search(r"(\d+) hours in total", printed)[1])
    assert total == pytest.approx(12 * sum(hours), rel=0.02)
    # With GPUs for all, a sweep ends with its longest job, and the next begins then.
    printed = printed_by(capsys, "sarr_rounds", "--data_dir", "/data", "--gpu", "H100", "--gpus", "100")
    assert float(re.search(r"([\d.]+) days on", printed)[1]) == pytest.approx(sum(hours) / 24, abs=0.06)


def test_output_folder_option_accepts_a_hyphen(capsys):
    given = ("sarr_rounds", "--data_dir", "/data")
    printed = [printed_by(capsys, *given, option, "/out") for option in ("--output_dir", "--output-dir")]
    assert printed[0] == printed[1] and "/out" in printed[0]


def test_the_single_source_jobs_are_the_sweeps_but_for_their_targets(run_stock, domainbed_root, tmp_path, monkeypatch):
    """With one target they would be the very commands, folders and seeds of the stock sweep."""
    grid = Grid(("ERM",), mllm=False, n_hparams=2, n_trials=1)
    settings = Settings("/data", str(tmp_path), "dummy", steps=7)
    launch = sweep_command(grid, ["ShapesReasoning"], settings)[3:]
    printed = run_stock(domainbed_root, "sweep", *launch, cwd=tmp_path).stdout
    stock = {line.removeprefix("Dummy launcher: ") for line in printed.splitlines() if "Dummy launcher" in line}

    def with_one_target(sweep, dataset, algorithm, targets, **more):
        assert len(targets) == 3
        return make_job(sweep, dataset, algorithm, {0, 1, 2, 3} - set(targets), **more)

    monkeypatch.setattr(single_source, "make_job", with_one_target)
    ours = [job.command for job in single_source.train_jobs(grid, "ShapesReasoning", settings)]
    assert {tuple(shlex.split(one)) for one in ours} == {tuple(shlex.split(one)) for one in stock}


def launched(domainbed_root, tmp_path, *arguments, before="pass", **variables):
    """Run ``study … --scale mini --launch`` as a process of its own."""
    code = f"import sys; from domainbed_reasoning.__main__ import main; {before}; sys.exit(main(sys.argv[1:]))"
    options = ("--scale", "mini", "--launch", "--output_dir", tmp_path / "out")
    return run_python("-c", code, "study", *arguments, *options, env=environment(domainbed_root, **variables))


def test_a_launched_study_runs_the_printed_commands_and_collects_the_table(tmp_path, domainbed_root, capsys):
    """With a launcher that only prints: 6 algorithms and the control, 4 targets; no job is done, and all are named."""
    done = launched(domainbed_root, tmp_path, "ablation", "--launcher", "dummy")
    assert done.returncode == 1, done.stdout + done.stderr
    ran = [line.removeprefix("$ ") for line in done.stdout.splitlines() if line.startswith("$ ")]
    arguments = ["ablation", "--launcher", "dummy", "--scale", "mini", "--output_dir", str(tmp_path / "out")]
    assert ran == [line for line in printed_by(capsys, *arguments).splitlines() if line.startswith("python ")]
    assert done.stdout.count("Dummy launcher: ") == 28
    assert "Total records: 0" in done.stdout
    assert "0/28 jobs completed." in done.stdout and "NOT STARTED: 28 jobs" in done.stdout
    to_remove = [line.strip() for line in done.stdout.splitlines() if "sweep delete_incomplete" in line]
    assert to_remove == [line.replace("sweep launch", "sweep delete_incomplete") for line in ran if " launch " in line]


@pytest.mark.slow
@pytest.mark.parametrize("domainbed_root", ["standin"], indirect=True)
def test_single_source_study_runs_end_to_end_and_resumes(tmp_path, domainbed_root):
    """One source of four, the label path, one step: a job, a table, the three others named and launched again."""
    before = (
        "import dataclasses; from domainbed_reasoning.sweeps.studies import single_source, study;"
        "mini = study.for_laptop(study.Grid(('LabelSFT',)));"
        "single_source.STUDY = dataclasses.replace(single_source.STUDY, mini=mini)"
    )
    hparams = json.dumps({"both_answers": False, "answer": "label"})
    arguments = ["single_source", "--steps", "1", "--hparams", hparams]
    for to_launch in (4, 3):
        done = launched(domainbed_root, tmp_path, *arguments, before=before, **{jobs.TARGETS: "1 2 3"})
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"LabelSFT: {to_launch} jobs to launch" in done.stdout
        assert "1/4 jobs completed." in done.stdout
        assert "NOT STARTED: 3 jobs\nRerun the command" in done.stdout
    lines = done.stdout.splitlines()
    header = lines.index("| Algorithm | photo | cartoon | sketch | negative | Avg |")
    name, accuracy, *others = lines[header + 2].strip("| ").split(" | ")
    assert name == "LabelSFT" and 0 <= float(accuracy) <= 100 and others == ["X"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("domainbed_root", ["standin"], indirect=True)
def test_killed_study_resumes_on_rerun(tmp_path, domainbed_root):
    """Four jobs: one is run, as if the others had been killed; then one more is."""
    before = (
        "import dataclasses; from domainbed_reasoning.sweeps.studies import ablation, study;"
        "mini = study.for_laptop(study.Grid(('MLLMZeroShot',), 'a', {'answer': 'label'}));"
        "ablation.STUDY = dataclasses.replace(ablation.STUDY, mini=mini)"
    )
    arguments = ["ablation", "--launcher", "forked", "--steps", "1", "--hparams", json.dumps({"both_answers": False})]
    out = tmp_path / "out"
    first = launched(domainbed_root, tmp_path, *arguments, before=before, **{jobs.TARGETS: "1"})
    assert first.returncode == 1, first.stdout + first.stderr
    assert "delete_incomplete" not in first.stdout
    assert "1/4 jobs completed." in first.stdout and "NOT STARTED: 3 jobs" in first.stdout
    second = launched(domainbed_root, tmp_path, *arguments, before=before, **{jobs.TARGETS: "1 2"})
    assert second.stdout.count("sweep delete_incomplete") == 1 and "About to delete 3 jobs" in second.stdout
    assert "2/4 jobs completed." in second.stdout
    assert f"domainbed-reasoning report {out}" in second.stdout
    other = launched(domainbed_root, tmp_path, *arguments[:-2], before=before)
    assert other.returncode == 1
    assert (
        f'{out} contains jobs with different settings (--hparams: {{"both_answers": false}} -> not set)' in other.stderr
    )


def test_running_jobs_are_not_removed(tmp_path):
    """A sweep typed by hand, its folder given relative to where it was started; others' folders are their own."""
    (tmp_path / "out").mkdir()
    sleep = [sys.executable, "-c", "import time; time.sleep(3600)", "domainbed.scripts.sweep", "--output_dir", "out"]
    process = subprocess.Popen(sleep, cwd=tmp_path)
    try:
        with pytest.raises(ValueError, match=f"(?s)already running:.* {process.pid}  .*Wait for them"):
            restart.check_nothing_runs(tmp_path / "out")
        restart.check_nothing_runs(tmp_path / "other")
    finally:
        process.kill()
        process.wait()
    restart.check_nothing_runs(tmp_path / "out")


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """``squeue(said, exit_code)`` puts a `squeue` that says so in the place of Slurm's; its arguments are in a file."""

    def install(printed, exit_code=0):
        script = tmp_path / "bin" / "squeue"
        script.parent.mkdir(exist_ok=True)
        stream = ">&2" if exit_code else ""
        script.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\nprintf '{printed}' {stream}\nexit {exit_code}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)

    return install


@pytest.fixture
def submitted(tmp_path):
    """The folder of a grid: a job without `done`, and what submitit keeps of an array of two and of a single job."""
    folder = tmp_path / "out" / "a"
    (folder / ("0" * 32)).mkdir(parents=True)
    (folder / "slurm").mkdir()
    for identifier in ("12_0", "12_1", "15"):
        (folder / "slurm" / f"{identifier}_submitted.pkl").touch()
    return folder


@pytest.mark.parametrize("one_source", [False, True])
def test_slurm_jobs_keep_their_folders_with_any_next_launcher(tmp_path, submitted, squeue, monkeypatch, one_source):
    """One waits, one runs, one is over; `squeue` is asked for the array and the single job."""
    squeue("12_0 RUNNING\n12_1 PENDING\n15 FAILED\n")
    grid = Grid(("ERM",), "a", mllm=False)
    settings = Settings("/data", str(tmp_path / "out"), "parallel")
    study = dataclasses.replace(load_study("ablation"), one_source=one_source)
    with pytest.raises(ValueError) as refused:
        launch._clear(study, grid, ["ShapesReasoning"], settings, tmp_path)
    message = f"Slurm still has 2 jobs in {submitted}, whose folders would be removed: 12_0 RUNNING, 12_1 PENDING. Wait"
    assert message in str(refused.value)
    assert "squeue --jobs=12)" in str(refused.value) and "(scancel 12)" in str(refused.value)
    assert "--jobs=12,15 " in (tmp_path / "asked").read_text()
    assert (submitted / ("0" * 32)).exists()


def test_finished_slurm_jobs_do_not_block_a_launch(tmp_path, submitted, squeue):
    """Over, or so long ago that Slurm has forgotten them."""
    squeue("12_0 COMPLETED\n12_1 CANCELLED\n15 FAILED\n")
    restart.check_nothing_runs(submitted)
    squeue("slurm_load_jobs error: Invalid job id specified\n", exit_code=1)
    restart.check_nothing_runs(submitted)


def test_unavailable_slurm_requires_confirmation_that_jobs_have_ended(tmp_path, submitted, squeue, monkeypatch):
    squeue("Unable to contact slurm controller (connect failure)\n", exit_code=1)
    with pytest.raises(ValueError, match="Unable to contact slurm controller"):
        restart.check_nothing_runs(submitted)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"`squeue` was not found\).*confirm that by removing .*/out/a/slurm\.$"):
        restart.check_nothing_runs(submitted)
    shutil.rmtree(submitted / "slurm")
    restart.check_nothing_runs(submitted)


def test_the_advice_to_remove_folders_spares_jobs_that_run(capsys):
    """A launcher is handed no jobs where all have folders: those that Slurm runs, too."""
    assert jobs.chosen_jobs([]) == []
    assert "but not while jobs are running" in capsys.readouterr().out


def test_a_study_is_launched_by_one_process_at_a_time(tmp_path):
    with restart.sole_launch(tmp_path / "out"):
        with pytest.raises(ValueError, match=f"is being launched by another process .process {os.getpid()}.\\. Wait"):
            with restart.sole_launch(tmp_path / "out"):
                pass
    with restart.sole_launch(tmp_path / "out"):
        pass


def test_paths_in_hparams_are_found_from_domainbeds_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("adapters", "chains.jsonl"):
        (tmp_path / name).touch()
    hparams = {"init_adapter": "adapters", "chains": "chains.jsonl", "model": "org/name", "answer": "adapters"}
    located = {name: str(tmp_path / hparams[name]) for name in ("init_adapter", "chains")}
    assert stock.with_located(hparams) == hparams | located


def test_base_to_new_jobs_train_on_base_classes_alone(tmp_path, monkeypatch, capsys):
    """Two algorithms on CLIP and five on the MLLM, three trials on each of four datasets."""
    printed = printed_by(capsys, "base_to_new", "--data_dir", "/data", "--output_dir", "/out", "--gpu", "H100")
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("python ")]
    assert len(commands) == 4 * 3 * 7 and all(one[one.index("--test_envs") + 1] == "1" for one in commands)
    assert "34.63" in printed and re.search(r"RDMLDG +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+\n", printed)
    study = load_study("base_to_new")
    assert sum(jobs_of(study, grid, "PACSBaseToNew", SETTINGS) * len(grid.algorithms) for grid in study.grids) == 21

    (tmp_path / "planes.toml").write_text('name = "Planes"\nfolder = "planes"\nenvironments = ["test", "train"]\n')
    monkeypatch.setenv("DOMAINBED_REASONING_DATASETS", str(tmp_path / "planes.toml"))
    printed = printed_by(capsys, "base_to_new", "--data_dir", "/data", "--datasets", "PlanesBaseToNew")
    assert printed.count("--dataset PlanesBaseToNew --holdout_fraction") == 21 and "-: not in the cost model" in printed
    printed = printed_by(capsys, "single_source", "--data_dir", "/data", "--datasets", "PlanesReasoning")
    assert printed.count("--dataset PlanesReasoning --holdout_fraction") == 2 * 3 * 6
    for arguments, message in (
        (("base_to_new", "--datasets", "PACSReasoning"), "Unknown dataset of base_to_new 'PACSReasoning'"),
        (("ablation", "--datasets", "PACSBaseToNew"), "Unknown dataset of ablation 'PACSBaseToNew'"),
    ):
        assert cli.main(["study", *arguments]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["study", "ablation", "--datasets", "PACSReasoning", "--scale", "mini"])
    assert "--datasets requires --scale paper" in capsys.readouterr().err
    assert cli.main(["study", "base_to_new", "--launch", "--data_dir", str(tmp_path)]) == 1
    assert f"PACSBaseToNew: the folder {tmp_path / 'PACS'} does not exist" in capsys.readouterr().err


def test_plan_counts_half_of_the_images_and_names_of_a_dataset_by_classes(capsys):
    """OfficeHome's 65 classes: 33 and 32; half of the images train where it would be three of four domains."""
    hours = {}
    for name in ("OfficeHomeBaseToNew", "OfficeHomeReasoning"):
        assert cli.main(["plan", "--dataset", name, "--gpu", "H100", "--json"]) == 0
        hours[name] = json.loads(capsys.readouterr().out)["hours"]["training"]
    assert hours["OfficeHomeBaseToNew"] == pytest.approx(hours["OfficeHomeReasoning"] * 2 / 3, rel=0.03)
    assert cli.main(["plan", "--dataset", "OfficeHomeBaseToNew", "--gpu", "H100"]) == 0
    assert "(15,588 images, 2 domains, 33 classes)" in capsys.readouterr().out
