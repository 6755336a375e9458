"""`domainbed-reasoning doctor`: what is installed, used and registered, each fault with its cure."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

from domainbed_reasoning import __version__, registry
from domainbed_reasoning.bridge import upstream

DISTRIBUTION = "domainbed-reasoning"
HOOK = "_domainbed_reasoning_hook"


# The newest versions that the tests were run with; `make compat` runs them with the oldest and the newest.
TRIED = {
    "torch": "2.15.0",
    "torchvision": "0.29.2",
    "transformers": "5.24.0",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
    "numpy": "2.4",
    "pandas": "3.1",
}

# What training counts on beyond the libraries' best-known names: distribution, "module:attribute".
INTERFACES = (
    ("torch", "torch.utils.data._utils.collate:default_collate_fn_map"),
    ("torch", "torch._C:DisableTorchFunctionSubclass"),
    ("transformers", "transformers:AutoModelForImageTextToText.from_pretrained"),
    ("transformers", "transformers:AutoProcessor.from_pretrained"),
    ("transformers", "transformers:AutoImageProcessor.from_pretrained"),
    ("transformers", "transformers:BitsAndBytesConfig"),
    ("transformers", "transformers.optimization:get_scheduler"),
    ("peft", "peft:get_peft_model"),
    ("peft", "peft:LoraConfig"),
    ("peft", "peft.tuners.lora:LoraModel.merge_and_unload"),
    ("peft", "peft:PeftModel.get_base_model"),
)


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        what: what was found.
        cure: what mends it; empty where nothing has to be mended.
        stops_training: whether no training is possible before it is mended.
    """

    what: str
    cure: str = ""
    stops_training: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; return 1 if a fault stops training, else 0."""
    parser = argparse.ArgumentParser(
        prog="domainbed-reasoning doctor",
        description=__doc__,
        epilog="examples:\n  domainbed-reasoning doctor\n  cd DomainBed && domainbed-reasoning doctor",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    stops = 0
    for title, examine in EXAMINATIONS.items():
        print(title)
        for finding in examine():
            mark = "FAULT" if finding.stops_training else "note " if finding.cure else "ok   "
            print(f"  {mark} {finding.what}" + (f"\n        cure: {finding.cure}" if finding.cure else ""))
            stops += finding.stops_training
    print(f"{stops} fault(s) stop training." if stops else "Nothing stops training.")
    return 1 if stops else 0


def examine_plug_in() -> Iterator[Finding]:
    """Look at the interpreter and at the hook."""
    yield Finding(f"Python {platform.python_version()} ({sys.executable})")
    yield Finding(f"{DISTRIBUTION} {__version__} ({Path(registry.__file__).parent})")
    if _version(DISTRIBUTION) is None:
        yield Finding(
            f"{DISTRIBUTION} is imported from a folder and not installed: what it requires is not known",
            "pip install -e . in that folder",
        )
    tiny_model = Path(registry.__file__).parent / "mllm" / "tiny_model" / "model.safetensors"
    if not tiny_model.is_file():
        yield Finding(
            f"the embedded model is missing ({tiny_model})", f"pip install --force-reinstall {DISTRIBUTION}", True
        )
    if HOOK in sys.modules:
        yield Finding("the import hook started with the interpreter")
    else:
        yield Finding("the import hook did not start with the interpreter", f"pip install {DISTRIBUTION}", True)


def examine_requirements() -> Iterator[Finding]:
    """Compare what is installed with what the package requires, and with the newest that it was tried with."""
    for requirement, extra in _requirements():
        if extra:
            continue
        name, wanted = requirement.name, requirement.specifier
        installed = _version(name)
        if installed is None:
            yield Finding(f"{name} is missing", f'pip install "{name}{wanted}"', True)
        elif not wanted.contains(installed, prereleases=True):
            yield Finding(f"{name} {installed} is not {wanted}", f'pip install "{name}{wanted}"', True)
        elif name in TRIED and Version(installed).release[:2] > Version(TRIED[name]).release[:2]:
            cure = f'nothing, if all goes well; else pip install "{name}<={TRIED[name]}" and tell us'
            yield Finding(f"{name} {installed} is newer than {TRIED[name]}, the newest that this was tried with", cure)
        else:
            yield Finding(f"{name} {installed}")


def examine_interfaces() -> Iterator[Finding]:
    """Look for what we need of the libraries, which their next versions may drop."""
    missing = list(missing_interfaces())
    for name, fault in missing:
        cure = f'pip install "{name}<={TRIED[name]}", or a newer {DISTRIBUTION}'
        yield Finding(f"{name} {_version(name)} has not what we need: {fault}", cure, True)
    if not missing:
        yield Finding(f"{len(INTERFACES)} of them are there")


def missing_interfaces() -> Iterator[tuple[str, str]]:
    """Yield (distribution, what is missing) for each interface of the libraries that we need and that is not there."""
    if _version("torch"):  # peft would import bitsandbytes with an alarming line
        import_module("domainbed_reasoning.mllm.sealed").import_bitsandbytes()
    for name, target in INTERFACES:
        if _version(name) is None:
            continue
        module, _, path = target.partition(":")
        try:
            found: object = import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
        except AttributeError:
            yield name, target
        except Exception as error:  # a library that breaks at import can break in any way
            yield name, f"{target} ({type(error).__name__}: {error})"


def examine_extras() -> Iterator[Finding]:
    """Say of each extra whether it is there."""
    missing: dict[str, list[str]] = {}
    for requirement, extra in _requirements():
        if extra:
            missing.setdefault(extra, []).extend([] if _version(requirement.name) else [requirement.name])
    for extra, names in missing.items():
        if names:
            yield Finding(f"{extra}: not installed ({', '.join(names)})", f'pip install "{DISTRIBUTION}[{extra}]"')
        else:
            yield Finding(extra)


def examine_domainbed() -> Iterator[Finding]:
    """Say which DomainBed an import takes, and where it comes from."""
    folder = upstream.importable_domainbed()
    if folder is None:
        cure = "domainbed-reasoning get-domainbed, or start from inside of your own clone"
        yield Finding("no DomainBed is found", cure, True)
        return
    pinned = upstream.fault_of(folder) is None
    cure = (
        ""
        if pinned
        else "domainbed-reasoning get-domainbed, from outside of it, for the commit that we are tested with"
    )
    yield Finding(f"{folder} ({upstream.describe(folder)})", cure)


def examine_registries() -> Iterator[Finding]:
    """Import DomainBed's registries and look for our names."""
    if upstream.importable_domainbed() is None:
        return
    for module, registry_name, ours in (
        ("domainbed.algorithms", "ALGORITHMS", registry.ALGORITHMS),
        ("domainbed.datasets", "DATASETS", registry.DATASETS),
        ("domainbed.command_launchers", "REGISTRY", registry.LAUNCHERS),
    ):
        try:
            names = getattr(import_module(module), registry_name)
            faults = import_module("domainbed_reasoning.bridge.register").publish(sys.modules[module])
        except Exception as error:
            cure = "see the message; a module that is missing is installed with pip"
            yield Finding(f"importing {module} fails: {type(error).__name__}: {error}", cure, True)
            continue
        missing = [name for name in ours if name not in names]
        for fault in faults:
            cure = f"see the message; pip install --force-reinstall {DISTRIBUTION} restores the package's own files"
            yield Finding(fault, cure, bool(missing))
        if missing and not faults:
            yield Finding(f"{module} lacks {', '.join(missing)}", f"pip install {DISTRIBUTION}, again", True)
        elif not missing:
            yield Finding(
                f"{module}.{registry_name} has {', '.join(ours)}, beside {len(names) - len(ours)} stock names"
            )


