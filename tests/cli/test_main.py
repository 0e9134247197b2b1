import dataclasses
import re
import subprocess
import sys

import pytest

from attnres_ext.cli.arguments import given_fields, options_of, typed
from attnres_ext.cli.main import main, make_parser
from attnres_ext.training.settings import Settings
from attnres_ext.version import __version__

SUBCOMMANDS = ["train", "generate", "inspect", "info", "bench", "plan-pipeline"]


def test_help_names_every_subcommand(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for name in SUBCOMMANDS:
        assert re.search(rf"^    {name}\b", text, re.MULTILINE)
    assert "examples:" in text


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_subcommand_help_has_examples_and_explains_every_option(name, capsys):
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert f"attnres {name}" in text.partition("examples:")[2]
    assert max(map(len, text.splitlines())) <= 110
    (action,) = (action for action in make_parser([name])._actions if action.dest == "command")
    for option in action.choices[name]._actions:
        assert option.help, option.option_strings


@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda field: field.name)
def test_a_setting_is_an_option(field):
    """Its default, typed, is its default; what is not named is left to the dataclass."""
    named = 3 if field.default is None else field.default
    words = [options_of(field)[-1], *([] if named is False else [typed(named)])]
    args = make_parser(["train"]).parse_args(["train", "--out", "x", *words])
    (given,) = given_fields(args, Settings).items()
    assert given[0] is field
    assert given[1] is True if named is False else typed(given[1]).endswith(typed(named))
    assert field.default in (None, False) or given[1] == field.default


def test_settings_are_refused_in_python_as_on_the_command_line():
    with pytest.raises(ValueError, match=r"^steps is 0, expected a positive integer; seeds has -1"):
        Settings(steps=0, seeds=(-1,))
    with pytest.raises(ValueError, match=r"^sublayers_per_block is 0, .*, or null$"):
        Settings(sublayers_per_block=0)
    with pytest.raises(ValueError, match=r"residuals has 'ring', expected one of standard, block"):
        Settings(residuals=("block", "ring"))


@pytest.mark.parametrize("argv", [[], ["fly"], ["train", "--wings", "2"], ["train"]])
def test_bad_arguments_are_one_sentence(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("attnres")
    assert "--help)" in error


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_an_option_that_a_command_has_not_refers_to_its_own_help(name, capsys):
    required = {"train": ["--out", "x"], "generate": ["--checkpoint", "x"]}
    required["inspect"] = ["x", "--out", "y"]
    required["plan-pipeline"] = ["--pipeline", "2"]
    with pytest.raises(SystemExit) as exit:
        main([name, *required.get(name, []), "--colour=red"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == (
        f"attnres {name}: unrecognized arguments: --colour=red (see attnres {name} --help)\n"
    )


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"attnres {__version__}\n"


def test_parsing_imports_nothing_heavy():
    # A broken or slow dependency of one subcommand is none of the others' business.
    program = (
        "import sys, attnres_ext\n"
        "before = set(sys.modules)\n"
        "from attnres_ext.cli.main import make_parser\n"
        "make_parser()\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'torch', 'matplotlib', 'tokenizers', 'rich', 'safetensors', 'numpy'}\n"
        "assert not new & heavy, new & heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_module_is_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "attnres_ext", "train"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("attnres train: ")
    assert "--out" in result.stderr


def test_broken_matplotlib_leaves_training_and_info_alone(tmp_path, text):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "matplotlib.py").write_text("raise ImportError('no fonts today')")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'broken')!r})\n"
        "from attnres_ext.cli.main import main\n"
        "sys.exit(main(['info']) or main(sys.argv[1:]))\n"
    )
    argv = ["train", "--out", tmp_path / "run", "--text", text, "--preset", "tiny"]
    argv += ["--steps", "1", "--validation-batches", "1", "--sequence-length", "16"]
    result = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "no fonts today" in result.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
    assert not (tmp_path / "run" / "loss.png").exists()
