"""Faithfulness: prefixes and partners by hand, then models whose answers follow chain or image by design."""

import dataclasses

import pytest

from domainbed_reasoning.analysis import faithfulness
from domainbed_reasoning.analysis.cues import ShapesCues, cues_of
from domainbed_reasoning.analysis.faithfulness import Reader, measure
from domainbed_reasoning.analysis.settings import settings_of
from domainbed_reasoning.analysis.tables import wilson
from domainbed_reasoning.chains.chain import Chain
from domainbed_reasoning.images import shapes

CHAIN = Chain("I look.", "a dogged cat", "The cat's ears", "nothing", "cat").render()


def test_beginnings_end_at_the_conclusion_and_at_the_first_naming():
    assert faithfulness.before_conclusion(CHAIN) + "cat</CONCLUSION>" == CHAIN
    assert faithfulness.before_naming(CHAIN) == "<SUMMARY>I look.</SUMMARY>\n<CAPTION>a dogged"
    unnamed = CHAIN.replace("cat", "pet").replace(">pet<", ">cat<")
    assert faithfulness.before_naming(unnamed) == faithfulness.before_conclusion(unnamed)


def test_a_caption_is_replaced_and_what_follows_it_is_gone():
    assert faithfulness.caption_of(CHAIN) == "a dogged cat"
    assert faithfulness.with_caption(CHAIN, "a dog") == "<SUMMARY>I look.</SUMMARY>\n<CAPTION>a dog</CAPTION>"
    assert faithfulness.caption_of("<CAPTION>open") is None


def test_partners_share_no_class_and_each_serves_once_however_the_images_are_sorted():
    """Three classes of ten images, one after another, all read rightly."""
    answered = [(label, label) for label in (0, 1, 2) for _ in range(10)]
    found = faithfulness.partners(answered)
    assert all(answered[j] != one for j, one in zip(found, answered, strict=True))
    assert max(map(found.count, found)) <= 2 and len(set(found)) >= 25
    assert len({answered[j] for j in found[:10]}) == 2  # images of one class do not all meet the same other one
    assert faithfulness.partners(answered) == found != faithfulness.partners(answered, seed=1)


def test_no_partner_is_of_the_true_class_or_read_as_it():
    """An image of class 0 that is read as 1 fits neither the others of class 0 nor whatever is, or is read as, 1."""
    answered = [(1, 0), (0, 0), (1, 1), (2, 1), (2, 2), (3, 2)]
    for seed in range(20):
        found = faithfulness.partners(answered, seed)
        assert found[0] in (4, 5) and found[1] in (2, 3, 4, 5) and found[3] == 1
    assert faithfulness.partners([(0, 0), (0, 0), (1, 0)]) == [None, None, None]


def test_shares_are_pooled_over_targets_and_seeds_and_over_nothing_else(checkpoint):
    """Four jobs: two alike but for their targets, one with another learning rate, one on another dataset."""

    def job(**more):
        return dataclasses.replace(checkpoint, job=dataclasses.replace(checkpoint.job, adapters={}, **more))

    hparams = {**checkpoint.job.hparams, "lr": 0.5}
    jobs = [job(), job(test_envs=(1,)), job(hparams=hparams), job(dataset="PACSReasoning")]
    told = settings_of(jobs)
    lr = checkpoint.job.hparams["lr"]
    assert told == [f"lr={lr}", f"lr={lr}", "lr=0.5", ""]
    rows = [
        {"algorithm": "RDMLDG", "dataset": one.job.dataset, "setting": setting, "what": "right", "n": n, "share": share}
        for one, setting, n, share in zip(jobs, told, (30, 10, 20, 10), (0.5, 0.1, 1.0, 0.0), strict=True)
    ]
    assert [(row["models"], row["n"], row["share"]) for row in faithfulness.pool(rows)] == [
        (f"RDMLDG, ShapesReasoning, lr={lr}", 40, 0.4),
        ("RDMLDG, ShapesReasoning, lr=0.5", 20, 1.0),
        ("RDMLDG, PACSReasoning", 10, 0.0),
    ]
    assert faithfulness.pool([{**row, "dataset": "A", "setting": ""} for row in rows])[0]["models"] == "RDMLDG"
    step = dataclasses.replace(jobs[0], file="model_step0.pkl")
    assert settings_of([jobs[0], step]) == ["checkpoint=model.pkl", "checkpoint=model_step0.pkl"]


