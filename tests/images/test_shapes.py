"""ShapesReasoning's images, labels and chains."""

import colorsys
import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest

from domainbed_reasoning.chains.chain import match_class, parse_chain
from domainbed_reasoning.images import shapes, shapes_teacher
from domainbed_reasoning.sweeps.miniature import tiny_corpus

EVERY_DOMAIN = range(len(shapes.DOMAINS))


def background_hue(image) -> float:
    """Return the median hue of the picture's border, in [0, 1)."""
    pixels = np.asarray(image, dtype=float) / 255
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3)])
    red, green, blue = border.mean(0)
    return colorsys.rgb_to_hsv(red, green, blue)[0]


def hue_distance(one: float, other: float) -> float:
    """Return how far two hues are apart on the circle, in [0, 0.5]."""
    return abs((one - other + 0.5) % 1.0 - 0.5)


def test_any_two_classes_differ_in_at_least_three_parts():
    for one, other in itertools.combinations(shapes.CODES, 2):
        assert sum(a != b for a, b in zip(one, other, strict=True)) >= 3


def test_names_are_as_many_as_codes_and_sorted_as_domainbed_sorts_folders():
    assert len(shapes.CLASS_NAMES) == len(shapes.CODES) == 7
    assert list(shapes.CLASS_NAMES) == sorted(shapes.CLASS_NAMES)


def test_domain_holds_every_class_equally_often():
    for domain in EVERY_DOMAIN:
        counts = np.bincount([shapes.label(domain, index) for index in range(shapes.SIZE_OF_DOMAIN)])
        assert counts.tolist() == [shapes.PER_CLASS] * 7


def test_some_images_have_one_altered_part_and_stay_nearest_to_their_class():
    altered = 0
    for domain, index in itertools.product(EVERY_DOMAIN, range(500)):
        kinds = shapes.code(domain, index)
        distances = [sum(a != b for a, b in zip(kinds, code, strict=True)) for code in shapes.CODES]
        assert min(distances) <= 1
        assert distances.index(min(distances)) == shapes.label(domain, index)
        altered += min(distances)
    # 2000 draws with probability 0.15: 300 expected, a standard deviation of 16.
    assert 230 < altered < 370


def test_chain_states_the_kinds_that_are_drawn_and_concludes_the_true_class():
    for domain, index in itertools.product(EVERY_DOMAIN, range(60)):
        chain = parse_chain(shapes.chain(domain, index))
        drawn = [shapes.KINDS[part][kind] for part, kind in enumerate(shapes.code(domain, index))]
        assert chain.caption.split(", ") == drawn
        assert match_class(chain.conclusion, shapes.CLASS_NAMES) == shapes.label(domain, index)


def test_chain_of_an_altered_creature_names_the_odd_part():
    """A dax is round, crested, sledded and banded; with ears, three parts fit and the head does not."""
    text = shapes.describe((0, 1, 2, 1), "dax", shapes.CODES[shapes.CLASS_NAMES.index("dax")])
    chain = parse_chain(text)
    assert chain.caption == "round, eared, sledded, banded"
    assert chain.reasoning == "three fit dax"
    assert chain.reflection == "head odd"


def test_the_other_teacher_states_the_same_kinds_and_the_background_among_other_words():
    for domain, index in itertools.product(EVERY_DOMAIN, range(60)):
        own, other = (parse_chain(shapes.chain(domain, index, teacher)) for teacher in shapes.TEACHERS)
        assert own.conclusion == other.conclusion
        parts = [f"{kind} {part}" for kind, part in zip(own.caption.split(", "), shapes.PARTS, strict=True)]
        setting, *told = other.caption.split(", ")
        assert told == parts[::-1]
        hue, _ = shapes.background(domain, index, misleading=False)
        assert [word for word in shapes_teacher.COLORS if word in setting] == [shapes_teacher.color_of(hue)]
        assert not {own.summary, own.reasoning, own.reflection} & {other.summary, other.reasoning, other.reflection}


def test_other_teacher_describes_the_actual_background():
    """With rho 1 the hue is the class's cue, a seventh of the circle a class; with rho 0 it is any hue."""
    told = [[shapes.chain(1, 7 * i + 3, "other", rho).split("CAPTION>")[1] for i in range(40)] for rho in (1, 0)]
    always, never = told
    of_cue = {shapes_teacher.color_of(shapes.cue_hue(3) + shift) for shift in (-0.03, 0, 0.03)}
    assert {word for text in always for word in text.split() if word in shapes_teacher.COLORS} <= of_cue
    assert {word for text in never for word in text.split() if word in shapes_teacher.COLORS} - of_cue


