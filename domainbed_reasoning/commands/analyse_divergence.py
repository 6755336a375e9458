"""`analyse divergence`: how far domains lie apart, in their images and in their chains."""

from __future__ import annotations

import argparse
from pathlib import Path

from domainbed_reasoning.analysis import divergence, encoders, plots
from domainbed_reasoning.analysis.checkpoints import open_checkpoint, words_of_file
from domainbed_reasoning.analysis.data import build_data
from domainbed_reasoning.chains.chain import without_tags
from domainbed_reasoning.commands import arguments
from domainbed_reasoning.commands.analyse_results import plot, results_for, write


def run(given: argparse.Namespace) -> None:
    """Measure the divergence between every domain and the others, of images and of chains."""
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
    results = results_for(given, named)
    material = build_data(given.dataset, given.data_dir, [], hparams, given.chains or True, clip)
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
    write(results, title, rows, found, divergence.PAPER)
    plot(results, lambda path: plots.divergence(rows, title, path))
