"""The ablation: each path alone, both, self-labeling without the label path, and the full method.

The paper compares 3 epochs of MTCT with 12 of RD-MLDG. To separate the effect of the rounds from that of longer
training, this study adds a control: MTCT for as many epochs as RD-MLDG, in a separate folder.
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
        "Labels alone beat chains alone; both together (MTCT) beat either; rounds on self-generated chains improve on "
        "MTCT, more than the same number of extra MTCT epochs, but not without the label path."
    ),
    paper=(
        "arXiv 2602.23777, ablation, OfficeHome / TerraIncognita: zero-shot 85.10 46.84; label only 89.39 66.69; "
        "reasoning only 88.76 64.56; MTCT 90.58 67.19; SARR without MTCT 90.91 65.29; MTCT + SARR 91.73 70.65. It has "
        "no MTCT for as many epochs as RD-MLDG, and does not state which answer zero-shot uses: `report` shows both"
    ),
    datasets=("OfficeHomeReasoning", "TerraIncognitaReasoning"),
    grids=(_PARTS, _CONTROL),
    mini=for_laptop(_PARTS, _OF_LAPTOP),
)
