"""``_C.pyi``, written by hand: generated ones name types of a pybind11 version and of a build."""

import ast
import re
from pathlib import Path

import pytest

from attnres_ext import _C

STUB = ast.parse(Path(_C.__file__).with_name("_C.pyi").read_text(encoding="utf-8"))


def members(node):
    return {
        child.target.id if isinstance(child, ast.AnnAssign) else child.name: child
        for child in node.body
        if isinstance(child, ast.AnnAssign | ast.FunctionDef | ast.ClassDef)
    }


def signature(function):
    """Names of arguments, defaults and the name of what is returned."""
    arguments = [argument.arg for argument in function.args.args]
    defaults = [ast.unparse(default) for default in function.args.defaults]
    return arguments, defaults, ast.unparse(function.returns).rpartition(".")[2]


def documented(function):
    """The signature that pybind11 writes into a docstring's first line."""
    line = re.sub(r"^\w*\(", "f(", function.__doc__.strip().splitlines()[0])
    return signature(ast.parse(f"def {line}: ...").body[0])


def public(namespace):
    return {name for name in dir(namespace) if not name.startswith("_")}


def test_names():
    assert members(STUB).keys() == public(_C)
    for name in ("version", "compiler", "cxx_standard", "cuda_archs", "max_sources"):
        annotation = ast.unparse(members(STUB)[name].annotation)
        assert annotation.partition("[")[0] == type(getattr(_C, name)).__name__


@pytest.mark.parametrize("name", ["plan", "bytes_moved", "kernel_config"])
def test_functions(name):
    assert signature(members(STUB)[name]) == documented(getattr(_C, name))


@pytest.mark.parametrize("name", ["Plan", "CacheState"])
def test_classes(name):
    stub, cls = members(members(STUB)[name]), getattr(_C, name)
    assert stub.keys() - {"__init__"} == public(cls)
    for member, function in stub.items():
        value = getattr(cls, member)
        (_, *arguments), *rest = documented(value.fget if isinstance(value, property) else value)
        assert signature(function) == (["self", *arguments], *rest)
