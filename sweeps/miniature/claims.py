"""The comparisons of the study with a cue: pairs of rows and their answers, in families."""

from __future__ import annotations

from collections.abc import Mapping

Answer = tuple[str, str]  # a row and one of its columns
Claims = tuple[tuple[str, Answer, Answer], ...]


def chain(row: str) -> Answer:
    """Return a row's chain answer."""
    return row, "chain"


def label(row: str) -> Answer:
    """Return a row's class-name answer."""
    return row, "label"


# Comparison, first row, second row: the main table, and three families of rows that differ in one setting (and in the
# learning rate if each has its own). Holm's adjustment is over one family in one regime.
CLAIMS: Claims = (
    ("reasoning only against label only", chain("ReasoningSFT"), label("LabelSFT")),
    ("MTCT's chain against reasoning only", chain("MTCT"), chain("ReasoningSFT")),
    ("MTCT's chain against label only", chain("MTCT"), label("LabelSFT")),
    ("MTCT's label against label only", label("MTCT"), label("LabelSFT")),
    ("RD-MLDG (N=3) against MTCT, chain", chain("RDMLDG"), chain("MTCT")),
    ("RD-MLDG (N=3) against MTCT, label", label("RDMLDG"), label("MTCT")),
    ("RD-MLDG (N=3) against MTCT at one learning rate, chain", chain("RDMLDG"), chain("MTCT at RDMLDG's rate")),
    ("RD-MLDG (N=3) against MTCT at one learning rate, label", label("RDMLDG"), label("MTCT at RDMLDG's rate")),
    ("RD-MLDG's chain against label only", chain("RDMLDG"), label("LabelSFT")),
    ("SARR without the label path against reasoning only", chain("SARR"), chain("ReasoningSFT")),
    ("RD-MLDG against SARR without the label path", chain("RDMLDG"), chain("SARR")),
    ("RD-MLDG's chain against zero-shot's", chain("RDMLDG"), chain("MLLMZeroShot")),
    ("RD-MLDG's chain against ERM", chain("RDMLDG"), ("ERM", "accuracy")),
)
VARIANTS: Claims = (
    ("teacher in the model's own words, reasoning only", chain("ReasoningSFT own words"), chain("ReasoningSFT")),
    ("teacher in the model's own words, MTCT", chain("MTCT own words"), chain("MTCT")),
    ("... at one learning rate", chain("MTCT own words"), chain("MTCT at RDMLDG's rate")),
    ("own words: RD-MLDG against MTCT, chain", chain("RDMLDG own words"), chain("MTCT own words")),
    ("the paper's epochs: RD-MLDG against MTCT, chain", chain("RDMLDG paper's epochs"), chain("MTCT paper's epochs")),
    ("... against MTCT for as many steps, chain", chain("RDMLDG paper's epochs"), chain("MTCT as many steps")),
    ("the paper's epochs at one learning rate: RD-MLDG against MTCT, chain",
     chain("RDMLDG paper's epochs"), chain("MTCT paper's epochs at RDMLDG's rate")),
    ("... against MTCT for as many steps at that rate, chain",
     chain("RDMLDG paper's epochs"), chain("MTCT as many steps at RDMLDG's rate")),
    ("the paper's epochs: RD-MLDG against MTCT, label", label("RDMLDG paper's epochs"), label("MTCT paper's epochs")),
    ("... against MTCT for as many steps, label", label("RDMLDG paper's epochs"), label("MTCT as many steps")),
    ("one round against none (MTCT)", chain("RDMLDG N=1"), chain("MTCT")),
    ("two rounds against one", chain("RDMLDG N=2"), chain("RDMLDG N=1")),
    ("three rounds against two", chain("RDMLDG"), chain("RDMLDG N=2")),
    ("three rounds against the state before them", chain("RDMLDG"), chain("MTCT before rounds")),
    ("the same, label", label("RDMLDG"), label("MTCT before rounds")),
    ("SARR against the state before its rounds", chain("SARR"), chain("ReasoningSFT before rounds")),
    ("bootstrap without a teacher against SARR", chain("SARR bootstrap"), chain("SARR")),
    ("bootstrap without a teacher against zero-shot", chain("SARR bootstrap"), chain("MLLMZeroShot")),
    ("RD-MLDG bootstrap against RD-MLDG, chain", chain("RDMLDG bootstrap"), chain("RDMLDG")),
    ("RD-MLDG bootstrap against RD-MLDG, label", label("RDMLDG bootstrap"), label("RDMLDG")),
)  # fmt: skip
BEYOND: Claims = (
    ("MTCT with balanced gradients, chain", chain("MTCT balanced"), chain("MTCT")),
    ("MTCT with balanced gradients, label", label("MTCT balanced"), label("MTCT")),
    ("MTCT with balanced gradients against reasoning only", chain("MTCT balanced"), chain("ReasoningSFT")),
    ("MTCT with balanced gradients against label only", chain("MTCT balanced"), label("LabelSFT")),
    ("RD-MLDG with balanced gradients, chain", chain("RDMLDG balanced"), chain("RDMLDG")),
    ("RD-MLDG with balanced gradients, label", label("RDMLDG balanced"), label("RDMLDG")),
    ("balanced gradients: RD-MLDG against MTCT, chain", chain("RDMLDG balanced"), chain("MTCT balanced")),
    ("RD-MLDG with balanced gradients against reasoning only", chain("RDMLDG balanced"), chain("ReasoningSFT")),
    ("RD-MLDG with balanced gradients against label only", chain("RDMLDG balanced"), label("LabelSFT")),
    ("RD-MLDG with balanced gradients against SARR without the label path", chain("RDMLDG balanced"), chain("SARR")),
    ("MTCT with the chosen label weight, chain", chain("MTCT label_weight"), chain("MTCT")),
    ("MTCT with the chosen label weight, label", label("MTCT label_weight"), label("MTCT")),
    ("RD-MLDG with the chosen label weight, chain", chain("RDMLDG label_weight"), chain("RDMLDG")),
    ("RD-MLDG with the consistency filter, chain", chain("RDMLDG consistent"), chain("RDMLDG")),
    ("MTCT with three votes, chain", chain("MTCT votes"), chain("MTCT")),
)  # fmt: skip
OTHER_BASE: Claims = (
    ("reasoning only against label only", chain("ReasoningSFT better base"), label("LabelSFT better base")),
    ("MTCT's chain against reasoning only", chain("MTCT better base"), chain("ReasoningSFT better base")),
    ("MTCT's label against label only", label("MTCT better base"), label("LabelSFT better base")),
    ("RD-MLDG against MTCT, chain", chain("RDMLDG better base"), chain("MTCT better base")),
    ("RD-MLDG against MTCT at one learning rate, chain",
     chain("RDMLDG better base"), chain("MTCT better base at RDMLDG's rate")),
    ("RD-MLDG's chain against label only", chain("RDMLDG better base"), label("LabelSFT better base")),
    ("RD-MLDG's chain against zero-shot's", chain("RDMLDG better base"), chain("MLLMZeroShot better base")),
    ("MTCT with balanced gradients, chain", chain("MTCT balanced better base"), chain("MTCT better base")),
    ("... against reasoning only", chain("MTCT balanced better base"), chain("ReasoningSFT better base")),
    ("... against label only", chain("MTCT balanced better base"), label("LabelSFT better base")),
    ("RD-MLDG with balanced gradients, chain", chain("RDMLDG balanced better base"), chain("RDMLDG better base")),
    ("... against MTCT balanced", chain("RDMLDG balanced better base"), chain("MTCT balanced better base")),
    ("... against label only, too", chain("RDMLDG balanced better base"), label("LabelSFT better base")),
)  # fmt: skip
FAMILIES: Mapping[str, Claims] = {
    "Claims": CLAIMS,
    "One thing changed, each at its chosen learning rate": VARIANTS,
    "Beyond the paper": BEYOND,
    "A base that knows the classes better": OTHER_BASE,
}
