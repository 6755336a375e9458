"""DomainBed's public behavior, identical in the stand-in and the real library."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Seen = dict[str, Any]
Run = Callable[..., Any]  # conftest.run_python

FLAGS = {
    "train": "data_dir dataset algorithm task hparams hparams_seed trial_seed seed steps checkpoint_freq test_envs "
    "output_dir holdout_fraction uda_holdout_fraction skip_model_save save_model_every_checkpoint",
    "sweep": "datasets algorithms task n_hparams_from n_hparams output_dir data_dir seed n_trials command_launcher "
    "steps hparams holdout_fraction single_test_envs skip_confirmation",
    "collect_results": "input_dir latex auto_lr",
    "list_top_hparams": "input_dir dataset algorithm test_env",
}
COMMON_HPARAMS = (
    "data_augmentation resnet18 resnet50_augmix dinov2 vit vit_attn_tune freeze_bn lars linear_steps resnet_dropout "
    "vit_dropout class_balanced nonlinear_classifier lr weight_decay batch_size"
).split()


def test_names_and_counts_are_the_documented_ones(seen: Seen) -> None:
    """Environments as in the papers; Debug sets keep the base class's 100 steps a checkpoint."""
    names = seen["names"]
    assert names["algorithms"] == ["ERM", "IRM", "GroupDRO", "Mixup", "CORAL"]
    assert names["launchers"] == ["dummy", "local", "multi_gpu"]
    assert names["classes"]["PACS"]["ENVIRONMENTS"] == ["A", "C", "P", "S"]
    assert names["classes"]["TerraIncognita"]["ENVIRONMENTS"] == ["L100", "L38", "L43", "L46"]
    assert names["counts"] == {name: len(c["ENVIRONMENTS"]) for name, c in names["classes"].items()}
    assert {name: c["CHECKPOINT_FREQ"] for name, c in names["classes"].items()} == {
        **dict.fromkeys(["Debug28", "Debug224"], 100),
        **dict.fromkeys(["VLCS", "PACS", "OfficeHome", "TerraIncognita", "SVIRO"], 300),
        "DomainNet": 1000,
    }
    assert {(c["N_STEPS"], c["N_WORKERS"]) for c in names["classes"].values()} == {(5001, 8)}
    assert names["errors"][0] == "NotImplementedError: Algorithm not found: Nope"
    assert names["errors"][1] == "NotImplementedError: Dataset not found: Nope"
    assert [text.partition(":")[0] for text in names["errors"][2:]] == ["NotImplementedError"] * 2
    assert names["stores_the_same_hparams"]


def test_seed_hash_is_md5_of_the_arguments_modulo_two_to_the_31(seen: Seen) -> None:
    """md5("(0,)"), md5("(1, 'a')"), …: the text of the tuple."""
    arguments = [(0,), (1, "a"), ("Debug28", "ERM", [0], 0, 0), ([1, 2],), (3, 4)]
    expected = [int(hashlib.md5(str(each).encode()).hexdigest(), 16) % 2**31 for each in arguments]
    assert seen["seeds"]["hashes"] == expected


def test_splits_are_a_seeded_shuffle_cut_in_two(seen: Seen) -> None:
    """Indices 0…size-1 shuffled by RandomState(seed): the first n are held out."""
    assert len(seen["seeds"]["splits"]) == 4
    for key, (held, rest) in seen["seeds"]["splits"].items():
        size, n, seed = map(int, key.split())
        order = list(range(size))
        np.random.RandomState(seed).shuffle(order)
        assert held == [100 + i for i in order[:n]]
        assert rest == [100 + i for i in order[n:]]


def test_measures_are_those_worked_by_hand(seen: Seen) -> None:
    """Predictions 0, 2, 1, 0 against 0, 2, 0, 1: two of four; weights 1, 2, 3, 4: 3 of 10.

    Balanced: labels 1, 1, 0, 2; three classes of weight 1/3 each, the first shared by two items.
    """
    measures = seen["measures"]
    assert measures["accuracy"] == 0.5
    assert measures["weighted"] == pytest.approx(0.3)
    assert measures["training_again"]
    assert measures["balanced"] == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3])
    plain, latex = measures["rows"].splitlines()
    assert plain == "name          bbbbbbbbbbbb  0.1250000000  3             True          2.0000000000 "
    assert latex == "name   & 0.5000 & None   \\\\"


