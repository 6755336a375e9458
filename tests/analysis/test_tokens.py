"""Token shift and entropy: the tables by hand, then for the embedded model and a job trained from it."""

import dataclasses

import numpy as np
import pytest
import torch

from domainbed_reasoning.analysis import entropy, target_tokens, token_shift
from domainbed_reasoning.analysis.naming import first_naming
from domainbed_reasoning.analysis.target_tokens import TokenTable
from domainbed_reasoning.chains.chain import Chain
from domainbed_reasoning.chains.prompts import q_reason
from domainbed_reasoning.commands import analyze_tokens
from domainbed_reasoning.images import shapes
from domainbed_reasoning.method.consistency import ConsistencyFilter


def table(probability, kind=None, token=None, entropies=None, answer=None):
    n = len(probability)
    return TokenTable(
        np.asarray(answer if answer is not None else range(n)),
        list(token or ["w"] * n),
        np.asarray(kind or ["word"] * n),
        np.asarray(probability, float),
        np.asarray(entropies if entropies is not None else [0.0] * n, float),
    )


def test_shift_counts_low_high_and_what_moved_between():
    """Six tokens: two rise from below 0.25 to above 0.75, one falls, one stays low, one rises halfway, one stays."""
    kind = ["class", "word", "naming", "word", "word", "end"]
    before = table([0.1, 0.2, 0.9, 0.1, 0.2, 0.8], kind)
    after = table([0.9, 0.8, 0.1, 0.2, 0.5, 0.8], kind)
    everything, of_class, naming, other = token_shift.shift(before, after)
    assert [row["tokens"] for row in (everything, of_class, naming, other)] == ["all", "class", "naming", "other"]
    shares = ("n", "low_before", "low_after", "high_before", "high_after", "risen", "fallen")
    assert [everything[key] for key in shares] == pytest.approx([6, 4 / 6, 2 / 6, 2 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert [of_class[key] for key in shares] == [1, 1, 0, 0, 1, 1, 0]
    assert naming["fallen"] == 1 and other["n"] == 4
    assert 0 <= everything["risen_from"] <= everything["risen"] <= everything["risen_to"] <= 1


def test_the_bounds_themselves_are_neither_low_nor_high():
    row = token_shift.shift(table([0.25, 0.75]), table([0.75, 0.25]))[0]
    assert [row[key] for key in ("low_before", "high_before", "risen", "fallen")] == [0, 0, 0, 0]


def test_the_interval_resamples_answers_and_not_tokens():
    """Two answers, all tokens of one rise: whatever their number, the interval spans everything."""
    before = table([0.1] * 40, answer=[0] * 20 + [1] * 20)
    after = table([0.9] * 20 + [0.1] * 20, answer=[0] * 20 + [1] * 20)
    row = token_shift.shift(before, after)[0]
    assert (row["risen_from"], row["risen"], row["risen_to"]) == (0.0, 0.5, 1.0)


def test_entropy_reduction_is_a_mean_over_a_tokens_places():
    """`dog` (two spellings) falls by 1.0 and 0.5, `the` by 0.1 twice; a tag and a comma are no words."""
    token = [" dog", "Dog", "the", " the", "<SUMMARY>", ","]
    kind = ["word", "class", "word", "word", "tag", "word"]
    before = table([0.5] * 6, kind, token, [2.0, 1.5, 1.0, 1.0, 9.0, 9.0])
    after = table([0.5] * 6, kind, token, [1.0, 1.0, 0.9, 0.9, 0.0, 0.0])
    rows = entropy.reductions(before, after, least=2)
    assert [(row["token"], row["n"], row["of_class"]) for row in rows] == [("dog", 2, True), ("the", 2, False)]
    assert [row["reduction"] for row in rows] == pytest.approx([0.75, 0.1])
    assert entropy.reductions(before, after, least=3) == []


def test_overlap_is_of_the_first_ones():
    one, other = ([{"token": token} for token in text] for text in ("abcd", "bxyz"))
    assert entropy.overlap(one, other, top=1) == 0
    assert entropy.overlap(one, other, top=2) == pytest.approx(1 / 3)


def test_kinds_of_a_chains_tokens_spell_its_parts(base):
    """Joined by kind, tokens give the five pairs of tags, the conclusion's name, and where it is first named."""
    chain = shapes.chain(0, 3)
    kinds = target_tokens.token_kinds(base, chain, True)
    ids = base.target(chain)
    assert len(kinds) == len(ids)
    spelt = {kind: "" for kind in target_tokens.KINDS}
    for token, kind in zip(ids, kinds, strict=True):
        spelt[kind] += base.tokenizer.decode([token])
    assert spelt["class"] == "gorp" and spelt["naming"].strip() == "gorp"
    assert spelt["tag"].count("<") == 10
    assert kinds[-1] == "end" and kinds.count("end") == 1
    assert "compare parts" in spelt["word"]


def test_a_chain_names_its_class_by_a_word_of_its_own(base):
    """ "located" holds "cat", "İ" is two letters in lower case: the naming tokens spell "Cat" and nothing else."""
    chain = Chain("located in an İİ bobcat scatter", "A Cat sits", "the cat's ears", "nothing", "cat").render()
    kinds = target_tokens.token_kinds(base, chain, True)
    naming = [token for token, kind in zip(base.target(chain), kinds, strict=True) if kind == "naming"]
    assert base.tokenizer.decode(naming).strip() == "Cat"
    assert first_naming(chain, "cat", chain.index("</CAPTION>")) == (chain.index("Cat"), chain.index("Cat") + 3)
    assert first_naming("a flip\nFLOP, flip flops", "flip_flop", 99) == (2, 11)
    assert first_naming("what it is", "", 99) is None and first_naming("a cat", "cat", 4) is None


def test_probabilities_are_those_of_the_likelihoods_and_training_makes_a_model_surer(base, trained, material):
    samples = material.draw(material.sources, 12)
    answers = target_tokens.label_targets(material, samples)
    before = target_tokens.read_tokens(base, material, answers, batch=5)
    after = target_tokens.read_tokens(trained, material, answers, batch=5)
    with torch.no_grad():
        likelihood, mask = base.log_likelihoods(
            base.encode(material.pixels(samples[:1])), material.q_cls, answers.texts[:1]
        )
    first = before.probability[before.answer == 0]
    assert first == pytest.approx(likelihood[mask].exp().numpy(), rel=1e-4)
    assert set(before.answer) == set(range(12)) and list(before.kind) == list(after.kind)
    named = before.kind == "class"
    assert after.entropy[named].mean() < 0.9 * before.entropy[named].mean()


def test_a_jobs_base_is_the_model_that_it_was_trained_from(base, checkpoint, material):
    pixels = material.pixels(material.draw([0], 4))
    names = list(shapes.CLASS_NAMES)
    expected = base.class_scores(pixels, material.q_cls, names)
    torch.testing.assert_close(checkpoint.untrained().load().class_scores(pixels, material.q_cls, names), expected)
    assert not torch.allclose(checkpoint.load().class_scores(pixels, material.q_cls, names), expected)


def test_own_chains_are_those_that_conclude_rightly(trained, material):
    samples = material.draw(material.sources, 20)
    own = target_tokens.own_targets(trained, material, samples, target_tokens.Labeling(40))
    chains = trained.generate(material.pixels(samples), q_reason(shapes.CLASS_NAMES, "creature"), 40)
    expected = [
        (sample, chain)
        for sample, chain in zip(samples, chains, strict=True)
        if f"<CONCLUSION>{material.name(sample)}</CONCLUSION>" in chain
    ]
    assert list(zip(own.samples, own.texts, strict=True)) == expected
    assert 0 < len(expected) < 20


def test_own_chains_are_written_and_kept_as_the_jobs_rounds_do(trained, material, monkeypatch):
    """Three sampled chains an image, the majority's, in batches of the job's size, those that support it alone."""
    hparams = {"max_new_tokens": 40, "eval_batch": 4, "sarr_votes": 3, "temperature": 0.9, "top_p": 0.8}
    labeling = target_tokens.labeling_of(hparams | {"sarr_filter": "consistent"})
    samples = material.draw(material.sources, 7)
    asked, judged = [], []

    def generate(self, images, question, max_new_tokens, *sampling):
        asked.append((len(images), max_new_tokens, *sampling))
        start = 4 * (len(asked) > 3)
        return [f"<CONCLUSION>{material.name(sample)}</CONCLUSION>" for sample in samples[start : start + len(images)]]

    def judge(self, mllm, images, chains, labels):
        judged.extend(labels)
        return [number % 2 == 0 for number in range(len(labels))]

    monkeypatch.setattr(type(trained), "generate", generate)
    monkeypatch.setattr(ConsistencyFilter, "judge", judge)
    own = target_tokens.own_targets(trained, material, samples, labeling)
    assert asked == [(4, 40, 0.9, 0.8)] * 3 + [(3, 40, 0.9, 0.8)] * 3
    assert judged == [material.label(sample) for sample in samples]
    assert own.samples == [samples[i] for i in (0, 2, 4, 6)]
    wording = labeling.description
    assert wording == "sampled at temperature 0.9, majority of 3, kept if they support their conclusion"
    assert target_tokens.labeling_of({"max_new_tokens": 40, "eval_batch": 4}).description == "greedy"


def test_own_chains_are_read_as_the_job_reads_them(trained, material, monkeypatch):
    samples = material.draw(material.sources, 1)
    written = f"Sure! <conclusion>A {material.name(samples[0])}.</conclusion>"
    monkeypatch.setattr(type(trained), "generate", lambda self, images, *_: [written] * len(images))
    hparams = {"max_new_tokens": 40, "eval_batch": 4, "answer_matching": "tolerant"}
    own = target_tokens.own_targets(trained, material, samples, target_tokens.labeling_of(hparams))
    assert own.texts == [f"<CONCLUSION>{material.name(samples[0])}</CONCLUSION>"]
    with pytest.raises(ValueError, match="0 of 1 own chains"):
        exact = target_tokens.labeling_of(hparams | {"answer_matching": "exact"})
        target_tokens.own_targets(trained, material, samples, exact)


def test_missing_own_chains_are_reported(trained, material):
    with pytest.raises(ValueError, match=r"0 of 3 own chains \(greedy\) would be kept"):
        target_tokens.own_targets(trained, material, material.draw([0], 3), target_tokens.Labeling(1))


def test_a_pass_over_tokens_takes_no_more_images_than_the_job_answers(checkpoint):
    small = dataclasses.replace(checkpoint.job, hparams={**checkpoint.job.hparams, "eval_batch": 3})
    assert analyze_tokens._batch(dataclasses.replace(checkpoint, job=small)) == 3
    assert analyze_tokens._batch(checkpoint) == 16
