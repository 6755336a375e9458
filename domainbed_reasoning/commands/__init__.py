"""The subcommands of `domainbed-reasoning`, one file each."""
