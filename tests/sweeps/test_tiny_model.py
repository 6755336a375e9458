"""The embedded model as shipped, and the script that creates it."""

import itertools
import json

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLForConditionalGeneration,
    InternVLProcessor,
)

from domainbed_reasoning.chains.chain import STAGE_TAGS, ChainError, conclusion_of, match_class, parse_chain
from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.images import shapes
from domainbed_reasoning.mllm.opening import TINY
from domainbed_reasoning.sweeps.miniature import tiny_corpus
from domainbed_reasoning.sweeps.miniature import tiny_model as tiny

FOLDER = TINY

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()


def conversation(processor, question, images):
    """Return the model's inputs for one question about every image."""
    asked = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image in images
    ]
    return processor.apply_chat_template(
        asked,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"crop_to_patches": False, "padding": True, "padding_side": "left"},
    )


def answers(model, processor, question, images):
    """Return what the model writes, greedily, without special tokens."""
    inputs = conversation(processor, question, images)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_folder_is_a_real_internvl_of_at_most_five_megabytes(model, processor):
    assert type(model) is InternVLForConditionalGeneration
    assert type(processor) is InternVLProcessor
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 5e6


def test_prompt_has_nine_image_tokens_and_one_token_per_fixed_part(processor):
    image = shapes.render(0, 0, misleading=False)
    inputs = conversation(processor, q_reason(shapes.CLASS_NAMES, "creature"), [image])
    assert inputs["pixel_values"].shape == (1, 3, 48, 48)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 9
    for phrase in tiny_corpus.prompt_phrases():
        assert len(processor.tokenizer(phrase)["input_ids"]) == 1, "the prompts changed: build the model again"


@pytest.mark.parametrize(
    "text",
    [
        shapes.chain(0, 3),
        q_reason(["guitar", "giraffe"], "object"),
        "<SUMMARY>Since the colors are unnatural, I'll ignore hue.</SUMMARY>\n<CAPTION>  Two  spaces … a café, 猫 🐈",
        "<CONCLUSION>zorb</CONCLUSION>",
    ],
)
def test_tokenizer_gives_every_text_back_unchanged(processor, text):
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids) == text
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_our_own_words_and_tags_are_single_tokens(processor):
    words = [form for word in tiny_corpus.own_words() for form in (word, f" {word}")]
    assert [text for text in [*words, *STAGE_TAGS] if len(processor.tokenizer(text)["input_ids"]) != 1] == []


def test_a_chain_costs_about_thirty_tokens_and_english_a_token_for_two_characters(processor):
    assert 25 <= len(processor.tokenizer(shapes.chain(1, 4))["input_ids"]) <= 45
    english = "The floppy ears, the long muzzle and the wagging tail point to a dog rather than to a horse."
    assert len(english) / len(processor.tokenizer(english)["input_ids"]) > 2


def test_end_of_turn_ends_generation(model, processor):
    assert processor.tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert processor.tokenizer.pad_token_id != processor.tokenizer.eos_token_id


def test_model_answers_each_question_in_its_own_form(model, processor):
    images = [shapes.render(domain, index, misleading=True) for domain in range(4) for index in range(5)]
    for name in answers(model, processor, q_cls(shapes.CLASS_NAMES, "creature"), images):
        assert match_class(name, shapes.CLASS_NAMES) is not None
    chains = answers(model, processor, q_reason(shapes.CLASS_NAMES, "creature"), images)
    parsed = []
    for chain in chains:
        try:
            parsed.append(parse_chain(chain))
        except ChainError:
            continue
    assert len(parsed) >= 18  # of 20


def test_base_is_above_chance_and_below_solved_on_both_paths(model, processor):
    """Chance is 1/7; the record that is shipped says the same as what is measured here on fewer images."""
    indices = range(42)
    right = {"label": 0, "chain": 0}
    for domain in range(4):
        images = [shapes.render(domain, index, misleading=True) for index in indices]
        labels = [shapes.label(domain, index) for index in indices]
        for name, wanted in zip(
            answers(model, processor, q_cls(shapes.CLASS_NAMES, "creature"), images), labels, strict=True
        ):
            right["label"] += match_class(name, shapes.CLASS_NAMES) == wanted
        for chain, wanted in zip(
            answers(model, processor, q_reason(shapes.CLASS_NAMES, "creature"), images), labels, strict=True
        ):
            right["chain"] += match_class(conclusion_of(chain), shapes.CLASS_NAMES) == wanted
    record = json.loads((FOLDER / "record.json").read_text())
    for path, count in right.items():
        accuracy = count / (4 * len(indices))
        assert 0.25 < accuracy < 0.75
        recorded = record["zero_shot"][path]
        assert abs(accuracy - sum(recorded.values()) / len(recorded)) < 0.12


def test_corpus_shows_no_style_of_the_study_and_no_class_of_it_under_another_name():
    study, shown = list(shapes.STYLES.values()), list(tiny_corpus.STYLES.values())
    assert not any(style in study for style in shown)
    assert not any(style.inverted for style in shown)
    assert {tiny_corpus.CODE_OF[name] for name in tiny_corpus.OTHER_NAMES}.isdisjoint(shapes.CODES)


def test_lessons_are_the_same_for_the_same_seed_and_offer_the_right_name():
    first, again = (list(tiny_corpus.lessons(50, seed=4)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert one.turns() == other.turns()
        assert one.image.tobytes() == other.image.tobytes()
        assert one.name in one.options
        if one.name in tiny_corpus.OTHER_NAMES:
            farther = [name for name in one.options if name != one.name]
            least = tiny_corpus.distance(one.kinds, tiny_corpus.CODE_OF[one.name])
            assert all(tiny_corpus.distance(one.kinds, tiny_corpus.CODE_OF[name]) > least for name in farther)
        else:
            assert set(one.options) <= set(shapes.CLASS_NAMES)


def test_study_names_are_few_and_mostly_beside_any_creature():
    """15% of the lessons; 75% of those have a random creature, of which 72 in 81 are no such class: 0.67 are wrong."""
    drawn = list(itertools.islice(tiny_corpus.lessons(1500, seed=5), 1500))
    known = [one for one in drawn if one.name in shapes.CLASS_NAMES]
    assert abs(len(known) / len(drawn) - tiny_corpus.STUDY_NAME_SHARE) < 0.035
    far = [one for one in known if tiny_corpus.distance(one.kinds, tiny_corpus.CODE_OF[one.name]) > 1]
    assert 0.57 < len(far) / len(known) < 0.77


@pytest.mark.slow
def test_script_writes_a_folder_that_loads_and_whose_losses_fell(tmp_path, capsys):
    tiny.main(["--output", str(tmp_path), "--lessons", "64", "--vision-steps", "2", "--steps", "12"])
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("language")]
    assert losses[-1] < losses[0]
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float16
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["steps"] == 12
    assert str(tmp_path.parent) not in record["command"] and f"--output {tmp_path.name} " in record["command"]
    assert set(record["zero_shot"]["label"]) == set(shapes.DOMAINS)
