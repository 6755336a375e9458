"""Adds a step to setuptools' build: the `.pth` file that imports the hook at interpreter start. Metadata: setup.cfg."""

from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build

PTH = "domainbed_reasoning.pth"
LINE = "import sys; exec('try:\\n import _domainbed_reasoning_hook\\nexcept ImportError:\\n pass')\n"


class build_pth(Command):  # noqa: N801 - setuptools names commands so
    """Write the `.pth` file to the root of what is installed into site-packages."""

    description = "write the .pth file that installs the import hook"
    user_options: list[tuple[str, str | None, str]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        # An editable wheel is packed from install_lib's folder, a regular one from build_lib.
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, PTH).write_text(LINE, encoding="ascii")

    def get_source_files(self) -> list[str]:
        return ["setup.py"]

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib or "", PTH))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class build_with_pth(build):  # noqa: N801
    """setuptools' `build` with `build_pth` as its last sub-command."""

    sub_commands = [*build.sub_commands, ("build_pth", None)]


setup(cmdclass={"build": build_with_pth, "build_pth": build_pth})
