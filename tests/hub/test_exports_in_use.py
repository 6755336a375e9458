"""What `export` writes, read by those it is for: `datasets`, TRL's collator for vision and language, plain PEFT."""

import importlib
import json

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard
from transformers import AutoModelForImageTextToText, AutoProcessor

from builders.files import HPARAMS, TASK, chain_text, define_toy, read_lines, write_images, write_job, write_lines
from domainbed_reasoning.jobs.export import export_adapters
from domainbed_reasoning.mllm import LoraSettings, load_mllm
from domainbed_reasoning.mllm.loading import resolve


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A dataset Toy with a chain for every image, and a rejected candidate."""
    data_dir = define_toy(monkeypatch, tmp_path)
    images = write_images(data_dir / "toy", ["photo", "sketch"], ["cat", "dog"], 2)
    records = [{"image": image, "chain": chain_text(image.split("/")[1], image)} for image in images]
    records.append({"image": images[0], "chain": "no chain", "verdict": "rejected", "rule": "stages", "extra": [1]})
    write_lines(data_dir / "toy" / "reasoning.jsonl", records)
    return "--dataset", "Toy", "--data-dir", data_dir


def huggingface_datasets():
    """Return the library `datasets`; its name alone may be this checkout's folder of that name."""
    pytest.importorskip("datasets.arrow_dataset")
    return importlib.import_module("datasets")


def test_a_messages_file_goes_through_datasets_into_trls_collator(toy, verb, tmp_path):
    datasets = huggingface_datasets()
    trl = pytest.importorskip("trl.trainer.sft_trainer")
    file = tmp_path / "toy.parquet"
    assert verb("export", file, "--format", "messages", "--embed-images", *toy)[0] == 0
    rows = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(rows.features["images"].feature, datasets.Image)
    assert len(rows) == 8 and rows[0]["images"][0].size == (40, 40)
    processor = AutoProcessor.from_pretrained(resolve("tiny"))
    batch = trl.DataCollatorForVisionLanguageModeling(processor)([rows[0], rows[5]])
    texts = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert batch["labels"].shape == batch["input_ids"].shape and len(batch["pixel_values"]) == 2
    for row, text in zip((rows[0], rows[5]), texts, strict=True):
        chain = row["messages"][1]["content"][0]["text"]
        assert "<CONCLUSION>" in chain and "".join(chain.split()) in "".join(text.split())
    network = AutoModelForImageTextToText.from_pretrained(resolve("tiny"))
    with torch.no_grad():
        assert torch.isfinite(network(**batch).loss)


def test_a_dataset_folder_loads_by_its_card_and_comes_back_by_import(toy, verb, tmp_path):
    folder = tmp_path / "Toy-Reasoning"
    code, out, _ = verb("export", folder, "--format", "dataset", "--license", "cc-by-4.0", *toy)
    assert (code, sorted(path.name for path in folder.iterdir())) == (0, ["README.md", "chains.parquet"])
    assert "Wrote 9 candidates and their card" in out
    card = DatasetCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.configs == [
        {"config_name": "default", "data_files": "chains.parquet"}
    ]
    assert str(tmp_path) not in card.content
    assert verb("export", folder, "--format", "dataset", *toy)[0] == 1  # it is not empty
    code, _, err = verb("import", folder / "chains.parquet", *toy, "--chains", tmp_path / "back.jsonl")
    assert code == 0, err
    assert len((tmp_path / "back.jsonl").read_text().splitlines()) == 9
    datasets = huggingface_datasets()
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    accepted = {row["image"]: row["chain"] for row in rows if row["verdict"] in (None, "accepted")}
    assert len(rows) == 9 and len(accepted) == 8


