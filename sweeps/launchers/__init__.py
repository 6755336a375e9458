"""Launchers for DomainBed's sweeps."""
