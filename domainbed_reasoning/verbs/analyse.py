"""`domainbed-reasoning analyse`: the paper's analyses, and one beyond it, of models and jobs."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainbed_reasoning.verbs import arguments

if TYPE_CHECKING:
    from domainbed_reasoning.analysis.checkpoints import Checkpoint
    from domainbed_reasoning.analysis.material import Material
    from domainbed_reasoning.analysis.results import Results
    from domainbed_reasoning.analysis.target_tokens import Answers, Labelling, TokenTable
    from domainbed_reasoning.mllm import MLLM
    from domainbed_reasoning.trained import TrainedJob

_EXAMPLES = """\
  domainbed-reasoning analyse token-shift --after sweep/1a2b3c --targets teacher
  domainbed-reasoning analyse token-shift --before sweep/4d5e6f --after sweep/1a2b3c --targets chains.jsonl
  domainbed-reasoning analyse token-shift --before sweep/1a2b3c/model_step20.pkl --after sweep/1a2b3c --targets own
  domainbed-reasoning analyse entropy --after sweep/1a2b3c --after-own sweep/7a8b9c
  domainbed-reasoning analyse divergence --dataset PACSReasoning --data_dir ~/data
  domainbed-reasoning analyse divergence --dataset ShapesReasoning --encoder tiny
  domainbed-reasoning analyse sarr-rounds sweep/1a2b3c sweep/4d5e6f --images 200
  domainbed-reasoning analyse faithfulness sweep/1a2b3c sweep/7a8b9c --images 200

