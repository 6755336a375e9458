"""Architectures without an entry: probed, then compared with plain transformers, one conversation at a time.

Of each architecture one step, and of a handful, one of each way of computing, everything; everything of all of them
under `slow`, whose table `docs/architectures.md` keeps.
"""

import inspect

import peft
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from builders import architectures
from builders.training import write_trained_job
from domainbed_reasoning.jobs.export import export_adapters, export_merged
from domainbed_reasoning.jobs.predict import Predictor
from domainbed_reasoning.jobs.trained import read_job
from domainbed_reasoning.method.schedule import Schedule, Stage
from domainbed_reasoning.mllm import ModelError, findings, load_mllm
from domainbed_reasoning.mllm.pixels import resize

# Shared prefixes in one and in three dimensions; a recurrent decoder, sliding windows, cross-attention.
SHORT = ("LLaVA-OneVision", "GLM-4.6V", "LFM2-VL", "Cohere2Vision", "Mllama")
# Why they cannot be used, as loading them says.
REFUSED = {
    "Llama4": "cannot be used: tried .*image_outputs",  # transformers 5.24's own forward fails
    "PaliGemma": "cannot be used: tried .*attend to later ones",  # a prefix LM: a prompt's tokens see the answer
    "BLIP-2": "chat template",  # a captioner
}
WORKING = [name for name in architectures.BUILDERS if name not in REFUSED]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Each run tries the models out anew."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(findings, "cache_folder", lambda: folder)
        yield folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """``built(name)``: the folder of that architecture's tiny model."""
    root, folders = tmp_path_factory.mktemp("architectures"), {}

    def folder(name):
        if name not in folders:
            folders[name] = str(architectures.build(name, root / name))
        return folders[name]

    return folder


@pytest.fixture(
    scope="module", params=[name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in WORKING]
)
def trained(request, built, algorithm_on, minibatches):
    """An algorithm of each architecture with adapters that are not zero, and its folder."""
    folder = built(request.param)
    algorithm = algorithm_on(folder, "MTCT", lr=1e-2, lr_schedule="constant", micro_batch=8, max_new_tokens=12)
    algorithm.update(minibatches)
    return algorithm, folder


def conversation(processor, network, mllm, image, question, answer=None):
    """Return the library's own inputs for one conversation, and how many tokens its answer has with its end."""
    picture = Image.fromarray(resize(image[None], mllm.image_size)[0].permute(1, 2, 0).numpy())
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    inputs = processor.apply_chat_template(
        turns,
        add_generation_prompt=answer is None,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=dict(mllm.chat_format.image_settings),
    )
    known = set(inspect.signature(network.forward).parameters)
    core = getattr(network, "model", None)
    known |= set(inspect.signature(core.forward).parameters) if core is not None else set()
    return {name: inputs[name] for name in inputs if name in known - {"labels"}}


def plain_log_likelihood(processor, network, mllm, image, question, answer):
    """Return log p of an answer's tokens: the whole conversation through the chat template, one forward."""
    asked = conversation(processor, network, mllm, image, question)["input_ids"][0]
    inputs = conversation(processor, network, mllm, image, question, answer)
    ids = inputs["input_ids"][0]
    assert ids[: len(asked)].tolist() == asked.tolist()
    end = len(asked) + ids[len(asked) :].tolist().index(mllm.end_token) + 1
    log_probs = network(**inputs, use_cache=False).logits[0].float().log_softmax(-1)
    return log_probs[len(asked) - 1 : end - 1].gather(1, ids[len(asked) : end, None])[:, 0]


def plain_loss(algorithm, folder, minibatches):
    """Return eq. 1 of the paper over the minibatches, one sequence at a time, and its gradients of the adapters."""
    mllm, processor = algorithm.mllm, AutoProcessor.from_pretrained(folder)
    mllm.zero_grad()
    total, names = torch.zeros(()), algorithm.task.class_names
    images = torch.cat([x.as_subclass(torch.Tensor) for x, _ in minibatches])
    labels = torch.cat([y for _, y in minibatches]).tolist()
    chain = next(iter(algorithm.task.chains.values()))
    for image, label in zip(images, labels, strict=True):
        term = [
            plain_log_likelihood(processor, mllm.base, mllm, image, question, answer)
            for question, answer in ((algorithm.q_cls, names[label]), (algorithm.q_reason, chain))
        ]
        loss = -(term[0].sum() + term[1].mean()) / len(images)
        loss.backward()
        total += loss.detach()
    return float(total), gradients_of(mllm)


def gradients_of(mllm):
    """Return the gradients of all adapters; LLaVA reads its vision encoder before the last layer, which has none."""
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in mllm.adapters().items()
    }


