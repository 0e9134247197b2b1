"""How fast the operators are, against what, and how close to what the memory can do.

In the repository this package lies at the top level; installed it is ``attnres_ext.benchmarks``,
and ``attnres bench`` is its command. README.md explains the method.
"""
