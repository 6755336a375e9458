"""Everything that depends on DomainBed."""
