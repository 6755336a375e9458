"""Each family against plain transformers: equal tokens, likelihoods and texts with all sharing and batching."""

import json
import pathlib
import warnings

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from builders.chat import chat_inputs
from domainbed_reasoning.chains.chain import END_OF_CHAIN, Chain
from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.mllm import LoraSettings, ModelError, load_mllm
from domainbed_reasoning.mllm import likelihood as reading
from domainbed_reasoning.mllm.pixels import resize

CHAIN = Chain("look", "a thing on a table", "it has four legs", "could be a toy", "dog").render()


@pytest.fixture(scope="session")
def mllm(family_folder):
    return load_mllm(family_folder).eval()


@pytest.mark.parametrize("answer", ["alarm clock", CHAIN])
def test_log_likelihoods_equal_a_plain_forward_of_the_conversation(
    family_folder, mllm, images, class_names, answer, plain_log_likelihood
):
    """Shared vision features, rows and the head at supervised positions change nothing (float32, 1e-5 relative)."""
    question = (q_reason if answer is CHAIN else q_cls)(class_names)
    with torch.no_grad():
        values, mask = mllm.log_likelihoods(mllm.encode(images[:2]), question, ["dog", answer])
    expected = plain_log_likelihood(family_folder, mllm, images[1], question, answer)
    torch.testing.assert_close(values[1][mask[1]], expected, rtol=1e-5, atol=1e-4)


def test_images_and_prompts_change_the_answer(mllm, images, class_names):
    """The other tests would pass on a blind model."""
    scores = mllm.class_scores(images, q_cls(class_names), class_names)
    assert (scores[0] - scores[1]).abs().max() > 1e-3
    assert (scores - mllm.class_scores(images, q_reason(class_names), class_names)).abs().max() > 1e-3


def test_class_scores_equal_scoring_name_by_name(mllm, images, class_names):
    question = q_cls(class_names)
    scores = mllm.class_scores(images, question, class_names)
    with torch.no_grad():
        encoded = mllm.encode(images)
        rows = [mllm.log_likelihoods(encoded, question, [name] * len(images)) for name in class_names]
    by_rows = torch.stack([(values * mask).sum(1) for values, mask in rows], dim=1)
    assert scores.shape == (len(images), len(class_names))
    torch.testing.assert_close(scores, by_rows, rtol=1e-5, atol=1e-3)


def test_class_scores_of_a_batch_equal_those_of_single_images(mllm, images, class_names):
    question = q_cls(class_names)
    together = mllm.class_scores(images, question, class_names)
    alone = torch.cat([mllm.class_scores(image[None], question, class_names) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-3)


def test_generation_of_a_batch_equals_single_images(mllm, images, class_names):
    question = q_reason(class_names)
    together = mllm.generate(images, question, 12)
    assert together == [mllm.generate(image[None], question, 12)[0] for image in images]


def test_generation_equals_plain_transformers(family_folder, mllm, images, class_names):
    """The library's own inputs, one image, greedy, with the same tokens suppressed."""
    processor = AutoProcessor.from_pretrained(family_folder)
    network = AutoModelForImageTextToText.from_pretrained(family_folder, dtype=torch.float32).eval()
    picture = Image.fromarray(resize(images[:1], mllm.image_size)[0].permute(1, 2, 0).numpy())
    inputs = chat_inputs(processor, picture, q_cls(class_names), **mllm._image_settings)
    inputs.pop("num_patches", None)
    ends = sorted(mllm.generator.ends)
    out = network.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=12,
        suppress_tokens=mllm.generator.suppressed_tokens,
        eos_token_id=ends,
    )
    text = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert mllm.generate(images[:1], q_cls(class_names), 12) == [text.strip()]


def test_sampling_is_reproducible_and_holds_no_image_token(mllm, images, class_names):
    torch.manual_seed(1)
    first = mllm.generate(images, q_reason(class_names), 20, temperature=5.0, top_p=1.0)
    torch.manual_seed(1)
    assert first == mllm.generate(images, q_reason(class_names), 20, temperature=5.0, top_p=1.0)
    tokens = set(mllm.chat_format.special_tokens)
    assert len(set(first)) == len(first)
    assert not any(token in text for token in tokens for text in first)


def test_the_end_token_ends_the_turn(mllm):
    """What the families' chat templates or generation configs end a turn with."""
    token = mllm.tokenizer.convert_ids_to_tokens(mllm.end_token)
    assert token in {"<|im_end|>", "</s>", "<end_of_utterance>", "<end_of_turn>"}


SPECIAL = ("<IMG_CONTEXT>", "<|im_end|>", "<image>", "<start_of_image>", "<|image_pad|>", "<end_of_utterance>", "</s>")


