"""Attention Residuals in models that other libraries define."""
