"""A hub checkpoint pinned to a revision: a hub of two commits on 127.0.0.1, which notes what is asked of it."""

import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from safetensors.torch import load_file, save_file

from builders.processes import environment, run_python
from builders.training import write_trained_job
from domainbed_reasoning.files import format_version
from domainbed_reasoning.hparam_checks import check_value
from domainbed_reasoning.jobs.trained import JobError, read_job
from domainbed_reasoning.mllm import ModelError, load_mllm
from domainbed_reasoning.mllm.loading import TINY, image_edge
from domainbed_reasoning.registry import rows_of

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
NAME = "some/model"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The hub; ``hub.asked`` has the revisions under which files were asked for."""
    root = tmp_path_factory.mktemp("hub")
    for number, commit in enumerate(COMMITS.values()):
        shutil.copytree(TINY, root / commit)
        weights = load_file(root / commit / "model.safetensors")
        name = next(name for name in weights if "embed_tokens" in name)
        weights[name] = weights[name] * (1 + number)
        save_file(weights, root / commit / "model.safetensors", metadata={"format": "pt"})

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *given):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.partition("?")[0]
            file = re.fullmatch(rf"/{NAME}/resolve/([^/]+)/(.+)", path)
            listing = re.fullmatch(rf"/api/models/{NAME}(?:/(?:revision|tree)/([^/]+))?", path)
            found = file or listing
            if found is None:
                return self.answer(404)
            revision = found[1] or "main"
            commit = COMMITS.get(revision, revision)
            self.server.asked.append(revision)
            if commit not in COMMITS.values():
                return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            if listing:
                names = [path.name for path in (root / commit).iterdir()]
                tree = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in names]
                info = {"id": NAME, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
                body = json.dumps(tree if "/tree/" in path else info).encode()
                return self.answer(200, body, Content_Type="application/json")
            place = root / commit / file[2]
            if not place.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            body = place.read_bytes()
            etag = hashlib.sha256(body).hexdigest()
            return self.answer(200, body, ETag=f'"{etag}"', X_Repo_Commit=commit, Accept_Ranges="none")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def in_process(hub, tmp_path):
    """``in_process(code)`` runs code in a process that knows the hub, with a cache of the test's own."""

    def run(code, **variables):
        hub.asked.clear()
        endpoint = f"http://127.0.0.1:{hub.server_port}"
        env = environment(HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "home"), XDG_CACHE_HOME=str(tmp_path / "cache"))
        env = {name: value for name, value in env.items() if not name.endswith("_OFFLINE")} | variables
        done = run_python("-c", code, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.split()

    return run


LOAD = """
import sys
from domainbed_reasoning.mllm import load_mllm
from domainbed_reasoning.mllm.loading import config_of, empty_network, image_edge
from domainbed_reasoning.jobs.history import _files
for revision in {revisions}:
    print(image_edge("some/model", 1, revision), _files("some/model", revision))
    config_of("some/model", revision), empty_network("some/model", revision)
    mllm = load_mllm("some/model", revision=revision)
    print(round(float(mllm.base.get_input_embeddings().weight.abs().sum()), 3))
"""


def test_everything_is_read_at_the_revision_and_the_jobs_key_has_its_commit(in_process, hub):
    """Config, processor, weights, generation config; the second commit's embeddings are twice the first's."""
    edge, commit, pinned = in_process(LOAD.format(revisions=["v1"]))
    assert set(hub.asked) <= {"v1", COMMITS["v1"]} and "v1" in hub.asked
    assert (edge, commit) == ("48", COMMITS["v1"])
    edge, commit, free = in_process(LOAD.format(revisions=[None]))
    assert set(hub.asked) <= {"main", COMMITS["main"]} and commit == COMMITS["main"]
    assert float(pinned) == pytest.approx(2 * float(free), rel=1e-4)
    cached = in_process(LOAD.format(revisions=["v1", COMMITS["v1"]]), HF_HUB_OFFLINE="1")
    assert cached == ["48", COMMITS["v1"], pinned] * 2 and not hub.asked


def test_a_revision_that_the_hub_lacks_is_named(in_process):
    code = """
from domainbed_reasoning.mllm import ModelError, load_mllm
try:
    load_mllm("some/model", revision="v9")
except ModelError as error:
    print(error)
"""
    said = " ".join(in_process(code))
    assert "model 'some/model' has no revision 'v9' on the hub. Set the hparam revision to a branch, tag" in said
    offline = " ".join(in_process(code, HF_HUB_OFFLINE="1"))
    assert "'some/model' at revision 'v9' is not in the local cache and HF_HUB_OFFLINE is set" in offline


def test_a_folder_has_no_revisions(tmp_path):
    for model, what in ((str(TINY), "a folder"), ("tiny", "the embedded model")):
        for ask in (lambda model: load_mllm(model, revision="v1"), lambda model: image_edge(model, 1, "v1")):
            with pytest.raises(ModelError, match=f"revision 'v1' selects a version.*is {what}.*hf download"):
                ask(model)


@pytest.mark.parametrize("value", ["", "../main", "/etc", "a b", "-x", 1, "x" * 251, "a/../b", "a\n"])
def test_what_is_no_revision_is_refused(value):
    with pytest.raises(ValueError, match="hparam revision must be a branch, tag or commit of a hub repository, or nul"):
        check_value("revision", value, rows_of("MTCT")["revision"].allowed)


@pytest.mark.parametrize("value", [None, "main", "refs/pr/12", "v1.0-rc_2", "0123abc"])
def test_names_of_revisions_are_allowed(value):
    check_value("revision", value, rows_of("MTCT")["revision"].allowed)


@pytest.fixture(scope="module")
def job(algorithm_on, minibatches, tmp_path_factory):
    """A job of the embedded model, described as one of the hub's model at v1."""
    algorithm = algorithm_on("tiny", "MTCT", max_new_tokens=8)
    algorithm.update(minibatches)
    folder = write_trained_job(algorithm, tmp_path_factory.mktemp("jobs") / "job")
    file = folder / "task.json"
    task = json.loads(file.read_text())
    task["hparams"] |= {"model": NAME, "revision": "v1"}
    file.write_text(json.dumps(task))
    return folder


OF_A_JOB = """
import json, pathlib
from domainbed_reasoning.jobs.export import export_adapters, export_merged
from domainbed_reasoning.jobs.predict import load_job
def size(predictor):
    print(round(float(predictor.mllm.base.get_input_embeddings().weight.abs().sum()), 3))
size(load_job({job!r}))
export_adapters({job!r}, pathlib.Path("adapters"))
size(load_job("adapters"))
export_merged({job!r}, pathlib.Path("merged"))
size(load_job("merged"))
size(load_job({job!r}, model={tiny!r}))
"""


@pytest.mark.slow
def test_a_jobs_folder_and_its_exports_use_the_jobs_revision(job, in_process, hub, tmp_path):
    """A merged folder is whole, and another --model has no revision."""
    first, adapters, merged, other = in_process(OF_A_JOB.format(job=str(job), tiny=str(TINY)))
    assert set(hub.asked) <= {"v1", COMMITS["v1"]}
    assert first == adapters == merged and float(first) == pytest.approx(2 * float(other), rel=1e-4)
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (NAME, "v1")
    card = (tmp_path / "adapters" / "README.md").read_text()
    assert card.count(f'from_pretrained("{NAME}", revision="v1")') == 1 and '| revision | "v1" |' in card


def test_a_job_from_before_revisions_is_read_and_a_damaged_revision_is_refused(job, tmp_path):
    shutil.copytree(job, tmp_path / "job")
    file = tmp_path / "job" / "task.json"
    task = json.loads(file.read_text())
    del task[format_version.KEY], task["hparams"]["revision"], task["hparams"]["trust_remote_code"]
    file.write_text(json.dumps(task))
    assert read_job(tmp_path / "job").revision() is None
    task["hparams"]["revision"] = "../../x"
    file.write_text(json.dumps(task))
    with pytest.raises(JobError, match="'revision' cannot be '../../x'"):
        read_job(tmp_path / "job")
