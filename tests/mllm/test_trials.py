"""Probing models: optimizations only where results are equal, and errors with the finding."""

import dataclasses
import json
import shutil

import pytest
import torch
import transformers

from builders import architectures
from domainbed_reasoning import __main__ as cli
from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.images import shapes
from domainbed_reasoning.mllm import ModelError, general, load_mllm, trials
from domainbed_reasoning.mllm.adapters import lora_targets, without_adapters
from domainbed_reasoning.mllm.families import family_of
from domainbed_reasoning.mllm.findings import Findings
from domainbed_reasoning.mllm.loading import TINY, load_network
from domainbed_reasoning.mllm.model import MLLM
from domainbed_reasoning.mllm.towers import convolutions_of, is_linear, part_of, parts_of

NAMES = shapes.CLASS_NAMES
Q_CLS, Q_REASON = q_cls(NAMES, "creature"), q_reason(NAMES, "creature")
ALL = Findings("", batch=True, padding=True, reuse=True, cache=True, image_tokens=4, worst=0.0, seconds=0.0)


pytestmark = pytest.mark.usefixtures("own_findings")


@pytest.fixture(scope="module")
def loaded():
    return load_network("tiny", "auto", "none", torch.device("cpu"))


@pytest.fixture(scope="module")
def vipllava(tmp_path_factory):
    """A small architecture without a row, of which tests break copies."""
    return architectures.build("ViP-LLaVA", tmp_path_factory.mktemp("vipllava"))


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def test_answers_by_transformers_are_written_so_many_at_a_time_as_fit(loaded, images, monkeypatch):
    """Greedy ones, sampled ones, and those that continue what has begun: with room for two, five images take three."""
    network, processor, family = loaded
    mllm = MLLM(network, processor, dataclasses.replace(family, tree="", findings=ALL)).eval()
    asked = (images, "What is it?")
    whole = [mllm.generator.write(*asked, 6), mllm.generator.generate_after(*asked, ["a", "a", "", "a", "a"], 6)]
    sizes, plain = [], general.conversations
    monkeypatch.setattr(type(mllm.generator), "_fitting", lambda *_, **__: 2)
    monkeypatch.setattr(general, "conversations", lambda *given: sizes.append(len(given[1])) or plain(*given))
    assert mllm.generator.write(*asked, 6) == whole[0] and sizes == [2, 2, 1]
    assert mllm.generator.generate_after(*asked, ["a", "a", "", "a", "a"], 6) == whole[1]
    assert sorted(sizes[3:]) == [1, 2, 2]


