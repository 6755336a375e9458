"""Chat templates of models that think first: answers come after the thought, in training and in generation."""

import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from builders import architectures, families
from domainbed_reasoning.chains.chain import Chain
from domainbed_reasoning.mllm import load_mllm

CHAIN = Chain("a creature", "four legs", "legs", "so a dog", "dog").render()
EMPTY = "<think>\n\n</think>\n\n"
OFF = "enable_thinking is defined and enable_thinking is false"
# What a template adds after the role: the one of Qwen3-VL-Thinking, of Qwen3.5, of Qwen3 and GLM-4.5V, of Kimi.
TEMPLATES = {
    "always": ("<think>\n", EMPTY),
    "default": (f"{{% if {OFF} %}}{EMPTY}{{% else %}}<think>\n{{% endif %}}", EMPTY),
    "optional": (f"{{% if {OFF} %}}<think></think>{{% endif %}}", "<think></think>"),
    "signs": ("◁think▷", "◁think▷\n\n◁/think▷\n\n"),
    "never": ("", ""),
}


pytestmark = pytest.mark.usefixtures("own_findings")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tiny model of a family with a row, and one without."""
    root = tmp_path_factory.mktemp("models")
    families.qwen3_vl(root / "qwen")
    return {"Qwen3-VL": root / "qwen", "ViP-LLaVA": architectures.build("ViP-LLaVA", root / "vip")}


@pytest.fixture(params=[("Qwen3-VL", kind) for kind in TEMPLATES] + [("ViP-LLaVA", "always")], ids="-".join)
def thinking(request, folders, tmp_path):
    """The folder of a model with one of the templates, and what its prompts end with."""
    name, kind = request.param
    addition, expected = TEMPLATES[kind]
    folder = shutil.copytree(folders[name], tmp_path / "model")
    template = folder / "chat_template.jinja"
    before, role, after = template.read_text().rpartition("<|im_start|>assistant\n' }}")
    template.write_text(before + role + addition + after)
    return folder, expected


def test_answers_come_after_an_empty_thought(thinking, images):
    """Prompt, target and likelihood are those of the answer after an empty thought, by plain transformers."""
    folder, expected = thinking
    mllm, processor = load_mllm(str(folder)), AutoProcessor.from_pretrained(folder)
    words = processor.tokenizer
    prompt = mllm.prompt("What is it?")
    ids = prompt["input_ids"][0].tolist()
    assert words.decode(ids).endswith("What is it?<|im_end|>\n<|im_start|>assistant\n" + expected)
    assert ids == words(words.decode(ids), add_special_tokens=False)["input_ids"]
    assert all(value.shape == prompt["input_ids"].shape for value in prompt.values())
    assert words.decode(mllm.target(CHAIN)) == CHAIN + "<|im_end|>"

    edge = mllm.chat_format.image_size
    picture = torch.nn.functional.interpolate(images[:1].float(), (edge, edge)).byte()
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    text = (
        processor.apply_chat_template([turn], tokenize=False)
        + "<|im_start|>assistant\n"
        + expected
        + CHAIN
        + "<|im_end|>"
    )
    inputs = processor(
        text=[text],
        images=[Image.fromarray(picture[0].permute(1, 2, 0).numpy())],
        return_tensors="pt",
        **mllm.chat_format.image_settings,
    )
    network = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = network(**inputs).logits[0, :-1].log_softmax(-1)
        whole = logits.gather(1, inputs["input_ids"][0, 1:, None])[-len(mllm.target(CHAIN)) :].sum()
        _, (of_tokens, mask) = mllm.path_log_likelihoods(picture, ("?", "What is it?"), (None, [CHAIN]))
    torch.testing.assert_close((of_tokens * mask).sum(), whole, atol=2e-3, rtol=1e-5)
