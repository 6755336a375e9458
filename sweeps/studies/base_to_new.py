"""Base-to-new generalization: trained on half of the classes, tested on the other half (see `datasets.base_to_new`).

The stock sweep would train on the new classes as well; these are its jobs with the new classes as target, named and
seeded as there. `collect` prints base accuracy, new accuracy and their harmonic mean, by both answers. The batch has as
many images from the one source as otherwise from three, as in `single_source`.
"""

from domainbed_reasoning.results.published import BASE_TO_NEW, BASE_TO_NEW_DATASET
from domainbed_reasoning.sweeps.studies.single_source import OF_LAPTOP, OURS
from domainbed_reasoning.sweeps.studies.study import Grid, Study, for_laptop

_CLIP = Grid(("CLIPZeroShot", "CLIPLoRA"), mllm=False, clip=True)

STUDY = Study(
    name="base_to_new",
    title="half of the classes for training, the other half as targets",
    claim="Reasoning carries over to classes that training has not named.",
    paper=(
        f"arXiv 2602.23777, base-to-new generalization on {BASE_TO_NEW_DATASET}: new classes "
        f"{BASE_TO_NEW['before'][0]:.2f} -> {BASE_TO_NEW['RDMLDG'][0]:.2f}, harmonic mean "
        f"{BASE_TO_NEW['before'][1]:.2f} -> {BASE_TO_NEW['RDMLDG'][1]:.2f}; its base classes are not published"
    ),
    datasets=("PACSBaseToNew", "VLCSBaseToNew", "OfficeHomeBaseToNew", "TerraIncognitaBaseToNew"),
    grids=(_CLIP, OURS),
    mini=for_laptop(_CLIP, OF_LAPTOP),
    one_source=True,
    sources=(0,),
    embedded="ClearCreaturesBaseToNew",
)
