"""`domainbed-reasoning annotate`: five-stage chains from a teacher that does not see the label."""

from __future__ import annotations

import argparse
import asyncio
import functools
import sys
from collections import Counter
from collections.abc import Callable, Sequence

from domainbed_reasoning.annotate import pricing as cost
from domainbed_reasoning.annotate.batch_api import MAX_RESULT_BYTES, BatchTeacher
from domainbed_reasoning.annotate.batch_journal import Journal
from domainbed_reasoning.annotate.batch_run import BatchAnnotation, answered_of, open_requests
from domainbed_reasoning.annotate.connection import MAX_BODY_BYTES
from domainbed_reasoning.annotate.openai import OpenAITeacher
from domainbed_reasoning.annotate.parameters import OMITTABLE
from domainbed_reasoning.annotate.pipeline import (
    NOTHING_ACCEPTED,
    Annotation,
    AnnotationSettings,
    PendingImage,
    Summary,
    plan,
)
from domainbed_reasoning.annotate.pool import TeacherPool
from domainbed_reasoning.annotate.rejudge import rejudge
from domainbed_reasoning.annotate.run_report import forecast, nothing_to_do, report
from domainbed_reasoning.annotate.teacher import (
    MAX_EDGE,
    TEACHER_PROMPT_VERSION,
    Teacher,
    TeacherError,
    q_teacher,
)
from domainbed_reasoning.chains.image_names import ImageLookup
from domainbed_reasoning.chains.prompts import PROMPT_VERSION, q_reason
from domainbed_reasoning.chains.rules import RULES, Rules
from domainbed_reasoning.chains.store import ACCEPTED, ChainFileError, ChainWriter, Record, is_accepted, read_records
from domainbed_reasoning.commands import arguments
from domainbed_reasoning.commands.arguments import UsageError, non_negative, positive
from domainbed_reasoning.images.catalog import FolderScan
from domainbed_reasoning.terminal import counted

EXAMPLES = """\
  # Estimate the cost of GPT-4o. Sends nothing and needs no key.
  domainbed-reasoning annotate --dataset PACS --data-dir DATA --teacher openai:gpt-4o --dry-run
  # Spend at most $10 in this run. Rerun the command to resume, for at most $10 more.
  OPENAI_API_KEY=… domainbed-reasoning annotate --dataset PACS --data-dir DATA --teacher openai:gpt-4o --max-cost 10
  # Any OpenAI-compatible server, such as vLLM.
  domainbed-reasoning annotate --dataset VLCS --data-dir DATA --teacher openai:Qwen/Qwen2.5-VL-7B-Instruct \\
      --base-url http://localhost:8000/v1 --concurrency 64
  # Through OpenAI's Batch API, at half the price. Ctrl-C ends the wait; rerun the command to collect the answers.
  domainbed-reasoning annotate --dataset PACS --data-dir DATA --teacher openai:gpt-4o --batch-api
  # Two servers share the work.
  domainbed-reasoning annotate --dataset VLCS --data-dir DATA --teacher openai:Qwen/Qwen2.5-VL-7B-Instruct \\
      --base-url http://gpu1:8000/v1 http://gpu2:8000/v1
  # A Hugging Face model in this process, or the model to be trained itself (bootstrap).
  domainbed-reasoning annotate --dataset PACS --data-dir DATA --teacher hf:OpenGVLab/InternVL3-8B-hf --batch 32
  domainbed-reasoning annotate --dataset PACS --data-dir DATA --teacher self:tiny
  # Re-evaluate the stored candidates with the current rules and options. Needs no teacher.
  domainbed-reasoning annotate --dataset PACS --data-dir DATA --rejudge

Reasoning traces, code fences, headings, lower-case or bold tags, text around the stages and conclusions such as
"A dog." are normalized: an accepted chain is stored in canonical form, along with the raw text and a list of changes.

exit codes:
  0  every image has a chain or has used up its candidates
  1  some images could not be read or got no answer, no candidate was accepted (the run stops after 30 rejections), or
     the teacher or the chain file failed
  3  the run stopped early, at a limit or on Ctrl-C

rules for rejecting a candidate; the first violated rule is recorded:
""" + "\n".join(f"  {rule:<19} {meaning}" for rule, meaning in RULES.items())


