"""SARR's rounds: N = 0 (MTCT alone) to 5, each in its own folder, as N is a hyper-parameter."""

from domainbed_reasoning.sweeps.studies.study import Grid, Study, for_laptop

_GRIDS = tuple(Grid(("RDMLDG",), folder=f"rounds_{n}", hparams={"sarr_rounds": n}) for n in range(6))

STUDY = Study(
    name="sarr_rounds",
    title="effect of the number of self-labeling rounds",
    claim="The first round helps most, the third a little, later ones not at all.",
    paper=(
        "arXiv 2602.23777, rounds on TerraIncognita: N=1 70.06, N=2 70.59, N=3 70.65, then flat; MTCT alone, N=0: "
        "67.19. Chains rejected: 39.5% in the first round, 14.8% at the end"
    ),
    datasets=("TerraIncognitaReasoning",),
    grids=_GRIDS,
    mini=for_laptop(*_GRIDS),
)
