"""Naive, shared-vision and shared-prefix rows: equal loss and gradients for every family."""

import pytest
import torch

from domainbed_reasoning.chains.chain import Chain
from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.method.objective import chain_nll, label_nll
from domainbed_reasoning.mllm import LoraSettings, load_mllm

CHAINS = [Chain("look", f"a thing{' on a table' * n}", "it has legs", "no", "dog").render() for n in range(3)]


def loss_and_gradients(mllm, images, questions, answers, rows):
    label, chain = mllm.two_path_log_likelihoods(images, questions, answers, rows)
    loss = (label_nll(*label) + chain_nll(*chain)).mean()
    loss.backward()
    gradients = {name: weight.grad for name, weight in mllm.adapters().items() if weight.grad is not None}
    mllm.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def relative_gap(gradients, expected):
    assert gradients.keys() == expected.keys()
    return max(float((gradients[name] - expected[name]).norm() / (expected[name].norm() + 1e-6)) for name in expected)


@pytest.fixture(scope="module")
def mllm(family_folder):
    """Adapters that are not zero: all of them have gradients."""
    mllm = load_mllm(family_folder, lora=LoraSettings(4, 8)).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in mllm.adapters().values():
            weight.normal_(std=0.05)
    return mllm


@pytest.mark.parametrize("longer", ["chains", "names"])
def test_all_rows_have_the_same_loss_and_gradients(mllm, images, class_names, longer):
    """Float32, 1e-5 relative; branches of unequal lengths, either of them the longer one."""
    questions = (q_cls(class_names), q_reason(class_names))
    names = list(class_names[:3])
    answers = (names, CHAINS) if longer == "chains" else ([text * 2 for text in CHAINS], names)
    loss, gradients = loss_and_gradients(mllm, images[:3], questions, answers, "naive")
    assert {"vision" in name or "visual" in name for name in gradients} == {True, False}
    for rows in ("vision", "tree", None):
        other, others = loss_and_gradients(mllm, images[:3], questions, answers, rows)
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
        assert relative_gap(others, gradients) < 1e-5, rows


def test_gradient_checkpointing_recomputes_the_branches(folder_of, images, class_names):
    found = []
    for checkpointing in (False, True):
        mllm = load_mllm(folder_of("InternVL"), lora=LoraSettings(4, 8), gradient_checkpointing=checkpointing).train()
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in mllm.adapters().values():
                weight.normal_(std=0.05)
        questions = (q_cls(class_names), q_reason(class_names))
        found.append(loss_and_gradients(mllm, images[:3], questions, (list(class_names[:3]), CHAINS), "tree"))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert relative_gap(found[1][1], found[0][1]) < 1e-5


def test_rows_of_another_name_are_refused(folder_of, images):
    mllm = load_mllm(folder_of("InternVL"))
    with pytest.raises(ValueError, match="rows must be one of naive, vision, tree; got 'trees'"):
        mllm.two_path_log_likelihoods(images[:1], ("?", "!"), (["a"], ["b"]), "trees")


def test_the_name_of_the_attention_is_not_saved(folder_of, tmp_path):
    """A merged model that is saved loads without this package."""
    load_mllm(folder_of("InternVL"), lora=LoraSettings(4, 8)).merge().network.save_pretrained(tmp_path)
    assert "sdpa_branches" not in (tmp_path / "config.json").read_text()
