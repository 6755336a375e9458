"""Adds a step to setuptools' build: the startup files that load the import hook. Metadata: setup.cfg.

Python 3.15 and later read the `.start` file (PEP 829) and ignore the import line of the `.pth` file of the same name;
earlier versions know the `.pth` file alone.
"""

from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build

STARTUP_FILES = {
    "domainbed_reasoning.pth": "import sys; exec("
    "'try:\\n import _domainbed_reasoning_hook\\nexcept ImportError:\\n pass')\n",
    "domainbed_reasoning.start": "_domainbed_reasoning_hook:install\n",
}


class build_startup_files(Command):  # noqa: N801 - setuptools names commands so
    """Write the `.pth` and `.start` files to the root of what is installed into site-packages."""

    description = "write the startup files that load the import hook"
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
        for name, text in STARTUP_FILES.items():
            Path(folder, name).write_text(text, encoding="ascii")

    def get_source_files(self) -> list[str]:
        return ["setup.py"]

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib or "", name)) for name in STARTUP_FILES]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class build_with_startup_files(build):  # noqa: N801
    """setuptools' `build` with `build_startup_files` as its last sub-command."""

    sub_commands = [*build.sub_commands, ("build_startup_files", None)]


setup(cmdclass={"build": build_with_startup_files, "build_startup_files": build_startup_files})