def test_wilsons_interval_by_hand():
    """8 of 10: center (0.8 + 0.19207) / 1.38415 = 0.71674, half 0.22647."""
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_captions_of_shapes_say_their_class_even_with_one_part_wrong():
    cues = ShapesCues()
    for label in range(7):
        words = cues.caption_for(label, "pointed, eared, legged, plain").split(", ")
        assert cues.class_of(", ".join(words)) == label
        assert cues.class_of(", ".join(words[1:])) == label
        assert cues.class_of(", ".join(words[2:])) is None
    assert cues_of("PACSReasoning") is None


def test_the_cue_changes_the_background_and_nothing_else():
    """The corners are background; the middle of the creature is not, and no style paints it by the hue."""
    cues = ShapesCues()
    honest, misled = cues.image((1, 0), False), cues.image((1, 0), True)
    assert (honest[:, :3, :3] != misled[:, :3, :3]).any()
    assert (honest[:, 22:26, 22:26] == misled[:, 22:26, 22:26]).all()
    assert cues.suggested(5) == (5 + shapes.MISLEADING_SHIFT) % 7


class Scripted:
    """A real job's reader in all but its words: chains follow the image, or whatever they were begun with."""

    def __init__(self, material, follows):
        self.data, self.follows, self.exact = material, follows, False
        self.known = {}

    def chain(self, label):
        name = shapes.CLASS_NAMES[label]
        return shapes.describe(shapes.CODES[label], name, shapes.CODES[label])

    def remember(self, samples):
        cues = ShapesCues()
        for sample in samples:
            label = self.data.label(sample)
            for image in (self.data.pixels([sample])[0], cues.image(sample, False), cues.image(sample, True)):
                self.known[image.numpy().tobytes()] = label
        return self

    def seen(self, image):
        return self.known.get(image.numpy().tobytes(), 0)

    def chains(self, pixels):
        return [self.chain(self.seen(image)) for image in pixels]

    def labels(self, pixels):
        return [self.seen(image) for image in pixels]

    def conclude_from(self, pixels, beginnings):
        if self.follows == "image":
            return self.labels(pixels)
        read = [ShapesCues().class_of(faithfulness.caption_of(begun)) for begun in beginnings]
        return read


@pytest.mark.parametrize("follows", ["chain", "image"])
def test_following_the_chain_and_the_image_are_distinguished(material, follows):
    samples = material.draw([3], 14)
    rows, answers = measure(Scripted(material, follows).remember(samples), samples, ShapesCues())
    share = {row["what"]: row["share"] for row in rows}
    by_chain = float(follows == "chain")
    for where in ("to the conclusion", "to the naming"):
        assert share[f"swapped image, {where}: follows the chain"] == by_chain
        assert share[f"swapped image, {where}: follows the image"] == 1 - by_chain
    assert share["edited caption: follows the caption"] == by_chain
    assert share["edited caption: keeps its conclusion"] == 1 - by_chain
    assert share["without image, to the naming: kept"] == (1.0 if by_chain else pytest.approx(1 / 7, abs=0.15))
    assert share["caption's class is the conclusion"] == share["agrees with label path"] == share["right"] == 1
    assert share["chain: follows the misleading cue"] == share["chain: changed by the cue"] == 0
    assert share["chain: names no class, by the cue"] == 0
    assert len(answers) == 14 and all(row["edited_to"] not in (row["label"], None) for row in answers)


