"""A sweep's results as a DataFrame, with details that DomainBed's collect_results lacks.

from domainbed_reasoning.results import collect, summarize

frame = collect("sweep")                # one row per trial, target domain and selection method
frame.attrs["problems"]                 # jobs that were excluded, and why
table = summarize(frame)                # mean and standard error over the trials
"""

from domainbed_reasoning.results.frame import collect, summarize

__all__ = ["collect", "summarize"]
