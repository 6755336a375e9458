"""``tiling="dynamic"``: InternVL's grids by aspect ratio, from the file to the update, against the processor's own."""

import inspect
import pickle

import pytest
import torch
from domainbed import algorithms, hparams_registry
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, GotOcr2ImageProcessor

from builders.training import write_trained_job
from domainbed_reasoning.bridge.samples import ids_of
from domainbed_reasoning.chains.chain import END_OF_CHAIN
from domainbed_reasoning.chains.reader import read_conclusion
from domainbed_reasoning.datasets.base import mllm_transform
from domainbed_reasoning.datasets.shapes import ShapesReasoning
from domainbed_reasoning.images import shapes
from domainbed_reasoning.jobs.export import export_adapters
from domainbed_reasoning.jobs.predict import Predictor
from domainbed_reasoning.mllm import LoraSettings, ModelError, load_mllm
from domainbed_reasoning.mllm.adapters import add_lora
from domainbed_reasoning.mllm.dynamic_tiles import DynamicTiles
from domainbed_reasoning.mllm.loading import TINY, dynamic_tiles
from domainbed_reasoning.sweeps.costs import shape_of

MAX_TILES = 4
SETTINGS = {"crop_to_patches": True, "min_patches": 1, "max_patches": MAX_TILES}
SIZES = [(48, 48), (100, 50), (50, 160), (96, 96), (140, 100)]  # 1, 3, 4, 5 and 5 tiles of 48 pixels
NEW_TOKENS = 112


def noise(*size):
    """An RGB picture of that width and height."""
    return Image.effect_noise((3 * size[0], size[1]), 90).convert("L").resize(size).convert("RGB")


class Wide(ShapesReasoning):
    """The embedded benchmark's images, stretched to several aspect ratios."""

    def picture(self, env, index):
        return super().picture(env, index).resize(SIZES[(2 * env + index) % len(SIZES)])


# -- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "max_tiles", "tiles"),
    [
        (227, 227, 12, 1),  # PACS' images: 2 x 2 has the same ratio, but 227² is not above half of 4 · 448²
        (700, 700, 12, 5),  # 490,000 is above half of 4 · 448² (401,408), not of 9 · 448² (903,168)
        (1000, 1000, 12, 10),
        (640, 480, 12, 13),  # 4:3, by 4 x 3 alone
        (640, 480, 6, 7),  # 3:2 is 0.167 away, 1:1 0.333
        (1024, 300, 12, 4),  # 3.413: 3:1 is 0.413 away, 4:1 0.587; 6 x 2 would be more than half empty
        (300, 1024, 12, 4),  # 0.293: 1:3 is 0.040 away, 1:4 0.043
        (2000, 100, 12, 13),  # no grid is wider than 12 x 1
    ],
)
def test_the_grid_is_the_closest_in_aspect_ratio(width, height, max_tiles, tiles):
    processor = GotOcr2ImageProcessor(size={"height": 448, "width": 448})
    cut = DynamicTiles(processor, 448, max_tiles)
    assert cut.counts(cut(Image.new("RGB", (width, height)))[None]) == [tiles]


@pytest.mark.parametrize(("edge", "max_tiles"), [(48, MAX_TILES), (32, 12)])
def test_tiles_are_the_processors_own(edge, max_tiles):
    """Pixel for pixel, in order, with the thumbnail last; counts too."""
    processor = GotOcr2ImageProcessor(size={"height": edge, "width": edge})
    tiles = DynamicTiles(processor, edge, max_tiles)
    settings = {"crop_to_patches": True, "min_patches": 1, "max_patches": max_tiles, "return_tensors": "pt"}
    for size in [*SIZES, (333, 77), (61, 420), (640, 480)]:
        picture = noise(*size)
        expected = processor(images=[picture], **settings)
        columns = tiles(picture)[None]
        (count,) = tiles.counts(columns)
        assert columns.shape == (1, 3, (max_tiles + 1) * edge + 1, edge) and columns.dtype == torch.uint8
        assert [count] == expected["num_patches"].tolist()
        cut = processor(images=list(tiles.cut(columns, count)), crop_to_patches=False, return_tensors="pt")
        assert torch.equal(cut["pixel_values"], expected["pixel_values"])
        assert not columns[0, :, count * edge : -1].any()
        pixels = pil_to_tensor(picture)
        assert torch.equal(tiles.columns(pixels[None]), columns) and tiles.columns(columns) is columns


