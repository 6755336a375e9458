"""Print docs/architectures.md from what the tests saw: `python tests/mllm/architectures_table.py REPORT.xml …`.

The reports are pytest's: `pytest tests/mllm/test_architectures.py --junitxml REPORT.xml -o junit_family=xunit1`, with
`tests/shared` on PYTHONPATH. Architectures that no report has keep the page's present row.
"""

# ruff: noqa: E501
import inspect
import pathlib
import re
import sys
import textwrap
from xml.etree import ElementTree

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from builders import architectures
from domainbed_reasoning.mllm.families import FAMILIES
from domainbed_reasoning.mllm.findings import Findings

ELSEWHERE = {"diffusion_gemma", "evolla", "pi0"}  # text by diffusion, proteins, robots
PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
# Model types of the same class that are no chat models about images.
REFUSED = {
    "published without a chat template": "blip blip-2 fuyu git kosmos-2",
    "encoder-decoders, whose answers do not continue a conversation": "florence2 pix2struct pp_formulanet t5gemma2 udop vision-encoder-decoder",
}

HEAD = f"""# Architectures without settings of their own

InternVL3, LLaVA-1.5, Qwen2.5-VL, Qwen3-VL, Idefics3, SmolVLM, Gemma 3 and FastVLM have settings of their own. Any other chat
model of transformers' `AutoModelForImageTextToText` is probed when it is first loaded. These were, as tiny
random models built from their own config classes (transformers {transformers.__version__}, CPU, float32), and
trained, exported, reloaded and used for prediction. Deviations are those of one MTCT step from one conversation at
a time through the chat template: of the loss, relative, and of the adapters' gradients, relative to the largest.

| architecture | rows | reused features | image tokens | loss | gradients | trials |
|---|---|---|---|---|---|---|"""
FOOT = """
`shared` rows compute both questions, and all class names, after one prefix; `separate` rows compute each whole. Rows
without trials have the settings of their class, InternVL3's. Trials took longer where the machine was busy.

Refused:
- **Llama 4**: transformers' own forward fails (`MoeCausalLMOutputWithPast` has no `image_outputs`).
- **PaliGemma**: its prompt's tokens see the answer, so that its likelihood cannot be read in one pass.
OTHERS

**My model is not there.** Run `domainbed-reasoning doctor --model FOLDER`: it loads and probes the model, and
prints what was found and what it costs, or why the model cannot be used. The folder must hold the whole checkpoint
with its processor and chat template. Code of the checkpoint's own runs only with the hparam
`trust_remote_code` or the option `--trust-remote-code`; prefer a checkpoint converted for transformers. Findings are kept in the cache folder for each model and release of transformers."""


def main(reports: list[str]) -> None:
    """Print the page from the newest entry of each architecture."""
    rows, kept = {}, {}
    for line in PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else ():
        kept[line.removeprefix("| ").partition(" |")[0]] = line
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            found = {item.get("name"): item.get("value") for item in case.iter("property")}
            name = re.search(r"\[(.*)\]", case.get("name", ""))
            if found and name and not case.findall("failure"):
                rows[name[1]] = found
    print(HEAD)
    for name in architectures.BUILDERS:
        if name in rows:
            seen, text = rows[name], rows[name]["findings"]
            findings = None if text == "None" else eval(text, {"Findings": Findings})  # our own report's
            if findings is None:
                print(f"| {name} | shared | yes | 4 | {_small(seen['loss'])} | {_small(seen['gradient'])} | – |")
                continue
            how = {"": "separate", "plain": "shared", "rope": "shared, 3-D positions"}[findings.tree]
            reuse = "yes" if findings.reuse else "no"
            print(
                f"| {name} | {how} | {reuse} | {findings.image_tokens} | {_small(seen['loss'])} "
                f"| {_small(seen['gradient'])} | {findings.seconds:.1f} s |"
            )
        elif name in kept:
            print(kept[name])
    print(FOOT.replace("OTHERS", others()))


def _small(value: str) -> str:
    return f"{float(value):.0e}"


def others() -> str:
    """Return lines on the model types of transformers' mapping that have no row: refused, or not tried."""
    sources = "".join(
        map(inspect.getsource, {inspect.getmodule(builder) for builder in architectures.BUILDERS.values()})
    )
    words = set(re.findall(r"\w+", sources))
    left = {
        kind
        for kind, cls in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
        if cls not in FAMILIES and not {cls, cls.removesuffix("ForConditionalGeneration")} & words
    }
    lines = [f"- {', '.join(f'`{kind}`' for kind in kinds.split())}: {why}." for why, kinds in REFUSED.items()]
    left -= ELSEWHERE | {kind for kinds in REFUSED.values() for kind in kinds.split()}
    lines += ["", "Not tried here, and probed like any other when first loaded: " + ", ".join(sorted(left)) + "."]
    return "\n".join(
        textwrap.fill(line, 120, break_on_hyphens=False, subsequent_indent="  " * line.startswith("-"))
        for line in lines
    )


if __name__ == "__main__":
    main(sys.argv[1:])
