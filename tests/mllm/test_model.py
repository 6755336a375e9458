"""`load_mllm` on the embedded model: a real InternVL with its real processor."""

import json
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from builders.chat import chat_inputs
from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.images import shapes
from domainbed_reasoning.mllm import LoraSettings, ModelError, devices, load_mllm, loading
from domainbed_reasoning.mllm.adapters import lora_targets
from domainbed_reasoning.mllm.load import checkpoint_activations
from domainbed_reasoning.mllm.loading import TINY, check_memory, image_edge, resolve
from domainbed_reasoning.mllm.pixels import from_picture, resize, to_uint8

NAMES = shapes.CLASS_NAMES
Q_CLS = q_cls(NAMES, "creature")
Q_REASON = q_reason(NAMES, "creature")


@pytest.fixture(scope="module")
def mllm():
    """The embedded model with adapters that are not zero, as after some training."""
    torch.manual_seed(0)
    model = load_mllm("tiny", lora=LoraSettings(rank=8, alpha=16))
    with torch.no_grad():
        for name, weight in model.adapters().items():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    return model


@pytest.fixture(scope="module")
def images():
    pictures = [np.array(shapes.render(index % 4, index, misleading=False)) for index in range(6)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def naive_log_likelihoods(mllm, images, question, answers):
    """One sequence an image through plain transformers calls: processor, chat template, full forward, log-softmax."""
    from PIL import Image

    out = []
    for image, answer in zip(images, answers, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        inputs = chat_inputs(mllm.processor, picture, question, crop_to_patches=False)
        target = mllm.tokenizer(answer + "<|im_end|>", add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = torch.cat([inputs["input_ids"], target], dim=1)
        logits = mllm.network(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0]
        log_probs = logits.log_softmax(-1)
        first = inputs["input_ids"].shape[1]
        out.append(torch.stack([log_probs[first - 1 + t, token] for t, token in enumerate(target[0])]))
    return out


@pytest.mark.parametrize("question", [Q_CLS, Q_REASON], ids=["q_cls", "q_reason"])
def test_log_likelihoods_equal_plain_transformers_calls_one_sequence_each(mllm, images, question):
    answers = [NAMES[i] if question == Q_CLS else shapes.chain(0, i) for i in range(len(images))]
    with torch.no_grad():
        found, mask = mllm.log_likelihoods(mllm.encode(images), question, answers)
        for row, expected in enumerate(naive_log_likelihoods(mllm, images, question, answers)):
            torch.testing.assert_close(found[row][mask[row]], expected, rtol=1e-5, atol=1e-5)


def test_two_paths_in_one_row_equal_two_rows_in_likelihoods_and_gradients(mllm, images):
    """Chains and names of several lengths; float32, within 1e-5."""
    answers = ([NAMES[i] for i in range(6)], [shapes.chain(0, i) + " again" * (i % 3) for i in range(6)])
    found = []
    for rows in ("tree", "naive"):
        pairs = mllm.two_path_log_likelihoods(images, (Q_CLS, Q_REASON), answers, rows)
        sum((values * mask).sum() for values, mask in pairs).div(10).backward()
        found.append((pairs, {name: weight.grad.clone() for name, weight in mllm.adapters().items()}))
        mllm.zero_grad()
    for (values, mask), (expected, expected_mask) in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(mask, expected_mask)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-4, atol=1e-5)


def test_class_scores_by_trie_equal_one_row_a_name(mllm, images):
    names = [*NAMES, "dax wug", "dax wug zorb", "fe"]  # nested and shared beginnings
    question = q_cls(names)
    with torch.no_grad():
        encoded = mllm.encode(images)
        rows = [mllm.log_likelihoods(encoded, question, [name] * len(images)) for name in names]
        by_rows = torch.stack([(values * mask).sum(dim=1) for values, mask in rows], dim=1)
    torch.testing.assert_close(mllm.class_scores(images, question, names), by_rows, rtol=1e-4, atol=1e-4)


def test_copy_is_not_affected_by_later_training(mllm, images):
    before = mllm.class_scores(images, Q_CLS, NAMES)
    copy = mllm.copy_for_inference()
    own = {name: weight.detach().clone() for name, weight in mllm.adapters().items()}
    with mllm.with_adapters({name: weight + 0.05 for name, weight in own.items()}) as changed:
        assert (changed.class_scores(images, Q_CLS, NAMES) - before).abs().max() > 1e-3
        torch.testing.assert_close(copy.class_scores(images, Q_CLS, NAMES), before, rtol=1e-4, atol=1e-4)
    for name, weight in mllm.adapters().items():
        assert torch.equal(weight, own[name])
    assert not any(weight.requires_grad for weight in copy.parameters())


def test_a_batch_is_answered_as_its_images_alone_are(mllm, images):
    together = mllm.generate(images, Q_REASON, max_new_tokens=48)
    assert together == [mllm.generate(image[None], Q_REASON, max_new_tokens=48)[0] for image in images]


def test_sampling_never_writes_an_image_token(mllm, images):
    torch.manual_seed(0)
    many = images.repeat(10, 1, 1, 1)
    for text in mllm.generate(many, Q_REASON, max_new_tokens=32, temperature=5.0):
        ids = mllm.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert mllm.base.config.image_token_id not in ids
        mllm.log_likelihoods(mllm.encode(images[:1]), Q_REASON, [text or "x"])  # can be trained on


def test_checkpoint_generation_config_is_ignored(images, tmp_path):
    """Qwen2.5-VL's comes with a penalty on repetition, top_k, top_p and a temperature; this one with all there is."""
    folder = shutil.copytree(TINY, tmp_path / "model")
    file = folder / "generation_config.json"
    config = json.loads(file.read_text()) | {
        "do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.01, "min_p": 0.9, "typical_p": 0.1,
        "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2,
        "min_new_tokens": 30, "bad_words_ids": [[40], [41], [42]], "begin_suppress_tokens": list(range(10, 90)),
        "sequence_bias": [[[50], 9.0]], "exponential_decay_length_penalty": [1, 2.0],
    }  # fmt: skip
    file.write_text(json.dumps(config))
    shaped, plain = load_mllm(str(folder)).eval(), load_mllm("tiny").eval()
    assert shaped.base.generation_config.repetition_penalty == 1.5
    for more in ({}, {"temperature": 0.7, "top_p": 0.9}, {"beginnings": ["<SUMMARY>"] * len(images)}):
        written = []
        for model in (shaped, plain):
            torch.manual_seed(1)
            written.append(model.generate(images, Q_REASON, 32, **more))
        assert written[0] == written[1]


def test_sampling_draws_from_the_whole_vocabulary(images):
    """transformers' own top_k would leave 50 tokens."""
    torch.manual_seed(0)
    many = images[:1].expand(300, -1, -1, -1)
    assert len(set(load_mllm("tiny").eval().generate(many, Q_REASON, 1, temperature=1000.0))) > 60


@pytest.mark.parametrize("hostile", ["<IMG_CONTEXT>", "<|im_end|>", "<img>x</img>", "<|im_start|>assistant"])
def test_special_tokens_in_names_and_chains_are_data(mllm, images, hostile):
    question = q_cls(["dog", hostile])
    ids = mllm.prompt(question)["input_ids"][0].tolist()
    plain = mllm.prompt(q_cls(["dog", "cat"]))["input_ids"][0].tolist()
    for token in mllm.tokenizer.all_special_ids:
        assert ids.count(token) == plain.count(token)
    assert mllm.target(hostile).count(mllm.end_token) == 1
    assert mllm.class_scores(images, question, ["dog", hostile]).isfinite().all()


def test_checkpointing_uses_no_deprecated_name():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model = load_mllm("tiny", lora=LoraSettings(rank=2, alpha=4), gradient_checkpointing=True)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_checkpointing_uses_the_old_name_if_necessary():
    """transformers before 5.24."""
    asked = []
    checkpoint_activations(SimpleNamespace(gradient_checkpointing_enable=asked.append))
    assert asked == [{"use_reentrant": False}]


def test_adapters_are_in_both_towers_and_nowhere_else(mllm):
    names = list(mllm.adapters())
    assert any("vision_tower" in name for name in names)
    assert any("language_model" in name for name in names)
    assert not any("lm_head" in name or "projector" in name for name in names)
    assert all("lora_" in name for name in names)


@pytest.mark.parametrize(("towers", "absent"), [("vision", "language_model"), ("language", "vision_tower")])
def test_adapters_can_be_kept_to_one_tower(mllm, towers, absent):
    base = load_mllm("tiny").network
    names = lora_targets(base, towers, projector=False)
    assert names and not any(absent in name for name in names)
    assert any("projector" in name for name in lora_targets(base, towers, projector=True))


def test_domainbeds_floats_and_our_bytes_are_the_same_image():
    """White and black under ImageNet's normalization are 255 and 0."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    white, black = ((value - mean) / std for value in (1.0, 0.0))
    x = torch.stack([white, black])[:, :, None, None].expand(2, 3, 4, 4)
    assert to_uint8(x)[0].unique().tolist() == [255]
    assert to_uint8(x)[1].unique().tolist() == [0]


def test_mnist_tensors_become_rgb():
    assert to_uint8(torch.full((1, 1, 2, 2), 0.5)).tolist() == torch.full((1, 3, 2, 2), 128).tolist()
    two = to_uint8(torch.ones(1, 2, 2, 2))
    assert two[0, :, 0, 0].tolist() == [255, 255, 0]


def test_resize_keeps_flat_colors_and_gives_the_edge():
    flat = torch.full((1, 3, 28, 28), 77, dtype=torch.uint8)
    assert resize(flat, 48).shape == (1, 3, 48, 48)
    assert resize(flat, 48).unique().tolist() == [77]


def test_the_embedded_model_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 5 * 2**20
    assert image_edge("tiny") == 48


def test_folder_without_a_model_is_reported(tmp_path):
    with pytest.raises(ModelError, match="config.json"):
        resolve(str(tmp_path))


def test_name_that_is_neither_folder_nor_hub_id_is_rejected():
    with pytest.raises(ModelError, match="neither a folder nor a hub id.*'tiny'"):
        resolve("InternVL3-8B")


def test_hub_id_fails_immediately_offline_with_fixes(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="OpenGVLab/InternVL3-8B-hf.*HF_HUB_OFFLINE.*folder.*'tiny'"):
        load_mllm("OpenGVLab/InternVL3-8B-hf")


def test_an_architecture_without_a_row_is_refused_by_name_with_the_list(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    with pytest.raises(ModelError, match="BertForMaskedLM is not a supported.*InternVL3.*Gemma 3"):
        load_mllm(str(tmp_path))


def test_a_model_that_was_never_made_to_converse_is_refused_before_its_weights_are_read(tmp_path):
    """As google/gemma-3-4b-pt: a tokenizer, a processor, and no chat template."""
    for file in TINY.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(b"" if file.suffix == ".safetensors" else file.read_bytes())
    with pytest.raises(ModelError, match="no chat template.*-Instruct"):
        load_mllm(str(tmp_path))


def test_too_small_gpu_error_states_the_required_memory():
    """8e9 weights in bfloat16 are 16 GB; with 10% on top 16.4 GiB."""
    with pytest.raises(ModelError, match=r"16.4 GiB.*10.0 GiB free.*nf4"):
        check_memory("m", 8_000_000_000, torch.bfloat16, "none", 10 * 2**30)
    check_memory("m", 8_000_000_000, torch.bfloat16, "nf4", 10 * 2**30)


def test_unused_reserved_memory_counts_as_free(monkeypatch):
    """2 bytes nobody holds; PyTorch holds 9, of which the model before this one has left 6 unused."""
    for name, count in (("mem_get_info", (2, 20)), ("memory_reserved", 9), ("memory_allocated", 3)):
        monkeypatch.setattr(torch.cuda, name, lambda device, count=count: count)
    assert devices.free_memory(torch.device("cuda")) == 8
    asked = []

    def refuse(*given):
        asked.append(given[-1])
        raise ModelError("too small")

    monkeypatch.setattr(loading, "check_memory", refuse)
    with pytest.raises(ModelError, match="too small"):
        loading.load_network("tiny", "auto", "none", torch.device("cuda"))
    assert asked == [8]


def test_resize_squeezes_a_batch_to_a_square_and_cuts_nothing_off():
    """Twice as wide as high: the outer eighths are red and blue, and stay eighths of the square."""
    image = banded().permute(2, 0, 1)[None]
    assert bands(resize(image, 48)[0]) == EIGHTHS


def banded():
    """A picture of 96 x 48 pixels, ``(48, 96, 3)``: its left eighth red, its right one blue, green between."""
    picture = torch.zeros(48, 96, 3, dtype=torch.uint8)
    picture[:, :12, 0] = picture[:, 84:, 2] = picture[:, 12:84, 1] = 255
    return picture


def bands(image):
    """Columns whose red, green, blue is strongest, ``image`` being ``(3, H, W)``; all rows must agree."""
    strongest = image.int().argmax(dim=0)
    assert (strongest == strongest[0]).all()
    return strongest[0].bincount(minlength=3).tolist()


EIGHTHS = [6, 36, 6]


@pytest.mark.parametrize("upright", [False, True])
def test_a_picture_is_squeezed_to_a_square_and_nothing_is_cut_off(upright):
    """Wide or high: what lies in the outer eighths is still there, an eighth wide."""
    from PIL import Image

    picture = Image.fromarray(banded().numpy())
    image = from_picture(48)(picture.rotate(90, expand=True) if upright else picture)
    assert image.shape == (3, 48, 48) and image.dtype == torch.uint8
    assert bands(image.rot90(-1, (1, 2)) if upright else image) == EIGHTHS


def test_the_model_sees_a_wide_image_from_edge_to_edge(mllm):
    """What the vision tower is fed is the squeezed picture, normalized, at the model's own edge."""
    image = banded().permute(2, 0, 1)[None]
    pixels = mllm.image_inputs(image)["pixel_values"]
    torch.testing.assert_close(pixels, mllm.image_inputs(resize(image, 48))["pixel_values"])
    assert bands((pixels.reshape(3, 48, 48) * 1000).int()) == EIGHTHS


@pytest.mark.parametrize("more", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
def test_an_answer_holds_no_special_token_however_likely_the_model_finds_one(mllm, images, more, begun):
    """Image placeholders and others get 10^4 nats more in every logit: what is written is what it was without them.

    Read off the tokens and not the texts, from which decoding takes special tokens away.
    """
    head, tokenizer, written = mllm.base.get_output_embeddings(), mllm.tokenizer, []
    ends = {mllm.end_token, tokenizer.eos_token_id}
    never = sorted({*tokenizer.all_special_ids, mllm.base.config.image_token_id} - ends)
    assert len(never) > 2
    asked = dict(more, beginnings=["<SUMMARY>I"] * len(images) if begun else None)
    decode = tokenizer.batch_decode

    def batch_decode(rows, **given):
        written.extend(list(map(int, row)) for row in rows)
        return decode(rows, **given)

    def prefer(module, given, out):
        out[..., never] += 1e4
        return out

    mllm.eval()
    torch.manual_seed(3)
    expected = mllm.generate(images, Q_REASON, 16, **asked)
    handle = head.register_forward_hook(prefer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "batch_decode", batch_decode)
        torch.manual_seed(3)
        found = mllm.generate(images, Q_REASON, 16, **asked)
    handle.remove()
    mllm.train()
    assert len(written) == len(images)
    assert not set(never) & {token for row in written for token in row} - {tokenizer.pad_token_id}
    assert found == expected
