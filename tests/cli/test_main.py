import dataclasses
import re
import subprocess
import sys

import pytest

from attnres_ext.cli.main import main, make_parser
from attnres_ext.training.loop import Settings
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


def test_defaults_of_the_command_are_those_of_the_library():
    args = make_parser().parse_args(["train", "--out", "x"])
    named = {**vars(args), "residuals": args.residual}
    for field in dataclasses.fields(Settings):
        assert named[field.name] == field.default, field.name


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
