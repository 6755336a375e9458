"""Creatures of the two regimes: codes that can be told apart, images that stay the same, a teacher that errs."""

import hashlib

import numpy as np
import pytest

from domainbed_reasoning.chains.chain import conclusion_of, parse_chain
from domainbed_reasoning.images import creatures, shapes


def test_twelve_names_of_two_words_have_codes_at_least_two_parts_apart():
    assert len(set(creatures.CLASS_NAMES)) == len(set(creatures.CODES)) == 12
    assert {len(name.split()) for name in creatures.CLASS_NAMES} == {2}
    apart = [sum(a != b for a, b in zip(x, y, strict=True)) for x in creatures.CODES for y in creatures.CODES if x != y]
    assert min(apart) == 2 and all((sum(code[:3]) - code[3]) % 3 == 0 for code in creatures.CODES)


@pytest.mark.parametrize("regime", creatures.REGIMES)
def test_an_image_depends_on_regime_domain_and_index_alone(regime):
    images = [[creatures.render(regime, domain, index).tobytes() for index in range(3)] for domain in range(4)]
    again = [[creatures.render(regime, domain, index).tobytes() for index in range(3)] for domain in range(4)]
    assert images == again and len({image for of_domain in images for image in of_domain}) == 12


def test_camouflaged_creatures_differ_less_from_their_background():
    def contrast(regime, domain):
        images = [np.asarray(creatures.render(regime, domain, index), dtype=float) for index in range(24)]
        return np.mean([image.std() for image in images])

    assert all(contrast("camouflaged", domain) < 0.85 * contrast("clear", domain) for domain in range(4))


def test_chains_have_five_stages_and_conclude_with_the_class_in_either_style():
    for domain in range(4):
        for index in range(24):
            for teacher in creatures.TEACHERS:
                text = creatures.chain("clear", domain, index, teacher)
                assert parse_chain(text) and conclusion_of(text) == creatures.CLASS_NAMES[index % 12]


@pytest.mark.parametrize("error", [0.1, 0.4])
def test_a_teacher_that_errs_takes_that_share_for_a_similar_class_and_describes_it(error):
    """Of 960 images, 10% and 40% within 4 standard deviations of a binomial."""
    taken = [(creatures.conclusion("clear", domain, index, error), index % 12)
             for domain in range(4) for index in range(240)]  # fmt: skip
    wrong = [(other, label) for other, label in taken if other != label]
    assert abs(len(wrong) / 960 - error) < 4 * (error * (1 - error) / 960) ** 0.5
    assert all(sum(a != b for a, b in zip(creatures.CODES[x], creatures.CODES[y], strict=True)) == 2 for x, y in wrong)
    index = next(index for index in range(240) if creatures.conclusion("clear", 0, index, error) != index % 12)
    text = creatures.chain("clear", 0, index, "own", error)
    code = creatures.CODES[creatures.conclusion("clear", 0, index, error)]
    assert parse_chain(text).caption == ", ".join(shapes.KINDS[part][kind] for part, kind in enumerate(code))


def test_the_embedded_benchmark_of_before_is_painted_as_before():
    """New settings of a style draw nothing where they are off."""
    images = [shapes.render(domain, index, misleading=True).tobytes() for domain in range(4) for index in range(8)]
    assert hashlib.sha256(b"".join(images)).hexdigest() == DIGEST


DIGEST = "61aad6927be023eb90df10ba095810f326f746b29ea71efa68d88d260daebe14"
