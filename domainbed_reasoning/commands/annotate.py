"""`domainbed-reasoning annotate`: five-stage chains from a teacher that is not told the label."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections import Counter
from collections.abc import Sequence

from domainbed_reasoning.annotate import pricing as cost
from domainbed_reasoning.annotate.parameters import OMITTABLE
from domainbed_reasoning.annotate.pipeline import (
    NOTHING_ACCEPTED,
    Annotation,
    AnnotationSettings,
    PendingImage,
    Summary,
    plan,
)
from domainbed_reasoning.annotate.rejudge import rejudge
from domainbed_reasoning.annotate.teacher import (
    MAX_EDGE,
    TEACHER_PROMPT_VERSION,
    Teacher,
    TeacherError,
    q_teacher,
    read_picture,
)
from domainbed_reasoning.chains.image_names import NamesOnDisk
from domainbed_reasoning.chains.prompts import PROMPT_VERSION, q_reason
from domainbed_reasoning.chains.rules import CURES, MAX_WORDS, MIN_WORDS, RULES, Rules
from domainbed_reasoning.chains.store import ACCEPTED, ChainFileError, ChainWriter, Record, read_records
from domainbed_reasoning.commands import arguments
from domainbed_reasoning.commands.arguments import counted
from domainbed_reasoning.images.catalog import OnDisk

_EXAMPLES = """\
  # What would GPT-4o cost? Nothing is sent, no key is needed.
  domainbed-reasoning annotate --dataset PACS --data_dir DATA --teacher openai:gpt-4o --dry-run
  # Ten dollars' worth; started again, it goes on where it was.
  OPENAI_API_KEY=… domainbed-reasoning annotate --dataset PACS --data_dir DATA --teacher openai:gpt-4o --max-cost 10
  # Any OpenAI-compatible server, for instance vLLM.
  domainbed-reasoning annotate --dataset VLCS --data_dir DATA --teacher openai:Qwen/Qwen2.5-VL-7B-Instruct \\
      --base-url http://localhost:8000/v1 --concurrency 64
  # A Hugging Face model in this process; and no teacher at all: the model that is to be trained (bootstrap).
  domainbed-reasoning annotate --dataset PACS --data_dir DATA --teacher hf:OpenGVLab/InternVL3-8B-hf --batch 32
  domainbed-reasoning annotate --dataset PACS --data_dir DATA --teacher self:tiny
  # Judge the stored candidates again by today's rules and options: no teacher, no cost.
  domainbed-reasoning annotate --dataset PACS --data_dir DATA --rejudge

Thoughts, code fences, headings, lower-case or bold tags, words around the stages and a conclusion such as "A dog." are
normalized: an accepted chain is stored in canonical form, with the text as it came (raw) and what was normalized.

The exit code is 0 when every image has a chain or no candidate left, 1 when images could not be read or had no answer,
no candidate was accepted (after 30 rejections the run stops), or the teacher or the chain file failed, and 3 when the
run ended early (a limit, Ctrl-C).