def add_arguments(parser: arguments.Parser) -> None:
    """Add the teacher, the sampling settings, the rules and the limits."""
    arguments.add_dataset_arguments(parser)
    add = parser.add_argument
    add("--teacher", help="openai:MODEL, hf:MODEL (a folder, a hub id or 'tiny') or self:MODEL")
    add("--rejudge", action="store_true", help="only re-evaluate the stored candidates, without a teacher")
    add(
        "--base-url",
        nargs="+",
        metavar="URL",
        help="of an OpenAI-compatible server (default: OpenAI's, or $OPENAI_BASE_URL). Several share the work, each "
        "with --concurrency and --rpm of its own; one that fails is set aside",
    )
    add("--batch-api", action="store_true", help="send requests as batches, answered within 24 hours at a discount")
    add(
        "--batch-discount",
        type=share,
        default=0.5,
        help="share taken off the price by --batch-api, in [0, 1) (default: %(default)s, OpenAI's)",
    )
    add("--batch-poll", type=positive(float), default=60.0, help="seconds between looks at batches (default: 60)")
    add("--key-env", default="OPENAI_API_KEY", help="environment variable with the API key (default: %(default)s)")
    add("--candidates", type=positive(int), default=4, help="maximum per image (default: %(default)s)")
    arguments.add_rule_arguments(parser)
    add("--prompt", choices=("teacher", "task"), help="with or without formatting advice (default: task for self:)")
    add("--temperature", type=non_negative(float), default=1.0, help="default: %(default)s, as OpenAI's endpoint")
    add("--top-p", type=positive(float, most=1), default=1.0, help="default: %(default)s")
    add("--max-tokens", type=positive(int), default=768, help="per answer (default: %(default)s)")
    add("--concurrency", type=positive(int), default=8, help="maximum parallel requests (default: %(default)s)")
    add("--rpm", type=positive(float), help="maximum requests per minute")
    add(
        "--omit-parameter",
        action="append",
        default=[],
        choices=OMITTABLE,
        help="do not send this parameter; repeatable (parameters that the server rejects by name are omitted anyway)",
    )
    add("--timeout", type=positive(float), default=120.0, help="per request, in seconds (default: %(default)s)")
    add("--retries", type=non_negative(int), default=6, help="after transient errors, per request (default: 6)")
    add("--batch", type=positive(int), default=16, help="batch size of a local model (default: %(default)s)")
    add("--quantize", choices=("none", "nf4", "int8"), default="none", help="for a local model")
    arguments.add_trust_argument(parser)
    add("--price", type=non_negative(float), nargs=2, metavar=("IN", "OUT"), help="dollars per million tokens")
    add(
        "--max-cost",
        type=positive(float),
        help="maximum cost of this run in dollars; requests of unknown cost count with their maximum. Exceeded only if "
        "the server bills a request for more tokens than any earlier one",
    )
    add("--max-requests", type=positive(int), help="maximum candidates requested in this run, retries not counted")
    add(
        "--limit",
        type=positive(int),
        help="number of images including finished ones, balanced over domains and classes",
    )
    add("--dry-run", action="store_true", help="only print the work left and its estimated cost")


