"""Teacher chains against none: without a teacher, the first chains come from self-labeling by the base model.

Both train for the same number of epochs: 3 on teacher chains and 3 rounds of 3, against 4 rounds of 3.
"""

from domainbed_reasoning.sweeps.studies.study import Grid, Study, for_laptop

_TEACHER = Grid(("SARR", "RDMLDG"), folder="teacher")
_BOOTSTRAP = Grid(("SARR", "RDMLDG"), folder="bootstrap", hparams={"mtct_epochs": 0, "sarr_rounds": 4})
# The embedded dataset's epochs: 6 on teacher chains, 2 per round.
_EMBEDDED = Grid(("SARR", "RDMLDG"), folder="bootstrap", hparams={"mtct_epochs": 0, "sarr_rounds": 6})

STUDY = Study(
    name="teacher_vs_bootstrap",
    title="RD-MLDG without a teacher",
    claim=(
        "Self-generated chains are easier to learn than a teacher's; if the base model knows enough of the classes, no "
        "teacher is needed."
    ),
    paper=(
        "arXiv 2602.23777 leaves this to future work and has no such table. Motivation: 19.33% of teacher-chain "
        "tokens stay below probability 0.25 after MTCT; 29.74 points of self-generated tokens rise above "
        "0.75, but only 1.88 of a teacher's"
    ),
    datasets=("OfficeHomeReasoning", "TerraIncognitaReasoning"),
    grids=(_TEACHER, _BOOTSTRAP),
    mini=for_laptop(_TEACHER, _EMBEDDED),
)
