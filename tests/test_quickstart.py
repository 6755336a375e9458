"""`examples/quickstart.ipynb`: its cells run in order in a fresh interpreter, with the stored outputs."""

import json

from builders.processes import CHECKOUT, run_python

NOTEBOOK = CHECKOUT / "examples" / "quickstart.ipynb"
RUN = """
import json, sys
space = {"__name__": "__main__"}
for number, cell in enumerate(json.loads(open(sys.argv[1], encoding="utf-8").read())["cells"]):
    if cell["cell_type"] == "code":
        print(f"--- {number}")
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
"""


def test_notebook_reproduces_its_stored_outputs(either_domainbed, stock_environment, tmp_path):
    """Compared are the lines' words: losses and accuracies may differ in their digits from machine to machine."""
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    done = run_python("-c", RUN, NOTEBOOK, cwd=tmp_path, env=stock_environment(either_domainbed))
    assert done.returncode == 0, done.stdout + done.stderr
    parts = done.stdout.split("--- ")[1:]
    printed = {int(number): lines for number, *lines in (part.splitlines() for part in parts)}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            (output,) = cell["outputs"]
            stored = "".join(output["text"]).splitlines()
            assert stored and output["name"] == "stdout"
            assert len(printed[number]) == len(stored) or "predict" in "".join(cell["source"])
            assert printed[number][0].split()[:1] == stored[0].split()[:1]