def test_hparams_have_the_common_names_and_the_defaults(seen: Seen) -> None:
    """Small images: lr 1e-3 and batches of 64; the others 5e-5 and 32."""
    small, large = (seen["hparams"][f"ERM {dataset}"][0] for dataset in ("Debug28", "PACS"))
    assert sorted(small) == sorted(large) == sorted(COMMON_HPARAMS)
    assert (small["lr"], small["batch_size"], large["lr"], large["batch_size"]) == (1e-3, 64, 5e-5, 32)
    assert all(seen["hparams"]["ERM PACS"][draw]["lr"] != 5e-5 for draw in (1, 2, 3))
    assert set(seen["hparams"]["IRM PACS"][0]) - set(large) == {"irm_lambda", "irm_penalty_anneal_iters"}


def test_fast_loader_gives_every_item_once_a_pass_from_the_same_worker(seen: Seen) -> None:
    """Ten items in batches of four: 4, 4, 2."""
    loaders = seen["loaders"]
    assert loaders["length"] == 3
    for one_pass in loaders["passes"]:
        assert [len(batch) for batch in one_pass] == [4, 4, 2]
        assert sorted(item for batch in one_pass for item in batch) == list(range(10))
    assert loaders["passes"][0] != loaders["passes"][1]
    assert loaders["same_worker"]


def test_infinite_loader_draws_full_batches_with_replacement(seen: Seen) -> None:
    """Fifty batches of ten items in fours are more than one pass; weights 1 and 3 leave items 2 and 3 only."""
    drawn = seen["loaders"]["drawn"]
    assert {len(batch) for batches in drawn.values() for batch in batches} == {4}
    assert any(len(set(batch)) < 4 for batch in drawn["uniform"])
    assert {item for batch in drawn["uniform"] for item in batch} == set(range(10))
    weighted = [item for batch in drawn["weighted"] for item in batch]
    assert set(weighted) == {2, 3}
    assert 120 < weighted.count(3) < 180  # 150 expected of 200, standard deviation 6.1
    assert seen["loaders"]["endless_length"] == "ValueError"


def test_erm_update_is_a_step_of_adam_on_the_joint_cross_entropy(seen: Seen) -> None:
    """Two steps against the same network stepped by hand."""
    stepped, by_hand = seen["updates"]["by_hand"]["losses"]
    assert stepped == pytest.approx(by_hand, abs=1e-6)
    assert stepped[0] != stepped[1]
    assert seen["updates"]["by_hand"]["gap"] < 1e-5


def test_updates_return_floats_under_the_documented_keys(seen: Seen) -> None:
    """ERM, GroupDRO and Mixup report the loss; the others their penalty too."""
    keys = {name: each["keys"] for name, each in seen["updates"].items() if isinstance(each, dict) and "keys" in each}
    loss, penalised = ["loss"], ["loss", "penalty"]
    expected = {"ERM": loss, "IRM": ["loss", "nll", "penalty"], "GroupDRO": loss, "Mixup": loss, "CORAL": penalised}
    assert keys == expected
    assert {tuple(seen["updates"][name]["types"]) for name in keys} == {("float",)}
    assert {tuple(seen["updates"][name]["predicts"]) for name in keys} == {(6, 2)}
    assert seen["updates"]["coral_of_equal_batches"] == pytest.approx(0, abs=1e-9)
    assert sum(seen["updates"]["group_weights"]) == pytest.approx(1)


def test_image_folders_are_read_in_alphabetical_order(seen: Seen) -> None:
    """The folders' names decide the environments' numbers, the classes' names their labels."""
    images = seen["images"]
    assert images["folders"] == ["art_painting", "cartoon", "photo", "sketch"]
    assert images["classes"] == ["cat", "dog"]
    assert (images["shape"], images["num_classes"]) == ([3, 224, 224], 2)
    assert images["labels"] == [[0, 1]] * 4
    assert images["missing"] == "FileNotFoundError"