def share(text: str) -> float:
    """Return a number in [0, 1); an argument type."""
    value = non_negative(float)(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1); got {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """Annotate; return 0 if every image has a chain or no candidate left, else 1 (3: stopped early)."""
    _check(args)
    uses_bundle = args.chains is None
    dataset, on_disk = arguments.open_dataset(args, writes=True)
    names = arguments.class_names(dataset, on_disk)
    rules = arguments.rules_of(args, names)
    if args.rejudge:
        return _rejudge(args, rules, on_disk)
    with_advice = (args.prompt or ("task" if args.teacher.startswith("self:") else "teacher")) == "teacher"
    price = tuple(args.price) if args.price else cost.price_of(args.teacher)
    if price is not None and args.batch_api:
        price = price[0] * (1 - args.batch_discount), price[1] * (1 - args.batch_discount)
    if args.max_cost is not None and price is None:
        raise UsageError(f"--max-cost: the price of {args.teacher} is unknown. Set it with --price IN OUT.")
    settings = AnnotationSettings(
        question=(q_teacher if with_advice else q_reason)(names, dataset.subject),
        prompt_version=TEACHER_PROMPT_VERSION if with_advice else PROMPT_VERSION,
        candidates=args.candidates,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        price=price,
    )
    journal = Journal(args.chains)
    if journal.batches and not args.batch_api and not args.dry_run:
        raise UsageError(f"{open_requests(journal)} Add --batch-api, so that no image is asked twice")
    bundled: list[Record] = []
    if uses_bundle and dataset.bundle is not None:
        bundled = arguments.bundled_records(dataset, on_disk, args.unverified)

    def planned() -> tuple[list[Record], list[PendingImage]]:
        records = [*_records(args, on_disk), *bundled]
        who, limits = (args.teacher, settings.prompt_version), (args.candidates, args.limit, args.max_tokens)
        return records, plan(on_disk.pictures, on_disk.classes, records, *who, *limits)

    records, jobs = planned()
    if args.dry_run:
        print(forecast(args, settings, jobs, records, on_disk))
        if journal.batches:
            print(open_requests(journal))
        return 0
    if not jobs and not journal.batches:
        print(nothing_to_do(args, on_disk))
        if any(is_accepted(record) for record in records):
            return 0
        print("No image has a chain. Use `annotate --rejudge` to re-evaluate the stored candidates.")
        return 1
    try:
        teacher = _teacher(args)  # before the chain file, which is not created if this fails
    except TeacherError as error:
        raise ValueError(str(error)) from error
    with ChainWriter(args.chains, leave_empty=False) as writer:
        records, jobs = planned()  # another run may have written before this one held the file
        has_accepted, budget = _has_accepted(records, settings, args), _budget(args, settings, records)
        if writer.cut_bytes:
            print(f"{args.chains}: removed an incomplete last line ({writer.cut_bytes} bytes).", file=sys.stderr)
        make: Callable[..., Annotation] = functools.partial(
            Annotation, on_disk.root, teacher, writer, rules, settings, budget
        )
        if isinstance(teacher, BatchTeacher):
            journal = Journal(args.chains)
            journal.require(teacher.name, teacher.endpoint, settings.prompt_version)
            make = functools.partial(
                BatchAnnotation,
                *(on_disk.root, teacher, writer, rules, settings, budget),
                journal=journal,
                without_chain=_without_chain(journal, records, on_disk),
                answered=answered_of(records, teacher.name, settings.prompt_version),
                poll=args.batch_poll,
                retries=args.retries,
            )
        summary = _annotate(make, settings, jobs, writer, has_accepted)
    if journal.batches:
        print(open_requests(journal), file=sys.stderr)
    has_candidates = bool(summary.accepted or summary.rejected)
    if has_candidates or summary.unknown or not summary.failed:
        print(report(summary, len(jobs)))
    if summary.failed:
        print(summary.failed, file=sys.stderr)
        return 1
    if has_candidates:
        print(f"Wrote {writer.path}. View it with `domainbed-reasoning browse` and the same --dataset and --data-dir.")
    if summary.stopped and summary.stopped != NOTHING_ACCEPTED:
        return 3
    return 1 if summary.unanswered or summary.unreadable or not (summary.accepted or has_accepted) else 0


def _rejudge(args: argparse.Namespace, rules: Rules, on_disk: FolderScan) -> int:
    """Re-evaluate the stored candidates and print the changes; return 1 if none is accepted."""
    if not args.chains.exists():
        raise FileNotFoundError(f"Chain file {args.chains} does not exist. Pass an existing one with --chains.")
    labels = on_disk.labels()
    verdicts = rejudge(args.chains, labels, rules, write=not args.dry_run)
    changed = Counter({change: count for change, count in verdicts.items() if change[0] != change[1]})
    print(f"{args.chains}: {counted(verdicts.total(), 'candidate')} judged, {changed.total():,} changed.")
    for (before, after), count in changed.most_common():
        print(f"  {count:>7,}  {before} → {after}")
    accepted = sum(count for (_, after), count in verdicts.items() if after == ACCEPTED)
    print(f"{counted(accepted, 'image')} of {len(on_disk.pictures):,} {'has' if accepted == 1 else 'have'} a chain.")
    if args.dry_run:
        print("Dry run: nothing was written.")
    return 0 if accepted else 1


def _has_accepted(records: Sequence[Record], settings: AnnotationSettings, args: argparse.Namespace) -> bool:
    """Return whether an earlier run accepted candidates of this teacher and prompt."""
    own = (args.teacher, settings.prompt_version)
    return any((one.get("teacher"), one.get("prompt_version")) == own and is_accepted(one) for one in records)


def _check(args: argparse.Namespace) -> None:
    """Check the options that depend on each other.

    Raises:
        UsageError: naming the option and what it requires.
    """
    kind, _, model = (args.teacher or "").partition(":")
    if args.teacher is None and not args.rejudge:
        raise UsageError("--teacher is required: openai:MODEL, hf:MODEL or self:MODEL (or use --rejudge)")
    if args.teacher is not None and (kind not in ("openai", "hf", "self") or not model):
        raise UsageError(f"--teacher must be openai:MODEL, hf:MODEL or self:MODEL; got {args.teacher!r}")
    if args.teacher is not None and kind != "openai" and (args.batch_api or args.base_url):
        option = "--batch-api" if args.batch_api else "--base-url"
        raise UsageError(f"{option} requires --teacher openai:MODEL; got {args.teacher!r}")
    if args.batch_api and len(args.base_url or ()) > 1:
        raise UsageError("--batch-api takes one --base-url: a batch belongs to one provider")
    if args.max_cost is not None and "max_tokens" in args.omit_parameter:
        raise UsageError("--max-cost cannot be combined with --omit-parameter max_tokens: answers have no maximum cost")


def _records(args: argparse.Namespace, on_disk: FolderScan) -> list[Record]:
    if not args.chains.exists():
        return []
    names = ImageLookup(picture.path for picture in on_disk.pictures)
    # Texts are dropped: with 100,000 candidates they would take most of the memory.
    return [
        {**names.with_path_on_disk(record), "chain": "", "raw": ""}
        for _, record in read_records(args.chains, repair=True)
    ]


def _budget(args: argparse.Namespace, settings: AnnotationSettings, records: Sequence[Record]) -> cost.Budget:
    """Return the run's budget, with reservations at least as large as the usage of earlier requests."""
    model = args.teacher.partition(":")[2]
    tokens = cost.request_tokens(model, settings.question, MAX_EDGE)
    budget = cost.Budget(settings.price, tokens, args.max_tokens, args.max_cost, args.max_requests)
    for record in records:
        if record.get("teacher") == args.teacher and record.get("prompt_version") == settings.prompt_version:
            usage, limit = record.get("usage") or {}, (record.get("sampling") or {}).get("max_tokens")
            answer = usage.get("completion_tokens", 0)
            if "prompt_tokens" in usage:
                budget.observe(usage["prompt_tokens"], answer if limit is not None and answer > limit else 0)
    return budget


def _teacher(args: argparse.Namespace) -> Teacher:
    kind, _, model = args.teacher.partition(":")
    if kind == "openai":
        kind_of_teacher: type[OpenAITeacher] = BatchTeacher if args.batch_api else OpenAITeacher
        teachers = [
            kind_of_teacher(
                model,
                base_url=url,
                key_variable=args.key_env,
                concurrency=args.concurrency,
                timeout=args.timeout,
                retries=args.retries,
                requests_per_minute=args.rpm,
                omitted=args.omit_parameter,
                needs_limit=args.max_cost is not None,
                most_bytes=MAX_RESULT_BYTES if args.batch_api else MAX_BODY_BYTES,
                tell=_notify,
            )
            for url in args.base_url or [None]
        ]
        return teachers[0] if len(teachers) == 1 else TeacherPool(teachers, _notify)
    from domainbed_reasoning.annotate.local import LocalTeacher

    return LocalTeacher(
        model, batch=args.batch, kind=kind, quantize=args.quantize, trust_remote_code=args.trust_remote_code
    )


def _notify(message: str) -> None:
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


def _without_chain(journal: Journal, records: Sequence[Record], on_disk: FolderScan) -> dict[str, PendingImage]:
    """Return the images in open batches that have no chain yet."""
    wanted = journal.images - {record["image"] for record in records if is_accepted(record)}
    labels = on_disk.labels() if wanted else {}
    return {
        picture.path: PendingImage(picture, labels[picture.path])
        for picture in on_disk.pictures
        if picture.path in wanted
    }


def _annotate(
    make: Callable[..., Annotation],
    settings: AnnotationSettings,
    jobs: Sequence[PendingImage],
    writer: ChainWriter,
    has_accepted: bool,
) -> Summary:
    from tqdm import tqdm

    with tqdm(total=len(jobs), unit="image", smoothing=0.05, file=sys.stderr, dynamic_ncols=True, disable=None) as bar:

        def on_record(record: Record, summary: Summary) -> None:
            bar.n = summary.accepted + summary.exhausted
            judged = summary.accepted + summary.rejected.total()
            money = f", ${summary.dollars:.2f}" if settings.price and any(settings.price) else ""
            bar.set_postfix_str(f"{summary.accepted}/{judged} accepted{money}", refresh=False)
            bar.update(0)

        run = make(on_record=on_record, has_accepted=has_accepted)
        try:
            asyncio.run(run.run(jobs))
        except OSError as error:
            saved = counted(run.summary.accepted + run.summary.rejected.total(), "candidate")
            run.summary.failed = (
                f"Cannot write {writer.path} ({error.strerror or error}). {saved} of this run saved, "
                f"{counted(run.summary.unsaved, 'answer')} lost. Free disk space and rerun the command to resume."
            )
        except (TeacherError, ChainFileError) as error:
            run.summary.failed = str(error)
        bar.n = run.summary.accepted + run.summary.exhausted
        return run.summary