def test_a_batch_is_cut_image_by_image():
    tiles = dynamic_tiles("tiny", MAX_TILES)
    columns = torch.stack([tiles(noise(100, 50)), tiles(noise(48, 96))])
    assert tiles.counts(columns) == [3, 3]
    cut = tiles.cut(columns, 3)
    assert torch.equal(cut[:3], tiles.cut(columns[:1], 3)) and torch.equal(cut[3:], tiles.cut(columns[1:], 3))


def test_stock_loaders_stack_columns_that_carry_their_number_of_tiles():
    """Any number of tiles in a batch; sample ids stay; a worker gets the transform by pickle."""
    dataset = build("MLLMZeroShot")[0]
    x, _ = torch.utils.data.default_collate([pickle.loads(pickle.dumps(dataset[0]))[i] for i in range(5)])
    assert x.shape == (5, 3, (MAX_TILES + 1) * 48 + 1, 48) and ids_of(x).tolist() == [[0, i] for i in range(5)]
    assert dynamic_tiles("tiny", MAX_TILES).counts(x.as_subclass(torch.Tensor)) == [1, 3, 4, 5, 5]


def test_augmentation_crops_before_the_tiles_are_cut():
    """The crop's aspect ratio is in [3/4, 4/3]: of a panorama of 4 tiles, one tile or a grid as wide as high."""
    torch.manual_seed(0)
    tiles = dynamic_tiles("tiny", MAX_TILES)
    picture = noise(200, 50)
    assert tiles.counts(tiles(picture)[None]) == [5]
    crops = torch.stack([mllm_transform(tiles, augment=True)(picture) for _ in range(12)])
    assert set(tiles.counts(crops)) <= {1, 5} and len({crop.numpy().tobytes() for crop in crops}) == 12


@pytest.mark.parametrize(
    ("name", "max_tiles", "message"),
    [
        ("LLaVA-1.5", 4, "LLaVA-1.5 does not tile images, so tiling cannot be 'dynamic': set tiling to 'square'"),
        ("SmolVLM", 4, "SmolVLM splits images by a rule of its own, so .* Families with dynamic tiles: InternVL3"),
        ("InternVL", 1, r"tiling 'dynamic' requires max_tiles in \[2, 64\].*; got 1"),
        ("InternVL", 65, r"got 65\. InternVL's scripts use 12"),
    ],
)
def test_what_has_no_dynamic_tiles_is_rejected(folder_of, name, max_tiles, message):
    for use in (load_mllm, dynamic_tiles):
        with pytest.raises(ModelError, match=message):
            use(folder_of(name), max_tiles=max_tiles, **({"tiling": "dynamic"} if use is load_mllm else {}))


def test_costs_assume_the_maximum(folder_of):
    assert shape_of("tiny", 12, tiling="dynamic").tiles == 13
    with pytest.raises(ModelError, match="Gemma 3 does not tile images"):
        shape_of(folder_of("Gemma3"), 4, tiling="dynamic")


# -- the method, against the library's own computation, one conversation at a time -----------------------------------


def build(name, **changes):
    """Dataset and algorithm with dynamic tiles; adapters away from zero, as after some training."""
    torch.manual_seed(0)
    hparams = hparams_registry.default_hparams(name, "ShapesReasoning")
    hparams |= {"tiling": "dynamic", "max_tiles": MAX_TILES, "max_new_tokens": NEW_TOKENS, "batch_size": 2} | changes
    dataset = Wide(None, [3], hparams)
    algorithm = algorithms.get_algorithm_class(name)(dataset.input_shape, dataset.num_classes, 3, hparams)
    with torch.no_grad():
        for weight_name, weight in algorithm.mllm.adapters().items():
            if "lora_B" in weight_name:
                weight.normal_(std=0.005)
    return dataset, algorithm


def minibatches(dataset):
    """Two images of each source domain, as stock's loaders stack them: 1, 3, 4, 5, 5 and 1 tiles."""
    collate = torch.utils.data.default_collate
    return [tuple(collate([dataset[env][i] for i in range(2)])) for env in range(3)]


