"""How sweeps are run: launchers for DomainBed's registry, studies, and the demo."""
