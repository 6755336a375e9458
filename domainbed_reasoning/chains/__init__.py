"""Chains: parse, judge, keep and exchange them. Neither torch nor DomainBed."""
