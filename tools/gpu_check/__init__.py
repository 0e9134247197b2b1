"""``make gpu-check``: everything that only a machine with an NVIDIA GPU can prove, in one record.

Runs the operators' tests on the GPU, compute-sanitizer's checkers over a part of them, and the
benchmark, each in a process of its own and within its share of the time, and writes one JSON file
into ``benchmarks/results/``. The program itself needs nothing but the standard library; the Python
that it checks with needs torch and pytest.
"""
