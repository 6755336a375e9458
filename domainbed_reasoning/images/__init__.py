"""Image-folder datasets on disk, and the embedded dataset. Imports neither torch nor DomainBed."""
