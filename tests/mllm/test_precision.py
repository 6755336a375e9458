"""Distributions over tokens are computed in float32 in every weight precision."""

import types

import pytest
import torch

from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.images import shapes
from domainbed_reasoning.method.answering import scores_from_answers
from domainbed_reasoning.mllm import likelihood, load_mllm
from domainbed_reasoning.mllm.generation import decoding_loop
from domainbed_reasoning.mllm.likelihood import scores_from_trie, token_log_likelihoods
from domainbed_reasoning.mllm.rows import build_trie

LOW = torch.bfloat16


def test_a_tokens_log_likelihood_keeps_what_bfloat16_would_round_away():
    """Logits 8, 1, 0: log p of the first is -ln(1 + e^-7 + e^-8) = -0.0012464; bfloat16 keeps 3 digits of anything."""
    logits = torch.tensor([[8.0, 1.0, 0.0]], dtype=LOW).expand(3, -1)
    found = token_log_likelihoods(logits, torch.tensor([0, 1, 2]))
    assert found.dtype == torch.float32
    expected = logits[0].double().log_softmax(0)
    assert float(expected[0]) == pytest.approx(-0.0012464, abs=1e-6)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


def test_class_scores_keep_what_bfloat16_would_round_away():
    """Names of tokens (1, 9) and (2, 9), 9 the end; five-odd nats a token over a vocabulary of 300."""
    torch.manual_seed(0)
    trie = build_trie([(1, 9), (2, 9)])
    prompt, nodes = torch.randn(4, 300).to(LOW), torch.randn(4, 2, 300).to(LOW)
    found = scores_from_trie(trie, prompt, nodes)
    first, then = prompt.double().log_softmax(-1), nodes.double().log_softmax(-1)
    expected = torch.stack([first[:, 1] + then[:, 0, 9], first[:, 2] + then[:, 1, 9]], dim=1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_fallbacks_probabilities_keep_what_bfloat16_would_round_away():
    """Log-likelihoods 0 and 1.1015625, which is ln 3 in bfloat16: probabilities 0.249447 and 0.750553."""
    by_label = torch.tensor([[0.0, 1.1015625]], dtype=LOW)
    scores = scores_from_answers([None, 0], by_label)
    assert scores.dtype == torch.float32
    assert scores[0].tolist() == pytest.approx([0.249447, 0.750553], abs=1e-6)
    assert scores[1].tolist() == [1, 0]


@pytest.mark.parametrize("bias", [False, True])
def test_the_scoring_heads_logits_are_not_rounded(monkeypatch, bias):
    """A vocabulary of 20 in blocks of 7: exact products of bfloat16 numbers, which float32 sums to 6 digits."""
    monkeypatch.setattr(likelihood, "_WORDS_AT_A_TIME", 7)
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(16, 20, bias=bias).to(LOW), torch.randn(2, 3, 16).to(LOW)
    exact = torch.nn.functional.linear(*(each.double() for each in (hidden, *head.parameters())))
    found = likelihood.float32_logits(head, hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert (head(hidden).double() - exact).abs().max() > 1e-3


def test_tokens_are_chosen_from_a_float32_distribution():
    """The loop hands bfloat16 logits to temperature and top_p as float32."""
    seen = []
    loop = decoding_loop(
        lambda cache: torch.zeros(1, 4, dtype=LOW),
        lambda tokens, count, cache: torch.zeros(1, 4, dtype=LOW),
        lambda answer: False,
        (),
    )
    model = load_mllm("tiny").base
    settings = types.SimpleNamespace(max_length=4, do_sample=True)
    ids = torch.zeros(1, 1, dtype=torch.long)
    loop(model, ids, lambda ids, scores: seen.append(scores.dtype) or scores, None, settings)
    assert seen == [torch.float32] * 3


def test_a_bfloat16_models_likelihoods_and_entropies_are_those_of_its_logits_in_float32():
    """Against the head's own logits, in float64: what is lost is lost before them."""
    mllm = load_mllm("tiny", dtype="bfloat16").eval()
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    question, answers, logits = q_reason(shapes.CLASS_NAMES, "creature"), [shapes.chain(0, 0), "wug"], []
    handle = mllm.base.get_output_embeddings().register_forward_hook(lambda module, given, out: logits.append(out))
    with torch.no_grad():
        values, entropies, mask = mllm.token_statistics(mllm.encode(images), question, answers)
        likelihoods, _ = mllm.log_likelihoods(mllm.encode(images), question, answers)
        pair = mllm.two_path_log_likelihoods(images, (q_cls(shapes.CLASS_NAMES, "creature"), question), (answers,) * 2)
    handle.remove()
    assert logits[0].dtype == LOW
    targets = torch.tensor([token for answer in answers for token in mllm.target(answer)])
    found = (values, likelihoods, pair[0][0], pair[1][0])
    for given, out in zip(logits, found, strict=True):
        exact = given.double().log_softmax(-1)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out[mask].double(), exact.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    exact = logits[0].double().log_softmax(-1)
    torch.testing.assert_close(entropies[mask].double(), -(exact.exp() * exact).sum(-1), rtol=1e-4, atol=1e-5)
