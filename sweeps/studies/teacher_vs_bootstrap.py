"""With a teacher's chains, or none: the first chains come from the base model's own rounds of self-labeling.

Both train for as many epochs: 3 on the teacher's chains and 3 rounds of 3, against 4 rounds of 3.
"""

from domainbed_reasoning.sweeps.studies.study import Grid, Study, for_laptop

_TEACHER = Grid(("SARR", "RDMLDG"), folder="teacher")
_BOOTSTRAP = Grid(("SARR", "RDMLDG"), folder="bootstrap", hparams={"mtct_epochs": 0, "sarr_rounds": 4})
# The embedded set's epochs: 6 on the teacher's chains, 2 a round.
_EMBEDDED = Grid(("SARR", "RDMLDG"), folder="bootstrap", hparams={"mtct_epochs": 0, "sarr_rounds": 6})

STUDY = Study(
    name="teacher_vs_bootstrap",
    title="RD-MLDG without any teacher",
    claim=(
        "Chains in the model's own words are easier to learn than a teacher's; with enough classes known from the "
        "start no teacher is needed."
    ),
    paper=(
        "arXiv 2602.23777 names it as future work and has no such table. What leads to it: 19.33% of the teacher's "
        "tokens stay below probability 0.25 after MTCT; 29.74 points of self-generated tokens rise above "
        "0.75, 1.88 of a teacher's"
    ),
    datasets=("OfficeHomeReasoning", "TerraIncognitaReasoning"),
    grids=(_TEACHER, _BOOTSTRAP),
    mini=for_laptop(_TEACHER, _EMBEDDED),
)
