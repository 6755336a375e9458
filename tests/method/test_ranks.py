"""What ranks exchange, between real processes: forks of this one, gloo on the CPU."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist

from domainbed_reasoning.method import ranks as ranks_module
from domainbed_reasoning.method.ranks import RankLost, Ranks


def in_ranks(world, tmp_path, work):
    """Return what ``work(ranks)`` returns on each rank, the repr of its error if it raises one."""
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()

    def run(rank):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=world)
        try:
            queue.put((rank, work(Ranks(rank, world))))
        except RuntimeError as error:
            queue.put((rank, repr(error)))

    processes = [fork.Process(target=run, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(world)]


def test_one_process_exchanges_nothing():
    one = Ranks()
    assert one.map(5, lambda rows: list(range(5))[rows]) == [[0, 1, 2, 3, 4]]
    assert list(one.merge(iter("ab"))) == ["a", "b"] and one.share([1, 2]) == [1, 2] and one.stream == ()
    assert one.gather(7) == [7] and one.from_first(7) == 7 and one.agreed("x") == "x"


def test_rows_are_divided_and_their_results_gathered_in_order(tmp_path):
    """Of two rows, the first of three ranks has none."""

    def work(ranks):
        return [ranks.map(count, lambda rows: list(range(10))[rows]) for count in (7, 2)], ranks.from_first(ranks.rank)

    assert in_ranks(3, tmp_path, work) == [([[[0, 1], [2, 3], [4, 5, 6]], [[0], [1]]], 0)] * 3


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
def test_every_rank_gets_the_items_of_all_ranks(tmp_path, monkeypatch, seconds):
    """Exchanged after every item or at the end; one rank has many, one has none."""
    monkeypatch.setattr(ranks_module, "_EXCHANGE_SECONDS", seconds)

    def work(ranks):
        return list(ranks.merge(iter([f"{ranks.rank}{index}" for index in range((3, 0, 1)[ranks.rank])])))

    for items in in_ranks(3, tmp_path, work):
        assert sorted(items) == ["00", "01", "02", "20"]


def test_gradients_sums_and_counts_add_up(tmp_path):
    """By hand, two ranks: gradients 1 + 2; 3 + none; none + none stays none. Sums 1 + 2 + 3, counts 1 + 1."""

    def work(ranks):
        weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
        weights[0].grad = torch.full((2,), 1.0 + ranks.rank)
        if ranks.rank == 0:
            weights[1].grad = torch.full((2,), 3.0)
        other = torch.tensor([10.0 * (1 + ranks.rank)])
        sums = {"loss": [torch.tensor(1.0), torch.tensor(2.0)] if ranks.rank == 0 else [torch.tensor(3.0)], "none": []}
        totals, counts = ranks.add_up(weights, [other], sums, {"loss": 1, "none": 0})
        return [w.grad.tolist() if w.grad is not None else None for w in weights], other.tolist(), totals, counts

    expected = ([[3.0, 3.0], [3.0, 3.0], None], [30.0], {"loss": 6.0, "none": 0.0}, {"loss": 2, "none": 0})
    assert in_ranks(2, tmp_path, work) == [expected] * 2


def test_ranks_whose_weights_differ_are_an_error(tmp_path):
    errors = in_ranks(2, tmp_path, lambda ranks: ranks.agreed(f"digest {ranks.rank}"))
    assert all(error.startswith("RuntimeError(\"The ranks' adapters differ") for error in errors)


def test_a_rank_that_has_ended_is_an_error_of_the_others(tmp_path):
    def work(ranks):
        if ranks.rank:
            return "ended"
        ranks.gather(0)
        return ranks.gather(0)

    error, ended = in_ranks(2, tmp_path, lambda ranks: work(ranks))
    assert ended == "ended" and error.startswith(RankLost.__name__)
