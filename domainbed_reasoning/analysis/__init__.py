"""The paper's analyses and one beyond it, each with a module, a subcommand, a table and a plot."""
