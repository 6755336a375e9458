import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from domainbed_reasoning.method.schedule import Epoch, Stage, plan_stages


def test_stages_end_where_domainbed_evaluates():
    """Epochs of 10 steps; MTCT 3, two rounds of 3: DomainBed evaluates after steps 0, 30, 60, 90, the ends."""
    schedule = plan_stages([3, 3, 3], steps_per_epoch=10)
    assert [(s.round, s.first, s.last) for s in schedule.stages] == [(0, 0, 30), (1, 31, 60), (2, 61, 90)]
    assert (schedule.n_steps, schedule.checkpoint_freq) == (91, 30)


def test_unequal_stages_are_evaluated_at_their_common_measure():
    """4 and 2 epochs: every 2 epochs."""
    schedule = plan_stages([4, 2], steps_per_epoch=5)
    assert [(s.first, s.last) for s in schedule.stages] == [(0, 20), (21, 30)]
    assert schedule.checkpoint_freq == 10


def test_steps_option_is_divided_in_proportion():
    schedule = plan_stages([3, 3, 3, 3], steps_per_epoch=1000, n_steps=41)
    assert [(s.first, s.last) for s in schedule.stages] == [(0, 10), (11, 20), (21, 30), (31, 40)]


def test_zero_epochs_omit_a_stage_and_no_epochs_give_one_step():
    assert [s.round for s in plan_stages([0, 3], 5).stages] == [1]
    zero_shot = plan_stages([], 5)
    assert zero_shot.n_steps == 1 and len(zero_shot.stages) == 1


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
    st.integers(1, 50),
    st.one_of(st.none(), st.integers(1, 400)),
)
def test_stages_cover_every_step_once_and_end_at_evaluations(epochs, steps_per_epoch, n_steps):
    schedule = plan_stages(epochs, steps_per_epoch, n_steps)
    covered = [step for stage in schedule.stages for step in range(stage.first, stage.last + 1)]
    assert covered == list(range(schedule.n_steps))
    if n_steps is not None:
        assert schedule.n_steps == n_steps
    for stage in schedule.stages:
        assert stage.last % schedule.checkpoint_freq == 0 or stage.last == schedule.n_steps - 1
        assert schedule.at(stage.first) is stage and schedule.at(stage.last) is stage


@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_fewer_steps_than_stages_go_to_the_first_ones_and_the_others_are_named(n_steps):
    schedule = plan_stages([6, 2, 2, 2], 10, n_steps)
    assert [(stage.round, stage.steps) for stage in schedule.stages] == [(index, 1) for index in range(n_steps)]
    assert schedule.left_out == tuple(range(n_steps, 4))
    assert f"--steps {n_steps}" in schedule.shortfall() and "SARR round 3" in schedule.shortfall()


@pytest.mark.parametrize("epochs", [[6, 2, 2, 2], [3, 3, 3, 3], [1, 5, 5], [0, 2, 2], [1] * 10])
@pytest.mark.parametrize("n_steps", [4, 5, 7, 10, 12, 14, 20, 21, 23, 50, 333])
def test_steps_option_omits_no_stage_if_there_are_enough_steps(epochs, n_steps):
    """Every stage has its share by largest remainder, moved at either end by half an interval between evaluations."""
    schedule = plan_stages(epochs, 10, n_steps)
    stages = [index for index, count in enumerate(epochs) if count]
    assert [stage.round for stage in schedule.stages] == stages[:n_steps]
    assert schedule.left_out == tuple(stages[n_steps:])
    assert schedule.shortfall() == "" or len(stages) > n_steps
    if n_steps > sum(epochs):
        for stage in schedule.stages:
            share = epochs[stage.round] * n_steps / sum(epochs)
            assert abs(stage.steps - share) < 1 + schedule.checkpoint_freq


