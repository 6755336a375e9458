"""The eight tiny models, built once per session, and shared questions."""

from __future__ import annotations

import inspect

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from builders import families
from domainbed_reasoning import registry
from domainbed_reasoning.bridge.samples import attach_task, with_ids
from domainbed_reasoning.chains.chain import Chain
from domainbed_reasoning.method.schedule import Schedule, Stage
from domainbed_reasoning.method.task import Task
from domainbed_reasoning.mllm import findings
from domainbed_reasoning.mllm.loading import TINY
from domainbed_reasoning.mllm.pixels import resize


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """``folder_of(name)``: the saved tiny model of that family."""
    root, built = tmp_path_factory.mktemp("families"), {}

    def folder(name: str) -> str:
        if name not in built:
            built[name] = str(families.build(name, root / name))
        return built[name]

    return folder


@pytest.fixture(scope="session", params=list(families.BUILDERS))
def family_folder(request, folder_of) -> str:
    """Each family's folder in turn."""
    return folder_of(request.param)


@pytest.fixture(scope="session")
def model_31m(tmp_path_factory):
    """InternVL's shape at 31 million parameters, in both towers."""
    folder = tmp_path_factory.mktemp("model")
    config = AutoConfig.from_pretrained(TINY)
    config.text_config.update({"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 5})
    config.text_config.update({"num_attention_heads": 8, "num_key_value_heads": 4})
    config.text_config.update({"layer_types": ["full_attention"] * 5})
    config.vision_config.update({"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 5})
    AutoModelForImageTextToText.from_config(config).to(torch.float32).save_pretrained(folder)
    AutoProcessor.from_pretrained(TINY).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def class_names() -> tuple[str, ...]:
    """Names of which one is another's beginning."""
    return families.CLASSES


@pytest.fixture
def images() -> torch.Tensor:
    """Five random images, none at any model's own size."""
    return torch.randint(0, 256, (5, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def own_findings(tmp_path_factory):
    """What is found about models is kept in a folder of the module's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(findings, "cache_folder", lambda: folder)
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


CHAIN = Chain("a look", "a thing", "it has four legs", "no", families.CLASSES[0]).render()


@pytest.fixture(scope="session")
def algorithm_on():
    """``algorithm_on(folder, name, **hparams)``: an algorithm on a task of eight images of the first class."""

    def build(folder: str, name: str = "MTCT", schedule: Schedule | None = None, **given):
        cls = registry.load(registry.ALGORITHMS[name])
        hparams = {key: hparam.default for key, hparam in cls.HPARAMS.items()}
        hparams |= {"model": folder, "lora_dropout": 0.0, "max_new_tokens": 96, **given}
        keys = [(env, index) for env in (0, 1) for index in range(4)]
        task = Task(
            dataset="PACSReasoning",
            class_names=families.CLASSES,
            environments=("art", "photo", "sketch"),
            test_envs=(2,),
            labels=((0,) * 4,) * 3,
            images=tuple(tuple(f"{env}/{index}.png" for index in range(4)) for env in range(3)),
            chains={key: CHAIN for key in keys},
            schedule=schedule or Schedule((Stage(0, 0, 999),), 1000, 1000),
        )
        attach_task(hparams, task)
        torch.manual_seed(0)
        return cls((3, 40, 40), len(families.CLASSES), 2, hparams)

    return build


@pytest.fixture(scope="session")
def minibatches():
    """Two domains' minibatches of four images of the first class, each knowing its sample."""
    pixels = torch.randint(0, 256, (2, 4, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ids = [torch.tensor([[env, index] for index in range(4)]) for env in (0, 1)]
    return [(with_ids(pixels[env], ids[env]), torch.zeros(4, dtype=torch.long)) for env in (0, 1)]


def _plain_log_likelihood(folder, mllm, image, question, answer):
    """Return log p of the answer's tokens by the library alone: its own inputs for the whole conversation."""
    processor = AutoProcessor.from_pretrained(folder)
    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    space = " " if prompt.endswith("ssistant:") or prompt.endswith("ASSISTANT:") else ""
    end = processor.tokenizer.convert_ids_to_tokens(mllm.end_token)
    bos = processor.tokenizer.bos_token
    picture = Image.fromarray(resize(image[None], mllm.image_size)[0].permute(1, 2, 0).numpy())
    kwargs = dict(
        mllm._image_settings, add_special_tokens=not (bos and prompt.startswith(bos)), return_mm_token_type_ids=True
    )

    def inputs(text):
        return processor(images=[[picture]], text=[text], return_tensors="pt", **kwargs)

    asked, whole = inputs(prompt), inputs(prompt + space + answer + end)
    start = asked["input_ids"].shape[1]
    assert whole["input_ids"][0, :start].tolist() == asked["input_ids"][0].tolist()
    whole.pop("num_patches", None)
    accepted = set(inspect.signature(network.forward).parameters)
    whole = {name: value for name, value in whole.items() if name in accepted}
    with torch.no_grad():
        logits = network(**whole).logits[0, start - 1 : -1].float().log_softmax(-1)
    return logits.gather(1, whole["input_ids"][0, start:, None])[:, 0]


@pytest.fixture(scope="session")
def plain_log_likelihood():
    """``plain_log_likelihood(folder, mllm, image, question, answer)``: the library alone."""
    return _plain_log_likelihood