A job is a folder that DomainBed's train or sweep wrote with an MLLM algorithm; in its place a checkpoint can be named
that --save_model_every_checkpoint left in it. Each analysis leaves its numbers as CSV, what they say beside the paper's
with the command as text, and a plot (pip install 'domainbed-reasoning[plots]') in --output, which is the folder
`analysis` beside the (first) job by default: `report` looks there. Their names say what was looked at, and another
command's files are not written over. `analyse NAME --help` says more.
"""

_BEFORE = "job, checkpoint, model folder, hub id or `tiny` (default: the base of --after)"
_NOT_IN_PAPER = "paper: no such analysis"


@arguments.ends_with_message
def main(argv: Sequence[str] | None = None) -> int:
    """Run one analysis; return the exit code."""
    parser = arguments.make_parser("analyse", __doc__ or "", _EXAMPLES)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, (said, add, _) in _ANALYSES.items():
        one = names.add_parser(name, help=said, description=said)
        add(one)
        one.add_argument("--data_dir", "--data-dir", help="where the data lie (default: where the job found them)")
        one.add_argument("--model", help="the base model, where it is not where the job found it")
        one.add_argument("--output", type=Path, help="folder to write (default: `analysis` beside the job, or here)")
    given = parser.parse_args(argv)
    given.command = shlex.join(["domainbed-reasoning", "analyse", *(sys.argv[1:] if argv is None else argv)])
    try:
        _ANALYSES[given.name][2](given)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: `domainbed-reasoning doctor` says what is missing.") from error
    return 0


def _add_token_shift(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", help=_BEFORE)
    parser.add_argument("--after", required=True, help="the job to look at, or a checkpoint of it")
    parser.add_argument(
        "--targets",
        default="teacher",
        help="label, teacher, own (chains that --before writes and SARR, as --after has it, keeps) or a chain file "
        "(default: teacher)",
    )
    _add_images(parser, 200, "sources")


def _add_entropy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", help=_BEFORE)
    parser.add_argument("--after", required=True, help="the job for teacher chains")
    parser.add_argument("--after-own", help="the job for self-generated chains (default: --after)")
    _add_images(parser, 200, "sources")


def _add_divergence(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="PACSReasoning, ShapesReasoning, …")
    parser.add_argument("--chains", help="chain file (default: the dataset's)")
    parser.add_argument("--hparams", default="{}", help='JSON for the dataset, such as \'{"teacher": "other"}\'')
    parser.add_argument("--encoder", help="a CLIP or an MLLM, `tiny` for the embedded one (default: CLIP ViT-B/16)")
    parser.add_argument("--kernel", default="linear", choices=("linear", "rbf"), help="default: %(default)s")
    parser.add_argument("--images", type=int, default=200, help="images a domain, 0 for all (default: %(default)s)")


def _add_rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", nargs="+", help="jobs of SARR or RDMLDG")
    _add_images(parser, 0, "target", "images to ask the saved checkpoints about, 0 for none (default: %(default)s)")


def _add_faithfulness(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", nargs="+", help="jobs, or checkpoints of jobs")
    _add_images(parser, 200, "target")


def _add_images(parser: argparse.ArgumentParser, count: int, domains: str, said: str = "") -> None:
    parser.add_argument("--images", type=int, default=count, help=said or "0 for all (default: %(default)s)")
    parser.add_argument(
        "--domains", nargs="+", default=[domains], help="names, numbers, sources, target or all (default: %(default)s)"
    )


def _token_shift(given: argparse.Namespace) -> None:
    from domainbed_reasoning.analysis import plots, target_tokens, token_shift
    from domainbed_reasoning.analysis.checkpoints import words_of_file

    after, before = _after_and_before(given, given.after)
    targets = Path(given.targets).stem
    results = _results(given, f"token_shift_{words_of_file(targets)}_{after.tag}", after)
    chains = True if given.targets == "teacher" else False if given.targets in ("label", "own") else given.targets
    material = _material(given, after, chains)
    samples = material.draw(material.domains(given.domains), given.images, chained=bool(chains))

    def answers_of(mllm: MLLM) -> dict[str, Answers]:
        if given.targets == "own":
            return {targets: target_tokens.own_answers(mllm, material, samples, _labelling(after))}
        read = target_tokens.label_answers if given.targets == "label" else target_tokens.teacher_answers
        return {targets: read(material, samples)}

    answers, tables = _first_pass(given, before, after, material, answers_of)
    first, second = tables[targets], _second_pass(given, before, after, material, answers[targets], tables[targets])
    told = {"dataset": _job(after).dataset, "before": before.where, "after": after.where, "targets": targets}
    rows = [{**told, **row} for row in token_shift.shift(first, second)]
    title = f"{before.said} to {after.said}, {targets} targets"
    found = token_shift.found_in(rows[0], token_shift.PAPER_RISEN.get(given.targets))
    if given.targets == "own":
        found.append(f"{token_shift.OWN}; these: {_labelling(after).said}")
    _write(results, title, rows, found, token_shift.PAPER)
    _plot(results, lambda path: plots.token_shift(first, second, title, path))


def _entropy(given: argparse.Namespace) -> None:
    from domainbed_reasoning.analysis import entropy, plots, target_tokens
    from domainbed_reasoning.analysis.checkpoints import open_checkpoint

    after, before = _after_and_before(given, given.after)
    of_own = open_checkpoint(given.after_own) if given.after_own else after
    labelling = _labelling(of_own)
    results = _results(given, f"entropy_{after.tag}", after)
    material = _material(given, after, True)
    samples = material.draw(material.domains(given.domains), given.images, chained=True)

    def answers_of(mllm: MLLM) -> dict[str, Answers]:
        own = target_tokens.own_answers(mllm, material, samples, labelling)
        return {"teacher": target_tokens.teacher_answers(material, samples), "self-generated": own}

    answers, first = _first_pass(given, before, after, material, answers_of)
    found = {}
    for source, checkpoint in (("teacher", after), ("self-generated", of_own)):
        second = _second_pass(given, before, checkpoint, material, answers[source], first[source])
        found[source] = entropy.reductions(first[source], second)
    top = [{"chains": source, **row} for source, rows in found.items() for row in rows[: entropy.TOP]]
    title = f"Entropy reduction: {before.said} to {after.said} and {of_own.said}"
    told = {"dataset": _job(after).dataset, "before": before.where}
    ends = {"teacher": after.where, "self-generated": of_own.where}
    everything = [
        {**told, "after": ends[source], "chains": source, **row} for source, rows in found.items() for row in rows
    ]
    shared = entropy.overlap(found["teacher"], found["self-generated"])
    in_class = {source: sum(row["of_class"] for row in rows[: entropy.TOP]) for source, rows in found.items()}
    said = [
        f"tokens that both lists of {entropy.TOP} share: {100 * shared:.0f}% of their union (paper: none)",
        f"tokens of conclusions among them: teacher {in_class['teacher']}, own {in_class['self-generated']}",
        f"own chains: {labelling.said}",
    ]
    _write(results, title, everything, said, entropy.PAPER, shown=top)
    _plot(results, lambda path: plots.entropy(found, entropy.TOP, title, path))


def _first_pass(
    given: argparse.Namespace,
    before: Checkpoint,
    after: Checkpoint,
    material: Material,
    answers_of: Callable[[MLLM], dict[str, Answers]],
) -> tuple[dict[str, Answers], dict[str, TokenTable]]:
    """Return the answers by name, and what the model before training expects at their tokens; it is gone then."""
    from domainbed_reasoning.analysis.target_tokens import read_tokens

    mllm = before.load(given.model)
    answers = answers_of(mllm)
    return answers, {name: read_tokens(mllm, material, one, _batch(after)) for name, one in answers.items()}


def _second_pass(
    given: argparse.Namespace,
    before: Checkpoint,
    after: Checkpoint,
    material: Material,
    answers: Answers,
    first: TokenTable,
) -> TokenTable:
    """Return what the model after training expects at the same tokens; it is gone then."""
    from domainbed_reasoning.analysis.target_tokens import check_same_tokens, read_tokens

    mllm = after.load(given.model)
    check_same_tokens(mllm, answers, first, before.said, after.said)
    return read_tokens(mllm, material, answers, _batch(after))


def _batch(checkpoint: Checkpoint) -> int:
    return min(16, int(_job(checkpoint).hparams["eval_batch"]))


def _labelling(checkpoint: Checkpoint) -> Labelling:
    from domainbed_reasoning.analysis.target_tokens import labelling_of

    return labelling_of(_job(checkpoint).hparams)


def _divergence(given: argparse.Namespace) -> None:
    from domainbed_reasoning.analysis import divergence, encoders, plots
    from domainbed_reasoning.analysis.checkpoints import open_checkpoint, words_of_file
    from domainbed_reasoning.analysis.material import build_material
    from domainbed_reasoning.chains import without_tags

    name = given.encoder or encoders.DEFAULT
    clip = encoders.clip_named(name)
    checkpoint = None if clip else open_checkpoint(name)
    trained = checkpoint.job if checkpoint else None
    if given.model and trained is None:
        raise ValueError(f"--model {given.model}: it is the base of a job, and --encoder {name} is none.")
    hparams = arguments.json_object("--hparams", given.hparams)
    if checkpoint:
        hparams |= {"model": given.model or (trained.model if trained else name)}
    encoded_by = checkpoint.tag if checkpoint else words_of_file(Path(name).name)
    chains = Path(given.chains).stem if given.chains else ""
    named = "_".join(filter(None, ["divergence", given.dataset, words_of_file(chains), encoded_by, given.kernel]))
    results = _results(given, named)
    material = build_material(given.dataset, given.data_dir, [], hparams, given.chains or True, clip)
    encoder = encoders.load_encoder(name, given.model)
    images, texts = [], []
    names = material.task.environments
    for env in range(len(names)):
        samples = material.draw([env], given.images, chained=True)
        images.append(encoder.images(material.pixels(samples)))
        texts.append(encoder.texts([without_tags(material.task.chains[sample]) for sample in samples]))
    told = {"dataset": given.dataset, "encoder": checkpoint.where if checkpoint else name, "kernel": given.kernel}
    rows = [{**told, **row} for row in divergence.between_domains(images, texts, names, given.kernel)]
    title = f"{given.dataset}, {checkpoint.said if checkpoint else Path(name).name}, {given.kernel} kernel"
    found = ["the chains' words are encoded without their stages' tags"]
    means = {row["modality"]: row for row in rows if row["domain"] == "mean"}
    for key in ("biased", "unbiased", "relative"):
        a, b = means["images"][key], means["chains"][key]
        less = "no lower" if a <= 0 else f"{100 * (1 - b / a):.1f}% lower" if b > 0 else "none is left"
        found.append(f"{key}: images {a:.3f}, chains {b:.3f}: {less}")
    _write(results, title, rows, found, divergence.PAPER)
    _plot(results, lambda path: plots.divergence(rows, title, path))


def _rounds(given: argparse.Namespace) -> None:
    from domainbed_reasoning.analysis import plots, rounds

    checkpoints, told = _jobs_of(given)
    results = _results(given, f"sarr_rounds_{_about(checkpoints)}", *checkpoints)
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    asked = ("images", "words", "parsed", "agreement", "chain", "label")
    recorded = [rounds.from_records(_job(one).folder, _job(one).test_envs) for one in checkpoints]
    title = f"SARR by round, {_count(checkpoints)}"
    for checkpoint, about, found in zip(checkpoints, told, recorded, strict=True):
        answers: dict[int, Any] = {}
        if given.images:
            material = _material(given, checkpoint, False)
            samples = material.draw(material.domains(given.domains), given.images)
            steps = [row["step"] for row in found]
            folder = _job(checkpoint).folder
            answers = rounds.from_checkpoints(folder, steps, material, samples, given.model)
            missing += filter(None, [rounds.without_checkpoint(folder, steps, answers)])
        for row in found:
            more = {key: answers.get(row["step"], {}).get(key) for key in asked} if given.images else {}
            rows.append({**about, **row, **more})
        _leave(results, title, rows, "\n".join([*missing, rounds.PAPER]))
    shown = [{key: value for key, value in row.items() if key not in ("dataset", "setting")} for row in rows]
    _write(results, title, rows, missing, rounds.PAPER, shown=shown)
    _plot(results, lambda path: plots.rounds(rows, title, path))


def _faithfulness(given: argparse.Namespace) -> None:
    from domainbed_reasoning.analysis import faithfulness, plots
    from domainbed_reasoning.analysis.tables import write_csv

    checkpoints, told = _jobs_of(given)
    results = _results(given, f"faithfulness_{_about(checkpoints)}", *checkpoints)
    shares: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    faults: list[str] = []
    for number, (name, about) in enumerate(zip(given.jobs, told, strict=True), 1):
        try:
            found, rows = _faithfulness_of(given, name)
        except (ValueError, OSError) as error:
            faults.append(f"{name}: {error}")
            print(faults[-1], file=sys.stderr, flush=True)
            continue
        shares += [{**about, **row} for row in found]
        answers += [{**about, **row} for row in rows]
        _leave(results, f"Faithfulness, {number - len(faults)} of {_count(checkpoints)}", shares, _NOT_IN_PAPER)
        write_csv(results.path("_answers.csv"), answers)
    if shares:
        title = f"Faithfulness, {len(given.jobs) - len(faults)} of {_count(checkpoints)}"
        pooled = faithfulness.pool(shares)
        _write(results, title, shares, [f"left out: {fault}" for fault in faults], _NOT_IN_PAPER, shown=pooled)
        print(f"written: {results.path('_answers.csv')}")
        _plot(results, lambda path: plots.faithfulness(pooled, title, path))
    if faults:
        raise ValueError("\n".join(["not analysed:", *faults]))


def _faithfulness_of(given: argparse.Namespace, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a job's shares and answers; its model is gone before the next one loads."""
    from domainbed_reasoning.analysis import faithfulness
    from domainbed_reasoning.analysis.checkpoints import open_checkpoint
    from domainbed_reasoning.analysis.cues import cues_of

    checkpoint = open_checkpoint(name)
    job = _job(checkpoint)
    material = _material(given, checkpoint, False)
    samples = material.draw(material.domains(given.domains), given.images)
    print(f"{name}: {checkpoint.said}, {len(samples)} images", flush=True)
    mllm = checkpoint.load(given.model)
    reader = faithfulness.Reader(mllm, material, job.hparams["max_new_tokens"], job.hparams["eval_batch"])
    return faithfulness.measure(reader, samples, cues_of(job.dataset))