def test_twenty_steps_have_all_three_rounds():
    """6, 2, 2, 2 epochs: 10, 3.3, 3.3, 3.3 of 20 steps; DomainBed evaluates after 0, 4, 8, 12, 16 and 19."""
    schedule = plan_stages([6, 2, 2, 2], 19, n_steps=20)
    assert [(s.round, s.first, s.last) for s in schedule.stages] == [(0, 0, 8), (1, 9, 12), (2, 13, 16), (3, 17, 19)]
    assert schedule.checkpoint_freq == 4


def test_six_steps_of_four_stages_are_shared_by_largest_remainder():
    """2 a unit of 2 epochs do not go around: 5 steps beside step 0 over 3, 1, 1, 1 are 2.5, 0.8, 0.8, 0.8."""
    assert [stage.steps for stage in plan_stages([6, 2, 2, 2], 19, n_steps=6).stages] == [3, 1, 1, 1]
    assert [stage.steps for stage in plan_stages([6, 2, 2, 2], 19, n_steps=4).stages] == [1, 1, 1, 1]


def test_zero_steps_mean_unset_and_negative_ones_are_rejected():
    assert plan_stages([3, 3], 10, n_steps=0) == plan_stages([3, 3], 10)
    with pytest.raises(ValueError, match="--steps must be 1 or more; got -1"):
        plan_stages([3, 3], 10, n_steps=-1)


def test_an_epoch_draws_as_many_images_as_there_are_and_as_many_from_a_small_domain_as_from_a_large_one():
    """10 and 90 images, 5 of each a step: 100 / 10 = 10 steps; 50 draws are 5 passes over 10 images, 5/9 over 90."""
    epoch = Epoch({"small": 10, "large": 90}, batch_size=5)
    assert epoch.steps == 10
    assert epoch.passes("small", 10) == 5 and epoch.passes("large", 10) == pytest.approx(5 / 9)
    assert epoch.missed("small", 10) == pytest.approx(0.9**50) and epoch.missed("large", 10) == pytest.approx(
        (89 / 90) ** 50
    )
    assert Epoch({"a": 10, "b": 11}, batch_size=5).steps == 3  # rounded up
    assert list(epoch.exposure([Stage(0, 0, 9), Stage(1, 10, 11)])) == [
        "passes (never drawn) in supervised stage (steps 0-9): small 5.0 (1%), large 0.6 (57%)",
        "passes (never drawn) in SARR round 1 (steps 10-11): small 1.0 (35%), large 0.1 (89%)",
    ]


def test_share_never_drawn_matches_sampling_with_replacement():
    drawn = torch.randint(200, (50, 300), generator=torch.Generator().manual_seed(0))
    missed = [1 - len(set(row.tolist())) / 200 for row in drawn]
    epoch = Epoch({"domain": 200}, batch_size=30)
    assert epoch.missed("domain", 10) == pytest.approx(sum(missed) / len(missed), abs=0.01)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (1, '43 images per step from 1, 129 from three as on the paper\'s datasets; "batch_size": 129 makes 129'),
        (3, ""),
        (5, '215 images per step from 5, 129 from three as on the paper\'s datasets; "batch_size": 26 makes 130'),
    ],
)
def test_batch_size_per_domain_is_explained_unless_there_are_three_sources(sources, expected):
    first, *others = Epoch({str(source): 86 for source in range(sources)}, batch_size=43).about()
    assert first.startswith(f"an epoch is 2 steps of 43 images from each of {sources} source domains, drawn with")
    assert others == ([f"batch_size 43 is per source domain: {expected}"] if expected else [])


def test_averaged_weights_are_those_of_every_epoch():
    """The stages are the same; without the option each has a single evaluation, at its end."""
    for n_steps in (None, 61):
        plan, often = (plan_stages([3, 3], 10, n_steps, every_epoch=every) for every in (False, True))
        assert often.stages == plan.stages and plan.checkpoint_freq == 30 and often.checkpoint_freq == 10
