"""Chain annotation: teachers, rejection sampling, statistics, dataset cards and the browser page."""
