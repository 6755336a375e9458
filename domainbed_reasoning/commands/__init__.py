"""The verbs of the command `domainbed-reasoning`, a file each."""
