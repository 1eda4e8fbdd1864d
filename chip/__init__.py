"""A trained CNN becomes a smaller CNN: scores, plan, surgery."""