def test_only_training_environments_are_augmented(seen: Seen) -> None:
    """A test environment's tensors are the plain ones; the others change with the seed."""
    images = seen["images"]
    assert images["test_environment"] == images["evaluation"][2:4]
    assert images["generic"] == images["evaluation"]
    assert len(set(images["training"])) == 9
    assert not set(images["training"]) & set(images["evaluation"])


@pytest.mark.parametrize("script", FLAGS)
def test_commands_have_the_documented_flags(seen: Seen, script: str) -> None:
    """The usage line that an unknown flag brings up."""
    found = seen["flags"][script]
    assert found["status"] == 2
    assert set(re.findall(r"--(\w+)", found["err"].partition("error:")[0])) == set(FLAGS[script].split())


def lines(seen: Seen, name: str, start: str) -> list[str]:
    """Return the lines of a sweep's output that begin with ``start``."""
    return [line for line in seen["sweep"][name]["out"].splitlines() if line.startswith(start)]


def test_sweep_prints_a_line_a_job_in_order(seen: Seen) -> None:
    """2 trials × 2 algorithms × (3 single and 3 pairs of) environments × 2 hparams seeds = 48 jobs."""
    shown = [ast.literal_eval(line[line.index("(") :]) for line in lines(seen, "declined", "Not launched: ")]
    tests = [[0], [0, 1], [0, 2], [1], [1, 2], [2]]
    assert shown == 2 * [("Debug28", a, t, h) for a in ("ERM", "CORAL") for t in tests for h in (0, 1)]
    assert seen["sweep"]["declined"]["out"].endswith(
        "48 jobs: 0 done, 0 incomplete, 48 not launched.\nAbout to launch 48 jobs.\nAre you sure? (y/n) Nevermind!\n"
    )
    assert seen["sweep"]["nothing_made"]
    assert seen["sweep"]["declined"]["status"] == 0


def test_sweep_commands_and_folders_follow_from_the_arguments(seen: Seen) -> None:
    """The folder is the md5 of the arguments as sorted JSON, without output_dir; flags come in alphabetical order."""
    commands = lines(seen, "launched", "Dummy launcher: ")
    assert len(commands) == len(set(commands)) == 48
    assert seen["sweep"]["launched"]["out"].endswith("Launched 48 jobs!\n")
    for line in commands:
        words = shlex.split(line.removeprefix("Dummy launcher: python -m domainbed.scripts.train "))
        flags = [word[2:] for word in words if word.startswith("--")]
        assert flags == (
            "algorithm data_dir dataset holdout_fraction hparams_seed output_dir seed task test_envs trial_seed".split()
        )
        values = {key: words[words.index(f"--{key}") + 1] for key in flags}
        at = words.index("--test_envs") + 1
        job: dict[str, Any] = {key: values[key] for key in ("algorithm", "data_dir", "dataset", "task")}
        job |= {key: int(values[key]) for key in ("hparams_seed", "seed", "trial_seed")}
        job |= {"holdout_fraction": 0.2, "test_envs": [int(word) for word in words[at : words.index("--trial_seed")]]}
        assert values["data_dir"] == "a b"
        assert values["output_dir"] == "jobs/" + hashlib.md5(json.dumps(job, sort_keys=True).encode()).hexdigest()
        parts = (job["dataset"], job["algorithm"], job["test_envs"], job["hparams_seed"], job["trial_seed"])
        assert job["seed"] == int(hashlib.md5(str(parts).encode()).hexdigest(), 16) % 2**31


def test_sweep_options_reach_the_commands(seen: Seen) -> None:
    """Hparams seeds from 1 up to 2, three single environments, two algorithms, two trials: 12 jobs."""
    commands = lines(seen, "options", "Dummy launcher: ")
    assert len(commands) == 12
    for line in commands:
        assert line.count("--hparams '{\"lr\": 0.5}' --hparams_seed 1 --output_dir other/") == 1
        assert line.count(" --steps 7 --task domain_generalization --test_envs ") == 1
        assert line.count(" --holdout_fraction 0.1 ") == 1
    assert "Are you sure" not in seen["sweep"]["options"]["out"]