def test_edit_that_does_not_describe_the_wanted_class_does_not_count(material):
    """Of every second image the caption names no part: there is nothing in it to edit."""

    class Sparing(Scripted):
        def chains(self, pixels):
            cut = [faithfulness.with_caption(c, "so") + c.partition("</CAPTION>")[2] for c in super().chains(pixels)]
            return [a if i % 2 else b for i, (a, b) in enumerate(zip(super().chains(pixels), cut, strict=True))]

    samples = material.draw([3], 14)
    rows, answers = measure(Sparing(material, "chain").remember(samples), samples, ShapesCues())
    found = {row["what"]: (row["n"], row["share"]) for row in rows}
    assert found["swapped image, to the naming: follows the image"][0] == 14
    assert found["edited caption: follows the caption"] == (7, 1.0)
    assert found["edited caption: keeps its conclusion"] == (7, 0.0)
    assert sum("edited_to" in row for row in answers) == 7


def test_a_chain_that_the_cue_breaks_has_not_changed_its_class(material):
    """With the misleading cue, images of class 0 get no class, those of class 1 that of the cue, the others theirs."""
    cues = ShapesCues()
    samples = material.draw([3], 56)
    true = [material.label(sample) for sample in samples]
    misled = {cues.image(sample, True).numpy().tobytes() for sample in samples}

    class Broken(Scripted):
        def chains(self, pixels):
            return [self.broken(image) if image.numpy().tobytes() in misled else c for image, c in self.both(pixels)]

        def both(self, pixels):
            return zip(pixels, super().chains(pixels), strict=True)

        def broken(self, image):
            label = self.seen(image)
            return "so" if label == 0 else self.chain(cues.suggested(1) if label == 1 else label)

    rows, answers = measure(Broken(material, "chain").remember(samples), samples, cues)
    found = {row["what"]: (row["n"], row["share"]) for row in rows}
    none, changed = true.count(0), true.count(1)
    assert min(none, changed) > 0
    assert found["chain: names no class, by the cue"] == (56, none / 56)
    for what in ("changed by the cue", "follows the misleading cue"):
        assert found[f"chain: {what}"] == (56 - none, changed / (56 - none))
        assert found[f"label: {what}"] == (56, 0)
    assert found["chain: right, true cue"] == (56 - none, 1)
    assert found["chain: right, misleading cue"] == (56 - none, 1 - changed / (56 - none))
    assert sum(row["misleading_cue_chain"] is None for row in answers) == none


def test_a_model_that_names_no_class_has_that_row_alone(material):
    class Silent(Scripted):
        def chains(self, pixels):
            return ["so"] * len(pixels)

    samples = material.draw([3], 7)
    rows, answers = measure(Silent(material, "chain").remember(samples), samples, ShapesCues())
    assert [(row["what"], row["n"], row["share"]) for row in rows] == [("names a class", 7, 0)]
    assert [row["chain_answer"] for row in answers] == [None] * 7


def test_a_trained_model_copies_the_class_that_its_chain_has_named(trained, material):
    """The embedded chains name the class before the conclusion: begun up to there, the answer is theirs."""
    samples = material.draw([3], 21)
    reader = Reader(trained, material, 40, batch=8)
    rows, answers = measure(reader, samples, ShapesCues())
    share = {row["what"]: row["share"] for row in rows}
    assert share["without image, to the conclusion: kept"] > 0.9
    assert share["swapped image, to the conclusion: follows the chain"] > 0.9
    assert share["swapped image, to the naming: follows the chain"] < 1
    assert all(row["low"] <= row["share"] <= row["high"] for row in rows if row["n"])
    assert len(answers) == 21


def test_a_readers_chains_begin_where_canonical_ones_do(trained, material, monkeypatch):
    """Whatever the tags' spelling: every chain that names a class can be cut before its conclusion."""
    samples = material.draw(material.sources, 2)
    written = ["<think>x</think><caption>A cat.</caption><conclusion>A cat.</conclusion>", "no tags"]
    written = [text.replace("cat", shapes.CLASS_NAMES[1]) for text in written]
    monkeypatch.setattr(type(trained), "generate", lambda self, images, *_: written)
    read = Reader(trained, material, 40).chains(material.pixels(samples))
    assert faithfulness.before_conclusion(read[0]) + f"{shapes.CLASS_NAMES[1]}</CONCLUSION>" == read[0]
    assert read[1] == written[1]
    assert Reader(trained, material, 40, exact=True).chains(material.pixels(samples)) == written
