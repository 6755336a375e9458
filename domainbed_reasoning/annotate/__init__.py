"""DomainBed-Reasoning, the data: chains from a teacher, judged, kept with their verdicts, counted and looked at."""
