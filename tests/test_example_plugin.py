"""The example plug-in, installed with pip, in a stock sweep beside ERM, and its table."""

import os
import subprocess
import sys

from builders.processes import CHECKOUT

HPARAMS = (
    '{"model": "tiny", "batch_size": 8, "mtct_epochs": 1, "sarr_rounds": 1, "sarr_epochs": 1, "max_new_tokens": 8,'
    ' "answer": "label", "both_answers": false, "micro_batch": 64, "focal_gamma": 1.0}'
)


def test_the_example_is_installed_and_swept_beside_erm(either_domainbed, stock_environment, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    source = tmp_path / "source"
    subprocess.run(["cp", "-r", CHECKOUT / "examples" / "plugin", source], check=True)
    subprocess.run([*pip, "--target", tmp_path / "site", source], check=True)
    variables = stock_environment(either_domainbed)
    variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), variables["PYTHONPATH"]])

    def stock(script, *options):
        command = [sys.executable, "-m", f"domainbed.scripts.{script}", *map(str, options)]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    sweep = ("--datasets", "PolygonsReasoning", "--algorithms", "ERM", "FocalRDMLDG", "--single_test_envs")
    sweep += ("--n_hparams", 1, "--n_trials", 1, "--steps", 3, "--hparams", HPARAMS, "--skip_confirmation")
    folders = ("--data_dir", tmp_path, "--output_dir", tmp_path / "sweep")
    stock("sweep", "launch", *sweep, *folders, "--command_launcher", "forked")
    assert len(list(tmp_path.glob("sweep/*/done"))) == 6
    table = stock("collect_results", "--input_dir", tmp_path / "sweep")
    rows = [line.split() for line in table.splitlines() if line.startswith(("ERM", "FocalRDMLDG"))]
    assert {row[0] for row in rows} == {"ERM", "FocalRDMLDG"}
    oracle = table.partition("(oracle)")[2]
    assert "filled                outline               gray" in oracle and " X " not in oracle.partition("Averages")[0]
    versions = [path.read_text() for path in tmp_path.glob("sweep/*/versions.json")]
    assert sum('"focal_rdmldg"' in text for text in versions) == 3 and all('"polygons"' in text for text in versions)
