"""The paper's analyses, and one beyond it: each a module of functions, a verb's name, a table and a plot."""
