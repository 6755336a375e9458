"""One step of the objective by hand: a model of two weights with known losses and gradients.

Of an image whose first pixel is p the label term is 3pa and the chain term 4pb, with weights a and b that begin at 1:
their gradients are 3p and 4p, and never touch the other's weight.
"""

import contextlib
import math

import pytest
import torch

from domainbed_reasoning import registry
from domainbed_reasoning.algorithms import trained_mllm
from domainbed_reasoning.bridge.samples import attach_task, with_ids
from domainbed_reasoning.method.schedule import Schedule, Stage
from domainbed_reasoning.method.task import Task
from domainbed_reasoning.mllm.pixels import resize, to_uint8

ONE_STAGE = (Stage(0, 0, 9),)
CAT, DOG = "<CONCLUSION>cat</CONCLUSION>", "<CONCLUSION>dog</CONCLUSION>"


class TwoWeights(torch.nn.Module):
    """The model. Its own chain of an image concludes with the class that the second channel says."""

    image_size = 2
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.ones(())) for _ in "ab")

    def adapters(self):
        return dict(self.named_parameters())

    def pictures(self, images):
        return resize(to_uint8(images.as_subclass(torch.Tensor)), self.image_size)

    def encode(self, images):
        return images[:, 0, 0, 0].float()

    def log_likelihoods(self, encoded, question, answers):
        label = all(answer in ("cat", "dog") for answer in answers)
        slope = 3 * self.a if label else 4 * self.b
        return -(encoded * slope)[:, None], torch.ones(len(answers), 1, dtype=torch.bool)

    def path_log_likelihoods(self, images, questions, answers):
        return tuple(
            self.log_likelihoods(self.encode(images), question, texts) if texts is not None else None
            for question, texts in zip(questions, answers, strict=True)
        )

    def generate(self, images, question, max_new_tokens, temperature=0.0, top_p=1.0):
        return [(CAT, DOG)[conclusion] for conclusion in images[:, 1, 0, 0].tolist()]

    def generation_bytes(self, *given):
        return 0

    def fits_a_copy(self, *given):
        return False

    def with_adapters(self, values):
        return contextlib.nullcontext(self)


@pytest.fixture
def build(monkeypatch):
    """``build(name, stages, chains, **hparams)``: an algorithm that trains the two weights at a rate of 0.1."""
    monkeypatch.setattr(trained_mllm, "load_mllm", lambda *given, **named: TwoWeights())

    def built(name, stages=ONE_STAGE, chains=(), **changes):
        cls = registry.load(registry.ALGORITHMS[name])
        hparams = {key: hparam.default for key, hparam in cls.HPARAMS.items()}
        hparams |= {
            "model": "tiny",
            "lr": 0.1,
            "weight_decay": 0.0,
            "lr_schedule": "constant",
            "warmup": 0.0,
            **changes,
        }
        task = Task(
            dataset="ShapesReasoning",
            class_names=("cat", "dog"),
            environments=("one",),
            labels=((0,) * 9,),
            images=(tuple("abcdefghi"),),
            chains={(0, index): CAT for index in chains},
            schedule=Schedule(tuple(stages), stages[-1].last + 1, 1),
        )
        attach_task(hparams, task)
        return cls((3, 2, 2), 2, 1, hparams)

    return built


def cats(*pixels, concluded=None):
    """A minibatch of cats with these first pixels, whose own chains conclude with these classes: 0 is right."""
    x = torch.zeros(len(pixels), 3, 2, 2, dtype=torch.uint8)
    x[:, 0] = torch.tensor(pixels, dtype=torch.uint8)[:, None, None]
    x[:, 1] = torch.tensor(concluded or [0] * len(pixels), dtype=torch.uint8)[:, None, None]
    ids = torch.tensor([[0, index] for index in range(len(pixels))])
    return [(with_ids(x, ids), torch.zeros(len(pixels), dtype=torch.long))]


def gradients(algorithm):
    return [0.0 if weight.grad is None else float(weight.grad) for weight in algorithm.mllm.adapters().values()]