def test_a_dataset_folder_has_no_path_of_a_local_teacher(toy, verb, tmp_path):
    """Neither the card nor the columns: a model outside of the home folder is found by no other check."""
    chains = toy[-1] / "toy" / "reasoning.jsonl"
    local = {"teacher": "hf:/mnt/lab/models/My-VLM", "model": "/mnt/lab/models/My-VLM"}
    write_lines(chains, [record | local for record in read_lines(chains)])
    assert verb("export", tmp_path / "out", "--format", "dataset", *toy)[0] == 0
    rows = pq.read_table(tmp_path / "out" / "chains.parquet").to_pylist()
    assert {row["teacher"] for row in rows} == {"hf:My-VLM"} and {row["model"] for row in rows} == {"My-VLM"}
    assert "/mnt/lab" not in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A trained job of the embedded model, in a folder whose path must not be published."""
    folder = tmp_path_factory.mktemp("jobs") / "job"
    base = tmp_path_factory.mktemp("models") / "My-VLM-hf"
    network = AutoModelForImageTextToText.from_pretrained(resolve("tiny"))
    network.save_pretrained(base)
    AutoProcessor.from_pretrained(resolve("tiny")).save_pretrained(base)
    settings = {"votes": 1, "vote_temperature": 0.7, "answer_matching": "exact"}
    hparams = HPARAMS | settings | {"model": str(base), "chains": str(folder / "mine.jsonl")}
    torch.manual_seed(0)
    adapters = load_mllm(str(base), lora=LoraSettings.of(hparams)).adapters()
    for weight in adapters.values():
        torch.nn.init.normal_(weight, std=0.05)
    state = {name: weight.detach().clone() for name, weight in adapters.items()}
    write_job(folder, TASK | {"hparams": hparams}, {"model_dict": state})
    record = {"step": 3, "env0_in_acc": 1.0, "env0_out_acc": 0.75, "env1_in_acc": 0.5, "env1_out_acc": 0.25}
    write_lines(folder / "results.jsonl", [record])
    return folder


def test_adapters_in_plain_peft_on_a_base_that_is_named_not_placed(job, tmp_path):
    """The folder alone has processor, base model's id and settings; the adapters are the job's."""
    peft = pytest.importorskip("peft")
    export_adapters(job, tmp_path / "adapter", base_model_id="someone/My-VLM-hf")
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == "someone/My-VLM-hf"
    base = json.loads((job / "task.json").read_text())["hparams"]["model"]
    network = AutoModelForImageTextToText.from_pretrained(base)
    loaded = peft.PeftModel.from_pretrained(network, tmp_path / "adapter")
    saved = torch.load(job / "model.pkl")["model_dict"]
    assert saved and all(torch.equal(loaded.state_dict()[f"base_model.model.{name}"], saved[name])
                         if f"base_model.model.{name}" in loaded.state_dict()
                         else torch.equal(loaded.state_dict()[name], saved[name]) for name in saved)  # fmt: skip
    processor = AutoProcessor.from_pretrained(tmp_path / "adapter")
    assert processor.chat_template == AutoProcessor.from_pretrained(base).chat_template
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model == "someone/My-VLM-hf" and card.data.library_name == "peft"
    assert card.data.model_name == "LabelSFT on PACSReasoning"
    results = [(found.dataset_config, found.dataset_split, found.metric_value) for found in card.data.eval_results]
    assert results == [("art", "out", 75.0), ("photo", "in", 50.0)]


@pytest.mark.parametrize("base_model_id", [None, "someone/My-VLM-hf"])
def test_no_local_path_is_in_what_is_published(job, tmp_path, base_model_id):
    export_adapters(job, tmp_path / "adapter", base_model_id=base_model_id)
    parents = {str(job.parent), json.loads((job / "task.json").read_text())["hparams"]["model"], str(tmp_path)}
    for path in (tmp_path / "adapter").iterdir():
        if path.suffix in (".json", ".md", ".jinja"):
            text = path.read_text()
            if path.name == "task.json":  # `push` renames the model in it, which `predict` needs
                text = json.dumps({**json.loads(text)["hparams"], "model": None})
            assert not [parent for parent in parents if parent in text], path
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == (base_model_id or "My-VLM-hf")
    assert '| chains | "mine.jsonl" |' in (tmp_path / "adapter" / "README.md").read_text()
