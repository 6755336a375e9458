import pytest
from hypothesis import given
from hypothesis import strategies as st

from domainbed_reasoning.chains.chain import (
    STAGES,
    Chain,
    ChainError,
    conclusion_of,
    count_words,
    match_class,
    parse_chain,
)

GOOD = Chain("I compare parts.", "A painted dog.", "Long ears & a wide nose.", "Colours mislead.", "dog")


def test_a_rendered_chain_parses_to_itself():
    assert parse_chain(GOOD.render()) == GOOD


def test_stages_may_be_separated_by_any_whitespace():
    assert parse_chain(" " + GOOD.render().replace("\n", "") + "\n\n") == GOOD


_TEXT = st.text(st.characters(exclude_characters="<>"), min_size=1).map(str.strip).filter(bool)


@given(st.tuples(*[_TEXT] * len(STAGES)))
def test_every_chain_without_tags_in_its_texts_survives_the_round_trip(texts):
    assert parse_chain(Chain(*texts).render()) == Chain(*texts)


@given(st.lists(st.sampled_from([*(f"<{s}>" for s in STAGES), *(f"</{s}>" for s in STAGES), "x", " "]), max_size=14))
def test_only_the_five_stages_in_order_parse(parts):
    """Whatever tags are strewn about: a text parses only if it renders back to itself up to whitespace."""
    text = "".join(parts)
    try:
        chain = parse_chain(text)
    except ChainError as error:
        assert error.rule in {"missing", "order", "repeated", "nested", "empty", "outside"}
    else:
        assert chain.render().replace("\n", "").replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "missing"),
        ("dog", "missing"),
        (GOOD.render().replace("<REFLECTION>Colours mislead.</REFLECTION>\n", ""), "missing"),
        (GOOD.render().replace("</CONCLUSION>", ""), "missing"),
        (GOOD.render().replace("SUMMARY", "X").replace("CAPTION", "SUMMARY").replace("X", "CAPTION"), "order"),
        (GOOD.render() + "<CONCLUSION>cat</CONCLUSION>", "repeated"),
        (GOOD.render().replace("A painted dog.", "A <REASONING>x</REASONING> dog."), "repeated"),
        (GOOD.render().replace("dog</CONCLUSION>", "</CONCLUSION>"), "empty"),
        ("So: " + GOOD.render(), "outside"),
        (GOOD.render() + " That is all.", "outside"),
    ],
)
def test_a_broken_chain_is_refused_by_the_name_of_its_rule(text, rule):
    with pytest.raises(ChainError) as caught:
        parse_chain(text)
    assert caught.value.rule == rule


def test_the_conclusion_is_read_even_where_other_stages_are_missing_but_never_from_two():
    assert conclusion_of("thinking… <CONCLUSION> dog </CONCLUSION>") == "dog"
    assert conclusion_of("<CONCLUSION>dog") is None
    assert conclusion_of("</CONCLUSION>dog<CONCLUSION>") is None
    assert conclusion_of("<CONCLUSION>dog</CONCLUSION><CONCLUSION>cat</CONCLUSION>") is None


def test_classes_match_exactly_up_to_case_spaces_and_underscores():
    names = ["bobcat", "cat", "alarm clock"]
    assert match_class("Cat ", names) == 1
    assert match_class("Alarm_Clock", names) == 2
    assert match_class("a cat", names) is None  # containment would say cat, or bobcat for "bobcats"
    assert match_class(None, names) is None


def test_words_are_counted_without_tags():
    assert count_words("<SUMMARY>two words</SUMMARY>\n<CAPTION>and three more</CAPTION>") == 5
