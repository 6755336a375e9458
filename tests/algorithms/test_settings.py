"""Options where the paper is silent: what each one changes, and what it does not."""

import pytest
import torch
from domainbed.lib import misc

from builders.files import chain_text
from builders.training import build, minibatches
from domainbed_reasoning.images import shapes
from domainbed_reasoning.method.schedule import Schedule, Stage
from domainbed_reasoning.method.self_labeling import SelfLabels
from domainbed_reasoning.mllm import MLLM


@pytest.mark.parametrize(("setting", "right"), [("label", 1.0), ("wrong", 0.5)])
def test_a_chain_that_names_no_class_is_the_class_names_answer_or_wrong(setting, right, monkeypatch):
    """Of four images two are answered rightly by their chains; the others' name no class, the label path is right."""
    dataset, algorithm = build("MLLMZeroShot", on_parse_failure=setting)
    x, y = minibatches(dataset)[0]
    chains = [f"<CONCLUSION>{shapes.CLASS_NAMES[label]}</CONCLUSION>" if i % 2 else "?" for i, label in enumerate(y)]
    likelihoods = torch.nn.functional.one_hot(y, 7).float()
    monkeypatch.setattr(MLLM, "generate", lambda self, images, *_: chains)
    monkeypatch.setattr(MLLM, "class_scores", lambda self, images, *_: likelihoods[::2] if setting == "label" else None)
    assert misc.accuracy(algorithm, [(x, y)], None, "cpu") == right
    with torch.no_grad():
        answers = algorithm.predict(x).argmax(1)
    assert answers.tolist() == (y.tolist() if setting == "label" else [7, y[1], 7, y[3]])


def test_where_every_chain_names_a_class_a_parse_failure_changes_nothing(monkeypatch):
    chain = f"<CONCLUSION>{shapes.CLASS_NAMES[2]}</CONCLUSION>"
    monkeypatch.setattr(MLLM, "generate", lambda self, images, *_: [chain] * len(images))
    for setting in ("label", "wrong"):
        dataset, algorithm = build("MLLMZeroShot", on_parse_failure=setting)
        assert algorithm.predict(minibatches(dataset)[0][0]).argmax(1).tolist() == [2] * 4


def weights_of(algorithm):
    return [weight.detach().clone() for weight in algorithm.mllm.adapters().values()]


def moments_of(algorithm):
    states = algorithm.run.optimizer.state.values()
    return [(int(state["step"]), state["exp_avg"].clone()) for state in states]


def rounds_of_ten(monkeypatch, keep, **changes):
    """RDMLDG after one supervised step, before a round of ten; of six images in turn the labeller is right in some."""
    dataset, algorithm = build("RDMLDG", max_new_tokens=8, lr_schedule="linear", **changes)
    algorithm.schedule = Schedule((Stage(0, 0, 0), Stage(1, 1, 10)), 11, 1)
    batch = minibatches(dataset, size=2)
    labels = [int(label) for _, y in batch for label in y]
    names = [shapes.CLASS_NAMES[label if right else (label + 1) % 7] for label, right in zip(labels, keep, strict=True)]
    chains = [chain_text(name) for name in names]
    own = SelfLabels(lambda images: chains[: len(images)], shapes.CLASS_NAMES)
    monkeypatch.setattr(type(algorithm), "labeler", lambda self: own)
    algorithm.update(batch)
    return algorithm, batch


HALF = [True, False] * 3


def test_epochs_over_what_was_kept_end_with_their_updates_and_surplus_steps_change_nothing(monkeypatch, capsys):
    """Half is kept: of ten steps five are updates. Their learning rate falls over five, as in a round of five steps."""
    algorithm, batch = rounds_of_ten(monkeypatch, HALF, sarr_epoch_over="kept")
    rates = []
    for step in range(1, 11):
        before = weights_of(algorithm)
        rates.append(algorithm.run.optimizer.param_groups[0]["lr"] if step > 1 else None)
        moments = moments_of(algorithm)
        values = algorithm.update(batch)
        moved = any(not torch.equal(a, b) for a, b in zip(before, weights_of(algorithm), strict=True))
        assert (moved, values["updated"], "loss" in values) == ((True, 1.0, True) if step <= 5 else (False, 0.0, False))
        assert values["sarr1_accepted"] == values["chain_share"] == 0.5
        if step > 5:
            same = [
                a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(moments, moments_of(algorithm), strict=True)
            ]
            assert same and all(same)
    assert algorithm.run.updates == 5
    # Linear, over five updates, the first two warm-up; the first step's rate was set before anything was kept.
    assert [rate / algorithm.hparams["lr"] for rate in rates[1:5]] == pytest.approx([1.0, 3 / 4, 2 / 4, 1 / 4])
    printed = capsys.readouterr().out
    assert printed.count("5 updates complete its epochs over the 50.0% of chains kept so far") == 1
    assert "kept 50.0% of 6 self-labeled chains, 100.0% of these well formed; 5 of its 10 steps were updates" in printed


