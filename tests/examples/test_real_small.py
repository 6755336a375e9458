"""The example on tiny random parts: a language model, a vision tower and forty drawn pictures; nothing is fetched."""

import io
import random
import tarfile

import numpy as np
import pytest
import timm
import torch
import transformers as tf
from PIL import Image, ImageDraw

from builders import families
from domainbed_reasoning.chains.chain import parse_chain
from domainbed_reasoning.mllm import load_mllm
from examples.real_small import align, build, compose, fetch, measure, pictures
from examples.real_small.questions import options_for, write_chain

TOWER = "test_efficientnet"
NAMES = ("dog", "axe", "red barn", "alarm clock", "pear", "kite", "whale", "owl", "drum", "rose")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Forty pictures of ten names: a colored bar each, PNG with a transparent background or JPEG."""
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for at in range(40):
        picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        ImageDraw.Draw(picture).rectangle((at, 8, at + 20, 56), fill=(25 * (at % 10), 200 - 20 * (at % 10), 90, 255))
        path = folder / f"{at}.{'png' if at % 2 else 'JPEG'}"
        picture.convert("RGBA" if at % 2 else "RGB").save(path)
        found.append(
            pictures.Picture(path, NAMES[at % 10], "cartoon", ("small",), kind="animal" if at % 10 == 0 else "")
        )
    return found


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """A saved FastVLM of a tiny Llama with tied embeddings and timm's tiny EfficientNet, and that tower."""
    torch.manual_seed(0)
    tokenizer = families._tokenizer(tf.Qwen2Tokenizer, "bytes", ["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    config = tf.LlamaConfig(**families._text(tokenizer, num_key_value_heads=2, tie_word_embeddings=True))
    tower = timm.create_model(TOWER).eval()
    model, processor = compose.compose(tf.LlamaForCausalLM(config), tokenizer, tower, TOWER)
    folder = tmp_path_factory.mktemp("composed")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, tower


def _alignment(folder, tower, drawn, cache):
    seen = pictures.features(tower.forward_features, drawn, cache, seed=0)
    torch.manual_seed(0)
    return align.Alignment(load_mllm(str(folder), lora=build.LORA, dtype="float32").eval(), drawn, seen, seed=0)


def test_the_composed_model_sees_what_its_tower_sees(composed, drawn, tmp_path):
    """49 image tokens, and the features that alignment is trained on are those of the loaded model."""
    folder, tower = composed
    mllm = load_mllm(str(folder), dtype="float32").eval()
    assert mllm.image_size == 224 and mllm.base.config.image_seq_length == 49
    assert (mllm.prompt("?")["input_ids"] == mllm.base.config.image_token_id).sum() == 49
    seen = pictures.features(tower.forward_features, drawn[:3], tmp_path / "features", seed=0)
    assert seen.shape == (3, pictures.VIEWS, 49, 256)
    pixels = torch.stack([_pixels(picture) for picture in drawn[:3]])
    own = mllm.base.model.vision_tower(mllm.image_inputs(pixels)["pixel_values"]).last_hidden_state
    torch.testing.assert_close(seen[:, 0].float(), own.flatten(2).transpose(1, 2), rtol=2e-2, atol=2e-2)


def _pixels(picture):
    return torch.from_numpy(np.array(pictures.draw(picture.path, 0, None))).permute(2, 0, 1)


def test_alignment_resumes_where_it_was_killed_and_saves_a_model(composed, drawn, tmp_path, monkeypatch):
    """Killed in the second stage: values and losses are those of an undisturbed run; the result answers and scores."""
    monkeypatch.setattr(align, "SAVE_EVERY", 1)
    plan = align.stages(3, 3, 2)
    whole = _alignment(*composed, drawn, tmp_path / "features")
    record = whole.run(plan, tmp_path / "whole.pt")
    assert [stage["stage"] for stage in record] == ["regress", "names", "chains"]

    killed = _alignment(*composed, drawn, tmp_path / "features")
    step = killed._step

    def die(stage, at, optimizer):
        if (stage.name, at) == ("names", 2):
            raise KeyboardInterrupt
        return step(stage, at, optimizer)

    monkeypatch.setattr(killed, "_step", die)
    with pytest.raises(KeyboardInterrupt):
        killed.run(plan, tmp_path / "killed.pt")
    resumed = _alignment(*composed, drawn, tmp_path / "features")
    assert resumed.run(plan, tmp_path / "killed.pt") == record
    for name, value in whole.values.items():
        assert torch.equal(value, resumed.values[name]), name

    with pytest.raises(ValueError, match="killed.pt belongs to a run with other steps. Delete it"):
        _alignment(*composed, drawn, tmp_path / "features").run(align.stages(3, 4, 2), tmp_path / "killed.pt")

    build.save(whole, composed[0], tmp_path / "model")
    built = load_mllm(str(tmp_path / "model"), dtype="float32").eval()
    tower = built.base.model.vision_tower.state_dict()
    before = load_mllm(str(composed[0]), dtype="bfloat16").base.model.vision_tower.state_dict()
    for name, value in before.items():
        torch.testing.assert_close(tower[name].float(), value.float(), rtol=0, atol=0)
    share = measure.one_of_four(built, drawn, whole.held_out, 3, seed=0)
    assert 0 <= share <= 1


def test_regression_moves_the_projector_alone_towards_the_names(composed, drawn, tmp_path):
    alignment = _alignment(*composed, drawn, tmp_path / "features")
    before = {name: value.clone() for name, value in alignment.values.items()}
    (record,) = alignment.run([align.Stage("regress", 60, 32, 3e-3)], tmp_path / "alignment.pt")
    assert record["losses"][-1] < 0.7 * record["losses"][0]
    moved = {name for name, value in alignment.values.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("projector.")}


def test_written_chains_parse_and_never_offer_the_kind_beside_the_name(drawn):
    for at, picture in enumerate(drawn):
        rng = random.Random(at)
        options = options_for(picture.name, picture, [*NAMES, "animal"], 4, rng)
        assert picture.name in options and len(set(options)) == len(options)
        assert not picture.kind or picture.kind not in options
        assert parse_chain(write_chain(picture, picture.name, options, rng)).conclusion == picture.name


def test_an_archive_with_another_digest_is_refused(tmp_path):
    package = fetch.Package("thing", "1.0", "npm", "thing-1.0.tgz", "0" * 64, "MIT")
    with tarfile.open(tmp_path / package.archive, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("package/a"), io.BytesIO())
    with pytest.raises(ValueError, match="thing-1.0.tgz has SHA-256 .*, expected 000"):
        fetch.fetch(package, tmp_path)
