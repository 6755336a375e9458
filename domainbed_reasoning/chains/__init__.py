"""Reasoning chains: parsing, validation, storage and exchange formats. Imports neither torch nor DomainBed."""
