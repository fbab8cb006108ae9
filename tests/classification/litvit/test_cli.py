"""How command lines end: status and one line."""

import pytest
from torch.utils.data import DataLoader

from litvit import cli
from litvit.errors import InputError


@pytest.mark.parametrize(("returned", "status"), [(None, None), (0, 0), (3, 3)])
def test_the_status_is_what_main_returns(returned, status):
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda _: returned)
    assert exit_.value.code == status


def test_wrong_input_is_one_line_and_status_2(capsys):
    def main(_):
        cli.ArgumentParser(prog="x.py").parse_args(["--nothing"])

    with pytest.raises(SystemExit) as exit_:
        cli.run(main)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --nothing (x.py --help lists the flags)\n"


@pytest.mark.parametrize("flag", ["--epoch", "--epochz=5"])
def test_a_misspelled_flag_gets_the_one_that_is_meant(flag):
    parser = cli.ArgumentParser(prog="x.py", allow_abbrev=False)
    parser.add_argument("--epochs")
    with pytest.raises(InputError, match=f"unrecognized arguments: {flag}; did you mean --epochs"):
        parser.parse_args([flag])


@pytest.mark.parametrize("line", ["data --size 64 -x", "--size 64 data -x", "--size 64 -x data", "-x data --size 64"])
def test_a_flag_of_several_numbers_ends_where_they_end(line):
    parser = cli.ArgumentParser(prog="x.py")
    parser.add_argument("folder")
    parser.add_argument("--size", type=int, nargs="+")
    parser.add_argument("-x", action="store_true")
    settings = parser.parse_args(line.split())
    assert (settings.folder, settings.size, settings.x) == ("data", [64], True)
    assert parser.parse_args(line.replace("64", "64 96").split()).size == [64, 96]
    with pytest.raises(InputError, match="argument --size: invalid int value: '6.4'"):
        parser.parse_args(line.replace("64", "6.4").split())
    with pytest.raises(InputError, match="argument --size: expected at least one argument"):
        parser.parse_args(["data", "--size"])


@pytest.mark.parametrize(
    ("line", "port"), [("--port 80 data", 80), ("--port data", 0), ("data", None), ("data --port", 0)]
)
def test_a_flag_of_one_number_or_none(line, port):
    parser = cli.ArgumentParser(prog="x.py")
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, nargs="?", const=0)
    settings = parser.parse_args(line.split())
    assert (settings.folder, settings.port) == ("data", port)


def test_other_errors_are_not_hidden():
    def main(_):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        cli.run(main)


class Broken:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise InputError("image 7 is broken")


def test_the_error_of_a_loader_process_is_one_line_too():
    with pytest.raises(InputError) as error:
        list(DataLoader(Broken(), num_workers=1))
    assert str(error.value) == "image 7 is broken"


def test_unknown_models_suggest_near_ones():
    assert cli.model_name("lit_b") == "lit_b"
    with pytest.raises(InputError, match="did you mean swin_tiny"):
        cli.model_name("swin_tiny_patch4_windw7_224")
    with pytest.raises(InputError, match="LIT's models: lit_b"):
        cli.model_name("q")
