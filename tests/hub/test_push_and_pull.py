"""`push` and `pull` against a local server with the Hub's endpoints: what goes, what does not, what comes back."""

import json

import pytest

from builders.files import HPARAMS, TASK
from builders.hub_server import TOKEN, hub_variables, serve_hub
from builders.processes import start_verb
from domainbed_reasoning.hub import fetch

CARD = "---\nlicense: {license}\n---\n# Chains\n"


@pytest.fixture
def hub():
    with serve_hub() as hub:
        yield hub


@pytest.fixture
def run(hub, tmp_path):
    """``run("push", …)`` runs a verb in a process that takes the local server for the Hub."""

    def run(*arguments, **variables):
        process = start_verb(*arguments, **hub_variables(hub, tmp_path / "hf", **variables))
        out, err = process.communicate(timeout=600)
        assert TOKEN not in out + err
        return process.returncode, out, err

    yield run
    written = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not written


@pytest.fixture
def adapter(tmp_path):
    """The files of an export, of a job on a model at a local path, and others beside them."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    task = TASK | {"hparams": HPARAMS | {"model": "/data/models/My-VLM-hf", "chains": "/data/PACS/mine.jsonl"}}
    (folder / "task.json").write_text(json.dumps(task))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/My-VLM-hf"}))
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 4000)
    (folder / "README.md").write_text(CARD.format(license="mit"))
    (folder / "model.pkl").write_bytes(b"pickle")
    (folder / "tokenizer.json").symlink_to("/etc/hostname")
    return folder


@pytest.fixture
def chains(tmp_path):
    folder = tmp_path / "chains"
    folder.mkdir()
    (folder / "README.md").write_text(CARD.format(license="other"))
    (folder / "chains.parquet").write_bytes(b"PAR1" * 100)
    return folder


def test_a_dry_run_lists_what_would_go_and_asks_the_hub_nothing(hub, run, adapter):
    code, out, err = run("push", adapter, "me/sketch", "--dry-run", token="")
    assert (code, err, hub.requests) == (0, "", [])
    assert "1,024,000  adapter_model.safetensors" in out and "Dry run: nothing was uploaded." in out
    assert "not uploaded: model.pkl" in out and "not uploaded: tokenizer.json" in out


def test_what_is_listed_is_uploaded_to_a_private_repository_and_comes_back(hub, run, adapter, tmp_path):
    code, out, err = run("push", adapter, "me/sketch")
    assert code == 0, err
    repo = hub.repos["model", "me/sketch"]
    assert repo["private"] is True
    listed = {line.split()[-1] for line in out.splitlines() if line.startswith("  ") and "not uploaded" not in line}
    assert listed == set(repo["files"]) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "task.json",
    }  # fmt: skip
    task = json.loads(repo["files"]["task.json"])
    assert (task["hparams"]["model"], task["hparams"]["chains"]) == ("someone/My-VLM-hf", "mine.jsonl")
    assert [path for path in hub.requests if path.startswith("POST /api/models/me/sketch/commit")] == [
        "POST /api/models/me/sketch/commit/main"
    ]
    repo["files"] |= {"model.pkl": b"pickle", "../../escape.json": b"{}", "modeling.py": b"import os"}
    code, out, err = run("pull", "me/sketch", "--output", tmp_path / "back")
    assert code == 0, err
    back = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    assert back == {name: repo["files"][name] for name in listed}
    assert not list(tmp_path.parent.glob("escape*"))
    assert run("pull", "me/sketch", "--output", tmp_path / "back")[0] == 1  # not empty


def test_an_interrupted_download_is_resumed(hub, run, adapter, tmp_path):
    files = {path.name: path.read_bytes() for path in adapter.iterdir() if path.name != "tokenizer.json"}
    hub.add("model", "me/sketch", files)
    assert "Dry run" in run("pull", "me/sketch", "--output", tmp_path / "back", "--dry-run")[1]
    assert not (tmp_path / "back").exists()
    hub.refuses = r"resolve/.*/task\.json"
    code, _, err = run("pull", "me/sketch", "--output", tmp_path / "back")
    assert code == 1 and err.startswith("The Hub: ")
    hub.refuses, before = None, len(hub.requests)
    assert run("pull", "me/sketch", "--output", tmp_path / "back")[0] == 0
    assert not any(line.startswith("GET") and "safetensors" in line for line in hub.requests[before:])
    assert (tmp_path / "back" / "task.json").read_bytes() == files["task.json"]


def test_a_file_that_is_not_what_the_hub_lists_is_refused_and_removed(hub, run, adapter, tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in adapter.iterdir() if path.name != "tokenizer.json"}
    hub.add("model", "me/sketch", files)
    listed = hub.info("model", "me/sketch")
    hub.info = lambda kind, name: listed
    hub.repos["model", "me/sketch"]["files"]["adapter_model.safetensors"] = bytes(1_024_000)
    code, _, err = run("pull", "me/sketch", "--output", tmp_path / "back")
    assert code == 1 and "adapter_model.safetensors differs from what the Hub lists" in err
    assert not (tmp_path / "back" / "adapter_model.safetensors").exists()


def test_chains_need_a_license_to_be_public(hub, run, chains, tmp_path):
    code, _, err = run("push", chains, "me/PACS-Reasoning", "--public")
    assert code == 1 and "names no license for the chains" in err and "--license" in err
    assert hub.requests == []
    assert run("push", chains, "me/PACS-Reasoning")[0] == 0
    assert hub.repos["dataset", "me/PACS-Reasoning"]["private"] is True
    (chains / "README.md").write_text(CARD.format(license="cc-by-4.0"))
    assert run("push", chains, "me/Open-Reasoning", "--public")[0] == 0
    assert hub.repos["dataset", "me/Open-Reasoning"]["private"] is False
    assert run("pull", "datasets/me/Open-Reasoning", "--output", tmp_path / "back")[0] == 0
    assert (tmp_path / "back" / "chains.parquet").read_bytes() == b"PAR1" * 100


def test_a_public_repository_is_not_written_to_by_accident(hub, run, adapter):
    hub.add("model", "me/sketch", {}, private=False)
    code, _, err = run("push", adapter, "me/sketch")
    assert code == 1 and "me/sketch is a public repository. Pass --public" in err
    assert hub.repos["model", "me/sketch"]["files"] == {}


def test_an_error_of_the_hub_is_one_line_without_the_token(hub, run, adapter):
    """The stand-in sends the header back, as a careless proxy would."""
    hub.refuses = "repos/create"
    code, _, err = run("push", adapter, "me/sketch")
    assert code == 1 and len(err.splitlines()) == 1 and "403" in err
    code, _, err = run("push", adapter, "me/sketch", token="")
    assert code == 1 and err == "No access token for the Hub. Set HF_TOKEN, or run `hf auth login`.\n"


def spoil(folder, name, text):
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("adapter_config.json", '{"base_model_name_or_path": "/home/me/model"}', "Export again with --base-model-id"),
        ("README.md", f"token: {TOKEN}", "contains what looks like an access token"),
        ("tokenizer_config.json", '{"name_or_path": "%s/model"}', "contains the local path"),
    ],
)
def test_what_must_not_be_published_is_refused_before_anything_is_sent(verb, adapter, tmp_path, name, text, message):
    spoil(adapter, name, text.replace("%s", str(adapter)))
    code, out, err = verb("push", adapter, "me/sketch", "--dry-run")
    assert (code, out) == (1, "") and message in err and TOKEN not in err
    spoil(adapter, "README.md", "")  # the fixture looks for the token in files


@pytest.mark.parametrize("words", [("push", ".", "not-a-repository"), ("pull", "a/b/c", "--output", "x")])
def test_names_that_are_no_repositories_are_refused(verb, words):
    code, _, err = verb(*words)
    assert code == 2 and "must be USER/NAME" in err
    code, _, err = verb("get-data", "PACS", "--from", "hub:pacs", "--data-dir", ".")
    assert code == 2 and "--from: hub: must be USER/NAME; got 'pacs'" in err


def test_a_folder_that_is_no_export_is_refused(verb, tmp_path):
    code, _, err = verb("push", tmp_path, "me/x", "--dry-run")
    assert code == 1 and "is not an export" in err


@pytest.mark.parametrize("is_filled_by_the_hub", [False, True])
def test_a_folder_with_a_cache_of_the_hub_is_not_taken_for_an_interrupted_download(
    hub, run, adapter, tmp_path, is_filled_by_the_hub
):
    """A home folder has `.cache/huggingface` as well, and so has a model's folder that `hf download` filled."""
    hub.add("model", "me/sketch", {path.name: path.read_bytes() for path in adapter.iterdir()})
    home = tmp_path / "home"
    (home / ".cache" / "huggingface" / "hub").mkdir(parents=True)
    mine = [home / ".cache" / "huggingface" / "hub" / "weights", home / "README.md"]
    if is_filled_by_the_hub:
        mine += [home / "config.json", home / ".cache" / "huggingface" / "download.metadata"]
    for path in mine:
        path.write_text("mine")
    code, _, err = run("pull", "me/sketch", "--output", home)
    assert code == 1 and "is not empty" in err
    assert all(path.read_text() == "mine" for path in mine)


def test_a_wrong_file_in_the_hubs_cache_is_downloaded_again(tmp_path):
    """There it is a link to a blob; without the blob's removal, the next download would link it again."""
    blob, link = tmp_path / "blob", tmp_path / "snapshot"
    blob.write_bytes(b"wrong")
    link.symlink_to(blob)
    with pytest.raises(fetch.HubError, match="differs from what the Hub lists"):
        fetch.check(link, fetch.RemoteFile("x", 3, None))
    assert not blob.exists() and not link.is_symlink()
