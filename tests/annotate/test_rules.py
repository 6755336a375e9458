"""The rejection rules: one case each, and real chains, which violate none."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from domainbed_reasoning.chains.chain import Chain, parse_chain
from domainbed_reasoning.chains.contradiction import contradiction
from domainbed_reasoning.chains.rules import ADVICE, RULES, Rules, make_printable
from domainbed_reasoning.chains.store import load_chains

NAMES = ("dog", "bobcat", "cat", "alarm clock")
RULE = Rules(NAMES)
CLEAN = Chain(
    "I will look at the ears and the tail.",
    "An animal stands on a lawn in front of a fence, seen from the side.",
    "The ears are pointed and carry tufts, the tail is short, and the coat is spotted on a buff ground.",
    "Grass hides the paws, and the distance makes the size uncertain.",
    "bobcat",
)


def chain(**stages: str) -> str:
    return Chain(**{**vars(CLEAN), **stages}).render()


GOOD = CLEAN.render()
BROKEN = {
    "unprintable": (GOOD.replace("ears", "ea\0rs"), {}),
    "cut": (GOOD[:200], {"finish": "length"}),
    "refusal": ("I'm sorry, but I can't help with that.", {}),
    "placeholder": (chain(caption="See <IMG_CONTEXT> here."), {}),
    "stage_missing": (GOOD.replace("<CAPTION>", ""), {}),
    "stage_order": ("<CAPTION>a</CAPTION><SUMMARY>b</SUMMARY>" + GOOD[GOOD.index("<REASONING>") :], {}),
    "stage_repeated": (GOOD + "<CONCLUSION>bobcat</CONCLUSION>", {}),
    "stage_nested": ("<SUMMARY>a<CAPTION>b</CAPTION></SUMMARY>" + GOOD[GOOD.index("<REASONING>") :], {}),
    "stage_empty": (chain(reflection=" "), {}),
    "stage_outside": (GOOD.replace("<CAPTION>", "Then: <CAPTION>"), {}),
    "too_short": (Chain("a", "b", "c", "d", "bobcat").render(), {}),
    "too_long": (chain(reasoning="tuft " * 500), {}),
    "conclusion_none": (chain(conclusion="It could be a bobcat"), {}),
    "conclusion_several": (chain(conclusion="bobcat or cat"), {}),
    "contradiction": (chain(reasoning=CLEAN.reasoning + " Therefore, it is a dog."), {}),
    "label": (GOOD, {"label": 2}),
}


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "second"])
def test_every_rule_rejects_its_case_under_its_name(rule: str) -> None:
    text, more = BROKEN[rule]
    verdict = RULE.judge(text, **{"label": 1, **more})
    assert (verdict.accepted, verdict.rule) == (False, rule)
    assert verdict.reason


def test_a_good_chain_is_accepted_with_case_and_underscores_as_they_come() -> None:
    assert RULE.judge(GOOD, 1).accepted
    assert RULE.judge(chain(conclusion="Alarm_Clock"), 3).accepted
    assert Rules(NAMES, verified=False).judge(GOOD, 2).accepted


def test_exact_rules_reject_what_the_tolerant_reader_normalizes() -> None:
    exact = Rules(NAMES, exact=True)
    assert exact.judge(GOOD, 1).accepted
    for text, rule in (("Sure! " + GOOD, "stage_outside"), (chain(conclusion="a bobcat"), "conclusion_none")):
        assert RULE.judge(text, 1).accepted and exact.judge(text, 1).rule == rule


def test_word_limits_are_inclusive_and_exclude_tags() -> None:
    """The chain has 9 + 15 + 20 + 11 + 1 = 56 words; with each tag a word apart they would be 66."""
    spaced = GOOD.replace(">", "> ").replace("<", " <")
    for text in (GOOD, spaced):
        assert Rules(NAMES, 56, 56).judge(text, 1).accepted
        assert Rules(NAMES, 57, 100).judge(text, 1).reason == "56 words, fewer than 57"
        assert Rules(NAMES, 1, 55).judge(text, 1).reason == "56 words, more than 55"


def test_words_around_the_stages_and_thoughts_do_not_make_a_chain_longer() -> None:
    thoughts = f"<think>{'hmm ' * 500}</think>"
    assert Rules(NAMES, 56, 56).judge(f"{thoughts}Sure, here it is: {GOOD} That is all.", 1).accepted


def test_a_refusal_before_a_chain_is_a_refusal_and_a_conclusion_under_a_heading_may_be_cut() -> None:
    assert RULE.judge("I'm sorry, but I cannot identify the image. " + GOOD, 1).rule == "refusal"
    assert RULE.judge("<think>Hm.</think>I'm sorry, but I can't help with that.", 1).rule == "refusal"
    assert RULE.judge("<think>I cannot see the tail.</think>A bobcat.", 1).rule == "stage_missing"
    headed = "\n".join(f"## {stage}\n{text}" for stage, text in vars(CLEAN).items())
    assert RULE.judge(headed, 1).accepted
    assert RULE.judge(headed, 1, finish="length").rule == "cut"
    assert RULE.judge(headed + "\n\nI hope th", 1, finish="length").accepted


def test_every_rule_has_advice() -> None:
    assert set(ADVICE) >= set(RULES) - {"unprintable", "placeholder", "second"}


def test_api_refusals_and_refusals_in_the_conclusion_are_detected() -> None:
    assert RULE.judge("", 1, refused=True).rule == "refusal"
    assert RULE.judge(chain(conclusion="I cannot determine the class."), 1).rule == "refusal"


@pytest.mark.parametrize(
    ("reflection", "rejected"),
    [
        ("The answer is dog.", True),
        ("So the best choice is 'cat', with some doubt.", True),
        ("It cannot be a bobcat.", True),
        ("Tufts rule out a bobcat.", True),
        ("All of it points to a cat.", True),
        ("A cat would be smaller. It is a bobcat.", False),
        ("It is not a dog, and it is not a cat.", False),
        ("It is a dog at first sight, but the answer is bobcat.", False),
        ("This is cat-like, yet the tufts decide.", False),
        ("It is a dog's lawn.", False),
        ("It has the size of a dog.", False),
        ("The parts fit a dog better than any other option.", True),
        ("A flat nose would fit a cat better than this one.", False),
        ("My first thought was cat; looking again, the tufts decide.", False),
        ("At first it is a cat, one would say.", False),
        ("The muzzle could belong to a dog, but the tufts exclude that.", False),
        ("Neither paws nor tail point to a dog.", False),
        ("No collar would suit a dog here.", False),
        ("Nothing about it suits a cat, a dog, or an alarm clock.", False),
        ("The caption reads 'this is a dog', which is a joke.", False),
        ("Its posture suggests a dog, and the tufts overrule that at once.", False),
        ("The paws suit a cat, the ear tufts a bobcat.", False),
        ("Strictly speaking this is not a bobcat, so the nearest match is chosen.", False),
        ("A dog is the only other option with such paws.", False),
        ("Nothing here rules out a bobcat.", False),
        ("If it is a dog, the tufts are odd.", False),
        ("One might think it is a dog, but it is a bobcat.", False),
        ("It is a cat, one might think, but the tufts decide.", False),
        ("A dog stands behind the fence, and the house in the background is a backdrop.", False),
        ("The size is uncertain, but it is a dog.", True),
        ("Tail and muzzle leave no doubt, so dog prevails.", True),
        ("With the given options, dog is the closest and only sensible choice.", True),
        ("I conclude that it is a dog.", True),
        ("This is a cat, not a bobcat.", True),
        ("These parts mark it as a dog.", True),
        ("The long muzzle indicates a dog.", True),
    ],
)
def test_contradiction_distinguishes_statements_from_comparisons(reflection: str, rejected: bool) -> None:
    assert (RULE.judge(chain(reflection=reflection), 1).rule == "contradiction") == rejected


def test_make_printable_keeps_all_but_nul_and_lone_surrogates() -> None:
    assert make_printable("a\0b\ud800c\U0001f415\u2028") == "a\ufffdb\ufffdc\U0001f415\u2028"


def test_real_chains_pass_and_many_with_another_conclusion_contradict_themselves(test_data: Path) -> None:
    """All 112 pass. With each of the six wrong conclusions put in, the rule finds a fifth without any label.

    The rule only knows outright statements; what it must never do is to reject a coherent chain.
    """
    classes = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    rules = Rules(classes)
    swapped: Counter[str] = Counter()
    for image, text in load_chains(test_data / "PACS_chains.jsonl").items():
        label = classes.index(image.split("/")[1])
        assert rules.judge(text, label).accepted
        for wrong in classes[:label] + classes[label + 1 :]:
            other = Chain(**{**vars(parse_chain(text)), "conclusion": wrong}).render()
            swapped[rules.judge(other).rule] += 1
    assert set(swapped) == {"", "contradiction"}
    assert swapped["contradiction"] > 120


def test_contradiction_rejects_no_true_chain_of_thousands(test_data: Path) -> None:
    """A frontier model's chains for PACS, full of exclusions and comparisons: the rates in the module's docstring."""
    classes = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    file = test_data / "PACS_reasoning.jsonl"
    if not file.is_file():
        pytest.skip(f"no {file.name} in {test_data}")
    rejected, found, swapped = [], 0, 0
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["verdict"] != "accepted":
            continue
        parts = parse_chain(record["chain"])
        label = classes.index(parts.conclusion)
        if contradiction(parts, label, classes):
            rejected.append(record["image"])
        found += contradiction(parts, (label + 1) % 7, classes) is not None
        swapped += 1
    assert swapped > 9000 and not rejected
    assert found > 0.05 * swapped


def test_rules_table_names_everything_a_verdict_can_say(chain_text: Callable[..., str]) -> None:
    assert set(BROKEN) | {"second"} == set(RULES)
    assert json.dumps(RULES)
