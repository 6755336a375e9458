import pytest

from domainbed_reasoning.chains.prompts import q_cls, q_reason, readable_name
from domainbed_reasoning.images.catalog import STOCK


def test_the_classification_question_is_the_papers():
    assert (
        q_cls(["dog", "elephant"])
        == "What type of object is in this photo? Choose from the following options: dog, elephant."
    )


@pytest.mark.parametrize("name", STOCK)
def test_every_stock_dataset_is_asked_about_in_the_published_words(name):
    question = q_cls(["a", "b"], STOCK[name].subject)
    assert question == "What type of object is in this photo? Choose from the following options: a, b."


def test_the_reasoning_question_begins_with_it_and_names_the_five_stages_in_order():
    question = q_reason(["dog", "elephant"], "animal")
    assert question.startswith(q_cls(["dog", "elephant"], "animal"))
    places = [question.index(f"<{stage}>") for stage in ("SUMMARY", "CAPTION", "REASONING", "REFLECTION", "CONCLUSION")]
    assert places == sorted(places)


def test_folder_names_become_readable():
    assert readable_name("Alarm_Clock") == "alarm clock"
