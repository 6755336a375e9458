"""Models that cannot be used, real ones of tiny size: the error names what was probed, what was found, and a fix."""

import json
import shutil

import pytest
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from builders import architectures, families
from builders.architecture_parts import EDGE, _chat, _words
from builders.families import TEXT, _text
from builders.training import write_trained_job
from domainbed_reasoning import __main__ as cli
from domainbed_reasoning.jobs.export import export_adapters
from domainbed_reasoning.mllm import ModelError, load_mllm
from domainbed_reasoning.mllm.loading import cached_numbers, config_of, image_edge

VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
QFORMER = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "encoder_hidden_size": 64,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("own_findings")


def saved(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def blip2(text):
    words = _words()
    sizes = {"vocab_size": len(words) + 8, "pad_token_id": words.pad_token_id}
    config = tf.Blip2Config(
        vision_config=VISION, qformer_config=QFORMER, text_config={**text, **sizes}, num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    processor = tf.Blip2Processor(tf.BlipImageProcessor(size=EDGE), words, num_query_tokens=4)
    return tf.Blip2ForConditionalGeneration(config), processor


def blip2_opt():
    opt = {"model_type": "opt", "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return blip2(opt | {"word_embed_proj_dim": 64})


def blip2_t5():
    return blip2({"model_type": "t5", "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16})


def blip():
    words = _words()
    text = {**TEXT, "vocab_size": len(words), "encoder_hidden_size": 64, "pad_token_id": 0}
    config = tf.BlipConfig(text_config=text, vision_config=VISION, projection_dim=64)
    return tf.BlipForConditionalGeneration(config), tf.BlipProcessor(tf.BlipImageProcessor(size=EDGE), words)


def git():
    words = _words()
    config = tf.GitConfig(vision_config={**VISION, "model_type": "git_vision_model"}, **TEXT, vocab_size=len(words))
    image_processor = tf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=EDGE)
    return tf.GitForCausalLM(config), tf.GitProcessor(image_processor, words)


NO_TEMPLATE = (
    "has no chat template: its .*Processor found none in chat_template.jinja, processor_config.json or "
    "tokenizer_config.json. Use its instruction-tuned version"
)
ENCODER_DECODER = r"is an encoder-decoder \(is_encoder_decoder in config.json\).*Use a chat model with a decoder alone"
CAPTIONERS = {
    "BLIP-2 on OPT": (blip2_opt, NO_TEMPLATE),
    "BLIP-2 on T5": (blip2_t5, "Blip2ForConditionalGeneration " + ENCODER_DECODER),
    "BLIP": (blip, NO_TEMPLATE),
    "GIT": (git, NO_TEMPLATE),
}


@pytest.mark.parametrize("name", CAPTIONERS)
def test_a_captioner_without_chat_is_refused(name, tmp_path):
    build, said = CAPTIONERS[name]
    folder = saved(tmp_path / "model", *build())
    with pytest.raises(ModelError, match=f"model '{folder}'.*{said}"):
        load_mllm(folder)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A tiny Qwen 2 with a chat template."""
    words, folder = _words(), tmp_path_factory.mktemp("models") / "text"
    words.chat_template = _chat()
    return saved(folder, tf.Qwen2ForCausalLM(tf.Qwen2Config(**_text(words, num_key_value_heads=2))), words)


def test_a_text_model_is_refused_by_its_architecture(text_model, capsys):
    """By the dataset, which asks for the image's size first, by the algorithm, and by doctor."""
    said = f"model '{text_model}': Qwen2ForCausalLM is not a supported multimodal LLM.*Supported: InternVL3"
    for ask in (image_edge, load_mllm):
        with pytest.raises(ModelError, match=said):
            ask(text_model)
    assert cli.main(["doctor", "--model", text_model]) == 1
    assert "Qwen2ForCausalLM is not a supported multimodal LLM" in capsys.readouterr().out


@pytest.fixture(scope="module")
def vipllava(tmp_path_factory):
    """An architecture without an entry."""
    return architectures.build("ViP-LLaVA", tmp_path_factory.mktemp("vipllava"))


def with_template(folder, tmp_path, change):
    """Return a copy of a model with another chat template."""
    copy = shutil.copytree(folder, tmp_path / "model")
    file = copy / "chat_template.jinja"
    file.write_text(change(file.read_text()))
    return str(copy)


@pytest.fixture(params=["an entry", "none"])
def either(request, folder_of, vipllava):
    """A model of an architecture with an entry, and of one without."""
    return folder_of("InternVL") if request.param == "an entry" else vipllava


def test_a_model_without_a_chat_template_is_refused_whatever_its_architecture(either, tmp_path):
    copy = shutil.copytree(either, tmp_path / "model")
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=NO_TEMPLATE):
        load_mllm(str(copy))


def test_a_template_that_refuses_an_image_is_refused(either, tmp_path):
    def text_alone(template):
        refuse = "{% for item in message.content %}{% if item.type == 'image' %}{{ raise_exception('text only') }}"
        return "{% for message in messages %}" + refuse + "{% endif %}{% endfor %}{% endfor %}" + template

    said = r"chat_template.jinja: it cannot be used: rendering a question about an image failed \(.*text only\)"
    with pytest.raises(ModelError, match=said + ". Download the model again from its publisher, or pass another"):
        load_mllm(with_template(either, tmp_path, text_alone))


def test_a_template_that_takes_texts_alone_is_refused(either, tmp_path):
    """As text models have it: the content is no list."""
    template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    said = r"chat_template.jinja: it cannot be used: rendering a question about an image failed \(TypeError"
    with pytest.raises(ModelError, match=said):
        load_mllm(with_template(either, tmp_path, lambda old: template))


def test_a_template_that_ignores_images_is_refused(either, tmp_path):
    words = ("<IMG_CONTEXT>\\n", "<image>\\n")
    folder = with_template(either, tmp_path, lambda old: old.replace(words[0], "").replace(words[1], ""))
    with pytest.raises(ModelError, match="tried its chat template with and without an image, found the same text. Use"):
        load_mllm(folder)


def test_a_template_that_refuses_a_system_turn_is_used_since_none_is_asked_for(either, tmp_path, images):
    def no_system(template):
        refuse = "{% if message.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        return "{% for message in messages %}" + refuse + "{% endfor %}" + template

    mllm = load_mllm(with_template(either, tmp_path, no_system)).eval()
    scores = [one.class_scores(images[:2], "What?", ["dog", "axe"]) for one in (mllm, load_mllm(str(either)).eval())]
    assert scores[0].equal(scores[1])


@pytest.mark.parametrize("name", families.BUILDERS)
def test_a_tokenizer_without_the_image_token_is_refused_in_every_family(name, folder_of, tmp_path):
    """By the token's name, or by transformers where the processor cannot be built without; Idefics3's adds its own."""
    copy = shutil.copytree(folder_of(name), tmp_path / "model")
    token = tf.AutoProcessor.from_pretrained(copy).image_token
    file = copy / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] != token]
    file.write_text(json.dumps(content))
    file = copy / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if token not in json.dumps(value)}
    file.write_text(json.dumps(kept))
    if name == "Idefics3":
        assert load_mllm(str(copy)).prompt("?")["input_ids"].equal(load_mllm(folder_of(name)).prompt("?")["input_ids"])
        return
    tried = f"cannot be used: tried the image token, found no '{token}' in the tokenizer. Download the model again"
    unbuilt = "transformers cannot load .*Tokenizer has no attribute .*token.*Download the model again"
    with pytest.raises(ModelError, match=f"{tried}|{unbuilt}"):
        load_mllm(str(copy))