def test_sweep_states_follow_the_folders(seen: Seen) -> None:
    """Three of 48 folders hold ``done``; the others go when asked for."""
    assert len(lines(seen, "again", "Done: jobs/")) == 3
    assert len(lines(seen, "again", "Incomplete: jobs/")) == 45
    assert "48 jobs: 3 done, 45 incomplete, 0 not launched.\n" in seen["sweep"]["again"]["out"]
    assert seen["sweep"]["again"]["out"].endswith("Launched 0 jobs!\n")
    assert "About to delete 45 jobs.\n" in seen["sweep"]["deleted"]["out"]
    assert seen["sweep"]["deleted"]["out"].endswith("Deleting...\nDeleted 45 jobs!\n")
    assert seen["sweep"]["left"] == seen["sweep"]["done"]


def test_training_writes_records_of_the_documented_shape(seen: Seen) -> None:
    """16 images an environment, int(16·0.2) = 3 held out, 13 left: 3.25 batches of 4 an epoch."""
    run = seen["training"]["erm"]
    accuracies = {f"env{i}_{split}_acc" for i in range(3) for split in ("in", "out")}
    keys = accuracies | {"step", "epoch", "step_time", "mem_gb", "loss", "hparams", "args"}
    assert [record["step"] for record in run["records"]] == [0, 2, 3]
    assert [record["epoch"] for record in run["records"]] == pytest.approx([0, 2 / 3.25, 3 / 3.25])
    for record in run["records"]:
        assert set(record) == keys
        assert all(isinstance(record[key], float) for key in keys - {"step", "hparams", "args"})
        for key in accuracies:
            right = record[key] * (3 if "out" in key else 13)
            assert right == pytest.approx(round(right))
        assert set(record["args"]) == set(FLAGS["train"].split())
        assert record["args"]["test_envs"] == [0]
        assert record["hparams"]["batch_size"] == 4
        assert record["mem_gb"] == 0
    assert run["line"] == json.dumps(run["records"][0], sort_keys=True)
    files = [name for name in run["files"] if name != "versions.json"]  # ours, where the plug-in is installed
    assert files == ["done", "err.txt", "model.pkl", "out.txt", "results.jsonl"]


def test_training_reports_update_values_and_every_split(seen: Seen) -> None:
    """IRM's three values; unlabelled halves (6 of 13) of the test environments in domain adaptation."""
    pair, adapt = seen["training"]["pair"], seen["training"]["adapt"]
    assert [record["step"] for record in pair["records"]] == [0, 1]
    assert {"loss", "nll", "penalty"} < set(pair["records"][0])
    assert {"model_step0.pkl", "model_step1.pkl", "model.pkl"} < set(pair["files"])
    assert {key for key in adapt["records"][0] if "uda" in key} == {"env0_uda_acc"}
    assert adapt["records"][1]["epoch"] == pytest.approx(1 / (7 / 4))


def test_training_keeps_the_model_with_its_arguments(seen: Seen) -> None:
    """Two test environments of three leave one domain."""
    model = seen["training"]["pair"]["model"]
    assert model["model_input_shape"] == [3, 28, 28]
    assert (model["model_num_classes"], model["model_num_domains"]) == (2, 1)
    assert model["args"] == seen["training"]["pair"]["records"][0]["args"]
    assert model["model_hparams"] == seen["training"]["pair"]["records"][0]["hparams"]
    assert {"featurizer", "classifier", "network"} <= set(seen["training"]["pair"]["weights"])
    assert "model.pkl" not in seen["training"]["random"]["files"]


def test_training_prints_arguments_and_rows(seen: Seen) -> None:
    """A head row, then one row a record, twelve characters a cell."""
    out = seen["training"]["erm"]["out"]
    assert "Args:\n\talgorithm: ERM\n\tcheckpoint_freq: 2\n" in out
    assert "HParams:\n\tbatch_size: 4\n\tclass_balanced: False\n" in out
    head, *rows = out.splitlines()[-4:]
    assert head.split() == sorted(set(seen["training"]["erm"]["records"][0]) - {"hparams", "args"})
    assert [row.split()[head.split().index("step")] for row in rows] == ["0", "2", "3"]
    assert {len(row) for row in (head, *rows)} == {14 * len(head.split()) - 1}


