"""`domainbed-reasoning doctor`: checks of the installation, with a fix for each problem."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

from domainbed_reasoning import __version__, registry
from domainbed_reasoning.bridge import plugins, upstream, versions
from domainbed_reasoning.commands.arguments import Parser, UsageError, add_json, add_trust_argument, print_json
from domainbed_reasoning.terminal import counted

DISTRIBUTION = "domainbed-reasoning"
_AGAIN = "pip install --force-reinstall --no-deps . in the checkout"
HOOK = "_domainbed_reasoning_hook"
EXAMPLES = """\
  domainbed-reasoning doctor
  cd DomainBed && domainbed-reasoning doctor
  domainbed-reasoning doctor --model ~/models/LFM2-VL-1.6B   # test whether and how fast a model runs
"""

# The newest tested versions; `make compat` runs the tests with the oldest and the newest.
TESTED = {
    "torch": "2.15.0",
    "torchvision": "0.29.2",
    "transformers": "5.24.0",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
    "numpy": "2.4",
    "pandas": "3.1",
}

# Required packages that this one runs without, and what they are for.
OPTIONAL = {"bitsandbytes": 'the hparam "quantize"'}

# What the extras of users are for. The others are for work on this package, in a checkout.
EXTRAS = {
    "domainbed": "what stock DomainBed imports",
    "teacher": "teachers on OpenAI-compatible servers",
    "parquet": "Parquet files, and datasets from the Hub",
    "plots": "plots of analyze and report",
    "completion": "completion in the shell",
    "slurm": "the launcher slurm",
    "ray": "the launcher ray",
    "tensorboard": "track",
    "wandb": "track",
    "mlflow": "track",
    "trackio": "track",
}

# APIs that training requires and future versions may drop: distribution, "module:attribute".
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
        text: what was found.
        fix: what to do; empty if nothing needs fixing.
        fatal: whether training is impossible until it is fixed.
    """

    text: str
    fix: str = ""
    fatal: bool = False


