"""Examples that run from a checkout; none of them is part of the installed package."""
