"""The version of the package: read by setuptools and CMake."""

__version__ = "0.1.0"