def test_epochs_over_all_images_update_in_every_step(monkeypatch):
    algorithm, batch = rounds_of_ten(monkeypatch, HALF)
    for _ in range(10):
        before = weights_of(algorithm)
        values = algorithm.update(batch)
        assert "updated" not in values and "loss" in values
        assert any(not torch.equal(a, b) for a, b in zip(before, weights_of(algorithm), strict=True))
    assert algorithm.run.updates == 10


def test_epochs_over_nothing_kept_are_no_updates_and_more_kept_later_are(monkeypatch):
    """Nothing of the first batch is kept: no update. Then everything is, half of what was written: five updates."""
    algorithm, batch = rounds_of_ten(monkeypatch, [False] * 6, sarr_epoch_over="kept")
    assert algorithm.update(batch)["updated"] == 0.0 and algorithm.run.updates == 0
    own = algorithm.run.own_chains
    own._labeled, own._accepted = 12, 6
    assert [algorithm.update(batch)["updated"] for _ in range(9)] == [1.0] * 5 + [0.0] * 4


BROKEN = "<SUMMARY>I look</CAPTION> <CONCLUSION>{}</CONCLUSION>"


@pytest.mark.parametrize(
    ("setting", "kept"), [("conclusion", [True, True, False]), ("well_formed", [True, False, False])]
)
def test_the_filter_for_well_formed_chains_asks_for_five_stages_besides_the_conclusion(setting, kept, monkeypatch):
    """Three chains of three cats: whole and right, broken and right, whole and wrong."""
    _, algorithm = build("SARR", sarr_filter=setting)
    name, other = shapes.CLASS_NAMES[:2]
    written = [chain_text(name), BROKEN.format(name), chain_text(other)]
    monkeypatch.setattr(MLLM, "generate", lambda self, images, *_: written)
    labels = algorithm.labeler()
    images = torch.zeros(3, 3, 48, 48, dtype=torch.uint8)
    found = labels.chains_for(images, [0, 0, 0], [(0, 0), (0, 1), (0, 2)])
    assert [chain is not None for chain in found] == kept
    shares = {"sarr2_accepted": sum(kept) / 3, "sarr2_well_formed": 1 / sum(kept)}
    assert labels.shares(2) == shares
    again = algorithm.labeler()
    again.load_state_dict(labels.state_dict(), labels.newly_written())
    assert again.shares(2) == shares


def test_round_with_malformed_kept_chains_is_reported_once(monkeypatch, capsys):
    """Each of four steps keeps six. Those of the first are whole, those of the others broken."""
    dataset, algorithm = build("RDMLDG", max_new_tokens=8)
    algorithm.schedule = Schedule((Stage(1, 0, 3),), 4, 1)
    written = iter([chain_text("{}"), BROKEN, BROKEN, BROKEN])
    batches = [minibatches(dataset, size=2, start=2 * step) for step in range(4)]
    names = iter([[shapes.CLASS_NAMES[int(label)] for _, y in batch for label in y] for batch in batches])

    def write(images):
        form = next(written)
        return [form.format(name) for name in next(names)]

    monkeypatch.setattr(type(algorithm), "labeler", lambda self: SelfLabels(write, shapes.CLASS_NAMES))
    updated = []
    for batch in batches:
        values = algorithm.update(batch)
        updated.append("are well formed, with five stages in order, each closed" in capsys.readouterr().out)
    assert updated == [False, True, False, False]
    assert values["sarr1_accepted"] == 1.0 and values["sarr1_well_formed"] == 0.25
