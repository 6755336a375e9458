"""Image-folder datasets on disk, and the embedded one. Neither torch nor DomainBed."""
