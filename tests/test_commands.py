"""Errors that are a user's end a command in one line; defects keep their traceback."""

import os
import subprocess
import sys

import pytest
from test_loading import ROOT


COMMAND = """
import sys
sys.path.insert(0, {root!r})
from huggingface_hub.errors import RepositoryNotFoundError
from configuration_simvq import VQRAEConfig
from eval.commands import ends_in_one_line
from reading.files import find_images
@ends_in_one_line()
def main():
    print("begun")
    {body}
main()
"""


def end(body: str, tmp_path, *launcher, **environment) -> subprocess.CompletedProcess:
    (tmp_path / "command.py").write_text(COMMAND.format(root=str(ROOT), body=body))
    return subprocess.run(
        [sys.executable, *launcher, "command.py"],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "body, message",
    [
        ("find_images('.')", "No images in ."),  # a `raise ValueError` of ours
        ("open('nowhere.txt')", "nowhere.txt"),  # the machine's
        ("VQRAEConfig(codebook_size=-1)", "codebook_size"),  # the configuration's, by way of a library
        ("exec('with ends_in_one_line(ValueError): import fractions; fractions.Fraction(\"x\")')", "Fraction: 'x'"),
    ],
)
def test_errors_of_the_user_end_in_one_line(tmp_path, body, message):
    done = end(body, tmp_path)
    assert done.returncode == 1 and done.stdout.startswith("begun\n")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("W")]  # torch's warnings, at imports
    assert len(lines) == 1 and lines[0].startswith("command.py: error: ") and message in lines[0], done.stderr


@pytest.mark.parametrize(
    "body",
    [
        "int('x')",
        "exec('with ends_in_one_line(ValueError): int(\"x\")')",
        "raise ValueError('not in a file of ours')",
        "find_images(3)",
        "VQRAEConfig().nothing",
        "[].pop()",
    ],
)
def test_defects_keep_their_traceback(tmp_path, body):
    done = end(body, tmp_path)
    assert done.returncode == 1 and "Traceback (most recent call last)" in done.stderr


def test_what_all_processes_meet_is_said_once(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = end("find_images('.')", tmp_path, *launcher, OMP_NUM_THREADS="1")
    assert done.returncode != 0 and done.stderr.count("No images in .") == 1
    alone = "import os; os.environ['RANK'] == '1' and find_images('.'); import time; time.sleep(60)"
    done = end(alone, tmp_path, *launcher, OMP_NUM_THREADS="1")
    assert done.returncode != 0 and done.stderr.count("No images in .") == 1
