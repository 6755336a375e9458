"""What the report says at a glance: a sentence, the best of each column, footnotes, classes and their confusions."""

import json

import pytest

from domainbed_reasoning.results.report import read_report
from domainbed_reasoning.results.report.blocks import Details
from domainbed_reasoning.results.report.classes import judged_answer
from domainbed_reasoning.results.report.finding import FOOTNOTES, for_report
from domainbed_reasoning.results.report.markdown import render_markdown
from domainbed_reasoning.results.report.page import render_page
from domainbed_reasoning.results.tables import Table

CHAIN_HPARAMS = {"answer": "chain", "on_parse_failure": "label"}


def write_all_targets(write_job, accs, trials=1):
    for algorithm, acc in accs.items():
        for target in range(3):
            for trial in range(trials):
                write_job(f"{algorithm}{target}{trial}", algorithm, target=target, trial=trial, accs=(0.0, acc))


def test_the_sentence_names_the_best_average_its_lead_and_the_distance_to_erm(write_job):
    """ERM 50, CORAL 60 and IRM 55 in every target domain; then a fourth method that lacks two domains."""
    write_all_targets(write_job, {"ERM": 0.5, "CORAL": 0.6, "IRM": 0.55}, trials=2)
    write_job("few", "Mixup", target=0, accs=(0.0, 0.9))
    report = read_report(write_job.folder)
    assert report.finding == (
        "On Debug28, CORAL has the highest average over the target domains, 60.0%, 5.0 points above IRM and 10.0 above "
        "ERM."
    )
    assert f'<p class="finding">{report.finding}</p>' in render_page(report)
    assert f"**{report.finding}**" in render_markdown(report)


def test_the_sentence_of_one_method_of_a_tie_and_of_no_complete_row(write_job):
    write_job("one", "ERM", target=0)
    assert read_report(write_job.folder).finding == "On Debug28, no method has results for all target domains yet."
    for target in (1, 2):
        write_job(f"one{target}", "ERM", target=target)
    alone = "On Debug28, ERM has 20.0% on average over the target domains (one trial)."
    assert read_report(write_job.folder).finding == alone
    write_all_targets(write_job, {"CORAL": 0.2})
    assert "20.0%, as CORAL has" in read_report(write_job.folder).finding


def test_the_best_of_a_column_is_bold_also_where_two_are_and_missing_cells_and_the_papers_columns_are_not():
    rows = (("A", "1.0", "X", "9.5", "3.00"), ("B", "1.0", "2.0 ± 0.1", "10.1", "1.00"))
    table = for_report(Table("t", ("Algorithm", "a", "b", "Avg", "Paper"), rows), columns=4)
    assert table.best == {(0, 1), (1, 1), (1, 3)} and table.first == 3
    assert for_report(Table("t", ("Algorithm", "Avg"), rows[:1])).best == frozenset()


def test_fewer_trials_become_footnotes_and_the_column_stays_one_of_numbers():
    counts = [f"{number} of 20 trials" for number in range(1, 11)]
    rows = tuple(("A", f"{number}.0 ± 0.1 ({count})") for number, count in enumerate([*counts, counts[0]]))
    table = for_report(Table("t", ("Algorithm", "photo"), rows, "Percent."))
    assert table.rows[0][1] == "0.0 ± 0.1ᵃ" and table.rows[10][1] == "10.0 ± 0.1ᵃ"
    assert table.note.startswith("Percent. ᵃ 1 of 20 trials. ᵇ 2 of 20 trials.")
    assert table.rows[8][1].endswith("(9 of 20 trials)") and len(FOOTNOTES) == 8  # letters have run out
    assert table.is_number(1)