class Library:
    """The library alone, on the original pictures of those minibatches: a new network, without any of our batching."""

    def __init__(self, dataset, algorithm):
        self.processor = AutoProcessor.from_pretrained(TINY)
        network = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
        self.network = add_lora(network, LoraSettings.of(algorithm.hparams)).eval()
        self.weights = {name: w for name, w in self.network.named_parameters() if w.requires_grad}
        with torch.no_grad():
            for name, weight in algorithm.mllm.adapters().items():
                self.weights[name].copy_(weight)
        self.samples = [(env, index) for env in range(3) for index in range(2)]
        self.pictures = [dataset.picture(*sample) for sample in self.samples]
        self.names = [shapes.CLASS_NAMES[shapes.label(*sample)] for sample in self.samples]
        self.algorithm, self.end = algorithm, self.processor.tokenizer.convert_ids_to_tokens(algorithm.mllm.end_token)

    def inputs(self, picture, question, answer=""):
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) + answer
        inputs = self.processor(images=[[picture]], text=[text], return_tensors="pt", **SETTINGS)
        known = set(inspect.signature(self.network.base_model.model.forward).parameters)
        return {name: value for name, value in inputs.items() if name in known}

    def nll(self, picture, question, answer):
        """-log p of every token of the answer and of the end of the turn."""
        start = self.inputs(picture, question)["input_ids"].shape[1]
        whole = self.inputs(picture, question, answer + self.end)
        log_probs = self.network(**whole).logits[0, start - 1 : -1].log_softmax(-1)
        return -log_probs.gather(1, whole["input_ids"][0, start:, None])[:, 0]

    @torch.no_grad()
    def scores(self, picture):
        return torch.stack([-self.nll(picture, self.algorithm.q_cls, name).sum() for name in shapes.CLASS_NAMES])

    @torch.no_grad()
    def chain(self, picture):
        inputs = self.inputs(picture, self.algorithm.q_reason)
        out = self.network.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            suppress_tokens=self.algorithm.mllm.generator.suppressed_tokens,
            stop_strings=[END_OF_CHAIN],
            tokenizer=self.processor.tokenizer,
        )
        answer = out[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()

    def check(self, values, label_losses, chain_losses):
        """Compare the losses of a step and its gradients with those of these terms."""
        terms = [*label_losses, *chain_losses]
        (sum(terms) / len(chain_losses)).backward()
        for name, losses in (("label_loss", label_losses), ("chain_loss", chain_losses)):
            assert values[name] == pytest.approx(sum(loss.item() for loss in losses) / len(losses), rel=1e-5)
        for name, weight in self.algorithm.mllm.adapters().items():
            torch.testing.assert_close(weight.grad, self.weights[name].grad, rtol=1e-4, atol=1e-5)


def test_an_mtct_step_equals_the_library_one_conversation_at_a_time():
    dataset, algorithm = build("MTCT", micro_batch=3)
    library, asked = Library(dataset, algorithm), (algorithm.q_cls, algorithm.q_reason)
    values = algorithm.update(minibatches(dataset))
    own = [(p, n, shapes.chain(*s)) for p, n, s in zip(library.pictures, library.names, library.samples, strict=True)]
    labels = [library.nll(picture, asked[0], name).sum() for picture, name, _ in own]
    library.check(values, labels, [library.nll(picture, asked[1], chain).mean() for picture, _, chain in own])


def test_both_answers_and_predict_on_exported_adapters_equal_the_library(tmp_path):
    dataset, algorithm = build("MTCT")
    library = Library(dataset, algorithm)
    x = torch.cat([images for images, _ in minibatches(dataset)])
    expected = torch.stack([library.scores(picture) for picture in library.pictures])
    chains = [library.chain(picture) for picture in library.pictures]
    concluded = [read_conclusion(chain, shapes.CLASS_NAMES).answer for chain in chains]
    assert concluded.count(None) == 1 and len(set(concluded)) > 3  # one falls back to the label path
    labels = expected.argmax(1).tolist()
    classes = [label if answer is None else answer for answer, label in zip(concluded, labels, strict=True)]
    algorithm.eval()
    assert algorithm.predict(x).argmax(1).tolist() == classes
    assert algorithm.mllm.generate(x, algorithm.q_reason, NEW_TOKENS) == chains
    algorithm.hparams["answer"] = "label"
    torch.testing.assert_close(algorithm.predict(x), expected, rtol=1e-5, atol=1e-4)

    job = write_trained_job(algorithm, tmp_path / "job")
    export_adapters(job, tmp_path / "adapter")
    for prediction, scores, chain in zip(
        Predictor(tmp_path / "adapter", "both")(library.pictures), expected, chains, strict=True
    ):
        assert prediction.chain == chain
        assert prediction.label_class == shapes.CLASS_NAMES[int(scores.argmax())]
    for prediction, scores in zip(Predictor(tmp_path / "adapter", "label")(library.pictures), expected, strict=True):
        found = torch.tensor([prediction.scores[name] for name in shapes.CLASS_NAMES])
        torch.testing.assert_close(found, scores.softmax(0), rtol=0, atol=1e-5)


def test_a_sarr_round_equals_the_library():
    """Its chains are the library's greedy ones; those that conclude the label are kept; eq. 2 averages over them."""
    dataset, algorithm = build("RDMLDG", mtct_epochs=0, sarr_rounds=1)
    library, asked = Library(dataset, algorithm), (algorithm.q_cls, algorithm.q_reason)
    chains = [library.chain(picture) for picture in library.pictures]
    values = algorithm.update(minibatches(dataset))
    written = {(env, index): (chain, kept) for env, index, chain, kept in algorithm.new_self_labels()}
    assert [written[sample][0] for sample in library.samples] == chains
    own = [
        row
        for row in zip(library.pictures, library.names, chains, strict=True)
        if f"<CONCLUSION>{row[1]}</CONCLUSION>" in row[2]
    ]
    assert 1 < len(own) < 6 and values["chain_share"] == len(own) / 6
    labels = [library.nll(picture, asked[0], name).sum() for picture, name, _ in own]
    library.check(values, labels, [library.nll(picture, asked[1], chain).mean() for picture, _, chain in own])


def test_answers_stream_in_groups_and_statistics_return_in_order():
    """More images than a group of batches holds; each answer with its own image's number."""
    dataset, algorithm = build("MLLMZeroShot")
    mllm = algorithm.mllm.eval()
    x = torch.stack([dataset[0][i][0].as_subclass(torch.Tensor) for i in range(10)])
    written = dict(mllm.generator.stream(iter(x), algorithm.q_reason, 14, 2))  # eight images are grouped at a time
    alone = [mllm.generator.write(image[None], algorithm.q_reason, 14)[0] for image in x]
    assert [written[row] for row in range(10)] == alone and len(set(map(tuple, alone))) > 1
    texts = [" and ".join(["a tail"] * (1 + row % 3)) for row in range(10)]
    values, entropies, mask = mllm.token_statistics(mllm.encode(x), algorithm.q_cls, texts)
    expected, own_mask = mllm.log_likelihoods(mllm.encode(x), algorithm.q_cls, texts)
    torch.testing.assert_close(values, expected)
    assert torch.equal(mask, own_mask) and entropies.shape == mask.shape
    one, its_mask = mllm.log_likelihoods(mllm.encode(x[4:5]), algorithm.q_cls, texts[4:5])
    torch.testing.assert_close(expected[4][mask[4]], one[its_mask], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_general_path_has_equal_numbers():
    """Eager attention takes no shared rows: the processor's own rows, for the same tiles."""
    dataset, algorithm = build("MLLMZeroShot")
    x = torch.stack([dataset[0][i][0].as_subclass(torch.Tensor) for i in range(5)])
    settings = {"max_tiles": MAX_TILES, "tiling": "dynamic"}
    eager = load_mllm("tiny", attn_implementation="eager", **settings).eval()
    assert not eager.family.tree
    asked = (algorithm.q_cls, shapes.CLASS_NAMES)
    expected = algorithm.mllm.eval().class_scores(x, *asked)
    torch.testing.assert_close(eager.class_scores(x, *asked), expected, rtol=1e-5, atol=1e-4)
    assert eager.generate(x, algorithm.q_reason, 12) == algorithm.mllm.generate(x, algorithm.q_reason, 12)
    begun = ["<SUMMARY>compare"] * 5
    own = algorithm.mllm.generate(x, algorithm.q_reason, 12, beginnings=begun)
    assert eager.generate(x, algorithm.q_reason, 12, beginnings=begun) == own
