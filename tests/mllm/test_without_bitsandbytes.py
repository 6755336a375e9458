"""bitsandbytes is installed with the package, and only quantized models need it."""

from builders.processes import run_python

RUN = """
import sys
sys.modules["bitsandbytes"] = None  # imports fail, and no finder has it
import torch
from PIL import Image
from domainbed_reasoning.mllm import LoraSettings, load_mllm
from domainbed_reasoning.mllm.pixels import from_picture
mllm = load_mllm("tiny", lora=LoraSettings(rank=2, alpha=4.0))
pixels = torch.stack([from_picture(64)(Image.new("RGB", (64, 64), "red"))])
print(mllm.class_scores(pixels, "Which?", ["dax", "wug"]).shape, len(mllm.generate(pixels, "Why?", 4)))
print(len(mllm.merge().class_scores(pixels, "Which?", ["dax", "wug"])), "merged")
for quantize in ("nf4", "int8"):
    try:
        load_mllm("tiny", quantize=quantize)
    except ValueError as error:
        print(error)
from domainbed_reasoning.commands import doctor
known = doctor.versions.installed
doctor.versions.installed = lambda name: None if name == "bitsandbytes" else known(name)
print([finding for finding in doctor.check_requirements() if "bitsandbytes" in finding.text])
print(list(doctor.missing_interfaces()))
"""


def test_models_train_answer_and_merge_without_bitsandbytes_and_quantized_ones_say_what_to_install():
    done = run_python("-c", RUN)
    assert done.returncode == 0, done.stderr
    answers, merged, nf4, int8, packages, interfaces = done.stdout.splitlines()
    assert (answers, merged, interfaces) == ("torch.Size([1, 2]) 1", "1 merged", "[]")
    for quantize, said in (("nf4", nf4), ("int8", int8)):
        assert said.startswith(f"quantize '{quantize}' requires bitsandbytes, which cannot be imported")
        assert "pip install bitsandbytes" in said
    assert "only for the hparam" in packages and "fatal=False" in packages
