"""`analyze divergence`: divergence between domains, for images and for chains."""

from __future__ import annotations

import argparse
from pathlib import Path

from domainbed_reasoning.analysis import divergence, encoders, plots
from domainbed_reasoning.analysis.checkpoints import open_checkpoint, words_of_file
from domainbed_reasoning.analysis.data import build_data
from domainbed_reasoning.chains.chain import without_tags
from domainbed_reasoning.commands.analyze_results import plot, results_for, write


def run(args: argparse.Namespace) -> None:
    """Measure the divergence between all pairs of domains, for images and for chains."""
    name = args.encoder or encoders.DEFAULT
    clip = encoders.clip_named(name)
    checkpoint = None if clip else open_checkpoint(name, args.trust_remote_code)
    trained = checkpoint.job if checkpoint else None
    if args.model and trained is None:
        raise ValueError(f"--model {args.model} replaces a job's base model, but --encoder {name} is not a job.")
    hparams = args.hparams
    if checkpoint:
        hparams |= {"model": args.model or (trained.model if trained else name)}
        if trained:
            tiles = {name: trained.hparams[name] for name in ("max_tiles", "tiling")}
            hparams |= {"revision": trained.revision(args.model)} | tiles
        elif tiles := hparams.keys() & {"max_tiles", "tiling"}:
            raise ValueError(f"--hparams {sorted(tiles)[0]}: --encoder {name} is not a job, so images are one tile.")
        hparams |= {"trust_remote_code": args.trust_remote_code}
    encoded_by = checkpoint.tag if checkpoint else words_of_file(Path(name).name)
    chains = Path(args.chains).stem if args.chains else ""
    named = "_".join(filter(None, ["divergence", args.dataset, words_of_file(chains), encoded_by, args.kernel]))
    results = results_for(args, named)
    data = build_data(args.dataset, args.data_dir, [], hparams, str(args.chains) if args.chains else True, clip)
    encoder = encoders.MLLMEncoder(checkpoint.load(args.model)) if checkpoint else encoders.load_encoder(name)
    images, texts = [], []
    names = data.task.environments
    for env in range(len(names)):
        samples = data.draw([env], args.images, chained=True)
        images.append(encoder.images(data.pixels(samples)))
        texts.append(encoder.texts([without_tags(data.task.chains[sample]) for sample in samples]))
    columns = {"dataset": args.dataset, "encoder": checkpoint.where if checkpoint else name, "kernel": args.kernel}
    rows = [{**columns, **row} for row in divergence.between_domains(images, texts, names, args.kernel)]
    title = f"{args.dataset}, {checkpoint.title if checkpoint else Path(name).name}, {args.kernel} kernel"
    findings = ["chains are encoded without their stage tags"]
    means = {row["modality"]: row for row in rows if row["domain"] == "mean"}
    for key in ("biased", "unbiased", "relative"):
        a, b = means["images"][key], means["chains"][key]
        change = "not lower" if a <= 0 else f"{100 * (1 - b / a):.1f}% lower" if b > 0 else "reduced to 0"
        findings.append(f"{key}: images {a:.3f}, chains {b:.3f}: {change}")
    write(results, title, rows, findings, divergence.PAPER)
    plot(results, lambda path: plots.divergence(rows, title, path))
