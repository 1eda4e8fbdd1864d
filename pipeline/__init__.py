"""The run: a recipe in, a report out; and the command line."""