def test_a_page_has_the_average_twice_and_each_screen_shows_one_of_them(write_job):
    write_all_targets(write_job, {"ERM": 0.5, "CORAL": 0.6})
    write_job("trial", "ERM", target=0, trial=1, accs=(0.0, 0.5))
    page = render_page(read_report(write_job.folder))
    head = '<th scope="col">Algorithm</th><th scope="col" class="number narrow-only">Avg</th>'
    assert head in page and '<th scope="col" class="number wide-only">Avg</th>' in page
    assert '<td class="number narrow-only"><strong>60.0</strong></td>' in page
    assert '<td class="number wide-only"><strong>60.0</strong></td>' in page
    assert "(1 of 2 trials)" not in page and "ᵃ 1 of 2 trials." in page


@pytest.mark.parametrize(
    ("hparams", "text", "chain", "label", "judged"),
    [
        ({"answer": "chain"}, "…", "dax", "fep", "dax"),
        ({"answer": "chain"}, "…", None, "fep", "fep"),
        ({"answer": "chain", "on_parse_failure": "wrong"}, "…", None, "fep", "no class"),
        ({"on_parse_failure": "wrong"}, None, None, "fep", "fep"),  # CLIP, in a sweep with this hparam
        ({"answer": "chain"}, "…", None, None, "no class"),
        ({"answer": "label"}, "…", "dax", "fep", "fep"),
    ],
)
def test_the_answer_that_counts_is_the_one_that_domainbeds_accuracy_counts(hparams, text, chain, label, judged):
    assert judged_answer({"chain": text, "chain_answer": chain, "label_answer": label}, hparams) == judged


def predictions(target, answers, true="dax"):
    """Return lines of a target domain, one per (split, answer)."""
    row = {"env": target, "label": true, "label_answer": None, "chain": "a chain"}
    rows = [
        row | {"split": split, "image": str(n), "chain_answer": answer} for n, (split, answer) in enumerate(answers)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def tables_of_classes(write_job):
    report = read_report(write_job.folder)
    return next((section.blocks for section in report.sections if section.anchor == "classes"), ())


def test_classes_are_pooled_over_domains_and_confusions_shared_among_a_classs_images(write_job):
    """Of 4 + 2 images of dax 3 are right, 2 are fep and one names no class; other splits do not count, nor does ERM."""
    write_job("erm", "ERM", "ShapesReasoning")
    for target, answers in ((0, ["dax", "dax", "fep", None]), (1, ["dax", "fep"])):
        job = write_job(f"job{target}", "MTCT", "ShapesReasoning", target=target, hparams=CHAIN_HPARAMS)
        rows = [("in", answer) for answer in answers] + [("out", "zorb")]
        (job / "predictions.jsonl").write_text(predictions(target, rows) + "not a line\n")
    table, fold = tables_of_classes(write_job)
    assert (table.head, table.rows) == (("Class", "MTCT", "Images"), (("dax", "50.0", "6"),))
    assert isinstance(fold, Details)
    by_domain, confusion = fold.blocks
    assert by_domain.head == ("Class", "photo", "cartoon", "All") and by_domain.rows == (
        ("dax", "50.0", "50.0", "50.0"),
    )
    assert confusion.head == ("True class", "dax", "fep", "no class")
    assert confusion.rows == (("dax", "50.0", "33.3", "16.7"),)


def test_of_many_classes_the_most_frequent_confusions_are_listed(write_job):
    job = write_job("job", "MTCT", "ShapesReasoning", hparams=CHAIN_HPARAMS)
    names = [f"class {number:02}" for number in range(13)]
    lines = [predictions(0, [("in", name), ("in", names[0])], true=name) for name in names]
    (job / "predictions.jsonl").write_text("".join(lines) + predictions(0, [("in", names[1])] * 2, true=names[2]))
    (confusions,) = tables_of_classes(write_job)[1].blocks
    assert confusions.rows[0] == ("class 02", "class 01", "2", "50.0") and len(confusions.rows) == 13


def test_without_predictions_there_is_no_section_of_classes(write_job):
    write_all_targets(write_job, {"ERM": 0.5})
    assert tables_of_classes(write_job) == ()
