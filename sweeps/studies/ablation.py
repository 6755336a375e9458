"""The ablation: each path alone, both, self-labelling without the label path, and all of it."""

from domainbed_reasoning.sweeps.studies.study import Grid, Study, for_laptop

_GRID = Grid(("MLLMZeroShot", "LabelSFT", "ReasoningSFT", "MTCT", "SARR", "RDMLDG"))

STUDY = Study(
    name="ablation",
    title="what each part of RD-MLDG adds",
    claim=(
        "Labels alone beat chains alone; both at once (MTCT) beat either; rounds on the model's own chains add to "
        "that, and without the label path do not."
    ),
    paper=(
        "arXiv 2602.23777, ablation, OfficeHome / TerraIncognita: zero-shot 85.10 46.84; label only 89.39 66.69; "
        "reasoning only 88.76 64.56; MTCT 90.58 67.19; SARR without MTCT 90.91 65.29; MTCT + SARR 91.73 70.65"
    ),
    datasets=("OfficeHomeReasoning", "TerraIncognitaReasoning"),
    grids=(_GRID,),
    mini=for_laptop(_GRID),
)