def test_special_tokens_in_names_and_chains_are_words(mllm, images):
    """The prompt holds as many placeholders as without them, targets end once, and texts come back unchanged."""
    names = [f"cup {token}" for token in SPECIAL]
    plain = [f"cup {index}" for index in range(len(SPECIAL))]
    placeholder = mllm.base.config.image_token_id
    count = (mllm.prompt(q_cls(plain))["input_ids"] == placeholder).sum()
    assert count > 0
    assert (mllm.prompt(q_cls(names))["input_ids"] == placeholder).sum() == count
    for name in names:
        chain = CHAIN.replace("a thing", name)
        target = mllm.target(chain)
        assert placeholder not in target
        assert target.index(mllm.end_token) == len(target) - 1
        assert mllm.chat_format.unescape(mllm.chat_format.escape(chain)) == chain
        assert mllm.chat_format.unescape(mllm.tokenizer.decode(target[:-1]).strip()) == chain
    assert mllm.class_scores(images[:2], q_cls(names), names).isfinite().all()


def test_bfloat16_is_close_to_float32(family_folder, mllm, images, class_names):
    """8 bits of mantissa: 1% of the log-likelihood."""
    low = load_mllm(family_folder, dtype="bfloat16").eval()
    scores = low.class_scores(images, q_cls(class_names), class_names)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, mllm.class_scores(images, q_cls(class_names), class_names), rtol=0.03, atol=0.5)