def _jobs_of(given: argparse.Namespace) -> tuple[list[Checkpoint], list[dict[str, str]]]:
    """Return all jobs, opened before the first is looked at and without their adapters, and what tells rows of each.

    Raises:
        ValueError: naming the first that is none.
    """
    from domainbed_reasoning.analysis.checkpoints import open_checkpoint
    from domainbed_reasoning.analysis.settings import settings_of

    checkpoints = []
    for name in given.jobs:
        opened = open_checkpoint(name)
        checkpoints.append(dataclasses.replace(opened, job=dataclasses.replace(_job(opened), adapters={})))
    told = [
        {
            "job": one.where,
            "algorithm": _job(one).algorithm,
            "dataset": _job(one).dataset,
            "held_out": one.held_out,
            "setting": setting,
        }
        for one, setting in zip(checkpoints, settings_of(checkpoints), strict=True)
    ]
    return checkpoints, told


def _about(checkpoints: Sequence[Checkpoint]) -> str:
    """Return what names of files call some jobs."""
    from domainbed_reasoning.analysis.checkpoints import words_of_file

    if len(checkpoints) == 1:
        return checkpoints[0].tag
    jobs = [_job(one) for one in checkpoints]
    words = [*dict.fromkeys(job.dataset for job in jobs), *dict.fromkeys(job.algorithm for job in jobs)]
    return words_of_file("_".join(words))[:80]


