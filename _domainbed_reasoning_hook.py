"""What the startup files load at every interpreter start: the import hook. Standard library only, and little of it.

The hook waits for DomainBed's registries to be imported and has `domainbed_reasoning.bridge.register` add our names to
them. It also makes the user's cached clone importable where no other DomainBed is. It does nothing else, and nothing at
all in processes that never import DomainBed. Whatever fails in this package, DomainBed's own modules stay importable.
Imported by hand, where no startup file did so, it also publishes to the registries that are imported already.
"""

import sys
from _thread import get_ident

STOCK_MODULES = (
    "domainbed.algorithms",
    "domainbed.datasets",
    "domainbed.hparams_registry",
    "domainbed.command_launchers",
)
# A class module imports its stock counterpart, which publishes the class modules: while one of them is half-imported
# publishing has to wait until it is whole.
CLASS_MODULES = ("domainbed_reasoning.algorithms.", "domainbed_reasoning.datasets.")

_running: list[str] = []
_finding: set[tuple[int, str]] = set()  # (thread, module) of the searches under way
_warned: set[str] = set()


class _RegistryFinder:
    """Finds the watched modules with the other finders, and publishes after they ran."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name not in STOCK_MODULES and not name.startswith(CLASS_MODULES):
            return None
        search = (get_ident(), name)
        if search in _finding:  # another finder that asks all others, as this one does
            return None
        _finding.add(search)
        try:
            for finder in sys.meta_path:
                find_spec = None if finder is self else getattr(finder, "find_spec", None)
                spec = find_spec(name, path, target) if find_spec else None
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        _publish_after(spec.loader)  # type: ignore[no-untyped-call]
                    return spec
            return None
        finally:
            _finding.remove(search)


class _CachedCloneFinder:
    """Finds `domainbed` in the clone of `domainbed-reasoning get-domainbed` when no finder before this one did."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != "domainbed":
            return None
        try:
            from domainbed_reasoning.bridge import upstream

            return upstream.find_cached_spec()
        except Exception as error:
            _warn_unless_uninstalled(error)
            return None


def _publish_after(loader):  # type: ignore[no-untyped-def]
    """Make ``loader`` publish our names once it has executed a module."""
    execute = loader.exec_module

    def exec_module(module):  # type: ignore[no-untyped-def]
        name = module.__name__
        _running.append(name)
        try:
            execute(module)
        finally:
            _running.remove(name)
        publish()

    try:
        loader.exec_module = exec_module
    except (AttributeError, TypeError) as error:
        _warn_unless_uninstalled(error)


def publish() -> None:
    """Add our names to the stock registries that are imported; later, if one of our class modules is half-imported."""
    if any(name.startswith("domainbed_reasoning.") for name in _running):
        return
    left = _imported()
    if not left:
        return
    _running.append("domainbed_reasoning.bridge.register")
    try:
        from domainbed_reasoning.bridge import register

        done: set[str] = set()
        while left:  # publishing imports the user's plug-ins, which may import more of DomainBed
            for name in left:
                for problem in register.publish(sys.modules[name]):
                    warn(problem)
            done.update(left)
            left = [name for name in _imported() if name not in done]
    except Exception as error:
        _warn_unless_uninstalled(error)
    finally:
        _running.remove("domainbed_reasoning.bridge.register")


def _imported() -> list[str]:
    """Return the stock modules that are imported, and whole."""
    return [name for name in STOCK_MODULES if name in sys.modules and name not in _running]


def _warn_unless_uninstalled(error: Exception) -> None:
    """Warn of an error in our package, unless that is gone and only this file is left."""
    missing = isinstance(error, ModuleNotFoundError) and str(error.name).startswith("domainbed_reasoning")
    if not missing or sys.modules.get("domainbed_reasoning") is not None:
        warn(f"it cannot be loaded: {type(error).__name__}: {error}")


def warn(problem: str) -> None:
    """Print a problem once per process; a warning could be turned into an error and break the import of DomainBed."""
    if problem not in _warned and sys.stderr is not None:
        _warned.add(problem)
        hint = "DomainBed itself works; run `domainbed-reasoning doctor` for a fix."
        print(f"domainbed-reasoning: {problem}. {hint}", file=sys.stderr)


def install() -> None:
    """Install the finders, once; the `.start` file calls it, after the import that has done so already."""
    if not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())
        sys.meta_path.append(_CachedCloneFinder())


install()
publish()