def test_random_hparams_depend_on_both_seeds(seen: Seen) -> None:
    """hparams_seed 3 in trial 2 draws with seed_hash(3, 2); --hparams overrides."""
    record = seen["training"]["random"]["records"][0]
    seed = int(hashlib.md5(b"(3, 2)").hexdigest(), 16) % 2**31
    draw = np.random.RandomState(int(hashlib.md5(f"({seed}, 'lr')".encode()).hexdigest(), 16) % 2**31)
    assert record["hparams"]["lr"] == pytest.approx(10 ** draw.uniform(-4.5, -2.5), rel=1e-12)
    assert record["hparams"]["batch_size"] == 4


def test_selection_methods_choose_as_worked_by_hand(seen: Seen) -> None:
    """Target 0; hparams seed 0 is jobs a, c, d; seed 1 is jobs b and e (no run without 0 and 2).

    Training-domain: a: step 0 (0.2+0.4)/2 = 0.3, step 1 (0.6+0.2)/2 = 0.4, takes step 1's 0.12; b: 0.2 and 0.3,
    takes 0.14. Leave-one-out: seed 0: step 0 (0.7+0.5)/2 = 0.6, step 1 (0.2+0.9)/2 = 0.55, takes step 0's 0.11;
    seed 1 lacks {0, 2}.
    Oracle: last steps; a: validated by 0.1, b: by 0.8, takes 0.14.
    """
    chosen = seen["selection"]
    iid, loo, oracle = (chosen[f"{n}SelectionMethod"] for n in ("IIDAccuracy", "LeaveOneOut", "Oracle"))
    assert iid["name"] == "training-domain validation set"
    assert loo["name"] == "leave-one-domain-out cross-validation"
    assert oracle["name"] == "test-domain validation set (oracle)"
    found = [[(pytest.approx(each["val_acc"]), each["test_acc"]) for each in m["ranking"]] for m in (iid, loo, oracle)]
    assert found == [[(0.4, 0.12), (0.3, 0.14)], [(0.6, 0.11)], [(0.8, 0.14), (0.1, 0.12)]]
    assert [method["chosen"] for method in (iid, loo, oracle)] == [0.12, 0.11, 0.14]
    assert [method["only_pairs"] for method in (iid, loo, oracle)] == [None, None, None]
    assert sorted(chosen["groups"]) == [[0, 10], [1, 4], [2, 2]]


def test_tables_show_means_errors_and_gaps(seen: Seen) -> None:
    """One trial, no pairs: errors of 0.0, and nothing to choose by leave-one-out."""
    found = seen["tables"]["sets"]["no_pairs"]["txt"]
    assert found["printed"] == found["kept"]
    text = found["printed"].splitlines()
    assert text[0] == "Total records: 12"
    assert text[2] == "-------- Dataset: VLCS, model selection method: training-domain validation set"
    assert text[3] == "  ".join(cell.ljust(20) for cell in ("Algorithm", "C", "L", "S", "V", "Avg")) + " "
    row = re.fullmatch(r"ERM {17}  " + r"(\d+\.\d) \+/- 0\.0 +" * 4 + r"(\d+\.\d) +", text[4])
    assert row is not None
    *cells, average = map(float, row.groups())
    assert average == pytest.approx(sum(cells) / 4, abs=0.11)
    assert text[
        text.index("-------- Dataset: VLCS, model selection method: leave-one-domain-out cross-validation") + 2
    ] == ("  ".join(cell.ljust(20) for cell in ("ERM", *"XXXXX")) + " ")


def test_a_visiting_class_sees_the_arguments_and_sets_the_steps(seen: Seen) -> None:
    """What a plug-in builds on: ``__main__.args``, one hparams object for both, steps from the dataset's instance."""
    visit = seen["visit"]
    assert visit["met"] == [[None, "visit", [1]], [[3, 28, 28], 2, 2], True]
    assert [record["step"] for record in visit["records"]] == [0, 2]


