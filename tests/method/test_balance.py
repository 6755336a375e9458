"""Scaling the label term's gradient to the norm of the chain term's."""

import pytest
import torch

from domainbed_reasoning.method.balance import LabelGradients
from domainbed_reasoning.method.objective import Objective


def two_weights():
    return [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)]


def test_the_label_gradient_is_scaled_to_the_norm_of_the_chain_gradient():
    """Label (3, 0, 4), norm 5; chain (0, 10, 0), norm 10: factor 2, sum (6, 10, 8). With weight 0.5: (3, 10, 4)."""
    for weight, factor, expected in ((1.0, 2.0, [6.0, 10.0, 8.0]), (0.5, 1.0, [3.0, 10.0, 4.0])):
        pair, single = weights = two_weights()
        gradients = LabelGradients(weights)
        gradients.add(3 * pair[0] + 4 * single[0])
        (10 * pair[1]).backward()
        assert gradients.join(weight) == pytest.approx(factor)
        assert [*pair.grad.tolist(), *single.grad.tolist()] == pytest.approx(expected)


def test_micro_batches_add_up_before_the_norm_is_taken():
    """Two label parts (3, 0) and (-3, 4) make (0, 4), norm 4; the chain's norm is 2: factor 0.5."""
    pair, _ = weights = two_weights()
    gradients = LabelGradients(weights)
    gradients.add(3 * pair[0])
    gradients.add(-3 * pair[0] + 4 * pair[1])
    (2 * pair[0]).backward()
    assert gradients.join(1.0) == pytest.approx(0.5)
    assert pair.grad.tolist() == pytest.approx([2.0, 2.0])


def test_without_a_chain_the_label_keeps_its_weight():
    pair, _ = weights = two_weights()
    gradients = LabelGradients(weights)
    gradients.add(3 * pair[0])
    assert gradients.join(0.1) == 0.1
    assert pair.grad.tolist() == pytest.approx([0.3, 0.0])


def test_without_a_label_gradient_the_chain_is_left_as_it_is():
    pair, _ = weights = two_weights()
    gradients = LabelGradients(weights)
    (2 * pair[0]).backward()
    gradients.join(1.0)
    assert pair.grad.tolist() == [2.0, 0.0]


@pytest.mark.parametrize("has_chain", [True, False])
def test_only_a_micro_batch_with_a_chain_keeps_its_graph(has_chain):
    """Without one nothing else would free the activations before the next micro-batch has its own."""
    weight = torch.ones(3, requires_grad=True)
    LabelGradients([weight]).add(term := (weight * weight).sum(), retain_graph=has_chain)
    if has_chain:
        torch.autograd.grad(term, weight)
    else:
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(term, weight)


def test_the_objective_keeps_graphs_for_chains_alone(monkeypatch):
    flags = []
    monkeypatch.setattr(LabelGradients, "add", lambda self, term, retain_graph=True: flags.append(retain_graph))
    weight = torch.ones(1, requires_grad=True)
    objective = Objective(1.0, 1.0, micro_batch=1, balanced=True)

    def terms(images, names, texts):
        return weight * torch.ones(len(images)), weight * torch.ones(len(images)) if texts is not None else None

    objective.backward(terms, torch.zeros(3, 1), ["a", "b", "c"], ["x", None, "y"], [0, 1, 2], [weight])
    assert sorted(flags) == [False, True, True]