def add_arguments(parser: Parser) -> None:
    """Add `doctor`'s options."""
    add_json(parser)
    parser.add_argument("--model", metavar="MODEL", help="a folder or hub id: load and test this model")
    parser.add_argument("--revision", help="of a hub id, with --model: a branch, tag or commit")
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 if a problem prevents training."""
    checks = dict(CHECKS)
    if args.model is not None:
        asked = (args.model, args.revision, args.trust_remote_code)
        checks = {f"Model {args.model}": lambda: check_model(*asked)}
    elif args.revision or args.trust_remote_code:
        raise UsageError("--revision and --trust-remote-code require --model")
    if args.json:
        found = {title: list(check()) for title, check in checks.items()}
        ready = not any(finding.fatal for findings in found.values() for finding in findings)
        listed = {title: [finding._asdict() for finding in findings] for title, findings in found.items()}
        print_json({"ready": ready, "checks": listed})
        return int(not ready)
    fatal = 0
    for title, check in checks.items():
        print(title)
        for finding in check():
            mark = "ERROR" if finding.fatal else "note " if finding.fix else "ok   "
            print(f"  {mark} {finding.text}" + (f"\n        fix: {finding.fix}" if finding.fix else ""))
            fatal += finding.fatal
    print(f"{counted(fatal, 'error')} prevent{'s' if fatal == 1 else ''} training." if fatal else "Ready for training.")
    return 1 if fatal else 0


def check_plug_in() -> Iterator[Finding]:
    """Check the interpreter, the package and the import hook."""
    yield Finding(f"Python {platform.python_version()} ({sys.executable})")
    yield Finding(f"{DISTRIBUTION} {__version__} ({Path(registry.__file__).parent})")
    if versions.installed(DISTRIBUTION) is None:
        yield Finding(
            f"{DISTRIBUTION} is imported from a folder but not installed, so its requirements are unknown",
            "pip install -e . in that folder",
        )
    for folder in ("tiny_model", "tiny_creatures"):
        weights = Path(registry.__file__).parent / "mllm" / folder / "model.safetensors"
        if not weights.is_file():
            yield Finding(f"an embedded model is missing: {weights}", _AGAIN, True)
    if HOOK in sys.modules:
        yield Finding("the import hook is active")
    else:
        yield Finding("the import hook is not active: no startup file loads it", _AGAIN, True)


def check_requirements() -> Iterator[Finding]:
    """Compare installed packages with the requirements and with the newest tested versions."""
    for requirement, extra in _requirements():
        if extra:
            continue
        name, specifier = requirement.name, requirement.specifier
        installed = versions.installed(name)
        if installed is None:
            only = OPTIONAL.get(name)
            what = f"{name} is not installed{f' (only for {only})' if only else ''}"
            yield Finding(what, f'pip install "{name}{specifier}"', only is None)
        elif not specifier.contains(installed, prereleases=True):
            yield Finding(f"{name} {installed} does not satisfy {specifier}", f'pip install "{name}{specifier}"', True)
        elif name in TESTED and Version(installed).release[:2] > Version(TESTED[name]).release[:2]:
            fix = f'if something fails, pip install "{name}<={TESTED[name]}" and report it'
            yield Finding(f"{name} {installed} is newer than {TESTED[name]}, the newest tested version", fix)
        else:
            yield Finding(f"{name} {installed}")


def check_interfaces() -> Iterator[Finding]:
    """Check that the libraries still have the required APIs."""
    missing = list(missing_interfaces())
    for name, target in missing:
        fix = f'pip install "{name}<={TESTED[name]}", or a newer {DISTRIBUTION}'
        yield Finding(f"{name} {versions.installed(name)} lacks {target}, which this package requires", fix, True)
    if not missing:
        yield Finding(f"all {len(INTERFACES)} are available")


def missing_interfaces() -> Iterator[tuple[str, str]]:
    """Yield (distribution, missing API) for each required API that is not available."""
    if versions.installed("torch"):  # otherwise peft imports bitsandbytes, which prints a misleading warning
        import_module("domainbed_reasoning.mllm.sealed").import_bitsandbytes()
    for name, target in INTERFACES:
        if versions.installed(name) is None:
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


def check_extras() -> Iterator[Finding]:
    """Check which extras of users are installed."""
    missing: dict[str, list[str]] = {extra: [] for extra in EXTRAS}
    for requirement, extra in _requirements():
        if extra in EXTRAS and not versions.installed(requirement.name):
            missing[extra].append(requirement.name)
    for extra, names in missing.items():
        if names:
            what = f"{extra}: {', '.join(names)} not installed (only for {EXTRAS[extra]})"
            yield Finding(what, f'pip install "{DISTRIBUTION}[{extra}]"')
        else:
            yield Finding(extra)


def check_domainbed() -> Iterator[Finding]:
    """Check which DomainBed is imported, and its commit."""
    folder = upstream.importable_domainbed()
    if folder is None:
        yield Finding("DomainBed not found", "domainbed-reasoning get-domainbed, or run inside your own clone", True)
        return
    tested = upstream.problem_with(folder) is None
    fix = "" if tested else "for the tested commit, run domainbed-reasoning get-domainbed outside this clone"
    yield Finding(f"{folder} ({upstream.describe(folder)})", fix)


def check_registries() -> Iterator[Finding]:
    """Import DomainBed's registries and look up this package's names."""
    if upstream.importable_domainbed() is None:
        return
    for module, registry_name, ours in (
        ("domainbed.algorithms", "ALGORITHMS", registry.ALGORITHMS),
        ("domainbed.datasets", "DATASETS", registry.DATASETS),
        ("domainbed.command_launchers", "REGISTRY", registry.LAUNCHERS),
    ):
        try:
            names = getattr(import_module(module), registry_name)
            problems = import_module("domainbed_reasoning.bridge.register").publish(sys.modules[module])
        except Exception as error:
            fix = f'pip install "{DISTRIBUTION}[domainbed]" has what DomainBed imports; otherwise see the message'
            yield Finding(f"importing {module} failed: {type(error).__name__}: {error}", fix, True)
            continue
        problems = [problem for problem in problems if not problem.startswith("the plug-in ")]  # in a separate section
        missing = [name for name in ours if name not in names]
        for problem in problems:
            fix = f"see the message; {_AGAIN} restores the package's files"
            yield Finding(problem, fix, bool(missing))
        if missing and not problems:
            yield Finding(f"{module} lacks {', '.join(missing)}", _AGAIN, True)
        elif not missing:
            stock = len(names) - len(ours)
            yield Finding(f"{module}.{registry_name} has {', '.join(ours)} and {stock} stock names")


def check_plugins() -> Iterator[Finding]:
    """List the algorithms and datasets that other packages and the user's modules add."""
    rejected: dict[Any, str] = dict(plugins.discover())
    families = import_module("domainbed_reasoning.mllm.family_plugins").discover()
    rejected |= {family: family.problem for family in families if family.problem}
    for plugin in [*plugins.found(), *(family for family in families if not family.problem)]:
        yield Finding(str(plugin))
    for plugin, cause in rejected.items():
        yield Finding(f"{plugin} is left out: {cause}", "fix or uninstall it; everything else works without it")
    if not plugins.found() and not families and not rejected:
        yield Finding(f"none: no entry points, and ${plugins.VARIABLE} names no module")