def test_domainbed_floats_are_read_like_bytes(mllm, class_names):
    """A uniform grey survives DomainBed's normalization and back."""
    grey = torch.full((1, 3, 40, 40), 128, dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    floats = (grey / 255 - mean[:, None, None]) / std[:, None, None]
    question = q_cls(class_names)
    expected = mllm.class_scores(grey, question, class_names)
    torch.testing.assert_close(mllm.class_scores(floats, question, class_names), expected)


def test_generation_stops_at_the_conclusion(folder_of, images):
    """Generation stops after the conclusion even if the model was tuned to continue."""
    mllm = load_mllm(folder_of("LLaVA-1.5"), lora=LoraSettings(16, 16))
    optimizer = torch.optim.AdamW(mllm.adapters().values(), lr=1e-2)
    for _ in range(40):
        values, mask = mllm.log_likelihoods(mllm.encode(images[:2]), "?", [f"dog{END_OF_CHAIN} more words"] * 2)
        (-(values * mask).sum() / mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert mllm.eval().generate(images[:1], "?", 80) == ["dog" + END_OF_CHAIN]


def test_a_conclusion_within_the_models_thoughts_does_not_stop_it(mllm):
    ended = mllm.generator.has_ended
    assert ended(list(mllm.target(CHAIN)[:-1]))
    assert not ended(list(mllm.target(f"<think>I write {CHAIN}")[:-1]))
    assert ended(list(mllm.target(f"<think>I write {CHAIN}</think>{CHAIN}")[:-1]))
    assert not ended(list(mllm.target("<think>I write <CONCLUSION>dog</CONCLUSION></think>")[:-1]))
    assert not ended(list(mllm.target("I write <CONCLUSION>dog</CONCLUSION></think>")[:-1]))


def test_sampled_answers_are_written_so_many_at_a_time_as_fit(mllm, images, monkeypatch):
    """With room for two, four images take two batches; rows are in order."""
    sizes, plain = [], type(mllm.generator)._write_by_transformers

    def write(generator, part, *arguments, **sampling):
        sizes.append(len(part))
        return plain(generator, part, *arguments, **sampling)

    monkeypatch.setattr(type(mllm.generator), "_fitting", lambda *_: 2)
    monkeypatch.setattr(type(mllm.generator), "_write_by_transformers", write)
    sampled = {"do_sample": True, "temperature": 1e-4, "top_p": 1.0}  # as good as greedy
    four = images[[0, 1, 2, 0]]
    written = mllm.generator.write(four, "What is it?", 6, **sampled)
    assert sizes == [2, 2] and len(written) == 4 and written[0] == written[3]


def test_unsupported_architecture_is_rejected_by_name(tmp_path: pathlib.Path):
    from transformers import CLIPConfig

    CLIPConfig(architectures=["CLIPModel"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"CLIPModel is not .* InternVL3 .*Gemma 3"):
        load_mllm(str(tmp_path))


def test_both_paths_in_one_row_equal_one_after_the_other(mllm, images, class_names):
    """Rows of a shared prefix and two branches, of unequal lengths, where the family has them."""
    questions = (q_cls(class_names), q_reason(class_names))
    answers = (["dog", "alarm clock", "axe"], [CHAIN, CHAIN.replace("a thing on a table", "x"), "no chain"])
    with torch.no_grad():
        encoded = mllm.encode(images[:3])
        together = mllm.two_path_log_likelihoods(images[:3], questions, answers)
        for (values, mask), question, texts in zip(together, questions, answers, strict=True):
            expected, expected_mask = mllm.log_likelihoods(encoded, question, texts)
            assert torch.equal(mask, expected_mask)
            torch.testing.assert_close(values[mask], expected[mask], rtol=1e-5, atol=1e-4)


def test_a_checkpoint_with_code_of_its_own_is_refused(tmp_path: pathlib.Path):
    """The original InternVL3 checkpoints, beside the -hf ones."""
    config = {"model_type": "internvl_chat", "architectures": ["InternVLChatModel"]}
    config["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_internvl_chat.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(ModelError, match="Python code of its own .*which does not run unless you allow it.*-hf"):
        load_mllm(str(tmp_path))


def test_scores_do_not_depend_on_how_many_logits_are_held(mllm, images, class_names, monkeypatch):
    question = q_cls(class_names)
    expected = mllm.class_scores(images, question, class_names)
    monkeypatch.setattr("domainbed_reasoning.mllm.likelihood._LOGITS_AT_A_TIME", 1)
    torch.testing.assert_close(mllm.class_scores(images, question, class_names), expected)


def test_reading_without_gradients_holds_a_bounded_number_of_logits(mllm, images, class_names, monkeypatch):
    """64 chains of an 8B model would be 20 GiB. With gradients all logits are kept anyway, and made at once."""
    encoded, question, texts, logits = mllm.encode(images[:3]), q_reason(class_names), [CHAIN, "a cat", CHAIN], []
    with torch.no_grad():
        expected, mask = mllm.log_likelihoods(encoded, question, texts)
        _, entropy, _ = mllm.token_statistics(encoded, question, texts)
    head = mllm.base.get_output_embeddings()
    bound = 4 * head.weight.shape[0]
    monkeypatch.setattr(reading, "_LOGITS_AT_A_TIME", bound)
    handle = head.register_forward_hook(lambda module, given, out: logits.append(out.numel()))
    with torch.no_grad():
        torch.testing.assert_close(mllm.log_likelihoods(encoded, question, texts)[0], expected)
        found = mllm.token_statistics(encoded, question, texts)
    assert max(logits) <= bound
    torch.testing.assert_close(found, (expected, entropy, mask))
    logits.clear()
    mllm.log_likelihoods(encoded, question, texts)
    handle.remove()
    assert len(logits) == 1


def _fed(inputs):
    """Return what a forward pass reads: ids, or the embeddings that the model was handed."""
    return inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]


def test_rows_that_have_ended_leave_the_batch_and_change_nothing(mllm, images, class_names, monkeypatch):
    """Five rows told to end after 3, 9, 5, 20 and 12 tokens write what each would have written alone."""
    question, lengths, sizes = q_reason(class_names), [3, 9, 5, 20, 12], []
    monkeypatch.setattr(mllm.generator, "closing_tokens", range(mllm.base.get_output_embeddings().weight.shape[0]))
    run = mllm.base.model.forward
    monkeypatch.setattr(mllm.base.model, "forward", lambda **inputs: sizes.append(len(_fed(inputs))) or run(**inputs))

    def generate(rows):
        asked = {}  # answers in the order in which they are first asked about, which is the rows'
        wanted = [lengths[row] for row in rows]
        monkeypatch.setattr(
            mllm.generator, "has_ended", lambda answer: len(answer) >= wanted[asked.setdefault(id(answer), len(asked))]
        )
        return mllm.generate(images[rows], question, 24)

    together = generate([0, 1, 2, 3, 4])
    assert sizes == [5] * 3 + [4] * 2 + [3] * 4 + [2] * 3 + [1] * 8
    assert together == [generate([row])[0] for row in range(5)]


def test_generation_uses_no_deprecated_name(mllm, images, class_names):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*past_key_values.*", FutureWarning)
        mllm.class_scores(images, q_cls(class_names), class_names)
        mllm.generate(images, q_reason(class_names), 3)


def test_scores_of_345_names_and_64_images_stay_within_bounds(folder_of, images, monkeypatch):
    """With DomainNet's number of names, tokens and logits per pass stay bounded, with equal scores."""
    mllm = load_mllm(folder_of("InternVL")).eval()
    names = [f"thing {number}" for number in range(345)]
    many = images[torch.arange(64) % len(images)]
    run, head, tokens, logits = mllm.base.model.forward, mllm.base.get_output_embeddings(), [], []

    def forward(**inputs):
        cache = inputs.get("cache", inputs.get("past_key_values"))  # transformers from 5.24 on, and before
        cached = cache.get_seq_length() if cache is not None else 0
        rows, length = _fed(inputs).shape[:2]
        tokens.append(rows * (length + cached))
        return run(**inputs)

    monkeypatch.setattr(mllm.base.model, "forward", forward)
    handle = head.register_forward_hook(lambda module, given, out: logits.append(out.numel()))
    monkeypatch.setattr(reading, "_LOGITS_AT_A_TIME", 2**22)
    scores = mllm.class_scores(many, q_cls(names), names)
    handle.remove()
    assert max(tokens) <= reading._TOKENS_AT_A_TIME["cpu"] < sum(tokens)  # the whole batch would not have fitted
    assert max(logits) <= 2**22
    for index in (0, 63):
        alone = mllm.class_scores(many[index][None], q_cls(names), names)
        torch.testing.assert_close(scores[index], alone[0], rtol=1e-5, atol=1e-4)