def test_the_other_teacher_varies_its_words_and_names_the_odd_part_in_words_that_the_embedded_model_was_shown():
    code = shapes.CODES[shapes.CLASS_NAMES.index("dax")]
    random = np.random.RandomState(1)
    chains = [parse_chain(shapes.describe_at_length((0, 1, 2, 1), "dax", code, 0.5, random)) for _ in range(60)]
    assert {len({getattr(chain, stage) for chain in chains}) for stage in ("summary", "reasoning", "reflection")} == {5}
    assert all(chain.caption.endswith("banded coat, sledded feet, eared head, round body") for chain in chains)
    assert all(chain.reflection.endswith(", head odd") for chain in chains)
    words = {word for chain in chains for word in " ".join(vars(chain).values()).replace(",", "").split()}
    assert not words - set(tiny_corpus.own_words())


def test_a_caption_is_read_as_the_class_whose_parts_it_names_all_but_one_in_any_sentence():
    for name in range(len(shapes.CLASS_NAMES)):
        for index in (name, name + 7, name + 14):
            for teacher in shapes.TEACHERS:
                assert shapes.class_in_caption(parse_chain(shapes.chain(0, index, teacher)).caption) == name
        retold = shapes.with_parts_of(name, "on red ground, plain coat, legged feet, eared head, pointed body")
        assert shapes.class_in_caption(retold) == name
        assert retold.startswith("on red ground, ")
    assert shapes.class_in_caption("round, horned") is None


def test_render_gives_the_same_bytes_in_another_process():
    here = [shapes.render(domain, 11, misleading=domain == 1).tobytes() for domain in EVERY_DOMAIN]
    script = (
        "import hashlib; from domainbed_reasoning.images import shapes;"
        "print([hashlib.sha256(shapes.render(d, 11, misleading=d == 1).tobytes()).hexdigest() for d in range(4)])"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str([hashlib.sha256(data).hexdigest() for data in here])


def test_render_does_not_touch_global_random_state():
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    shapes.render(0, 0, misleading=False)
    assert (np.random.get_state()[1] == before).all()


def test_images_are_rgb_of_48_by_48_and_all_different():
    images = [shapes.render(d, i, misleading=False) for d, i in itertools.product(EVERY_DOMAIN, range(20))]
    assert {(image.size, image.mode) for image in images} == {((48, 48), "RGB")}
    assert len({image.tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("domain", EVERY_DOMAIN)
@pytest.mark.parametrize("misleading", [False, True])
def test_background_hue_is_the_cue_of_the_class_or_of_another(domain, misleading):
    """With rho 1 every hue lies within the jitter of the cue: class c's, or class (c + 3)'s where it misleads."""
    for index in range(28):
        image = shapes.render(domain, index, misleading=misleading, rho=1.0)
        name = (shapes.label(domain, index) + (shapes.MISLEADING_SHIFT if misleading else 0)) % 7
        nearest = min(range(7), key=lambda other: hue_distance(background_hue(image), shapes.cue_hue(other)))
        assert nearest == name


def test_background_hue_is_uninformative_with_rho_zero():
    follows = [
        hue_distance(background_hue(shapes.render(1, i, misleading=False, rho=0.0)), shapes.cue_hue(i % 7)) < 1 / 14
        for i in range(280)
    ]
    # One hue in seven by chance: 40 of 280, a standard deviation of 6.
    assert 20 < sum(follows) < 62


def test_misleading_changes_the_background_and_not_the_creature():
    """The creature's shapes come from the same random numbers: the outlines of a sketch are where they were."""
    honest, false = (
        np.asarray(shapes.render(2, 3, misleading=flag, rho=1.0).convert("L"), dtype=float) for flag in (False, True)
    )
    dark = honest < 130
    assert dark.sum() > 50
    assert np.abs(honest - false)[dark].mean() < 25


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("domain", EVERY_DOMAIN)
def test_every_kind_is_visible_at_28_by_28(domain, part):
    """Another kind of one part, all else equal, changes the small picture that a CNN baseline sees."""
    style = shapes.STYLES[shapes.DOMAINS[domain]]
    pictures = []
    for kind in range(3):
        kinds = [0, 0, 0, 0]
        kinds[part] = kind
        image = shapes.paint(
            kinds, shapes.Style(**{**vars(style), "noise": 0.0, "wobble": 0.0}), 0.3, np.random.RandomState(1)
        )
        pictures.append(np.asarray(image.resize((28, 28)), dtype=float))
    for one, other in itertools.combinations(pictures, 2):
        assert (np.abs(one - other).max(-1) > 20).sum() >= 8  # pixels of 784


def test_unknown_domain_and_negative_index_are_refused():
    with pytest.raises(IndexError, match="0 to 3"):
        shapes.render(4, 0, misleading=False)
    with pytest.raises(IndexError, match="indices start at 0, got -1"):
        shapes.label(0, -1)
