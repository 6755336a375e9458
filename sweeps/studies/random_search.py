"""DomainBed's own protocol: random search, and its three ways to select a model.

Leave-one-domain-out selection of hyper-parameters for target t needs the jobs with targets {t, v} for every other
domain v: the sweep runs without ``--single_test_envs``.
"""

from domainbed_reasoning.sweeps.studies.study import Grid, Study, for_laptop

_BASELINES = Grid(("ERM", "CORAL"), mllm=False, n_hparams=20, pairs=True)
_OURS = Grid(("LabelSFT", "RDMLDG"), n_hparams=20, pairs=True)

STUDY = Study(
    name="random_search",
    title="hyper-parameters drawn at random, chosen by each of DomainBed's three selection methods",
    claim=(
        "RD-MLDG stays above its baselines when nobody has tuned it, whether sources, a left-out source or the target "
        "itself (the oracle, which no user has) choose hyper-parameters and step."
    ),
    paper="the paper fixes its hyper-parameters and has no such table; the protocol is DomainBed's, arXiv 2007.01434",
    datasets=("PACSReasoning",),
    grids=(_BASELINES, _OURS),
    mini=for_laptop(
        Grid(("ERM",), mllm=False, n_hparams=20, pairs=True), Grid(("LabelSFT",), n_hparams=20, pairs=True)
    ),
)