def weights(algorithm):
    return [float(weight.detach()) for weight in algorithm.mllm.adapters().values()]


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
@pytest.mark.parametrize(
    ("name", "more", "expected", "slopes"),
    [
        ("RDMLDG", {}, {"loss": 14.0, "label_loss": 6.0, "chain_loss": 8.0}, [6.0, 8.0]),
        ("SARR", {}, {"loss": 8.0, "chain_loss": 8.0}, [0.0, 8.0]),
        (
            "RDMLDG",
            {"gradient_balance": "norm"},
            {"loss": 8.0, "label_loss": 6.0, "chain_loss": 8.0, "label_scale": 8 / 6},
            [8.0, 8.0],
        ),
    ],
)
def test_a_round_of_which_half_is_rejected_is_the_kept_half_alone(build, name, more, expected, slopes, micro_batch):
    """Pixels 1, 5, 3, 7; the second and fourth chain name a dog. B' is 2: the means are those of p = 1 and 3."""
    found = []
    for batch in (cats(1, 5, 3, 7, concluded=[0, 1, 0, 1]), cats(1, 3)):
        algorithm = build(name, [Stage(1, 0, 9)], micro_batch=micro_batch, **more)
        values = algorithm.update(batch)
        assert {key: values[key] for key in expected} == pytest.approx(expected)
        assert gradients(algorithm) == pytest.approx(slopes)
        found.append((values, weights(algorithm)))
    (half, after_half), (alone, after_alone) = found
    shares = {"chain_share", "sarr1_accepted"}
    assert {key: half[key] for key in shares} == dict.fromkeys(shares, 0.5)
    assert {key: half[key] for key in half.keys() - shares} == {key: alone[key] for key in alone.keys() - shares}
    assert after_half == after_alone


@pytest.mark.parametrize(("name", "loss", "slopes"), [("ReasoningSFT", 4.0, [0, 4.0]), ("MTCT", 11.0, [9.0, 2.0])])
def test_an_image_without_a_chain_counts_where_it_has_a_label_term(build, name, loss, slopes):
    """Pixels 1 and 5, a chain for the first: 4 / 1 is the chain term alone; 3(1 + 5) / 2 + 4 / 2 with the labels."""
    algorithm = build(name, chains=[0])
    assert algorithm.update(cats(1, 5))["loss"] == pytest.approx(loss)
    assert gradients(algorithm) == pytest.approx(slopes)


@pytest.mark.parametrize("micro_batch", [1, 64])
def test_the_gradient_is_clipped_once_when_all_of_it_is_there(build, micro_batch):
    """Pixels 1 and 3, a chain for the first: (12, 4) / 2, norm √40; clipped at 1, (3, 1) / √10.

    Clipped after each micro-batch, (9, 0) / 2 would outweigh the first, whose gradient is (3, 4) / 2.
    """
    algorithm = build("MTCT", chains=[0], grad_clip=1.0, micro_batch=micro_batch)
    algorithm.update(cats(1, 3))
    assert gradients(algorithm) == pytest.approx([3 / 10**0.5, 1 / 10**0.5], rel=1e-5)


def test_a_balanced_gradient_is_clipped_after_its_terms_are_joined(build):
    """Label 3, chain 4: the factor is 4/3, the sum (4, 4); clipped at 1, both are 1/√2."""
    algorithm = build("MTCT", chains=[0], grad_clip=1.0, gradient_balance="norm")
    assert algorithm.update(cats(1))["label_scale"] == pytest.approx(4 / 3)
    assert gradients(algorithm) == pytest.approx([0.5**0.5, 0.5**0.5], rel=1e-5)


@pytest.mark.parametrize(
    ("balance", "loss", "slopes"), [("none", 0.5 * 3 + 2 * 4, [1.5, 8.0]), ("norm", 2 * 4, [2.0, 8.0])]
)
def test_both_weights_count_and_the_terms_are_reported_without_them(build, balance, loss, slopes):
    """label_weight 1/2, chain_weight 2: balanced, the label's gradient is a quarter as long as the chain's."""
    algorithm = build("MTCT", chains=[0], label_weight=0.5, chain_weight=2.0, gradient_balance=balance)
    values = algorithm.update(cats(1))
    assert (values["loss"], values["label_loss"], values["chain_loss"]) == pytest.approx((loss, 3, 4))
    assert gradients(algorithm) == pytest.approx(slopes)
    if balance == "norm":
        assert values["label_scale"] == pytest.approx(0.5 * 4 / 3)


