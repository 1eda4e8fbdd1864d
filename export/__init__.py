"""A CNN becomes an engine: exported, built, checked, measured, shipped."""
