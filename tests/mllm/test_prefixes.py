"""Answers with a given prefix, and entropies of target tokens."""

import pytest
import torch

from domainbed_reasoning.chains.prompts import q_reason
from domainbed_reasoning.mllm import load_mllm

QUESTION = q_reason(("dog", "doghouse"))
BEGINNINGS = ("", "<SUMMARY>I look.</SUMMARY>\n<CAPTION>A dog", "<SUMMARY>x")


@pytest.fixture(scope="module")
def mllm(family_folder):
    return load_mllm(family_folder).eval()


def test_beginnings_of_unequal_length_share_a_batch(mllm, images):
    together = mllm.generate(images[:3], QUESTION, 8, beginnings=BEGINNINGS)
    alone = [mllm.generate(images[i : i + 1], QUESTION, 8, beginnings=BEGINNINGS[i : i + 1])[0] for i in range(3)]
    assert together == alone
    assert together[0] == mllm.generate(images[:1], QUESTION, 8)[0]


def test_answer_prefixed_with_its_first_half_ends_the_same():
    """The embedded model's chain of a picture, cut after its caption: greedy decoding writes the same rest."""
    from domainbed_reasoning.images import shapes
    from domainbed_reasoning.mllm.pixels import from_picture

    mllm = load_mllm("tiny").eval()
    picture = from_picture(48)(shapes.render(1, 0, misleading=False))[None]
    question = q_reason(shapes.CLASS_NAMES, "creature")
    (chain,) = mllm.generate(picture, question, 64)
    first, tag, rest = chain.partition("</CAPTION>")
    assert tag
    assert mllm.generate(picture, question, 64, beginnings=[first + tag]) == [rest.strip()]


def test_likelihoods_are_log_likelihoods_and_entropies_those_of_the_whole_distribution(mllm, images):
    """By hand from every logit of an answer's first token."""
    encoded = mllm.encode(images[:2])
    likelihoods, entropies, mask = mllm.token_statistics(encoded, QUESTION, ["a dog", "dog"])
    expected, same_mask = mllm.log_likelihoods(encoded, QUESTION, ["a dog", "dog"])
    assert torch.equal(mask, same_mask)
    torch.testing.assert_close(likelihoods, expected)
    vocabulary = [token for token in mllm.tokenizer.get_vocab().values()]
    uniform = torch.log(torch.tensor(float(len(vocabulary))))
    assert (entropies[mask] > 0).all() and (entropies[mask] < 1.5 * uniform).all()
    assert (entropies[~mask] == 0).all()
    prompt = mllm.prompt(QUESTION)["input_ids"].to(mllm.device).expand(2, -1)
    hidden = mllm.core(2, QUESTION, prompt, encoded, use_cache=False)[0][:, -1]
    first = torch.distributions.Categorical(logits=mllm.base.get_output_embeddings()(hidden).float())
    torch.testing.assert_close(entropies[:, 0], first.entropy(), rtol=1e-4, atol=1e-4)