def test_a_visiting_launcher_runs_a_sweep_that_is_collected(seen: Seen) -> None:
    """Three jobs, done; each oracle cell of the table is the accuracy in the job's last record."""
    found = seen["visiting_launcher"]
    assert found["commands"] == found["done"] == 3
    accuracy = {r["args"]["test_envs"][0]: r for r in found["records"]}
    cells = [f"{100 * accuracy[target][f'env{target}_in_acc']:.1f} +/- 0.0" for target in range(3)]
    oracle = found["table"][found["table"].index("(oracle)") :].splitlines()[2]
    assert re.split(r"  +", oracle.strip())[1:4] == cells


def test_local_launcher_runs_every_command_in_order_whatever_fails(seen: Seen) -> None:
    """The second of three fails."""
    assert seen["local_launcher"] == "first\nthird\n"


def test_the_stand_in_rejects_a_batch_larger_than_every_environment(python: Run, tmp_path: Path) -> None:
    """Where the real library would wait for ever: 13 images, batches of 14."""
    words = ["--dataset", "Debug28", "--data_dir", "x", "--hparams", '{"batch_size": 14}']
    result = python("standin", "-m", "domainbed.scripts.train", *words, cwd=tmp_path)
    assert result.returncode == 1
    assert "batch_size 14 is larger than the 13 items" in (tmp_path / "train_output" / "err.txt").read_text()


def test_the_stand_in_announces_itself(python: Run, tmp_path: Path) -> None:
    """On stderr, so that tables stay comparable."""
    result = python("standin", "-m", "domainbed.scripts.collect_results", "--input_dir", ".", cwd=tmp_path)
    assert result.stderr.startswith("stand-in for DomainBed: ")
    assert result.stdout.startswith("Total records: 0\n")
    told = python("standin", "-c", "import domainbed; print(domainbed.STANDIN)", cwd=tmp_path)
    assert told.stdout == "True\n"


@pytest.mark.parametrize(
    "observation", ["names", "seeds", "measures", "hparams", "loaders", "images", "debug", "selection"]
)
def test_both_implementations_observe_the_same(both: tuple[Seen, Seen], observation: str) -> None:
    """Splits, draws, hparams, weights and the bits of every image tensor (transforms with a fixed seed)."""
    standin, upstream = both
    if observation == "names":
        standin, upstream = ({"names": {**each["names"], "errors": each["names"]["errors"][:2]}} for each in both)
    assert standin[observation] == upstream[observation]


def test_both_print_the_same_tables_character_for_character(both: tuple[Seen, Seen]) -> None:
    """Fifteen seeded folders of records, plain and LaTeX, printed and kept."""
    standin, upstream = (each["tables"]["sets"] for each in both)
    assert set(standin) == set(upstream) and len(standin) == 15
    for name, found in standin.items():
        for kind, texts in found.items():
            assert texts["printed"] == upstream[name][kind]["printed"], (name, kind)
            assert texts["kept"] == upstream[name][kind]["kept"], (name, kind)


def test_both_list_the_same_top_hparams(both: tuple[Seen, Seen]) -> None:
    """Ties included."""
    assert both[0]["tables"]["lists"] == both[1]["tables"]["lists"]
    assert all("hparams:" in text for text in both[0]["tables"]["lists"].values())


def test_both_sweep_alike(both: tuple[Seen, Seen]) -> None:
    """The same lines; the commands come in a random order on both."""
    standin, upstream = (each["sweep"] for each in both)
    for name in ("declined", "launched", "again", "deleted", "options"):
        assert sorted(standin[name]["out"].splitlines()) == sorted(upstream[name]["out"].splitlines())
        assert standin[name]["status"] == upstream[name]["status"]
    assert standin["left"] == upstream["left"]


def test_both_write_the_same_record_keys_types_and_arguments(both: tuple[Seen, Seen]) -> None:
    """All but what the networks and the clock decide."""
    standin, upstream = (each["training"] for each in both)
    for run in ("erm", "pair", "adapt", "random"):
        assert standin[run]["files"] == upstream[run]["files"]
        for one, other in zip(standin[run]["records"], upstream[run]["records"], strict=True):
            assert {key: type(value) for key, value in one.items()} == {
                key: type(value) for key, value in other.items()
            }
            fixed = ("args", "hparams", "step", "epoch", "mem_gb")
            assert [one[key] for key in fixed] == [other[key] for key in fixed]
