"""`attn_implementation`: the same model by other kernels, or a reason why not."""

import pytest
import torch
from domainbed import algorithms, datasets, hparams_registry
from transformers import utils

from domainbed_reasoning.mllm import LoraSettings, ModelError, attention, load_mllm

QUESTIONS = ("Which of a dog and a cat?", "Which of a dog and a cat? Step by step.")
ANSWERS = (["a dog", "a cat"], ["round, so a dog", "it has a long tail and is a cat"])
FLASH = ("flash_attention_2", "flash_attention_3")


@pytest.fixture(scope="module")
def pictures():
    return torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def load(implementation, model="tiny", **more):
    torch.manual_seed(0)
    return load_mllm(model, attn_implementation=implementation, dtype="float32", device="cpu", **more).eval()


def implementations(mllm):
    return {module.config._attn_implementation for module in mllm.modules() if hasattr(module, "config")}


def test_auto_and_sdpa_share_prefixes():
    for name in ("auto", "sdpa"):
        mllm = load(name)
        assert mllm.family.tree == "plain"
        assert mllm.base.config.get_text_config()._attn_implementation == "sdpa_branches"


@pytest.mark.parametrize(
    ("implementation", "device", "stays"),
    [("auto", "cpu", True), ("eager", "cuda", True), ("auto", "cuda", False), ("sdpa", "cuda", False)],
)
def test_cudnn_plans_no_attention_on_cuda(implementation, device, stays):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        attention.avoid_plans(implementation, torch.device(device))
        assert torch.backends.cuda.cudnn_sdp_enabled() == stays
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@torch.no_grad()
def test_eager_attention_is_the_same_function_in_two_rows_a_sample(pictures):
    """Both towers use it; likelihoods, class scores and greedy answers are sdpa's, to float32 rounding."""
    eager, sdpa = load("eager"), load("sdpa")
    assert implementations(eager) == {"eager"}
    assert eager.family.tree == "" and eager.family.findings.batch
    pairs = [mllm.two_path_log_likelihoods(pictures, QUESTIONS, ANSWERS) for mllm in (eager, sdpa)]
    for (found, mask), (expected, expected_mask) in zip(*pairs, strict=True):
        assert torch.equal(mask, expected_mask)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    names = ("dog", "cat", "guitar")
    scores = [mllm.class_scores(pictures, QUESTIONS[0], names) for mllm in (eager, sdpa)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
    answers = [mllm.generate(pictures, QUESTIONS[1], 8) for mllm in (eager, sdpa)]
    assert answers[0] == answers[1]


@torch.no_grad()
def test_eager_attention_reads_all_tiles():
    """Four tiles and a thumbnail an image."""
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scores = [load(name, max_tiles=4).class_scores(images, "Which?", ("dog", "guitar")) for name in ("eager", "sdpa")]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_eager_attention_of_every_family_is_sdpas(family_folder, images):
    """Three-dimensional positions and sliding windows included."""
    found = []
    for name in ("eager", "auto"):
        mllm, count = load(name, family_folder), len(images)
        answers = (["dog"] * count, ["a dog"] * count)
        pairs = mllm.two_path_log_likelihoods(images, ("Which?", "Which? Say why."), answers)
        scores = mllm.class_scores(images, "Which?", ("dog", "cat", "dog house"))
        found.append([scores, *(values for values, _ in pairs)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_gradients_of_eager_attention_are_those_of_sdpa(pictures):
    found = []
    for name in ("eager", "sdpa"):
        mllm = load(name, lora=LoraSettings(4, 8))
        pairs = mllm.two_path_log_likelihoods(pictures, QUESTIONS, ANSWERS)
        sum(values.sum() for values, _ in pairs).backward()
        found.append({name: weight.grad for name, weight in mllm.adapters().items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-4)


def test_an_algorithm_trains_and_answers_with_the_attention_that_is_asked_for():
    losses = {}
    for name in ("auto", "eager"):
        torch.manual_seed(0)
        hparams = hparams_registry.default_hparams("MTCT", "ShapesReasoning")
        assert hparams["attn_implementation"] == "auto"
        hparams["attn_implementation"] = name
        dataset = datasets.ShapesReasoning(None, [3], hparams)
        algorithm = algorithms.get_algorithm_class("MTCT")(dataset.input_shape, dataset.num_classes, 3, hparams)
        batch = [torch.utils.data.default_collate([dataset[env][0]]) for env in range(3)]
        losses[name] = algorithm.update(batch)["loss"]
        assert algorithm.mllm.family.tree == ("plain" if name == "auto" else "")
    assert losses["eager"] == pytest.approx(losses["auto"], rel=1e-4)


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_on_the_cpu_is_refused(name):
    with pytest.raises(ModelError, match=f"{name}' needs a CUDA device; this is cpu. Use 'sdpa'"):
        load(name)


@pytest.mark.parametrize(("name", "package"), [(FLASH[0], "flash-attn"), (FLASH[1], "flash-attn-3")])
def test_flash_attention_without_its_package_is_refused_before_loading(name, package, monkeypatch):
    monkeypatch.setattr(utils, f"is_{name.replace('attention', 'attn')}_available", lambda: False)
    with pytest.raises(ModelError, match=f"needs the package {package}, which is not installed. Use 'sdpa'"):
        attention.check_attention(name, torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_in_float32_is_refused(name, monkeypatch):
    monkeypatch.setattr(utils, f"is_{name.replace('attention', 'attn')}_available", lambda: True)
    attention.check_attention(name, torch.bfloat16, torch.device("cuda"))
    with pytest.raises(ModelError, match="computes in bfloat16 or float16; dtype is float32. Set dtype to bfloat16"):
        attention.check_attention(name, torch.float32, torch.device("cuda"))


def test_unknown_attention_is_refused():
    with pytest.raises(ModelError, match="must be one of auto, sdpa, eager, flash_attention_2.*; got 'flash'"):
        load("flash")