def test_a_falling_chain_loss_changes_the_balance_of_balanced_gradients(build):
    """The first update of a stage is the label's alone, of the chain's norm; the second has exp(-4) of the chain."""
    algorithm = build("MTCT", chains=[0], gradient_balance="norm", chain_weighting="falling_loss", lr=1e-12)
    for factor in (0.0, math.exp(-4)):
        assert algorithm.update(cats(1))["chain_scale"] == pytest.approx(factor)
        assert gradients(algorithm) == pytest.approx([4.0, 4 * factor])


def test_a_label_weight_of_0_leaves_the_label_out_of_a_balanced_gradient(build):
    algorithm = build("MTCT", chains=[0], label_weight=0.0, gradient_balance="norm")
    assert algorithm.update(cats(1))["label_scale"] == 0
    assert gradients(algorithm) == [0, 4]


@pytest.mark.parametrize("balance", ["none", "norm"])
def test_a_step_has_its_own_gradient_alone(build, balance):
    """Pixel 1, then 2: nothing of the first step's 3 and 4 is left in the second's."""
    algorithm = build("MTCT", chains=[0], gradient_balance=balance)
    for pixel in (1, 2):
        algorithm.update(cats(pixel))
        assert gradients(algorithm) == pytest.approx([4.0 * pixel if balance == "norm" else 3.0 * pixel, 4.0 * pixel])


def test_a_stage_begins_with_a_fresh_optimizer(build):
    """AdamW's first update is the rate, 0.1, whatever the gradient; a step after one of 200 times its size is shorter.

    Three stages of one step: MTCT, two rounds.
    """
    algorithm = build("RDMLDG", [Stage(round, round, round) for round in range(3)], chains=[0])
    for step, pixel in enumerate((200, 1, 100), start=1):
        algorithm.update(cats(pixel))
        assert weights(algorithm) == pytest.approx([1 - 0.1 * step] * 2, abs=1e-5)
    within = build("RDMLDG", [Stage(0, 0, 1)], chains=[0])
    for pixel in (200, 1):
        within.update(cats(pixel))
    assert weights(within)[0] > 0.81


def test_a_step_of_nothing_moves_no_weight_by_momentum_or_decay(build):
    """The first batch moves the weights; of the second every chain is rejected."""
    algorithm = build("RDMLDG", [Stage(1, 0, 9)], weight_decay=0.5)
    algorithm.update(cats(1))
    before = weights(algorithm)
    assert before != [1.0, 1.0]
    values = algorithm.update([(with_ids(cats(7, concluded=[1])[0][0], torch.tensor([[0, 5]])), torch.tensor([0]))])
    assert values["loss"] == 0.0 and values["chain_share"] == 0.0
    assert weights(algorithm) == before


@pytest.mark.parametrize("micro_batch", [1, 64])
def test_the_chain_weight_grows_as_the_running_chain_loss_falls(build, micro_batch):
    """Weights nearly fixed: chain losses 4p. exp(-L) of the running L, 0 in the first update; a stage starts anew."""
    algorithm = build(
        "RDMLDG", [Stage(0, 0, 3), Stage(1, 4, 5)], chains=range(9), lr=1e-9, chain_weight=2.0, micro_batch=micro_batch,
        chain_weighting="falling_loss",
    )  # fmt: skip
    average = None
    for step, pixels in enumerate([(1, 3), (1, 1), (0, 0), (0, 1), (1, 0), (0, 0)]):
        average = None if step == 4 else average
        factor = 0.0 if average is None else math.exp(-average)
        values = algorithm.update(cats(*pixels))
        assert values["chain_scale"] == pytest.approx(factor)
        assert gradients(algorithm) == pytest.approx([3 * sum(pixels) / 2, 2 * factor * 4 * sum(pixels) / 2])
        loss = 4 * sum(pixels) / 2
        average = loss if average is None else 0.9 * average + 0.1 * loss