def _count(checkpoints: Sequence[Checkpoint]) -> str:
    return f"{len(checkpoints)} job{'s' if len(checkpoints) > 1 else ''}"


def _after_and_before(given: argparse.Namespace, folder: str) -> tuple[Checkpoint, Checkpoint]:
    from domainbed_reasoning.analysis.checkpoints import open_checkpoint

    after = open_checkpoint(folder)
    _job(after)
    before = open_checkpoint(given.before) if given.before else after.untrained(given.model)
    return after, before if before.job else after.untrained(given.before)


def _job(checkpoint: Checkpoint) -> TrainedJob:
    """Return what trained a checkpoint.

    Raises:
        ValueError: where nothing did.
    """
    if checkpoint.job is None:
        raise ValueError(
            f"{checkpoint.name} is no folder of a job: give one that DomainBed's train or sweep wrote with an MLLM "
            "algorithm, or a checkpoint in it."
        )
    return checkpoint.job


def _material(given: argparse.Namespace, checkpoint: Checkpoint, chains: bool | str) -> Material:
    from domainbed_reasoning.analysis.material import material_of

    return material_of(_job(checkpoint), given.data_dir, chains=chains, model=given.model)


def _results(given: argparse.Namespace, name: str, *of: Checkpoint) -> Results:
    """Return where files go: --output, else the folder `analysis` beside the first of the jobs that they are of."""
    from domainbed_reasoning.analysis.results import results_at

    beside = _job(of[0]).folder.resolve().parent / "analysis" if of else Path("analysis")
    return results_at(given.output or beside, name, given.command)


