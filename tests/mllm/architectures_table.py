"""Print docs/architectures.md from what the tests saw: `python tests/mllm/architectures_table.py REPORT.xml …`.

The reports are pytest's: `pytest tests/mllm/test_architectures.py --junitxml REPORT.xml -o junit_family=xunit1`.
"""

# ruff: noqa: E501
import re
import sys
from xml.etree import ElementTree

import transformers

from builders import architectures
from domainbed_reasoning.mllm.findings import Findings

HEAD = f"""# Architectures without settings of their own

InternVL3, LLaVA-1.5, Qwen2.5-VL, Qwen3-VL, Idefics3, SmolVLM, Gemma 3 and FastVLM have settings of their own. Any other chat
model of transformers' `AutoModelForImageTextToText` is tried out when it is first loaded. These were, as tiny
random models built from their own config classes (transformers {transformers.__version__}, CPU, float32), and
trained, exported, reloaded and used for prediction. Deviations are those of one MTCT step from one conversation at
a time through the chat template: of the loss, relative, and of the adapters' gradients, relative to the largest.

| architecture | rows | reused features | image tokens | loss | gradients | trials |
|---|---|---|---|---|---|---|"""
FOOT = """
`shared` rows compute both questions, and all class names, after one prefix; `separate` rows compute each whole.

Refused:
- **Llama 4**: transformers' own forward fails (`MoeCausalLMOutputWithPast` has no `image_outputs`).
- **PaliGemma**: its prompt's tokens see the answer, so that its likelihood cannot be read in one pass.
- **Florence-2** and other encoder-decoders; models without a chat template.

**My model is not there.** Run `domainbed-reasoning doctor --model FOLDER`: it loads the model, tries it out, and
prints what was found and what it costs, or why the model cannot be used. The folder must hold the whole checkpoint
with its processor and chat template. Code of the checkpoint's own is never run: use a checkpoint converted for
transformers. Findings are kept in the cache folder for each model and release of transformers."""


def main(reports: list[str]) -> None:
    """Print the page from the newest entry of each architecture."""
    rows = {}
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
                continue
            how = {"": "separate", "plain": "shared", "rope": "shared, 3-D positions"}[findings.tree]
            reuse = "yes" if findings.reuse else "no"
            print(
                f"| {name} | {how} | {reuse} | {findings.image_tokens} | {float(seen['loss']):.0e} "
                f"| {float(seen['gradient']):.0e} | {findings.seconds:.1f} s |"
            )
    print(FOOT)


if __name__ == "__main__":
    main(sys.argv[1:])
