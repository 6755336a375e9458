"""`max_tiles`: a square image as a grid of tiles and a thumbnail, from the file to the update."""

import pytest
import torch
import transformers
from PIL import Image

from builders.files import write_images
from domainbed_reasoning import registry
from domainbed_reasoning.chains.prompts import q_cls
from domainbed_reasoning.mllm import ModelError, load_mllm
from domainbed_reasoning.mllm.families import FAMILIES, tile_grid
from domainbed_reasoning.mllm.loading import image_edge

TILED = ["InternVL", "Idefics3", "SmolVLM"]


@pytest.mark.parametrize(("max_tiles", "grid"), [(1, 1), (3, 1), (4, 2), (8, 2), (9, 3), (12, 3)])
def test_the_grid_is_the_largest_square_within_max_tiles(max_tiles, grid):
    assert tile_grid(FAMILIES["InternVLForConditionalGeneration"], max_tiles) == grid


def test_families_without_tiles_refuse_more_than_one(folder_of):
    with pytest.raises(ModelError, match="LLaVA-1.5 does not tile images: set max_tiles to 1. .*InternVL3"):
        load_mllm(folder_of("LLaVA-1.5"), max_tiles=4)
    with pytest.raises(ModelError, match="max_tiles must be at least 1; got 0"):
        image_edge(folder_of("InternVL"), 0)


@pytest.mark.parametrize(
    ("architecture", "processor", "settings", "edge"),
    [
        ("InternVL", "GotOcr2ImageProcessor", {"size": {"height": 448, "width": 448}}, 448),
        ("Llava", "CLIPImageProcessor", {"size": {"shortest_edge": 336}}, 336),
        ("Qwen2_5_VL", "Qwen2VLImageProcessor", {"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}}, 448),
        (
            "Qwen3VL",
            "Qwen2VLImageProcessor",
            {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}, "patch_size": 16},
            448,
        ),
        (
            "Idefics3",
            "Idefics3ImageProcessor",
            {"size": {"longest_edge": 1820}, "max_image_size": {"longest_edge": 364}},
            364,
        ),
        (
            "SmolVLM",
            "SmolVLMImageProcessor",
            {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}},
            384,
        ),
        ("Gemma3", "Gemma3ImageProcessor", {"size": {"height": 896, "width": 896}}, 896),
        (
            "FastVlm",
            "CLIPImageProcessor",
            {"size": {"shortest_edge": 1024}, "crop_size": {"height": 1024, "width": 1024}},
            1024,
        ),
    ],
)
def test_a_tile_has_the_resolution_of_the_published_checkpoints(architecture, processor, settings, edge):
    """The settings that the checkpoints' preprocessor configs have, and the edge that their encoders take."""
    family = FAMILIES[f"{architecture}ForConditionalGeneration"]
    assert family.tile_edge(getattr(transformers, processor)(**settings)) == edge


@pytest.mark.parametrize("name", TILED)
def test_four_tiles_are_four_and_a_view_of_the_whole(folder_of, images, class_names, name, plain_log_likelihood):
    """2 x 2 tiles of 32 pixels and the whole, 4 tokens each: 20 placeholders; the library's own likelihood."""
    folder = folder_of(name)
    assert image_edge(folder) == 32 and image_edge(folder, 4) == 64
    mllm = load_mllm(folder, max_tiles=4).eval()
    question = q_cls(class_names)
    assert (mllm.prompt(question)["input_ids"] == mllm.base.config.image_token_id).sum() == 5 * 4
    pixels = mllm.image_inputs(images[:2])["pixel_values"]
    assert pixels.reshape(-1, 3, 32, 32).shape[0] == 2 * 5
    with torch.no_grad():
        values, mask = mllm.log_likelihoods(mllm.encode(images[:2]), question, ["dog", "alarm clock"])
    expected = plain_log_likelihood(folder, mllm, images[1], question, "alarm clock")
    torch.testing.assert_close(values[1][mask[1]], expected, rtol=1e-5, atol=1e-4)
    scores = mllm.class_scores(images, question, class_names)
    one = load_mllm(folder).eval().class_scores(images, question, class_names)
    assert (scores - one).abs().max() > 1e-3
    assert mllm.generate(images, question, 6) == [mllm.generate(image[None], question, 6)[0] for image in images]


@pytest.mark.parametrize("name", TILED)
def test_tiles_from_image_files_to_an_update(folder_of, tmp_path, name):
    """An image folder through DomainBed's loader: bytes at twice the tile's edge, one MTCT step, a prediction."""
    from domainbed_reasoning.datasets.image_folders import PACSReasoning

    generator = torch.Generator().manual_seed(0)

    def picture(*_):
        return Image.fromarray(torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8, generator=generator).numpy())

    write_images(tmp_path / "PACS", ("art_painting", "cartoon", "photo", "sketch"), ("dog", "elephant"), 2, picture)
    cls = registry.load(registry.ALGORITHMS["LabelSFT"])
    hparams = {key: hparam.default for key, hparam in {**cls.HPARAMS, **PACSReasoning.HPARAMS}.items()}
    hparams |= {"algorithm": "LabelSFT", "model": folder_of(name), "max_tiles": 4, "micro_batch": 8}
    dataset = PACSReasoning(str(tmp_path), [3], hparams)
    assert dataset[0][0][0].shape == (3, 64, 64) and dataset[0][0][0].dtype == torch.uint8
    algorithm = cls(dataset.input_shape, dataset.num_classes, 3, hparams)
    loaders = [torch.utils.data.DataLoader(dataset[env], batch_size=4) for env in range(3)]
    minibatches = [next(iter(loader)) for loader in loaders]
    first = algorithm.update(minibatches)["loss"]
    for _ in range(3):
        last = algorithm.update(minibatches)["loss"]
    assert last < first
    algorithm.eval()
    assert algorithm.predict(minibatches[0][0]).shape == (4, 2)
