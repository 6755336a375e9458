"""The paper's analyses and an additional one, each with a module, a subcommand, a table and a plot."""
