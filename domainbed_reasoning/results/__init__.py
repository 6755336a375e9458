"""A sweep's results as a DataFrame, with what DomainBed's collect_results does not say.

from domainbed_reasoning.results import collect, summarize

frame = collect("sweep")                # a row a trial, target domain and selection method
frame.attrs["problems"]                 # jobs that do not count, and why
table = summarize(frame)                # mean and standard error over the trials
"""

from domainbed_reasoning.results.frame import collect, summarize

__all__ = ["collect", "summarize"]
