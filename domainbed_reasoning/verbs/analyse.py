"""`domainbed-reasoning analyse`: the paper's analyses, and one beyond it, of models and jobs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainbed_reasoning.verbs import arguments

if TYPE_CHECKING:
    from domainbed_reasoning.analysis.checkpoints import Checkpoint
    from domainbed_reasoning.analysis.material import Material

_EXAMPLES = """\
  domainbed-reasoning analyse token-shift --after sweep/1a2b3c --targets teacher
  domainbed-reasoning analyse token-shift --before sweep/4d5e6f --after sweep/1a2b3c --targets chains.jsonl
  domainbed-reasoning analyse entropy --after sweep/1a2b3c --after-own sweep/7a8b9c
  domainbed-reasoning analyse divergence --dataset PACSReasoning --data_dir ~/data
  domainbed-reasoning analyse divergence --dataset ShapesReasoning --encoder tiny
  domainbed-reasoning analyse sarr-rounds sweep/1a2b3c sweep/4d5e6f --images 200
  domainbed-reasoning analyse faithfulness sweep/1a2b3c sweep/7a8b9c --images 200

A job is a folder that DomainBed's train or sweep wrote with an MLLM algorithm. Each analysis writes its numbers as CSV
and a plot (pip install 'domainbed-reasoning[plots]') to --output. `analyse NAME --help` says more.
"""


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
        one.add_argument("--output", type=Path, default=Path("analysis"), help="folder to write (default: %(default)s)")
    given = parser.parse_args(argv)
    try:
        _ANALYSES[given.name][2](given)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: `domainbed-reasoning doctor` says what is missing.") from error
    return 0


def _add_token_shift(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", help="job, model folder, hub id or `tiny` (default: the base of --after)")
    parser.add_argument("--after", required=True, help="the job to look at")
    parser.add_argument(
        "--targets",
        default="teacher",
        help="label, teacher, own (chains of --before) or a chain file (default: teacher)",
    )
    _add_images(parser, 200, "sources")


def _add_entropy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", help="job, model folder, hub id or `tiny` (default: the base of --after)")
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
    parser.add_argument("jobs", nargs="+", help="jobs")
    _add_images(parser, 200, "target")


def _add_images(parser: argparse.ArgumentParser, count: int, domains: str, said: str = "") -> None:
    parser.add_argument("--images", type=int, default=count, help=said or "0 for all (default: %(default)s)")
    parser.add_argument(
        "--domains", nargs="+", default=[domains], help="names, numbers, sources, target or all (default: %(default)s)"
    )


def _token_shift(given: argparse.Namespace) -> None:
    from domainbed_reasoning.analysis import plots, target_tokens, token_shift

    after, before = _after_and_before(given, given.after)
    chains = True if given.targets == "teacher" else False if given.targets in ("label", "own") else given.targets
    material = _material(given, after, chains)
    samples = material.draw(material.domains(given.domains), given.images, chained=bool(chains))
    mllm = before.load(given.model)
    if given.targets == "own":
        answers = target_tokens.own_answers(mllm, material, samples, _job(after).hparams["max_new_tokens"])
    elif given.targets == "label":
        answers = target_tokens.label_answers(material, samples)
    else:
        answers = target_tokens.teacher_answers(material, samples)
    first = target_tokens.read_tokens(mllm, material, answers)
    del mllm  # one model at a time
    second = target_tokens.read_tokens(after.load(given.model), material, answers)
    rows = [{"targets": Path(given.targets).stem, **row} for row in token_shift.shift(first, second)]
    title = f"{_said(before)} to {_said(after)}, {Path(given.targets).stem} targets"
    gain = rows[0]["high_after"] - rows[0]["high_before"]
    paper = token_shift.PAPER_GAIN.get(given.targets)
    beside = f" (paper: {paper:+.2f})" if paper is not None else ""
    found = [
        f"share of tokens above {token_shift.HIGH}: {100 * gain:+.2f} points{beside}",
        f"moved from low to high: {100 * rows[0]['risen']:.2f}% of tokens",
    ]
    _write(given, f"token_shift_{Path(given.targets).stem}", title, rows, found, token_shift.PAPER)
    _plot(given, f"token_shift_{Path(given.targets).stem}", lambda path: plots.token_shift(first, second, title, path))


def _entropy(given: argparse.Namespace) -> None:
    from domainbed_reasoning.analysis import entropy, plots, target_tokens
    from domainbed_reasoning.analysis.checkpoints import open_checkpoint

    after, before = _after_and_before(given, given.after)
    of_own = open_checkpoint(given.after_own) if given.after_own else after
    material = _material(given, after, True)
    samples = material.draw(material.domains(given.domains), given.images, chained=True)
    mllm = before.load(given.model)
    tokens = _job(after).hparams["max_new_tokens"]
    answers = {
        "teacher": target_tokens.teacher_answers(material, samples),
        "self-generated": target_tokens.own_answers(mllm, material, samples, tokens),
    }
    first = {source: target_tokens.read_tokens(mllm, material, one) for source, one in answers.items()}
    del mllm
    found = {}
    for source, checkpoint in (("teacher", after), ("self-generated", of_own)):
        second = target_tokens.read_tokens(checkpoint.load(given.model), material, answers[source])
        found[source] = entropy.reductions(first[source], second)
    top = [{"chains": source, **row} for source, rows in found.items() for row in rows[: entropy.TOP]]
    title = f"Entropy reduction: {_said(before)} to {_said(after)} and {_said(of_own)}"
    everything = [{"chains": source, **row} for source, rows in found.items() for row in rows]
    shared = entropy.overlap(found["teacher"], found["self-generated"])
    in_class = {source: sum(row["of_class"] for row in rows[: entropy.TOP]) for source, rows in found.items()}
    said = [
        f"tokens that both lists of {entropy.TOP} share: {100 * shared:.0f}% of their union (paper: none)",
        f"tokens of conclusions among them: teacher {in_class['teacher']}, own {in_class['self-generated']}",
    ]
    _write(given, "entropy", title, everything, said, entropy.PAPER, shown=top)
    _plot(given, "entropy", lambda path: plots.entropy(found, entropy.TOP, title, path))


def _divergence(given: argparse.Namespace) -> None:
    from domainbed_reasoning.analysis import divergence, encoders, plots
    from domainbed_reasoning.analysis.checkpoints import open_checkpoint
    from domainbed_reasoning.analysis.material import build_material

    name = given.encoder or encoders.DEFAULT
    clip = encoders.clip_named(name)
    checkpoint = None if clip else open_checkpoint(name)
    hparams = arguments.json_object("--hparams", given.hparams)
    hparams |= {"model": checkpoint.job.model if checkpoint.job else name} if checkpoint else {}
    material = build_material(given.dataset, given.data_dir, [], hparams, given.chains or True, clip)
    encoder = encoders.load_encoder(name)
    images, texts = [], []
    names = material.task.environments
    for env in range(len(names)):
        samples = material.draw([env], given.images, chained=True)
        images.append(encoder.images(material.pixels(samples)))
        texts.append(encoder.texts([material.task.chains[sample] for sample in samples]))
    rows = divergence.between_domains(images, texts, names, given.kernel)
    title = f"{given.dataset}, {Path(name).name}, {given.kernel} kernel"
    found = []
    means = {row["modality"]: row for row in rows if row["domain"] == "mean"}
    for key in ("biased", "unbiased", "relative"):
        a, b = means["images"][key], means["chains"][key]
        less = "no lower" if a <= 0 else f"{100 * (1 - b / a):.1f}% lower" if b > 0 else "none is left"
        found.append(f"{key}: images {a:.3f}, chains {b:.3f}: {less}")
    _write(given, "divergence", title, rows, found, divergence.PAPER)
    _plot(given, "divergence", lambda path: plots.divergence(rows, title, path))


def _rounds(given: argparse.Namespace) -> None:
    from domainbed_reasoning.analysis import plots, rounds
    from domainbed_reasoning.analysis.checkpoints import open_checkpoint

    rows: list[dict[str, Any]] = []
    asked = ("images", "words", "parsed", "agreement", "chain", "label")
    for folder in given.jobs:
        checkpoint = open_checkpoint(folder)
        job = _job(checkpoint)
        found = rounds.from_records(folder, job.test_envs)
        answers: dict[int, Any] = {}
        if given.images:
            material = _material(given, checkpoint, False)
            samples = material.draw(material.domains(given.domains), given.images)
            answers = rounds.from_checkpoints(folder, [row["step"] for row in found], material, samples, given.model)
        held_out = "+".join(job.environments[env] for env in job.test_envs)
        for row in found:
            more = {key: answers.get(row["step"], {}).get(key) for key in asked} if given.images else {}
            rows.append({"job": Path(folder).name, "algorithm": job.algorithm, "held_out": held_out, **row, **more})
    title = f"SARR by round, {len(given.jobs)} job{'s' if len(given.jobs) > 1 else ''}"
    _write(given, "sarr_rounds", title, rows, [], rounds.PAPER)
    _plot(given, "sarr_rounds", lambda path: plots.rounds(rows, title, path))


def _faithfulness(given: argparse.Namespace) -> None:
    from domainbed_reasoning.analysis import faithfulness, plots
    from domainbed_reasoning.analysis.checkpoints import open_checkpoint
    from domainbed_reasoning.analysis.cues import cues_of

    shares: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for folder in given.jobs:
        checkpoint = open_checkpoint(folder)
        job = _job(checkpoint)
        material = _material(given, checkpoint, False)
        samples = material.draw(material.domains(given.domains), given.images)
        reader = faithfulness.Reader(
            checkpoint.load(given.model), material, job.hparams["max_new_tokens"], job.hparams["eval_batch"]
        )
        found, rows = faithfulness.measure(reader, samples, cues_of(job.dataset))
        told = {"job": Path(folder).name, "algorithm": job.algorithm}
        shares += [{**told, **row} for row in found]
        answers += [{**told, **row} for row in rows]
    title = f"Faithfulness, {len(given.jobs)} job{'s' if len(given.jobs) > 1 else ''}"
    pooled = faithfulness.pool(shares)
    _write(given, "faithfulness", title, shares, [], "paper: no such analysis", shown=pooled)
    _write_rows(given.output / "faithfulness_answers.csv", answers)
    _plot(given, "faithfulness", lambda path: plots.faithfulness(pooled, title, path))


def _after_and_before(given: argparse.Namespace, folder: str) -> tuple[Checkpoint, Checkpoint]:
    from domainbed_reasoning.analysis.checkpoints import open_checkpoint

    after = open_checkpoint(folder)
    _job(after)
    before = open_checkpoint(given.before) if given.before else after.untrained(given.model)
    return after, before if before.job else after.untrained(given.before)


def _job(checkpoint: Checkpoint) -> Any:
    """Return what trained a checkpoint.

    Raises:
        ValueError: where nothing did.
    """
    if checkpoint.job is None:
        raise ValueError(
            f"{checkpoint.name} is no folder of a job: give one that DomainBed's train or sweep wrote with an MLLM "
            "algorithm."
        )
    return checkpoint.job


def _material(given: argparse.Namespace, checkpoint: Checkpoint, chains: bool | str) -> Material:
    from domainbed_reasoning.analysis.material import material_of

    return material_of(_job(checkpoint), given.data_dir, chains=chains, model=given.model)


def _said(checkpoint: Checkpoint) -> str:
    if checkpoint.job is None or not checkpoint.trained:
        return Path(checkpoint.name).name
    target = "+".join(checkpoint.job.environments[env] for env in checkpoint.job.test_envs)
    return f"{checkpoint.job.algorithm} ({target} held out)"


def _write(
    given: argparse.Namespace,
    name: str,
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
    _write_rows(given.output / f"{name}.csv", rows)
    arguments.write_text(given.output / f"{name}.txt", f"{title}\n{said}\n")


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from domainbed_reasoning.analysis.tables import write_csv

    write_csv(path, rows)
    print(f"written: {path}")


def _plot(given: argparse.Namespace, name: str, draw: Callable[[Path], None]) -> None:
    from domainbed_reasoning.analysis.plots import plots_are_there

    if not plots_are_there():
        print("no plot, matplotlib is missing: pip install 'domainbed-reasoning[plots]'")
        return
    path = given.output / f"{name}.png"
    draw(path)
    print(f"drawn: {path}")


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
