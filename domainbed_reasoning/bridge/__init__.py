"""All that knows DomainBed."""