def check_backbones() -> Iterator[Finding]:
    """Look for the baselines' ImageNet weights in torchvision's cache."""
    try:
        import torch
        from torchvision.models import ResNet18_Weights, ResNet50_Weights
    except Exception as error:  # a library that breaks at import can break in any way
        yield Finding(f"torchvision cannot be imported: {error}", "pip install torchvision", True)
        return
    folder = Path(torch.hub.get_dir(), "checkpoints")
    for name, weights, users in (
        ("ResNet-50", ResNet50_Weights.IMAGENET1K_V1, "used by ERM and most other baselines on 224-pixel images"),
        ("ResNet-18", ResNet18_Weights.IMAGENET1K_V1, 'used with the hparam "resnet18": true'),
    ):
        file = folder / weights.url.rpartition("/")[2]
        if file.is_file():
            yield Finding(f"{name}'s ImageNet weights: {file}")
        else:
            size = weights.meta["_file_size"]
            fix = f"none with network access (jobs download {size:.0f} MB); otherwise copy {weights.url} to {folder}"
            yield Finding(f"{name}'s ImageNet weights are not in {folder} ({users})", fix)


def check_devices() -> Iterator[Finding]:
    """List the GPUs and their free memory."""
    try:
        import torch
    except ImportError as error:
        yield Finding(f"torch cannot be imported: {error}", "pip install torch torchvision", True)
        return
    if not torch.cuda.is_available():
        yield Finding("no GPU: jobs run on the CPU, which suits the tiny model only")
        if torch.accelerator.is_available():
            name = str(torch.accelerator.current_accelerator()).upper()
            yield Finding(f"{name}: used by predict and analyze; DomainBed's train script runs on CUDA or the CPU")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(f"GPU {index}: {name}, {total / 2**30:.0f} GiB, {free / 2**30:.0f} GiB free")


def check_model(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Iterator[Finding]:
    """Load a model and test which optimizations it supports, each against plain single-row computation."""
    try:
        from domainbed_reasoning.mllm.inspection import inspect_model

        family, rows = inspect_model(model, revision, trust_remote_code)
    except (ImportError, ValueError) as error:
        yield Finding(str(error), "follow the message, or use another model", True)
        return
    yield Finding(family)
    for tried, found, cost in rows:
        yield Finding(f"{tried:<26} {found:<22} {cost}".rstrip())


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Plug-in": check_plug_in,
    "Packages": check_requirements,
    "Required APIs": check_interfaces,
    "DomainBed": check_domainbed,
    "Registries": check_registries,
    "Plug-ins": check_plugins,
    "Weights of the baselines": check_backbones,
    "Devices": check_devices,
    "Extras": check_extras,
}


def _requirements() -> Iterator[tuple[Requirement, str]]:
    """Yield the requirements in the package's metadata, each with its extra or an empty string."""
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
