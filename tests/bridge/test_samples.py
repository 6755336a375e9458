import copy
import gc
import json
import pickle

import pytest
import torch

from domainbed_reasoning.bridge import samples
from domainbed_reasoning.bridge.samples import attach_task, ids_of, task_of, with_ids
from domainbed_reasoning.method.task import Task


def batch(n=4):
    return with_ids(
        torch.arange(n * 12.0).reshape(n, 3, 2, 2), torch.stack([torch.zeros(n).long(), torch.arange(n)], 1)
    )


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.to("cpu"),
        lambda x: x.to(torch.float64),
        lambda x: x.float(),
        lambda x: x.half(),
        lambda x: x.clone(),
        lambda x: x.detach(),
        lambda x: x.contiguous(),
        lambda x: pickle.loads(pickle.dumps(x)),
    ],
)
def test_moves_keep_the_ids(move):
    assert torch.equal(ids_of(move(batch())), ids_of(batch()))


def test_rows_that_are_picked_keep_their_own_ids():
    x = batch()
    assert ids_of(x[1:3])[:, 1].tolist() == [1, 2]
    assert ids_of(x[torch.tensor([3, 0])])[:, 1].tolist() == [3, 0]
    assert ids_of(x[torch.tensor([True, False, False, True])])[:, 1].tolist() == [0, 3]
    assert ids_of(x[2]).tolist() == [0, 2]


def test_batches_join_with_their_ids():
    assert ids_of(torch.cat([batch(2), batch(3)]))[:, 1].tolist() == [0, 1, 0, 1, 2]
    assert ids_of(torch.stack([batch()[1], batch()[3]]))[:, 1].tolist() == [1, 3]


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + 1,
        lambda x: x.mean(0),
        lambda x: x.flip(0),
        lambda x: x.view(2, -1),
        lambda x: torch.cat([x, x], dim=1),
        lambda x: torch.cat([x, torch.zeros(1, 3, 2, 2)]),
        lambda x: torch.nn.functional.relu(x),
        lambda x: x[:, 0].transpose(0, 1),
    ],
)
def test_everything_else_returns_a_plain_tensor(operation):
    assert type(operation(batch())) is torch.Tensor


def test_values_and_gradients_are_a_plain_tensors():
    weight = torch.randn(12, requires_grad=True)
    loss = (batch().flatten(1) @ weight).sum()
    loss.backward()
    assert torch.equal(weight.grad, batch().as_subclass(torch.Tensor).flatten(1).sum(0))


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return with_ids(torch.full((3, 2, 2), index, dtype=torch.uint8), torch.tensor([1, index])), index % 2


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_hand_the_ids_on(workers):
    seen = []
    for x, _ in torch.utils.data.DataLoader(Items(), batch_size=4, num_workers=workers):
        assert torch.equal(x[:, 0, 0, 0].long(), ids_of(x)[:, 1])
        seen += ids_of(x)[:, 1].tolist()
    assert seen == list(range(6))


@pytest.mark.parametrize(
    "copied", [lambda h: h, dict, copy.deepcopy, lambda h: json.loads(json.dumps(h)), lambda h: h | {}]
)
def test_the_task_is_found_by_the_dictionary_and_by_any_equal_copy(copied):
    hparams = {"lr": 0.1, "chains": None, "nested": {"b": [1, 2], "a": True}}
    task = Task("D", ("cat", "dog"))
    attach_task(hparams, task)
    assert task_of(copied(hparams)) is task
    assert task_of({**copied(hparams), "lr": 0.2}) is None


def test_unreferenced_task_is_freed():
    gc.collect()
    hparams, others = {"lr": 1}, len(samples._LEFT)
    attach_task(hparams, Task("D", ("cat", "dog")))
    gc.collect()
    assert task_of(hparams) is None and len(samples._LEFT) <= others


class Dataset:
    """Holds its task, as ours do."""

    def __init__(self, hparams, target=2):
        self.task = Task("D", ("cat",), test_envs=(target,), labels=((0,),) * 3)
        attach_task(hparams, self.task)


def test_dictionary_identity_distinguishes_datasets_with_equal_hparams():
    first, second = {"lr": 1}, {"lr": 1}
    datasets = [Dataset(first, 0), Dataset(second, 1)]
    assert task_of(first) is datasets[0].task
    assert task_of(second) is datasets[1].task


def test_ambiguous_datasets_are_rejected():
    hparams = {"lr": 1}
    one, other = Dataset(hparams, 0), Dataset(hparams, 1)
    for own in (hparams, dict(hparams)):
        with pytest.raises(ValueError, match="2 datasets in this process were built with these hyper-parameters.*dict"):
            task_of(own)
    assert one.task is not other.task


def test_a_loop_over_targets_with_one_dictionary_gets_each_datasets_own_task():
    """What an earlier round's algorithm still holds is not taken for the task of the next."""
    hparams, held = {"lr": 1}, []
    for target in (0, 1, 2):
        dataset = Dataset(hparams, target)
        held.append([task_of(hparams)])
        assert held[-1] == [dataset.task]


def test_an_earlier_dataset_that_is_still_named_is_not_taken_for_a_later_one_that_is_not():
    hparams = {"lr": 1}
    earlier = Dataset(hparams, 0)
    loaders = [Dataset(hparams, 1)]
    with pytest.raises(ValueError, match="2 datasets"):
        task_of(hparams)
    assert loaders and earlier


def test_a_task_refuses_chains_of_target_domains():
    with pytest.raises(ValueError, match="target domain 2"):
        Task("D", ("cat", "dog"), test_envs=(2,), chains={(2, 5): "a chain"})