@pytest.mark.parametrize("absent", [(), ("reuse",), ("padding", "reuse"), ("batch", "padding", "reuse"), ("cache",)])
def test_the_general_path_equals_shared_prefix_rows_whatever_is_found(loaded, images, absent):
    """On the embedded model: likelihoods within 1e-5, class scores, statistics, the same texts."""
    network, processor, family = loaded
    fast = MLLM(network, processor, family).eval()
    found = dataclasses.replace(ALL, **dict.fromkeys(absent, False))
    slow = MLLM(network, processor, dataclasses.replace(family, tree="", findings=found)).eval()
    answers = ["dog", "a dog house with four legs", "dog", "axe", "an axe"]
    with torch.no_grad():
        pairs = [mllm.path_log_likelihoods(images, (Q_CLS, Q_REASON), (answers, answers)) for mllm in (fast, slow)]
        for one, other in zip(*pairs, strict=True):
            assert torch.equal(one[1], other[1])
            torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-5)
        statistics = [mllm.token_statistics(mllm.encode(images), Q_CLS, answers) for mllm in (fast, slow)]
    for one, other in zip(*statistics, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    scores = [mllm.class_scores(images, Q_CLS, NAMES) for mllm in (fast, slow)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-4)
    assert fast.generate(images, Q_REASON, 40) == slow.generate(images, Q_REASON, 40)
    begun = ["", "<SUMMARY>a", "<SUMMARY>a", "<SUMMARY>I see", "a"]
    written = [mllm.generate(images, Q_REASON, 12, beginnings=begun) for mllm in (fast, slow)]
    assert written[0] == written[1]


def test_rows_of_equal_length_go_together_where_padding_does_not_hold():
    assert general.grouped([3, 5, 3], batch=True, padding=True) == [[0, 1, 2]]
    assert general.grouped([3, 5, 3], batch=True, padding=False) == [[0, 2], [1]]
    assert general.grouped([3, 5, 3], batch=False, padding=False) == [[0], [1], [2]]


def test_probe_results_match_every_family_row(family_folder):
    network, processor, family = load_network(family_folder, "float32", "none", torch.device("cpu"))
    found = trials.try_out(lambda settings: MLLM(network, processor, settings), family, (family.tree,))
    assert (found.tree, found.batch, found.padding, found.reuse, found.cache) == (family.tree, *[True] * 4)
    assert found.worst < 1e-4


def test_layers_found_by_structure_match_those_found_by_name(family_folder):
    network = load_network(family_folder, "float32", "none", torch.device("cpu"))[0]
    part, layers = parts_of(network), [name for name, module in network.named_modules() if is_linear(module)]
    assert {name: part(name) for name in layers} == {name: part_of(name) for name in layers}
    assert bool(convolutions_of(network).adapted) == family_folder.endswith("FastVLM")
    assert without_adapters(network) == {}


def test_a_model_whose_padding_leaks_is_computed_in_rows_of_equal_length(loaded):
    """A forward that adds to every logit the share of padding in its row."""
    network, processor, family = loaded

    def leak(module, given, kwargs, out):
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            out.logits = out.logits * (1 + (mask == 0).float().mean(1)[:, None, None])
        return out

    handle = network.register_forward_hook(leak, with_kwargs=True)
    found = trials.try_out(lambda settings: MLLM(network, processor, settings), family, ())
    handle.remove()
    assert found.batch and not found.padding and not found.reuse
    assert "answers of equal length at a time" in found.costs


def test_routers_that_are_linear_by_inheritance_alone_get_no_adapters():
    network = architectures.BUILDERS["Llama4"]()[0]
    routers = {name for name, _ in network.named_modules() if name.endswith("router")}
    assert routers and not routers & set(lora_targets(network, "both", False))


# ---- bad input: what was tried, what was found, what to do ----


def test_an_encoder_decoder_is_refused(tmp_path):
    transformers.Florence2Config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    architecture = {"architectures": ["Florence2ForConditionalGeneration"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | architecture))
    with pytest.raises(ModelError, match="encoder-decoder.*Use a chat model"):
        load_mllm(str(tmp_path))


def test_a_blind_model_is_refused(vipllava, tmp_path):
    folder = copied(vipllava, tmp_path)
    network = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for weight in network.model.multi_modal_projector.parameters():
        torch.nn.init.zeros_(weight)
    network.save_pretrained(folder)
    with pytest.raises(ModelError, match="tried two different images, found the same log-likelihoods"):
        load_mllm(str(folder))


def test_pixtral_shares_llavas_class_and_not_its_row():
    vision = transformers.PixtralVisionConfig()
    config = transformers.LlavaConfig(vision_config=vision)
    assert family_of("LlavaForConditionalGeneration", config).findings is None
    assert family_of("LlavaForConditionalGeneration", config).name == "LlavaForConditionalGeneration"
    assert family_of("LlavaForConditionalGeneration").name == "LLaVA-1.5"


def test_internvl_with_sliding_windows_has_no_row():
    """InternVL3.5-GPT-OSS: neither a shared prefix nor PyTorch's attention is right for its layers."""
    name = "InternVLForConditionalGeneration"
    windows = transformers.InternVLConfig(text_config=transformers.GptOssConfig())
    assert family_of(name, windows).name == name
    assert family_of(name, transformers.InternVLConfig()).name == "InternVL3"


def test_doctor_shows_what_each_trial_found(vipllava, capsys):
    assert cli.main(["doctor", "--model", str(vipllava)]) == 0
    printed = capsys.readouterr().out
    assert "rows with a shared prefix" in printed and "images in a batch" in printed and "Ready" in printed


def test_doctor_reports_why_a_model_cannot_be_used(tmp_path, capsys):
    assert cli.main(["doctor", "--model", str(tmp_path)]) == 1
    assert "no config.json" in capsys.readouterr().out


def test_the_embedded_model_is_not_tried_out(monkeypatch):
    monkeypatch.setattr(trials, "try_out", lambda *given: pytest.fail("tried out"))
    assert load_mllm(str(TINY)).family.findings is None