def test_a_folder_of_adapters_is_refused_and_the_verbs_say_what_to_pass(algorithm_on, minibatches, tmp_path, capsys):
    """PEFT's own folder, as `export --job` writes it."""
    algorithm = algorithm_on("tiny", "MTCT", max_new_tokens=8)
    algorithm.update(minibatches)
    write_trained_job(algorithm, tmp_path / "job")
    export_adapters(tmp_path / "job", tmp_path / "adapters")
    folder = str(tmp_path / "adapters")
    said = "the folder has an adapter_config.json and no config.json: it holds adapters, not a model. Pass their base"
    for ask in (load_mllm, image_edge):
        with pytest.raises(ModelError, match=said):
            ask(folder)
    for words in (["doctor", "--model", folder], ["predict", "--job", folder, "--model", folder, "photo.png"]):
        assert cli.main(words) == 1
        out = capsys.readouterr()
        assert said in out.out + out.err


@pytest.mark.parametrize("name", ["Gemma3nConfig", "Gemma4Config", "Qwen3VLConfig", "InternVLConfig", "Glm4vConfig"])
def test_default_configs_of_listed_architectures_are_within_bounds(name, tmp_path):
    """Gemma's vocab_size_per_layer_input is 262,144: a vocabulary, not a number of layers."""
    config = getattr(tf, name)()
    config.architectures = [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(tmp_path)
    config, *_ = config_of(str(tmp_path))
    assert cached_numbers(config) > 0


def test_layers_of_different_heads_are_counted_one_by_one():
    """Gemma 4's global layers have fewer and wider heads than its local ones: 2 * heads * width over its layers."""
    text = tf.Gemma4Config().get_text_config()
    layers = [(layer.num_key_value_heads, layer.head_dim) for layer in text.per_layer_config]
    assert len(set(layers)) == 2
    assert cached_numbers(tf.Gemma4Config()) == sum(2 * heads * width for heads, width in layers)
