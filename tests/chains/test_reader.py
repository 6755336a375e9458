"""The tolerant reader: a table of texts with their verdicts."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domainbed_reasoning.chains.chain import STAGES, Chain, ChainError, conclusion_of, match_class, parse_chain
from domainbed_reasoning.chains.class_answer import read_class
from domainbed_reasoning.chains.reader import BLEMISHES, is_thinking, normalize, read_chain, read_conclusion
from domainbed_reasoning.chains.rules import Rules
from domainbed_reasoning.chains.store import load_chains

NAMES = (
    "dog",
    "cat",
    "bobcat",
    "horse",
    "guitar",
    "electric guitar",
    "alarm clock",
    "the thing",
    "forget-me-not",
    "c++",
)
TEXTS = ("I compare parts.", "An animal on a lawn.", "Long ears & a wide nose.", "Colors mislead.", "dog")
GOOD = Chain(*TEXTS).render()
OTHER = Chain(*TEXTS[:-1], "cat").render()
RULES = Rules(NAMES, min_words=1)


def headed(form: str, case=str) -> str:
    """A chain with headings in place of tags."""
    return "\n\n".join(
        form.format(stage=case(stage), n=n) + "\n" + text
        for n, (stage, text) in enumerate(zip(STAGES, TEXTS, strict=True), 1)
    )


def tags(pattern: str, instead: str) -> str:
    return re.sub(pattern, instead, GOOD)


JSON = json.dumps({stage.lower(): text for stage, text in zip(STAGES, TEXTS, strict=True)})

# What reads as the good chain, its blemishes taken off: text, blemishes.
SAME = {
    "as it should be": (GOOD, ""),
    "thoughts": (f"<think>Is it a cat?</think>\n{GOOD}", "think"),
    "thoughts of a server that opens them itself": (f"Is it a cat?\n</think>\n\n{GOOD}", "think"),
    "thoughts under other names": (f"<Thinking>cat</Thinking>{GOOD}", "think"),
    "thoughts in brackets": (f"[THINK]cat[/THINK]{GOOD}", "think"),
    "thoughts of gpt-oss": (
        f"<|channel|>analysis<|message|>a cat?<|end|><|start|>assistant<|channel|>final<|message|>{GOOD}",
        "think",
    ),
    "thoughts within thoughts": (f"<think>a<think>b</think>c</think>{GOOD}", "think"),
    "thoughts that speak of their tag": (f"<think>I am in <think>, so</think>{GOOD}", "think"),
    "another chain quoted in the thoughts": (f"<think>{OTHER}</think>{GOOD}", "think"),
    "thoughts afterwards": (f"{GOOD}<think>or a cat?</think>", "think"),
    "thoughts, then an answer's tags": (f"<think>x</think><answer>{GOOD}</answer>", "think"),
    "a fence": (f"```xml\n{GOOD}\n```", "fence"),
    "a fence without language": (f"```\n{GOOD}```", "fence"),
    "a fence of tildes": (f"~~~\n{GOOD}\n~~~", "fence"),
    "thoughts and a fence": (f"<think>x</think>\n```xml\n{GOOD}\n```", "think fence"),
    "lower case": (re.sub("</?[A-Z]+>", lambda tag: tag.group().lower(), GOOD), "case"),
    "mixed case": (GOOD.replace("SUMMARY", "Summary"), "case"),
    "spaces in tags": (tags("<(/?)([A-Z]+)>", r"< \1 \2 >"), "tag"),
    "attributes": (GOOD.replace("<SUMMARY>", '<SUMMARY id="1">'), "tag"),
    "a backslash": (GOOD.replace("</", "<\\"), "tag"),
    "escaped tags": (GOOD.replace("<", "\\<").replace(">", "\\>"), "tag"),
    "HTML entities": (GOOD.replace("<", "&lt;").replace(">", "&gt;"), "tag"),
    "full-width brackets": (GOOD.replace("<", "＜").replace(">", "＞"), "tag"),
    "square brackets": (GOOD.replace("<", "[").replace(">", "]"), "tag"),
    "bold tags": (tags("(</?[A-Z]+>)", r"**\1**"), "bold"),
    "tags as code": (tags("(</?[A-Z]+>)", r"`\1`"), "bold"),
    "bold within tags": (tags("<(/?)([A-Z]+)>", r"<\1**\2**>"), "tag"),
    "headings": (headed("## {stage}"), "heading"),
    "headings in title case": (headed("### {stage}", str.capitalize), "heading"),
    "numbered headings": (headed("## {n}. {stage}:"), "heading"),
    "bold headings": (headed("**{stage}:**"), "heading"),
    "bold headings, the colon outside": (headed("**{stage}**:", str.capitalize), "heading"),
    "bold headings of stages": (headed("**Stage {n}: {stage}**"), "heading"),
    "a list of bold headings": (headed("{n}. **{stage}**:"), "heading"),
    "words and colons": (headed("{stage}:", str.capitalize), "heading"),
    "headings with a symbol": (headed("## 🔎 {stage}"), "heading"),
    "headings in italics": (headed("*{stage}*:", str.capitalize), "heading"),
    "words alone on a line": (headed("{stage}"), "heading"),
    "line breaks in HTML": (GOOD.replace("\n", "<br>\n<br/>"), "signs"),
    "headings, Windows's lines": (headed("## {stage}").replace("\n", "\r\n"), "heading"),
    "headings and a postscript": (headed("## {stage}") + "\n\nI hope this helps!", "heading postscript"),
    "headings and tags": (re.sub("<([A-Z]+)>", r"## \1\n<\1>", GOOD), "heading"),
    "a numbered list": (re.sub("(?m)^<", "1. <", GOOD), "signs"),
    "rules between": (GOOD.replace("\n", "\n---\n"), "signs"),
    "a byte order mark": ("\ufeff" + GOOD, "signs"),
    "a preamble": (f"Sure! Here is my answer to dog or cat:\n{GOOD}", "preamble"),
    "a postscript": (f"{GOOD}\n\nI hope this helps!", "postscript"),
    "a postscript that names the class": (f"{GOOD}\nSo it is a dog.", "postscript"),
    "everything": (
        "<think>cat</think>Sure:\n```xml\n"
        + GOOD.replace("SUMMARY", "summary").replace(">dog<", "> **A dog.** <")
        + "\n```\nBye.",
        "think fence case preamble postscript conclusion",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_format_deviations_are_normalized_and_recorded(name):
    text, blemishes = SAME[name]
    verdict = RULES.judge(text, 0)
    assert verdict.accepted, verdict
    assert list(verdict.normalized) == blemishes.split()
    assert (verdict.chain or text) == GOOD and (verdict.chain is None) == (not blemishes)
    reading = read_conclusion(text, NAMES)
    assert (reading.answer, reading.text) == (0, GOOD)
    # The exact reading is what it was: nothing but the perfect form is a chain.
    assert Rules(NAMES, 1, exact=True).judge(text, 0).accepted == (text == GOOD)


REJECTED = {
    "a chain in the thoughts alone": (f"<think>{GOOD}</think> I am done.", "stage_missing"),
    "thoughts without end": (f"<think> so {GOOD}", "stage_missing"),
    "a chain before a lone closing tag": (f"{GOOD}</think>", "stage_missing"),
    "two full chains": (f"{GOOD}\n{OTHER}", "stage_repeated"),
    "the same chain twice": (f"{GOOD}\n{GOOD}", "stage_repeated"),
    "a chain quoted in a fence, and another": (f"```\n{OTHER}\n```\n{GOOD}", "stage_repeated"),
    "two conclusions": (f"{GOOD}<conclusion>cat</conclusion>", "stage_repeated"),
    "two headings of a conclusion": (headed("## {stage}") + "\n## Conclusion\ncat", "stage_repeated"),
    "words between stages": (GOOD.replace("<CAPTION>", "Now <CAPTION>"), "stage_outside"),
    "another class afterwards": (f"{GOOD}\nActually, it is a cat.", "stage_outside"),
    "a stage is missing": (GOOD.replace("<REFLECTION>Colors mislead.</REFLECTION>", ""), "stage_missing"),
    "a heading is missing": (headed("## {stage}").replace("## REFLECTION", ""), "stage_missing"),
    "headings out of order": (headed("## {stage}").replace("SUMMARY", "X").replace("CAPTION", "SUMMARY").replace("X", "CAPTION"), "stage_order"),  # noqa: E501
    "a closing tag is missing": (GOOD.replace("</CONCLUSION>", ""), "stage_missing"),
    "lower case, a stage empty": (GOOD.lower().replace("colors mislead.", " "), "stage_empty"),
    "nested stages": (GOOD.replace("</SUMMARY>\n<CAPTION>", "<CAPTION></SUMMARY>"), "stage_nested"),
    "no tags": ("It is a dog.", "stage_missing"),
    "words that could be headings": ("In summary it is a dog. The conclusion is dog.", "stage_missing"),
    "JSON": (JSON, "stage_missing"),
    "JSON in a fence": (f"```json\n{JSON}\n```", "stage_missing"),
    "nothing": ("", "stage_missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_invalid_chain_is_rejected_under_its_rule(name):
    text, rule = REJECTED[name]
    assert RULES.judge(text, 0).rule == rule


CONCLUSIONS = {
    "dog": "dog", "Dog": "dog", "a dog": "dog", "The dog.": "dog", "dog.": "dog", "dog!": "dog", "dog。": "dog",
    "**dog**": "dog", "*dog*": "dog", "__dog__": "dog", "`dog`": "dog", "# dog": "dog", "- dog": "dog", "(dog)": "dog",
    '"dog"': "dog", "'dog'": "dog", "“dog”": "dog", "‘dog’": "dog", "«dog»": "dog", "„dog“": "dog", "「dog」": "dog",
    "&quot;dog&quot;": "dog", "<b>dog</b>": "dog", "dog<br/>": "dog", "dog\u200b": "dog", "ｄｏｇ": "dog",
    r"\boxed{dog}": "dog", r"$\boxed{\text{dog}}$": "dog", r"\(\text{dog}\)": "dog",
    "The answer is dog": "dog", "The answer is: **dog**.": "dog", "Answer: dog": "dog", "**Answer:** dog": "dog",
    "**Final answer**: Dog": "dog", "This is a dog.": "dog", "It is a dog": "dog", "It's a dog.": "dog",
    "It’s a dog.": "dog", "The object in this photo is a dog.": "dog", "The image shows a dog.": "dog",
    "A photo of a dog": "dog", "Therefore, the correct option is 'dog'.": "dog", "The type of object is dog.": "dog",
    "The photo is of a dog.": "dog", "A dog is shown in the image.": "dog", "The class 'dog'": "dog",
    "dog class": "dog",
    "The object can be classified as a dog.": "dog", "The correct answer is dog from the given options.": "dog",
    "The animal belongs to the category dog": "dog", "I would choose dog.": "dog", "It must be a dog.": "dog",
    "electric guitar": "electric guitar", "an electric guitar": "electric guitar", "a guitar": "guitar",
    "Alarm_Clock": "alarm clock", "an alarm-clock": "alarm clock", "the thing": "the thing",
    "It is the thing.": "the thing", "forget-me-not": "forget-me-not", "a forget me not": "forget-me-not", "C++": "c++",
}  # fmt: skip


@pytest.mark.parametrize("conclusion", CONCLUSIONS)
def test_a_conclusion_that_names_a_class_names_it_whole(conclusion):
    name = CONCLUSIONS[conclusion]
    verdict = RULES.judge(Chain(*TEXTS[:-1], conclusion).render(), NAMES.index(name))
    assert verdict.accepted, verdict
    # A name that was exact before stays as it was spelled.
    spelled = conclusion if match_class(conclusion, NAMES) is not None else name
    assert parse_chain(verdict.chain or Chain(*TEXTS[:-1], conclusion).render()).conclusion == spelled
    assert verdict.normalized == (() if spelled == conclusion else ("conclusion",))


NO_ANSWER = {
    **dict.fromkeys(
        (
            "not a dog", "It is not a dog.", "It isn't a dog", "It's not dog", "no dog", "never a dog", "non-dog",
            "It could be a dog", "probably a dog", "maybe dog", "dog?", "It might be a dog.", "anything but a dog",
            "dogs", "The answer is dogs", "bobcats", "tomcat", "hotdog", "hot dog", "dog house", "a dog-like animal",
            "a dog's nose", "doggy", "thing", "a thing", "alarm", "clock", "electric", "~~dog~~", "<s>dog</s>",
            "<del>dog</del>", "!dog", "unknown", "none of the above", "The answer is not listed", "c", "dogdog",
            "The image cannot be classified as dog", "It can be classified as anything but dog", "It must not be a dog",
            "The opposite of dog", "The wrong answer is dog", "The least likely class is dog", "...", "?",
        ),
        "conclusion_none",
    ),
    **dict.fromkeys(
        (
            "dog or horse", "dog and cat", "dog, horse", "dog/cat", "dog, cat, horse, guitar", "neither dog nor cat",
            "dog, not cat", "not cat but dog", "~~cat~~ dog", "1. dog\n2. cat", "electric guitar or guitar",
            "It is a dog; it was a cat.", "dog (cat)",
        ),
        "conclusion_several",
    ),
}  # fmt: skip


@pytest.mark.parametrize("conclusion", NO_ANSWER)
def test_a_negation_a_doubt_a_part_and_two_classes_are_no_answer(conclusion):
    text = Chain(*TEXTS[:-1], conclusion).render()
    assert RULES.judge(text, 0).rule == NO_ANSWER[conclusion]
    assert read_conclusion(text, NAMES).answer is None


def test_evaluation_reads_a_conclusion_alone_but_never_from_thoughts_or_from_two():
    assert read_conclusion("It runs. <conclusion>A dog.</conclusion>", NAMES).answer == 0
    assert read_conclusion("## Conclusion\ndog", NAMES).answer == 0
    assert read_conclusion("The answer is dog.", NAMES).answer is None
    assert read_conclusion("<think><CONCLUSION>dog</CONCLUSION></think> I do not know.", NAMES).answer is None
    assert read_conclusion("<CONCLUSION>dog</CONCLUSION><CONCLUSION>cat</CONCLUSION>", NAMES).answer is None
    exact = read_conclusion("thinking… <CONCLUSION> dog </CONCLUSION>", NAMES, exact=True)
    assert (exact.answer, exact.text) == (0, "thinking… <CONCLUSION> dog </CONCLUSION>")


def test_names_that_differ_only_in_punctuation_match_exactly_or_not_at_all():
    names = ("C#", "C", "a dog", "dog", "not a toy", "toy")
    assert [read_class(answer, names) for answer in ("C#", "c", "a dog", "dog", "**C**")] == [0, 1, 2, 3, None]
    assert read_class("It is a dog", names) == 2  # the longer name
    assert read_class("not a toy", names) == 4 and read_class("It is not a toy.", names) == 4
    assert read_class("The answer is toy", names) == 5


def test_a_thought_is_open_until_its_tag_closes():
    assert is_thinking("<think> <CONCLUSION>dog</CONCLUSION>") and is_thinking("<think>a</think><think>")
    assert not is_thinking(GOOD) and not is_thinking("<think>a</think>" + GOOD) and not is_thinking("a</think>")


def test_every_deviation_is_covered_by_the_table():
    assert set(" ".join(blemishes for _, blemishes in SAME.values()).split()) == set(BLEMISHES)


_PIECES = (
    *(f"<{stage}>" for stage in STAGES), *(f"</{stage}>" for stage in STAGES), "<summary>", "</Conclusion >", "**",
    "```", "## Summary\n", "**Conclusion:**", "<think>", "</think>", "dog", " ", "\n", "\n\n", "1. ", "[CAPTION]",
    "&lt;caption&gt;",
)  # fmt: skip


@given(st.lists(st.sampled_from([*_PIECES, GOOD, OTHER]), max_size=12).map("".join))
def test_reading_is_canonical_and_idempotent(text):
    try:
        chain, normal = read_chain(text)
    except ChainError:
        chain = None
    else:
        assert parse_chain(chain.render()) == chain and parse_chain(normal.text) == chain
        assert normalize(chain.render()).blemishes == ()
    try:
        assert parse_chain(text) == chain  # tolerance never changes what was perfect
    except ChainError:
        pass
    reading = read_conclusion(text, NAMES)
    if reading.answer is not None:
        assert read_conclusion(reading.text, NAMES).answer == reading.answer
        assert match_class(conclusion_of(reading.text), NAMES) == reading.answer


@pytest.mark.parametrize("piece", ["<", "< ", "*", "`", "\n#", "\n        ", "<SUMMARY>", "<summary ", "<think>", "1. ",
                                   "## Summary\n", "&lt;", "\\boxed{", "dog ", "not "])  # fmt: skip
def test_hostile_repetition_terminates(piece):
    """Every repetition in the patterns is bounded: 80,000 characters end at once, not in hours."""
    text = piece * (80_000 // len(piece))
    assert not RULES.judge(text, 0).accepted
    assert not RULES.judge(GOOD.replace(">dog<", f">{text}<"), 0).accepted
    RULES.judge(f"{GOOD}{text}", 0)


def test_real_chains_need_no_normalization(test_data):
    for text in load_chains(test_data / "PACS_chains.jsonl").values():
        assert normalize(text).blemishes == () and normalize(text).text == text
