"""The ablation: each path alone, both, self-labeling without the label path, and all of it.

The paper compares 3 epochs of MTCT with the 12 of RD-MLDG. Whether rounds add more than further epochs do is told by
the control, which it lacks: MTCT for as many epochs as RD-MLDG, in a folder of its own.
"""

from dataclasses import replace

from domainbed_reasoning.sweeps.studies.study import Grid, Study, for_laptop

_PARTS = Grid(("MLLMZeroShot", "LabelSFT", "ReasoningSFT", "MTCT", "SARR", "RDMLDG"), folder="parts")
_CONTROL = Grid(
    ("MTCT",), folder="as_long_as_rdmldg", as_long_as={"mtct_epochs": 3, "sarr_rounds": 3, "sarr_epochs": 3}
)
_OF_LAPTOP = replace(_CONTROL, as_long_as={"mtct_epochs": 6, "sarr_rounds": 3, "sarr_epochs": 2})

STUDY = Study(
    name="ablation",
    title="what each part of RD-MLDG adds",
    claim=(
        "Labels alone beat chains alone; both at once (MTCT) beat either; rounds on the model's own chains add to "
        "that, more than as many further epochs of MTCT do, and without the label path do not."
    ),
    paper=(
        "arXiv 2602.23777, ablation, OfficeHome / TerraIncognita: zero-shot 85.10 46.84; label only 89.39 66.69; "
        "reasoning only 88.76 64.56; MTCT 90.58 67.19; SARR without MTCT 90.91 65.29; MTCT + SARR 91.73 70.65. It has "
        "no MTCT for as many epochs as RD-MLDG, and does not say by which answer zero-shot is judged: `report` has both"
    ),
    datasets=("OfficeHomeReasoning", "TerraIncognitaReasoning"),
    grids=(_PARTS, _CONTROL),
    mini=for_laptop(_PARTS, _OF_LAPTOP),
)
