"""The real run's driver on the embedded model and two images a class and domain, in real jobs of a few steps."""

import hashlib
import json

import pytest

from domainbed_reasoning.bridge.hparam_names import check_hparams
from domainbed_reasoning.method.schedule import plan_stages
from domainbed_reasoning.sweeps.miniature.study import run as launch
from examples.real_small import rows, run, sample, table
from examples.real_small.rows import ROWS, TUNED, ZERO_SHOT, Settings


@pytest.fixture
def forked(monkeypatch, either_domainbed):
    """Jobs of one thread on the CPU, for which no GPU is visible."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.syspath_prepend(str(either_domainbed))


@pytest.fixture
def small(test_data, tmp_path):
    """``small("--run")`` calls the driver on a run of one step; its output folder is ``tmp_path / "output"``."""

    def call(*arguments):
        common = ["--model", "tiny", "--data_dir", str(test_data), "--per_class", "2", "--steps", "1"]
        places = ["--output_dir", str(tmp_path / "output"), "--results_dir", str(tmp_path / "results")]
        return run.main([*arguments, *common, *places])

    return call


def write_rates(output):
    """Write rates as if the grid had run."""
    rates = {row.name: 5e-4 for row in TUNED}
    (output / rows.RATES_FILE).write_text(json.dumps({"rates": rates}))


def drawn_folder(root, images=4):
    """Write two domains of two classes with a few files each."""
    for domain in ("art", "photo"):
        for name in ("cat", "dog"):
            folder = root / "PACS" / domain / name
            folder.mkdir(parents=True)
            for at in range(images):
                (folder / f"{at}.png").write_bytes(f"{domain} {name} {at}".encode())
    return root


def test_sample_is_fixed_by_its_seed_and_recorded(tmp_path):
    data = drawn_folder(tmp_path / "data")
    folder = sample.write_sample(data, tmp_path / "a", 2, seed=0)
    recorded = json.loads((tmp_path / "a" / sample.RECORD).read_text())
    assert (recorded["per_class"], recorded["seed"], len(recorded["images"])) == (2, 0, 8)
    copies = {path.relative_to(folder / "PACS").as_posix() for path in folder.rglob("*.png")}
    assert copies == {one["image"] for one in recorded["images"]}
    first = recorded["images"][0]
    assert first["sha256"] == hashlib.sha256((data / "PACS" / first["image"]).read_bytes()).hexdigest()
    assert sample.draw_sample(data / "PACS", 2, 0) == sample.draw_sample(data / "PACS", 2, 0)
    assert len({tuple(sample.draw_sample(data / "PACS", 2, seed)) for seed in range(10)}) > 1


def test_files_that_are_no_images_are_not_drawn(tmp_path):
    data = drawn_folder(tmp_path / "data")
    for folder in (data / "PACS").glob("*/*"):
        (folder / ".DS_Store").write_bytes(b"x")
    for seed in range(5):
        assert all(path.suffix == ".png" for path in sample.draw_sample(data / "PACS", 2, seed))


def test_recorded_sample_outlives_its_source_and_an_interrupted_copy_is_redone(tmp_path):
    data = drawn_folder(tmp_path / "data")
    (tmp_path / "a" / "data" / "PACS" / "art" / "cat").mkdir(parents=True)
    (tmp_path / "a" / "data" / "PACS" / "art" / "cat" / "half.png").write_bytes(b"interrupted")
    folder = sample.write_sample(data, tmp_path / "a", 2, seed=0)
    assert not list(folder.rglob("half.png"))
    before = sorted(folder.rglob("*.png"))
    assert sample.write_sample(tmp_path / "gone", tmp_path / "a", 2, seed=0) == folder
    assert sorted(folder.rglob("*.png")) == before


@pytest.mark.parametrize(("per_class", "folder", "message"), [(9, "data", "has 4 images"), (2, "none", "no folders")])
def test_too_few_images_are_refused(tmp_path, per_class, folder, message):
    drawn_folder(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        sample.write_sample(tmp_path / folder, tmp_path / "a", per_class, seed=0)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_hparam_is_one_that_something_reads(row):
    check_hparams({"model": "tiny", **row.hparams}, row.algorithm)


def test_rows_take_equal_updates_and_rounds_share_them():
    assert {row.hparams["batch_size"] for row in ROWS} == {3}
    assert [stage.steps for stage in plan_stages([1, 1, 1, 1], 1, run.DEFAULTS["steps"]).stages] == [6, 5, 5, 4]


def test_grid_and_run_have_different_trial_seeds_and_the_grid_one_target(tmp_path):
    settings = Settings("tiny", tmp_path, 2, 1)
    assert {job.arguments["trial_seed"] for _, _, job in rows.grid(settings)} == {0}
    assert {tuple(job.arguments["test_envs"]) for _, _, job in rows.grid(settings)} == {(0,)}
    write_rates(tmp_path)
    jobs = [job for _, _, job in rows.cells(settings)]
    assert {job.arguments["trial_seed"] for job in jobs} == {1}
    assert len({job.folder for job in jobs}) == len(jobs) == 1 + 4 * 5


def test_best_rate_is_the_lower_one_on_a_tie():
    assert rows.best_rates({"MTCT": {1.5e-3: 0.4, 5e-4: 0.4, 1.5e-4: 0.3}}) == {"MTCT": 5e-4}
    other_order = (0.1 + 0.2) + 0.3, 0.1 + (0.2 + 0.3)
    assert other_order[0] != other_order[1]
    assert rows.best_rates({"MTCT": {1.5e-4: min(other_order), 5e-4: max(other_order)}}) == {"MTCT": 1.5e-4}


def test_rounds_take_the_rate_of_mtct(tmp_path):
    (tmp_path / rows.RATES_FILE).write_text(json.dumps({"rates": {"LabelSFT": 1.0, "ReasoningSFT": 2.0, "MTCT": 3.0}}))
    rates = {row.name: json.loads(job.arguments["hparams"]).get("lr") for row, _, job in
             rows.cells(Settings("tiny", tmp_path, 2, 1))}  # fmt: skip
    assert rates == {"MLLMZeroShot": None, "LabelSFT": 1.0, "ReasoningSFT": 2.0, "MTCT": 3.0, "RDMLDG": 3.0,
                     "RDMLDG balanced": 3.0}  # fmt: skip


def test_wilsons_interval():
    """8 of 10: center (0.8 + 0.19208) / 1.38416 = 0.7167, half width 1.96 √(0.016 + 0.009604) / 1.38416 = 0.2266."""
    assert table.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert table.wilson(0, 10)[0] == 0.0


def test_bad_settings_are_refused_with_what_to_do(tmp_path, capsys):
    output = ["--output_dir", str(tmp_path / "output")]
    assert run.main(["--run", *output]) == 1
    assert "records no model. Pass --model." in capsys.readouterr().err
    data = ["--model", "tiny", "--data_dir", str(drawn_folder(tmp_path / "data"))]
    assert run.main(["--run", *output, *data, "--per_class", "1"]) == 1
    assert "--per_class must be 2 or more; got 1." in capsys.readouterr().err
    assert run.main(["--run", *output, *data, "--per_class", "2"]) == 1
    assert "Run --choose first" in capsys.readouterr().err
    assert run.main(["--run", *output, "--steps", "7"]) == 1
    assert "steps: 20 -> 7" in capsys.readouterr().err


def test_unfinished_run_has_a_table(small, forked, tmp_path, capsys):
    """Zero-shot alone has run: the table counts 20 missing jobs."""
    output = tmp_path / "output"
    assert small("--run") == 1
    write_rates(output)
    job = rows.cells(Settings("tiny", output, 2, 1))[0][2]
    assert launch([job], output) == 0 and job.done
    assert small("--table") == 0
    assert "1 of 21 jobs completed" in capsys.readouterr().out
    results = tmp_path / "results"
    assert "20 of 21 jobs are missing" in (results / "table.md").read_text()
    found = json.loads((results / "numbers.json").read_text())
    zero_shot = found["rows"][ZERO_SHOT.name]
    assert found["missing"] == 20 and zero_shot["average"]["domainbed"]["domains"] == 4
    assert {"domainbed", "label", "chain", "well_formed", "unparsed"} <= zero_shot["targets"]["0"].keys()
    assert (results / sample.RECORD).exists() and "MLLMZeroShot: `" in (results / "chains.md").read_text()


@pytest.mark.slow
def test_whole_run_chooses_trains_and_measures(small, forked, tmp_path):
    assert small("--choose") == 0
    chosen = json.loads((tmp_path / "output" / rows.RATES_FILE).read_text())
    scores = {name: {float(rate): score for rate, score in of_row.items()}
              for name, of_row in chosen["source_validation"].items()}  # fmt: skip
    assert chosen["rates"] == rows.best_rates(scores) and all(len(of_row) == 3 for of_row in scores.values())
    assert small("--run") == 0
    ended = {path: path.stat().st_mtime_ns for path in (tmp_path / "output").rglob("done")}
    assert len(ended) == 9 + 21
    assert small("--run") == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "output").rglob("done")} == ended
    assert small("--table") == 0
    found = json.loads((tmp_path / "results" / "numbers.json").read_text())
    assert found["missing"] == 0 and len(found["comparisons"]) == len(table.COMPARISONS)
    for row in ROWS[1:]:
        for training in found["rows"][row.name]["training"].values():
            assert training["before"]["images"] == training["after"]["images"] > 0
            assert training["after"]["chain"]["gradient_norm"] > 0
