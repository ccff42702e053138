"""Runs transformers' own common tests of models, configurations and image processors on the classes of this repository.

    python tests/transformers_common/run.py

The tests come with the source distribution of the transformers that is installed, which is downloaded once, into the
cache. Ends with 0 if nothing fails but what NOT_APPLICABLE names, and also, saying so, where the package index cannot
be reached.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree
from pathlib import Path

import transformers


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# test class and test, as a regular expression: why it cannot pass
NOT_APPLICABLE = {
    r"Convolutional::test_hidden_states_output": "a convolutional decoder has maps, not (tokens, width)",
    r"FrozenSiglip::test_training_gradient_checkpointing.*": "these make all parameters trainable behind the model's "
    "back, and expect of a frozen encoder, which stays in eval mode, that it then recomputes its activations",
    r".*::test_eager_matches_sdpa_inference_\d+_bf16.*": "the two round features differently in bf16, so that a latent "
    "between two codes gets the one or the other, and the decoder paints another patch",
}
# what the common tests import, the source distribution does not hold, and tests of these classes do not use
STUBS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/models/__init__.py": "",
    "tests/models/vqrae/__init__.py": "",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {'return_dict': False}\n",
    "fetch_hub_objects_for_ci.py": "def url_to_local_path(url, *arguments, **options):\n    return url\n",
}


def download(folder: Path) -> None:
    """The tests of the source distribution, and what they lack, into a new folder.

    Raises:
        ConnectionError: the package index cannot be reached.
    """
    with tempfile.TemporaryDirectory() as downloaded:
        name = f"transformers=={transformers.__version__}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        try:
            done = subprocess.run([*command, "-d", downloaded, name], capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired as error:
            raise ConnectionError("no answer within 10 minutes") from error
        if done.returncode:
            raise ConnectionError(done.stderr.strip().splitlines()[-1])
        (archive,) = Path(downloaded).glob("transformers-*.tar.gz")
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
        with tarfile.open(archive) as members:
            tests = [m for m in members.getmembers() if re.match(r"[^/]+/tests/(?!fixtures).*\.py$", m.name)]
            for member in tests:
                member.name = member.name.partition("/")[2]
            members.extractall(unfinished, tests, filter="data")
    for name, text in STUBS.items():
        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / name).write_text(text)
    unfinished.rename(folder)


def failures(report: Path) -> dict[str, str]:
    """What failed according to pytest's XML, and the first line of why: by "Class::test"."""
    found = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        for problem in [*case.findall("failure"), *case.findall("error")]:
            name = f"{case.get('classname').split('.')[-1]}::{case.get('name')}"
            found[name] = (problem.get("message") or "").splitlines()[0] if problem.get("message") else ""
    return found


def main() -> int:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / f"vqrae-transformers-tests-{transformers.__version__}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"Downloading the tests of transformers {transformers.__version__}.", flush=True)
        try:
            download(folder)
        except ConnectionError as error:
            print(f"Skipped: the tests of transformers cannot be had from the package index ({error}).")
            return 0
    (folder / "tests" / "models" / "vqrae" / "test_vqrae.py").write_text((HERE / "suite.py").read_text())
    with tempfile.TemporaryDirectory() as reports:
        report = Path(reports) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--tb=no",
            "-W",
            "ignore",
            f"--junitxml={report}",
        ]
        done = subprocess.run(
            [*command, "--no-header", "-rN", "tests/models/vqrae"],
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
            timeout=1200,
        )
        if not report.exists():
            print("The tests did not run.")
            return done.returncode or 1
        failed = failures(report)
    unexpected = {}
    for name, message in sorted(failed.items()):
        reason = next((why for pattern, why in NOT_APPLICABLE.items() if re.fullmatch(pattern, name)), None)
        print(f"{'does not apply' if reason else 'FAILED'}: {name}: {reason or message}")
        if not reason:
            unexpected[name] = message
    print(f"{len(unexpected)} failed, {len(failed) - len(unexpected)} do not apply.")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
