"""Language-model training as ``attnres train`` does it: text, tokenizers, checkpoints, loop, plots.

The modules are importable on their own; nothing in here parses arguments or prints.
"""