def _write(
    results: Results,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    found: Sequence[str],
    paper: str,
    shown: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Print the table, what is found in it and the paper's numbers; leave rows as CSV and the rest as text."""
    from domainbed_reasoning.analysis.tables import as_text

    said = "\n".join([*found, paper])
    print(f"\n{title}\n\n{as_text(rows if shown is None else shown)}\n\n{said}\n")
    _leave(results, title, rows, said)
    print(f"written: {results.path('.txt')}\nwritten: {results.path('.csv')}")


def _leave(results: Results, title: str, rows: Sequence[Mapping[str, Any]], said: str) -> None:
    from domainbed_reasoning.analysis.tables import write_csv

    arguments.write_text(results.path(".txt"), results.text(f"{title}\n{said}"))
    write_csv(results.path(".csv"), rows)


def _plot(results: Results, draw: Callable[[Path], None]) -> None:
    from domainbed_reasoning.analysis.plots import plots_are_there

    if not plots_are_there():
        print("no plot, matplotlib is missing: pip install 'domainbed-reasoning[plots]'")
        return
    draw(results.path(".png"))
    print(f"drawn: {results.path('.png')}")


_Add = Callable[[argparse.ArgumentParser], None]
_Run = Callable[[argparse.Namespace], None]

# name -> (one line of help, its arguments, what it does)
_ANALYSES: dict[str, tuple[str, _Add, _Run]] = {
    "token-shift": ("probability of given answers' tokens under two models", _add_token_shift, _token_shift),
    "entropy": ("tokens whose entropy training reduces most: teacher's chains, own chains", _add_entropy, _entropy),
    "divergence": ("MMD² between domains, of images against chains", _add_divergence, _divergence),
    "sarr-rounds": ("accepted share, length, agreement and accuracy by SARR's rounds", _add_rounds, _rounds),
    "faithfulness": ("does the conclusion follow the chain, the image or a cue", _add_faithfulness, _faithfulness),
}
