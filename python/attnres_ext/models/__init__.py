"""Reference models that use Attention Residuals."""
