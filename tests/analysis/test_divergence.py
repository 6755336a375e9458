"""MMD² by hand, its test, and the encoders."""

import pytest
import torch

from domainbed_reasoning import __main__ as cli
from domainbed_reasoning.analysis.divergence import between_domains, mmd
from domainbed_reasoning.analysis.encoders import ClipEncoder, MLLMEncoder, load_encoder


def test_the_linear_kernel_by_hand():
    """x = (1,0), (0,1); y = (1,0), (1,0). Means (½,½) and (1,0): ‖·‖² = ½.

    Unbiased: x·x' = 0, y·y' = 1, mean x·y = ½: 0 + 1 - 1 = 0. Variances 1 and 0: relative 0 / ½.
    """
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = mmd(x, y, permutations=20)
    assert found.biased == pytest.approx(0.5)
    assert found.unbiased == pytest.approx(0.0)
    assert found.relative == pytest.approx(0.0)


def test_the_gaussian_kernel_by_hand():
    """Points 0, 0 and 2, 2 on a line: median distance² 4 (of 0, 0, 4 x 4), k across exp(-½): unbiased 2 - 2 exp(-½)."""
    x, y = torch.zeros(2, 1), torch.full((2, 1), 2.0)
    assert mmd(x, y, "rbf", 10).unbiased == pytest.approx(2 - 2 * torch.tensor(-0.5).exp().item())


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_p_is_small_where_domains_differ_and_evenly_spread_where_not(kernel):
    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.randn(40, 5) + torch.tensor([2.0, 0, 0, 0, 0])
    assert mmd(x, y, kernel, 200).p == pytest.approx(1 / 201)
    same = [mmd(torch.randn(20, 5), torch.randn(20, 5), kernel, 100).p for _ in range(40)]
    assert 0.3 < sum(same) / 40 < 0.7


def test_the_unbiased_estimate_is_zero_on_average_where_the_biased_is_not():
    torch.manual_seed(0)
    found = [mmd(torch.randn(10, 4), torch.randn(10, 4), permutations=1) for _ in range(200)]
    assert sum(one.biased for one in found) / 200 == pytest.approx(2 * 4 / 10, rel=0.15)
    assert abs(sum(one.unbiased for one in found) / 200) < 0.06


def test_invalid_arguments_are_rejected():
    with pytest.raises(ValueError, match="one of linear, rbf"):
        mmd(torch.zeros(3, 2), torch.zeros(3, 2), "cosine")
    with pytest.raises(ValueError, match="at least two images"):
        mmd(torch.zeros(1, 2), torch.zeros(3, 2))


def test_every_pair_of_domains_and_a_mean_for_each_modality():
    torch.manual_seed(0)
    images, texts = [torch.randn(5, 3) + env for env in range(3)], [torch.randn(5, 3) for _ in range(3)]
    rows = between_domains(images, texts, ["a", "b", "c"])
    assert [(row["domain"], row["other"]) for row in rows[:4]] == [("a", "b"), ("a", "c"), ("b", "c"), ("mean", "mean")]
    assert rows[3]["biased"] == pytest.approx(sum(row["biased"] for row in rows[:3]) / 3)
    assert rows[3]["biased"] > 1 > rows[7]["biased"]


@pytest.mark.parametrize(("name", "kind"), [("tiny", MLLMEncoder), ("tiny-clip", ClipEncoder)])
def test_encoders_return_unit_vectors_that_separate_domains(name, kind, material):
    encoder = load_encoder(name)
    assert isinstance(encoder, kind)
    vectors = [encoder.images(material.pixels(material.draw([env], 20))) for env in (0, 2)]
    texts = encoder.texts([material.task.chains[0, 0], "a"])
    for rows in (*vectors, texts):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    assert mmd(*vectors, permutations=100).p < 0.05


def test_tiles_are_a_jobs_and_not_to_be_set_for_a_plain_model(tmp_path, capsys):
    words = ["--dataset", "ShapesReasoning", "--encoder", "tiny", "--output", str(tmp_path), "--hparams"]
    assert cli.main(["analyze", "divergence", *words, '{"max_tiles": 4}']) == 1
    assert "--hparams max_tiles: --encoder tiny is not a job, so images are one tile" in capsys.readouterr().err
