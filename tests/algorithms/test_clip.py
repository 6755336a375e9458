"""CLIPZeroShot and CLIPLoRA, driven as DomainBed's train script drives them, on the random CLIP and on a saved one."""

import json
import math
from pathlib import Path

import pytest
import torch
from domainbed import hparams_registry

from builders.files import read_lines
from builders.training import build, minibatches
from domainbed_reasoning import registry
from domainbed_reasoning.bridge.samples import task_of
from domainbed_reasoning.mllm.clip import add_clip_lora, clip_image_edge, load_clip
from domainbed_reasoning.mllm.pixels import resize

NAMES = ["CLIPZeroShot", "CLIPLoRA"]


@pytest.fixture(scope="module")
def saved_clip(tmp_path_factory):
    """The tiny random CLIP as a folder, as a downloaded one would lie there."""
    folder = tmp_path_factory.mktemp("clip")
    clip = load_clip("tiny")
    clip.network.save_pretrained(folder)
    clip.tokenizer.save_pretrained(folder)
    return str(folder)


def test_scores_are_those_of_transformers_own_forward(saved_clip):
    """DomainBed's bytes through `CLIPModel.forward` with the logits it computes itself."""
    import transformers

    dataset, algorithm = build("CLIPZeroShot", clip_model=saved_clip)
    x = minibatches(dataset)[0][0]
    network = transformers.CLIPModel.from_pretrained(saved_clip)
    tokens = transformers.AutoTokenizer.from_pretrained(saved_clip)(
        [f"a photo of a {name}." for name in task_of(algorithm.hparams).class_names], padding=True, return_tensors="pt"
    )
    processor = transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False)
    pixels = processor(list(x.as_subclass(torch.Tensor)), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = network(pixel_values=pixels, **tokens).logits_per_image
    torch.testing.assert_close(algorithm.predict(x), expected, rtol=1e-4, atol=1e-4)


def test_the_loss_falls_and_only_the_adapters_of_both_towers_move():
    dataset, algorithm = build("CLIPLoRA")
    frozen = {key: weight.clone() for key, weight in algorithm.named_parameters() if not weight.requires_grad}
    before = algorithm.state_dict()
    batch = minibatches(dataset)
    losses = [algorithm.update(batch)["loss"] for _ in range(25)]
    assert losses[-1] < 0.9 * losses[0]
    after = algorithm.state_dict()
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert any("vision_model" in key for key in moved) and any("text_model" in key for key in moved)
    assert all("lora_" in key for key in after)
    assert all(torch.equal(weight, frozen[key]) for key, weight in algorithm.named_parameters() if key in frozen)


def test_zero_shot_changes_nothing_and_takes_one_step():
    dataset, algorithm = build("CLIPZeroShot")
    before = {key: weight.clone() for key, weight in algorithm.named_parameters()}
    algorithm.update(minibatches(dataset))
    assert dataset.N_STEPS == 1
    assert all(torch.equal(weight, before[key]) for key, weight in algorithm.named_parameters())
    assert algorithm.state_dict() == {}


def test_a_checkpoint_holds_adapters_alone_and_brings_the_scores_back():
    dataset, algorithm = build("CLIPLoRA")
    batch = minibatches(dataset)
    for _ in range(3):
        algorithm.update(batch)
    algorithm.eval()
    _, fresh = build("CLIPLoRA")
    fresh.eval()
    x = batch[0][0]
    assert not torch.allclose(fresh.predict(x), algorithm.predict(x))
    fresh.load_state_dict(algorithm.state_dict())
    torch.testing.assert_close(fresh.predict(x), algorithm.predict(x))
    _, other = build("CLIPLoRA", clip_lora_rank=4)
    with pytest.raises(ValueError, match="do not match this CLIP"):
        other.load_state_dict(algorithm.state_dict())


def test_every_epoch_ends_with_an_evaluation():
    """Three sources of 112 training images, 3 x 6 a step: 19 steps an epoch."""
    dataset, algorithm = build("CLIPLoRA", clip_epochs=4)
    assert (dataset.N_STEPS, dataset.CHECKPOINT_FREQ) == (77, 19)
    assert algorithm.schedule.n_steps == 77


def test_the_tiny_clip_is_the_same_every_time_and_leaves_the_random_stream_alone():
    torch.manual_seed(5)
    first = load_clip("tiny")
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    torch.manual_seed(6)
    for own, other in zip(first.parameters(), load_clip("tiny").parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_long_text_is_the_mean_of_its_windows():
    """150 letters are 150 tokens here: two windows of 75, 77 tokens with their ends."""
    clip = load_clip("tiny")
    a, b = "a" * 75, "b" * 75
    with torch.no_grad():
        long, parts = clip.long_text_features([f"{a} {b}", a]), clip.text_features([a, b])
    torch.testing.assert_close(long[0], torch.nn.functional.normalize(parts.sum(0), dim=0))
    torch.testing.assert_close(long[1], parts[0])


def test_fresh_adapters_change_no_vector():
    clip = load_clip("tiny")
    texts = ["a photo of a dog."]
    before = clip.text_features(texts)
    torch.testing.assert_close(add_clip_lora(clip, 2, 1, 0.0).eval().text_features(texts), before)


def test_model_that_is_not_clip_is_rejected_with_a_fix(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for use in (load_clip, clip_image_edge):
        with pytest.raises(ValueError, match="type 'bert', not CLIP"):
            use(str(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_hparams_have_sources_and_do_not_collide_with_an_mllms_model(name):
    table = registry.load(registry.ALGORITHMS[name]).HPARAMS
    assert all(hparam.source for hparam in table.values())
    assert not table.keys() & {"model", "lora_rank", "lora_alpha", "lora_dropout", "mtct_epochs"}
    assert hparams_registry.default_hparams(name, "PACSReasoning")["clip_model"] == "openai/clip-vit-base-patch16"
    build(name, model="OpenGVLab/InternVL3-8B-hf")  # what a sweep's --hparams says to MLLM algorithms


def test_the_stock_command_trains_answers_and_records(run_stock, tmp_path):
    """On the stand-in; the tests above run on upstream where it is."""
    stand_in = Path(__file__).parents[1] / "standin"
    run_stock(
        stand_in, "train", "--dataset", "ShapesReasoning", "--algorithm", "CLIPLoRA", "--test_envs", 3,
        "--output_dir", tmp_path, "--hparams", '{"clip_epochs": 1}', cwd=tmp_path,
    )  # fmt: skip
    records = read_lines(tmp_path / "results.jsonl")
    assert (tmp_path / "done").exists()
    assert [record["step"] for record in records] == [0, 19]
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert answers["env3"]["in"]["label"] == pytest.approx(records[-1]["env3_in_acc"])
    assert answers["env3"]["in"]["chain"] is None


def test_scores_after_an_update_are_those_of_the_new_text_features():
    """Asked before and after each update: features are kept between the batches of one evaluation and no longer."""
    dataset, algorithm = build("CLIPLoRA")
    batch = minibatches(dataset)
    x = batch[0][0]
    with torch.no_grad():
        for _ in range(3):
            before = algorithm.predict(x)
            texts = algorithm.clip.text_features(algorithm.prompts)
            algorithm.train()
            with torch.enable_grad():
                algorithm.update(batch)
            algorithm.eval()
            fresh = algorithm.clip.text_features(algorithm.prompts)
            assert (fresh - texts).abs().max() > 1e-4
            expected = algorithm.clip.logit_scale * algorithm.clip.image_features(x) @ fresh.T
            torch.testing.assert_close(algorithm.predict(x), expected)
            assert not torch.equal(before, expected)


def test_the_rate_falls_from_lr_to_0_along_half_a_cosine():
    """20 steps: step t from 0 is taken at lr · (1 + cos(π t / 20)) / 2, the eleventh at half the rate."""
    dataset, algorithm = build("CLIPLoRA", clip_epochs=1, lr=1e-2)
    assert algorithm.schedule.n_steps == 20
    used = []
    algorithm.optimizer.register_step_pre_hook(lambda optimizer, *given: used.append(optimizer.param_groups[0]["lr"]))
    batch = minibatches(dataset, size=1)
    for _ in range(20):
        algorithm.update(batch)
    assert used == pytest.approx([1e-2 * (1 + math.cos(math.pi * t / 20)) / 2 for t in range(20)])
    assert used[10] == pytest.approx(5e-3)


def test_an_update_has_its_own_gradient_alone():
    """The same batch again at a rate of nearly 0 has the gradient of the first time, not twice that."""
    dataset, algorithm = build("CLIPLoRA", lr=1e-12)
    batch, gradients = minibatches(dataset, size=2), []
    for _ in range(2):
        algorithm.update(batch)
        gradients.append({name: weight.grad.clone() for name, weight in algorithm.clip.adapters().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)
    assert max(float(gradient.abs().max()) for gradient in gradients[0].values()) > 1e-4


def test_a_wide_image_is_seen_from_edge_to_edge():
    """Its left quarter is white, the rest black: what CLIP sees is the same picture squeezed to its square."""
    clip = load_clip("tiny")
    image = torch.zeros(1, 3, 48, 96, dtype=torch.uint8)
    image[..., :24] = 255
    with torch.no_grad():
        wide, square = clip.image_features(image), clip.image_features(resize(image, 48))
        halves = [clip.image_features(half) for half in image.split(48, dim=3)]
    torch.testing.assert_close(wide, square)
    assert all((wide - half).abs().max() > 1e-3 for half in halves)
