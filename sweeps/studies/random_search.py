"""DomainBed's own protocol: random search with its three model selection methods.

Leave-one-domain-out selection of hyper-parameters for target t needs the jobs with targets {t, v} for every other
domain v: the sweep runs without ``--single_test_envs``. It compares them step by step, so all have the same
``--steps``: those of the paper's epochs of PACS, of 50, 48, 52 and 38 steps by target, 47 on average.
"""

from domainbed_reasoning.sweeps.studies.study import Grid, Study, for_laptop

_BASELINES = Grid(("ERM", "CORAL"), mllm=False, n_hparams=20, pairs=True)
_LABEL = Grid(("LabelSFT",), n_hparams=20, pairs=True, steps=3 * 47 + 1)
_RDMLDG = Grid(("RDMLDG",), n_hparams=20, pairs=True, steps=12 * 47 + 1)

STUDY = Study(
    name="random_search",
    title="random search with each of DomainBed's three model selection methods",
    claim=(
        "RD-MLDG stays above its baselines without manual tuning, whether hyper-parameters and step are selected on "
        "the sources, on a left-out source or on the target (the oracle, not available in practice)."
    ),
    paper="no such table: the paper uses fixed hyper-parameters; the protocol is DomainBed's, arXiv 2007.01434",
    datasets=("PACSReasoning",),
    grids=(_BASELINES, _LABEL, _RDMLDG),
    mini=for_laptop(
        Grid(("ERM",), mllm=False, n_hparams=20, pairs=True), Grid(("LabelSFT",), n_hparams=20, pairs=True)
    ),
)