rules of rejection, the first that is broken counts:
""" + "\n".join(f"  {rule:<19} {meaning}" for rule, meaning in RULES.items())


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this verb."""
    parser = arguments.make_parser("annotate", __doc__ or "", _EXAMPLES)
    arguments.add_dataset_arguments(parser)
    add = parser.add_argument
    add("--teacher", help="openai:MODEL, hf:MODEL (a folder, a hub id or 'tiny'), or self:MODEL")
    add("--rejudge", action="store_true", help="judge the stored candidates again, without a teacher, and stop")
    add("--base-url", help="of an OpenAI-compatible server (default: OpenAI's, or $OPENAI_BASE_URL)")
    add("--key-env", default="OPENAI_API_KEY", help="environment variable that holds the key (default: %(default)s)")
    add("--candidates", type=int, default=4, help="drawn of an image until one is accepted (default: %(default)s)")
    add("--unverified", action="store_true", help="do not ask that the conclusion be the true class")
    add("--exact", action="store_true", help="accept perfectly formed candidates only: normalize nothing")
    add("--min-words", type=int, default=MIN_WORDS, help="of a chain (default: %(default)s)")
    add("--max-words", type=int, default=MAX_WORDS, help="of a chain (default: %(default)s)")
    add("--prompt", choices=("teacher", "task"), help="with or without advice on form (default: task for self:)")
    add("--temperature", type=float, default=1.0, help="default: %(default)s, that of OpenAI's endpoint")
    add("--top-p", type=float, default=1.0, help="default: %(default)s")
    add("--max-tokens", type=int, default=768, help="of an answer (default: %(default)s)")
    add("--concurrency", type=int, default=8, help="requests under way at a time (default: %(default)s)")
    add("--rpm", type=float, help="at most so many requests a minute")
    add(
        "--omit-parameter",
        action="append",
        default=[],
        choices=OMITTABLE,
        help="not sent to the server; repeatable (one that a server refuses by name is left out by itself)",
    )
    add("--timeout", type=float, default=120.0, help="seconds until a request is given up (default: %(default)s)")
    add("--retries", type=int, default=6, help="of a request after faults that may pass (default: %(default)s)")
    add("--batch", type=int, default=16, help="images at a time of a local model (default: %(default)s)")
    add("--quantize", choices=("none", "nf4", "int8"), default="none", help="of a local model")
    add("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="dollars per million tokens")
    add(
        "--max-cost",
        type=float,
        help="dollars this run may cost at most, requests of unknown cost counted at their dearest; only a server that "
        "bills a request for more tokens than any before it can exceed it",
    )
    add("--max-requests", type=int, help="candidates this run may ask for at most (retries after faults not counted)")
    add("--limit", type=int, help="only so many images, balanced over domains and classes; those that are done count")
    add("--dry-run", action="store_true", help="say what is to be done and what it will cost, and stop")
    return parser


@arguments.ends_with_message
def main(argv: Sequence[str] | None = None) -> int:
    """Annotate; return 0 if every image has a chain or no candidate left, else 1 (3: stopped early)."""
    given = make_parser().parse_args(argv)
    _check(given)
    dataset, on_disk = arguments.open_dataset(given)
    names = arguments.class_names(dataset, on_disk)
    rules = Rules(names, given.min_words, given.max_words, verified=not given.unverified, exact=given.exact)
    if given.rejudge:
        return _rejudge(given, rules, on_disk)
    advised = (given.prompt or ("task" if given.teacher.startswith("self:") else "teacher")) == "teacher"
    price = tuple(given.price) if given.price else cost.price_of(given.teacher)
    if given.max_cost is not None and price is None:
        raise ValueError(f"--max-cost: the price of {given.teacher} is not known; give it with --price IN OUT.")
    settings = AnnotationSettings(
        question=(q_teacher if advised else q_reason)(names, dataset.subject),
        prompt_version=TEACHER_PROMPT_VERSION if advised else PROMPT_VERSION,
        candidates=given.candidates,
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        top_p=given.top_p,
        price=price,
    )
    records = _records(given, on_disk)
    jobs = plan(
        on_disk.pictures,
        on_disk.classes,
        records,
        given.teacher,
        settings.prompt_version,
        given.candidates,
        given.limit,
        given.max_tokens,
    )
    if given.dry_run:
        print(forecast(given, settings, jobs, records, on_disk))
        return 0
    if not jobs:
        print(_nothing(given, on_disk))
        if any(record.get("verdict", ACCEPTED) == ACCEPTED for record in records):
            return 0
        print("No image has a chain. `annotate --rejudge` judges the stored candidates again.")
        return 1
    has_accepted = _has_accepted(records, settings, given)
    teacher = _teacher(given)  # before the chain file, of which nothing is left where there is no such teacher
    budget = _budget(given, settings, records)
    with ChainWriter(given.chains, leave_empty=False) as writer:
        if writer.cut_bytes:
            print(f"{given.chains}: cut off {writer.cut_bytes} bytes of a torn last line.", file=sys.stderr)
        summary = _annotate(given, teacher, settings, rules, budget, jobs, writer, on_disk, has_accepted)
    has_candidates = bool(summary.accepted or summary.rejected)
    if has_candidates or summary.unknown or not summary.failed:
        print(arguments.printable(report(summary, len(jobs))))
    if summary.failed:
        print(arguments.printable(summary.failed), file=sys.stderr)
        return 1
    if has_candidates:
        print(f"Chains: {writer.path}. `domainbed-reasoning browse` with the same --dataset and --data_dir shows them.")
    if summary.stopped and summary.stopped != NOTHING_ACCEPTED:
        return 3
    return 1 if summary.unanswered or summary.unreadable or not (summary.accepted or has_accepted) else 0


def _rejudge(given: argparse.Namespace, rules: Rules, on_disk: OnDisk) -> int:
    """Judge the stored candidates again and say what changed; return 1 if none is accepted."""
    if not given.chains.exists():
        raise ValueError(
            f"{given.chains}: there is no such chain file, so there are no candidates to judge (--chains)."
        )
    labels = {picture.path: on_disk.classes.index(picture.label) for picture in on_disk.pictures}
    became = rejudge(given.chains, labels, rules, write=not given.dry_run)
    changed = Counter({change: count for change, count in became.items() if change[0] != change[1]})
    print(f"{given.chains}: {counted(became.total(), 'candidate')} judged again, {changed.total():,} changed.")
    for (before, after), count in changed.most_common():
        print(arguments.printable(f"  {count:>7,}  {before} → {after}"))
    accepted = sum(count for (_, after), count in became.items() if after == ACCEPTED)
    print(f"{counted(accepted, 'image')} of {len(on_disk.pictures):,} {'has' if accepted == 1 else 'have'} a chain.")
    if given.dry_run:
        print("Nothing was written.")
    return 0 if accepted else 1


def _has_accepted(records: Sequence[Record], settings: AnnotationSettings, given: argparse.Namespace) -> bool:
    """Return whether an earlier run accepted candidates of this teacher and prompt."""
    asked = (given.teacher, settings.prompt_version, ACCEPTED)
    return any(
        (one.get("teacher"), one.get("prompt_version"), one.get("verdict", ACCEPTED)) == asked for one in records
    )


def _check(given: argparse.Namespace) -> None:
    for name in ("temperature", "top_p", "timeout", "rpm", "max_cost", "price"):
        for value in given.price or () if name == "price" else (getattr(given, name),):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"--{name.replace('_', '-')} must be a finite number, not {value}.")
    if given.price and min(given.price) < 0:
        raise ValueError(f"--price must not be negative, not {' '.join(map(str, given.price))}.")
    if given.teacher is None and not given.rejudge:
        raise ValueError("--teacher is required: openai:MODEL, hf:MODEL or self:MODEL (or give --rejudge).")
    kind, _, model = (given.teacher or "").partition(":")
    if given.teacher is not None and (kind not in ("openai", "hf", "self") or not model):
        raise ValueError(f"--teacher must be openai:MODEL, hf:MODEL or self:MODEL, not {given.teacher!r}.")
    for name in ("candidates", "concurrency", "batch", "max_tokens", "timeout"):
        if getattr(given, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be more than 0, not {getattr(given, name)}.")
    for name in ("temperature", "retries", "min_words"):
        if getattr(given, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, not {getattr(given, name)}.")
    for name in ("rpm", "limit", "max_requests", "max_cost"):
        if getattr(given, name) is not None and getattr(given, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be more than 0, not {getattr(given, name)}.")
    if given.max_cost is not None and "max_tokens" in given.omit_parameter:
        raise ValueError(
            "--omit-parameter max_tokens leaves the cost of an answer without a bound: not with --max-cost."
        )
    if given.max_words < max(1, given.min_words):
        raise ValueError(f"--max-words must be {max(1, given.min_words)} (--min-words) or more, not {given.max_words}.")
    if not 0 < given.top_p <= 1:
        raise ValueError(f"--top-p must be in (0, 1], not {given.top_p}.")


def _records(given: argparse.Namespace, on_disk: OnDisk) -> list[Record]:
    if not given.chains.exists():
        return []
    names = NamesOnDisk(picture.path for picture in on_disk.pictures)
    # The texts are not needed: at 100,000 candidates they would be most of the memory.
    return [{**names.respelt(record), "chain": "", "raw": ""} for _, record in read_records(given.chains, repair=True)]


def _budget(given: argparse.Namespace, settings: AnnotationSettings, records: Sequence[Record]) -> cost.Budget:
    """Return the run's budget, its reservations as large as what the teacher has counted in earlier runs."""
    model = given.teacher.partition(":")[2]
    tokens = cost.request_tokens(model, settings.question, MAX_EDGE)
    budget = cost.Budget(settings.price, tokens, given.max_tokens, given.max_cost, given.max_requests)
    for record in records:
        if record.get("teacher") == given.teacher and record.get("prompt_version") == settings.prompt_version:
            usage, limit = record.get("usage") or {}, (record.get("sampling") or {}).get("max_tokens")
            answer = usage.get("completion_tokens", 0)
            if "prompt_tokens" in usage:
                budget.observe(usage["prompt_tokens"], answer if limit is not None and answer > limit else 0)
    return budget


def _teacher(given: argparse.Namespace) -> Teacher:
    kind, _, model = given.teacher.partition(":")
    if kind == "openai":
        from domainbed_reasoning.annotate.openai import OpenAITeacher

        return OpenAITeacher(
            model,
            base_url=given.base_url,
            key_variable=given.key_env,
            concurrency=given.concurrency,
            timeout=given.timeout,
            retries=given.retries,
            requests_per_minute=given.rpm,
            omitted=given.omit_parameter,
            needs_limit=given.max_cost is not None,
            tell=_tell,
        )
    from domainbed_reasoning.annotate.local import LocalTeacher

    return LocalTeacher(model, batch=given.batch, kind=kind, quantize=given.quantize)


def _tell(message: str) -> None:
    from tqdm import tqdm

    tqdm.write(arguments.printable(message), file=sys.stderr)


def _annotate(
    given: argparse.Namespace,
    teacher: Teacher,
    settings: AnnotationSettings,
    rules: Rules,
    budget: cost.Budget,
    jobs: Sequence[PendingImage],
    writer: ChainWriter,
    on_disk: OnDisk,
    has_accepted: bool,
) -> Summary:
    from tqdm import tqdm

    with tqdm(total=len(jobs), unit="image", smoothing=0.05, file=sys.stderr, dynamic_ncols=True) as bar:

        def on_record(record: Record, summary: Summary) -> None:
            bar.n = summary.accepted + summary.exhausted
            asked = summary.accepted + summary.rejected.total()
            money = f", ${summary.dollars:.2f}" if settings.price and any(settings.price) else ""
            bar.set_postfix_str(f"{summary.accepted}/{asked} accepted{money}", refresh=False)
            bar.update(0)

        run = Annotation(on_disk.root, teacher, writer, rules, settings, budget, on_record, has_accepted)
        try:
            asyncio.run(run.run(jobs))
        except OSError as error:
            saved = counted(run.summary.accepted + run.summary.rejected.total(), "candidate")
            run.summary.failed = (
                f"{writer.path} cannot be written ({error.strerror or error}). It holds {saved} of this run, whole; "
                f"{counted(run.summary.unsaved, 'answer')} could not be saved. Make room and start the same command "
                "again, which goes on from there."
            )
        except (TeacherError, ChainFileError) as error:
            run.summary.failed = str(error)
        bar.n = run.summary.accepted + run.summary.exhausted
        return run.summary


def forecast(
    given: argparse.Namespace,
    settings: AnnotationSettings,
    jobs: Sequence[PendingImage],
    records: Sequence[Record],
    on_disk: OnDisk,
) -> str:
    """Return what the run will take, in words."""
    total = len(on_disk.pictures)
    if not jobs:
        return _nothing(given, on_disk)
    model = given.teacher.partition(":")[2]
    sample = [read_picture(on_disk.root / job.picture.path)[0] for job in jobs[:20]]
    tokens = sum(cost.image_tokens(model, *_size(image)) for image in sample) / len(sample)
    habit = cost.habits(records, given.teacher, round(tokens + cost.text_tokens(settings.question)))
    concurrency = given.concurrency if given.teacher.startswith("openai:") else 1
    will = cost.estimate(
        (settings.candidates - job.asked for job in jobs), habit, settings.price, concurrency, given.rpm
    )
    known = habit.measured >= cost.ENOUGH
    basis = f"measured on {habit.measured} of its candidates" if known else "assumed: no candidates of its own yet"
    money = "unknown (give --price IN OUT)" if will.dollars is None else f"${will.dollars:,.2f}"
    return "\n".join(
        [
            f"images       {len(jobs):,} of {total:,} still need a chain",
            f"requests     about {will.requests:,.0f} (up to {settings.candidates} candidates an image)",
            f"tokens       about {will.prompt_tokens:,.0f} in, {will.completion_tokens:,.0f} out",
            f"cost         {money}",
            f"time         about {_duration(will.hours)}, {concurrency} at a time",
            f"per request  {habit.prompt_tokens:,.0f} tokens in, {habit.completion_tokens:,.0f} out, "
            f"{habit.seconds:.1f} s, {habit.acceptance:.0%} accepted ({basis})",
            "Nothing was sent.",
        ]
    )


def _nothing(given: argparse.Namespace, on_disk: OnDisk) -> str:
    total = len(on_disk.pictures)
    of_them = f"of the first {counted(given.limit, 'image')} (--limit) " if given.limit and given.limit < total else ""
    return f"Nothing to do: {of_them}every image has an accepted chain or no candidate left ({total:,} in all)."


def _duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def _size(image: bytes) -> tuple[int, int]:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(image)) as picture:
        return picture.size


def report(summary: Summary, jobs: int) -> str:
    """Return what a run did, in words."""
    asked = summary.accepted + summary.rejected.total()
    rate = 3600 * asked / summary.seconds if summary.seconds else 0.0
    known = asked > summary.unpriced or not (asked or summary.unknown) or summary.dollars > 0
    money = f"${summary.dollars:.4f}" if known else "cost unknown"
    if 0 < summary.unpriced < asked:
        money += f" without {summary.unpriced:,} of unknown cost"
    lines = [
        f"{summary.accepted:,} of {counted(jobs, 'image')} got a chain; {counted(asked, 'candidate')} in "
        f"{summary.seconds:,.0f} s ({rate:,.0f} an hour); {summary.prompt_tokens:,} tokens in, "
        f"{summary.completion_tokens:,} out, {money}."
    ]
    if summary.unknown_dollars:
        lines.append(
            f"{counted(summary.unknown, 'request')} without a report of tokens (time-outs, broken answers) may have "
            f"cost up to ${summary.unknown_dollars:.4f} more; --max-cost counts that in."
        )
    lines += [f"  rejected {count:>6,}  {rule}" for rule, count in summary.rejected.most_common()]
    if summary.exhausted:
        have = "has" if summary.exhausted == 1 else "have"
        more = "" if summary.rejected["cut"] == summary.rejected.total() else "; more: a larger --candidates"
        lines.append(f"{counted(summary.exhausted, 'image')} {have} no candidate left{more}.")
    if summary.rejected["cut"]:
        lines.append(
            f"{counted(summary.rejected['cut'], 'candidate')} cut at --max-tokens. Rerun with a larger --max-tokens: "
            "cut candidates then do not count against --candidates."
        )
    for title, images in (("could not be read", summary.unreadable), ("had no answer", summary.unanswered)):
        if images:
            first = "".join(f"\n  {image}: {fault}" for image, fault in list(images.items())[:5])
            lines.append(f"{counted(len(images), 'image')} {title}, the first of them:{first}")
    if summary.rejected and not summary.accepted:
        lines.append(_why_nothing(summary))
    elif summary.stopped:
        lines.append(f"Stopped early: {summary.stopped}. The same command goes on from here.")
    return "\n".join(lines)


def _why_nothing(summary: Summary) -> str:
    """Return the commonest rule of a run that accepted nothing, its cure and an example."""
    rule, count = summary.rejected.most_common(1)[0]
    example = summary.examples[rule]
    text = " ".join(example["chain"].split())
    shown = text if len(text) <= 400 else f"{text[:200]} […] {text[-200:]}"
    stopped = f"Stopped early: {summary.stopped}. " if summary.stopped else ""
    return (
        f"{stopped}None of {counted(summary.rejected.total(), 'candidate')} was accepted. The commonest rule, {rule} "
        f"({count:,}): {RULES[rule]}. {CURES.get(rule, 'Give another teacher')}.\n"
        f"  for example {example['image']}: {example['reason']}\n  {shown}\n"
        "`annotate --rejudge` with other options judges these candidates again, without cost."
    )
