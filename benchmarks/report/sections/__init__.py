"""The parts of the page, one module each.

Every module has ``section(kept)``, which is None where the results have nothing to show.
"""
