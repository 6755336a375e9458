"""How sweeps are run: launchers for DomainBed's registry, and recipes."""