def examine_backbones() -> Iterator[Finding]:
    """Look for the ImageNet weights of the baselines' networks where torchvision looks for them."""
    try:
        import torch
        from torchvision.models import ResNet18_Weights, ResNet50_Weights
    except Exception as error:  # a library that breaks at import can break in any way
        yield Finding(f"torchvision cannot be imported: {error}", "pip install torchvision", True)
        return
    folder = Path(torch.hub.get_dir(), "checkpoints")
    for name, weights, users in (
        ("ResNet-50", ResNet50_Weights.IMAGENET1K_V1, "ERM and most others start from them on images of 224 pixels"),
        ("ResNet-18", ResNet18_Weights.IMAGENET1K_V1, 'with the hparam "resnet18": true'),
    ):
        file = folder / weights.url.rpartition("/")[2]
        if file.is_file():
            yield Finding(f"{name}'s ImageNet weights: {file}")
        else:
            size = weights.meta["_file_size"]
            cure = (
                f"nothing where {weights.url} can be reached: a job downloads {size:.0f} MB when it starts. Without "
                f"network jobs end there: download the file elsewhere and put it into {folder}"
            )
            yield Finding(f"{name}'s ImageNet weights are not in {folder} ({users})", cure)


def examine_devices() -> Iterator[Finding]:
    """Say which GPUs there are."""
    try:
        import torch
    except ImportError as error:
        yield Finding(f"torch cannot be imported: {error}", "pip install torch torchvision", True)
        return
    if not torch.cuda.is_available():
        yield Finding("no GPU: jobs run on the CPU, which the tiny model is made for")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(f"GPU {index}: {name}, {total / 2**30:.0f} GiB, {free / 2**30:.0f} GiB of it free")


EXAMINATIONS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Plug-in": examine_plug_in,
    "Packages": examine_requirements,
    "Interfaces of the packages that we need": examine_interfaces,
    "DomainBed": examine_domainbed,
    "Registered": examine_registries,
    "Weights of the baselines' networks": examine_backbones,
    "Devices": examine_devices,
    "Extras": examine_extras,
}


def _requirements() -> Iterator[tuple[Requirement, str]]:
    """Yield what our metadata requires, with the extra that it belongs to or an empty string."""
    for text in _metadata_requires():
        requirement = Requirement(text)
        marker = str(requirement.marker or "")
        extra = marker.partition("extra == ")[2].strip("\"'")
        yield requirement, extra


def _metadata_requires() -> list[str]:
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
