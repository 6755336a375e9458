"""SARR's rounds: N = 0 (MTCT alone) to 5, a folder each, for the number is a hyper-parameter."""

from domainbed_reasoning.sweeps.studies.study import Grid, Study, for_laptop

_GRIDS = tuple(Grid(("RDMLDG",), folder=f"rounds_{n}", hparams={"sarr_rounds": n}) for n in range(6))

STUDY = Study(
    name="sarr_rounds",
    title="how many rounds of self-labeling pay",
    claim="The first round adds most, the third still something, later ones nothing.",
    paper=(
        "arXiv 2602.23777, rounds on TerraIncognita: N=1 70.06, N=2 70.59, N=3 70.65, then flat; MTCT alone, N=0: "
        "67.19. Chains rejected: 39.5% in the first round, 14.8% at the end"
    ),
    datasets=("TerraIncognitaReasoning",),
    grids=_GRIDS,
    mini=for_laptop(*_GRIDS),
)