@pytest.mark.parametrize("trained", WORKING, indirect=True)
def test_a_step_of_mtct_equals_one_sequence_at_a_time(trained, minibatches, record_property):
    """Loss within 1e-5 of its size; gradients of all adapters of both towers within 1e-5 of the largest."""
    algorithm, folder = trained
    algorithm.train()
    few = [(x[:2], y[:2]) for x, y in minibatches]
    expected, gradients = plain_loss(algorithm, folder, few)
    algorithm.mllm.zero_grad()
    images = algorithm.pixels(torch.cat([x.as_subclass(torch.Tensor) for x, _ in few]))
    chain = next(iter(algorithm.task.chains.values()))
    names = [algorithm.task.class_names[0]] * len(images)
    label, chains = algorithm.terms(images, names, [chain] * len(images))
    loss = (label + chains).mean()
    loss.backward()
    loss = loss.detach()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    worst = max(float((found - gradients[name]).abs().max()) for name, found in gradients_of(algorithm.mllm).items())
    record_property("loss", abs(float(loss) - expected) / expected)
    record_property("gradient", worst / largest)
    record_property("findings", repr(algorithm.mllm.family.findings))
    assert abs(float(loss) - expected) <= 1e-5 * expected
    assert worst <= 1e-5 * largest
    assert {"vision" in name or "visual" in name for name in gradients} == {True, False}
    before = float(loss)
    algorithm.mllm.zero_grad()
    for _ in range(3):
        values = algorithm.update(few)
    assert values["loss"] < before


def test_both_answers_equal_plain_transformers(trained, minibatches):
    """Class scores and a chain, of one image of a batch."""
    algorithm, folder = trained
    algorithm.eval()
    mllm, images, names = algorithm.mllm, minibatches[0][0].as_subclass(torch.Tensor)[:3], algorithm.task.class_names
    processor, network = AutoProcessor.from_pretrained(folder), mllm.base
    scores = mllm.class_scores(images, algorithm.q_cls, names)
    with torch.no_grad():
        expected = [
            plain_log_likelihood(processor, network, mllm, images[1], algorithm.q_cls, name).sum() for name in names
        ]
    torch.testing.assert_close(scores[1], torch.stack(expected), rtol=1e-5, atol=1e-3)
    assert (scores[0] - scores[1]).abs().max() > 1e-4
    inputs = conversation(processor, network, mllm, images[1], algorithm.q_reason)
    out = network.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=12,
        suppress_tokens=mllm.generator.suppressed_tokens,
        eos_token_id=sorted(mllm.generator.ends),
    )
    out = out[0, inputs["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(out, skip_special_tokens=True).strip()
    assert mllm.generate(images, algorithm.q_reason, 12)[1] == text
    begun = mllm.generate(images, algorithm.q_reason, 6, beginnings=["", "<SUMMARY>a dog", "a"])
    alone = mllm.generate(images[1:2], algorithm.q_reason, 6, beginnings=["<SUMMARY>a dog"])
    assert begun[1:2] == alone
    for answer in ("label", "chain"):
        algorithm.hparams["answer"] = answer
        assert algorithm.predict(minibatches[0][0]).isfinite().all()


def test_a_job_reloads_exports_and_predicts(trained, minibatches, tmp_path):
    """Adapters in plain PEFT, merged weights as a model of their own, and a saved job give the same scores."""
    algorithm, folder = trained
    algorithm.eval()
    images, names = minibatches[0][0].as_subclass(torch.Tensor)[:2], algorithm.task.class_names
    expected = algorithm.mllm.class_scores(images, algorithm.q_cls, names)
    write_trained_job(algorithm, tmp_path / "job")
    loaded = read_job(tmp_path / "job").load().eval()
    torch.testing.assert_close(loaded.class_scores(images, algorithm.q_cls, names), expected, rtol=0, atol=1e-5)
    export_merged(tmp_path / "job", tmp_path / "merged")
    merged = load_mllm(str(tmp_path / "merged")).eval()
    torch.testing.assert_close(merged.class_scores(images, algorithm.q_cls, names), expected, rtol=1e-4, atol=1e-3)
    export_adapters(tmp_path / "job", tmp_path / "adapters")
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    network = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval().base_model.model
    processor = AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        first = plain_log_likelihood(processor, network, algorithm.mllm, images[0], algorithm.q_cls, names[0]).sum()
    torch.testing.assert_close(first, expected[0, 0], rtol=1e-5, atol=1e-3)
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    assert Predictor(tmp_path / "job")(str(tmp_path / "photo.png")).class_name in names


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKING)
def test_a_round_of_sarr_runs(name, built, algorithm_on, minibatches):
    schedule = Schedule((Stage(0, 0, 0), Stage(1, 1, 1)), 2, 2)
    algorithm = algorithm_on(built(name), "RDMLDG", schedule, micro_batch=8, max_new_tokens=8)
    values = [algorithm.update(minibatches) for _ in range(2)]
    assert values[1]["stage"] == 1.0 and 0 <= values[1]["sarr1_accepted"] <= 1


@pytest.mark.parametrize("name", REFUSED)
def test_architecture_that_cannot_be_used_is_rejected(name, built):
    with pytest.raises(ModelError, match=REFUSED[name]):
        load_mllm(built(name))


def test_probe_results_are_cached_for_the_second_load(built, _own_cache, monkeypatch):
    folder = built(SHORT[0])
    first = load_mllm(folder)
    monkeypatch.setattr("domainbed_reasoning.mllm.trials.try_out", lambda *given: pytest.fail("tried out again"))
    assert load_mllm(folder).family.findings == first.family.findings
    assert any((_own_cache / "findings").iterdir())


def test_one_line_reports_what_is_slow(built, capsys):
    load_mllm(built("Mllama"))
    printed = [line for line in capsys.readouterr().out.splitlines() if "general path" in line]
    assert len(printed) == 1 and "a row a class name" in printed[0]
    load_mllm(built(SHORT[0]))
    assert "general path" not in capsys.readouterr().out
